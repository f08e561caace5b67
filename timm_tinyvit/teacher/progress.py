"""How far a store is filled, as a bar: by everyone who works on it, not by this process alone."""

import time
from collections.abc import Sequence

from ..base.console import progress
from ..base.text import readable_bytes
from ..store.local import LogitStore
from ..store.object_store import ObjectStore

__all__ = ['StoreProgress']

REFRESH_SECONDS = 5.


class StoreProgress:
    """A bar of views with a rate, the time left and the size on disk; a context manager.

    It counts the shards that are there, whoever wrote them, and the views of the shard that this process has open.

    Args:
        store: The store.
        epochs: The epochs that are asked for.
        shards: The shards of each epoch that are asked for.
        show: Whether there is a bar at all; without one nothing is looked at.
    """

    def __init__(self, store: LogitStore | ObjectStore, epochs: Sequence[int], shards: range, show: bool = True):
        self.store = store
        self.open = 0
        self._missing = {epoch: set(shards) for epoch in epochs} if show else {}
        self._views = 0
        self._grown = (0, 0)  # views and bytes that were added since the start
        self._due = 0.
        for epoch in list(self._missing):
            self._views += self._rows(self._finished(epoch))
        total = len(epochs) * self._rows(shards)
        self._bar = progress(
            show=show, total=total, initial=self._views, desc='teacher', unit='view', unit_scale=total >= 1000,
            smoothing=0)

    def __enter__(self) -> 'StoreProgress':
        return self

    def __exit__(self, *_: object) -> None:
        self._due = 0.
        self.refresh()
        self._bar.close()

    def add(self, views: int) -> None:
        """Count views of the shard that is open in this process."""
        self.open += views
        self._bar.update(views)
        self.refresh()

    def finish(self) -> None:
        """The open shard is on disk, and counted there from now on."""
        self.open = 0

    def refresh(self) -> None:
        """Look at the disk, if the last look is some seconds old."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + REFRESH_SECONDS
        views, size = self._grown
        for epoch in list(self._missing):
            for shard in self._finished(epoch):
                views += self.store.manifest.shard_rows(shard)
                size += self.store.file_size(shard)
        self._grown = views, size
        self._bar.update(self._views + views + self.open - self._bar.n)
        if views:
            # Only what is new was weighed: a store may have a million shards already.
            self._bar.set_postfix_str(readable_bytes(size / views * (self._views + views)))

    def _finished(self, epoch: int) -> set[int]:
        """The shards of an epoch that are there now and were not at the last look."""
        missing = {shard for _, shard in self.store.missing([epoch])}
        finished = self._missing[epoch] - missing
        self._missing[epoch] &= missing
        if not self._missing[epoch]:
            del self._missing[epoch]
        return finished

    def _rows(self, shards: Sequence[int] | set[int]) -> int:
        return sum(map(self.store.manifest.shard_rows, shards))
