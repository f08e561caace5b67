"""Streams: webdataset's tar files and parquet read from front to back see what a map-style data set sees."""

import functools
import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import train_distill
from support import programs
from support.files import tree
from timm_tinyvit import save_logits
from timm_tinyvit.data.classes import check_label_values
from timm_tinyvit.data.dataset import SparseLogitDataset, collate
from timm_tinyvit.data.fingerprint import keyed_fingerprint
from timm_tinyvit.data.opening import open_store
from timm_tinyvit.data.sources import class_names, find_column, load_split, read_labels
from timm_tinyvit.data.streaming import SparseLogitStream, StreamedRows, StreamLoader
from timm_tinyvit.store.local import LogitStore

ROWS = 90
SETTINGS = ['--img-size', '32', '--color-jitter', '0', '--reprob', '0.5', '-j', '0', '--shard-size', '16', '--topk',
            '3', '--codec', 'float16', '--teacher-batch-size', '7']
refusal = functools.partial(programs.refusal, save_logits.main)


def write_tars(rows, folder, label_format, split='train', files=3):
    """Webdataset's files: an image and its label under one name, JPEGs as most have them."""
    folder.mkdir(exist_ok=True)
    for number in range(files):
        with tarfile.open(folder / f'{split}-{number:03d}.tar', 'w') as tar:
            for row in rows.shard(files, number, contiguous=True):
                image = io.BytesIO()
                row['image'].save(image, 'JPEG')
                label = json.dumps(row['label'] if label_format == 'cls' else {'label': row['label'], 'wnid': 'n0'})
                for ending, data in (('jpg', image.getvalue()), (label_format, label.encode())):
                    entry = tarfile.TarInfo(f'{row["name"]}.{ending}')
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return folder


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """At the end of shuffled parquet files datasets sleeps for five seconds, for the sake of an exit right after."""
    monkeypatch.setattr(datasets.config, 'SLEEP_TIME_ON_THREADS_SHUTDOWN', 0, raising=False)


@pytest.fixture(scope='module')
def named(fashion):
    return fashion.select(range(ROWS)).add_column('name', [f'n{number * 37 % 101:05d}' for number in range(ROWS)])


@pytest.fixture(scope='module')
def folders(tmp_path_factory, named):
    """The same images as webdataset's tar files with labels of both kinds, and as parquet files."""
    folder = tmp_path_factory.mktemp('streams')
    write_tars(named, folder / 'cls', 'cls')
    write_tars(named, folder / 'json', 'json')
    (folder / 'parquet').mkdir()
    for number in range(3):
        named.shard(3, number, contiguous=True).to_parquet(str(folder / 'parquet' / f'train-{number}.parquet'))
    return folder


@pytest.fixture(scope='module')
def stores(tmp_path_factory, folders, teacher):
    """Stores of the tar files and of the parquet files, filled from map-style data sets."""
    folder = tmp_path_factory.mktemp('stores')
    for name, key in (('cls', '__key__'), ('parquet', 'name')):
        fill(folder / name, teacher, folders / name, '--key', key)
    return folder


def fill(path, teacher, data, *flags):
    save_logits.main([*SETTINGS, '--teacher', teacher, '--logits', str(path), '--dataset', str(data), '--epochs', '2',
                      *map(str, flags)])


def map_style(path, data, epoch, **options):
    """Every sample of a map-style data set in an epoch, by the hash of its key."""
    store, replay = open_store(path)
    rows = SparseLogitDataset(load_split(str(data), None, is_training=True), replay, store, **options)
    return {sample['index']: sample for sample in rows.__getitems__([(epoch, row) for row in range(len(rows))])}


def stream_of(path, data, **options):
    store, replay = open_store(path)
    stream = load_split(str(data), None, is_training=True, streaming=True)
    return SparseLogitStream(stream, replay, store, store_epochs=store.manifest.stored_epochs, **options)


def assert_same(sample, expected):
    assert all(torch.equal(sample[name], expected[name]) for name in ('view', 'record'))
    assert sample['label'] == expected['label']


# Webdataset's files as a data set


@pytest.mark.parametrize('label_format', ['cls', 'json'])
def test_a_folder_of_tar_files_is_a_data_set_with_labels_and_keys(label_format, folders, named):
    rows = load_split(str(folders / label_format), 'train[:80]', is_training=True)
    label_column = find_column(rows, None, is_image=False)
    assert find_column(rows, None, is_image=True) == 'jpg'
    assert label_column == {'cls': 'cls', 'json': 'json.label'}[label_format]
    assert class_names(rows, label_column) is None
    assert len(rows) == 80 and rows['__key__'][:] == named['name'][:80]
    assert read_labels(rows, label_column).tolist() == named['label'][:80]


def test_a_label_inside_of_json_comes_with_its_view(folders, stores):
    # The same image files and keys, so that the store is the same.
    expected = map_style(stores / 'cls', folders / 'cls', 1)
    found = map_style(stores / 'cls', folders / 'json', 1)
    assert expected.keys() == found.keys() and len(found) == ROWS
    for index, sample in found.items():
        assert_same(sample, expected[index])


# Training from a stream


@pytest.mark.parametrize('name', ['cls', 'json', 'parquet'])
def test_a_stream_gives_every_sample_of_the_map_style_data_set(name, folders, stores):
    store = stores / ('parquet' if name == 'parquet' else 'cls')
    stream = stream_of(store, folders / name, buffer_size=40, seed=3)
    orders = []
    for epoch in (0, 1, 2):
        stream.set_epoch(epoch)
        samples = list(stream)
        expected = map_style(store, folders / ('parquet' if name == 'parquet' else 'cls'), epoch % 2)
        orders.append([sample['index'] for sample in samples])
        assert len(samples) == ROWS and set(orders[-1]) == set(expected)
        for sample in samples:
            assert_same(sample, expected[sample['index']])
    assert orders[0] != orders[1] != orders[2] and orders[0] != list(expected)


@pytest.mark.parametrize('world_size', [2, 3])
@pytest.mark.launches
def test_ranks_and_workers_share_a_stream_between_them(world_size, folders, stores):
    expected = map_style(stores / 'cls', folders / 'cls', 1)
    seen = []
    for rank in range(world_size):
        stream = stream_of(stores / 'cls', folders / 'cls', rank=rank, world_size=world_size)
        # Workers that stay alive hear of the epoch too.
        loader = DataLoader(stream, batch_size=8, num_workers=2, collate_fn=collate, persistent_workers=True)
        for epoch in (0, 1):
            stream.set_epoch(epoch)
            batches = list(loader)
        for batch in batches:
            seen += batch['index'].tolist()
            for number, index in enumerate(batch['index'].tolist()):
                assert_same({key: value[number] for key, value in batch.items()}, expected[index])
    assert sorted(seen) == sorted(expected)


def test_a_stream_without_a_store_shows_the_same_views(folders, stores):
    replay = open_store(stores / 'cls')[1]
    expected = map_style(stores / 'cls', folders / 'cls', 0)
    stream = load_split(str(folders / 'cls'), None, is_training=True, streaming=True)
    for sample in SparseLogitStream(stream, replay, key_column='__key__'):
        assert 'record' not in sample and torch.equal(sample['view'], expected[sample['index']]['view'])


@pytest.mark.parametrize('world_size', [1, 2])
def test_ranks_have_as_many_batches_and_go_on_from_any_of_them(world_size, folders, stores):
    for rank in range(world_size):
        stream = stream_of(stores / 'cls', folders / 'cls', rank=rank, world_size=world_size, seed=1)
        loader = StreamLoader(stream, 11, batch_size=8, collate_fn=collate)
        loader.set_epoch(1)
        whole = [batch['index'].tolist() for batch in loader]
        assert len(whole) == len(loader) == 11 and all(len(batch) == 8 for batch in whole)
        # A share that ends early starts over, in the same order.
        pass_length = ROWS // world_size // 8
        assert whole[pass_length:] == whole[:11 - pass_length]
        loader.set_epoch(1, start=4)
        assert [batch['index'].tolist() for batch in loader] == whole[4:]
        loader.set_epoch(2)
        assert [batch['index'].tolist() for batch in loader] != whole
        # Of a store of two epochs: what is read, and what comes next where anything does.
        assert loader.epochs_to_read(4) == ([0], [1])
        assert StreamLoader(stream, 11, num_epochs=5, batch_size=8).epochs_to_read(4) == ([0], [])


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.launches
def test_what_was_seen_before_a_resumption_is_not_decoded_again(workers, folders, stores, monkeypatch):
    stream = stream_of(stores / 'cls', folders / 'cls', seed=1)
    # Workers with other numbers of rows, and more batches than one pass has.
    loader = StreamLoader(stream, 14, batch_size=8, num_workers=workers, persistent_workers=workers > 0)
    loader.set_epoch(0)
    whole = [batch['index'].tolist() for batch in loader]
    decoded = []
    decode = stream.replay.decode
    monkeypatch.setattr(stream.replay, 'decode', lambda image: decoded.append(None) or decode(image))
    for start in (3, 6, 12):
        decoded.clear()
        loader.set_epoch(0, start)
        assert [batch['index'].tolist() for batch in loader] == whole[start:]
        if not workers and start == 6:
            # What is left of the first pass, and the rows for three batches of the second.
            assert ROWS - 6 * 8 < len(decoded) <= ROWS - 6 * 8 + 64
    loader.set_epoch(1)
    assert len(list(loader)) == 14


@pytest.mark.launches
def test_a_student_learns_from_a_stream_as_long_as_from_rows(folders, stores, tmp_path, capsys):
    train_distill.main([
        '--dataset', str(folders / 'cls'), '--streaming', '--val-dataset', str(folders / 'parquet'), '--val-split',
        'train', '--model', 'test_resnet', '--epochs', '4', '-b', '30', '-j', '0', '--warmup-epochs', '0', '--lr',
        '2e-3', '--logits', str(stores / 'cls'), '--output', str(tmp_path)])
    metrics = np.genfromtxt(tmp_path / 'test_resnet' / 'metrics.csv', delimiter=',', names=True)
    assert metrics['distill_loss'][-1] < metrics['distill_loss'][0] and len(metrics) == 4
    assert metrics['label_loss'].max() == 0 and '3 steps of 30 an epoch' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train_distill.main(['--dataset', str(folders / 'cls'), '--streaming'])
    assert '--streaming needs a store with keys' in capsys.readouterr().err


@pytest.mark.launches
def test_a_stream_that_is_shared_out_otherwise_after_a_resumption_is_told(folders, stores, tmp_path, capsys):
    run = tmp_path / 'run'
    argv = ['--dataset', str(folders / 'cls'), '--val-dataset', str(folders / 'parquet'), '--val-split', 'train[:10]',
            '--streaming', '--logits', str(stores / 'cls'), '--model', 'test_resnet', '--epochs', '1', '-b', '10',
            '--warmup-epochs', '0', '--recovery-interval', '4', '--output', str(tmp_path), '--experiment', 'run']
    train_distill.main([*argv, '-j', '0'])
    sorted(run.glob('checkpoint-*.pt'))[-1].unlink()
    capsys.readouterr()
    train_distill.main([*argv, '-j', '0'])
    assert 'shared out' not in capsys.readouterr().err
    sorted(run.glob('checkpoint-*.pt'))[-1].unlink()
    train_distill.main([*argv, '-j', '1'])
    assert 'a stream is shared out over another number of processes or --workers' in capsys.readouterr().err


@pytest.mark.launches
def test_a_student_learns_from_the_labels_of_a_stream_too(folders, stores, tmp_path, capsys):
    command = [
        '--dataset', str(folders / 'cls'), '--streaming', '--val-dataset', str(folders / 'parquet'), '--val-split',
        'train', '--model', 'test_resnet', '--epochs', '1', '-b', '30', '-j', '0', '--warmup-epochs', '0', '--logits',
        str(stores / 'cls'), '--alpha', '0.5', '--output', str(tmp_path), '--quiet']
    train_distill.main(command)
    metrics = np.genfromtxt(tmp_path / 'test_resnet' / 'metrics.csv', delimiter=',', names=True)
    assert metrics['label_loss'] > 0 and metrics['distill_loss'] > 0


def test_a_label_of_a_stream_that_the_student_cannot_have_is_refused(refused):
    check_label_values(np.array([0, 9]), 10, 'here')
    for labels in ([3, 10], [0, -1]):
        with refused('sample 1', f'has label {labels[1]} ', '10 classes', '--target-key'):
            check_label_values(np.array(labels), 10, 'here')


def test_a_share_smaller_than_a_batch_is_refused(folders, stores, refused):
    stream = stream_of(stores / 'cls', folders / 'cls')
    with refused('no whole batch of 91', '--batch-size'):
        list(StreamLoader(stream, 1, batch_size=91, collate_fn=collate))


# Filling from a stream


@pytest.mark.parametrize('name', ['cls', 'parquet'])
def test_a_store_filled_from_a_stream_is_the_one_filled_from_rows(name, folders, stores, teacher, tmp_path):
    key = {'cls': '__key__', 'parquet': 'name'}[name]
    fill(tmp_path / 'logits', teacher, folders / name, '--key', key, '--streaming', '-j', '1')
    assert tree(tmp_path / 'logits') == tree(stores / name)


def test_the_same_command_fills_from_a_stream_just_what_is_missing(folders, stores, teacher, tmp_path, monkeypatch):
    fill(tmp_path / 'logits', teacher, folders / 'cls', '--key', '__key__', '--streaming', '--shards', '2:3')
    assert len(list((tmp_path / 'logits').glob('epoch-*/shard-*'))) == 2
    kept = tmp_path / 'logits' / 'epoch-00001' / 'shard-00002.arrow'
    before = kept.stat().st_mtime_ns
    # The keys are known: the stream is not gone through for them again.
    monkeypatch.setattr('timm_tinyvit.teacher.creating.keyed_fingerprint', None)
    fill(tmp_path / 'logits', teacher, folders / 'cls', '--streaming')
    assert tree(tmp_path / 'logits') == tree(stores / 'cls') and kept.stat().st_mtime_ns == before


def test_rows_are_fetched_again_where_earlier_ones_are_asked_for(folders, stores):
    store, replay = open_store(stores / 'cls')
    stream = load_split(str(folders / 'cls'), None, is_training=True, streaming=True)
    data = StreamedRows(stream, replay, store)
    asked = [[(0, 40), (0, 41)], [(0, 80)], [(1, 3), (1, 4), (1, 5)], [(1, 6)]]
    expected = [list(map_style(stores / 'cls', folders / 'cls', epoch).values()) for epoch in range(2)]
    for keys, items in zip(asked, data.sampler(asked), strict=True):
        samples = data.__getitems__(items)
        for sample, (epoch, row) in zip(samples, keys, strict=True):
            assert sample['index'] == expected[epoch][row]['index']
            assert torch.equal(sample['view'], expected[epoch][row]['view'])


@pytest.mark.parametrize('name', ['cls', 'parquet'])
def test_a_stream_and_its_rows_have_the_same_fingerprint(name, folders):
    key = {'cls': '__key__', 'parquet': 'name'}[name]
    rows, stream = (load_split(str(folders / name), None, True, streaming=streaming) for streaming in (False, True))
    assert keyed_fingerprint(rows, key)[0] == keyed_fingerprint(stream, key)[0]


# What does not fit


def test_a_stream_that_does_not_fit_is_one_sentence(folders, stores, teacher, named, tmp_path, capsys, refused):
    command = [*SETTINGS, '--teacher', teacher, '--epochs', '2', '--streaming', '--dataset', folders / 'cls']
    assert 'name the column of keys with --key' in refusal([*command, '--logits', tmp_path / 'new'], capsys)
    assert "no column 'id'" in refusal([*command, '--logits', tmp_path / 'new', '--key', 'id'], capsys)
    assert 'without a slice' in refusal([*command, '--logits', stores / 'cls', '--train-split', 'train[:9]'], capsys)
    save_logits.main([*SETTINGS, '--teacher', teacher, '--epochs', '1', '--dataset', str(folders / 'cls'), '--logits',
                      str(tmp_path / 'placed')])
    with refused('by position', '--streaming'):
        stream_of(tmp_path / 'placed', folders / 'cls')
    other = write_tars(named.select([*range(40), *range(41, ROWS)]), tmp_path / 'less', 'cls')
    store, replay = open_store(stores / 'cls')
    data = StreamedRows(load_split(str(other), None, True, streaming=True), replay, store)
    with refused('row 40 of the stream has the key', repr(named[41]['name']), 'same order'):
        list(data.sampler([[(0, row) for row in range(38, 45)]]))
    with refused('row 89 of the stream is missing'):
        short = write_tars(named.select(range(ROWS - 1)), tmp_path / 'short', 'cls')
        data = StreamedRows(load_split(str(short), None, True, streaming=True), replay, store)
        list(data.sampler([[(0, 88), (0, 89)]]))


def test_changed_images_and_unknown_keys_of_a_stream_are_refused(folders, stores, named, tmp_path, refused):
    names = named['name'][:]
    renamed = named.remove_columns('name').add_column('name', [*names[:50], 'unknown', *names[51:]])
    with refused("no sample with key 'unknown'"):
        list(stream_of(stores / 'cls', write_tars(renamed, tmp_path / 'renamed', 'cls')))
    # The parquet files hold the same images under the same keys in another file format.
    with refused('other bytes', str(stores / 'cls')):
        list(stream_of(stores / 'cls', folders / 'parquet', key_column='name'))
    store, replay = open_store(stores / 'cls')
    data = StreamedRows(load_split(str(folders / 'parquet'), None, True, streaming=True).rename_column(
        'name', '__key__'), replay, store)
    with refused('other bytes', str(stores / 'cls')):
        list(map(data.__getitems__, data.sampler([[(0, 0), (0, 1)]])))


def test_a_stream_of_save_to_disk_works_too(named, stores, tmp_path):
    named.save_to_disk(str(tmp_path / 'disk'), num_shards=2)
    samples = list(stream_of(stores / 'parquet', tmp_path / 'disk'))
    assert isinstance(load_split(str(tmp_path / 'disk'), None, True, streaming=True), datasets.IterableDataset)
    assert len({sample['index'] for sample in samples}) == ROWS
    assert LogitStore.open(stores / 'parquet').manifest.key == 'name'
