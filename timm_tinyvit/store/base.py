"""StoreReader: what every store can be asked, in a folder, behind a URL, or several of them as one.

Whoever trains or looks into a store needs nothing else. A store is written in a folder alone, by `LogitStore`.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from ..targets.codec import Codec
from .keys import KeyIndex
from .manifest import Manifest

__all__ = ['StoreReader']


class StoreReader(ABC):
    """The records of every view of a data set: `LogitStore`, `RemoteStore`, or an `Ensemble` of them.

    Attributes:
        path: Where it is, a folder or text.
        manifest: How it was made.
        codec: Checks and decodes its records.
    """
    path: Path | str
    manifest: Manifest
    codec: Codec

    def __repr__(self) -> str:
        manifest, epochs = self.manifest, self.manifest.stored_epochs
        kept = f'{manifest.k} of {manifest.num_classes:,} classes' if manifest.targets == 'classes' else \
            f'{manifest.features["dim"]:,} features'
        teachers = ', '.join(store.manifest.teacher.get('name', 'unknown') for store in self.stores)
        return (f'{type(self).__name__}({str(self.path)!r}: epochs {epochs.start} to {epochs.stop - 1} of '
                f'{manifest.num_samples:,} samples, {kept} from {teachers} in {manifest.record_width} bytes a view)')

    @property
    def stores(self) -> list['StoreReader']:
        """The stores that are read, one for each teacher."""
        return [self]

    @abstractmethod
    def read(self, epoch: int, rows: Sequence[int]) -> np.ndarray:
        """Records, uint8 [n, width], of rows [n] of one epoch, in any order.

        A shard is checked whole when one of its records is read for the first time. Those of several epochs stay
        mapped into memory, for batches with several views of each image.

        Raises:
            InputError: There is no such row, or a shard is missing or damaged.
        """

    @abstractmethod
    def missing(self, epochs: Iterable[int]) -> list[tuple[int, int]]:
        """The (epoch, shard) pairs of these epochs that the store does not have."""

    def prefetch(self, epochs: Sequence[int], then: Sequence[int] = ()) -> None:  # noqa: B027  nothing to do in a folder
        """Have these epochs brought to disk where they are not, and others after them; returns at once."""

    def wait(self, stop: Callable[[], bool] = bool) -> bool:
        """Wait until the epochs of the last `prefetch` can be read from disk.

        Args:
            stop: Is asked now and then whether to wait no longer.

        Returns:
            Whether they can be read; False if `stop` said so before.

        Raises:
            InputError: They will not come.
        """
        return True

    @abstractmethod
    def open_keys(self) -> KeyIndex:
        """The keys of its samples, mapped into memory.

        Raises:
            InputError: The file is missing or damaged.
        """

    def check_files(self, epochs: Iterable[int]) -> None:  # noqa: B027  what is fetched is checked whole
        """Check the length and the header of every shard of these epochs that is on disk, and nothing else.

        Raises:
            InputError: A shard is cut short, or of another store, epoch or place.
        """

    @abstractmethod
    def verify(self, epochs: Iterable[int]) -> Iterator[str]:
        """Check every byte and every record of these epochs.

        Yields:
            What is wrong: a sentence for each epoch that lacks shards, for each damaged part of a shard, and for keys
                that are missing or damaged.
        """

    @abstractmethod
    def size(self) -> int:
        """Bytes of all of its shards."""
