"""Checkpoints of a training run: all that it takes to go on with the same bits.

A checkpoint is written aside and renamed, and the last few are kept. It is loaded with `weights_only`. It belongs to
settings that decide the weights; a run with others is refused, except that the number of processes may change, with
which batch size and accumulation may.
"""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..base.errors import InputError
from ..base.files import write_aside
from .sharding import local

__all__ = ['is_finite', 'last_checkpoint', 'random_state', 'save_checkpoint', 'set_random_state', 'what_changes']

# What makes up an update on one number of processes, and may be made up otherwise on another.
PER_PROCESS = ('batch_size', 'grad_accum_steps')

# What is compared by content, whose sums tell nobody anything.
CONTENTS = {'data': 'other images or labels in --dataset', 'store': 'another store, or none, in --logits'}


def random_state(device: torch.device) -> dict[str, Any]:
    """State of this rank's generators, of types that load with `weights_only`."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': (kind, keys.tolist(), position, has_gauss, gauss),
        'torch': torch.get_rng_state(),
        'device': device.type,
        device.type: None if device.type == 'cpu' else torch.get_device_module(device).get_rng_state(device),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put this rank's generators back.

    Raises:
        InputError: The state is of another kind of device, or not one.
    """
    if state.get('device', device.type) != device.type:
        raise InputError(
            f'the checkpoint holds the random state of a {state["device"]} device, this one is {device.type}; go on '
            f'where it was written, or start another --experiment with --initial-checkpoint')
    try:
        random.setstate(state['python'])
        np.random.set_state((state['numpy'][0], np.array(state['numpy'][1], dtype=np.uint32), *state['numpy'][2:]))
        torch.set_rng_state(state['torch'])
        if device.type != 'cpu':
            torch.get_device_module(device).set_rng_state(state[device.type], device)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f'the random state of the checkpoint cannot be restored ({error!r}); delete that checkpoint to go on from '
            f'the one before')


def save_checkpoint(folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint aside, rename it, and remove all but the last ones.

    Args:
        folder: The run's.
        state: Tensors and plain values, `epoch` and `samples` (of the epoch, seen so far) among them.
        keep: Checkpoints to keep, this one included.

    Returns:
        The file.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    file = folder / f'checkpoint-{state["epoch"]:06d}-{state["samples"]:012d}.pt'
    write_aside(file, buffer.getbuffer())
    for old in sorted(folder.glob('checkpoint-*.pt'))[:-keep]:
        old.unlink(missing_ok=True)
    return file


def last_checkpoint(folder: Path, settings: dict[str, Any], world_size: int) -> dict[str, Any] | None:
    """The last checkpoint of a run, or None where there is none.

    Args:
        folder: The run's.
        settings: What decides the weights; compared with the checkpoint's `settings`.
        world_size: Number of processes; compared with the checkpoint's `world_size`.

    Raises:
        InputError: It cannot be read, or belongs to other settings.
    """
    files = sorted(folder.glob('checkpoint-*.pt'))
    if not files:
        return None
    try:
        state = torch.load(files[-1], map_location='cpu', weights_only=True)
        there, processes = state['settings'], state['world_size']
    except Exception as error:
        # Damaged archives and foreign pickles fail in as many ways as there are bytes.
        raise InputError(f'the checkpoint {files[-1]} cannot be read ({type(error).__name__}); delete it to go on '
                         f'from the one before')
    free = PER_PROCESS if processes != world_size else ()
    other = [CONTENTS.get(key) or f'{key} {there.get(key)!r} there and {settings.get(key)!r} here'
             for key in {**there, **settings} if there.get(key) != settings.get(key) and key not in free]
    if other:
        raise InputError(f'the run in {folder} was started with other settings ({", ".join(other[:4])}); give the '
                         f'same ones to resume it, or another --experiment')
    return state


def what_changes(state: dict[str, Any], world_size: int, images_per_update: int, is_sharded: bool) -> str | None:
    """A line on what can no longer be identical when a checkpoint goes on with another number of processes, or with a
    model that is sharded where it was whole or the other way round; None where all can be.
    """
    there, images = state['world_size'], state['images_per_update']
    if there == world_size:
        # Checkpoints from before there were sharded runs do not say.
        was_sharded = state.get('is_sharded', False)
        if was_sharded == is_sharded:
            return None
        kinds = {True: 'sharded', False: 'whole on each process'}
        return f'the model was {kinds[was_sharded]} and is {kinds[is_sharded]}: rounding can no longer be identical'
    line = (f'{there} process(es) there, {world_size} here: dropout, drop path and rounding can no longer be identical '
            f'to a run on {there}')
    if images != images_per_update:
        line += (f', nor can learning rates and the order of images, with {images_per_update} images per update '
                 f'instead of {images}; --batch-size and --grad-accum-steps could make them equal')
    return line


def is_finite(model: nn.Module) -> bool:
    """Whether all weights and statistics of a model are numbers."""
    return all(bool(local(tensor).isfinite().all()) for tensor in model.state_dict().values())
