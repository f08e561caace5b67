"""Checkpoints of a training run: all that it takes to go on with the same bits.

A checkpoint is written atomically, and the last few are kept. It is loaded with `weights_only`. It belongs to
settings that decide the weights; a run with others is refused, except that the number of processes may change, with
which batch size and accumulation may.
"""

import argparse
import io
import random
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from collections.abc import Callable, Iterator

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..base.checksum import check_checksum, footer
from ..base.console import info, warning
from ..base.errors import InputError, Terminated
from ..base.files import write_atomic
from ..data.fingerprint import dataset_fingerprint
from ..store.base import StoreReader
from ..store.remote import check_content, content_of
from .metrics import rank_of
from .sharding import load_whole_state, local, whole_state
from .task import SparseLogitTask

__all__ = ['FREE_FLAGS', 'TrainState', 'fixed_settings', 'is_finite', 'random_state', 'set_random_state']

# Flags that may change between a run and its resumption: none of them affects the weights. Data and store may move; it
# is their content that is compared.
FREE_FLAGS = {
    'workers', 'log_interval', 'checkpoint_hist', 'recovery_interval', 'val_interval', 'validation_batch_size',
    'config', 'output', 'experiment', 'teacher', 'teacher_checkpoint', 'class_embeddings', 'teacher_compile', 'quiet',
    'dataset', 'val_dataset', 'val_split', 'logits', 'log', 'keep_epochs', 'store_cache', 'push_to_hub', 'hub_private',
    'hub_license', 'grad_checkpointing',
}

# What every checkpoint holds.
ALL_ENTRIES = (
    'epoch', 'samples', 'history', 'sums', 'random', 'world_size', 'workers', 'images_per_update', 'is_sharded',
    'model', 'optimizer', 'scheduler', 'scaler', 'settings', 'store')

# What makes up an update on one number of processes, and may be made up otherwise on another.
PER_PROCESS = ('batch_size', 'grad_accum_steps')

# What is compared by content, whose hashes tell nobody anything.
CONTENTS = {'data': 'other images or labels in --dataset', 'store': 'another store, or none, in --logits'}


def fixed_settings(
        args: argparse.Namespace,
        train_set: datasets.Dataset | datasets.IterableDataset,
        store: StoreReader | None,
) -> dict[str, Any]:
    """What a run cannot change when it is resumed: flags that affect the weights, and the content of data and store."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    # A stream is compared as it comes, sample by sample.
    settings['data'] = None if args.streaming else dataset_fingerprint(train_set, args.input_key, args.target_key)
    settings['store'] = store.manifest.identity if store else None
    return settings


class TrainState:
    """Everything that a checkpoint holds, and nothing else. All processes call its methods together.

    Args:
        folder: The run's.
        args: The flags of the trainer.
        settings: `fixed_settings` of the run; a checkpoint of others is refused.
        store: What the student learns from.
        accelerator: Knows the processes.
        check_owner: Raises where another launch has taken the folder over, and nothing may be written there.

    Attributes:
        epoch: Epochs that are finished.
        update: Updates of the epoch after them.
        history: Metrics of the finished epochs.
        sums: Sums over the updates of this epoch: the task's losses and the gradient norm, [4] or [6].
    """

    def __init__(
            self,
            folder: Path,
            args: argparse.Namespace,
            settings: dict[str, Any],
            store: StoreReader | None,
            accelerator: Accelerator,
            check_owner: Callable[[], None] = lambda: None,
    ):
        self.folder = folder
        self.args = args
        self.settings = settings
        self.store = store
        self.accelerator = accelerator
        self.check_owner = check_owner
        self.epoch = self.update = 0
        self.history: list[dict[str, float]] = []
        self._checkpoint = self._find()

    def _find(self) -> dict[str, Any] | None:
        """The last checkpoint of the run, before anything is built that it may not fit.

        Raises:
            InputError: It belongs to other settings, its store has changed, or the processes find different ones.
        """
        with checkpoint_errors(self.folder):
            checkpoint = last_checkpoint(self.folder, self.settings, self.accelerator.num_processes)
            if self.store is not None and checkpoint is not None:
                check_content(self.store, checkpoint['store'], self.args.epochs + self.args.cooldown_epochs)
        positions = gather_object([checkpoint and (checkpoint['epoch'], checkpoint['samples'])])
        if len(set(positions)) > 1:
            raise InputError(f'the processes find different checkpoints in {self.folder}; --output must be a folder '
                             f'that all machines share')
        return checkpoint

    def resume(
            self,
            task: SparseLogitTask,
            optimizer: torch.optim.Optimizer,
            scheduler: Scheduler,
            images_per_update: int,
    ) -> None:
        """Take over what is trained, and go on from the last checkpoint where there is one.

        Args:
            task: With the student, prepared for the launch.
            optimizer: Of its parameters, likewise.
            scheduler: Of the optimiser.
            images_per_update: Of all processes and accumulated batches together.
        """
        self.task, self.optimizer, self.scheduler = task, optimizer, scheduler
        self.images_per_update = images_per_update
        self.sums = torch.zeros(len(task.losses) + 1, device=self.accelerator.device)
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            # Another seed per rank, so that DropPath masks differ.
            set_seed(self.args.seed + self.accelerator.process_index)
            return
        with checkpoint_errors(self.folder):
            self._restore(checkpoint)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        scheduler, images_per_update = self.scheduler, self.images_per_update
        rank, seed = self.accelerator.process_index, self.args.seed
        world_size, device = self.accelerator.num_processes, self.accelerator.device
        for name, module in self.task.weights().items():
            load_whole_state(module, checkpoint[name])
        load_whole_state(self.optimizer, checkpoint['optimizer'])
        if self.accelerator.scaler is not None and checkpoint['scaler'] is not None:
            self.accelerator.scaler.load_state_dict(checkpoint['scaler'])
        self.epoch, self.history = checkpoint['epoch'], checkpoint['history']
        self.update = checkpoint['samples'] // images_per_update
        is_finished = self.epoch == self.args.epochs + self.args.cooldown_epochs
        info(f'{self.folder} is finished: nothing is left to train' if is_finished else
             f'resuming {self.folder} at epoch {self.epoch}, step {self.update}')
        if changes := what_changes(checkpoint, world_size, images_per_update, self.accelerator.is_fsdp2):
            warning(changes)
        if self.args.streaming and (checkpoint['world_size'], checkpoint['workers']) != (world_size, self.args.workers):
            warning('a stream is shared out over another number of processes or --workers than before: the order of '
                    'images is another one, and some are seen twice or not at all in this epoch')
        if checkpoint['world_size'] == world_size:
            scheduler.load_state_dict(checkpoint['scheduler'])
            self.sums = checkpoint['sums'][rank].to(device)
            set_random_state(dict(enumerate(checkpoint['random'])).get(rank, {}), device)
        else:
            # Means over updates, of which there are others now.
            share = checkpoint['images_per_update'] / images_per_update
            self.sums = sum(checkpoint['sums']).to(device) / checkpoint['world_size'] * share
            seeds = np.random.SeedSequence([seed, self.epoch, self.update, rank])
            set_seed(int(seeds.generate_state(1)[0]))

    def step(self, losses: torch.Tensor, norm: torch.Tensor) -> None:
        """Count an update.

        Args:
            losses: The task's, [3] or [5].
            norm: Norm of the gradients, a scalar; not finite where a gradient scaler skipped the update.
        """
        self.sums += torch.cat([losses, norm.nan_to_num(0., 0., 0.).reshape(1)])
        self.update += 1

    def stopped(self, by: KeyboardInterrupt | None) -> KeyboardInterrupt:
        """What to raise after `save` where a signal has come, to this process or, with None, to another one."""
        by = by or Terminated()
        by.args = (f'epoch {self.epoch}, step {self.update} ({checkpoints_of(self.folder)[-1]})',)
        return by

    def means(self) -> dict[str, float]:
        """Means over the updates of this epoch and all processes."""
        means = self.accelerator.reduce(self.sums / self.update, 'mean').tolist()
        return dict(zip((*self.task.losses, 'grad_norm'), means))

    def end_epoch(self, row: dict[str, float]) -> None:
        """Count an epoch with these metrics."""
        self.history.append(row)
        self.epoch, self.update = self.epoch + 1, 0
        self.sums.zero_()

    def best(self, weights: str) -> tuple[float, float]:
        """The best of the epochs so far by `rank_of`, of a set of weights; accuracy -1 before the first evaluation."""
        return max((rank_of(row, weights) for row in self.history), default=(-1., 0.))

    def save(self) -> None:
        """Write a checkpoint of where the training is."""
        accelerator = self.accelerator
        randoms, sums = gather_object([random_state(accelerator.device)]), gather_object([self.sums.cpu()])
        checkpoint = {
            'epoch': self.epoch, 'samples': self.update * self.images_per_update, 'history': self.history,
            'sums': sums, 'random': randoms, 'world_size': accelerator.num_processes, 'workers': self.args.workers,
            'images_per_update': self.images_per_update,
            **{name: whole_state(module) for name, module in self.task.weights().items()},
            'is_sharded': accelerator.is_fsdp2, 'optimizer': whole_state(self.optimizer),
            'scheduler': self.scheduler.state_dict(), 'settings': self.settings,
            'scaler': None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            'store': None if self.store is None else content_of(self.store),
        }
        if accelerator.is_main_process:
            save_checkpoint(self.folder, checkpoint, self.args.checkpoint_hist, self.check_owner)
        accelerator.wait_for_everyone()


@contextmanager
def checkpoint_errors(folder: Path) -> Iterator[None]:
    """Inside, what a checkpoint lacks, or holds otherwise than `TrainState.save` writes it, is an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # For want of memory, or of another rank, no checkpoint is to blame.
        if isinstance(error, RuntimeError) and (type(error) is not RuntimeError or 'onnection' in str(error)):
            raise
        reason = f'{type(error).__name__} {error}'.strip().splitlines()[0]
        raise InputError(f'the last checkpoint in {folder} is not one of this run ({reason}); delete it to go on from '
                         f'the one before')


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


def save_checkpoint(
        folder: Path,
        state: dict[str, Any],
        keep: int,
        check_owner: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint (an atomic write), and remove all but the last ones.

    Args:
        folder: The run's.
        state: Tensors and plain values, `epoch` and `samples` (of the epoch, seen so far) among them.
        keep: Checkpoints to keep, this one included.
        check_owner: Raises where the folder is another launch's by now.

    Returns:
        The file.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    file = folder / f'checkpoint-{state["epoch"]:06d}-{state["samples"]:012d}.pt'
    write_atomic(file, [buffer.getbuffer(), footer(buffer.getbuffer())], lambda temporary: check_owner())
    for old in checkpoints_of(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return file


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run, the last one last."""
    return sorted(folder.glob('checkpoint-*.pt'))


def last_checkpoint(folder: Path, settings: dict[str, Any], world_size: int) -> dict[str, Any] | None:
    """The last checkpoint of a run, or None where there is none.

    Args:
        folder: The run's.
        settings: What decides the weights; compared with the checkpoint's `settings`.
        world_size: Number of processes; compared with the checkpoint's `world_size`.

    Raises:
        InputError: It cannot be read, or belongs to other settings.
    """
    files = checkpoints_of(folder)
    if not files:
        return None
    remedy = 'delete it to go on from the one before'
    try:
        check_checksum(files[-1])
        state = torch.load(files[-1], map_location='cpu', weights_only=True)
        lacking = [name for name in ALL_ENTRIES if name not in state]
    except InputError as error:
        raise InputError(f'the checkpoint {error}; {remedy}')
    except Exception as error:
        # Foreign pickles fail in as many ways as there are bytes.
        raise InputError(f'the checkpoint {files[-1]} cannot be read ({type(error).__name__}); {remedy}')
    if lacking:
        raise InputError(f'the checkpoint {files[-1]} lacks {", ".join(lacking)}, as of another version of this '
                         f'package; {remedy}')
    before = state['settings']
    # A flag that is newer than the checkpoint was off.
    before |= {name: value for name, value in settings.items() if not value and name not in before}
    processes = state['world_size']
    free = PER_PROCESS if processes != world_size else ()
    other = [CONTENTS.get(key) or f'--{key.replace("_", "-")} was {before.get(key)!r} and is {settings.get(key)!r}'
             for key in {**before, **settings} if before.get(key) != settings.get(key) and key not in free]
    if other:
        raise InputError(f'the run in {folder} was started with other settings ({", ".join(other[:4])}); give the '
                         f'same ones to resume it, or another --experiment')
    return state


def what_changes(state: dict[str, Any], world_size: int, images_per_update: int, is_sharded: bool) -> str | None:
    """A line on what can no longer be identical when a checkpoint goes on with another number of processes, or with a
    model that is sharded where it was whole or the other way round; None where all can be.
    """
    processes, images = state['world_size'], state['images_per_update']
    if processes == world_size:
        was_sharded = state['is_sharded']
        if was_sharded == is_sharded:
            return None
        kinds = {True: 'sharded', False: 'whole on each process'}
        return f'the model was {kinds[was_sharded]} and is {kinds[is_sharded]}: rounding can no longer be identical'
    line = (f'the checkpoint is of {processes} process(es), now there are {world_size}: dropout, drop path and '
            f'rounding can no longer be identical to a run on {processes}')
    if images != images_per_update:
        line += (f', nor can learning rates and the order of images, with {images_per_update} images per update '
                 f'instead of {images}; choose --batch-size and --grad-accum-steps so that they are equal')
    return line


def is_finite(model: nn.Module) -> bool:
    """Whether all weights and statistics of a model are numbers."""
    return all(bool(local(tensor).isfinite().all()) for tensor in model.state_dict().values())
