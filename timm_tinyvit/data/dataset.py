"""Views, labels and records of a Hugging Face data set, for filling a store and for training from it.

Every index carries its epoch: a sampler yields (epoch, index) pairs, so that what a loader worker makes depends on
nothing that was told to it before. The image column is read as it is stored and decoded here, the same way for every
file format and whatever format the data set was set to.
"""

from functools import partial
from textwrap import shorten
from typing import Any
from collections.abc import Callable, Sequence

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate, get_worker_info

from ..base.errors import InputError
from ..store.base import StoreReader
from ..store.digests import image_digest
from ..store.keys import KeyIndex, hash_keys
from .classes import renumbered
from .fingerprint import check_fingerprint, check_keys, dataset_fingerprint
from .opening import replay_of
from .pairing import Pairing
from .sources import (
    column, encoded_image, find_column, find_key_column, image_root, labels_of, sample_name,
)
from .views import Replay, decode_image, preserve_random_state

__all__ = [
    'ImageDataset', 'SparseLogitDataset', 'check_no_mixing_with_keys', 'collate', 'decode_source',
    'decode_with_digest', 'read_records',
]

# What a sampler yields: (epoch, row), a row of the data set in an epoch of the store.
EpochRow = tuple[int, int]

MAX_MESSAGE_BYTES = 1 << 16


class ImageDataset(Dataset):
    """Images of a data set as (view, label), read in batches.

    Grey, RGBA, palette, CMYK and EXIF-rotated images all become upright RGB.

    Args:
        dataset: A map-style Hugging Face data set with an image column.
        transform: From an RGB image to a uint8 tensor [3, H, W].
        image_column: Its image column; found by its usual names by default.
        label_column: Its label column of integers, likewise; without one every label is -1.

    Raises:
        InputError: A column is missing or of the wrong kind.
    """
    def __init__(
            self,
            dataset: datasets.Dataset,
            transform: Callable[[Image.Image], torch.Tensor],
            image_column: str | None = None,
            label_column: str | None = None,
    ):
        self.image_column = find_column(dataset, image_column, is_image=True)
        self.label_column = find_column(dataset, label_column, is_image=False)
        self.root = image_root(dataset)
        # The arrow format hands out the stored bytes and no decoded image, whatever format was set.
        self.dataset = dataset.with_format('arrow')
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def name_of(self, row: int) -> str:
        """What to call a sample in a sentence."""
        return sample_name(self.dataset, self.image_column, row)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        table = self.dataset[indices]
        sources, labels = column(table, self.image_column), labels_of(table, self.label_column).tolist()
        # One after the other: of photographs, the decoded images of a batch would take a gigabyte.
        return [dict(view=self.transform(decode_source(source.as_py(), index, root=self.root)), label=label)
                for source, index, label in zip(sources, indices, labels, strict=True)]


def decode_source(
        source: dict[str, Any] | bytes | None,
        name: Any,
        decode: Callable[[bytes], Any] = decode_image,
        root: str | None = None,
) -> Any:
    """An image as it is stored, as the RGB image that the transforms see, or as what else is made of it.

    Args:
        source: Its bytes, or a structure of its `bytes` and `path`.
        name: What to call the sample where it cannot be decoded.
        decode: From bytes to the image, or to its views.
        root: The folder below which the path must be; None for anywhere.

    Raises:
        InputError: It cannot be decoded.
    """
    try:
        content = encoded_image(source, root)
        if not content:
            raise OSError('it is empty')
        return decode(content)
    except OSError as error:
        path = source.get('path') if isinstance(source, dict) else None
        raise InputError(
            f'the image of sample {name}{f" ({path})" if path else ""} cannot be decoded: {error}; replace it, or '
            f'remove it and fill a new store')


def decode_with_digest(
        content: bytes,
        decode: Callable[[bytes], Any],
) -> tuple[Any, int]:
    """What is made of an encoded image, and the digest of its bytes."""
    return decode(content), image_digest(content)


class SparseLogitDataset(ImageDataset):
    """The views of a store, each with its label and, once the store is filled, its record.

    Indexed by (epoch, row) pairs. Yields `view` uint8 [3, H, W], `label` int, `index` int, and with a store
    `record` uint8 [width]: a codec decodes records where the model is. The index is what the view was drawn by: the
    row in the data set of the teacher or, with keys, the hash of its key. With `with_digests` there is also `digest`
    int, see `image_digest`.

    Where the view config mixes views, so does this: `label2` int is the label of the partner, and `lam` float the share
    of the sample itself in its view. One decoded image serves both sides of a pair that stand in one batch.

    Args:
        dataset: A map-style Hugging Face data set with an image column.
        replay: Makes the views; by default as the store says.
        store: Where the records come from; None to fill a store, or to train on labels alone.
        image_column: The image column.
        label_column: The label column.
        key_column: The column of keys; by default the store's.
        first_sample: Index of the first row where there are neither store nor keys.
        with_digests: Hash the encoded images, for filling.

    Attributes:
        pairing: Who is mixed with whom, where the view config mixes views.

    Raises:
        InputError: There is neither replay nor store; the data set is not the store's, has no image column or no such
            column of keys, or has keys where the view config mixes views; or it is indexed by something else.
    """

    def __init__(
            self,
            dataset: datasets.Dataset,
            replay: Replay | None = None,
            store: StoreReader | None = None,
            image_column: str | None = None,
            label_column: str | None = None,
            key_column: str | None = None,
            first_sample: int = 0,
            with_digests: bool = False,
    ):
        if not isinstance(store, StoreReader | None) or replay is None and store is None:
            found = 'neither a replay nor a store' if store is None else f'a {type(store).__name__} as its store'
            raise InputError(f'a SparseLogitDataset was given {found}; write `store, replay = open_store(PATH)`, and '
                             f'SparseLogitDataset(dataset, replay, store)')
        replay = replay_of(store) if replay is None else replay
        if not isinstance(replay, Replay):
            raise InputError(f'a SparseLogitDataset was given a {type(replay).__name__} as its replay; give the one '
                             f'that open_store returns, or store= alone')
        super().__init__(dataset, replay, image_column, label_column)
        self.with_digests = with_digests
        self.replay = replay
        self.store = store
        self.key_column = key_column or (store.manifest.key if store else None)
        self.first_sample = store.manifest.first_sample if store else first_sample
        self.key_index: KeyIndex | None = None
        if key_column and store and not store.manifest.key:
            raise InputError(f'the store {store.path} knows its samples by position; leave --key out')
        check_no_mixing_with_keys(replay, self.key_column)
        self.pairing = Pairing(replay.seed, len(dataset)) if replay.config.is_mixed else None
        if self.key_column:
            find_key_column(dataset, self.key_column)
        if store and store.manifest.key:
            self.key_index = store.open_keys()
            check_keys(store, self.key_index, dataset, self.key_column, self.image_column)
        elif store:
            check_fingerprint(store, dataset_fingerprint(dataset, image_column, label_column))
        if store:
            # Labels have the numbers of the store's classes, where names tell them.
            self.dataset = renumbered(dataset, self.label_column, store.manifest.class_names).with_format('arrow')

    def __repr__(self) -> str:
        height, width = self.replay.config.input_size[-2:]
        labels = f'labels from {self.label_column!r}' if self.label_column else 'no labels'
        return (f'SparseLogitDataset({len(self):,} images from {self.image_column!r} as views of {height}x{width}, '
                f'{labels}, {"no records" if self.store is None else f"records from {self.store}"}; index it by '
                f'(epoch, row))')

    def __getitem__(self, place: EpochRow) -> dict[str, Any]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: list[EpochRow]) -> list[dict[str, Any]]:
        if not all(isinstance(place, Sequence) and len(place) == 2 for place in places):
            raise InputError(f'an image has another view in each epoch: index a SparseLogitDataset by (epoch, row), as '
                             f'in data[0, 5], and not by {places[0]!r}; create_loader makes a loader that does')
        return self._samples(places) if self.pairing is None else self._mixed_samples(places)

    def _mixed_samples(self, places: list[EpochRow]) -> list[dict[str, Any]]:
        epochs, rows = np.array(places, dtype=np.int64).T
        mixed = {}
        for epoch in np.unique(epochs).tolist():
            numbers = np.unique(self.pairing.pairs_of(epoch, rows[epochs == epoch]))
            members = self.pairing.members(epoch, numbers).ravel().tolist()
            samples = self._samples([(epoch, row) for row in members])
            pairs = list(zip(samples[::2], samples[1::2]))
            views = self.replay.mix(
                [(first['view'], second['view']) for first, second in pairs],
                [(epoch, number) for number in numbers.tolist()])
            for (first, second), (both, lam) in zip(pairs, views):
                for sample, partner, view in ((first, second, both[0]), (second, first, both[1])):
                    mixed[epoch, sample['index']] = {**sample, 'view': view, 'label2': partner['label'], 'lam': lam}
        return [mixed[place] for place in zip(epochs.tolist(), rows.tolist())]

    def _samples(self, places: list[EpochRow]) -> list[dict[str, Any]]:
        epochs, rows = np.array(places, dtype=np.int64).T
        # Several views of one image are cut from one decoded image.
        rows, numbers = np.unique(rows, return_inverse=True)
        table = self.dataset[rows]
        labels = labels_of(table, self.label_column).tolist()
        digests = np.zeros(len(rows), dtype=np.int64)
        store_rows, indices = rows, rows + self.first_sample
        if self.key_column:
            keys = column(table, self.key_column)
            indices = hash_keys(keys, rows)
            if self.key_index is not None:
                store_rows = self.key_index.rows_of(keys, indices)
            indices = indices.astype(np.int64)
        indices = indices[numbers].tolist()
        keys = list(zip(epochs.tolist(), indices))
        views: list[torch.Tensor | None] = [None] * len(keys)
        with preserve_random_state():
            # One after the other: of photographs, the decoded images of a batch would take a gigabyte.
            for number, source in enumerate(column(table, self.image_column)):
                wanted = np.flatnonzero(numbers == number).tolist()
                make_views = partial(self.replay.views_of, keys=[keys[place] for place in wanted])
                decode = partial(decode_with_digest, decode=make_views) if self.with_digests else make_views
                made = decode_source(source.as_py(), rows[number], decode, self.root)
                if self.with_digests:
                    made, digests[number] = made
                for place, view in zip(wanted, made):
                    views[place] = view
        samples = [
            dict(view=view, label=labels[number], index=index) for view, number, index in zip(views, numbers, indices)]
        if self.with_digests:
            for sample, number in zip(samples, numbers):
                sample['digest'] = digests[number].item()
        if self.store is not None:
            for sample, record in zip(samples, read_records(self.store, epochs, store_rows[numbers])):
                sample['record'] = record
        return samples


def check_no_mixing_with_keys(replay: Replay, key_column: str | None) -> None:
    """Refuse keys where views are mixed: pairs are known by position, and in a part of the samples some are torn.

    Raises:
        InputError: There are both.
    """
    if key_column and replay.config.is_mixed:
        raise InputError(
            f'Mixup and CutMix pair samples by their position in the whole data set, but here the column '
            f'{key_column!r} names them and partners may be absent; leave --key and --streaming out, '
            f'or --mixup and --cutmix')


def read_records(store: StoreReader, epochs: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    """Checked records, uint8 [B, width], of rows [B] of a store in epochs [B] of it.

    Raises:
        InputError: A record is missing or damaged.
    """
    records = np.empty((len(rows), store.manifest.record_width), dtype=np.uint8)
    for epoch in np.unique(epochs).tolist():
        of_epoch = epochs == epoch
        records[of_epoch] = store.read(epoch, rows[of_epoch])
    try:
        store.codec.check(records)
    except ValueError as error:
        raise InputError(f'the store {store.path} holds a bad record near sample {rows[0]}: {error}')
    return torch.from_numpy(records)


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of samples.

    Returns:
        `view` uint8 [B, 3, H, W], and where there are `label`, `label2`, `index` and `digest` int64 [B], `lam` float32
        [B] and `record` uint8 [B, width].

    Raises:
        InputError: A loader worker has no shared memory left.
    """
    batch = {'view': _stack([sample['view'] for sample in samples])}
    for name in ('label', 'label2', 'lam', 'index', 'digest'):
        if name in samples[0]:
            batch[name] = torch.tensor([sample[name] for sample in samples])
    if 'record' in samples[0]:
        batch['record'] = _stack([sample['record'] for sample in samples])
    if get_worker_info() is not None:
        batch = {name: values if values.is_shared() else values.as_subclass(_InMessage)
                 for name, values in batch.items()}
    return batch


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """`torch.stack`, in a loader worker into shared memory where that pays."""
    num_bytes = len(tensors) * tensors[0].nbytes
    if get_worker_info() is None or num_bytes <= MAX_MESSAGE_BYTES:
        return torch.stack(tensors)
    try:
        # Here and not when the batch is sent: there a lack of memory would lose it, and its receiver wait for ever.
        return default_collate(tensors)
    except RuntimeError as error:
        if '/torch_' not in str(error):  # the name of a piece of shared memory
            raise
        raise InputError(f'a loader worker has no shared memory for a batch of {num_bytes / 1e6:.1f} MB '
                         f'({shorten(str(error), 120)}); give the container or machine more of it '
                         f'(docker run --shm-size 8g), or choose fewer --workers or smaller batches')


class _InMessage(torch.Tensor):
    """A tensor that a loader worker sends in the message itself; what arrives is a plain tensor.

    Others get a piece of shared memory each, which costs both sides some tenths of a millisecond, however small.
    """

    def __reduce_ex__(self, protocol: int) -> tuple[Callable, tuple[np.ndarray]]:
        return torch.from_numpy, (self.numpy(),)
