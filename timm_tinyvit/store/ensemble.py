"""Ensemble: several teachers' stores of the same views, read as one.

The soft-target cross-entropy is linear in the target. So the loss on the average of what several teachers say, each
softened by the temperature, is the average of the losses on what each says, and nothing need be merged on disk: records
travel side by side, and decode to one `SparseTargets` per teacher. Stores may differ in teacher, k, codec, shard
size and epochs; the epochs that all of them hold are used. One of them may hold features.
"""

from dataclasses import replace
from itertools import chain
from typing import Any
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from ..base.errors import InputError
from ..targets.features import FeatureTargets
from ..targets.sparse import SparseTargets
from .base import StoreReader
from .keys import KeyIndex

__all__ = ['Ensemble']

# What makes the views, and the classes: entries of the manifest that must agree.
COMMON = ('num_samples', 'num_classes', 'seed', 'first_sample', 'key', 'recipe', 'probe', 'dataset')


class Ensemble(StoreReader):
    """Stores of several teachers, read as one.

    The manifest is that of the first store of classes, with the epochs that all hold, the bytes of all records, and
    all teachers.

    Args:
        stores: Two or more stores of the same views.

    Raises:
        InputError: They were made from other views, data or classes, hold no epoch in common, or two hold features.
    """

    def __init__(self, stores: Sequence[StoreReader]):
        self._stores = list(stores)
        self.path = ' + '.join(str(store.path) for store in stores)
        features = [store for store in stores if store.manifest.features]
        if len(features) > 1:
            raise InputError(f'the stores {features[0].path} and {features[1].path} both hold features, and a student '
                             f'learns those of one teacher; leave one of them out')
        # One of features has no classes to compare.
        leading = next(store for store in stores if store not in features)
        first = leading.manifest
        for store in stores:
            differing = [name for name in COMMON if getattr(store.manifest, name) != getattr(first, name)
                         and not (name == 'num_classes' and store in features)]
            if store.manifest.class_names and first.class_names and store.manifest.class_names != first.class_names:
                differing.append('class_names')
            if differing:
                raise InputError(
                    f'the stores {leading.path} and {store.path} are not of the same views and classes: they differ '
                    f'in {", ".join(differing)}; an average needs the same data set, views, --store-seed and classes')
        start = max(store.manifest.stored_epochs.start for store in stores)
        stop = min(store.manifest.stored_epochs.stop for store in stores)
        if start >= stop:
            raise InputError(f'the stores {self.path} hold no epoch in common; fill the same epochs of each')
        self.codec = _SideBySide([store.codec for store in stores])
        self.manifest = replace(
            first, first_epoch=start, epochs=stop - start, record_width=self.codec.width,
            class_names=next(filter(None, (store.manifest.class_names for store in stores)), []),
            teacher={'ensemble': [store.manifest.identity for store in stores]})

    @property
    def stores(self) -> list[StoreReader]:
        return self._stores

    def read(self, epoch: int, rows: Sequence[int]) -> np.ndarray:
        """Records of all stores side by side; see `StoreReader.read`."""
        return np.concatenate([store.read(epoch, rows) for store in self.stores], axis=1)

    def missing(self, epochs: Iterable[int]) -> list[tuple[int, int]]:
        return [pair for store in self.stores for pair in store.missing(epochs)]

    def prefetch(self, epochs: Sequence[int], then: Sequence[int] = ()) -> None:
        for store in self.stores:
            store.prefetch(epochs, then)

    def wait(self, stop: Callable[[], bool] = bool) -> bool:
        return all(store.wait(stop) for store in self.stores)

    def open_keys(self) -> KeyIndex:
        """The keys that all of them share."""
        return self.stores[0].open_keys()

    def check_files(self, epochs: Iterable[int]) -> None:
        for store in self.stores:
            store.check_files(epochs)

    def verify(self, epochs: Iterable[int]) -> Iterator[str]:
        return chain.from_iterable(store.verify(epochs) for store in self.stores)

    def size(self) -> int:
        return sum(store.size() for store in self.stores)


class _SideBySide:
    """The codecs of several stores on records that lie side by side."""

    def __init__(self, codecs: Sequence[Any]):
        self.codecs = codecs
        self.widths = [codec.width for codec in codecs]
        self.width = sum(self.widths)

    def check(self, records: np.ndarray) -> None:
        """Raise a ValueError that names the first row that was not written by the codecs."""
        for codec, part in zip(self.codecs, np.split(records, np.cumsum(self.widths)[:-1], axis=1)):
            codec.check(part)

    def decode(self, records: torch.Tensor) -> list[SparseTargets | FeatureTargets]:
        """What each teacher makes of views, from checked records, uint8 [B, width], on the device of the records."""
        return [codec.decode(part.contiguous()) for codec, part in zip(self.codecs, records.split(self.widths, dim=1))]
