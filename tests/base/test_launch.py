"""Flags of training steps that the host reads late, settings of a launch, and a launcher that is gone."""

import os
import resource
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from support import fresh_programs
from timm_tinyvit.base import launch
from timm_tinyvit.base.launch import StepFlags, create_accelerator


@pytest.mark.parametrize('delay, due', [(0, [[0], [1], [2]]), (1, [[], [0], [1]]), (2, [[], [], [0]])])
def test_flags_are_read_so_many_steps_late_and_in_order(delay, due):
    flags, read = StepFlags(Accelerator(cpu=True), delay), []
    for step in range(3):
        flags.push(step, torch.tensor(step == 1), step == 2)
        read.append(list(flags.due()))
    assert [[step for step, _ in steps] for steps in read] == due
    left = list(flags.due(is_last=True))
    assert sum(read, []) + left == [(0, [0., 0.]), (1, [1., 0.]), (2, [0., 1.])]
    assert not list(flags.due(is_last=True))


def test_on_a_cpu_flags_are_read_at_once():
    assert StepFlags(Accelerator(cpu=True)).delay == 0


@pytest.mark.skipif(not torch.accelerator.is_available(), reason='needs a GPU; the tests above have another delay')
def test_on_a_gpu_flags_are_read_one_step_late_without_waiting_for_it():
    accelerator = Accelerator()
    flags = StepFlags(accelerator)
    assert flags.delay == 1
    for step in range(3):
        flags.push(step, torch.tensor(step == 1, device=accelerator.device), False)
        assert [number for number, _ in flags.due()] == [step - 1] * (step > 0)
    assert list(flags.due(is_last=True)) == [(2, [0., 0.])]


@pytest.mark.parametrize('name, value, words', [
    # What it asks for is what the training does by itself.
    ('GRADIENT_ACCUMULATION_STEPS', '4', ''), ('DYNAMO_BACKEND', 'EAGER', 'DYNAMO_BACKEND to EAGER')])
def test_what_a_launch_sets_changes_no_gradient(name, value, words, monkeypatch, capsys):
    gradients = []
    for is_set in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        if is_set:
            monkeypatch.setenv(f'ACCELERATE_{name}', value)
        accelerator = create_accelerator()
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        prepared = accelerator.prepare(model)
        accelerator.backward(prepared(torch.ones(2, 3)).sum())
        gradients.append(model.weight.grad)
        assert type(accelerator.unwrap_model(prepared)) is type(prepared) is torch.nn.Linear
    assert torch.equal(*gradients) and gradients[0].tolist() == [[2., 2., 2.]]
    said = capsys.readouterr().err
    assert words in said and said.count('warning') == bool(words)


@pytest.mark.parametrize('is_own, is_launched, stops', [(True, True, True), (True, False, False), (False, True, False)])
def test_a_launcher_that_is_gone_before_all_is_imported_stops_its_program(is_own, is_launched, stops, monkeypatch):
    """But not a program without a launcher, nor one that was forked from the one that had it."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        monkeypatch.setattr(launch, 'STARTED_BY', (os.getpid() if is_own else os.getppid(), 2 ** 22 + 1))
        if is_launched:
            monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'no')
        launch.stop_with_launcher(0.01 if stops else 1)
        end = time.monotonic() + (10 if stops else 0.1)
        while not came and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM] * stops


def test_models_are_gone_before_the_process_group_ends(monkeypatch):
    accelerator, found = create_accelerator(), []
    model = accelerator.prepare(torch.nn.Linear(1, 1))
    model.children_of = [model]
    reference = weakref.ref(model)
    del model
    monkeypatch.setattr(type(accelerator), 'num_processes', 2)
    monkeypatch.setattr(type(accelerator.state), 'destroy_process_group', lambda state: found.append(reference()))
    launch.end_training(accelerator)
    assert found == [None]


def count_page_faults(pipe):
    """Pages of memory that a process takes anew for one tensor of 64 MiB, and for twenty of which it keeps none."""
    create_accelerator()
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for number in (1, 19):
        for _ in range(number):
            torch.empty(64 * 2 ** 20, dtype=torch.uint8).fill_(1)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    pipe.send((counts[1] - counts[0], counts[2] - counts[0]))


@pytest.mark.skipif(sys.platform != 'linux', reason='pages are counted on Linux')
@pytest.mark.skipif(torch.accelerator.is_available(), reason='is for CPUs')
def test_large_tensors_get_the_memory_of_those_before(warm_processes):
    here, there = warm_processes.Pipe()
    process = warm_processes.Process(target=count_page_faults, args=(there,))
    process.start()
    one, twenty = here.recv() if here.poll(120) else (0, 0)
    process.join(60)
    # An aligned tensor may not fit where another of its size was.
    assert process.exitcode == 0 and 0 < one <= twenty < 4 * one


@pytest.mark.launches
def test_workers_that_are_still_busy_at_exit_end_without_a_word():
    done = subprocess.run(
        [sys.executable, fresh_programs.__file__, 'leave_a_busy_worker'], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, 'leaving\n', '')
