"""MappedEpoch: records of one epoch by row, from shards that are mapped into memory when they are first needed.

A shard is checked whole when it is mapped, and never again. There is no index: where a record lies follows from its
row. A batch touches hundreds of shards, so that nothing here is done shard by shard but the mapping.
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
        # Of each shard the address of its records, 0 as long as it is not mapped.
        self._addresses = np.zeros(shard_format.manifest.num_shards, dtype=np.int64)
        self._memory, self._first_address = np.empty(0), 0

    def __len__(self) -> int:
        """Shards that are mapped."""
        return len(self._shards)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Records, uint8 [n, width], of rows of the epoch, int64 [n], which must be rows of the store.

        Raises:
            InputError: A shard is missing or damaged.
        """
        shards, rows = np.divmod(rows, self._format.manifest.shard_size)
        addresses = self._addresses[shards]
        if not addresses.all():
            self._map(shards)
            addresses = self._addresses[shards]
        width = self._format.manifest.record_width
        return self._memory[addresses - self._first_address + rows * width].view(np.uint8).reshape(-1, width)

    def _map(self, shards: np.ndarray) -> None:
        if len(self._shards) > MAX_MAPS:
            self._shards.clear()
            self._addresses[:] = 0
        new = {
            shard: self._format.map(self._folder / shard_name(shard), self.epoch, shard)
            for shard in np.unique(shards[self._addresses[shards] == 0]).tolist()}
        # Only now, as a bad shard may be among them.
        self._shards.update(new)
        for shard, mapped in new.items():
            self._addresses[shard] = np.frombuffer(mapped, dtype=np.uint8).ctypes.data
        self._span()

    def _span(self) -> None:
        """See all maps as one array with a record at every byte, so that a batch from any shards is one gather.

        Between the maps there is nothing to read, but the address of a record comes from a map that is held.
        """
        width = self._format.manifest.record_width
        mapped = np.flatnonzero(self._addresses)
        first, last = (mapped[place(self._addresses[mapped])] for place in (np.argmin, np.argmax))
        self._first_address = self._addresses[first]
        size = self._addresses[last] - self._first_address + len(self._shards[last]) - width + 1
        start = np.frombuffer(self._shards[first], dtype=np.uint8, count=width).view(f'V{width}')
        self._memory = np.lib.stride_tricks.as_strided(start, (size,), (1,), writeable=False)
