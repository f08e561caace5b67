"""MappedEpoch: records of one epoch by row, from shards that are mapped into memory when they are first needed.

A shard is checked whole when it is mapped, and never again. There is no index: where a record lies follows from its
row.
"""

from pathlib import Path

import numpy as np

from .shard import ShardFormat, shard_name

__all__ = ['MAX_MAPS', 'MappedEpoch']

# Half of the maps that Linux allows a process.
MAX_MAPS = 1 << 15


class MappedEpoch:
    """The shards of an epoch in memory.

    Args:
        shard_format: The format of the store's shards.
        folder: The folder of the epoch.
        epoch: Its number.
    """

    def __init__(self, shard_format: ShardFormat, folder: Path, epoch: int):
        self.epoch = epoch
        self._format = shard_format
        self._folder = folder
        self._shards: dict[int, memoryview] = {}

    def __len__(self) -> int:
        """Shards that are mapped."""
        return len(self._shards)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Records, uint8 [n, width], of rows of the epoch, int64 [n].

        Raises:
            IndexError: The epoch has no such row.
            InputError: A shard is missing or damaged.
        """
        width = self._format.manifest.record_width
        shards, rows = np.divmod(rows, self._format.manifest.shard_size)
        shards, starts = shards.tolist(), (rows * width).tolist()
        held = self._shards
        # One by one, as a random batch touches almost as many shards as it has records.
        try:
            parts = [held[shard][start:start + width] for shard, start in zip(shards, starts)]
        except KeyError:
            self._map(set(shards))
            parts = [held[shard][start:start + width] for shard, start in zip(shards, starts)]
        records = np.frombuffer(bytearray().join(parts), dtype=np.uint8)
        if len(records) != len(parts) * width:
            raise IndexError(f'rows are beyond the last one of epoch {self.epoch}')
        return records.reshape(-1, width)

    def _map(self, shards: set[int]) -> None:
        if len(self._shards) > MAX_MAPS:
            self._shards.clear()
        for shard in sorted(shards - self._shards.keys()):
            if not 0 <= shard < self._format.manifest.num_shards:
                raise IndexError(f'epoch {self.epoch} has no shard {shard}')
            self._shards[shard] = self._format.map(self._folder / shard_name(shard), self.epoch, shard)
