"""SubsetStore: a store read as if its teacher had known some of its classes alone, in the student's order."""

from dataclasses import replace
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from ..targets.subset import SubsetCodec
from .base import StoreReader
from .keys import KeyIndex

__all__ = ['SubsetStore']


class SubsetStore(StoreReader):
    """The records of a store, whose codec decodes them to targets of a part of the classes.

    The manifest is the store's, with these classes; its identity says which they are, so that a run is resumed with the
    same ones.

    Args:
        store: The store, or several as one.
        classes: The teacher's number of each class of the student.
        names: Their names; empty where they are not known.
    """

    def __init__(self, store: StoreReader, classes: Sequence[int], names: Sequence[str] = ()):
        self._store = store
        self.path = store.path
        self.codec = SubsetCodec(store.codec, classes, store.manifest.num_classes)
        self.manifest = replace(
            store.manifest, num_classes=len(classes), class_names=list(names),
            teacher={**store.manifest.teacher, 'class_map': list(classes)})

    @property
    def stores(self) -> list[StoreReader]:
        return self._store.stores

    def read(self, epoch: int, rows: Sequence[int]) -> np.ndarray:
        return self._store.read(epoch, rows)

    def missing(self, epochs: Iterable[int]) -> list[tuple[int, int]]:
        return self._store.missing(epochs)

    def prefetch(self, epochs: Sequence[int], then: Sequence[int] = ()) -> None:
        self._store.prefetch(epochs, then)

    def wait(self, stop: Callable[[], bool] = bool) -> bool:
        return self._store.wait(stop)

    def open_keys(self) -> KeyIndex:
        return self._store.open_keys()

    def check_files(self, epochs: Iterable[int]) -> None:
        self._store.check_files(epochs)

    def verify(self, epochs: Iterable[int]) -> Iterator[str]:
        return self._store.verify(epochs)

    def size(self) -> int:
        return self._store.size()
