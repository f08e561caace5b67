"""Streams: data sets that are read from front to back, for training from a store and for filling one.

A stream has no positions, so its samples are known by their keys: the view of a sample is that of a map-style data set
with the same keys, and its record is found by the key, whatever the order. Ranks and loader workers share a stream by
the means of `datasets`, file by file where there are enough of them. A store is filled in the order of the stream, row
by row with the keys that the first pass found, so that a stream that changed is noticed before anything is written.
"""

from functools import partial
from itertools import islice
from typing import Any
from collections.abc import Callable, Iterable, Iterator, Sequence

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..base.errors import InputError
from ..store.base import StoreReader
from ..store.keys import hash_keys
from ..store.local import LogitStore
from ..store.manifest import stored_epoch
from .classes import class_numbers, new_labels
from .dataset import EpochRow, collate, decode_source, decode_with_digest, read_records
from .fingerprint import check_image, stored_samples
from .sources import column, encoded_image, find_column, find_key_column, image_root, labels_of, select_columns
from .views import Replay, preserve_random_state

__all__ = ['SparseLogitStream', 'StreamLoader', 'StreamedRows']

# Rows that are looked up and replayed together.
CHUNK_SIZE = 64
# What is made of a row of a stream: the view as (epoch, index), the key, and the image as it is stored.
_Item = tuple[tuple[int, int], str | int, dict[str, Any]]


class SparseLogitStream(IterableDataset):
    """The samples of a `SparseLogitDataset`, from a stream with keys.

    Args:
        stream: An iterable Hugging Face data set with an image column and a column of keys.
        replay: Makes the views.
        store: Where the records come from; None to train on labels alone.
        image_column: The image column.
        label_column: The label column.
        key_column: The column of keys; by default the store's.
        seed: Seed of the order.
        buffer_size: Rows that are shuffled among each other; 0 for the order of the stream.
        rank: This rank.
        world_size: Number of ranks.
        store_epochs: Epochs of the store; training epoch e uses the one at e modulo their number. None for e itself.

    Raises:
        InputError: There is no such column, no column of keys is named, or the store has no keys. While iterating: a
            key is missing or unknown, an image changed or cannot be decoded, or a record is missing or damaged.
    """

    def __init__(
            self,
            stream: datasets.IterableDataset,
            replay: Replay,
            store: StoreReader | None = None,
            image_column: str | None = None,
            label_column: str | None = None,
            key_column: str | None = None,
            seed: int = 0,
            buffer_size: int = 1000,
            rank: int = 0,
            world_size: int = 1,
            store_epochs: Sequence[int] | None = None,
    ):
        if store and not store.manifest.key:
            raise InputError(f'the store {store.path} knows its samples by position, which a stream does not have; '
                             f'leave --streaming out, or make the store with --key')
        self.replay = replay
        self.store = store
        self.image_column, self.root = find_column(stream, image_column, is_image=True), image_root(stream)
        self.label_column = find_column(stream, label_column, is_image=False)
        self.key_column = find_key_column(stream, key_column or (store.manifest.key if store else ''))
        self.numbers = class_numbers(stream, self.label_column, store.manifest.class_names) if store else None
        self.store_epochs = store_epochs
        self.key_index = store.open_keys() if store else None
        self.checked = stored_samples(store) if store else {}
        if buffer_size:
            stream = stream.shuffle(seed=seed, buffer_size=buffer_size)
        columns = [name for name in (self.image_column, self.label_column, self.key_column) if name]
        self.stream = split_dataset_by_node(select_columns(stream, *columns), rank, world_size)
        self._skipped = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int, skipped: int = 0) -> None:
        """Choose the training epoch of the next iteration; loader workers that are kept alive hear of it too.

        Args:
            epoch: The epoch.
            skipped: Samples at the beginning of each worker's share that come as None, without a look at them.
        """
        self.stream.set_epoch(epoch)
        self._skipped.fill_(skipped)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = stored_epoch(self.store_epochs, self.stream.epoch)
        rows = iter(self.stream)
        for _ in islice(rows, self._skipped.item()):
            yield None
        while tables := list(islice(rows, CHUNK_SIZE)):
            yield from self._samples(epoch, pa.concat_tables(tables))

    def _samples(self, epoch: int, table: pa.Table) -> list[dict[str, Any]]:
        names = column(table, self.key_column)
        hashes = hash_keys(names)
        indices = hashes.astype(np.int64).tolist()
        sources = column(table, self.image_column).to_pylist()
        with preserve_random_state():
            views = [
                _image(self, source, name, index, partial(self.replay.views_of, keys=[(epoch, index)]))[0]
                for source, name, index in zip(sources, names.to_pylist(), indices)]
        labels = labels_of(table, self.label_column)
        labels = (labels if self.numbers is None else new_labels(labels, self.numbers)).tolist()
        samples = [dict(view=view, label=label, index=index) for view, label, index in zip(views, labels, indices)]
        if self.store is not None:
            rows = self.key_index.rows_of(names, hashes)
            for sample, record in zip(samples, read_records(self.store, np.full(len(rows), epoch), rows)):
                sample['record'] = record
        return samples


class StreamLoader:
    """Batches of a stream for one rank, in every epoch as many as every other rank has.

    A share of the stream that ends early starts over, so that ranks go in step; the rest of a longer one is left out,
    and in another order the next epoch leaves out others.

    Args:
        stream: This rank's share.
        num_batches: Batches of an epoch.
        num_epochs: Training epochs, after which none comes next.
        options: Arguments of torch's `DataLoader`, the batch size among them.
    """

    def __init__(self, stream: SparseLogitStream, num_batches: int, num_epochs: int | None = None, **options: Any):
        self.stream = stream
        self.num_batches = num_batches
        self.num_epochs = num_epochs
        options['collate_fn'] = partial(_collate_seen, options.get('collate_fn', collate))
        self.loader = DataLoader(stream, drop_last=True, **options)
        self.epoch = self.start = 0

    def __len__(self) -> int:
        """Batches of one whole epoch."""
        return self.num_batches

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the training epoch, and the batch to begin with: what comes before it is read and not decoded."""
        self.epoch, self.start = epoch, start
        # Workers take turns, so that of what comes before each has made as much, or more where others have ended.
        share = start // max(self.loader.num_workers, 1)
        self.stream.set_epoch(epoch, share * self.loader.batch_size)

    def epochs_to_read(self, epoch: int) -> tuple[list[int], list[int]]:
        """Epochs of the store that a training epoch reads, and those that come next, for `StoreReader.prefetch`."""
        epochs = [stored_epoch(self.stream.store_epochs, number) for number in (epoch, epoch + 1)]
        return epochs[:1], [] if epoch + 1 == self.num_epochs else epochs[1:]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return islice(self._endless(), self.start, self.num_batches)

    def _endless(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            is_empty = True
            for batch in self.loader:
                is_empty = False
                yield batch
            if is_empty:
                raise InputError(f'a share of the stream holds no whole batch of {self.loader.batch_size}; choose a '
                                 f'smaller --batch-size, or fewer --workers or processes')
            self.stream.set_epoch(self.epoch)


def _collate_seen(collate_fn: Callable[[list], Any], samples: list[dict[str, Any] | None]) -> Any:
    """A batch, or None of samples that have been seen."""
    return None if samples[0] is None else collate_fn(samples)


class StreamedRows(Dataset):
    """The views of a stream by the rows of a store, for filling it.

    Indexed by what `sampler` yields, which goes through the stream in the process that fills; loader workers get
    encoded images and make views of them: `view` uint8 [3, H, W], `index` int and `digest` int of the encoded image.

    Args:
        stream: The stream that the keys of the store were read from, in the same order.
        replay: Makes the views.
        store: A store with keys.
        image_column: The image column.

    Raises:
        InputError: There is no such column. While filling: the stream has other rows than when its keys were read, an
            image changed, or it cannot be decoded.
    """

    def __init__(
            self,
            stream: datasets.IterableDataset,
            replay: Replay,
            store: LogitStore,
            image_column: str | None = None,
    ):
        self.replay = replay
        self.store = store
        self.checked = stored_samples(store)
        self.image_column, self.root = find_column(stream, image_column, is_image=True), image_root(stream)
        self.key_column = find_key_column(stream, store.manifest.key)
        self.stream = select_columns(stream, self.image_column, self.key_column)

    def __getitems__(self, items: list[_Item]) -> list[dict[str, Any]]:
        samples = []
        with preserve_random_state():
            for key, name, source in items:
                make_views = partial(self.replay.views_of, keys=[key])
                (view,), digest = _image(
                    self, source, name, key[1], partial(decode_with_digest, decode=make_views))
                samples.append(dict(view=view, index=key[1], digest=digest))
        return samples

    def sampler(self, batches: Iterable[list[EpochRow]]) -> '_StreamedBatches':
        """Batches of (epoch, row) pairs, each batch of consecutive rows, as batches of what the stream has there."""
        return _StreamedBatches(self, batches)


class _StreamedBatches:
    """A batch sampler that fetches rows from a stream; it starts over where earlier rows are asked for."""

    def __init__(self, data: StreamedRows, batches: Iterable[list[EpochRow]]):
        self.data = data
        self.batches = batches
        self.key_index = data.store.open_keys()
        self.rows: Iterator[pa.Table] = iter(())
        self.position = data.store.manifest.num_samples

    def __iter__(self) -> Iterator[list[_Item]]:
        for batch in self.batches:
            epoch, first = batch[0]
            if first < self.position:
                self.rows, self.position = iter(self.data.stream.skip(first)), first
            tables = list(islice(self.rows, first - self.position, first - self.position + len(batch)))
            self.position = first + len(batch)
            table = pa.concat_tables(tables) if tables else None
            names = column(table, self.data.key_column) if tables else []
            hashes = hash_keys(names) if tables else np.empty(0, dtype=np.uint64)
            other = np.flatnonzero(self.key_index.find(hashes) != np.arange(first, first + len(hashes)))
            if len(other) or len(hashes) < len(batch):
                place = int(other[0]) if len(other) else len(hashes)
                problem = f'has the key {names[place].as_py()!r}' if len(other) else 'is missing'
                raise InputError(f'row {first + place} of the stream {problem}, unlike when the keys of '
                                 f'{self.data.store.path} were read; a store is filled from the same rows in the same '
                                 f'order')
            sources = column(table, self.data.image_column).to_pylist()
            indices = hashes.astype(np.int64).tolist()
            yield [((epoch, index), name, source) for index, name, source in zip(indices, names.to_pylist(), sources)]


def _image(
        data: SparseLogitStream | StreamedRows,
        source: dict[str, Any] | None,
        name: str | int,
        index: int,
        decode: Callable[[bytes], Any],
) -> Any:
    """What `decode` makes of an image from wherever its path leads, compared with what the store remembers of it.
    """
    try:
        content = encoded_image(source, data.root)
    except OSError as error:
        raise InputError(f'the image with key {name!r} ({source["path"]}) cannot be read: {error}')
    digest = data.checked.get(index % (1 << 64))
    if digest is not None:
        check_image(data.store, name, content, digest)
    path = source.get('path') if isinstance(source, dict) else None
    return decode_source({'bytes': content, 'path': path}, repr(name), decode)
