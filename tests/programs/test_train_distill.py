"""The training script on real images: what it leaves behind, that it resumes exactly, and what bad input gets."""

import csv
import functools
import json
import os
import shutil
import subprocess
import weakref
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.utils import dispatch_clip_grad

import train_distill
from support import programs
from support.files import flip_bit
from support.flags import DATA, ROOT, SMALL_TINY_VIT, SMALL_VIEWS
from support.launches import free_port
from timm_tinyvit.base.launch import create_accelerator
from timm_tinyvit.base.machine import machine_name
from timm_tinyvit.data.sources import load_split
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.train import batches, sharding
from timm_tinyvit.train.optimization import clip_gradients

VIEWS = [*SMALL_VIEWS, '--reprob', '0.25']
SPLITS = ['--train-split', 'train[:96]', '--val-split', 'test[:64]']
SMALL = [
    '--dataset', DATA, *VIEWS, *SPLITS, '--model', 'tiny_vit_5m_224', '--model-kwargs', *SMALL_TINY_VIT, '--epochs',
    '2', '-b', '16', '--lr', '1e-3', '--warmup-epochs', '1', '--drop-path', '0.2', '-j', '0', '--crop-pct', '1']
OTHER = ['--model', 'test_resnet', '--model-kwargs']
message_of = functools.partial(programs.refusal, train_distill.main)


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """As many threads as the launched processes have: rounding depends on how a sum is split."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def distilled(tmp_path_factory, teacher):
    """A finished run that filled its own store: (folder of the run, folder of the store)."""
    output = tmp_path_factory.mktemp('distilled')
    store = output / 'logits'
    train_distill.main([
        *SMALL, '--teacher', teacher, '--logits', str(store), '--topk', '3', '--shard-size', '40',
        '--output', str(output), '--experiment', 'run', '--recovery-interval', '2'])
    return output / 'run', store


def test_the_arguments_of_a_run_are_a_recipe_for_the_same_run(distilled, tmp_path):
    run, store = distilled
    before = train_distill.settings(['--config', str(run / 'run.json')])
    assert before.logits == [str(store)] and before.scale == [0.6, 1.0] and before.config
    assert vars(train_distill.settings(['--config', str(run / 'run.json'), '--lr', '0.1'])) == {
        **vars(before), 'lr': 0.1}
    (tmp_path / 'pairs.yaml').write_text('dataset: x\nmodel_kwargs: {img_size: 32, depths: [1, 1]}\nlog: []\n')
    args = train_distill.settings(['--config', str(tmp_path / 'pairs.yaml'), '--amp'])
    assert args.model_kwargs == {'img_size': 32, 'depths': [1, 1]} and args.amp_dtype == 'float16'


def test_what_a_run_learns_from_is_said_and_flags_that_do_nothing_are_told(distilled, tmp_path, capsys):
    _, store = distilled
    small = [*SMALL, '--train-split', 'train[:32]', '--epochs', '1', '--warmup-epochs', '0', '--output', str(tmp_path)]
    train_distill.main([*small, '--experiment', 'plain', '--alpha', '0.5', '--temperature', '2', '--min-lr', '0.1'])
    said = capsys.readouterr()
    assert 'learning from labels\n' in said.out
    assert 'from labels alone, and --alpha, --temperature changes nothing' in said.err
    assert '--min-lr is 0.1 and above the learning rate of 0.001' in said.err
    here = [*SMALL, '--epochs', '1', '--warmup-epochs', '0', '--output', tmp_path, '--logits', store]
    for flags, words in ((['--topk', '100'], '--topk 3, and 100'), (['--codec', 'float16'], '--codec compact, and'),
                         (['--store-seed', '5'], '--store-seed 0')):
        assert words in message_of([*here, *flags], capsys)
    train_distill.main([str(word) for word in (*here, '--topk', '3', '--alpha', '0.5', '--experiment', 'both')])
    assert f'learning from the store {store} and labels\n' in capsys.readouterr().out


def test_a_run_that_goes_on_has_a_report_now_and_then(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(train_distill, 'write_run_report', lambda folder: made.append(
        len((folder / 'metrics.csv').read_text().splitlines()) - 1))
    small = [*SMALL, '--train-split', 'train[:32]', '--epochs', '4', '--val-interval', '2']
    train_distill.main([*small, '--output', str(tmp_path / 'quick')])
    assert made == [4]
    monkeypatch.setattr(train_distill, 'REPORT_SECONDS', 0)
    train_distill.main([*small, '--output', str(tmp_path / 'long')])
    assert made == [4, 2, 4, 4]


def test_what_a_killed_writer_left_in_the_folder_goes(distilled, tmp_path):
    ended = subprocess.Popen(['true'])
    ended.wait()
    left = tmp_path / 'run' / f'.checkpoint-000000-000000000016.pt.{machine_name()}.{ended.pid}.tmp'
    left.parent.mkdir()
    left.write_bytes(b'half a checkpoint')
    train_distill.main([*SMALL, '--train-split', 'train[:32]', '--epochs', '1', '--warmup-epochs', '0', '--output',
                        str(tmp_path), '--experiment', 'run', '--layer-decay', '0.5', '--sched', 'constant'])
    assert not left.exists()
    # The rate that was asked for, and not that of the first layers.
    assert float(next(csv.DictReader(open(tmp_path / 'run' / 'metrics.csv')))['lr']) == pytest.approx(1e-3)


def test_a_run_leaves_its_arguments_metrics_plot_and_models(distilled):
    run, _ = distilled
    assert json.loads((run / 'run.json').read_text())['flags']['lr'] == 1e-3
    rows = list(csv.DictReader(open(run / 'metrics.csv')))
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert all(float(row['distill_loss']) > 0 and float(row['images_per_second']) > 0 for row in rows)
    assert all(0 <= float(row['eval_top1']) <= 100 for row in rows)
    assert (run / 'metrics.png').read_bytes().startswith(b'\x89PNG')
    for name in ('last', 'best'):
        assert {file.name for file in (run / name).iterdir()} == {'model.safetensors', 'config.json'}


def test_plain_timm_loads_what_a_run_exports_with_the_same_logits(distilled, logits_in_plain_timm):
    run, _ = distilled
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    model = timm.create_model(f'local-dir:{run}/last', pretrained=True).eval()
    assert type(model).__module__ == 'timm_tinyvit.models.tiny_vit'
    with torch.no_grad():
        logits = model(images)
    assert (logits - logits_in_plain_timm(run / 'last', images)).abs().max() <= 1e-4 * logits.abs().max()


def test_the_student_learns_from_the_records_and_not_from_the_labels(distilled, tmp_path, teacher):
    """With alpha 1 the labels have no hand in the weights; with alpha 0.5 they have."""
    run, store = distilled
    flags = [*SMALL, '--logits', str(store), '--output', str(tmp_path)]
    train_distill.main([*flags, '--smoothing', '0', '--experiment', 'other-smoothing'])
    train_distill.main([*flags, '--alpha', '0.5', '--temperature', '2', '--experiment', 'half'])
    weights = [load_file(folder / 'last' / 'model.safetensors')
               for folder in (run, tmp_path / 'other-smoothing', tmp_path / 'half')]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    row = next(csv.DictReader(open(tmp_path / 'half' / 'metrics.csv')))
    mixed = 0.5 * float(row['label_loss']) + 0.5 * 4 * float(row['distill_loss'])
    assert float(row['loss']) == pytest.approx(mixed, rel=1e-5)


def test_without_logits_it_is_a_plain_trainer(tmp_path):
    train_distill.main([*SMALL, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'plain', '--model',
                        'test_vit', '--model-kwargs', 'img_size=32'])
    row = next(csv.DictReader(open(tmp_path / 'plain' / 'metrics.csv')))
    assert float(row['distill_loss']) == 0 and float(row['loss']) == float(row['label_loss']) > 0


def test_two_processes_fill_the_same_store_and_train_together(distilled, teacher, hub_children, tmp_path):
    """Under accelerate's own launcher, on the CPU."""
    said = hub_children.run([
        '-m', 'accelerate.commands.accelerate_cli', 'launch', '--multi_gpu', '--num_processes', '2', '--num_machines',
        '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', str(free_port()),
        ROOT / 'train_distill.py', *SMALL, '--teacher', teacher, '--logits', tmp_path / 'logits', '--topk', '3',
        '--shard-size', '40', '--output', tmp_path, '--experiment', 'run', '-b', '8',
    ], os.environ | {'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}, timeout=300).stdout
    assert '6 steps of 16 an epoch, learning rate 0.001, 2 process(es) on cpu' in said
    assert said.count('finished:') == 1
    one, two = (sorted(file for file in folder.rglob('*') if file.is_file())
                for folder in (distilled[1], tmp_path / 'logits'))
    # Manifest, two epochs of three shards, and the digests of the images.
    assert [file.name for file in one] == [file.name for file in two] and len(one) == 1 + 2 * 3 + 3
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two))


def test_a_run_with_several_views_of_an_image_in_a_batch_sees_each_view_once_and_learns(distilled, tmp_path):
    seen = []

    class Spy(batches.SparseLogitDataset):
        def __getitems__(self, keys):
            seen.extend(keys)
            return super().__getitems__(keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, 'SparseLogitDataset', Spy)
        train_distill.main([
            *SMALL, '--logits', str(distilled[1]), '--views-per-image', '2', '--output', str(tmp_path)])
    # What comes after is the comparison with the teacher.
    seen = seen[:2 * 96]
    assert sorted(seen) == [(epoch, index) for epoch in range(2) for index in range(96)]
    assert all(seen[place][1] == seen[place + 1][1] for place in range(0, len(seen), 2))


def test_labels_may_be_plain_integers(tmp_path):
    rows = load_split(DATA, 'train[:64]', is_training=True).cast_column('label', datasets.Value('int64'))
    datasets.DatasetDict(train=rows, validation=rows.select(range(20))).save_to_disk(tmp_path / 'data')
    train_distill.main([
        '--dataset', str(tmp_path / 'data'), *VIEWS, '--model', 'test_resnet', '--num-classes', '10', '--epochs', '1',
        '-b', '16', '-j', '0', '--output', str(tmp_path), '--experiment', 'run'])
    run = json.loads((tmp_path / 'run' / 'run.json').read_text())
    assert (run['val']['split'], run['val']['images'], run['val']['imagenet1k_of_22k']) == ('validation', 20, False)


def test_of_a_sharded_model_one_whole_copy_is_there_at_a_time(tmp_path, monkeypatch):
    prepare, copies, most = sharding.prepare_student, [], []

    def whole_model(model):
        copied = deepcopy(model)
        copies.append(weakref.ref(copied))
        most.append(sum(found() is not None for found in copies))
        return copied

    monkeypatch.setattr('timm_tinyvit.train.task.prepare_student', lambda *args: (*prepare(*args)[:2], whole_model))
    train_distill.main([*SMALL, *OTHER, '--model-ema', '--output', str(tmp_path)])
    assert most == [1] * 4


def test_a_precision_of_the_launch_and_one_that_a_cpu_lacks_are_told(monkeypatch, capsys):
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1 << 16)
    AcceleratorState._reset_state(True)
    create_accelerator('bfloat16')
    assert 'mixed precision' not in capsys.readouterr().err
    AcceleratorState._reset_state(True)
    create_accelerator('float16')
    said = capsys.readouterr().err
    assert 'asks for mixed precision bf16; --amp-dtype wins' in said and '--teacher-amp-dtype' in said
    assert 'float16 needs a GPU' in said or torch.accelerator.is_available()
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize('name, value, flag, given', [
    ('GRADIENT_ACCUMULATION_STEPS', '4', '--grad-accum-steps', '4'),
    ('MIXED_PRECISION', 'bf16', '--amp-dtype', 'bfloat16')])
def test_what_accelerate_is_configured_to_is_followed_where_no_flag_says_it(
        name, value, flag, given, tmp_path, monkeypatch, capsys):
    small = [*SMALL, '-b', '8', '--model', 'test_vit', '--model-kwargs', 'img_size=32', '--epochs', '1',
             '--warmup-epochs', '0', '--output', str(tmp_path)]

    def run(experiment, *flags):
        AcceleratorState._reset_state(True)
        train_distill.main([*small, '--experiment', experiment, *flags])
        weights = load_file(tmp_path / experiment / 'last' / 'model.safetensors')
        return capsys.readouterr(), weights, json.loads((tmp_path / experiment / 'run.json').read_text())

    *_, by_flag, flags = run('flag', flag, given)
    _, plain, _ = run('plain')
    monkeypatch.setenv(f'ACCELERATE_{name}', value)
    said, by_launch, record = run('launch')
    line = f'{flag} {given}, as accelerate is configured'
    assert said.out.startswith(line) and by_launch.keys() == by_flag.keys()
    assert all(torch.equal(by_launch[name], by_flag[name]) for name in by_flag)
    assert any(not torch.equal(plain[name], by_flag[name]) for name in by_flag)
    # The record is that of the flag: elsewhere accelerate may be configured otherwise.
    assert [record[key] for key in ('changed', 'recipe')] == [flags[key] for key in ('changed', 'recipe')]
    assert {**record['flags'], 'experiment': 'flag'} == flags['flags']
    # A flag wins, one of a recipe too.
    (tmp_path / 'recipe.yaml').write_text('grad-accum-steps: 2\namp-dtype: float16\n')
    said, *_ = run('recipe', '--config', str(tmp_path / 'recipe.yaml'))
    won = {'--grad-accum-steps': '2', '--amp-dtype': 'float16'}[flag]
    assert f'{flag} {won} wins over {given}, which accelerate is configured to' in said.err and line not in said.out
    monkeypatch.delenv(f'ACCELERATE_{name}')
    AcceleratorState._reset_state(True)
    assert f'{flag} was ' in message_of([*small, '--experiment', 'launch'], capsys)


@pytest.mark.skipif(torch.accelerator.is_available(), reason='the cores are not what computes')
def test_what_the_launcher_does_not_do_is_told(monkeypatch, capsys):
    """It leaves cores idle, and does not wait for a single process."""
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(8))
    idle = '1 of 8 CPU cores are used; give accelerate launch --num_cpu_threads_per_process 8'
    alone = 'accelerate launch does not wait for a single process'
    for launched, threads, said in ((True, 1, [alone, idle]), (True, 8, [alone]), (False, 1, [])):
        monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)  # noqa: B023
        if launched:
            monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'no')
        else:
            monkeypatch.delenv('ACCELERATE_MIXED_PRECISION')
        AcceleratorState._reset_state(True)
        create_accelerator()
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == len(said) and all(text in line for text, line in zip(said, lines))
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize('model', ['tiny_vit_5m_224', 'test_resnet', 'test_vit'])
def test_gradient_checkpointing_trains_the_same_weights_and_statistics(model, tmp_path):
    flags = [*SMALL, '--train-split', 'train[:48]', '--model', model, '--drop', '0.2', '--model-kwargs', *(
        {'test_vit': ['img_size=32'], 'tiny_vit_5m_224': SMALL_TINY_VIT}.get(model, [])), '--output', str(tmp_path)]
    train_distill.main([*flags, '--experiment', 'plain'])
    train_distill.main([*flags, '--experiment', 'again', '--grad-checkpointing'])
    plain, again = (load_file(tmp_path / name / 'last' / 'model.safetensors') for name in ('plain', 'again'))
    assert plain.keys() == again.keys()
    for name in plain:
        assert torch.allclose(plain[name], again[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize('smoothing', ['0.1', '0'])
@pytest.mark.parametrize('mixup', [[], ['--mixup', '0.8']], ids=['plain', 'mixed'])
def test_the_binary_cross_entropy_of_labels_is_timms(smoothing, mixup):
    args = train_distill.settings([
        *SMALL, *mixup, '--smoothing', smoothing, '--bce-loss', '--bce-sum', '--bce-target-thresh', '0.2'])
    model, labels = timm.create_model('test_resnet', num_classes=10), torch.arange(8) % 10
    evaluator, classes = SimpleNamespace(normalize=None), SimpleNamespace(num=10)
    task = train_distill.create_task(args, model, None, evaluator, classes, Accelerator(cpu=True))
    views = torch.rand(8, 3, 32, 32)
    numpy.random.seed(0)
    found = task(views, {'label': labels})
    targets = labels
    if mixup:
        numpy.random.seed(0)
        _, targets = Mixup(0.8, label_smoothing=float(smoothing), num_classes=10)(views, labels)
    expected = BinaryCrossEntropy(float(smoothing), target_threshold=0.2, sum_classes=True)(found['output'], targets)
    assert torch.allclose(found['label_loss'], expected) and torch.equal(found['loss'], found['label_loss'])


def test_epochs_that_are_all_warm_up_are_told(tmp_path, capsys):
    flags = [*SMALL, *OTHER, '--output', str(tmp_path)]
    train_distill.main([*flags, '--epochs', '1', '--warmup-epochs', '1'])
    assert 'all of 1 epochs are warm-up' in capsys.readouterr().err


def test_cooldown_epochs_are_filled_too(teacher, tmp_path):
    train_distill.main([
        *SMALL, *OTHER, '--epochs', '1', '--warmup-epochs', '0', '--cooldown-epochs', '1',
        '--teacher', teacher, '--logits', str(tmp_path / 'logits'), '--output', str(tmp_path)])
    assert LogitStore.open(tmp_path / 'logits').manifest.epochs == 2


def test_a_finished_run_says_so_and_keeps_its_model(distilled, capsys):
    run, store = distilled
    before = (run / 'last' / 'model.safetensors').read_bytes()
    train_distill.main([
        *SMALL, '--logits', str(store), '--topk', '3', '--shard-size', '40', '--output', str(run.parent),
        '--experiment', 'run'])
    said = capsys.readouterr().out
    assert f'{run} is finished: nothing is left to train' in said and 'resuming' not in said
    assert (run / 'last' / 'model.safetensors').read_bytes() == before


def test_names_of_classes_come_from_the_split_that_has_those_of_the_teacher(distilled, tmp_path):
    """Training images are of classes of their own, as of a folder, or of none."""
    rows = load_split(DATA, 'train[:96]', is_training=True)
    other = rows.cast_column('label', datasets.ClassLabel(names=[f'thing {number}' for number in range(10)] + ['more']))
    datasets.DatasetDict(train=other).save_to_disk(tmp_path / 'other')
    _, store = distilled
    train_distill.main([
        *SMALL, '--dataset', str(tmp_path / 'other'), '--val-dataset', DATA, '--logits', str(store), '--epochs', '1',
        '--warmup-epochs', '0', '--output', str(tmp_path), '--experiment', 'run'])
    config = json.loads((tmp_path / 'run' / 'best' / 'config.json').read_text())
    assert config['label_names'] == rows.features['label'].names


def test_a_run_of_other_settings_is_not_resumed(distilled, capsys):
    run, store = distilled
    said = message_of(
        [*SMALL, '--logits', store, '--output', run.parent, '--experiment', 'run', '--lr', '0.5'], capsys)
    assert '--lr was 0.001 and is 0.5' in said and '--experiment' in said
    said = message_of([
        *SMALL, '--topk', '3', '--shard-size', '40', '--mixup-mode', 'pair', '--train-split', 'train[1:97]', '--output',
        run.parent, '--experiment', 'run'], capsys)
    assert '(--train-split was' in said
    assert 'other images or labels in --dataset, another store, or none, in --logits); give the same ones' in said


def test_a_damaged_checkpoint_is_named(distilled, tmp_path, capsys):
    run, store = distilled
    shutil.copytree(run, tmp_path / 'run')
    last = sorted((tmp_path / 'run').glob('checkpoint-*.pt'))[-1]
    last.write_bytes(last.read_bytes()[:1000])
    said = message_of([*SMALL, '--logits', store, '--output', tmp_path, '--experiment', 'run'], capsys)
    assert last.name in said and 'delete it' in said


def losses_and_weights(tmp_path, name, *argv):
    """A short run of a model without batch norm or dropout: (its rows of metrics, its weights)."""
    train_distill.main([
        *SMALL, '--model', 'test_vit', '--model-kwargs', 'img_size=32', '--drop-path', '0', '--output', str(tmp_path),
        '--experiment', name, *argv])
    rows = list(csv.DictReader(open(tmp_path / name / 'metrics.csv')))
    return rows, load_file(tmp_path / name / 'last' / 'model.safetensors')


def largest_difference(one, two):
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    return losses_and_weights(tmp_path_factory.mktemp('plain'), 'plain')


def test_accumulated_batches_are_one_larger_batch(plain, tmp_path):
    rows, weights = losses_and_weights(tmp_path, 'parts', '-b', '4', '--grad-accum-steps', '4')
    assert largest_difference(weights, plain[1]) < 1e-4
    for row, other in zip(rows, plain[0]):
        for key in ('loss', 'grad_norm', 'lr', 'eval_loss'):
            assert float(row[key]) == pytest.approx(float(other[key]), rel=1e-4)


@pytest.mark.parametrize('flags, tolerance', [
    (['--compile', 'eager'], 1e-5), (['--channels-last'], 1e-4), (['--amp-dtype', 'bfloat16'], 2e-2),
], ids=['compile', 'channels-last', 'bfloat16'])
def test_faster_ways_to_the_same_weights(plain, tmp_path, flags, tolerance):
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        _, weights = losses_and_weights(tmp_path, 'fast', *flags)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert largest_difference(weights, plain[1]) < tolerance
    assert 'bfloat16' not in flags or largest_difference(weights, plain[1]) > 0


def test_averaged_weights_start_as_a_copy_and_follow(plain, tmp_path):
    """Decay 0 forgets at once; timm's warm-up forgets faster than the decay alone."""
    _, forgetful = losses_and_weights(tmp_path, 'forgetful', '--model-ema', '--model-ema-decay', '0')
    assert largest_difference(forgetful, load_file(tmp_path / 'forgetful' / 'last_ema' / 'model.safetensors')) == 0
    assert largest_difference(forgetful, plain[1]) == 0
    gaps = {}
    for name, flags in (('slow', []), ('warm', ['--model-ema-warmup'])):
        rows, weights = losses_and_weights(tmp_path, name, '--model-ema', *flags)
        averaged = load_file(tmp_path / name / 'last_ema' / 'model.safetensors')
        gaps[name] = largest_difference(weights, averaged)
        assert rows[-1]['eval_loss_ema'] != rows[-1]['eval_loss']
    assert 0 < gaps['warm'] < gaps['slow']


@pytest.mark.parametrize('mode', ['norm', 'value', 'agc'])
def test_clipping_is_timms_and_the_norm_is_the_one_before_it(mode):
    torch.manual_seed(0)
    one, two = (timm.create_model('test_vit', num_classes=4, img_size=32) for _ in range(2))
    two.load_state_dict(one.state_dict())
    for model in (one, two):
        model(torch.ones(2, 3, 32, 32)).square().sum().mul(100).backward()
    norm = clip_gradients(one.parameters(), 0.01, mode)
    assert norm.item() == pytest.approx(
        torch.cat([parameter.grad.flatten() for parameter in two.parameters()]).norm().item(), rel=1e-5)
    dispatch_clip_grad(two.parameters(), 0.01, mode=mode)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(one.parameters(), two.parameters()))


def test_a_tracker_gets_every_epoch(tmp_path):
    pytest.importorskip('tensorboard')
    losses_and_weights(tmp_path, 'tracked', '--log', 'tensorboard')
    assert list((tmp_path / 'tracked').rglob('events.out.tfevents.*'))


def test_a_tracker_that_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('timm_tinyvit.base.launch.get_available_trackers', list)
    said = message_of([*SMALL, '--output', tmp_path, '--log', 'trackio'], capsys)
    assert 'the tracker trackio is not installed' in said and 'pip install trackio' in said


def damaged(store: Path, to: Path, damage) -> Path:
    shutil.copytree(store, to / 'logits')
    damage(sorted((to / 'logits' / 'epoch-00001').iterdir())[1])
    return to / 'logits'


@pytest.mark.parametrize('damage, expected', [
    (lambda shard: shard.unlink(), 'lacks 1 shards, the first of epoch 1'),
    (lambda shard: shard.write_bytes(shard.read_bytes()[:-40]), 'is cut short'),
    (lambda shard: shard.write_bytes(b''), 'is cut short: 0 bytes, expected '),
    (flip_bit, 'is damaged'),
    (lambda shard: shutil.copy(shard.with_name('shard-00000.arrow'), shard), 'a shard of another store, epoch or'),
], ids=['missing', 'truncated', 'empty', 'flipped bit', 'swapped'])
@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_store_stops_the_run_with_one_sentence(distilled, tmp_path, capsys, damage, expected, workers):
    store = damaged(distilled[1], tmp_path, damage)
    said = message_of([*SMALL, '--logits', store, '--output', tmp_path, '-j', workers], capsys)
    assert expected in said


def test_bad_input_gets_one_clear_sentence(distilled, teacher, tmp_path, capsys):
    _, store = distilled
    here = [*SMALL, '--output', tmp_path]
    with_store = [*here, '--logits', store]
    rows = load_split(DATA, 'test[:8]', is_training=False)
    words, loose = tmp_path / 'words', tmp_path / 'loose'
    few = rows.remove_columns('label').add_column('label', [0, 1, 2, 0, 1, 2, 0, 1])
    datasets.DatasetDict(test=few.cast_column('label', datasets.ClassLabel(names=list('abc')))).save_to_disk(words)
    for place in ('test/a/0.png', 'test/b/1.png', 'test/2.png'):
        (loose / place).parent.mkdir(parents=True, exist_ok=True)
        rows[0]['image'].save(loose / place)
    cases = [
        ([*here, '--dataset', tmp_path / 'nowhere'], 'there is no folder'),
        ([*here, '--train-split', 'training'], 'no split training, only train, test'),
        ([*here, '--logits', tmp_path / 'none'], 'there is no logit store at'),
        ([*here, '--logits', tmp_path / 'new', '--teacher', 'no_such_model'], 'the model no_such_model'),
        ([*here, '--logits', tmp_path / 'new', '--teacher', teacher, '--topk', '11'], 'k = 11 does not fit 10 classes'),
        ([*with_store, '--num-classes', '12'], 'the student has 12 classes, the store'),
        ([*with_store, '--train-split', 'train[:95]'], '95 samples, the store has 96'),
        ([*with_store, '--train-split', 'train[1:97]'], '96 samples with other content'),
        ([*here, '--logits', store, store], 'twice; an average is of different stores'),
        ([*with_store, '--val-dataset', words], 'are not the classes of the store'),
        ([*here, '--val-dataset', loose], 'every file must lie in SPLIT/CLASS/'),
        ([*with_store, '--reprob', '0.5'], '--reprob 0.5 instead of 0.25'),
        ([*with_store, '--teacher', teacher, '--topk', '4'], 'k: 3, not 4'),
        ([*here, '--no-such-flag', '1'], 'unknown argument --no-such-flag'),
        ([*here, '--epoch', '3'], 'did you mean --epochs?'),
        ([*here, '--epochs', 'many'], "argument --epochs: invalid int value: 'many'"),
        ([*here, '--config', 'no-such-recipe'], 'there is no recipe no-such-recipe'),
        ([*here, '--model', 'no_such_student'], 'the student no_such_student cannot be made'),
        ([*here, '--opt', 'no_such_optimiser'], 'no_such_optimiser'),
        ([*here, '-b', '97'], 'fewer than one batch of 97'),
        ([*here, '--alpha', '1.5'], '--alpha is 1.5'),
        ([*here, '--temperature', 'nan'], '--temperature is nan'),
        ([*here, '-vb', '-1'], '--validation-batch-size is -1'),
        ([*here, '--num-classes', '5'], 'sample 0 of --train-split has label 7'),
        ([*here, '--val-split', 'test[:0]'], 'the data of --val-split are empty'),
        ([*here, '--interpolation', 'cubist'], 'check --interpolation'),
        ([*here, '--model', 'mixer_s16_224'], 'cannot be made for 32x32 pixels'),
        ([*here, '--model-kwargs', 'depth'], 'write pairs like name=value'),
        ([*here, '--sched', 'none'], 'use --sched constant'),
        ([*here, '--sched', 'step', '--cooldown-epochs', '1'], 'the schedule step has no cooldown'),
        ([*here, '--sched', 'step', '--decay-epochs', '0'], '--decay-epochs is 0.0; expected more than 0'),
        ([*here, '--min-lr', '-1'], '--min-lr is -1.0; expected at least 0'),
        ([*here, '--smoothing', '1'], '--smoothing is 1.0; expected less than 1'),
        ([*here, '--opt-betas', '0.9'], 'the optimiser adamw: IndexError'),
        ([*here, '--aa', 'nope'], 'check --aa'),
        ([*here, '--lr', 'inf', '--output', tmp_path / 'inf'], 'has no checkpoint, as the weights are not finite'),
        ([*here, '--compile', 'nosuch'], '--compile nosuch is no backend'),
        ([*here, '--opt', 'adahessian'], 'needs second derivatives'),
        ([*here, '--output', Path(DATA) / 'draw.py'], 'choose another --output'),
        ([*here, '--logits', tmp_path / 'new', '--teacher', teacher, '--shard-size', '0'], '--shard-size is 0'),
        ([*here, '--target-key', 'name'], "no column 'name'"),
        ([*here, '--teacher', teacher], '--teacher without --logits'),
        ([*with_store, '--mixup', '0.8'], '--mixup 0.8 instead of 0.0'),
        ([*with_store, '--mixup-mode', 'elem'], 'give --mixup-mode pair'),
        ([*here, '--cutmix', '1', '-b', '3'], '--batch-size is 3; --mixup and --cutmix need an even one'),
        ([*here, '--sync-bn'], '--sync-bn needs GPUs'),
        ([*here, '--grad-accum-steps', '7'], 'fewer than one update of 112'),
        ([*here, '--initial-checkpoint', tmp_path / 'none'], 'there is no file'),
        ([*here, '--crop-mode', 'round'], "argument --crop-mode: invalid choice: 'round'"),
    ]
    for argv, expected in cases:
        assert expected in message_of(argv, capsys)
    assert not (tmp_path / 'new').exists()


def test_a_recipe_gives_the_flags_and_the_command_line_wins(tmp_path, capsys):
    recipe = tmp_path / 'mine.yaml'
    recipe.write_text('lr: 0.125\nscale: [0.5, 0.75]\nquiet: true\nepochs: 7\n')
    args = train_distill.settings(['--dataset', DATA, '--config', str(recipe), '--epochs', '9'])
    assert (args.lr, args.scale, args.quiet, args.epochs) == (0.125, [0.5, 0.75], True, 9)
    recipe.write_text('learning_rate: 0.1\n')
    assert "unknown key 'learning_rate'" in message_of(['--dataset', DATA, '--config', recipe], capsys)


def test_views_that_this_machine_makes_otherwise_stop_the_run(distilled, tmp_path, capsys):
    """The manifest of a store from a machine whose libraries made other views."""
    shutil.copytree(distilled[1], tmp_path / 'logits')
    manifest = tmp_path / 'logits' / 'store.json'
    store = LogitStore.open(tmp_path / 'logits')
    text = manifest.read_text().replace(store.manifest.probe, '0' * 32)
    manifest.write_text(text.replace(f'"pillow": "{store.manifest.versions["pillow"]}"', '"pillow": "9.0.0"'))
    said = message_of([*SMALL, '--logits', tmp_path / 'logits', '--output', tmp_path], capsys)
    assert 'this machine makes other views' in said and 'pillow 9.0.0 -> ' in said


def test_an_image_that_cannot_be_decoded_is_named(tmp_path, capsys):
    rows = load_split(DATA, 'train[:96]', is_training=True).cast_column('image', datasets.Image(decode=False))
    rows = rows.map(lambda row, index: {'image': {'bytes': b'no image', 'path': None}} if index == 41 else {},
                    with_indices=True)
    rows.cast_column('image', datasets.Image()).to_parquet(tmp_path / 'train.parquet')
    shutil.copy(f'{DATA}/test.parquet', tmp_path)
    said = message_of([*SMALL, '--dataset', tmp_path, '--train-split', 'train', '--output', tmp_path, '-j1'], capsys)
    assert 'the image of sample 41 cannot be decoded' in said
