"""Filling a store: the teacher looks once at every view of the shards that are missing.

Teacher batches never cross a shard, so that a shard's bytes do not depend on who writes it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from .dataset import Key, SparseLogitDataset, collate
from .errors import InputError
from .launch import progress_seconds
from .sparsifier import create_sparsifier
from .store import LogitStore, Manifest
from .teacher import Teacher

__all__ = ['fill_store']


class _ShardBatches:
    """Teacher batches of (epoch, index) pairs, shard by shard: no batch crosses a shard."""

    def __init__(self, manifest: Manifest, shards: Sequence[tuple[int, int]]):
        self.manifest = manifest
        self.shards = shards
        self.batch_size = manifest.teacher['batch_size']

    def __len__(self) -> int:
        return sum(-(-self.manifest.shard_rows(shard) // self.batch_size) for _, shard in self.shards)

    def __iter__(self) -> Iterator[list[Key]]:
        for epoch, shard in self.shards:
            first = shard * self.manifest.shard_size
            stop = first + self.manifest.shard_rows(shard)
            for start in range(first, stop, self.batch_size):
                yield [(epoch, index) for index in range(start, min(start + self.batch_size, stop))]


def fill_store(
        store: LogitStore,
        teacher: Teacher,
        data: SparseLogitDataset,
        epochs: Sequence[int],
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        show_progress: bool = True,
) -> int:
    """Fill this rank's share of the shards that these epochs lack.

    Args:
        store: The store.
        teacher: Its teacher.
        data: The data set with the store's replay, and no store.
        epochs: Which epochs of the store.
        rank: This rank.
        world_size: Number of ranks.
        num_workers: Loader processes.
        show_progress: Show a bar with views per second and bytes.

    Returns:
        How many views this rank has looked at.

    Raises:
        InputError: An image cannot be decoded, the teacher says NaN, or the disk is full; finished shards stay.
    """
    # By number and not by place in the list: another rank may have written a shard before this one looks.
    shards = [
        (epoch, shard) for epoch, shard in store.missing(epochs)
        if (epoch * store.manifest.num_shards + shard) % world_size == rank
    ]
    batches = _ShardBatches(store.manifest, shards)
    loader = DataLoader(
        data, batch_sampler=batches, num_workers=num_workers, collate_fn=collate,
        pin_memory=teacher.device.type == 'cuda')
    manifest = store.manifest
    sparsifier = create_sparsifier(manifest.sparsifier, manifest.k, manifest.top_p, manifest.seed)
    num_views = sum(store.manifest.shard_rows(shard) for _, shard in shards)
    written = 0
    label = 'teacher' if world_size == 1 else f'teacher (rank 0 of {world_size})'
    with tqdm(
            total=num_views, unit='view', desc=label, disable=not show_progress,
            mininterval=progress_seconds()) as bar:
        stream = iter(loader)
        for epoch, shard in shards:
            rows = store.manifest.shard_rows(shard)
            records: list[np.ndarray] = []
            for _ in range(-(-rows // batches.batch_size)):
                batch = next(stream)
                try:
                    targets = sparsifier(teacher(batch['view']), epoch, batch['index'].tolist())
                except ValueError as error:
                    raise InputError(f'epoch {epoch}, shard {shard}: {error}')
                records.append(store.codec.encode(targets))
                bar.update(len(batch['view']))
            store.write_shard(epoch, shard, np.concatenate(records))
            written += rows * store.manifest.record_width
            bar.set_postfix_str(f'{written / 1e6:.1f} MB')
    return num_views
