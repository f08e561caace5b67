"""The training batches of one process: data set or stream, sampler and loader in one."""

import argparse
from contextlib import contextmanager
from collections.abc import Callable, Iterator

import datasets
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..base.errors import InputError, Terminated
from ..base.launch import init_worker
from ..data.classes import check_label_values
from ..data.dataset import SparseLogitDataset, collate
from ..data.sampler import EpochBatchSampler
from ..data.streaming import SparseLogitStream, StreamLoader
from ..data.views import Replay
from ..store.base import StoreReader

__all__ = ['TrainBatches', 'worker_errors']


class TrainBatches:
    """Batches of any epoch, from any update on. An update takes one batch of each process, or several.

    Args:
        args: The flags of the trainer.
        train_set: The training split; of `--streaming` a stream.
        replay: Makes the views.
        store: Whose records go with the views; None for labels alone.
        num_classes: Classes of the student.
        accelerator: Knows the processes.

    Attributes:
        size: Height and width of the views.
        num_samples: Images of the split, or of the store that a stream is read with.
        images_per_update: Of all processes and accumulated batches together.
        updates_per_epoch: Whole updates of an epoch.

    Raises:
        InputError: The data set lacks a column, or is smaller than one update.
    """

    def __init__(
            self,
            args: argparse.Namespace,
            train_set: datasets.Dataset | datasets.IterableDataset,
            replay: Replay,
            store: StoreReader | None,
            num_classes: int,
            accelerator: Accelerator,
    ):
        rank, world_size = accelerator.process_index, accelerator.num_processes
        num_epochs = args.epochs + args.cooldown_epochs
        stored_epochs = store.manifest.stored_epochs if store else None
        columns = args.input_key, args.target_key, args.key
        # A generator of its own: a loader draws a seed whenever it starts, and a resumed epoch starts once more.
        options = dict(
            num_workers=args.workers, collate_fn=collate, generator=torch.Generator(),
            persistent_workers=args.workers > 0, pin_memory=accelerator.device.type == 'cuda',
            worker_init_fn=init_worker)
        self.store = store
        self.num_classes = num_classes
        self.size = tuple(replay.config.input_size[-2:])
        self.batches_per_update = args.grad_accum_steps
        if args.streaming:
            stream = SparseLogitStream(
                train_set, replay, store, *columns, args.seed, rank=rank, world_size=world_size,
                store_epochs=stored_epochs)
            self.num_samples = store.manifest.num_samples
            self.loader = self.sampler = StreamLoader(
                stream, self.num_samples // (args.batch_size * world_size), num_epochs, batch_size=args.batch_size,
                **options)
        else:
            data = SparseLogitDataset(train_set, replay, store, *columns)
            self.num_samples = len(data)
            self.sampler = EpochBatchSampler(
                self.num_samples, args.batch_size, args.seed, rank, world_size, stored_epochs, args.views_per_image,
                data.pairing, num_epochs)
            self.loader = DataLoader(data, batch_sampler=self.sampler, **options)
        # The labels of a stream cannot be checked before they come.
        self._checks_labels = args.streaming and args.alpha < 1
        self.images_per_update = args.batch_size * world_size * self.batches_per_update
        self.updates_per_epoch = len(self.sampler) // self.batches_per_update
        if not self.updates_per_epoch:
            raise InputError(f'the data set has {self.num_samples} samples, fewer than one update of '
                             f'{self.images_per_update}; choose a smaller --batch-size or --grad-accum-steps')

    def epoch(
            self,
            epoch: int,
            first_update: int = 0,
            stop: Callable[[], BaseException | None] = lambda: None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The batches of an epoch, once its records are there.

        Args:
            epoch: Epoch of the training, from 0.
            first_update: The update to begin with.
            stop: What to raise where the training is to stop while it waits for the store.

        Returns:
            What `collate` makes of the samples of one batch.

        Raises:
            InputError: The records do not come, an image or a record is damaged, or a label is out of range.
        """
        self.sampler.set_epoch(epoch, first_update * self.batches_per_update)
        if self.store is not None:
            self.store.prefetch(*self.sampler.epochs_to_read(epoch))
            if not self.store.wait(lambda: stop() is not None):
                raise stop() or Terminated
        batches = iter(self.loader)
        return map(self._checked, batches) if self._checks_labels else batches

    def _checked(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        check_label_values(batch['label'].numpy(), self.num_classes, 'a batch of --train-split')
        return batch


@contextmanager
def worker_errors(store: StoreReader | None) -> Iterator[None]:
    """Inside, a loader worker that is ended by SIGBUS is an `InputError`, which names the shard where it is one.

    torch raises it wherever the main process is just then. The worker used memory that is not there: shared memory is
    full, or a file that it maps was cut short.
    """
    try:
        yield
    except RuntimeError as error:
        if 'DataLoader worker' not in str(error):
            raise
        if store is not None:
            store.check_files(store.manifest.stored_epochs)
        if 'Bus error' not in str(error):
            raise
        raise InputError('a loader worker was ended by a bus error: shared memory is full, or a file that it reads was '
                         'cut short; give the machine more (docker run --shm-size), or fewer --workers') from None
