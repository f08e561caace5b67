"""The processes of one launch, as accelerate made them: who works together, and how they end together."""

import argparse
import ctypes
import gc
import multiprocessing.connection
import multiprocessing.util
import os
import platform
import signal
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedType, FullyShardedDataParallelPlugin, GradientAccumulationPlugin, InitProcessGroupKwargs,
    compare_versions,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from .console import warning
from .errors import STARTED_BY, STOP_SIGNALS, InputError, stop_by, stop_signals_to

__all__ = [
    'StepFlags', 'all_reduce_sum', 'caller_settings', 'catch_stop_signals', 'create_accelerator', 'device_name',
    'end_training', 'init_worker', 'make_deterministic', 'start_trackers', 'stop_with_launcher',
]

# A launcher kills half a minute after it has asked to stop.
STOP_SECONDS = 30

# What a loader worker that is not needed any more has to end by itself.
EXIT_SECONDS = 0.5

# Kinds of launches, by what accelerate's launcher sets for them.
UNSUPPORTED_LAUNCHES = {
    'DeepSpeed': 'ACCELERATE_USE_DEEPSPEED', 'Megatron-LM': 'ACCELERATE_USE_MEGATRON_LM',
    'a parallelism configuration': 'ACCELERATE_USE_PARALLELISM_CONFIG',
}

# Settings of FSDP2 that would not train the model that is asked for.
UNSUPPORTED_SHARDING = {
    'activation_checkpointing': 'a second forward pass would draw other paths to drop',
    'ignored_modules': 'their gradients would differ from process to process',
    'offload_params': 'batch norms have statistics on the device',
}

# Before these, parts are trained otherwise than the whole, or blocks are no units unless the launch names them.
SHARDING_NEEDS = {'torch': '2.11', 'accelerate': '1.15'}

# Parameters of glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

PRECISIONS = {None: 'no', 'bfloat16': 'bf16', 'float16': 'fp16'}


def create_accelerator(
        amp_dtype: str | None = None,
        trackers: Sequence[str] = (),
        folder: Path | None = None,
) -> Accelerator:
    """An accelerator over all processes that were launched, on the accelerators of this machine or else its CPU.

    Args:
        amp_dtype: Autocast to `bfloat16` or `float16`.
        trackers: Names of experiment trackers.
        folder: Where trackers that write files write them.

    Raises:
        InputError: More processes were launched than work together, they are to share out one model in another way
            than FSDP2's, or a tracker is not installed.
    """
    installed = {str(tracker) for tracker in get_available_trackers()}
    for tracker in trackers:
        if tracker not in installed:
            raise InputError(f'the tracker {tracker} is not installed; pip install {tracker}')
    precision = os.environ.get('ACCELERATE_MIXED_PRECISION', 'no')
    if precision not in ('no', PRECISIONS[amp_dtype]):
        warning(f'the launch asks for mixed precision {precision}; --amp-dtype wins over it, and of a teacher '
                f'--teacher-amp-dtype alone says what is computed in half precision')
    if (backend := os.environ.get('ACCELERATE_DYNAMO_BACKEND', 'no')).lower() != 'no':
        warning(f'the launch sets ACCELERATE_DYNAMO_BACKEND to {backend}, which is not looked at: here it is --compile')
    if amp_dtype == 'float16' and not torch.accelerator.is_available():
        warning('--amp-dtype float16 needs a GPU: on this CPU all is computed in float32')
    plugin = _fsdp_plugin()
    # Without `cpu` accelerate makes no process group on a machine that has no accelerator: every process would take
    # itself for the only one.
    # Ranks wait while one downloads the data, or has more shards to fill than the others.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    # Gradients are summed up over the batches of an update, and divided, by the training: once.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision=PRECISIONS[amp_dtype], kwargs_handlers=[patience],
        log_with=list(trackers) or None, project_dir=folder, fsdp_plugin=plugin, dynamo_backend='no',
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))
    launched = int(os.environ.get('WORLD_SIZE', '1'))
    if accelerator.num_processes != launched:
        raise InputError(
            f'{launched} processes were launched and {accelerator.num_processes} work together; on a machine without '
            f'GPUs launch them with `accelerate launch --multi_gpu --num_processes {launched}`, without --cpu')
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate shards on GPUs alone and would give plain DDP here, without a word; torch shards on CPUs as well.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    if 'ACCELERATE_MIXED_PRECISION' in os.environ:
        _warn_of_launcher(accelerator)
    if accelerator.device.type == 'cpu':
        _keep_freed_memory()
    return accelerator


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed for the tensors to come.

    It gives large tensors back to the system, which clears all of their pages when the next step asks for them again: a
    sixth of a training step on a CPU.
    """
    if sys.platform == 'linux' and hasattr(libc := ctypes.CDLL(None), 'mallopt'):
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


@contextmanager
def caller_settings() -> Iterator[None]:
    """Inside, an accelerator may be created; what it settled does not stay for those that a caller creates later."""
    had_settings = bool(AcceleratorState._shared_state)
    try:
        yield
    finally:
        if not had_settings:
            AcceleratorState._reset_state()


def _warn_of_launcher(accelerator: Accelerator) -> None:
    """Say what accelerate's launcher does not do: wait for a single process, or by default give one all cores."""
    if accelerator.num_processes == 1 and 'TORCHELASTIC_RUN_ID' not in os.environ:
        warning('accelerate launch does not wait for a single process: on SIGTERM it is gone at once, before this '
                'process has written its checkpoint; start it as timm-tinyvit train, or fill, without a launcher')
    num_processes = int(os.environ.get('LOCAL_WORLD_SIZE', '1'))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if accelerator.device.type == 'cpu' and threads * num_processes < cores:
        warning(f'{threads * num_processes} of {cores} CPU cores are used; give accelerate launch '
                f'--num_cpu_threads_per_process {cores // num_processes}')


def _fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """How the launch wants the model shared out, None where each process is to hold all of it."""

    def is_set(name: str) -> bool:
        return os.environ.get(name, 'false').lower() == 'true'

    for kind, name in UNSUPPORTED_LAUNCHES.items():
        if is_set(name):
            raise InputError(f'the launch is set up for {kind}, which is not supported here; launch it with '
                             f'--multi_gpu, or with --use_fsdp --fsdp_version 2')
    if not is_set('ACCELERATE_USE_FSDP'):
        return None
    if os.environ.get('FSDP_VERSION', '1') != '2':
        raise InputError('the launch is set up for FSDP1, which is not supported here; add --fsdp_version 2, or launch '
                         'it with --multi_gpu')
    for flag, reason in UNSUPPORTED_SHARDING.items():
        if os.environ.get(f'FSDP_{flag.upper()}', 'false').lower() not in ('false', ''):
            raise InputError(f'the launch sets fsdp_{flag}, which is not supported here: {reason}; leave it out')
    if lacking := [name for name, oldest in SHARDING_NEEDS.items() if compare_versions(name, '<', oldest)]:
        needed = ' and '.join(f'{name} {SHARDING_NEEDS[name]}' for name in lacking)
        raise InputError(f'FSDP needs {needed} or newer; upgrade, or launch it with --multi_gpu')
    try:
        # Autocast decides what is computed in half precision, as under DDP: batch norms want their weights and
        # statistics of one type. The other setting is meant for models of transformers.
        return FullyShardedDataParallelPlugin(
            mixed_precision_policy=MixedPrecisionPolicy(), cpu_ram_efficient_loading=False)
    except ValueError as error:
        raise InputError(f'accelerate does not take the settings of FSDP ({error}); correct them')


def start_trackers(accelerator: Accelerator, args: argparse.Namespace, folder: Path) -> None:
    """Begin a run in the trackers of `--log`, with all flags, under the name of the run's folder."""
    if args.log:
        flags = {name: value if isinstance(value, int | float) else str(value) for name, value in vars(args).items()}
        accelerator.init_trackers('timm_tinyvit', flags, {
            'wandb': dict(name=folder.name, dir=str(folder)), 'trackio': dict(name=folder.name)})


def end_training(accelerator: Accelerator) -> None:
    """End the trackers and the process group, once nothing but `accelerator` refers to a model that it has prepared.

    A model in parallel owns the process group too. As its last owner it would end the group's threads with Python's
    lock held, for which one of these may wait: now and then a rank would never end.
    """
    if accelerator.num_processes > 1:
        accelerator.free_memory()
        gc.collect()  # models in cycles
    accelerator.end_training()


def make_deterministic() -> None:
    """The same bits from the same numbers on a GPU too, at some cost in speed; to be called before CUDA is used."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def stop_with_launcher(seconds: float = 1.) -> None:
    """Send this process SIGTERM when the `accelerate launch` or `torchrun` that started it is no more.

    The launcher of a single process does not pass SIGTERM on, and no launcher passes on that it was killed; its
    children would work on unseen. Does nothing in a process that was started without a launcher.

    Args:
        seconds: Time between two looks at the launcher.
    """
    if not {'ACCELERATE_MIXED_PRECISION', 'TORCHELASTIC_RUN_ID'} & set(os.environ):
        return
    process, launcher = STARTED_BY
    if process != os.getpid():  # forked since
        launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name='launcher watch', daemon=True).start()


def init_worker(worker: int) -> None:
    """For a DataLoader's `worker_init_fn`: leave what to do at a signal to stop to the process that it works for.

    A signal to the whole group would otherwise end the workers first, with a traceback of each, while the process that
    is about to stop in good order may still need a batch.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # torch, too, ends a worker with SIGTERM where it does not go by itself.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(STOP_SECONDS))
    report = sys.excepthook

    def report_bugs(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # A thread of multiprocessing hands the memory of a batch over, and would print a traceback where the process
        # that takes it stops half-way.
        if not issubclass(kind, (EOFError, ConnectionError)):
            report(kind, error, trace)

    sys.excepthook = report_bugs
    master = multiprocessing.parent_process()

    def watch() -> None:
        # torch's workers look at their parent, which is another process where workers are not simply forked.
        multiprocessing.connection.wait([master.sentinel])
        os._exit(0)

    threading.Thread(target=watch, name='master watch', daemon=True).start()


def _end_workers() -> None:
    """End loader workers that are still there at exit; they would go on for a while where they are but asked to."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and hasattr(signal, 'SIGCHLD'):
        # torch's handler would raise an error for each worker that is killed here.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.terminate()
    end = time.monotonic() + EXIT_SECONDS
    for worker in workers:
        worker.join(max(0, end - time.monotonic()))
        worker.kill()


def _end_workers_at_exit(_: object = None) -> None:
    # Before multiprocessing waits for its daemons, in this process and in those that are forked from it.
    multiprocessing.util.Finalize(None, _end_workers, exitpriority=100)


_end_workers_at_exit()
multiprocessing.util.register_after_fork(init_worker, _end_workers_at_exit)


@contextmanager
def catch_stop_signals() -> Iterator[Callable[[], KeyboardInterrupt | None]]:
    """Inside, the first of `STOP_SIGNALS` is noted and not raised, so that what has begun can be finished.

    Yields:
        A function that returns what to raise for the first signal that came, None while none has.
    """
    came: list[KeyboardInterrupt] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(stop_by(number))

    with stop_signals_to(note):
        yield lambda: came[0] if came else None


def all_reduce_sum(accelerator: Accelerator, *values: float) -> list[float]:
    """The sum of each value over all processes, the same on all of them."""
    if accelerator.num_processes == 1:
        return list(values)
    return accelerator.reduce(torch.tensor(values, dtype=torch.float32, device=accelerator.device), 'sum').tolist()


def device_name(device: torch.device | str) -> str:
    """What a device is called by its maker."""
    device = torch.device(device)
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names and device.type == 'cpu' else f'{platform.machine()} {device.type}'


class StepFlags:
    """Flags of each training step, summed over all processes, which no process waits for.

    What a step found lies on the device; reading it at once would make the host wait for all that it has issued. On an
    accelerator the flags are on their way to the host while the next step is issued, and are read one step late. On a
    CPU nothing is issued ahead, and they are read at once.

    Args:
        accelerator: Knows the processes and the device.
        delay: Steps until the flags of a step are read; by default 0 on a CPU, and else 1.
    """

    def __init__(self, accelerator: Accelerator, delay: int | None = None):
        self.accelerator = accelerator
        self.delay = int(accelerator.device.type != 'cpu') if delay is None else delay
        self._pending: list[tuple[int, torch.Tensor, torch.Event | None]] = []

    def push(self, step: int, *flags: torch.Tensor | bool) -> None:
        """Send the flags of a step on their way: scalars on the device, or of the host."""
        device = self.accelerator.device
        values = torch.stack([
            flag.float() if isinstance(flag, torch.Tensor) else torch.full((), float(flag), device=device)
            for flag in flags])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, 'sum')
        event = None
        if device.type != 'cpu':
            # Pinned memory, which the device writes by itself; into other memory the host would have to wait.
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values, event = pinned.copy_(values, non_blocking=True), torch.Event(device)
            event.record()
        self._pending.append((step, values, event))

    def due(self, is_last: bool = False) -> Iterator[tuple[int, list[float]]]:
        """The steps whose flags are to be read now, with the sums of their flags; with `is_last`, all that are left."""
        while len(self._pending) > (0 if is_last else self.delay):
            step, values, event = self._pending.pop(0)
            if event is not None:
                event.synchronize()
            yield step, values.tolist()
