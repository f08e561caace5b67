"""The processes of one launch, as accelerate made them."""

import os
import sys
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from .errors import InputError

__all__ = ['create_accelerator', 'progress_seconds']

PRECISIONS = {None: 'no', 'bfloat16': 'bf16', 'float16': 'fp16'}


def create_accelerator(amp_dtype: str | None = None) -> Accelerator:
    """An accelerator over all processes that were launched, on the accelerators of this machine or else its CPU.

    Args:
        amp_dtype: Autocast to `bfloat16` or `float16`.

    Raises:
        InputError: More processes were launched than work together.
    """
    # Without `cpu` accelerate makes no process group on a machine that has no accelerator: every process would take
    # itself for the only one.
    # Ranks wait while one downloads the data, or has more shards to fill than the others.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision=PRECISIONS[amp_dtype], kwargs_handlers=[patience])
    launched = int(os.environ.get('WORLD_SIZE', '1'))
    if accelerator.num_processes != launched:
        raise InputError(
            f'{launched} processes were launched and {accelerator.num_processes} work together; on a machine without '
            f'GPUs launch them with `accelerate launch --multi_gpu --num_processes {launched}`, without --cpu')
    return accelerator


def progress_seconds() -> float:
    """Seconds between two drawings of a progress bar: few where it moves, many where each is a line of a log file."""
    return 0.1 if sys.stderr.isatty() else 30.
