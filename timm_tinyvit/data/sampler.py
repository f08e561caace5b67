"""The order of training: batches of (epoch, row) pairs, the same whatever rank or worker makes the samples.

An epoch follows the one before by itself, unless `set_epoch` says which comes next, as trainers do.
"""

from itertools import chain
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import distributed
from torch.utils.data import BatchSampler, DistributedSampler

from ..base.errors import InputError
from ..store.manifest import stored_epoch
from .dataset import EpochRow
from .pairing import Pairing

__all__ = ['EpochBatchSampler', 'EpochSampler']


class EpochBatchSampler(BatchSampler):
    """Batches of (epoch, row) pairs for one rank: a seeded permutation per epoch, from any batch on.

    The permutation is cut into batches of all ranks together, so that a rank's share depends on nothing else.
    An incomplete last batch is dropped. With several views per image, so many epochs share a permutation: each shows
    another part of the images, and every image the views of all of these epochs, in one batch (after FKD, ECCV 2022).
    Where views are mixed, the permutation is one of the pairs of the epoch, and both sides stand in one batch.

    Args:
        num_samples: Rows of the data set.
        batch_size: Samples per batch of one rank.
        seed: Seed of the order.
        rank: This rank; by default that of `torch.distributed` when an epoch begins, and 0 without it.
        world_size: Number of ranks, likewise.
        store_epochs: Epochs of the store; training epoch e uses the one at e modulo their number. None for e itself.
        views_per_image: Views of an image in a batch, which is decoded once for all of them.
        pairing: The pairs of a data set whose views are mixed, its `pairing`.
        num_epochs: Training epochs, after which none comes next.

    Raises:
        InputError: The data set is smaller than one batch of all ranks, or a batch is no multiple of the views or
            pairs; or there are both pairs and several views, or more views than epochs of the store.
    """

    def __init__(
            self,
            num_samples: int,
            batch_size: int,
            seed: int,
            rank: int | None = None,
            world_size: int | None = None,
            store_epochs: Sequence[int] | None = None,
            views_per_image: int = 1,
            pairing: Pairing | None = None,
            num_epochs: int | None = None,
    ):
        if batch_size % views_per_image:
            raise InputError(
                f'a batch of {batch_size} does not hold {views_per_image} views of each of its images; choose a '
                f'--batch-size that is a multiple of --views-per-image')
        if store_epochs is not None and views_per_image > len(store_epochs):
            raise InputError(
                f'the store has {len(store_epochs)} epochs, so that {views_per_image} views of an image would show '
                f'some twice in a batch; choose --views-per-image up to {len(store_epochs)}, or fill more epochs')
        if pairing is not None and views_per_image > 1:
            raise InputError('Mixup and CutMix have other pairs in each epoch, so that images share no batch in '
                             'several; leave --views-per-image out')
        if pairing is not None and batch_size % 2:
            raise InputError(f'a batch of {batch_size} does not hold both sides of each of its pairs; choose an even '
                             f'--batch-size for Mixup and CutMix')
        self.num_samples = num_samples
        self.batch_size = batch_size
        # What others ask a batch sampler: incomplete batches are left out.
        self.drop_last = True
        self.seed = seed
        self._rank, self._world_size = rank, world_size
        self.store_epochs = store_epochs
        self.views_per_image = views_per_image
        self.pairing = pairing
        self.num_epochs = num_epochs
        self.epoch = 0
        self.start = 0
        self._is_begun = False
        if not len(self):
            raise InputError(
                f'the data set has {num_samples} samples, fewer than one batch of {batch_size} on {self.world_size} '
                f'process(es); choose a smaller --batch-size')

    @property
    def rank(self) -> int:
        """This rank."""
        return _of_launch(self._rank, distributed.get_rank, 0)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return _of_launch(self._world_size, distributed.get_world_size, 1)

    @property
    def next_epoch(self) -> int:
        """The training epoch of the next iteration."""
        return self.epoch + self._is_begun

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the training epoch, and the batch to begin with, of the next iteration; later ones go on from there.
        """
        self.epoch = epoch
        self.start = start
        self._is_begun = False

    def epochs_to_read(self, epoch: int) -> tuple[list[int], list[int]]:
        """Epochs of the store that a training epoch reads, and those that come next, for `StoreReader.prefetch`."""
        first_epoch = epoch - epoch % self.views_per_image
        next_epoch = first_epoch + self.views_per_image
        is_last = self.num_epochs is not None and next_epoch >= self.num_epochs
        return self._stored(first_epoch), [] if is_last else self._stored(next_epoch)

    def __len__(self) -> int:
        """Batches of one whole epoch."""
        return self.num_samples // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[EpochRow]]:
        # Here, with the first batch: where torch starts workers it asks for an iterator that it never uses.
        if self._is_begun:
            self.set_epoch(self.next_epoch)
        self._is_begun = True
        part = self.epoch % self.views_per_image
        first_epoch = self.epoch - part
        epochs = self._stored(first_epoch)
        # Images stand alone, or in pairs.
        group = 1 if self.pairing is None else 2
        order = np.random.Generator(np.random.PCG64([self.seed, first_epoch])).permutation(self.num_samples // group)
        num_groups = self.batch_size // (group * self.views_per_image)
        length, rank, world_size = len(self), self.rank, self.world_size
        for batch in range(self.start, length):
            first = ((part * length + batch) * world_size + rank) * num_groups
            rows = order[first:first + num_groups]
            if self.pairing is not None:
                rows = self.pairing.members(epochs[0], rows).ravel()
            yield [(epoch, row) for row in rows.tolist() for epoch in epochs]

    def _stored(self, first_epoch: int) -> list[int]:
        """Epochs of the store that the training epochs from this one on use together."""
        return [stored_epoch(self.store_epochs, epoch)
                for epoch in range(first_epoch, first_epoch + self.views_per_image)]


class EpochSampler(DistributedSampler):
    """The (epoch, row) pairs of an `EpochBatchSampler` one by one, for whoever asks a loader for its sampler.

    Lightning leaves the order of a loader alone where this is a `DistributedSampler`, and tells it the epoch.
    """

    def __init__(self, batches: EpochBatchSampler):
        super().__init__(range(batches.num_samples), num_replicas=1, rank=0, drop_last=True)
        self.batches = batches

    def __iter__(self) -> Iterator[EpochRow]:
        return chain.from_iterable(self.batches)

    def __len__(self) -> int:
        return len(self.batches) * self.batches.batch_size

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)


def _of_launch(given: int | None, ask: Callable[[], int], alone: int) -> int:
    """A number that is given, or else what `torch.distributed` says, where it has been set up."""
    if given is not None:
        return given
    return ask() if distributed.is_available() and distributed.is_initialized() else alone
