"""ShardStore: a store whose shards lie in a folder, or are brought there; what local and remote stores share.

A shard is mapped into memory when one of its rows is first asked for; it is checked whole then, and never again. There
is no index: where a record lies follows from its row.

A shard that somebody writes anew where it lies, or cuts short, would be read with records that were never checked, or
end the process with SIGBUS. So files are looked at now and then, and one that has changed is mapped and checked again.
"""

import time
from abc import abstractmethod
from pathlib import Path
from weakref import WeakSet
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ..base.errors import InputError
from .base import StoreReader
from .digests import decode_digests, digests_name
from .keys import FILE_NAME, KeyIndex
from .manifest import Manifest
from .projection import PROJECTION_NAME, Projection
from .shard import ShardFormat, epoch_name, file_status, shard_name

__all__ = ['ShardStore']

# Half of the memory maps that Linux allows a process.
MAX_MAPS = 1 << 15
MAX_MAPPED_EPOCHS = 8
NUM_VERIFIED = 1024
# What is read takes this many times as long, at least, as looking whether files have changed.
LOOK_SHARE = 20

# All stores of this process, which share its maps.
_stores: WeakSet['ShardStore'] = WeakSet()


class ShardStore(StoreReader):
    """A store of one teacher.

    Args:
        path: Where it is, see `StoreReader`.
        folder: Where its shards are on this disk.
        manifest: Its manifest.
    """

    def __init__(self, path: Path | str, folder: Path, manifest: Manifest):
        self.path = path
        self.folder = folder
        self.manifest = manifest
        self.codec = manifest.create_codec()
        self._format = ShardFormat(manifest)
        # Records of mapped shards by epoch and shard; the epoch that was read last stands last.
        self._maps: dict[int, dict[int, memoryview]] = {}
        # The files of mapped shards, and what they looked like before they were mapped.
        self._files: dict[int, dict[int, tuple[str, tuple[int, ...] | None]]] = {}
        self._next_look = 0.
        _stores.add(self)

    @abstractmethod
    def _stored(self, epoch: int) -> list[int]:
        """The shards of an epoch that the store has."""

    def shard_path(self, epoch: int, shard: int) -> Path:
        """The file of a shard on this disk."""
        return self.folder / epoch_name(epoch) / shard_name(shard)

    def _have(self, name: str) -> None:  # noqa: B027  it lies in the folder, or nowhere
        """Bring one of the other files of the store, where it has it, into the folder."""

    def missing(self, epochs: Iterable[int]) -> list[tuple[int, int]]:
        pairs = []
        for epoch in epochs:
            stored = set(self._stored(epoch))
            pairs += [(epoch, shard) for shard in range(self.manifest.num_shards) if shard not in stored]
        return pairs

    def file_size(self, shard: int) -> int:
        """Bytes of the file of a shard."""
        return self._format.file_size(shard)

    def has_keys(self) -> bool:
        """Whether the keys of its samples are there."""
        self._have(FILE_NAME)
        return KeyIndex.exists(self.folder)

    def open_keys(self) -> KeyIndex:
        self._have(FILE_NAME)
        return KeyIndex.open(self.folder, self.manifest)

    def open_projection(self) -> Projection | None:
        """What projects the teacher's vectors; None where nothing does.

        Raises:
            InputError: The file is missing, damaged or another one.
        """
        if self.manifest.features.get('projection'):
            self._have(PROJECTION_NAME)
        return Projection.open(self.folder, self.manifest)

    def read_digests(self, shard: int) -> np.ndarray | None:
        """Digests, int64 [rows], of the images of a shard's rows; None where the store has none.

        Raises:
            InputError: Their file is damaged.
        """
        self._have(digests_name(shard))
        path = self.folder / digests_name(shard)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f'{path} cannot be read: {error.strerror}')
        return decode_digests(data, self.manifest.shard_rows(shard), self.manifest.identity, path)

    def verify(self, epochs: Iterable[int]) -> Iterator[str]:
        for is_there, look in ((self.manifest.key, self.open_keys),
                               (self.manifest.features.get('projection'), self.open_projection)):
            try:
                if is_there:
                    look()
            except InputError as error:
                yield str(error)
        for epoch in epochs:
            if missing := self.missing([epoch]):
                yield (
                    f'the store {self.path} lacks {len(missing)} of the {self.manifest.num_shards} shards of epoch '
                    f'{epoch}, first shard {missing[0][1]}; fill it to the end with timm-tinyvit fill --logits '
                    f'{self.path}')
            for shard in self._stored(epoch):
                yield from self._verify_shard(epoch, shard)

    def _verify_shard(self, epoch: int, shard: int) -> Iterator[str]:
        path, width = self.shard_path(epoch, shard), self.manifest.record_width
        try:
            records = np.frombuffer(self._format.map(path, epoch, shard), dtype=np.uint8).reshape(-1, width)
        except InputError as error:
            yield str(error)
            return
        for start in range(0, len(records), NUM_VERIFIED):
            part = records[start:start + NUM_VERIFIED]
            try:
                self.codec.check(part)
            except ValueError as error:
                first = shard * self.manifest.shard_size + start
                yield (
                    f'{path} holds a bad record among samples {first} to {first + len(part) - 1} ({error}); delete it '
                    f'and fill the store again')

    def read(self, epoch: int, rows: Sequence[int]) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        self.forget_changed()
        maps = self._maps[epoch] = self._maps.pop(epoch, {})
        if len(self._maps) > MAX_MAPPED_EPOCHS:
            self.forget(next(iter(self._maps)))
        width = self.manifest.record_width
        shards, places = np.divmod(rows, self.manifest.shard_size)
        shards, starts = shards.tolist(), (places * width).tolist()
        # Rows are checked where one is not found, and not before: that would be a tenth of the time.
        try:
            parts = [maps[shard][start:start + width] for shard, start in zip(shards, starts)]
        except KeyError:
            maps = self._map(epoch, rows)
            parts = [maps[shard][start:start + width] for shard, start in zip(shards, starts)]
        records = bytearray().join(parts)
        if len(records) != len(parts) * width:
            self._checked(rows)  # what is beyond the last row is cut off
        return np.frombuffer(records, dtype=np.uint8).reshape(len(parts), width)

    def unmapped(self, epoch: int, rows: Sequence[int]) -> list[int]:
        """The shards of these rows of an epoch that are not mapped.

        Raises:
            InputError: There is no such row.
        """
        shards = np.unique(self._checked(rows) // self.manifest.shard_size).tolist()
        maps = self._maps.get(epoch, {})
        return [shard for shard in shards if shard not in maps]

    def forget(self, *epochs: int) -> None:
        """Unmap epochs: as long as one is mapped, the disk that it took is not free."""
        for epoch in epochs:
            self._maps.pop(epoch, None)
            self._files.pop(epoch, None)

    def forget_changed(self, or_removed: bool = False, at_once: bool = False) -> None:
        """Unmap the shards whose files are others now, or have another length or time.

        Args:
            or_removed: Those whose files are gone, too; else they stay readable.
            at_once: Also where the last look was just now.
        """
        if or_removed:
            # One file of an epoch tells, at each call: the disk of a removed one is to be free at once.
            removed = [epoch for epoch, files in self._files.items()
                       if files and file_status(next(iter(files.values()))[0]) is None]
            self.forget(*removed)
        start = time.monotonic()
        if start < self._next_look and not at_once:
            return
        for epoch, files in self._files.items():
            for shard, (path, known) in list(files.items()):
                status = file_status(path)
                if status != known and (status is not None or or_removed):
                    del files[shard], self._maps[epoch][shard]
        end = time.monotonic()
        self._next_look = end + LOOK_SHARE * (end - start)

    def _checked(self, rows: Sequence[int]) -> np.ndarray:
        """Rows, int64 [n], all of which there are."""
        rows = np.asarray(rows, dtype=np.int64)
        outside = rows.view(np.uint64) >= self.manifest.num_samples  # negative ones too
        if outside.any():
            raise InputError(
                f'sample {rows[outside][0]} was asked of a store of {self.manifest.num_samples} samples; '
                f'use the data set that the store was made from')
        return rows

    def _map(self, epoch: int, rows: np.ndarray) -> dict[int, memoryview]:
        """Map the shards of these rows; returns the maps of the epoch."""
        if sum(len(maps) for store in _stores for maps in store._maps.values()) > MAX_MAPS:
            for store in _stores:
                store.forget(*list(store._maps))
        maps = self._maps.setdefault(epoch, {})
        for shard in self.unmapped(epoch, rows):
            path = self.shard_path(epoch, shard)
            # Looked at before, so that a file that takes its place meanwhile is taken for another one.
            status = file_status(path)
            maps[shard] = self._format.map(path, epoch, shard)
            self._files.setdefault(epoch, {})[shard] = str(path), status
        return maps
