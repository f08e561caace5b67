"""The store: what is written is read, what is damaged is named, and writers may die at any moment."""

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from timm.models import save_for_hf

from timm_tinyvit import save_logits, store as store_module
from timm_tinyvit.codec import create_codec
from timm_tinyvit.dataset import SparseLogitDataset, dataset_fingerprint
from timm_tinyvit.fill import fill_store
from timm_tinyvit.replay import Replay, ViewRecipe
from timm_tinyvit.store import FOOTER_SIZE, LogitStore, Manifest, write_aside
from timm_tinyvit.teacher import Teacher

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


def tree(path):
    """Names and contents of everything in a folder."""
    return {
        str(file.relative_to(path)): file.read_bytes() if file.is_file() else None
        for file in sorted(Path(path).rglob('*'))}


# Manifest


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    manifest = make_manifest(teacher={'name': 'a', 'mean': [0.5, 0.1]}, recipe={'re_prob': 0.1, 'vflip': None})
    store = LogitStore.create(tmp_path / 'store', manifest)
    assert LogitStore.open(tmp_path / 'store').manifest == store.manifest == manifest
    assert Manifest.from_json(manifest.to_json(), 'here') == manifest
    assert json.loads((tmp_path / 'store' / 'store.json').read_text()) == asdict(manifest)


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
    (dict(version=1), ['version 1', 'reads 2']),
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
    (dict(record_width=21), ['21 bytes', '20 expected']),
    (dict(codec='zip'), ["'zip'", 'float16']),
    (dict(remainder='half'), ['remainder', "'half'"]),
])
def test_a_damaged_manifest_is_refused(changes, words, tmp_path, refused):
    values = {**asdict(make_manifest()), **changes}
    (tmp_path / 'store.json').write_text(json.dumps(values))
    with refused(str(tmp_path / 'store.json'), *words):
        LogitStore.open(tmp_path)


@pytest.mark.parametrize('name', sorted(asdict(make_manifest()).keys() - {'format', 'version'}))
def test_a_manifest_without_one_of_its_entries_is_refused(name, tmp_path, refused):
    values = asdict(make_manifest())
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
        with refused(f'no logit store at {path}', 'save_logits'):
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
            (dict(seed=8), ['seed: 7, 8']),
            (dict(k=4), ['k: 3, 4']),
            (dict(recipe={**recipe, 'vflip': 1.}), ['recipe vflip: 0.0, 1.0']),
            (dict(teacher={**teacher, 'weights': 'def'}), ["teacher weights: 'abc', 'def'"]),
            (dict(dataset={'num_samples': 10, 'hash': '0'}), ["dataset hash: None, '0'"])):
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
    rows = datasets.Dataset.from_file(str(path))
    assert rows.column_names == ['record'] and rows.with_format('arrow')[:]['record'].to_pylist() == expected
    for source in (pa.memory_map(str(path)), pa.OSFile(str(path))):
        stream = pa.ipc.open_stream(source)
        table = stream.read_all()
        assert table['record'].to_pylist() == expected and table['record'].type == pa.binary(20)
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
    wider[::2, 2:22] = make_records(store.manifest, 0)[:4]
    store.write_shard(0, 0, wider[::2, 2:22])
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
        with refused(str(path), 'damaged', 'save_logits'):
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
    with refused(str(store.path), 'no shard 2 of epoch 1', 'save_logits'):
        store.read(1, [0, 9])
    shutil.rmtree(store.path / 'epoch-00000')
    assert store.missing([0, 1]) == [(0, 0), (0, 1), (0, 2), (1, 2)]
    path = store.shard_path(1, 2)
    path.mkdir()
    with refused(str(path)):
        LogitStore.open(store.path).read(1, [9])


def test_a_writer_leaves_nothing_but_the_store(tmp_path):
    store = make_store(tmp_path / 'store')
    names = [f'epoch-0000{epoch}/shard-0000{shard}.arrow' for epoch in range(2) for shard in range(3)]
    assert set(tree(store.path)) == {'store.json', 'epoch-00000', 'epoch-00001', *names}
    assert store.size() == sum((store.path / name).stat().st_size for name in names)


def test_stale_files_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path):
    store = make_store(tmp_path / 'store')
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    here = socket.gethostname()
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
    store.remove_stale()
    assert before - set(tree(store.path)) == {str(file.relative_to(store.path)) for file in stale}


def test_a_file_is_written_whole_or_not_at_all(tmp_path, refused):
    path = tmp_path / 'folder' / 'file'
    write_aside(path, b'old')
    with pytest.raises(TypeError):
        write_aside(path, [b'new', None])
    assert path.read_bytes() == b'old'
    write_aside(path, [b'n', b'ew'])
    assert path.read_bytes() == b'new'
    with refused(str(path / 'below'), 'cannot write'):
        write_aside(path / 'below', b'')


# Writers that die, and writers that work at the same time


def make_teacher():
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=10, pretrained_cfg_overlay=dict(input_size=(3, 32, 32)))
    # Not as sure of one class as a random model is.
    model.fc.weight.data *= 20
    return model


@pytest.fixture(scope='module')
def images(fashion, tmp_path_factory):
    """The 1,000 real images in a folder that opens at once."""
    path = tmp_path_factory.mktemp('images') / 'data'
    fashion.save_to_disk(str(path))
    return path


@pytest.fixture(scope='module')
def job(images):
    """What a writer needs to know: the images and the manifest."""
    dataset = datasets.load_from_disk(str(images))
    recipe = ViewRecipe(**RECIPE)
    manifest = make_manifest(
        num_samples=len(dataset), num_classes=10, k=3, epochs=3, shard_size=150, recipe=recipe.to_dict(),
        teacher=Teacher(make_teacher(), 'test_resnet', torch.device('cpu')).describe(batch_size=32),
        dataset=dataset_fingerprint(dataset))
    return str(images), manifest


def fill(path, job, pipe=None, rank=0, world_size=1, num_workers=0, before=None):
    """A writer process: what save_logits does, with the same bytes on every run of one machine."""
    torch.set_num_threads(1)
    if before is not None:
        before(pipe)
    images, manifest = job
    store = LogitStore.create(path, manifest)
    store.remove_stale()
    teacher = Teacher(make_teacher(), 'test_resnet', torch.device('cpu'))
    data = SparseLogitDataset(
        datasets.load_from_disk(images), Replay(ViewRecipe.from_dict(manifest.recipe), manifest.seed))
    if pipe is not None:
        pipe.send('ready')
        pipe.recv()
    fill_store(
        store, teacher, data, range(manifest.epochs), rank, world_size, num_workers, show_progress=False)


@pytest.fixture
def writers(warm_processes, job):
    """Start writer processes; each stands still before its first view until its pipe is told to go on."""
    started = []

    def start(path, **options):
        here, there = warm_processes.Pipe()
        process = warm_processes.Process(target=fill, args=(str(path), job, there), kwargs=options)
        process.start()
        there.close()
        started.append(process)
        return process, here

    yield start
    for process in started:
        process.kill()
        process.join()


def go(pipe):
    assert pipe.poll(120) and pipe.recv() == 'ready'
    pipe.send('go')


@pytest.fixture(scope='module')
def reference(warm_processes, job, tmp_path_factory):
    """A store that one writer filled in peace, and the seconds that it took."""
    path = tmp_path_factory.mktemp('reference') / 'store'
    pipe, there = warm_processes.Pipe()
    process = warm_processes.Process(target=fill, args=(str(path), job, there))
    process.start()
    go(pipe)
    start = time.monotonic()
    process.join()
    assert process.exitcode == 0
    return tree(path), time.monotonic() - start


def test_the_filled_store_is_whole_and_its_records_are_the_teachers(reference, job, tmp_path):
    content, _ = reference
    for name, data in content.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.mkdir() if data is None else file.write_bytes(data)
    store = LogitStore.open(tmp_path)
    assert store.missing(range(3)) == [] and len(content) == 1 + 3 + 3 * 7
    replay = Replay(ViewRecipe(**RECIPE), store.manifest.seed)
    data = SparseLogitDataset(datasets.load_from_disk(job[0]), replay, store)
    teacher = Teacher(make_teacher(), 'test_resnet', torch.device('cpu'))
    keys = [(2, 999), (0, 0), (1, 150), (1, 149)]
    samples = data.__getitems__(keys)
    targets = store.codec.decode(torch.stack([sample['record'] for sample in samples]))
    probs = teacher(torch.stack([sample['view'] for sample in samples])).softmax(1)
    torch.testing.assert_close(targets.log_probs.exp(), probs.gather(1, targets.ids), rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(targets.densify().sum(1), torch.ones(4))


def test_a_store_whose_writers_were_killed_at_random_moments_equals_one_written_in_peace(
        writers, reference, tmp_path):
    expected, seconds = reference
    moments = random.Random(0)
    # Some writers die within their first shard, some after several.
    longest = seconds / 6
    interrupted = []
    for number in range(100):
        # A machine quick enough to finish a store before all the kills goes on with another one.
        path = tmp_path / f'{number}'
        shards = 0
        while True:
            process, pipe = writers(path)
            go(pipe)
            process.join(moments.uniform(0, longest) if len(interrupted) < NUM_KILLS else None)
            if not process.is_alive():
                break
            process.kill()
            process.join()
            if process.exitcode == 0:
                # It was done just then.
                break
            assert process.exitcode == -9
            before, shards = shards, len(list(path.glob('epoch-*/shard-*.arrow')))
            interrupted.append(shards)
            # This machine is slower now than it was for the reference.
            longest *= 1.5 if shards == before else 1
        assert process.exitcode == 0
        assert tree(path) == expected
        if len(interrupted) == NUM_KILLS:
            break
    assert len(interrupted) == NUM_KILLS
    # The kills came at many states of the store, not all before the first shard or after the last.
    assert len(set(interrupted)) >= 5 and max(interrupted) <= 21


class StopAt:
    """A hook for a writer: at the second shard it reports and stands still, `before` or `after` os.`name`."""

    def __init__(self, name, when):
        self.name, self.when = name, when

    def __call__(self, pipe):
        original = getattr(os, self.name)

        def stopping(*args):
            second = 'shard-00001' in os.fspath(args[0]) if self.name == 'replace' else (
                'shard-00001' in os.readlink(f'/proc/self/fd/{args[0]}'))
            if second and self.when == 'before':
                self.stand_still(pipe)
            result = original(*args)
            if second and self.when == 'after':
                self.stand_still(pipe)
            return result

        setattr(store_module.os, self.name, stopping)

    def stand_still(self, pipe):
        pipe.send('stopped')
        pipe.recv()


@pytest.mark.parametrize('name, when', [('fsync', 'before'), ('replace', 'before'), ('replace', 'after')])
def test_a_killed_writer_loses_only_its_open_shard(name, when, writers, reference, tmp_path):
    path = tmp_path / 'store'
    process, pipe = writers(path, before=StopAt(name, when))
    go(pipe)
    assert pipe.poll(120) and pipe.recv() == 'stopped'
    process.kill()
    process.join()
    left = tree(path)
    finished = {file for file in left if file.endswith('.arrow')}
    aside = {file for file in left if file.endswith('.tmp')}
    assert finished == {f'epoch-00000/shard-0000{shard}.arrow' for shard in range(2 if when == 'after' else 1)}
    assert len(aside) == (0 if when == 'after' else 1)
    assert all(left[file] == reference[0][file] for file in finished)
    process, pipe = writers(path)
    go(pipe)
    process.join()
    assert tree(path) == reference[0]


def test_two_processes_that_share_the_work_write_the_same_store(writers, reference, tmp_path):
    path = tmp_path / 'store'
    both = [writers(path, rank=rank, world_size=2) for rank in range(2)]
    for _, pipe in both:
        assert pipe.poll(120) and pipe.recv() == 'ready'
    for _, pipe in both:
        pipe.send('go')
    for process, _ in both:
        process.join()
        assert process.exitcode == 0
    assert tree(path) == reference[0]


def test_two_processes_share_the_work_also_when_one_starts_late(writers, reference, tmp_path):
    path = tmp_path / 'store'
    (first, first_pipe), (second, second_pipe) = (writers(path, rank=rank, world_size=2) for rank in range(2))
    go(first_pipe)
    # The second looks at what is missing when the first has written shards already.
    while first.is_alive() and not list(path.glob('epoch-*/shard-*.arrow')):
        time.sleep(0.01)
    go(second_pipe)
    first.join()
    second.join()
    assert set(tree(path)) == set(reference[0])
    assert tree(path) == reference[0]


def test_two_writers_that_know_nothing_of_each_other_write_the_same_store(writers, reference, tmp_path):
    path = tmp_path / 'store'
    both = [writers(path) for _ in range(2)]
    for _, pipe in both:
        go(pipe)
    for process, _ in both:
        process.join()
        assert process.exitcode == 0
    assert tree(path) == reference[0]


def test_loader_workers_do_not_change_the_store(job, reference, tmp_path):
    threads = torch.get_num_threads()
    try:
        fill(tmp_path / 'store', job, num_workers=2)
    finally:
        torch.set_num_threads(threads)
    assert tree(tmp_path / 'store') == reference[0]


# Full disks


@pytest.fixture(scope='module')
def teacher_folder(tmp_path_factory):
    """A teacher as a folder with config.json and safetensors, as timm writes it."""
    path = tmp_path_factory.mktemp('teacher')
    save_for_hf(make_teacher(), str(path), safe_serialization=True)
    return path


def run_save_logits(argv, output, file_size_limit=None):
    """A process that runs the program `save_logits` with these arguments; what it prints goes to a file."""
    with open(output, 'wb') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if file_size_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, resource.RLIM_INFINITY))
    save_logits.main(argv)


@pytest.fixture
def program(warm_processes, images, teacher_folder, tmp_path):
    """Run save_logits on the real images; returns its exit status and the last line of what it printed."""

    def run(store, epochs, shard_size=150, **options):
        argv = [
            '--dataset', str(images), '--teacher', str(teacher_folder), '--logits', str(store), '--topk', '3',
            '--epochs', str(epochs), '--img-size', '32', '--shard-size', str(shard_size), '--workers', '0',
            '--codec', 'float16']
        output = tmp_path / 'output.txt'
        process = warm_processes.Process(target=run_save_logits, args=(argv, str(output)), kwargs=options)
        process.start()
        process.join()
        return process.exitcode, output.read_text().strip().splitlines()[-1]

    return run


def test_a_file_size_limit_stops_the_program_with_one_sentence_and_loses_nothing(
        program, one_sentence, tmp_path):
    path = tmp_path / 'store'
    assert program(path, 1)[0] == 0
    finished = tree(path)
    shard = max(len(data) for name, data in finished.items() if name.endswith('.arrow'))
    manifest = len(finished['store.json'])
    assert manifest + 100 < shard
    status, message = program(path, 2, file_size_limit=manifest + 50)
    assert status == 2 and message.startswith('error: cannot write ')
    one_sentence(message, 'shard-00000.arrow', 'ulimit -f')
    left = tree(path)
    assert {name for name in left if name.startswith('.') or '/.' in name} == set()
    assert {name: left[name] for name in finished if name != 'store.json'} == {
        name: data for name, data in finished.items() if name != 'store.json'}
    assert program(path, 2)[0] == 0
    assert LogitStore.open(path).missing(range(2)) == []


@contextmanager
def small_disk(path, size):
    """A tmpfs of so many KiB, and a function that enlarges it."""
    path.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}k', 'tmpfs', str(path)]
    if shutil.which('mount') is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting a small tmpfs is not permitted here')
    try:
        yield lambda size: subprocess.run(['mount', '-o', f'remount,size={size}k', str(path)], check=True)
    finally:
        subprocess.run(['umount', str(path)], check=True)


def test_a_full_disk_stops_the_program_with_one_sentence_and_loses_nothing(program, one_sentence, tmp_path):
    assert program(tmp_path / 'peace', 2, shard_size=250)[0] == 0
    expected = tree(tmp_path / 'peace')
    # The manifest takes one page, a shard one or two, and a folder none.
    with small_disk(tmp_path / 'disk', 6 * resource.getpagesize() // 1024) as enlarge:
        path = tmp_path / 'disk' / 'store'
        status, message = program(path, 2, shard_size=250)
        assert status == 2 and message.startswith('error: cannot write ')
        one_sentence(message, str(path), 'the disk is full', 'goes on')
        left = tree(path)
        assert 0 < len([name for name in left if name.endswith('.arrow')]) < 8
        assert left.items() <= expected.items()
        # Still full: the same sentence again.
        status, again = program(path, 2, shard_size=250)
        assert (status, again) == (2, message) and tree(path) == left
        enlarge(1024)
        assert program(path, 2, shard_size=250)[0] == 0
        assert tree(path) == expected
