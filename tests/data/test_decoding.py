"""The decoder torch: timm's own draws, a resize that is Pillow's to a rounding, and JPEGs decoded at a crop's scale."""

from pathlib import Path

import datasets
import matplotlib.cbook
import pytest
import torch
from PIL import Image

import timm_tinyvit
from support.files import encode_image
from timm_tinyvit.data import decoding
from timm_tinyvit.data.dataset import SparseLogitDataset
from timm_tinyvit.data.decoding import JpegImage, as_tensor
from timm_tinyvit.data.view_config import ViewConfig
from timm_tinyvit.data.views import Replay, decode_image

JPEG = Path(timm_tinyvit.__file__).parent / 'data' / 'probe.jpg'
SIZE = (3, 96, 80)


def make_replay(decoder, **changes):
    return Replay(ViewConfig(**{'input_size': SIZE, 'decoder': decoder, **changes}), seed=5)


@pytest.fixture
def scales(monkeypatch):
    """How often JPEGs were cropped at which scale."""
    found = dict.fromkeys(decoding.DENOMINATORS, 0)
    crop = JpegImage.crop

    def count(image, box, denominator):
        found[denominator] += 1
        return crop(image, box, denominator)

    monkeypatch.setattr(JpegImage, 'crop', count)
    return found


def test_a_decoded_jpeg_has_the_pixels_that_pillow_gives_it():
    pytest.importorskip('simplejpeg')
    for source in (JPEG, JPEG.read_bytes(), str(JPEG)):
        assert torch.equal(make_replay('torch').decode(source).pixels, as_tensor(decode_image(source)))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_jpeg_is_turned_upright_as_pillow_turns_it(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode_image(Image.open(JPEG).resize((40, 30)), 'JPEG', exif=exif)
    assert torch.equal(make_replay('torch').decode(data).pixels, as_tensor(decode_image(data)))


def mean_differences(data, **changes):
    """Of 60 views each, between those of the decoders `pillow` and `torch`, in levels of 255."""
    views = []
    for decoder in ('pillow', 'torch'):
        replay = make_replay(decoder, color_jitter=0., **changes)
        views.append(torch.stack(replay.views([replay.decode(data)] * 60, [(1, index) for index in range(60)])))
    return (views[0].float() - views[1].float()).abs().mean(dim=(1, 2, 3))


@pytest.mark.parametrize('options', [
    *(dict(orientation=orientation) for orientation in range(2, 9)), dict(orientation=6, size=(304, 366)),
    dict(size=(311, 362)), dict(quality=98, subsampling='4:4:4'), dict(progressive=True), dict(mode='L'),
    dict(mode='CMYK')])
def test_a_photograph_at_a_smaller_scale_gives_the_views_of_all_its_pixels(options, scales):
    options = {'mode': 'RGB', 'size': (305, 361), 'orientation': 1, **options}
    image = Image.open(matplotlib.cbook.get_sample_data('grace_hopper.jpg'))
    image = image.resize(options.pop('size')).convert(options.pop('mode'))
    exif = Image.Exif()
    exif[0x0112] = options.pop('orientation')
    differences = mean_differences(encode_image(image, 'JPEG', exif=exif, **options), input_size=(3, 14, 12))
    assert differences.mean() < 1.5 and differences.max() < 3.5 and min(scales.values()) > 0


def test_a_crop_of_few_pixels_is_cut_from_the_whole_jpeg(scales):
    # Of 120 pixels at most, where half the size takes 4 * 31.
    assert mean_differences(JPEG, input_size=(3, 31, 31)).max() < 0.1 and not any(scales.values())


def test_the_probe_knows_at_which_scale_a_jpeg_is_decoded(scales, monkeypatch):
    replay = make_replay('torch', input_size=(3, 224, 224))
    probe = replay.probe()
    assert min(scales.values()) > 0
    monkeypatch.setattr(decoding, 'SPARE', 1.5)
    assert replay.probe() != probe


def test_views_are_the_same_without_simplejpeg(monkeypatch):
    replay = make_replay('torch')
    probe = replay.probe()
    monkeypatch.setattr(decoding, 'simplejpeg', None)
    assert replay.probe() == probe


@pytest.mark.parametrize('mode, file_format', [
    ('L', 'JPEG'), ('CMYK', 'JPEG'), ('RGB', 'PNG'), ('RGBA', 'PNG'), ('P', 'PNG'), ('RGB', 'WEBP')])
def test_every_other_image_is_decoded_by_pillow(mode, file_format):
    data = encode_image(Image.open(JPEG).convert(mode), file_format)
    image = make_replay('torch').decode(data)
    assert torch.equal(image.pixels if file_format == 'JPEG' else image, as_tensor(decode_image(data)))


@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear', 'random'])
def test_views_are_cut_from_the_same_places_and_differ_by_a_rounding(interpolation):
    # torch 2.6 rounds 14% of the pixels of bilinear crops otherwise than Pillow; torch 2.14 less than 2%.
    share = 0.02 if interpolation == 'bicubic' else 0.2
    views = []
    for decoder in ('pillow', 'torch'):
        replay = make_replay(decoder, interpolation=interpolation, color_jitter=0., re_prob=0.5)
        views.append(torch.stack(replay.views([replay.decode(JPEG)] * 40, [(1, index) for index in range(40)])))
    difference = (views[0].int() - views[1].int()).abs()
    assert difference.max() <= 2 and (difference > 0).float().mean() < share
    assert len({view.numpy().tobytes() for view in views[1]}) == 40


def test_a_view_is_the_same_in_any_order_and_its_probe_is_its_own():
    replay = make_replay('torch', auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.25)
    image = replay.decode(JPEG)
    forth = [replay(image, 3, index) for index in range(6)]
    back = [replay(image, 3, index) for index in reversed(range(6))]
    assert all(map(torch.equal, forth, reversed(back)))
    again = make_replay('torch', auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.25)
    assert replay.probe() == again.probe() != make_replay(
        'pillow', auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.25).probe()


def test_the_data_set_decodes_as_the_view_config_says():
    rows = [dict(bytes=JPEG.read_bytes(), path=None), dict(bytes=encode_image(Image.open(JPEG), 'PNG'), path=None)]
    dataset = datasets.Dataset.from_dict({'image': rows, 'label': [0, 1]}).cast_column('image', datasets.Image())
    replay = make_replay('torch')
    samples = SparseLogitDataset(dataset, replay).__getitems__([(2, 1), (2, 0)])
    for sample, index in zip(samples, (1, 0)):
        expected = replay(as_tensor(decode_image(rows[index]['bytes'])), 2, index)
        assert torch.equal(sample['view'], expected) and sample['label'] == index


@pytest.mark.parametrize('view_size', [6, 96])
@pytest.mark.parametrize('size', [0, 1, 50, 2000, None])
def test_a_jpeg_that_is_cut_short_fails_as_it_does_with_pillow(size, view_size):
    data = JPEG.read_bytes()[:size]
    results = []
    for decoder in ('pillow', 'torch'):
        try:
            replay = make_replay(decoder, input_size=(3, view_size, view_size))
            results.append(replay(replay.decode(data), 0, 0).shape)
        except OSError as error:
            results.append(type(error))
    assert results[0] == results[1] == ((3, view_size, view_size) if size is None else OSError)


@pytest.mark.parametrize('changes', [dict(no_aug=True), dict(train_crop_mode='rkrc')])
def test_other_crops_are_refused(changes, refused):
    with refused('torch', 'rrc', 'pillow'):
        ViewConfig(decoder='torch', **changes)
