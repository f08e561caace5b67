"""Stores from stores: copied out, merged and averaged, with the words of real teachers on real images."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import timm
import torch

import train_distill
from support import programs
from support.flags import SMALL_VIEWS
from support.files import flip_bit, tree
from timm_tinyvit import cli, save_logits
from timm_tinyvit.base.machine import machine_name
from timm_tinyvit.data.dataset import SparseLogitDataset, collate
from timm_tinyvit.data.fingerprint import dataset_fingerprint
from timm_tinyvit.data.opening import open_store
from timm_tinyvit.data.sampler import EpochBatchSampler
from timm_tinyvit.data.sources import load_split
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.store.ensemble import Ensemble
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.targets.sparse import ensemble_loss

SETTINGS = [*SMALL_VIEWS, '-j', '0', '--shard-size', '32', '--topk', '3', '--codec', 'float16']


@pytest.fixture(scope='module')
def teachers(tmp_path_factory):
    """Two teachers that do not agree."""
    folder = tmp_path_factory.mktemp('teachers')
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = timm.create_model('test_resnet', num_classes=10)
        export_model(folder / str(seed), model, data_config={'input_size': (3, 32, 32)})
    return [str(folder / '0'), str(folder / '1')]


@pytest.fixture(scope='module')
def data(tmp_path_factory, fashion):
    """Folders of parquet files with 120 named images: all, two parts that share 20 of them, and a mixed selection."""
    folder = tmp_path_factory.mktemp('data')
    rows = fashion.select(range(120)).add_column('name', [f'image-{number * 7919 % 1000}' for number in range(120)])
    parts = dict(
        whole=rows, first=rows.select(range(70)), second=rows.select(range(50, 120)),
        rest=rows.select(range(70, 120)), mixed=rows.select(range(60)).shuffle(seed=0))
    for name, part in parts.items():
        (folder / name).mkdir()
        part.to_parquet(str(folder / name / 'train.parquet'))
    return folder


@pytest.fixture(scope='module')
def stores(tmp_path_factory, teachers, data):
    """Of the first teacher a store by position and keyed ones of every part; of the second one by position."""
    folder = tmp_path_factory.mktemp('stores')
    for name in ('whole', 'first', 'second', 'rest'):
        fill(folder / name, teachers[0], data / name, '--key', 'name', '--epochs', '3')
    fill(folder / 'placed', teachers[0], data / 'whole', '--epochs', '3')
    fill(folder / 'longer', teachers[1], data / 'whole', '--epochs', '4', '--topk', '5', '--codec', 'compact')
    run('copy', folder / 'longer', '--output', folder / 'other', '--epochs', '1:4')
    return folder


def fill(path, teacher, data, *flags):
    save_logits.main([
        *SETTINGS, '--teacher', teacher, '--logits', str(path), '--dataset', str(data), '--train-split', 'train',
        *flags])


def run(*argv):
    cli.main(['store', *map(str, argv)])


def refusal(argv, capsys):
    return programs.refusal(lambda words: run(*words), argv, capsys)


def batch_of(path, data, epoch, positions):
    """Views and records of rows of a data set, and what its store says the teacher said of them."""
    store, replay = open_store(str(path), {})
    rows = SparseLogitDataset(load_split(str(data), None, is_training=True), replay, store)
    batch = collate(rows.__getitems__([(epoch, position) for position in positions]))
    return batch, store.codec.decode(batch['record'])


# Copies


@pytest.mark.parametrize('name', ['placed', 'whole'])
@pytest.mark.launches
def test_copied_epochs_are_the_same_files_and_train_alike(name, stores, data, teachers, tmp_path):
    run('copy', stores / name, '--output', tmp_path / 'copy', '--epochs', '1:3')
    manifest = LogitStore.open(tmp_path / 'copy').manifest
    assert manifest.stored_epochs == range(1, 3)
    assert manifest.identity == LogitStore.open(stores / name).manifest.identity
    there, here = tree(stores / name), tree(tmp_path / 'copy')
    assert {file for file in here if file.startswith('epoch')} == {
        file for file in there if file.startswith(('epoch-00001', 'epoch-00002'))}
    assert all(here[file] == there[file] for file in here if file != 'store.json')
    (expected, _), (found, _) = (
        batch_of(path, data / 'whole', 2, [5, 99, 40]) for path in (stores / name, tmp_path / 'copy'))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    # Training takes its epochs in turn.
    sampler = EpochBatchSampler(120, 50, seed=0, store_epochs=manifest.stored_epochs)
    seen = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        seen.append(next(iter(sampler))[0][0])
    assert seen == [1, 2, 1, 2, 1]


def test_a_copy_is_completed_by_the_same_command_and_goes_on_growing(stores, data, teachers, tmp_path, capsys):
    run('copy', stores / 'placed', '--output', tmp_path / 'copy', '--epochs', '1:2')
    whole = tree(tmp_path / 'copy')
    (tmp_path / 'copy' / 'epoch-00001' / 'shard-00001.arrow').unlink()
    run('copy', stores / 'placed', '--output', tmp_path / 'copy', '--epochs', '1:2')
    assert tree(tmp_path / 'copy') == whole
    # The teacher adds the next epoch, and makes again what is lost.
    (tmp_path / 'copy' / 'epoch-00001' / 'shard-00002.arrow').unlink()
    fill(tmp_path / 'copy', teachers[0], data / 'whole', '--epochs', '1:3')
    grown, there = tree(tmp_path / 'copy'), tree(stores / 'placed')
    assert all(grown[file] == there[file] for file in there if file.startswith(('epoch-00001', 'epoch-00002')))
    assert LogitStore.open(tmp_path / 'copy').manifest.stored_epochs == range(1, 3)
    # It has no place for the epochs that were left out.
    fill(tmp_path / 'copy', teachers[0], data / 'whole', '--epochs', '3')
    assert tree(tmp_path / 'copy') == grown


@pytest.mark.parametrize('name, flags', [
    ('whole', []), ('whole', ['--dataset', 'mixed']), ('placed', ['--samples', '20:80', '--dataset', 'whole'])])
def test_more_epochs_copied_into_a_copy_belong_to_it(name, flags, stores, data, tmp_path, capsys):
    flags = [data / flag if flag in ('mixed', 'whole') else flag for flag in flags]
    run('copy', stores / name, '--output', tmp_path / 'copy', '--epochs', '1:2', *flags)
    run('copy', stores / name, '--output', tmp_path / 'copy', '--epochs', '2:3', *flags)
    run('copy', stores / name, '--output', tmp_path / 'at once', '--epochs', '1:3', *flags)
    assert tree(tmp_path / 'copy') == tree(tmp_path / 'at once')
    said = refusal(['copy', stores / name, '--output', tmp_path / 'copy', '--epochs', '0:1', *flags], capsys)
    assert 'begins at epoch 1' in said
    assert tree(tmp_path / 'copy') == tree(tmp_path / 'at once')


def test_a_copied_range_shows_the_views_and_records_of_the_whole(stores, data, teachers, fashion, tmp_path):
    run('copy', stores / 'placed', '--output', tmp_path / 'copy', '--samples', '30:90', '--epochs', '1:3',
        '--dataset', data / 'whole')
    (tmp_path / 'slice').mkdir()
    part = load_split(str(data / 'whole'), 'train[30:90]', is_training=True)
    part.to_parquet(str(tmp_path / 'slice' / 'train.parquet'))
    expected, _ = batch_of(stores / 'placed', data / 'whole', 2, [30, 61, 62, 89])
    found, _ = batch_of(tmp_path / 'copy', tmp_path / 'slice', 2, [0, 31, 32, 59])
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert found['index'].tolist() == [30, 61, 62, 89]
    # The teacher makes a lost shard again, of the same views, and a copy of the copy counts from the first sample.
    before = tree(tmp_path / 'copy')
    (tmp_path / 'copy' / 'epoch-00002' / 'shard-00001.arrow').unlink()
    fill(tmp_path / 'copy', teachers[0], tmp_path / 'slice', '--epochs', '1:3')
    assert tree(tmp_path / 'copy') == before
    run('copy', tmp_path / 'copy', '--output', tmp_path / 'less', '--samples', '10:20', '--dataset',
        tmp_path / 'slice')
    assert LogitStore.open(tmp_path / 'less').manifest.first_sample == 40


def test_the_keys_of_a_part_copied_out_give_the_store_of_that_part(stores, data, teachers, tmp_path):
    run('copy', stores / 'whole', '--output', tmp_path / 'copy', '--dataset', data / 'mixed')
    fill(tmp_path / 'made', teachers[0], data / 'mixed', '--key', 'name', '--epochs', '3')
    made, copied = tree(tmp_path / 'made'), tree(tmp_path / 'copy')
    # The teacher's sums depend a little on who else is in its batch.
    assert made['store.json'] == copied['store.json'] and made['keys.arrow'] == copied['keys.arrow']
    (expected, words), (found, same) = (
        batch_of(tmp_path / name, data / 'mixed', 1, range(60)) for name in ('made', 'copy'))
    assert torch.equal(found['view'], expected['view']) and torch.equal(found['index'], expected['index'])
    assert torch.equal(words.ids, same.ids) and torch.allclose(words.log_probs, same.log_probs, atol=2e-3)


def test_damage_is_not_copied(stores, tmp_path, capsys):
    shutil.copytree(stores / 'placed', tmp_path / 'damaged')
    file = tmp_path / 'damaged' / 'epoch-00001' / 'shard-00002.arrow'
    flip_bit(file)
    said = refusal(['copy', tmp_path / 'damaged', '--output', tmp_path / 'copy'], capsys)
    assert str(file) in said and 'damaged' in said
    assert not (tmp_path / 'copy' / 'epoch-00001' / 'shard-00002.arrow').exists()


# Merging


def test_shards_of_one_store_filled_in_two_places_come_together(stores, tmp_path):
    for name, others in (('left', ['epoch-00000/shard-00001', 'epoch-00002/shard-00000']),
                         ('right', ['epoch-00000/shard-00000', 'epoch-00001/shard-00003'])):
        shutil.copytree(stores / 'placed', tmp_path / name)
        for shard in others:
            (tmp_path / name / f'{shard}.arrow').unlink()
    run('merge', tmp_path / 'left', tmp_path / 'right', '--output', tmp_path / 'merged')
    assert tree(tmp_path / 'merged') == tree(stores / 'placed')
    # Into a store that is there, from copies of single epochs.
    run('copy', stores / 'placed', '--output', tmp_path / 'begun', '--epochs', '0:1')
    run('copy', stores / 'placed', '--output', tmp_path / 'last', '--epochs', '2:3')
    run('merge', tmp_path / 'last', tmp_path / 'left', '--output', tmp_path / 'begun')
    assert tree(tmp_path / 'begun') == tree(stores / 'placed')


def test_keyed_stores_of_two_parts_unite_to_the_store_of_the_whole(stores, data, tmp_path, capsys):
    run('merge', stores / 'first', stores / 'rest', '--output', tmp_path / 'merged')
    merged, whole = LogitStore.open(tmp_path / 'merged'), LogitStore.open(stores / 'whole')
    assert merged.manifest == whole.manifest
    assert (tmp_path / 'merged' / 'keys.arrow').read_bytes() == (stores / 'whole' / 'keys.arrow').read_bytes()
    assert 'more than one' not in capsys.readouterr().out
    # Each part kept the words that it had.
    for part, rows in (('first', range(70)), ('rest', range(70, 120))):
        found, _ = batch_of(tmp_path / 'merged', data / 'whole', 2, rows)
        expected, _ = batch_of(stores / part, data / part, 2, range(len(rows)))
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_sample_of_two_stores_is_the_first_ones(stores, data, tmp_path, capsys):
    run('merge', stores / 'second', stores / 'first', '--output', tmp_path / 'merged')
    assert '20 samples are in more than one store' in capsys.readouterr().out
    manifest = LogitStore.open(tmp_path / 'merged').manifest
    assert manifest.num_samples == 120 and len(manifest.dataset['samples']) == 120
    found, _ = batch_of(tmp_path / 'merged', data / 'whole', 0, range(50, 120))
    expected, _ = batch_of(stores / 'second', data / 'second', 0, range(70))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    run('verify', tmp_path / 'merged')


def test_stores_that_do_not_fit_together_are_refused_in_one_sentence(stores, data, teachers, tmp_path, capsys):
    new = tmp_path / 'new'
    cases = [
        (['merge', stores / 'placed', stores / 'other', '--output', new], 'do not fit together'),
        (['merge', stores / 'placed', stores / 'whole', '--output', new], 'do not fit together'),
        (['merge', tmp_path, '--output', new], 'there is no logit store'),
        (['merge', stores / 'placed', '--output', stores / 'other'], 'is a store of something else'),
        (['copy', stores / 'placed', '--output', new, '--epochs', '2:5'], 'meant to hold 0:3; fix --epochs'),
        (['copy', stores / 'placed', '--output', new, '--samples', '0:9'], '--samples needs --dataset'),
        (['copy', stores / 'placed', '--output', new, '--samples', '0:900', '--dataset', data / 'whole'],
         'only samples 0:120'),
        (['copy', stores / 'placed', '--output', new, '--samples', '0:9', '--dataset', data / 'first'],
         'not the data set'),
        (['copy', stores / 'placed', '--output', new, '--dataset', data / 'first'], 'have no keys'),
        (['copy', stores / 'whole', '--output', new, '--samples', '0:9', '--dataset', data / 'whole'],
         'have keys; leave --samples out'),
        (['copy', stores / 'rest', '--output', new, '--dataset', data / 'first'], 'has no sample with key'),
    ]
    for argv, words in cases:
        assert words in refusal(argv, capsys), argv
    assert not new.exists()


# Ensembles


@pytest.mark.parametrize('temperature', [1., 3.])
def test_two_teachers_teach_what_their_average_would(temperature, stores, data):
    opened = [open_store(str(stores / name), {})[0] for name in ('placed', 'other')]
    ensemble = Ensemble(opened)
    assert ensemble.manifest.stored_epochs == range(1, 3)
    replay = open_store(str(stores / 'placed'), {})[1]
    rows = load_split(str(data / 'whole'), None, is_training=True)
    keys = [(1, 4), (2, 119), (2, 33), (1, 40)]
    batch = collate(SparseLogitDataset(rows, replay, ensemble).__getitems__(keys))
    targets = ensemble.codec.decode(batch['record'])
    # Each one's dense target at the temperature, averaged, and the cross-entropy as it is written in books.
    dense = torch.stack([
        batch_of(stores / name, data / 'whole', epoch, [row])[1].densify(temperature)[0]
        for name in ('placed', 'other') for epoch, row in keys]).view(2, 4, 10).mean(dim=0)
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = -(dense * (logits / temperature).log_softmax(dim=1)).sum(dim=1).mean()
    found = ensemble_loss(logits, targets, temperature)
    assert torch.allclose(found, expected, atol=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-7)
    assert torch.equal(ensemble_loss(logits, targets[0], temperature), ensemble_loss(logits, targets[:1], temperature))


def test_stores_with_keys_are_read_side_by_side_in_any_order_of_the_data(stores, data):
    store, replay = open_store(str(stores / 'whole'), {})
    rows = load_split(str(data / 'mixed'), None, is_training=True)
    keys = [(0, 5), (2, 59), (1, 0)]
    one = collate(SparseLogitDataset(rows, replay, store).__getitems__(keys))
    two = collate(SparseLogitDataset(rows, replay, Ensemble([store, store])).__getitems__(keys))
    assert torch.equal(two['view'], one['view'])
    assert torch.equal(two['record'], torch.cat([one['record'], one['record']], dim=1))


@pytest.mark.launches
def test_a_student_trains_from_two_stores(stores, data, tmp_path, capsys):
    looks = dataset_fingerprint.cache_info().misses
    train_distill.main([
        '--dataset', str(data / 'whole'), '--val-split', 'train', '--model', 'test_resnet', '--epochs', '4',
        '--warmup-epochs', '0', '-b', '40', '-j', '0', '--output', str(tmp_path), '--logits',
        str(stores / 'placed'), str(stores / 'other'), '--lr', '2e-3'])
    losses = np.genfromtxt(tmp_path / 'test_resnet' / 'metrics.csv', delimiter=',', names=True)['distill_loss']
    assert len(losses) == 4 and np.isfinite(losses).all() and losses[-1] < losses[0]
    assert 'the store has 2 epochs for 4' in capsys.readouterr().out
    # All labels are read once, for the store and for the run; those of the evaluation split for its report.
    assert dataset_fingerprint.cache_info().misses == looks + 2


def test_an_ensemble_of_other_views_or_without_a_common_epoch_is_refused(stores, tmp_path, refused):
    opened = {name: LogitStore.open(stores / name) for name in ('placed', 'other', 'whole')}
    with refused('not of the same views', 'key, dataset'):
        Ensemble([opened['placed'], opened['whole']])
    run('copy', stores / 'placed', '--output', tmp_path / 'first', '--epochs', '0:1')
    with refused('no epoch in common'):
        Ensemble([LogitStore.open(tmp_path / 'first'), opened['other']])


# What killed commands leave


@pytest.mark.parametrize('command', ['copy', 'copy of samples', 'merge', 'fill'])
def test_what_a_killed_command_left_goes_with_the_next_one(command, stores, data, teachers, tmp_path):
    ended = subprocess.Popen(['true'])
    ended.wait()
    target = tmp_path / 'target'
    commands = {
        'copy': lambda: run('copy', stores / 'placed', '--output', target),
        'copy of samples': lambda: run('copy', stores / 'placed', '--output', target, '--samples', '0:64', '--dataset',
                                       data / 'whole', '--train-split', 'train'),
        'merge': lambda: run('merge', stores / 'first', stores / 'rest', '--output', target),
        'fill': lambda: fill(target, teachers[0], data / 'whole', '--epochs', '2')}
    commands[command]()
    whole = tree(target)
    (target / 'epoch-00001' / 'shard-00000.arrow').unlink()
    for name in ('.store.json', '.keys.arrow', 'epoch-00000/.shard-00001.arrow', 'epoch-00001/.shard-00000.arrow'):
        (target / f'{name}.{machine_name()}.{ended.pid}.tmp').write_bytes(b'half a file')
    owner = json.dumps(dict(machine=machine_name(), pid=ended.pid, started='1', host='here', token='a', heartbeat=1))
    for name in ('.store.json', 'epoch-00000/.shard-00001.arrow', 'epoch-00001/.shard-00000.arrow'):
        (target / f'{name}.lease').write_text(owner)
    commands[command]()
    assert tree(target) == whole


def test_stores_of_the_same_weights_and_other_outputs_are_not_merged(stores, tmp_path, capsys):
    shutil.copytree(stores / 'placed', tmp_path / 'other')
    manifest = json.loads((tmp_path / 'other' / 'store.json').read_text())
    probe = manifest['teacher']['probe']
    near, far = ([[value + shift * (row == 0) for value in row_values] for row, row_values in enumerate(probe)]
                 for shift in (1e-5, 1.))
    for values, is_merged in ((near, True), (far, False)):
        manifest['teacher']['probe'] = values
        (tmp_path / 'other' / 'store.json').write_text(json.dumps(manifest))
        merge = ['merge', stores / 'placed', tmp_path / 'other', '--output', tmp_path / str(is_merged)]
        if is_merged:
            run(*merge)
        else:
            assert 'teacher outputs' in refusal(merge, capsys)
            assert not (tmp_path / str(is_merged)).exists()
