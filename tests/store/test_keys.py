"""Samples known by a key: a store finds its rows in a data set that was filtered, re-ordered and written anew."""

import hashlib
import io
import os
import pickle
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader

import train_distill
from support.files import encode_image
from timm_tinyvit import cli, save_logits
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.data.dataset import SparseLogitDataset, collate
from timm_tinyvit.data.fingerprint import dataset_fingerprint, keyed_fingerprint
from timm_tinyvit.data.sampler import EpochBatchSampler
from timm_tinyvit.data.sources import load_split
from timm_tinyvit.data.view_config import ViewConfig
from timm_tinyvit.data.views import Replay
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.store.keys import KeyIndex, hash_keys
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.store.manifest import Manifest
from timm_tinyvit.targets.codecs import create_codec
from timm_tinyvit.targets.sparse import SparseTargets

ROWS = 300


@pytest.fixture(scope='module')
def named(fashion):
    """Three hundred real images, each with a name and a number that nothing else depends on."""
    numbers = np.random.default_rng(0).permutation(10 ** 6)[:ROWS]
    rows = fashion.select(range(ROWS)).add_column('name', [f'n{number:08d}.JPEG' for number in numbers])
    return rows.add_column('number', numbers - 500_000)


@pytest.fixture(scope='module')
def replay():
    return Replay(ViewConfig(input_size=(3, 24, 24), re_prob=0.5), seed=9)


@pytest.fixture(scope='module')
def store(tmp_path_factory, named):
    """A complete store of two epochs, of records that name their epoch and row."""
    return make_store(tmp_path_factory.mktemp('keyed') / 'logits', named, 'name')


def make_store(path, rows, key):
    codec = create_codec('float16', 1000, 2)
    fingerprint, hashes = keyed_fingerprint(rows, key)
    manifest = Manifest(
        num_samples=len(hashes), num_classes=1000, k=2, record_width=codec.width, epochs=2, seed=9, shard_size=64,
        key=key, dataset=fingerprint)
    store = LogitStore.create(path, manifest)
    KeyIndex.write(store.path, manifest, hashes)
    for epoch in range(2):
        ids = torch.stack([torch.full((len(hashes),), 500 + epoch), torch.arange(len(hashes))], dim=1)
        targets = SparseTargets(
            ids, torch.tensor([[-1., -2.]]).expand(ids.shape), torch.full(ids.shape[:1], -0.7), 1000)
        for shard in range(manifest.num_shards):
            store.write_shard(epoch, shard, codec.encode(targets)[shard * 64:(shard + 1) * 64])
    return store


def encoded(rows):
    return [source['bytes'] for source in rows.with_format('arrow')[:]['image'].to_pylist()]


# The hash of a key


def test_the_hash_of_a_key_is_that_of_other_programs():
    # printf sKEY | b2sum -l 64, and iNUMBER for integers
    known = {
        'n01440764_10026': '9c78020dadc27652', '000000042': '7687a173e7e50899', 'été': 'e6c3d8ac846886bb',
        '': 'e64984c3aacf6ede', 42: '0e43b9c5cfc40c96', -7: 'af5038e1b53dc008', 2 ** 64 - 1: 'dee875673f44d5b7'}
    for key, digest in known.items():
        kind = pa.uint64() if key == 2 ** 64 - 1 else None
        assert hash_keys(pa.array([key], kind)).tolist() == [int.from_bytes(bytes.fromhex(digest), 'little')], key


def test_a_key_is_the_same_in_every_column_type_and_text_is_no_number(refused):
    whole = [hash_keys(pa.array([5, 77], kind)).tolist() for kind in (pa.int8(), pa.int32(), pa.int64(), pa.uint16())]
    text = [hash_keys(pa.array(['5', '77'], kind)).tolist()
            for kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())]
    assert all(found == whole[0] for found in whole) and all(found == text[0] for found in text)
    assert not set(whole[0]) & set(text[0])
    assert hash_keys(pa.chunked_array([['5'], ['77']])).tolist() == text[0]
    with refused('sample 8 has no key', '--key'):
        hash_keys(pa.array(['a', None]), [3, 8])


# The file of keys


def test_every_key_of_many_finds_its_row_and_no_other(tmp_path):
    count = 200_000
    manifest = Manifest(
        num_samples=count, num_classes=10, k=1, record_width=12, epochs=1, seed=0, shard_size=1000, key='name')
    keys = np.char.add('sample-', np.random.default_rng(0).permutation(count).astype(str))
    KeyIndex.write(tmp_path, manifest, hash_keys(pa.array(keys)))
    index = KeyIndex.open(tmp_path, manifest)
    assert len(index) == count
    assert np.array_equal(index.rows_of(pa.array(keys[::-1]), hash_keys(pa.array(keys[::-1]))), np.arange(count)[::-1])
    assert (index.find(hash_keys(pa.array([f'other-{number}' for number in range(1000)]))) == -1).all()
    assert index.find(np.array([0, 2 ** 64 - 1], dtype=np.uint64)).tolist() == [-1, -1]
    # Any reader of Arrow opens the file.
    table = pa.ipc.open_stream(pa.memory_map(str(tmp_path / 'keys.arrow'))).read_all()
    assert table.column_names == ['hash', 'row'] and table['row'].to_pylist()[:5] == index.rows[:5].tolist()
    assert (np.diff(table['hash'].to_numpy()) > 0).all()


def test_a_damaged_file_of_keys_is_refused(store, tmp_path, refused):
    content = (store.path / 'keys.arrow').read_bytes()
    picks = np.random.default_rng(0)
    damaged = [content[:size] for size in (0, 1, 23, 24, 300, len(content) - 1)]
    for place in picks.integers(len(content), size=150).tolist():
        damaged.append(content[:place] + bytes([content[place] ^ 1 << int(picks.integers(8))]) + content[place + 1:])
    for data in damaged:
        (tmp_path / 'keys.arrow').write_bytes(data)
        with refused(str(tmp_path / 'keys.arrow'), 'damaged'):
            KeyIndex.open(tmp_path, store.manifest)
    (tmp_path / 'keys.arrow').unlink()
    with refused('has no keys.arrow', 'again'):
        KeyIndex.open(tmp_path, store.manifest)


def test_a_forged_file_of_keys_with_a_right_checksum_is_refused(store, named, tmp_path, refused):
    columns = {'hash': pa.array([1, 2], pa.uint64()), 'row': pa.array([0, 1], pa.uint64())}
    for schema in (pa.schema({'hash': pa.uint64(), 'row': pa.uint64()}), pa.schema({'hash': pa.uint64()})):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as stream:
            stream.write_batch(pa.record_batch([columns[name] for name in schema.names], schema=schema))
        content = sink.getvalue().to_pybytes()
        footer = b'TTVSHARD' + hashlib.blake2b(content, digest_size=16).digest()
        (tmp_path / 'keys.arrow').write_bytes(content + footer)
        with refused('keys of another store'):
            KeyIndex.open(tmp_path, store.manifest)
    other = make_store(tmp_path / 'other', named.select(range(ROWS - 1, -1, -1)), 'name')
    with refused('keys of another store'):
        KeyIndex.open(other.path, store.manifest)


# Data sets that were changed


@pytest.mark.parametrize('size', [0, 100, 4096])
def test_keys_that_are_cut_short_where_they_lie_are_named_by_who_has_mapped_them(size, store, tmp_path, refused):
    content = (store.path / 'keys.arrow').read_bytes()
    (tmp_path / 'keys.arrow').write_bytes(content)
    index = KeyIndex.open(tmp_path, store.manifest)
    hashes = index.hashes[:20].copy()
    rows = index.find(hashes)
    os.truncate(tmp_path / 'keys.arrow', size)
    with refused(str(tmp_path / 'keys.arrow')):
        index.find(hashes)
    (tmp_path / 'keys.arrow').write_bytes(content)
    np.testing.assert_array_equal(index.find(hashes), rows)


def renewed(rows, path):
    rows.save_to_disk(str(path / 'disk'), num_shards=3)
    return load_split(str(path / 'disk'), None, is_training=True)


def as_parquet(rows, path):
    (path / 'parquet').mkdir()
    for number in range(3):
        rows.shard(3, number).to_parquet(str(path / 'parquet' / f'train-{number}.parquet'))
    return load_split(str(path / 'parquet'), None, is_training=True)


@pytest.mark.parametrize('key', ['name', 'number'])
@pytest.mark.parametrize('rewrite', [renewed, as_parquet])
def test_a_filtered_shuffled_and_rewritten_data_set_sees_the_same_views_and_records(
        key, rewrite, named, replay, tmp_path):
    store = make_store(tmp_path / 'store', named, key)
    whole = SparseLogitDataset(named, replay, store)
    few = named.filter(lambda label: label < 7, input_columns='label').shuffle(seed=1)
    changed = SparseLogitDataset(rewrite(few, tmp_path), replay, store)
    assert 150 < len(changed) == len(few) < 250
    places = {name: place for place, name in enumerate(named[key])}
    sampler = EpochBatchSampler(len(changed), 32, seed=0, store_epochs=range(2))
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for keys in sampler:
            batch = collate(changed.__getitems__(keys))
            there = [places[few[index][key]] for _, index in keys]
            expected = collate(whole.__getitems__([(epoch, place) for place in there]))
            assert all(torch.equal(batch[name], expected[name]) for name in ('view', 'label', 'index', 'record'))
            assert store.codec.decode(batch['record']).ids.tolist() == [[500 + epoch, place] for place in there]


def test_the_index_of_a_view_is_the_hash_of_its_key_with_and_without_a_store(named, replay, store):
    plain = SparseLogitDataset(named, replay, key_column='name')
    stored = SparseLogitDataset(named, replay, store)
    assert 'record' not in plain[1, 5] and torch.equal(plain[1, 5]['view'], stored[1, 5]['view'])
    digest = hashlib.blake2b(b's' + named[5]['name'].encode(), digest_size=8).digest()
    assert plain[1, 5]['index'] == stored[1, 5]['index'] == int.from_bytes(digest, 'little', signed=True)
    image = Image.open(io.BytesIO(encoded(named)[5])).convert('RGB')
    assert torch.equal(plain[1, 5]['view'], replay(image, 1, plain[1, 5]['index']))


def test_records_are_found_in_spawned_loader_workers_too(named, replay, store):
    data = SparseLogitDataset(named, replay, store)
    there = pickle.loads(pickle.dumps(data))
    assert all(torch.equal(there[1, 5][name], data[1, 5][name]) for name in ('view', 'record'))
    keys = [[(0, 7), (0, 250)], [(1, 3)]]
    for batch, expected in zip(DataLoader(data, batch_sampler=keys, num_workers=1, collate_fn=collate), keys):
        assert store.codec.decode(batch['record']).ids.tolist() == [[500 + epoch, row] for epoch, row in expected]


def test_a_renamed_column_of_keys_is_named_by_a_flag(named, replay, store, refused):
    renamed = named.rename_column('name', '__key__')
    with refused("no column 'name'", '__key__', '--key'):
        SparseLogitDataset(renamed, replay, store)
    assert torch.equal(SparseLogitDataset(renamed, replay, store, key_column='__key__')[0, 9]['record'],
                       SparseLogitDataset(named, replay, store)[0, 9]['record'])


def test_the_fingerprint_of_named_samples_knows_keys_order_and_images(named):
    expected = keyed_fingerprint(named, 'name')[0]
    assert len(expected['samples']) == 256 and expected['num_samples'] == ROWS
    assert keyed_fingerprint(named.flatten_indices(), 'name')[0] == expected
    smaller = keyed_fingerprint(named.select(range(100, 300)), 'name')[0]
    # What is left of the images that are remembered is remembered of a part too.
    assert len(set(expected['samples']) & set(smaller['samples'])) > 150
    assert set(expected['samples'].items()) & set(smaller['samples'].items()) == {
        item for item in expected['samples'].items() if item[0] in smaller['samples']}
    shuffled = keyed_fingerprint(named.shuffle(seed=0), 'name')[0]
    assert shuffled['samples'] == expected['samples'] and shuffled['keys'] != expected['keys']
    assert keyed_fingerprint(named, 'number')[0]['keys'] != expected['keys']


# What does not fit


def test_a_key_that_the_store_does_not_have_is_named(named, replay, store, refused):
    more = named.select(range(10)).remove_columns('name').add_column('name', [*named['name'][:9], 'n-unknown.JPEG'])
    with refused("no sample with key 'n-unknown.JPEG'", str(store.path)):
        SparseLogitDataset(more, replay, store)


def test_keys_that_are_doubled_missing_or_no_keys_are_refused(named, replay, tmp_path, refused):
    names = named['name'][:]
    for changed, words in (
            ([*names[:200], names[50], *names[201:]], ('samples 50 and 200', repr(names[50]), '--key')),
            ([*names[:200], None, *names[201:]], ('sample 200 has no key', '--key'))):
        with refused(*words):
            keyed_fingerprint(named.remove_columns('name').add_column('name', changed), 'name')
    with refused("no column 'nothing'", 'name, number', '--key'):
        SparseLogitDataset(named, replay, key_column='nothing')
    for column in ('image', 'half'):
        with refused(repr(column), 'not strings or integers', '--key'):
            keyed_fingerprint(named.add_column('half', [0.5] * ROWS), column)


def test_other_bytes_of_an_image_are_refused_wherever_it_went(named, replay, store, refused):
    contents = encoded(named)
    hashes = keyed_fingerprint(named, 'name')[1]
    smallest = int(np.argsort(hashes)[40])
    # The same pixels, encoded once more.
    contents[smallest] = encode_image(Image.open(io.BytesIO(contents[smallest])), compress_level=1)
    columns = {name: named[name][:] for name in ('label', 'name', 'number')}
    changed = datasets.Dataset.from_dict({**columns, 'image': [{'bytes': data, 'path': None} for data in contents]})
    changed = changed.cast_column('image', datasets.Image())
    for rows in (changed, changed.shuffle(seed=2), changed.select(range(smallest, min(ROWS, smallest + 3)))):
        with refused(repr(named[smallest]['name']), 'other bytes', str(store.path)):
            SparseLogitDataset(rows, replay, store)
    SparseLogitDataset(changed.select([row for row in range(ROWS) if row != smallest]), replay, store)


def test_a_store_by_position_takes_no_key(fashion, replay, tmp_path, refused):
    rows = fashion.select(range(10))
    codec = create_codec('float16', 10, 2)
    store = LogitStore.create(tmp_path / 'store', Manifest(
        num_samples=10, num_classes=10, k=2, record_width=codec.width, epochs=1, seed=0, shard_size=8,
        dataset=dataset_fingerprint(rows)))
    with refused('by position', '--key'):
        SparseLogitDataset(rows, replay, store, key_column='label')


def test_a_manifest_that_forgot_its_images_is_refused(named, replay, store, tmp_path, refused):
    for samples in (None, [], {'xyz': 'a'}, {'1' * 17: 'a'}, {'-1': 'a'}):
        changed = {**store.manifest.dataset, 'samples': samples}
        manifest = replace(store.manifest, dataset=changed)
        folder = tmp_path / str(samples)
        KeyIndex.write(folder, manifest, keyed_fingerprint(named, 'name')[1])
        with refused('does not list the images'):
            SparseLogitDataset(named, replay, LogitStore(folder, manifest))


# The whole way


@pytest.fixture(scope='module')
def folder(tmp_path_factory, named):
    """The named images as a folder of parquet files, and a shuffled part of them as another."""
    path = tmp_path_factory.mktemp('named')
    for name, rows in (('whole', named.select(range(120))), ('part', named.select(range(110)).shuffle(seed=5))):
        (path / name).mkdir()
        rows.to_parquet(str(path / name / 'train.parquet'))
    return path


def test_a_teacher_finds_its_own_words_again_in_a_shuffled_part_of_its_data(
        folder, tmp_path, capsys, one_sentence):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=10)
    export_model(tmp_path / 'teacher', model, data_config={'input_size': (3, 32, 32)})
    teach = ['--teacher', str(tmp_path / 'teacher')]
    fill = [*teach, '--logits', str(tmp_path / 'logits'), '-j', '0', '--epochs', '2', '--img-size', '32', '--topk', '3',
            '--codec', 'float16', '--shard-size', '50', '--key', 'name']
    save_logits.main([*fill, '--dataset', str(folder / 'whole')])
    for name in ('whole', 'part'):
        capsys.readouterr()
        cli.main(['store', 'check', str(tmp_path / 'logits'), *teach, '--dataset', str(folder / name)])
        assert '0.000% of the classes differ' in capsys.readouterr().out
        cli.main(['store', 'describe', str(tmp_path / 'logits'), '--dataset', str(folder / name)])
        assert 'top-1 on the views of 2 epochs, ' in capsys.readouterr().out
    # A student learns from a part of it.
    train_distill.main([
        '--dataset', str(folder / 'part'), '--val-split', 'train', '--model', 'test_resnet', '--epochs', '1', '-b',
        '50', '--warmup-epochs', '0', '--logits', str(tmp_path / 'logits'), '--output', str(tmp_path), '-j', '0',
        '--quiet'])
    assert 'top-1' in capsys.readouterr().out
    # Filling wants the order of the rows too, since a shard is a run of them.
    with pytest.raises(SystemExit):
        save_logits.main([*fill, '--dataset', str(folder / 'part')])
    one_sentence(capsys.readouterr().err.strip().splitlines()[-1], '(110 here, 120 there)', 'another order')
    # What a kill left out is made again by the same command.
    keys = tmp_path / 'logits' / 'keys.arrow'
    before = keys.read_bytes()
    keys.unlink()
    with pytest.raises(InputError, match='has no keys.arrow'):
        KeyIndex.open(keys.parent, LogitStore.open(keys.parent).manifest)
    save_logits.main([*fill, '--dataset', str(folder / 'whole')])
    assert keys.read_bytes() == before
