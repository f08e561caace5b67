"""Runs of real processes that are killed, asked to stop, and gone on with, and what their checkpoints refuse."""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_distill
from support import programs
from support.files import tree
from support.flags import ROOT, small_data
from support.launches import (
    assert_same, checkpoints, finish, free_port, kill, kill_at_random_steps, launches, resource, wait_for, weights,
)
from timm_tinyvit.base.launch import StepFlags
from timm_tinyvit.train import checkpoint

CPU = torch.device('cpu')
# Drop path, dropout and mixup draw from the generators of torch and numpy; the average has a memory of its own.
SMALL = [
    *small_data(96, 16), '--model', 'test_efficientnet', '--drop-path', '0.2', '--drop', '0.1', '--mixup', '0.8',
    '--model-ema', '--lr', '1e-2', '--warmup-epochs', '1', '--epochs', '2']
EVERY_STEP = ['--recovery-interval', '1']


@pytest.fixture
def start(warm_processes, tmp_path):
    """`start(argv, processes)` gives the running ranks of one launch; what they say lies in out.txt."""
    with launches(warm_processes, tmp_path) as ranks:
        yield ranks


@pytest.mark.parametrize('processes', [1, 2])
def test_a_run_killed_at_five_random_steps_ends_with_the_same_bits(start, tmp_path, processes):
    argv = [*SMALL, '-b', str(8 // processes)]
    finish(start([*argv, '--experiment', 'peace'], processes), tmp_path)
    argv += [*EVERY_STEP, '--experiment', 'killed']
    folder = tmp_path / 'killed'
    kill_at_random_steps(start, argv, processes, folder, times=5)
    said = finish(start(argv, processes), tmp_path)
    assert len(re.findall('resuming .* at epoch', said)) == 5
    for name in ('last', 'last_ema'):
        assert_same(weights(tmp_path / 'peace', name), weights(folder, name))
    assert any(not torch.equal(a, b) for a, b in zip(weights(folder).values(), weights(folder, 'last_ema').values()))
    one, two = (list(csv.DictReader(open(tmp_path / run / 'metrics.csv'))) for run in ('peace', 'killed'))
    for key in ('loss', 'lr', 'grad_norm', 'eval_loss', 'eval_top1', 'eval_loss_ema'):
        assert [row[key] for row in one] == [row[key] for row in two]


def hidden(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('.*'))


@pytest.mark.parametrize('processes', [1, 2])
def test_a_run_has_one_owner_at_a_time(start, tmp_path, monkeypatch, capsys, processes):
    """A second launch in the folder is refused, changes nothing, and goes on at once after the first was killed."""
    argv = [*SMALL, '-b', str(8 // processes), '--epochs', '100', '--val-interval', '100', '--experiment', 'run',
            *WITHIN_AN_EPOCH, '--train-split', 'train[:400]']
    launch = start(argv, processes)
    wait_for(lambda: within_an_epoch(tmp_path / 'run'), launch)
    assert hidden(tmp_path / 'run')[0] == '.run.lease'
    # The second one's patience is at its end at once.
    monkeypatch.setattr('timm_tinyvit.train.record.time', SimpleNamespace(monotonic=partial(next, count(0, 100))))
    if processes == 1:
        said = programs.refusal(train_distill.main, [*argv, '--output', tmp_path], capsys)
        assert f'{tmp_path / "run"} is in use by process {launch[0].pid}' in said and '--experiment' in said
    assert all(process.is_alive() for process in launch)
    kill(launch)
    launch = start(argv, processes)
    wait_for(lambda: 'resuming' in (tmp_path / 'out.txt').read_text(), launch)
    assert 'waiting for' not in (tmp_path / 'out.txt').read_text()
    os.kill(launch[0].pid, signal.SIGTERM)
    finish(launch[:1], tmp_path, 143)
    assert hidden(tmp_path / 'run') == []


def test_two_launches_at_the_same_time_train_one_after_the_other(start, tmp_path):
    argv = [*SMALL, '-b', '8', '--experiment']
    finish(start([*argv, 'peace']), tmp_path)
    both = [*start([*argv, 'run']), *start([*argv, 'run'])]
    said = finish(both, tmp_path)
    assert 'waiting for process' in said and 'is finished: nothing is left to train' in said
    assert_same(weights(tmp_path / 'peace'), weights(tmp_path / 'run'))


def test_a_run_that_was_suspended_leaves_the_folder_to_who_has_taken_it_over(tmp_path, capsys, monkeypatch):
    real, folder = train_distill.train_epoch, tmp_path / 'run'

    def suspended(*args):
        if checkpoints(folder):
            # Another launch has come and gone meanwhile.
            (folder / '.run.lease').unlink()
            (folder / 'last' / 'model.safetensors').write_bytes(b'of the other')
        return real(*args)

    monkeypatch.setattr(train_distill, 'train_epoch', suspended)
    assert 'taken over' in message_of(capsys, tmp_path)
    assert checkpoints(folder) == ['checkpoint-000001-000000000000.pt']
    assert (folder / 'last' / 'model.safetensors').read_bytes() == b'of the other'


@pytest.mark.parametrize('name', ['best', 'last', 'best_ema', 'last_ema'])
def test_a_folder_of_models_that_is_a_link_is_refused_and_nothing_happens_where_it_leads(name, tmp_path, capsys):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'model.safetensors').write_bytes(b'precious')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / name).symlink_to(tmp_path / 'mine')
    before = tree(tmp_path)
    message = message_of(capsys, tmp_path, '--epochs', '1')
    assert str(tmp_path / 'run' / name) in message and 'is a link' in message and tree(tmp_path) == before


def test_a_run_needs_no_room_for_temporary_files_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'full'))
    run(tmp_path, '--epochs', '1')
    assert (tmp_path / 'run' / 'best_ema' / 'config.json').is_file() and hidden(tmp_path) == []


def test_killed_runs_leave_nothing_half_written_for_good(start, tmp_path):
    """Killed while files are written, at many moments; what is left goes with the next start."""
    argv = [*SMALL, '-b', '8', '--epochs', '50', '--val-split', 'test[:4]', '--experiment', 'run', *EVERY_STEP]
    draw, left = random.Random(0), 0
    for _ in range(12):
        before = checkpoints(tmp_path / 'run')
        launch = start(argv)
        wait_for(lambda: checkpoints(tmp_path / 'run') != before, launch)  # noqa: B023  called in this turn
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and len(hidden(tmp_path / 'run')) < 2:
            pass
        time.sleep(draw.uniform(0, 0.002))
        kill(launch)
        left += any(name.endswith('.tmp') for name in hidden(tmp_path / 'run'))
    assert left
    launch = start(argv)
    wait_for(lambda: 'resuming' in (tmp_path / 'out.txt').read_text().splitlines()[-1], launch)
    os.kill(launch[0].pid, signal.SIGTERM)
    finish(launch, tmp_path, 143)
    assert hidden(tmp_path / 'run') == []


# A run that is asked to stop just when an epoch has ended has its checkpoint, and makes no other: ask it in between.
WITHIN_AN_EPOCH = ['--recovery-interval', '10']


def within_an_epoch(run):
    return [name for name in checkpoints(run) if not name.endswith('-000000000000.pt')]


@pytest.mark.parametrize('processes, number, status', [
    (1, signal.SIGTERM, 143), (1, signal.SIGINT, 130), (2, signal.SIGTERM, 143), (1, signal.SIGHUP, 129),
    (1, signal.SIGUSR1, 138), (1, signal.SIGUSR2, 140), (2, signal.SIGUSR1, 138)])
def test_a_run_asked_to_stop_leaves_a_checkpoint_and_goes_on_from_it(start, tmp_path, processes, number, status):
    """One of the processes is asked, its loader's worker with it, whose batches the step still needs."""
    argv = [*SMALL, '-b', '2', '--grad-accum-steps', str(4 // processes), '-j', '1', '--train-split', 'train[:400]',
            '--epochs', '100', '--experiment', 'run', '--val-interval', '100', *WITHIN_AN_EPOCH]
    launch = start(argv, processes)
    wait_for(lambda: within_an_epoch(tmp_path / 'run'), launch)
    before = within_an_epoch(tmp_path / 'run')[-1]
    os.killpg(launch[-1].pid, number)
    said = finish(launch[-1:], tmp_path, status)
    assert 'stopped: the same command goes on' in said and 'Traceback' not in said
    for process in launch:
        process.join(60)
        assert process.exitcode in (status, 143)
    last = checkpoints(tmp_path / 'run')[-1]
    state = torch.load(tmp_path / 'run' / last, weights_only=True)
    assert last > before and state['samples'] > 0
    assert f'from epoch {state["epoch"]}, step {state["samples"] // 8} ({tmp_path / "run" / last})\n' in said
    launch = start(argv, processes)
    wait_for(lambda: 'resuming' in (tmp_path / 'out.txt').read_text(), launch)
    assert f'at epoch {state["epoch"]}, step {state["samples"] // 8}' in (tmp_path / 'out.txt').read_text()


@pytest.mark.skipif(resource is None, reason='needs file-size limits')
@pytest.mark.parametrize('limit, unwritten', [
    (10_000, 'last/model.safetensors'), (1_000_000, 'checkpoint-000001-000000000000.pt')])
def test_a_full_disk_stops_training_with_one_sentence(start, tmp_path, limit, unwritten):
    """As a file-size limit, at which writing fails like on a full disk; once it is gone the same command finishes."""
    argv = [*SMALL, '-b', '8', '--epochs', '1', '--experiment', 'run']
    said = finish(start(argv, file_limit=limit), tmp_path, status=2)
    assert 'the file-size limit is reached' in said.splitlines()[-1] and 'Traceback' not in said
    assert unwritten in said.splitlines()[-1]
    assert not [file for file in (tmp_path / 'run').rglob('*') if file.name.endswith('.tmp')]
    finish(start(argv), tmp_path)
    assert weights(tmp_path / 'run', 'best')


def processes_of(folder):
    """Processes, by number, that have this folder on their command line."""
    found = []
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            if str(folder).encode() in (entry / 'cmdline').read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def launcher(tmp_path, *argv, processes=1, machines=1, rank=0, port=None):
    """accelerate's own launcher with a run of tmp_path, on the CPU."""
    kind = ['--multi_gpu'] if processes > 1 else ['--cpu']
    command = [
        sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch', *kind, '--num_processes', str(processes),
        '--num_machines', str(machines), '--machine_rank', str(rank), '--main_process_ip', '127.0.0.1',
        '--main_process_port', str(port or free_port()), '--mixed_precision', 'no', '--dynamo_backend', 'no',
        str(ROOT / 'train_distill.py'), *SMALL, *argv, '--output', str(tmp_path)]
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
    with open(tmp_path / f'out{rank}.txt', 'w') as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)


@pytest.mark.launches
@pytest.mark.skipif(not Path('/proc/self/cmdline').exists(), reason='looks for orphans in /proc')
@pytest.mark.parametrize('processes', [1, 2])
def test_sigterm_to_the_launcher_ends_in_a_checkpoint_and_leaves_no_orphan(tmp_path, processes):
    launch = launcher(
        tmp_path, '-b', str(8 // processes), '--train-split', 'train[:400]', '--epochs', '1000', '--val-interval',
        '1000', '-j', '1', '--experiment', 'run', *WITHIN_AN_EPOCH, processes=processes)
    try:
        deadline = time.monotonic() + 120
        while not within_an_epoch(tmp_path / 'run'):
            assert launch.poll() is None and time.monotonic() < deadline, (tmp_path / 'out0.txt').read_text()
            time.sleep(0.02)
        before = within_an_epoch(tmp_path / 'run')[-1]
        launch.terminate()
        assert launch.wait(60) != 0
        while processes_of(tmp_path):
            assert time.monotonic() < deadline, 'an orphan'
            time.sleep(0.05)
    finally:
        if launch.poll() is None or processes_of(tmp_path):
            os.killpg(launch.pid, signal.SIGKILL)
            launch.wait()
    said = (tmp_path / 'out0.txt').read_text()
    assert 'stopped: the same command goes on' in said, said
    last = checkpoints(tmp_path / 'run')[-1]
    assert last > before and torch.load(tmp_path / 'run' / last, weights_only=True)['settings']


def test_two_launches_as_on_two_machines_train_together(start, tmp_path):
    """Over loopback; as two processes of one launch do, to the bit."""
    port = free_port()
    machines = [launcher(tmp_path, '-b', '4', '--experiment', 'machines', processes=2, machines=2, rank=rank, port=port)
                for rank in range(2)]
    finish(start([*SMALL, '-b', '4', '--experiment', 'machine'], 2), tmp_path)
    try:
        assert [machine.wait(120) for machine in machines] == [0, 0], (tmp_path / 'out0.txt').read_text()
    finally:
        for machine in machines:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)
    said = [(tmp_path / f'out{rank}.txt').read_text() for rank in range(2)]
    for words in ('12 steps of 8 an epoch, learning rate ', ', 2 process(es) on cpu', 'finished:'):
        assert words in said[0]
    assert 'steps of' not in said[1]
    assert_same(weights(tmp_path / 'machine'), weights(tmp_path / 'machines'))


@pytest.mark.parametrize('before, after', [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(start, tmp_path, before, after):
    """The images seen of the epoch, the rates and the number of updates are those of a run in peace."""
    argv = [*SMALL, '--experiment', 'run', *EVERY_STEP]
    launch = start([*argv, '-b', str(8 // before)], before)
    wait_for(lambda: max(checkpoints(tmp_path / 'run'), default='') >= 'checkpoint-000000-000000000032.pt', launch)
    kill(launch)
    first = torch.load(tmp_path / 'run' / checkpoints(tmp_path / 'run')[-1], weights_only=True)
    said = finish(start([*argv, '-b', str(8 // after)], after), tmp_path)
    assert f'the checkpoint is of {before} process(es), now there are {after}: dropout, drop path and rounding' in said
    assert 'nor can learning rates' not in said
    assert f'resuming {tmp_path / "run"} at epoch {first["epoch"]}, step {first["samples"] // 8}\n' in said
    finish(start([*argv, '-b', '4', '--experiment', 'peace'], 2), tmp_path)
    one, two = (list(csv.DictReader(open(tmp_path / run / 'metrics.csv'))) for run in ('peace', 'run'))
    assert [row['lr'] for row in one] == [row['lr'] for row in two]
    assert float(two[0]['loss']) == pytest.approx(float(one[0]['loss']), rel=0.2)
    state = torch.load(tmp_path / 'run' / checkpoints(tmp_path / 'run')[-1], weights_only=True)
    assert state['optimizer']['state'][0]['step'] == 24


def run(tmp_path, *argv):
    train_distill.main([*SMALL, '-b', '8', '--output', str(tmp_path), '--experiment', 'run', *argv])


def message_of(capsys, tmp_path, *argv):
    return programs.refusal(lambda words: run(tmp_path, *words), argv, capsys)


def test_fewer_images_per_update_on_fewer_processes_are_told(start, tmp_path):
    argv = [*SMALL, '-b', '4', '--experiment', 'run']
    finish(start([*argv, '--epochs', '2'], 2), tmp_path)
    last = tmp_path / 'run' / checkpoints(tmp_path / 'run')[-1]
    last.unlink()
    said = finish(start(argv), tmp_path)
    assert 'nor can learning rates and the order of images, with 4 images per update instead of 8' in said


def test_losses_are_means_over_updates_of_two_sizes(tmp_path):
    """An epoch that begins with updates of 8 images on two processes and ends with updates of 4 on one."""
    argv = [*SMALL, '--epochs', '1', '--output', tmp_path]
    train_distill.main([*map(str, argv), '-b', '8', '--recovery-interval', '6', '--checkpoint-hist', '9',
                        '--experiment', 'peace'])
    shutil.copytree(tmp_path / 'peace', tmp_path / 'run')
    middle, last = (tmp_path / 'run' / name for name in checkpoints(tmp_path / 'run'))
    last.unlink()
    state = torch.load(middle, weights_only=True)
    state |= {'world_size': 2, 'sums': state['sums'] * 2, 'random': state['random'] * 2}
    write_checkpoint(middle, state)
    train_distill.main([*map(str, argv), '-b', '4', '--experiment', 'run'])
    losses = [float(next(csv.DictReader(open(tmp_path / name / 'metrics.csv')))['loss']) for name in ('peace', 'run')]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def poison(monkeypatch):
    """The loss of the sixth step is NaN."""
    real, calls = checkpoint.nn.functional.log_softmax, []

    def poisoned(*args, **kwargs):
        calls.append(None)
        return real(*args, **kwargs) * (float('nan') if len(calls) == 6 else 1)

    monkeypatch.setattr('torch.nn.functional.log_softmax', poisoned)


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path, capsys, monkeypatch):
    poison(monkeypatch)
    said = message_of(capsys, tmp_path)
    assert 'the loss or the gradient of step 5 in epoch 0 is not finite' in said and str(tmp_path / 'run') in said
    name, = checkpoints(tmp_path / 'run')
    assert name == 'checkpoint-000000-000000000040.pt'
    state = torch.load(tmp_path / 'run' / name, weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state['model'].values())
    assert state['optimizer']['state'][0]['step'] == 5
    monkeypatch.undo()
    run(tmp_path)
    assert len(list(csv.DictReader(open(tmp_path / 'run' / 'metrics.csv')))) == 2


@pytest.mark.parametrize('interval, kept', [('0', []), ('1', ['checkpoint-000000-000000000040.pt'])])
def test_a_loss_that_is_found_a_step_late_is_in_no_checkpoint(tmp_path, capsys, monkeypatch, interval, kept):
    """As on a GPU, where the weights have gone by then: the checkpoint before it is the last good one."""
    poison(monkeypatch)
    monkeypatch.setattr(train_distill, 'StepFlags', lambda accelerator: StepFlags(accelerator, delay=1))
    message = message_of(capsys, tmp_path, '--recovery-interval', interval)
    assert 'the loss or the gradient of step 5 in epoch 0 is not finite' in message
    assert checkpoints(tmp_path / 'run')[-1:] == kept
    assert ('keeps the checkpoint before it' if kept else 'has no checkpoint') in message


def test_a_run_that_its_loss_ends_leaves_a_report(tmp_path, capsys, monkeypatch):
    real, metrics = checkpoint.nn.functional.log_softmax, tmp_path / 'run' / 'metrics.csv'
    monkeypatch.setattr('torch.nn.functional.log_softmax', lambda *args, **kwargs: real(*args, **kwargs) * (
        float('nan') if metrics.exists() else 1))
    assert 'in epoch 1 is not finite' in message_of(capsys, tmp_path)
    assert '1 of 2 epochs so far' in (tmp_path / 'run' / 'report.html').read_text()


def test_weights_that_are_not_finite_are_not_kept(tmp_path, capsys, monkeypatch):
    """Where the running means of a batch norm have gone too, the checkpoint before is the last good one."""
    monkeypatch.setattr(train_distill, 'is_finite', lambda model: False)
    monkeypatch.setattr('torch.nn.functional.log_softmax', lambda x, **_: x * float('nan'))
    message_of(capsys, tmp_path)
    assert not checkpoints(tmp_path / 'run')


def test_what_a_checkpoint_refuses(tmp_path, capsys):
    run(tmp_path, '--epochs', '1')
    assert '--mixup was 0.8 and is 0.0' in message_of(capsys, tmp_path, '--epochs', '1', '--mixup', '0')
    assert '--batch-size was 8 and is 4' in message_of(capsys, tmp_path, '--epochs', '1', '-b', '4')
    last = tmp_path / 'run' / checkpoints(tmp_path / 'run')[-1]
    state = torch.load(last, weights_only=True)
    write_checkpoint(last, {
        **state, 'random': [{**state['random'][0], 'torch': torch.zeros(3, dtype=torch.uint8)}]})
    assert 'the random state of the checkpoint cannot be restored' in message_of(capsys, tmp_path, '--epochs', '1')
    for states in ([], [{}], [{'device': 'cpu'}]):
        write_checkpoint(last, {**state, 'random': states})
        assert 'the random state of the checkpoint cannot be restored' in message_of(capsys, tmp_path, '--epochs', '1')
    write_checkpoint(last, {**state, 'random': [{**state['random'][0], 'device': 'cuda'}]})
    assert 'random state of a cuda device, this one is cpu' in message_of(capsys, tmp_path, '--epochs', '1')
    write_checkpoint(last, {**state, 'code': print})
    assert 'cannot be read (UnpicklingError); delete it' in message_of(capsys, tmp_path, '--epochs', '1')


def write_checkpoint(path, state):
    """A checkpoint in the place of one that is there, with a checksum of its own."""
    epoch, samples = map(int, path.stem.split('-')[1:])
    assert checkpoint.save_checkpoint(path.parent, {**state, 'epoch': epoch, 'samples': samples}, keep=99) == path


def test_a_checkpoint_that_lacks_an_entry_or_has_another_is_one_sentence(tmp_path, capsys):
    run(tmp_path, '--epochs', '1')
    path = tmp_path / 'run' / checkpoints(tmp_path / 'run')[-1]
    state = torch.load(path, weights_only=True)
    assert set(state) == {*checkpoint.ALL_ENTRIES, 'ema'}
    for name in set(state) - {'epoch', 'samples'}:
        write_checkpoint(path, {key: value for key, value in state.items() if key != name})
        message = message_of(capsys, tmp_path, '--epochs', '1')
        assert name in message and 'delete it to go on from the one before' in message, message
    for odd in (dict(optimizer={}), dict(model={}), dict(sums=[]), dict(scheduler=None), dict(settings=[]),
                dict(model={**state['model'], 'classifier.weight': torch.zeros(3)}), dict(optimizer=state['model'])):
        write_checkpoint(path, {**state, **odd})
        message = message_of(capsys, tmp_path, '--epochs', '1')
        assert 'delete it to go on from the one before' in message, message
    write_checkpoint(path, state)
    run(tmp_path, '--epochs', '1')


def test_a_run_does_not_go_on_from_a_checkpoint_with_a_flipped_bit(tmp_path, capsys):
    run(tmp_path, '--epochs', '1')
    path = tmp_path / 'run' / checkpoints(tmp_path / 'run')[-1]
    content, draw = bytearray(path.read_bytes()), random.Random(0)
    for _ in range(10):
        place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
        content[place] ^= bit
        path.write_bytes(content)
        message = message_of(capsys, tmp_path, '--epochs', '1')
        assert str(path) in message and 'not as it was written' in message and 'delete it to go on' in message
        content[place] ^= bit


def test_random_states_come_back_exactly():
    state = checkpoint.random_state(CPU)
    drawn = random.random(), torch.rand(3).tolist()
    checkpoint.set_random_state(state, CPU)
    assert (random.random(), torch.rand(3).tolist()) == drawn


def test_a_flag_that_is_newer_than_a_checkpoint_was_off(tmp_path, refused):
    state = dict.fromkeys(checkpoint.ALL_ENTRIES) | {'settings': {'lr': 0.1}, 'world_size': 1}
    torch.save(state, tmp_path / 'checkpoint-0.pt')
    assert checkpoint.last_checkpoint(tmp_path, {'lr': 0.1, 'bce_loss': False, 'opt_kwargs': {}}, 1)
    for on in ({'bce_loss': True}, {'opt_kwargs': {'amsgrad': True}}):
        with refused('was started with other settings', f'--{next(iter(on)).replace("_", "-")} was None'):
            checkpoint.last_checkpoint(tmp_path, {'lr': 0.1, **on}, 1)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for epoch in range(4):
        checkpoint.save_checkpoint(tmp_path, {'epoch': epoch, 'samples': 0}, keep=2)
    assert checkpoints(tmp_path) == ['checkpoint-000002-000000000000.pt', 'checkpoint-000003-000000000000.pt']


def test_deterministic_is_asked_of_torch(tmp_path):
    before = torch.are_deterministic_algorithms_enabled(), os.environ.get('CUBLAS_WORKSPACE_CONFIG')
    try:
        run(tmp_path, '--epochs', '1', '--deterministic')
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert os.environ['CUBLAS_WORKSPACE_CONFIG']
    finally:
        torch.use_deterministic_algorithms(before[0])
        if before[1] is None:
            del os.environ['CUBLAS_WORKSPACE_CONFIG']
    shutil.rmtree(tmp_path / 'run')
