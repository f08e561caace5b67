"""Replay: a view is a pure function of (seed, epoch, index), and it is timm's own view."""

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from torch.utils.data import DataLoader

import timm_tinyvit
from support.view_digests import print_view_digests, view_digests
from timm_tinyvit.data.dataset import SparseLogitDataset, collate
from timm_tinyvit.data.sampler import EpochBatchSampler
from timm_tinyvit.data.view_config import ViewConfig
from timm_tinyvit.data.views import (
    Replay, check_probe, decode_image, library_versions, preserve_random_state, seed_view,
)

PHOTOGRAPH = Path(timm_tinyvit.__file__).parent / 'data' / 'probe.jpg'
SIZE = (3, 40, 48)
PAPER = dict(auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.25, re_mode='pixel', color_jitter=0.4)
# Every augmentation, as arguments of timm's create_transform beside the size.
CASES = {
    'crop': {},
    'narrow crop': dict(scale=(0.9, 1.), ratio=(1., 1.)),
    'vertical flip': dict(vflip=0.5),
    'no flip': dict(hflip=0.),
    'RandAugment': dict(auto_augment='rand-m9-mstd0.5-inc1'),
    'RandAugment with another fill': dict(auto_augment='rand-m9-mstd0.5-inc1', mean=(0.1, 0.2, 0.9)),
    'AutoAugment original': dict(auto_augment='original'),
    'AutoAugment v0': dict(auto_augment='v0-mstd0.5'),
    '3-Augment': dict(auto_augment='3a', color_jitter=0.3),
    'AugMix': dict(auto_augment='augmix-m3-w3'),
    'colour jitter': dict(color_jitter=(0.4, 0.4, 0.4, 0.1)),
    'no colour jitter': dict(color_jitter=0.),
    'colour jitter now and then': dict(color_jitter=0.9, color_jitter_prob=0.5),
    'grey': dict(grayscale_prob=0.5),
    'blur': dict(gaussian_blur_prob=0.5),
    'erasing const': dict(re_prob=0.8, re_mode='const', re_count=1),
    'erasing rand': dict(re_prob=0.8, re_mode='rand', re_count=3),
    'erasing pixel': dict(re_prob=0.8, re_mode='pixel', re_count=3),
    'erasing in another scale': dict(re_prob=1., re_mode='pixel', mean=(0.5, 0.2, 0.7), std=(0.1, 0.2, 0.3)),
    'the paper': PAPER,
    'keep ratio, centre': dict(train_crop_mode='rkrc', scale=(0.5, 1.), ratio=(0.9, 1.1)),
    'keep ratio, random': dict(train_crop_mode='rkrr', scale=(0.5, 1.), ratio=(0.9, 1.1)),
    'no augmentation': dict(no_aug=True, re_prob=1.),
    'bilinear': dict(interpolation='bilinear'),
    'random interpolation': dict(interpolation='random'),
}


@pytest.fixture(scope='module')
def images(fashion):
    """A photograph, as the package carries it for its probe, and real small images."""
    return [decode_image(PHOTOGRAPH), *(image.convert('RGB') for image in fashion.select(range(3))['image'])]


def make_config(**changes):
    return ViewConfig(**{'input_size': SIZE, **changes})


def timm_views(images, seed, keys, arguments):
    """What timm's own pipeline gives, normalised, for the same seeds."""
    transform = create_transform(
        SIZE, is_training=True, normalize=True,
        **{'interpolation': 'bicubic', 're_mode': 'pixel', **arguments})
    views = []
    with preserve_random_state():
        for image, key in zip(images, keys):
            seed_view(seed, *key)
            views.append(transform(image))
    return torch.stack(views)


@pytest.mark.parametrize('arguments', CASES.values(), ids=CASES)
def test_a_view_is_the_one_of_timms_own_pipeline(arguments, images):
    keys = [(epoch, index) for epoch in range(6) for index in range(4)]
    pictures = [images[index] for _, index in keys]
    views = torch.stack(Replay(make_config(**arguments), seed=3).views(pictures, keys))
    assert views.dtype == torch.uint8 and views.shape == (24, *SIZE)
    mean = torch.tensor(arguments.get('mean', IMAGENET_DEFAULT_MEAN)).view(3, 1, 1)
    std = torch.tensor(arguments.get('std', IMAGENET_DEFAULT_STD)).view(3, 1, 1)
    expected = timm_views(pictures, 3, keys, arguments)
    # Only erased pixels can lie beside the scale of a pixel, or between two values.
    pixels = (expected * std + mean) * 255
    difference = (views - pixels.clamp(0, 255)).abs()
    erased = (pixels - pixels.round()).abs() > 1e-3
    assert difference.max() <= 0.5 + 1e-3 and difference[~erased & (pixels > -0.1) & (pixels < 255.1)].max() < 1e-3
    assert torch.equal(views[~erased], pixels.round().clamp(0, 255)[~erased].to(torch.uint8))
    if arguments.get('re_prob') and not arguments.get('no_aug'):
        # A few pixels in a hundred are of several standard deviations.
        assert erased.float().mean() > 0.02
    else:
        assert not erased.any()
        normalised = (views / 255 - mean) / std
        torch.testing.assert_close(normalised, expected, rtol=0, atol=1e-5)
    # The case does something: without its arguments the views are others.
    plain = torch.stack(Replay(make_config(), seed=3).views(pictures, keys))
    assert torch.equal(views, plain) == (not arguments)


def test_three_percent_of_erased_values_are_clipped(images):
    arguments = dict(re_prob=1., re_mode='pixel')
    keys = [(0, index) for index in range(40)]
    expected = timm_views([images[0]] * 40, 3, keys, arguments)
    pixels = (expected * torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
              + torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)) * 255
    erased = (pixels - pixels.round()).abs().amax(dim=1, keepdim=True).expand_as(pixels) > 1e-3
    clipped = ((pixels < 0) | (pixels > 255))[erased].float().mean()
    # Of a normal variable with ImageNet's mean and std: (2.94 + 2.84 + 4.00) / 3 percent.
    assert clipped.item() == pytest.approx(0.0326, abs=0.004)


def test_a_view_is_a_contiguous_tensor_with_values_of_its_own(images):
    for arguments in ({}, PAPER):
        replay = Replay(make_config(**arguments), seed=0)
        view = replay(images[0], 0, 0)
        assert view.is_contiguous() and view.shape == SIZE
        kept = view.clone()
        replay(images[1], 0, 1)
        assert torch.equal(view, kept)


def test_another_seed_epoch_or_index_gives_another_view(images):
    views = {
        (seed, epoch, index): Replay(make_config(), seed)(images[0], epoch, index).numpy().tobytes()
        for seed in (0, 1, -1, 2 ** 62) for epoch in (0, 1, 299) for index in (0, 1, 14_000_000)}
    assert len(set(views.values())) == len(views)


def test_a_view_does_not_depend_on_what_was_drawn_before(images):
    replay = Replay(make_config(**PAPER), seed=5)
    keys = [(epoch, index) for epoch in range(2) for index in range(4)]
    expected = [replay(images[index], epoch, index) for epoch, index in keys]
    for number, (epoch, index) in enumerate(reversed(keys)):
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        random.random(), np.random.rand(number), torch.randn(number), random.gauss(0, 1), np.random.randn()
        assert torch.equal(replay(images[index], epoch, index), expected[keys.index((epoch, index))])
    assert all(map(torch.equal, replay.views([images[index] for _, index in keys], keys), expected))
    assert all(map(torch.equal, Replay(make_config(**PAPER), 5).views([images[0]], [(0, 0)]), expected))


def random_states():
    state = np.random.get_state()
    return random.getstate(), (state[0], state[1].tobytes(), *state[2:]), torch.get_rng_state().numpy().tobytes()


def test_the_global_generators_are_left_as_they_were_found(images):
    replay = Replay(make_config(**PAPER, gaussian_blur_prob=0.5), seed=5)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    # Half a pair of normal numbers is part of the state.
    random.gauss(0, 1), np.random.randn()
    before = random_states()
    replay(images[0], 0, 0)
    replay.views(images, [(1, index) for index in range(4)])
    replay.probe()
    assert random_states() == before
    with pytest.raises(TypeError):
        replay.views([images[0], None], [(0, 0), (0, 1)])
    assert random_states() == before
    with preserve_random_state():
        seed_view(0, 0, 0)
        assert all(here != there for here, there in zip(random_states(), before))
    assert random_states() == before


def test_as_many_keys_as_images_are_needed(images):
    with pytest.raises(ValueError):
        Replay(make_config(), 0).views(images, [(0, 0)])


@pytest.fixture(scope='module')
def view_of(fashion):
    """The view of every (epoch, index), made one by one."""
    rows = fashion.select(range(60))
    replay = Replay(make_config(**PAPER), seed=11)
    pictures = [image.convert('RGB') for image in rows['image']]
    return rows, replay, {
        (epoch, index): replay(pictures[index], epoch, index) for epoch in range(3) for index in range(60)}


# Three workers are more than this machine may have cores.
@pytest.mark.filterwarnings('ignore:This DataLoader will create:UserWarning')
@pytest.mark.parametrize('workers, batch_size, options', [
    (0, 8, {}),
    (1, 8, dict(prefetch_factor=1)),
    (3, 7, dict(persistent_workers=True, prefetch_factor=4)),
    (3, 20, dict(persistent_workers=True)),
])
def test_views_are_the_same_with_any_loader_over_several_epochs(workers, batch_size, options, view_of):
    rows, replay, expected = view_of
    sampler = EpochBatchSampler(60, batch_size, seed=0)
    loader = DataLoader(
        SparseLogitDataset(rows, replay), batch_sampler=sampler, num_workers=workers, collate_fn=collate, **options)
    seen = []
    for epoch in range(3):
        # Nothing but the keys tells persistent workers which epoch it is.
        sampler.set_epoch(epoch)
        keys = [key for batch in sampler for key in batch]
        sampler.set_epoch(epoch)
        torch.rand(epoch)
        views = torch.cat([batch['view'] for batch in loader])
        assert torch.equal(views, torch.stack([expected[key] for key in keys]))
        seen += keys
    assert len(set(seen)) == 3 * (60 // batch_size) * batch_size and seen != sorted(seen)


def test_views_of_many_epochs_may_stand_in_one_batch(view_of):
    rows, replay, expected = view_of
    keys = random.Random(0).sample(sorted(expected), 50)
    views = SparseLogitDataset(rows, replay).__getitems__(keys)
    assert all(torch.equal(sample['view'], expected[key]) for sample, key in zip(views, keys))


@pytest.mark.launches
def test_views_and_probes_are_the_same_in_a_fresh_process(hub_children):
    configs = {name: make_config(**arguments).to_dict() for name, arguments in CASES.items()}
    fresh = hub_children.run(print_view_digests, os.environ, configs, PHOTOGRAPH)
    digests = view_digests(configs, PHOTOGRAPH)
    assert json.loads(fresh.stdout) == digests
    # Erasing is left out without augmentation; all other configs make other views.
    assert len({probe for _, probe in digests.values()}) == len(configs)


def test_a_view_config_comes_back_from_json():
    for arguments in CASES.values():
        config = make_config(**arguments)
        values = config.to_dict()
        assert ViewConfig.from_dict(json.loads(json.dumps(values))) == config
        assert not any(isinstance(value, tuple) for value in values.values())
    config = ViewConfig(input_size=[3, 20, 30], scale=[0.1, 1], mean=[0, 0.5, 1], color_jitter=[0.1, 0.2, 0.3])
    assert (config.input_size, config.scale, config.mean) == ((3, 20, 30), (0.1, 1), (0, 0.5, 1))
    assert config.color_jitter == (0.1, 0.2, 0.3) and hash(config) == hash(ViewConfig.from_dict(config.to_dict()))
    Replay(config, 0)(Image.new('RGB', (9, 9)), 0, 0)


def test_a_view_config_with_unknown_or_missing_entries_is_refused(refused):
    values = make_config().to_dict()
    with refused('unknown or missing', 'mosaic'):
        ViewConfig.from_dict({**values, 'mosaic': 1.})
    for name in values:
        with refused('unknown or missing', name):
            ViewConfig.from_dict({key: value for key, value in values.items() if key != name})


@pytest.mark.parametrize('arguments, words', [
    (dict(input_size=(1, 32, 32)), ['--img-size', '(1, 32, 32)']),
    (dict(input_size=(3, 0, 32)), ['--img-size']),
    (dict(input_size=(3, 1 << 31, 1 << 31)), ['--img-size', '4096']),
    (dict(color_jitter=1e308), ['--color-jitter', '4096']),
    (dict(mean=(float('nan'), 0., 0.)), ['--view-mean', '4096']),
    (dict(input_size=224), ['--img-size', '224']),
    (dict(input_size=(3, 32.5, 32)), ['--img-size', '32.5']),
    (dict(input_size=(32, 32)), ['--img-size']),
    (dict(mean=(0.5, 0.5)), ['--view-mean']),
    (dict(std=0.5), ['--view-std']),
    (dict(hflip='0.5'), ['--hflip', "'0.5'"]),
    (dict(hflip=1.5), ['--hflip', 'probability']),
    (dict(re_prob=-0.1), ['--reprob', 'probability']),
    (dict(re_prob=None), ['--reprob', 'None']),
    (dict(re_mode='black'), ['--remode black']),
    (dict(re_count=0, re_prob=0.5), ['--recount']),
    (dict(mixup=-0.1), ['--mixup', 'or more']),
    (dict(cutmix=float('nan')), ['--cutmix']),
    (dict(mixup_switch_prob=2.), ['--mixup-switch-prob', 'probability']),
    (dict(cutmix_minmax=(0.2,)), ['--cutmix-minmax']),
    (dict(cutmix_minmax=(0.8, 0.2)), ['--cutmix-minmax', '(0.8, 0.2)', 'shares']),
    (dict(cutmix_minmax=(0.5, 0.501)), ['--cutmix-minmax', 'one pixel']),
    (dict(scale=(-1., -0.5)), ['--scale']),
    (dict(ratio=(0., 0.)), ['--ratio']),
    (dict(decoder='turbo'), ['--decoder turbo', 'pillow']),
    (dict(exif='ignore'), ["'ignore'", 'transpose']),
    (dict(auto_augment='randomly'), ['timm']),
    (dict(auto_augment='rand-m9-q5'), ['timm']),
    (dict(auto_augment='best'), ['timm', 'best']),
    (dict(auto_augment=9), ['--aa', '9']),
    (dict(color_jitter=-0.4), ['timm']),
    (dict(color_jitter=(0.1, 0.2)), ['timm']),
    (dict(color_jitter='much'), ['--color-jitter', "'much'"]),
    (dict(interpolation='cubic spline'), ['timm', 'cubic spline']),
    (dict(train_crop_mode='middle'), ['timm']),
])
def test_a_bad_view_config_is_refused(arguments, words, refused):
    with refused(*words):
        Replay(ViewConfig(**arguments), 0)


# The probe


def test_the_probe_knows_the_view_config_and_the_seed():
    probe = Replay(make_config(**PAPER), 0).probe()
    assert probe == Replay(make_config(**PAPER), 0).probe()
    others = [
        Replay(make_config(**PAPER), 1), Replay(make_config(**{**PAPER, 're_prob': 0.3}), 0), Replay(make_config(), 0)]
    assert probe not in {other.probe() for other in others}


def change_resize(monkeypatch):
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, 'resize', lambda image, size, resample=None, *args, **kwargs: resize(
            image, size, Image.Resampling.BILINEAR, *args, **kwargs))


def change_one_operation_of_randaugment(monkeypatch):
    monkeypatch.setitem(auto_augment.NAME_TO_OP, 'SolarizeAdd', lambda image, *args, **kwargs: image)


def change_jpeg_decoding(monkeypatch):
    monkeypatch.setattr(
        timm_tinyvit.data.views, 'decode_image', lambda data: decode_image(data).point(lambda value: value & ~1))


def change_erasing(monkeypatch):
    monkeypatch.setattr(
        timm.data.random_erasing, '_get_pixels', lambda per_pixel, rand_color, patch_size, **kwargs: (
            torch.rand(patch_size, dtype=kwargs['dtype'])))


@pytest.mark.parametrize(
    'change', [change_resize, change_one_operation_of_randaugment, change_jpeg_decoding, change_erasing])
def test_a_library_that_makes_other_views_is_found_out(change, monkeypatch, refused):
    config, versions = make_config(**PAPER), library_versions()
    probe = Replay(config, 0).probe()
    assert check_probe(Replay(config, 0), probe, versions) is None
    change(monkeypatch)
    with refused('other views', 'same versions'):
        check_probe(Replay(config, 0), probe, versions)
    with refused('other views', f'pillow 1.1.7 -> {versions["pillow"]}', f'timm 0.4 -> {timm.__version__}'):
        check_probe(Replay(config, 0), probe, {**versions, 'pillow': '1.1.7', 'timm': '0.4'})


def test_only_versions_that_changed_are_named(monkeypatch, refused):
    versions = library_versions()
    replay = Replay(make_config(), 0)
    with pytest.raises(ValueError) as caught:
        check_probe(replay, 'another probe', {**versions, 'numpy': '1.0'})
    assert 'numpy 1.0 -> ' in str(caught.value)
    assert not any(f'{name} {version}' in str(caught.value) for name, version in versions.items())


def test_other_versions_with_the_same_views_are_one_line_in_the_log(one_sentence):
    versions = library_versions()
    replay = Replay(make_config(), 0)
    line = check_probe(replay, replay.probe(), {**versions, 'torch': '1.0', 'magick': '7'})
    one_sentence(line, 'same views', f'torch 1.0 -> {versions["torch"]}', 'magick 7 -> none')
    del versions['python']
    one_sentence(check_probe(replay, replay.probe(), versions), 'python unknown -> ')


def test_the_versions_are_those_of_all_that_has_a_hand_in_a_view():
    versions = library_versions()
    assert set(versions) == {
        'timm', 'torchvision', 'torch', 'numpy', 'datasets', 'pillow', 'libjpeg', 'python'}
    assert versions['torch'] == torch.__version__.partition('+')[0] or versions['torch'] == torch.__version__
    assert versions['timm'] == timm.__version__ and versions['python'] == '.'.join(map(str, sys.version_info[:3]))
