"""Data sets: every kind of image becomes an upright RGB view, and a store knows its own data set."""

import io
import json
import pickle
import resource
import weakref

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from support.files import encode_image
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.data.dataset import ImageDataset, SparseLogitDataset, collate
from timm_tinyvit.data.fingerprint import check_fingerprint, dataset_fingerprint
from timm_tinyvit.data.sampler import EpochBatchSampler
from timm_tinyvit.data.sources import class_names, find_column, load_split
from timm_tinyvit.data.view_config import ViewConfig
from timm_tinyvit.data.views import Replay, decode_image
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.store.manifest import Manifest
from timm_tinyvit.targets.codecs import create_codec
from timm_tinyvit.targets.sparse import SparseTargets

pytestmark = pytest.mark.usefixtures('own_cache')


def to_tensor(image):
    """The pixels of an RGB image, uint8 [3, H, W]."""
    assert image.mode == 'RGB'
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def make_dataset(contents, labels=None):
    """A data set of encoded images, held as bytes."""
    columns = {'image': [None if data is None else {'bytes': data, 'path': None} for data in contents]}
    features = {'image': datasets.Image()}
    if labels is not None:
        columns['label'] = labels
        features['label'] = datasets.Value('int64')
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_an_evaluation_prepares_its_own_split_alone(fashion, tmp_path, monkeypatch):
    cache = tmp_path / 'cache'
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', cache)
    (tmp_path / 'data').mkdir()
    for split, rows in (('train', range(40)), ('test', range(40, 60))):
        fashion.select(rows).to_parquet(tmp_path / 'data' / f'{split}.parquet')

    def prepared():
        return {name.name.rpartition('-')[2] for name in cache.rglob('*.arrow')}

    part = load_split(str(tmp_path / 'data'), 'test[:10]', is_training=False)
    assert len(part) == 10 and part.split == 'test[:10]' and prepared() == {'test.arrow'}
    assert part.features == fashion.features and part['label'] == fashion.select(range(40, 50))['label']
    assert len(load_split(str(tmp_path / 'data'), None, is_training=False)) == 20 and prepared() == {'test.arrow'}
    with pytest.raises(InputError, match='has no split valid, only train, test'):
        load_split(str(tmp_path / 'data'), 'valid', is_training=False)
    # Once all of it is prepared, as for training, nothing is prepared twice.
    before = len(list(cache.rglob('*.arrow')))
    assert len(load_split(str(tmp_path / 'data'), None, is_training=True)) == 40
    files = len(list(cache.rglob('*.arrow')))
    assert len(load_split(str(tmp_path / 'data'), 'test', is_training=False)) == 20
    assert len(list(cache.rglob('*.arrow'))) == files >= before


@pytest.fixture(scope='module')
def real(fashion):
    """A hundred real images with labels."""
    return fashion.select(range(100))


@pytest.fixture(scope='module')
def picture(real):
    """A colour image that differs in every corner, of real images side by side."""
    tiles = [np.asarray(image) for image in real.select(range(6))['image']]
    grey = np.block([[tiles[0], tiles[1], tiles[2]], [tiles[3], tiles[4], tiles[5]]])
    return Image.fromarray(np.stack([grey, 255 - grey, np.roll(grey, 40, axis=1)], axis=-1))


@pytest.fixture
def replay():
    return Replay(ViewConfig(input_size=(3, 24, 24), re_prob=0.5), seed=9)


def make_store(path, dataset, epochs=2):
    """A complete store of a data set, of records that name their epoch and sample."""
    rows = len(dataset)
    codec = create_codec('float16', 1000, 2)
    manifest = Manifest(
        num_samples=rows, num_classes=1000, k=2, record_width=codec.width, epochs=epochs, seed=9, shard_size=32,
        dataset=dataset_fingerprint(dataset))
    store = LogitStore.create(path, manifest)
    for epoch in range(epochs):
        ids = torch.stack([torch.full((rows,), 500 + epoch), torch.arange(rows)], dim=1)
        targets = SparseTargets(ids, torch.tensor([[-1., -2.]]).expand(rows, 2), torch.full((rows,), -0.7), 1000)
        records = codec.encode(targets)
        for shard in range(manifest.num_shards):
            store.write_shard(epoch, shard, records[shard * 32:(shard + 1) * 32])
    return store


# Images


def kinds_of_images(picture):
    """Encoded images of many kinds, each with the RGB pixels that it stands for."""
    grey = picture.convert('L')
    alpha = Image.fromarray(np.arange(grey.width * grey.height, dtype=np.uint32).astype(np.uint8).reshape(
        grey.height, grey.width))
    rgba = picture.copy()
    rgba.putalpha(alpha)
    palette = picture.quantize(64)
    one = grey.point(lambda value: 255 * (value > 90)).convert('1')
    cmyk = Image.merge('CMYK', [*(ImageOps.invert(band) for band in picture.split()), Image.new('L', picture.size)])
    return {
        'grey': (encode_image(grey), grey.convert('RGB')),
        'grey JPEG': (encode_image(grey, 'JPEG', quality=100), grey.convert('RGB')),
        'grey with alpha': (encode_image(Image.merge('LA', [grey, alpha])), grey.convert('RGB')),
        'black and white': (encode_image(one), one.convert('RGB')),
        'RGB': (encode_image(picture), picture),
        'RGBA': (encode_image(rgba), picture),
        'palette': (encode_image(palette), palette.convert('RGB')),
        'palette with a transparent colour': (encode_image(palette, transparency=3), palette.convert('RGB')),
        'palette with alpha': (encode_image(palette, transparency=bytes(range(64))), palette.convert('RGB')),
        'GIF': (encode_image(palette, 'GIF'), palette.convert('RGB')),
        'CMYK JPEG': (encode_image(cmyk, 'JPEG', quality=100, subsampling=0), picture),
        'CMYK TIFF': (encode_image(cmyk, 'TIFF'), picture),
        'WebP': (encode_image(picture, 'WEBP', lossless=True), picture),
        'BMP': (encode_image(picture, 'BMP'), picture),
    }


def test_every_kind_of_image_becomes_rgb(picture):
    kinds = kinds_of_images(picture)
    dataset = ImageDataset(make_dataset([data for data, _ in kinds.values()]), to_tensor)
    for (name, (_, expected)), sample in zip(kinds.items(), dataset.__getitems__(list(range(len(kinds))))):
        assert sample['view'].shape == (3, *picture.size[::-1]), name
        difference = (sample['view'].int() - to_tensor(expected).int()).abs()
        # The compression of a JPEG leaves a little, even at its best.
        assert difference.max() <= (12 if 'JPEG' in name else 0), name
        assert difference.float().mean() < 1.5, name


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_images_are_turned_upright_by_each_of_the_eight_orientations(file_format, picture):
    options = {'JPEG': dict(quality=95), 'WEBP': dict(lossless=True)}.get(file_format, {})
    contents = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        contents.append(encode_image(picture, file_format, exif=exif, **options))
    views = [sample['view'] for sample in ImageDataset(make_dataset(contents), to_tensor).__getitems__(list(range(8)))]
    for orientation, (data, view) in enumerate(zip(contents, views), start=1):
        stored = Image.open(io.BytesIO(data))
        assert stored.getexif()[0x0112] == orientation
        assert torch.equal(view, to_tensor(ImageOps.exif_transpose(stored).convert('RGB'))), orientation
        # By the standard: orientations above 4 lie on their side; 6 wants a turn to the right.
        assert view.shape[1:] == (picture.size[::-1] if orientation < 5 else picture.size)
    if file_format != 'JPEG':
        assert torch.equal(views[2], to_tensor(picture).flip(1, 2))
        assert torch.equal(views[5], to_tensor(picture).rot90(-1, (1, 2)))
        assert len({view.numpy().tobytes() for view in views}) == 8


def test_an_orientation_that_does_not_exist_is_ignored(picture):
    exif = Image.Exif()
    exif[0x0112] = 77
    dataset = ImageDataset(make_dataset([encode_image(picture, exif=exif)]), to_tensor)
    assert torch.equal(dataset[0]['view'], to_tensor(picture))


def test_images_stored_as_paths_and_as_bytes_give_the_same_views(real, replay, tmp_path):
    paths = []
    for number, source in enumerate(real.with_format('arrow')[:]['image'].to_pylist()):
        paths.append(str(tmp_path / f'{number}.png'))
        (tmp_path / f'{number}.png').write_bytes(source['bytes'])
    stored = datasets.Dataset.from_dict({'image': paths, 'label': real['label']}).cast_column('image', datasets.Image())
    assert stored.with_format('arrow')[:1]['image'].to_pylist()[0]['bytes'] is None
    keys = [(1, index) for index in range(100)]
    here, there = (collate(SparseLogitDataset(rows, replay).__getitems__(keys)) for rows in (real, stored))
    assert torch.equal(here['view'], there['view']) and torch.equal(here['label'], there['label'])
    assert dataset_fingerprint(real) == dataset_fingerprint(stored)


# Rows, whatever the format


def set_torch(rows):
    rows.set_format('torch')


def set_numpy_labels(rows):
    rows.set_format('numpy', columns=['label'])


def set_pandas(rows):
    rows.set_format('pandas')


def set_transform(rows):
    rows.set_transform(lambda batch: {'nothing': [0] * len(batch['label'])})


@pytest.mark.parametrize('change', [set_torch, set_numpy_labels, set_pandas, set_transform])
def test_the_format_of_the_data_set_does_not_matter(change, real, replay):
    rows = real.select(range(20))
    keys = [(0, index) for index in (3, 3, 19, 0)]
    expected = collate(SparseLogitDataset(rows, replay).__getitems__(keys))
    fingerprint = dataset_fingerprint(rows)
    changed = real.select(range(20))
    change(changed)
    before = changed.format
    found = collate(SparseLogitDataset(changed, replay).__getitems__(keys))
    assert torch.equal(found['view'], expected['view']) and torch.equal(found['label'], expected['label'])
    assert dataset_fingerprint(changed) == fingerprint and changed.format == before


def test_selected_shuffled_and_filtered_rows_are_themselves(real, replay):
    order = [5, 99, 0, 42, 5]
    pixels = [to_tensor(image.convert('RGB')) for image in real['image']]
    labels = real['label']
    for rows, numbers in (
            (real.select(order), order),
            (real.shuffle(seed=3), np.random.default_rng(3).permutation(100).tolist()),
            (real.filter(lambda label: label == 2, input_columns='label'),
             [number for number in range(100) if labels[number] == 2]),
            (datasets.concatenate_datasets([real.select(range(4)), real.select([50, 7])]), [0, 1, 2, 3, 50, 7]),
            (real.select(order).flatten_indices(), order)):
        dataset = ImageDataset(rows, to_tensor)
        assert len(dataset) == len(numbers)
        for sample, number in zip(dataset.__getitems__(list(range(len(rows)))), numbers):
            assert torch.equal(sample['view'], pixels[number]) and sample['label'] == labels[number]


def test_a_batch_equals_its_samples_one_by_one(real, replay, tmp_path):
    data = SparseLogitDataset(real, replay, make_store(tmp_path / 'store', real))
    keys = [(0, 7), (1, 7), (1, 99), (0, 31), (0, 32), (0, 7)]
    batch = collate(data.__getitems__(keys))
    assert batch['view'].dtype == batch['record'].dtype == torch.uint8 and batch['view'].shape == (6, 3, 24, 24)
    assert batch['label'].dtype == torch.int64
    assert batch['label'].tolist() == [real['label'][index] for _, index in keys]
    for number, key in enumerate(keys):
        sample = data[key]
        assert torch.equal(sample['view'], batch['view'][number])
        assert torch.equal(sample['record'], batch['record'][number])
        assert sample['label'] == batch['label'][number]
    # Each record is the one of its epoch and sample.
    targets = data.store.codec.decode(batch['record'])
    assert [(epoch - 500, index) for epoch, index in targets.ids.tolist()] == keys


def test_the_decoded_images_of_a_batch_are_not_in_memory_together(real, replay, monkeypatch):
    images = []

    def decode(source):
        assert not any(image() is not None for image in images)
        image = decode_image(source)
        images.append(weakref.ref(image))
        return image

    monkeypatch.setattr(replay, 'decode', decode)
    places = [(epoch, row) for epoch in range(2) for row in range(8)]
    SparseLogitDataset(real, replay).__getitems__(places)
    assert len(images) == 8


def test_views_and_records_belong_together_through_loader_workers(real, replay, tmp_path):
    data = SparseLogitDataset(real, replay, make_store(tmp_path / 'store', real))
    sampler = EpochBatchSampler(100, 8, seed=4, store_epochs=range(2))
    loader = DataLoader(data, batch_sampler=sampler, num_workers=2, collate_fn=collate, persistent_workers=True)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        sampler.set_epoch(epoch)
        for keys, batch in zip(batches, loader, strict=True):
            ids = data.store.codec.decode(batch['record']).ids.tolist()
            assert ids == [[500 + epoch % 2, index] for _, index in keys]
            assert torch.equal(batch['view'], collate(data.__getitems__(keys))['view'])


@pytest.mark.parametrize('context', ['fork', pytest.param('spawn', marks=pytest.mark.launches)])
def test_a_batch_comes_out_of_a_loader_worker_as_it_is_made_without_one(real, replay, tmp_path, context):
    data = SparseLogitDataset(real, replay, make_store(tmp_path / 'store', real))
    keys = [(1, index) for index in range(48)]
    here = collate(data.__getitems__(keys))
    loader = DataLoader(
        data, batch_sampler=[keys], num_workers=1, collate_fn=collate, multiprocessing_context=context)
    there, = loader
    assert list(there) == list(here) == ['view', 'label', 'index', 'record']
    for name, values in there.items():
        assert type(values) is type(here[name]) is torch.Tensor and values.dtype == here[name].dtype
        assert torch.equal(values, here[name])
        # Shared memory costs more than it saves where there are few bytes.
        assert values.is_shared() == (name == 'view') == (values.nbytes > 1 << 16)


def no_shared_memory(worker):
    """Shared memory is files, for the limits of a process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def test_a_lack_of_shared_memory_ends_a_loader_with_one_sentence(real, refused):
    data = ImageDataset(real, to_tensor)
    loader = DataLoader(data, batch_size=100, num_workers=2, collate_fn=collate, worker_init_fn=no_shared_memory)
    with refused('no shared memory for a batch of', '--workers', '--shm-size'):
        next(iter(loader))


@pytest.mark.launches
def test_a_data_set_travels_to_spawned_workers(real, replay, tmp_path):
    data = SparseLogitDataset(real, replay, make_store(tmp_path / 'store', real))
    there = pickle.loads(pickle.dumps(data))
    assert all(torch.equal(there[1, 5][name], data[1, 5][name]) for name in ('view', 'record'))


def test_without_labels_every_label_is_minus_one(real, replay):
    rows = real.remove_columns('label')
    assert SparseLogitDataset(rows, replay)[0, 3]['label'] == -1
    contents = [source['bytes'] for source in real.with_format('arrow')[:3]['image'].to_pylist()]
    batch = collate(ImageDataset(make_dataset(contents, [4, None, 2]), to_tensor).__getitems__([0, 1, 2]))
    assert batch['label'].tolist() == [4, -1, 2] and 'record' not in batch


# Images that cannot be decoded


@pytest.fixture
def broken(real):
    """Contents and labels of ten real images."""
    rows = real.with_format('arrow')[:10]
    return [source['bytes'] for source in rows['image'].to_pylist()], rows['label'].to_pylist()


@pytest.mark.parametrize('damage', ['truncated', 'text', 'empty', 'missing', 'flipped', 'tiny', 'huge'])
def test_an_image_that_cannot_be_decoded_names_its_sample(damage, broken, replay, refused):
    contents, labels = broken
    contents[6] = {
        'truncated': contents[6][:len(contents[6]) // 2], 'text': b'no image', 'empty': b'', 'missing': None,
        'flipped': contents[6][:60] + bytes([contents[6][60] ^ 255]) + contents[6][61:], 'tiny': contents[6][:8],
        # The size of an image that no memory holds.
        'huge': contents[6][:16] + b'\x7f\xff\xff\xff' * 2 + contents[6][24:],
    }[damage]
    data = SparseLogitDataset(make_dataset(contents, labels), replay)
    data.__getitems__([(0, 5), (0, 7)])
    with refused('sample 6', 'cannot be decoded'):
        data.__getitems__([(0, 5), (0, 6)])


def test_damaged_files_of_every_kind_give_an_image_or_one_sentence(picture, one_sentence):
    picks = np.random.RandomState(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010f] = 6, 'maker'
    small = picture.resize((20, 16))
    contents = [encode_image(small, name, exif=exif) for name in ('JPEG', 'PNG', 'WEBP', 'TIFF')]
    contents += [encode_image(small, name) for name in ('GIF', 'BMP', 'PPM')]
    if Image.registered_extensions().get('.avif') in Image.SAVE:
        contents.append(encode_image(small, 'AVIF'))
    damaged = []
    for content in contents:
        for _ in range(250):
            changed = np.frombuffer(content, np.uint8).copy()
            # Most of the harm is done in the head of a file.
            head = min(len(content), 150) if picks.rand() < 0.7 else len(content)
            places = picks.randint(head, size=picks.randint(1, 6))
            changed[places] = picks.choice([0, 255, picks.randint(256)], len(places))
            damaged.append(changed.tobytes())
    dataset = ImageDataset(make_dataset(damaged), lambda image: torch.tensor(image.size))
    refusals = 0
    for index in range(len(damaged)):
        try:
            dataset[index]
        except InputError as error:
            one_sentence(str(error), f'sample {index} ')
            refusals += 1
    assert 100 < refusals < len(damaged)


def test_an_image_that_cannot_be_decoded_is_one_sentence_out_of_a_loader_worker_too(broken, replay, refused):
    contents, labels = broken
    contents[6] = contents[6][:100]
    data = SparseLogitDataset(make_dataset(contents, labels), replay)
    loader = DataLoader(
        data, batch_sampler=[[(0, index)] for index in range(10)], num_workers=1, collate_fn=collate)
    with refused('the image of sample 6 cannot be decoded'):
        list(loader)


@pytest.mark.launches
def test_a_file_that_is_gone_is_named(tmp_path, real, replay, refused):
    path = tmp_path / 'there.png'
    real[0]['image'].save(path)
    paths = [str(path), str(tmp_path / 'gone.png')]
    rows = datasets.Dataset.from_dict({'image': paths}).cast_column('image', datasets.Image())
    with refused('sample 1', paths[1], 'cannot be decoded'):
        ImageDataset(rows, to_tensor).__getitems__([0, 1])
    with refused('sample 1', paths[1]):
        dataset_fingerprint(rows)


@pytest.mark.launches
def test_a_store_that_is_damaged_is_one_sentence_out_of_a_loader_worker_too(real, replay, tmp_path, refused):
    store = make_store(tmp_path / 'store', real)
    path = store.shard_path(0, 1)
    path.write_bytes(path.read_bytes()[:-1])
    data = SparseLogitDataset(real, replay, store)
    loader = DataLoader(data, batch_sampler=[[(0, 0)], [(0, 40)]], num_workers=1, collate_fn=collate)
    with refused(str(path), 'damaged'):
        list(loader)


# Fingerprints


def save_as_folder(rows, path):
    """The same images as a folder of files in one folder per class, and the rows in the order of the folder."""
    names = [name.replace('/', '-') for name in rows.features['label'].names]
    table = rows.with_format('arrow')[:]
    sources, labels = table['image'].to_pylist(), table['label'].to_pylist()
    order = sorted(range(len(rows)), key=lambda number: (names[labels[number]], number))
    for number in order:
        file = path / names[labels[number]] / f'{number:05d}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(sources[number]['bytes'])
    return order


@pytest.mark.launches
def test_a_fingerprint_is_the_same_in_every_format_and_cache_folder(fashion, tmp_path, monkeypatch):
    rows = fashion.select(range(300))
    order = save_as_folder(rows, tmp_path / 'images' / 'train')
    # The folder numbers its classes in the order of their names.
    names = [name.replace('/', '-') for name in rows.features['label'].names]
    rows = rows.select(order)
    labels = [sorted(names).index(names[label]) for label in rows['label']]
    rows = rows.remove_columns('label').add_column('label', labels)
    expected = dataset_fingerprint(rows)
    assert expected['num_samples'] == 300 and len(expected['hash']) == 32
    (tmp_path / 'parquet').mkdir()
    rows.to_parquet(str(tmp_path / 'parquet' / 'train.parquet'))
    rows.select(range(100)).to_parquet(str(tmp_path / 'parquet' / 'test.parquet'))
    rows.save_to_disk(str(tmp_path / 'disk'), num_shards=3)
    found = {}
    for cache in ('one', 'two'):
        monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / cache)
        for name in ('images', 'parquet', 'disk'):
            found[cache, name] = dataset_fingerprint(load_split(str(tmp_path / name), None, is_training=True))
    assert all(fingerprint == expected for fingerprint in found.values()), found
    assert len({row.as_py()['path'] is None for row in load_split(
        str(tmp_path / 'images'), None, True).with_format('arrow')[:]['image']}) == 1
    # The manifest keeps it as JSON.
    assert json.loads(json.dumps(expected)) == expected


def test_a_fingerprint_knows_labels_bytes_order_and_number(real):
    contents = [source['bytes'] for source in real.with_format('arrow')[:]['image'].to_pylist()]
    labels = real['label'][:]
    expected = dataset_fingerprint(make_dataset(contents, labels))
    assert expected == dataset_fingerprint(real)
    other_labels, other_contents = list(labels), list(contents)
    other_labels[77] = (labels[77] + 1) % 10
    # The same pixels in another encoding are other bytes.
    other_contents[50] = encode_image(Image.open(io.BytesIO(contents[50])), compress_level=1)
    others = {
        'another label': make_dataset(contents, other_labels), 'other bytes': make_dataset(other_contents, labels),
        'fewer rows': make_dataset(contents[:99], labels[:99]),
        'another order': make_dataset(contents[::-1], labels[::-1]),
        'no labels': make_dataset(contents), 'a null label': make_dataset(contents, [None, *labels[1:]]),
        'a null image': make_dataset([None, *contents[1:]], labels),
    }
    hashes = {name: dataset_fingerprint(rows)['hash'] for name, rows in others.items()}
    assert len({*hashes.values(), expected['hash']}) == len(others) + 1, hashes
    assert dataset_fingerprint(others['fewer rows'])['num_samples'] == 99


def test_a_fingerprint_of_many_rows_reads_256_images_and_all_labels(real):
    contents = [source['bytes'] for source in real.with_format('arrow')[:]['image'].to_pylist()]
    contents, labels = (contents * 6)[:512], [0] * 512
    expected = dataset_fingerprint(make_dataset(contents, labels))
    for row in (0, 1, 2, 255, 256, 257, 510, 511):
        image = [*contents[:row], b'another', *contents[row + 1:]]
        label = [*labels[:row], 1, *labels[row + 1:]]
        # Twice as many rows: every second image is looked at.
        assert (dataset_fingerprint(make_dataset(image, labels)) != expected) == (row % 2 == 0)
        assert dataset_fingerprint(make_dataset(contents, label)) != expected


def test_an_empty_data_set_has_a_fingerprint():
    assert dataset_fingerprint(make_dataset([], []))['num_samples'] == 0


def test_a_data_set_that_is_not_the_stores_is_refused(real, replay, tmp_path, refused):
    store = make_store(tmp_path / 'store', real)
    SparseLogitDataset(real.with_format('numpy'), replay, store)
    with refused('not the data set', str(store.path), '99 samples, the store has 100'):
        SparseLogitDataset(real.select(range(99)), replay, store)
    with refused('not the data set', '100 samples with other content'):
        SparseLogitDataset(real.select(range(99, -1, -1)), replay, store)
    with refused('not the data set'):
        check_fingerprint(store, {'num_samples': 100, 'hash': ''})


# Columns


def test_columns_are_found_by_their_usual_names_or_by_their_kind(real):
    assert find_column(real, None, is_image=True) == 'image' and find_column(real, None, is_image=False) == 'label'
    renamed = real.rename_columns({'image': 'img', 'label': 'fine_label'})
    assert (find_column(renamed, None, True), find_column(renamed, None, False)) == ('img', 'fine_label')
    odd = real.rename_columns({'image': 'photo', 'label': 'kind'})
    assert find_column(odd, None, True) == 'photo' and find_column(odd, None, False) is None
    assert (find_column(odd, 'photo', True), find_column(odd, 'kind', False)) == ('photo', 'kind')
    assert class_names(real, 'label')[:2] == ['T-shirt/top', 'Trouser']
    assert class_names(make_dataset([], []), 'label') is None


def test_a_column_that_is_not_there_or_holds_something_else_is_refused(real, refused):
    for is_image, flag in ((True, '--input-key'), (False, '--target-key')):
        with refused("no column 'picture'", 'image, label', flag):
            find_column(real, 'picture', is_image)
    with refused("'label'", 'not images', '--input-key'):
        find_column(real, 'label', True)
    with refused("'image'", 'not class numbers', '--target-key'):
        find_column(real, 'image', False)
    with refused('no image column', 'label'):
        find_column(real.remove_columns('image'), None, True)
    two = real.rename_columns({'image': 'left'}).add_column('right', [None] * 100)
    two = two.cast_column('right', datasets.Image())
    with refused('no image column', 'left'):
        find_column(two, None, True)
    assert find_column(two, 'right', True) == 'right'


def test_a_text_column_under_a_usual_name_is_no_label_column(real, refused):
    rows = real.rename_columns({'label': 'number'}).add_column('label', ['shoe'] * 100)
    assert find_column(rows, None, False) is None and find_column(rows, 'number', False) == 'number'
    with refused("'label'", 'string', 'not class numbers'):
        find_column(rows, 'label', False)
    both = rows.rename_columns({'number': 'target'})
    assert find_column(both, None, False) == 'target'


# Splits


@pytest.fixture(scope='module')
def parquet(real, tmp_path_factory):
    path = tmp_path_factory.mktemp('parquet')
    real.select(range(60)).to_parquet(str(path / 'train.parquet'))
    real.select(range(60, 100)).to_parquet(str(path / 'test.parquet'))
    return str(path)


def test_a_folder_of_parquet_files_has_its_splits_by_name(parquet, real):
    train, test = load_split(parquet, None, is_training=True), load_split(parquet, None, is_training=False)
    assert (len(train), len(test)) == (60, 40)
    assert train['label'][:] + test['label'][:] == real['label'][:]
    assert len(load_split(parquet, 'test', is_training=True)) == 40


@pytest.mark.parametrize('split, rows', [
    ('train[:7]', range(7)), ('train[10:20]', range(10, 20)), ('train[-5:]', range(55, 60)),
    ('train[50:9999]', range(50, 60)), ('test[:25%]', range(60, 70)),
    ('train+test', range(100)), ('test[:2]+train[:2]', [60, 61, 0, 1]),
])
def test_splits_may_be_sliced_and_added(split, rows, parquet, real):
    found = load_split(parquet, split, is_training=True)
    assert found['label'][:] == [real['label'][row] for row in rows]
    assert dataset_fingerprint(found) == dataset_fingerprint(real.select(rows))


@pytest.mark.parametrize('split', ['valid', 'train[', 'train[a:b]', ''])
@pytest.mark.parametrize('is_training', [True, False])
def test_a_split_that_is_not_there_is_refused(split, is_training, parquet, refused):
    with refused('no split', 'train, test', '--train-split' if is_training else '--val-split'):
        load_split(parquet, split, is_training)


def test_an_image_folder_has_its_splits_by_folder(real, tmp_path):
    order = save_as_folder(real.select(range(60)), tmp_path / 'train')
    save_as_folder(real.select(range(60, 100)), tmp_path / 'val')
    train, val = (load_split(str(tmp_path), None, is_training) for is_training in (True, False))
    assert (len(train), len(val)) == (60, 40)
    here, there = (ImageDataset(rows, to_tensor) for rows in (train, real.select(order)))
    assert class_names(train, 'label') == sorted(name.replace('/', '-') for name in class_names(real, 'label'))
    assert all(torch.equal(here[number]['view'], there[number]['view']) for number in range(60))


def test_what_save_to_disk_wrote_is_loaded(real, tmp_path, refused):
    real.save_to_disk(str(tmp_path / 'one'))
    assert len(load_split(str(tmp_path / 'one'), None, is_training=True)) == 100
    assert len(load_split(str(tmp_path / 'one'), 'train[:3]', is_training=False)) == 3
    with refused('no split validation, only train', '--val-split'):
        load_split(str(tmp_path / 'one'), None, is_training=False)
    splits = {'train': real.select(range(9)), 'test': real.select(range(5)), 'validation': real.select(range(3))}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / 'many'))
    for split, is_training, rows, name in (
        (None, True, 9, 'train'), (None, False, 3, 'validation'), ('test', False, 5, 'test'),
        ('test[:2]', False, 2, 'test[:2]'),
    ):
        found = load_split(str(tmp_path / 'many'), split, is_training)
        # And not by the names that the rows had before.
        assert (len(found), str(found.split)) == (rows, name)


def test_a_folder_that_is_missing_or_holds_no_data_is_refused(tmp_path, refused):
    with refused('no folder', str(tmp_path / 'nothing')):
        load_split(str(tmp_path / 'nothing'), None, True)
    for name in ('./nothing-here', '~/nothing-here'):
        with refused('no folder', name):
            load_split(name, None, True)
    (tmp_path / 'file.parquet').write_bytes(b'')
    with refused('is a file', 'folder'):
        load_split(str(tmp_path / 'file.parquet'), None, True)
    (tmp_path / 'empty').mkdir()
    with refused(str(tmp_path / 'empty'), 'cannot be loaded'):
        load_split(str(tmp_path / 'empty'), None, True)
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'train.parquet').write_bytes(b'PAR1 and then no more')
    with refused(str(tmp_path / 'broken' / 'train.parquet'), 'cut short'):
        load_split(str(tmp_path / 'broken'), None, True)
    (tmp_path / 'odd').mkdir()
    (tmp_path / 'odd' / 'state.json').write_text('{')
    with refused(str(tmp_path / 'odd'), 'cannot be loaded'):
        load_split(str(tmp_path / 'odd'), None, True)


@pytest.mark.parametrize('name', ['hfds/nobody/no-such-data-set', 'nobody/no-such-data-set', 'no name at all'])
def test_a_hub_name_that_cannot_be_reached_is_refused(name, monkeypatch, refused):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    with refused(name.removeprefix('hfds/'), 'there is no folder', 'on the Hub cannot be loaded'):
        load_split(name, None, True)


def test_several_views_of_an_image_are_those_that_it_has_alone(real, replay):
    data = SparseLogitDataset(real, replay)
    keys = [(1, 7), (2, 7), (0, 3), (5, 7), (1, 3)]
    for key, sample in zip(keys, data.__getitems__(keys)):
        alone = data[key]
        assert torch.equal(sample['view'], alone['view']) and sample['label'] == alone['label']
