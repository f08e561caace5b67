"""The store: what is written is read, what is damaged is named, and writers may die at any moment."""

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.utils import compare_versions

from support.files import tree
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.base.files import write_atomic
from timm_tinyvit.base.leases import Leases
from timm_tinyvit.base.machine import machine_name
from timm_tinyvit.store import reader
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.store.manifest import Manifest
from timm_tinyvit.store.shard import FOOTER_SIZE, ShardFormat
from timm_tinyvit.targets.codecs import create_codec

NUM_KILLS = 20
RECIPE = dict(input_size=(3, 32, 32), auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.25)


def make_manifest(**changes):
    values = dict(num_samples=10, num_classes=50, k=3, epochs=2, seed=7, shard_size=4, dataset={'num_samples': 10})
    values.update(changes)
    width = create_codec('float16', values['num_classes'], values['k']).width
    return Manifest(**{'record_width': width, **values})


def make_records(manifest, epoch):
    """Records of an epoch that say where they belong: their first bytes are the epoch and the sample."""
    records = np.random.RandomState(epoch).randint(0, 256, (manifest.num_samples, manifest.record_width), np.uint8)
    records[:, :2] = np.stack([np.full(manifest.num_samples, epoch), np.arange(manifest.num_samples) % 256], axis=1)
    return records


def make_store(path, **changes):
    store = LogitStore.create(path, make_manifest(**changes))
    for epoch, shard in store.missing(range(store.manifest.epochs)):
        first = shard * store.manifest.shard_size
        store.write_shard(epoch, shard, make_records(store.manifest, epoch)[first:first + store.manifest.shard_size])
    return store


# Manifest


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    manifest = make_manifest(teacher={'name': 'a', 'mean': [0.5, 0.1, 0.0]}, recipe={'re_prob': 0.1, 'vflip': None})
    store = LogitStore.create(tmp_path / 'store', manifest)
    assert LogitStore.open(tmp_path / 'store').manifest == store.manifest == manifest
    assert Manifest.from_json(manifest.to_json(), 'here') == manifest
    assert json.loads((tmp_path / 'store' / 'store.json').read_text()) == manifest.to_dict()


def test_the_last_shard_holds_the_rest():
    manifest = make_manifest(num_samples=10, shard_size=4)
    assert manifest.num_shards == 3 and [manifest.shard_rows(shard) for shard in range(3)] == [4, 4, 2]
    assert make_manifest(num_samples=8).num_shards == 2 and make_manifest(num_samples=3).num_shards == 1


def test_the_identity_knows_what_decides_the_bytes_of_a_shard():
    manifest = make_manifest()
    assert manifest.identity == make_manifest().identity
    assert manifest.identity == replace(manifest, epochs=9, versions={'torch': '9'}).identity
    # The same weights under another name say the same.
    assert manifest.identity == replace(manifest, teacher={'name': 'another'}).identity
    others = [
        dict(seed=8), dict(k=4), dict(shard_size=5), dict(num_classes=51), dict(teacher={'weights': 'b'}),
        dict(recipe={'vflip': 1.}), dict(dataset={'num_samples': 10, 'hash': '0'}), dict(probe='0')]
    identities = {make_manifest(**change).identity for change in others} | {manifest.identity}
    assert len(identities) == len(others) + 1


@pytest.mark.parametrize('text, words', [
    ('', ['JSON']),
    ('{"format": ', ['JSON']),
    ('[' * 100_000, ['JSON']),
    ('9' * 10_000, ['JSON']),
    ('[1, 2]', ['not the manifest']),
    ('null', ['not the manifest']),
    ('{}', ['not the manifest']),
    ('{"format": "parquet"}', ['not the manifest']),
])
def test_text_that_is_no_manifest_is_refused(text, words, tmp_path, refused):
    (tmp_path / 'store.json').write_text(text)
    with refused(str(tmp_path / 'store.json'), *words):
        LogitStore.open(tmp_path)


@pytest.mark.parametrize('changes, words', [
    (dict(version=2, sparsifier='topk', remainder='uniform'), ['version 2', 'reads 3', 'fill the store again']),
    (dict(version='1'), ['version']),
    (dict(colour='red'), ['unknown or missing', 'colour']),
    (dict(seed=None), ['seed', 'None']),
    (dict(num_samples='10'), ['num_samples', "'10'", 'int']),
    (dict(num_samples=10.), ['num_samples', 'int']),
    (dict(epochs=True), ['epochs', 'int']),
    (dict(teacher=[]), ['teacher', 'dict']),
    (dict(versions='1.0'), ['versions', 'dict']),
    (dict(codec=5), ['codec', 'str']),
    (dict(num_samples=0), ['num_samples']),
    (dict(num_samples=-1), ['num_samples']),
    (dict(num_samples=10 ** 30), ['num_samples']),
    (dict(shard_size=0), ['shard_size']),
    (dict(num_classes=0), ['num_classes']),
    (dict(num_classes=10 ** 12), ['num_classes']),
    (dict(k=0), ['k is 0']),
    (dict(k=51), ['k = 51', '50 classes']),
    (dict(epochs=-1), ['epochs']),
    (dict(epochs=10 ** 9), ['epochs']),
    (dict(seed=1 << 63), ['seed']),
    (dict(record_width=21), ['21 bytes', '18 expected']),
    (dict(codec='zip'), ["'zip'", 'float16']),
    (dict(num_samples=1 << 30), ['shards', '--shard-size']),
    (dict(epochs=100_000, num_samples=100_000), ['shards', '--shard-size']),
    (dict(key='a\nb'), ['key', 'printable']),
    (dict(probe='\ud800'), ['probe', 'printable']),
    (dict(recipe={'re_prob': [[[[[[[[0.1]]]]]]]]}), ['recipe', '8 levels']),
    (dict(recipe={'size': 10 ** 30}), ['recipe', '64-bit']),
    (dict(codec='x' * 10_000), ['codec', 'xxx']),
    (dict(teacher={'mean': [0.5]}), ['teacher has mean [0.5]']),
    (dict(teacher={'batch_size': '32'}), ["teacher has batch_size '32'"]),
])
def test_a_damaged_manifest_is_refused(changes, words, tmp_path, refused):
    values = {**make_manifest().to_dict(), **changes}
    (tmp_path / 'store.json').write_text(json.dumps(values))
    with refused(str(tmp_path / 'store.json'), *words):
        LogitStore.open(tmp_path)


@pytest.mark.parametrize('old, new, words', [
    ('"seed": 7', '"seed": 7, "seed": 8', 'names an entry twice'),
    ('0.25', 'NaN', 'NaN'), ('0.25', '-Infinity', 'Infinity'),
    ('0.25', '1e999', "'1e999' is too large"), ('"seed": 7', '"seed": ' + '7' * 5000, 'digits'),
])
def test_json_that_not_everybody_reads_the_same_way_is_refused(old, new, words, tmp_path, refused):
    text = make_manifest(recipe={'hflip': 0.25}).to_json()
    assert old in text
    (tmp_path / 'store.json').write_text(text.replace(old, new))
    with refused(str(tmp_path / 'store.json'), 'JSON', words):
        LogitStore.open(tmp_path)


def test_a_store_that_could_not_be_opened_again_is_not_made(tmp_path, refused):
    with refused(str(tmp_path / 'store'), 'shards', '--shard-size'):
        LogitStore.create(tmp_path / 'store', make_manifest(num_samples=1 << 22, shard_size=1))
    assert not (tmp_path / 'store').exists()
    store = make_store(tmp_path / 'store')
    with refused(str(tmp_path / 'store'), 'epochs is 1048576'):
        store.extend(1 << 20)
    assert LogitStore.open(store.path).manifest == store.manifest


@pytest.mark.parametrize('name', sorted(make_manifest().to_dict().keys() - {'format', 'version'}))
def test_a_manifest_without_one_of_its_entries_is_refused(name, tmp_path, refused):
    values = make_manifest().to_dict()
    del values[name]
    (tmp_path / 'store.json').write_text(json.dumps(values))
    with refused('missing', name):
        LogitStore.open(tmp_path)


def test_a_manifest_that_is_no_text_or_too_large_is_refused(tmp_path, refused):
    (tmp_path / 'store.json').write_bytes(b'\xff\xfe' + bytes(100))
    with refused('store.json', 'cannot be read'):
        LogitStore.open(tmp_path)
    (tmp_path / 'store.json').write_bytes(b' ' * (1 << 20) + b'{}')
    with refused('store.json', 'damaged'):
        LogitStore.open(tmp_path)
    (tmp_path / 'store.json').unlink()
    (tmp_path / 'store.json').mkdir()
    with refused('store.json', 'cannot be read'):
        LogitStore.open(tmp_path)


def test_a_place_without_a_store_is_refused_when_read(tmp_path, refused):
    (tmp_path / 'file').write_text('a file')
    for path in (tmp_path, tmp_path / 'nothing', tmp_path / 'file', tmp_path / 'file' / 'below'):
        assert not LogitStore.exists(path)
        with refused(f'no logit store at {path}', 'timm-tinyvit fill'):
            LogitStore.open(path)


def test_a_place_that_holds_something_else_is_refused_when_made(tmp_path, refused):
    (tmp_path / 'file').write_text('a file')
    for path in (tmp_path, tmp_path / 'file'):
        with refused(str(path), 'not a logit store'):
            LogitStore.create(path, make_manifest())
    assert tree(tmp_path) == {'file': b'a file'}
    # A folder with hidden files alone, as a killed writer leaves it, is as good as empty.
    (tmp_path / 'new').mkdir()
    (tmp_path / 'new' / '.store.json.somewhere.1.tmp').write_text('')
    LogitStore.create(tmp_path / 'new', make_manifest())


def test_another_store_at_the_same_place_is_refused_with_what_differs(tmp_path, refused):
    recipe, teacher = {'vflip': 0., 'hflip': 0.5}, {'name': 'resnet50', 'weights': 'abc'}
    store = make_store(tmp_path / 'store', recipe=recipe, teacher=teacher)
    before = tree(store.path)
    for changes, words in (
            (dict(seed=8), ['seed: 7, not 8']),
            (dict(k=4), ['k: 3, not 4']),
            (dict(recipe={**recipe, 'vflip': 1.}), ['recipe vflip: 0.0, not 1.0']),
            (dict(teacher={**teacher, 'weights': 'def'}), ["teacher weights: 'abc', not 'def'"]),
            (dict(dataset={'num_samples': 10, 'hash': '0'}), ["dataset hash: None, not '0'"])):
        with refused(str(store.path), 'something else', *words):
            LogitStore.create(store.path, make_manifest(**{**dict(recipe=recipe, teacher=teacher), **changes}))
    assert tree(store.path) == before


def test_a_store_grows_in_epochs_and_never_shrinks(tmp_path):
    store = make_store(tmp_path / 'store', epochs=2)
    shards = {name: data for name, data in tree(store.path).items() if name != 'store.json'}
    for epochs, expected in ((1, 2), (2, 2), (4, 4), (3, 4)):
        grown = LogitStore.create(store.path, make_manifest(epochs=epochs, versions={'torch': 'another'}))
        assert grown.manifest.epochs == LogitStore.open(store.path).manifest.epochs == expected
    assert grown.missing(range(4)) == [(epoch, shard) for epoch in (2, 3) for shard in range(3)]
    assert {name: data for name, data in tree(store.path).items() if name != 'store.json'} == shards
    np.testing.assert_array_equal(grown.read(1, range(10)), make_records(store.manifest, 1))
    # The versions are those of the first writer.
    assert grown.manifest.versions == {}


# Shards


def test_records_are_read_in_any_order_and_repeatedly(tmp_path):
    store = make_store(tmp_path / 'store', num_samples=103, shard_size=10, epochs=3)
    picks = np.random.RandomState(0)
    for _ in range(30):
        epoch, indices = picks.randint(3), picks.randint(103, size=picks.randint(1, 60))
        np.testing.assert_array_equal(store.read(epoch, indices), make_records(store.manifest, epoch)[indices])
    for indices in ([102, 0, 102, 0], range(102, -1, -1), torch.arange(103), []):
        np.testing.assert_array_equal(store.read(1, indices), make_records(store.manifest, 1)[list(indices)])


def test_a_sample_outside_the_store_is_refused(tmp_path, refused):
    store = make_store(tmp_path / 'store')
    for index in (10, -1, 10 ** 9):
        with refused(f'sample {index}', '10 samples'):
            store.read(0, [3, index, 5])
    with refused('no shard 0 of epoch 2'):
        store.read(2, [0])


def test_a_store_travels_to_another_process_without_its_maps(tmp_path):
    store = make_store(tmp_path / 'store')
    store.read(0, range(10))
    parcel = pickle.dumps(store)
    assert len(parcel) < 2000
    np.testing.assert_array_equal(pickle.loads(parcel).read(1, [9, 1]), store.read(1, [9, 1]))


def test_datasets_and_pyarrow_open_a_shard_on_their_own(tmp_path):
    store = make_store(tmp_path / 'store')
    path = store.shard_path(1, 2)
    assert str(path.relative_to(store.path)) == 'epoch-00001/shard-00002.arrow'
    expected = [record.tobytes() for record in make_records(store.manifest, 1)[8:]]
    if compare_versions('datasets', '>=', '5.2'):  # those before know no binary values of a fixed size
        rows = datasets.Dataset.from_file(str(path))
        assert rows.column_names == ['record'] and rows.with_format('arrow')[:]['record'].to_pylist() == expected
    for source in (pa.memory_map(str(path)), pa.OSFile(str(path))):
        stream = pa.ipc.open_stream(source)
        table = stream.read_all()
        assert table['record'].to_pylist() == expected and table['record'].type == pa.binary(18)
    metadata = json.loads(table.schema.metadata[b'timm_tinyvit'])
    assert (metadata['epoch'], metadata['shard'], metadata['store']) == (1, 2, store.manifest.identity)


def test_a_shard_ends_with_the_checksum_that_the_docstring_names(tmp_path):
    content = make_store(tmp_path / 'store').shard_path(0, 0).read_bytes()
    assert content[-24:] == b'TTVSHARD' + hashlib.blake2b(content[:-24], digest_size=16).digest()


def test_reading_maps_and_does_not_copy(tmp_path):
    def private_bytes():
        lines = Path('/proc/self/smaps_rollup').read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith('Anonymous:')) << 10

    if not Path('/proc/self/smaps_rollup').exists():
        pytest.skip('this system does not count the memory of a process')
    store = make_store(tmp_path / 'store', num_samples=600_000, shard_size=100_000, num_classes=1000, k=10, epochs=1)
    size = store.size()
    reader = LogitStore.open(store.path)
    reader.read(0, [0])
    before = private_bytes()
    for indices in np.random.RandomState(0).permutation(600_000)[:200_000].reshape(-1, 500):
        reader.read(0, indices)
    assert size > 25e6 and private_bytes() - before < 5e6


def test_writing_takes_whole_shards_only(tmp_path, refused):
    store = LogitStore.create(tmp_path / 'store', make_manifest())
    for records in (
            np.zeros((3, 20), np.uint8), np.zeros((4, 19), np.uint8), np.zeros((4, 20), np.int8),
            np.zeros(80, np.uint8)):
        with refused('shard 0 takes', error=ValueError):
            store.write_shard(0, 0, records)
    with refused('shard 2 takes', error=ValueError):
        store.write_shard(0, 2, np.zeros((4, 20), np.uint8))
    assert list(tree(store.path)) == ['store.json']


def test_a_shard_does_not_depend_on_how_its_records_lie_in_memory(tmp_path):
    store = make_store(tmp_path / 'store')
    before = store.shard_path(0, 0).read_bytes()
    wider = np.zeros((8, 25), np.uint8)
    wider[::2, 2:20] = make_records(store.manifest, 0)[:4]
    store.write_shard(0, 0, wider[::2, 2:20])
    assert store.shard_path(0, 0).read_bytes() == before


def test_every_damaged_byte_of_a_shard_is_seen(tmp_path, refused):
    store = make_store(tmp_path / 'store')
    path = store.shard_path(0, 1)
    content = path.read_bytes()
    bits = random.Random(0)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << bits.randrange(8)
        path.write_bytes(damaged)
        with refused(str(path), 'damaged', 'timm-tinyvit fill'):
            LogitStore.open(store.path).read(0, [5])
    # The neighbours are not touched by it.
    np.testing.assert_array_equal(store.read(0, [0, 9]), make_records(store.manifest, 0)[[0, 9]])
    path.write_bytes(content)
    store.read(0, [5])


def test_a_truncated_or_lengthened_shard_is_seen(tmp_path, refused):
    store = make_store(tmp_path / 'store')
    path = store.shard_path(0, 1)
    content = path.read_bytes()
    for length in [*range(0, len(content), 7), len(content) - FOOTER_SIZE, len(content) - 1]:
        path.write_bytes(content[:length])
        with refused(str(path)):
            LogitStore.open(store.path).read(0, [5])
    path.write_bytes(content[:50])
    with refused(str(path), 'cut short', '50 bytes'):
        store.read(0, [5])
    path.write_bytes(content + b'\0')
    with refused(str(path), 'damaged'):
        store.read(0, [5])


def test_a_shard_of_another_place_is_seen(tmp_path, refused):
    store, other = make_store(tmp_path / 'store'), make_store(tmp_path / 'other', seed=8)
    path = store.shard_path(0, 1)
    for source in (store.shard_path(1, 1), store.shard_path(0, 0), other.shard_path(0, 1)):
        shutil.copy(source, path)
        with refused(str(path), 'another store, epoch or place'):
            LogitStore.open(store.path).read(0, [5])


def test_a_missing_shard_is_named(tmp_path, refused):
    store = make_store(tmp_path / 'store')
    store.shard_path(1, 2).unlink()
    assert LogitStore.open(store.path).missing(range(2)) == [(1, 2)]
    store.read(1, [0, 7])
    with refused(str(store.path), 'no shard 2 of epoch 1', 'timm-tinyvit fill'):
        store.read(1, [0, 9])
    shutil.rmtree(store.path / 'epoch-00000')
    assert store.missing([0, 1]) == [(0, 0), (0, 1), (0, 2), (1, 2)]
    path = store.shard_path(1, 2)
    path.mkdir()
    with refused(str(path)):
        LogitStore.open(store.path).read(1, [9])


def test_lengths_and_headers_are_checked_without_reading_records(tmp_path, refused):
    store, other = make_store(tmp_path / 'store'), make_store(tmp_path / 'other', seed=8)
    path = store.shard_path(1, 1)
    content = path.read_bytes()
    store.check_files(range(2))
    path.write_bytes(content[:600] + b'\0' + content[601:])
    store.check_files(range(2))
    for data, words in (
            (content[:-1], '679 bytes, expected 680'), (b'', 'cut short'), (content + b'\0', 'expected 680'),
            (store.shard_path(0, 1).read_bytes(), 'another store, epoch or place'),
            (store.shard_path(1, 0).read_bytes(), 'another store, epoch or place'),
            (other.shard_path(1, 1).read_bytes(), 'another store, epoch or place')):
        path.write_bytes(data)
        store.check_files([0])
        with refused(str(path), words, 'timm-tinyvit fill'):
            store.check_files(range(2))
    path.unlink()
    # What is missing is for `missing` to say.
    store.check_files(range(2))
    os.mkfifo(path)
    with refused(str(path), 'not a file'):
        store.check_files(range(2))


def test_a_bad_shard_in_a_batch_spoils_no_later_batch(tmp_path, refused):
    store = make_store(tmp_path / 'store', num_samples=100)
    expected = make_records(store.manifest, 0)
    np.testing.assert_array_equal(store.read(0, [50]), expected[[50]])
    path = store.shard_path(0, 24)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b'\0')
    for _ in range(2):
        with refused(str(path), 'checksum'):
            store.read(0, range(100))
        np.testing.assert_array_equal(store.read(0, range(90)), expected[:90])
    path.write_bytes(content)
    np.testing.assert_array_equal(store.read(0, range(100)), expected)


def test_batches_of_several_epochs_check_each_shard_once(tmp_path, monkeypatch):
    store = make_store(tmp_path / 'store', num_samples=30)
    checked = []
    check = ShardFormat.map
    monkeypatch.setattr(
        ShardFormat, 'map', lambda self, path, *place: checked.append(place) or check(self, path, *place))
    for epoch in [0, 1] * 3:
        np.testing.assert_array_equal(store.read(epoch, range(30)), make_records(store.manifest, epoch))
    assert len(checked) == len(set(checked)) == 2 * store.manifest.num_shards


def test_more_shards_than_a_process_may_map_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_tinyvit.store.reader.MAX_MAPS', 5)
    stores = [make_store(tmp_path / name, num_samples=103, shard_size=4) for name in ('first', 'second')]
    for number, rows in enumerate(np.random.RandomState(0).randint(103, size=(60, 5))):
        store, epoch = stores[number % 2], number // 3 % 2
        np.testing.assert_array_equal(store.read(epoch, rows), make_records(store.manifest, epoch)[rows])
        if Path('/proc/self/maps').exists():
            # Of all stores together: the limit, and what one batch maps.
            assert sum(str(tmp_path) in line for line in open('/proc/self/maps')) <= 5 + 5


def test_mapped_shards_are_not_open_files(tmp_path):
    store = make_store(tmp_path / 'store', num_samples=30, shard_size=1, epochs=1)
    before = len(os.listdir('/proc/self/fd'))
    store.read(0, range(30))
    assert len(os.listdir('/proc/self/fd')) == before


def test_a_store_that_vanishes_is_named_and_what_is_mapped_is_still_read(tmp_path, refused):
    store = make_store(tmp_path / 'store')
    store.read(0, [0])
    shutil.rmtree(store.path)
    np.testing.assert_array_equal(store.read(0, [3]), make_records(store.manifest, 0)[[3]])
    with refused(str(store.path), 'has vanished'):
        store.read(0, [4])
    with refused(str(store.path), 'has vanished'):
        store.write_shard(0, 0, make_records(store.manifest, 0)[:4])
    # A shard without a manifest would stand in the way of another store.
    assert not store.path.exists()


def write_as_nobody(store):
    """Write to a store without the rights to, which a superuser has everywhere."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    store.read(0, [0])
    try:
        store.write_shard(0, 0, make_records(store.manifest, 0)[:4])
    except InputError as error:
        if 'cannot write' in str(error) and 'permission denied' in str(error):
            os._exit(7)


@pytest.mark.launches
def test_a_store_that_may_not_be_written_is_still_read(warm_processes):
    # Not in pytest's folder, which is closed to others.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        store = make_store(Path(folder) / 'store')
        closed = [store.path, store.shard_path(0, 0).parent]
        for path in closed:
            path.chmod(0o555)
        process = warm_processes.Process(target=write_as_nobody, args=(store,))
        process.start()
        process.join()
        for path in closed:
            path.chmod(0o755)
        assert process.exitcode == 7
        assert {file.name for file in store.path.rglob('.*')} == set()


def test_a_read_only_disk_is_named_and_read(tmp_path, refused):
    (tmp_path / 'disk').mkdir()
    mount = ['mount', '-t', 'tmpfs', 'tmpfs', str(tmp_path / 'disk')]
    if shutil.which('mount') is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting a tmpfs is not permitted here')
    try:
        store = make_store(tmp_path / 'disk' / 'store')
        subprocess.run(['mount', '-o', 'remount,ro', str(tmp_path / 'disk')], check=True)
        with refused('cannot write', 'the disk is read-only'):
            store.write_shard(0, 0, make_records(store.manifest, 0)[:4])
        with refused('cannot write', 'the disk is read-only'):
            LogitStore.create(tmp_path / 'disk' / 'another', make_manifest())
        store = LogitStore.open(store.path)
        np.testing.assert_array_equal(store.read(1, range(10)), make_records(store.manifest, 1))
        del store
    finally:
        subprocess.run(['umount', '--lazy', str(tmp_path / 'disk')], check=True)


def test_a_writer_leaves_nothing_but_the_store(tmp_path):
    store = make_store(tmp_path / 'store')
    names = [f'epoch-0000{epoch}/shard-0000{shard}.arrow' for epoch in range(2) for shard in range(3)]
    assert set(tree(store.path)) == {'store.json', 'epoch-00000', 'epoch-00001', *names}
    assert store.size() == sum((store.path / name).stat().st_size for name in names)


def test_stale_files_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path):
    store = make_store(tmp_path / 'store')
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    here = machine_name()
    folders = [store.path, store.path / 'epoch-00001']
    stale = [
        *(folder / f'.shard-00000.arrow.{here}.{dead.pid}.tmp' for folder in folders),
        *(folder / '.shard-00001.arrow.elsewhere.1.tmp' for folder in folders)]
    kept = [
        *(folder / f'.shard-00000.arrow.{here}.{os.getpid()}.tmp' for folder in folders),
        *(folder / '.shard-00000.arrow.elsewhere.1.tmp' for folder in folders)]
    for file in stale + kept:
        file.write_text('half a shard')
    for file in stale[2:]:
        # Another machine's file is stale when it is older than a day.
        os.utime(file, (time.time() - 90_000,) * 2)
    before = set(tree(store.path))
    store.remove_leftovers()
    assert before - set(tree(store.path)) == {str(file.relative_to(store.path)) for file in stale}


def test_a_file_is_written_whole_or_not_at_all(tmp_path, refused):
    path = tmp_path / 'folder' / 'file'
    write_atomic(path, b'old')
    with pytest.raises(TypeError):
        write_atomic(path, [b'new', None])
    assert path.read_bytes() == b'old'
    write_atomic(path, [b'n', b'ew'])
    assert path.read_bytes() == b'new'
    with refused(str(path / 'below'), 'cannot write'):
        write_atomic(path / 'below', b'')


# Files that somebody changes under way


def cut(path, store):
    os.truncate(path, 700)


def exchange(path, store):
    path.write_bytes(store.shard_path(1, 0).read_bytes())


def empty(path, store):
    path.write_bytes(b'')


def flip(path, store):
    with open(path, 'r+b') as file:
        file.seek(600)
        byte = file.read(1)[0]
        file.seek(600)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize('change', [cut, exchange, empty, flip])
def test_a_shard_that_changes_where_it_lies_is_named_by_who_has_mapped_it(change, tmp_path, refused):
    store = make_store(tmp_path / 'store', num_samples=3000, shard_size=1000)
    records = make_records(store.manifest, 0)
    path = store.shard_path(0, 0)
    content = path.read_bytes()
    np.testing.assert_array_equal(store.read(0, range(3000)), records)
    time.sleep(0.05)
    change(path, store)
    with refused(str(path)):
        store.read(0, [5, 1005])
    np.testing.assert_array_equal(store.read(0, [1005, 2005]), records[[1005, 2005]])
    # One that comes back, as who fills it again puts it there, is read.
    write_atomic(path, content)
    time.sleep(0.05)
    np.testing.assert_array_equal(store.read(0, [5, 1005]), records[[5, 1005]])


def test_a_shard_that_is_written_again_the_same_is_read_on(tmp_path):
    store = make_store(tmp_path / 'store')
    records = make_records(store.manifest, 0)
    for _ in range(3):
        np.testing.assert_array_equal(store.read(0, range(10)), records)
        store.write_shard(0, 1, records[4:8])
        time.sleep(0.01)


def test_looking_whether_files_have_changed_takes_a_small_part_of_reading(tmp_path, monkeypatch):
    store = make_store(tmp_path / 'store')
    looks, clock = [], iter(range(10_000))
    monkeypatch.setattr(reader, 'file_status', lambda path: looks.append(path))
    store.read(0, range(10))
    monkeypatch.setattr(reader, 'time', SimpleNamespace(monotonic=lambda: next(clock)))
    looks.clear()
    store._next_look = 0
    for _ in range(200):
        store.read(0, range(10))
    # A look takes one second here and a read another one.
    assert 0 < len(looks) <= 3 * 200 / 20


# Links


@pytest.mark.parametrize('use', [LogitStore.open, lambda path: LogitStore.create(path, make_manifest(epochs=3))])
def test_an_epoch_that_is_a_link_is_refused_and_nothing_happens_where_it_leads(use, tmp_path, refused):
    make_store(tmp_path / 'store')
    outside = tmp_path / 'outside'
    (tmp_path / 'store' / 'epoch-00001').rename(outside)
    dead = subprocess.Popen(['true'])
    dead.wait()
    for name in ('.precious.tmp', f'.shard-00000.arrow.{machine_name()}.{dead.pid}.tmp', '.shard-00000.arrow.lease'):
        (outside / name).write_bytes(b'')
    (tmp_path / 'store' / 'epoch-00001').symlink_to(outside)
    before = tree(tmp_path)
    with refused(str(tmp_path / 'store' / 'epoch-00001'), 'is a link'):
        use(tmp_path / 'store')
    assert tree(tmp_path) == before


def test_a_store_that_is_a_link_itself_is_filled_and_read(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'store').symlink_to(tmp_path / 'disk')
    store = make_store(tmp_path / 'store')
    np.testing.assert_array_equal(store.read(1, range(10)), make_records(store.manifest, 1))


def test_a_process_suspended_in_the_middle_of_an_extension_does_not_shrink_the_store(tmp_path, refused, monkeypatch):
    """It has read the manifest and written the new one, but not renamed it, when its lease is taken over."""
    store = make_store(tmp_path / 'store')
    file = store.path / 'store.json'

    def suspend(descriptor):
        monkeypatch.undo()
        lease = Leases.path(file)
        lease.rename(tmp_path / 'lease')
        LogitStore.open(store.path).extend(9)

    monkeypatch.setattr(os, 'fsync', suspend)
    with refused(str(file), 'taken over'):
        store.extend(5)
    assert LogitStore.open(store.path).manifest.epochs == 9
    assert not [name for name in os.listdir(store.path) if name.startswith('.')]


def test_what_a_killed_process_left_beside_the_manifest_goes_with_the_next_one(tmp_path):
    store = make_store(tmp_path / 'store')
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    owner = dict(host='here', machine=machine_name(), pid=dead.pid, started='1', token='a', heartbeat=0)
    Leases.path(store.path / 'store.json').write_text(json.dumps(owner))
    Leases.path(store.shard_path(1, 2)).write_text(json.dumps(owner))
    (store.path / f'.keys.arrow.{machine_name()}.{dead.pid}.tmp').write_bytes(b'half')
    (store.path / 'epoch-00000' / f'.shard-00001.arrow.{machine_name()}.{dead.pid}.tmp').write_bytes(b'half')
    LogitStore.create(store.path, store.manifest)
    assert not [name for name in tree(store.path) if name.rpartition('/')[2].startswith('.')]
