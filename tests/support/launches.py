"""Launches of train_distill as real processes: started, waited for, killed, and what they leave."""

import gc
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from accelerate.utils import compare_versions
from safetensors.torch import load_file

import train_distill
from support.runs import leave_plots_out
from support.waiting import wait_until
from timm_tinyvit.base.launch import SHARDING_NEEDS

try:
    import resource
except ImportError:
    resource = None

FSDP = {'fsdp_version': 2, 'fsdp_auto_wrap_policy': 'TRANSFORMER_BASED_WRAP'}
# What accelerate's launcher makes of it.
SHARDED = {'ACCELERATE_USE_FSDP': 'true', **{name.upper(): str(value) for name, value in FSDP.items()},
           'FSDP_CPU_RAM_EFFICIENT_LOADING': 'true', 'FSDP_SYNC_MODULE_STATES': 'true'}
needs_sharding = pytest.mark.skipif(
    any(compare_versions(name, '<', oldest) for name, oldest in SHARDING_NEEDS.items()),
    reason=f'FSDP needs {SHARDING_NEEDS}')


def train(environment, argv, out, file_limit=None):
    """A rank of its own: the program with these arguments, what it says in a file, its exit status its own."""
    os.setsid()
    # Collections would walk through all that the warm parent has in memory: a third of the time of a small run.
    gc.freeze()
    leave_plots_out()
    # Loader workers are its own children, as without the warm parent of the tests.
    multiprocessing.set_start_method('fork', force=True)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    os.environ.update(environment)
    torch.set_num_threads(1)
    out = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout.reconfigure(line_buffering=True)
    train_distill.main([str(argument) for argument in argv])


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


@contextmanager
def launches(warm_processes, tmp_path):
    started = []

    def ranks(argv, processes=1, file_limit=None, launcher=None):
        port = free_port()
        launch = []
        for rank in range(processes):
            environment = dict(launcher or {})
            if processes > 1 or launcher:
                environment |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(processes),
                                'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
            launch.append(warm_processes.Process(
                target=train, args=(environment, [*argv, '--output', tmp_path], tmp_path / 'out.txt', file_limit)))
            launch[-1].start()
        started.extend(launch)
        return launch

    yield ranks
    for process in started:
        process.kill()
        process.join()


def finish(launch, tmp_path, status=0):
    for process in launch:
        process.join(300)
        assert process.exitcode == status, (tmp_path / 'out.txt').read_text()
    return (tmp_path / 'out.txt').read_text()


def kill(launch):
    for process in launch:
        process.kill()
    for process in launch:
        process.join()
    # The others may have lost their connection before.
    assert launch[0].exitcode == -signal.SIGKILL


def kill_at_random_steps(start, argv, processes, folder, times):
    """Start a run in this folder and kill it soon after its next checkpoint, again and again."""
    draw = random.Random(processes)
    for _ in range(times):
        before = checkpoints(folder)
        launch = start(argv, processes)
        wait_for(lambda: checkpoints(folder) != before, launch)  # noqa: B023  called in this turn
        time.sleep(draw.uniform(0, 0.05))
        kill(launch)


def checkpoints(folder):
    return sorted(file.name for file in folder.glob('checkpoint-*.pt'))


def wait_for(condition, launch):
    wait_until(condition, alive=lambda: all(process.is_alive() for process in launch))


def weights(folder, name='last'):
    return load_file(folder / name / 'model.safetensors')


def assert_same(one, two):
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
