"""Data set, sampler and loader of a store in one, for loops that are not this project's own.

What wraps loaders or makes new ones of them asks for different things: Lightning for a `DistributedSampler` as the
loader's sampler, Accelerate for a loader that says it is shared out, the Trainer of transformers for `set_epoch` on the
loader or its batch sampler. `StoreLoader` has all of them. Where nobody calls `set_epoch`, each pass is the next epoch.
"""

from pathlib import Path
from typing import Any
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from ..base.errors import InputError
from ..base.launch import init_worker
from ..store.base import StoreReader
from .dataset import SparseLogitDataset, collate
from .opening import open_store
from .sampler import EpochBatchSampler, EpochSampler
from .sources import Source, as_split

__all__ = ['StoreLoader', 'create_loader']


class StoreLoader(DataLoader):
    """The batches of one rank, see `create_loader`.

    Args:
        data: The views of a store.
        batches: Their order.
        options: Of `torch.utils.data.DataLoader`.
    """
    # Accelerate would share out the batches of each rank once more.
    _is_accelerate_prepared = True

    def __init__(self, data: SparseLogitDataset, batches: EpochBatchSampler, **options: Any):
        super().__init__(
            data, sampler=EpochSampler(batches), batch_size=batches.batch_size, drop_last=True, **options)
        # In place of torch's own, which nobody could tell the epoch.
        object.__setattr__(self, 'batch_sampler', batches)

    def __repr__(self) -> str:
        batches = self.batch_sampler
        return (f'StoreLoader({len(self):,} batches of {batches.batch_size} for rank {batches.rank} of '
                f'{batches.world_size}, next is epoch {batches.next_epoch}, of {self.dataset})')

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        store = self.dataset.store
        store.prefetch(*self.batch_sampler.epochs_to_read(self.batch_sampler.next_epoch))
        store.wait()
        return super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass, as a run that is resumed does."""
        self.batch_sampler.set_epoch(epoch)


def create_loader(
        store: StoreReader | str | Path,
        dataset: Source | str | Path,
        batch_size: int,
        *,
        split: str | None = None,
        seed: int = 0,
        views_per_image: int = 1,
        image_column: str | None = None,
        label_column: str | None = None,
        key_column: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        num_workers: int = 0,
        **options: Any,
) -> StoreLoader:
    """A loader of a store's views with their records, in any loop.

    Each pass is the next epoch, in another order and with other views, unless `set_epoch` was called; after its last
    epoch the store begins again with its first one, in another order. Ranks are shared out here: nothing need be
    prepared. An incomplete last batch is left out.

    Args:
        store: A store, or where it is: a folder, or `hf://datasets/ORG/NAME`.
        dataset: The images that it was filled from: a `datasets.Dataset`, or its name or folder, see `load_split`.
        batch_size: Samples per batch of one rank.
        split: Where the data set is named, its split.
        seed: Seed of the order.
        views_per_image: Views of an image in a batch, which is decoded once for all of them.
        image_column: The image column; found by its usual names by default.
        label_column: The label column, likewise; without one labels are -1.
        key_column: The column of keys; by default the store's.
        rank: This rank; by default that of `torch.distributed` when an epoch begins, and 0 without it.
        world_size: Number of ranks, likewise.
        num_workers: Loader processes; they stay for all epochs.
        options: More of `torch.utils.data.DataLoader`.

    Returns:
        A `DataLoader` of batches: `view` uint8 [B, 3, H, W], `label` and `index` int64 [B], `record` uint8 [B, width],
        of mixed views also `label2` int64 [B] and `lam` float32 [B]. `store.codec.decode(batch['record'])` are the
        teacher's `SparseTargets`.

    Raises:
        InputError: The store lacks shards, or its views are not those that this machine makes; the data set is not the
            one of the store, is a stream, or is smaller than one batch of all ranks.
    """
    replay = None
    if isinstance(store, str | Path):
        store, replay = open_store(store)
    dataset = as_split(dataset, split)
    if not hasattr(dataset, '__len__'):
        raise InputError('create_loader needs the images in any order, which a stream does not give; load the data set '
                         'without streaming')
    data = SparseLogitDataset(dataset, replay, store, image_column, label_column, key_column)
    stored = store.manifest.stored_epochs
    if missing := store.missing(stored):
        raise InputError(f'the store {store.path} lacks {len(missing)} shards, the first of epoch {missing[0][0]}; '
                         f'fill it with fill_store or timm-tinyvit fill first')
    batches = EpochBatchSampler(
        len(data), batch_size, seed, rank, world_size, stored, views_per_image, data.pairing)
    options = dict(
        collate_fn=collate, worker_init_fn=init_worker, persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(), generator=torch.Generator()) | options
    return StoreLoader(data, batches, num_workers=num_workers, **options)
