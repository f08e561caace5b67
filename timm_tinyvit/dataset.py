"""Views, labels and records of a Hugging Face data set, for filling a store and for training from it.

Every index carries its epoch: a sampler yields (epoch, index) pairs, so that what a loader worker makes depends on
nothing that was told to it before. The image column is read as it is stored and decoded here, the same way for every
file format and whatever format the data set was set to.
"""

import hashlib
from pathlib import Path
from typing import Any
from collections.abc import Callable, Iterator, Sequence

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import BatchSampler, Dataset

from .errors import InputError
from .replay import Replay, decode_image
from .store import LogitStore

__all__ = [
    'EpochBatchSampler', 'ImageDataset', 'SparseLogitDataset', 'check_fingerprint', 'class_names', 'collate',
    'dataset_fingerprint', 'find_column', 'load_split',
]

NUM_FINGERPRINT_ROWS = 256
IMAGE_KEYS = ('image', 'img', 'jpg', 'png', 'webp')
LABEL_KEYS = ('label', 'labels', 'cls', 'fine_label', 'target')

Key = tuple[int, int]


def load_split(name: str, split: str | None, is_training: bool) -> datasets.Dataset:
    """Load one split of a data set.

    Args:
        name: A Hub name, with or without timm's `hfds/` before it; a folder of parquet files or of images in one
            folder per class, with splits by file or folder name; or a folder written by `save_to_disk`.
        split: Name of the split, slices as in `train[:1000]` included; by default `train` in training, and otherwise
            the first of `validation` and `test` that is there.
        is_training: Which default.

    Raises:
        InputError: There is no such data set or split.
    """
    local = Path(name).expanduser()
    name = name.removeprefix('hfds/')
    try:
        if (local / 'dataset_dict.json').is_file() or (local / 'state.json').is_file():
            found = datasets.load_from_disk(str(local))
            splits = dict(found) if isinstance(found, datasets.DatasetDict) else {'train': found}
        elif local.is_dir():
            # One call knows the splits and keeps the cache of the files.
            splits = datasets.load_dataset(str(local))
        elif local.exists():
            raise InputError(f'{name} is a file; give a folder of parquet files or images, or a Hub name')
        elif name.startswith(('.', '/', '~')):
            raise InputError(f'there is no folder {name}; give a folder of parquet files or images, or a Hub name')
        else:
            splits = datasets.load_dataset(name)
    except InputError:
        raise
    except Exception as error:
        # The loaders raise whatever their backend raises; all of it is about the name that was given.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f'the data set {name} cannot be loaded: {reason}')
    if split is None:
        usual = ('train',) if is_training else ('validation', 'val', 'test')
        split = next((name for name in usual if name in splits), usual[0])
    try:
        # The library's own reading of `train[:10%]`, `train[100:]+validation` and the like.
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({key: len(rows) for key, rows in splits.items()})
    except (AssertionError, ValueError):
        raise InputError(
            f'the data set {name} has no split {split}, only {", ".join(splits)}; '
            f'name one with --{"train" if is_training else "val"}-split')
    chosen = [
        rows if (part.from_, part.to) == (0, len(rows)) else rows.select(range(part.from_, part.to))
        for part in parts for rows in [splits[part.splitname]]
    ]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def find_column(dataset: datasets.Dataset, key: str | None, is_image: bool) -> str | None:
    """The name of the image or label column: the given one, or the one that is there under a usual name.

    Raises:
        InputError: The column is not there, or it holds something else.
    """
    flag, usual = ('--input-key', IMAGE_KEYS) if is_image else ('--target-key', LABEL_KEYS)
    if key is not None and key not in dataset.column_names:
        raise InputError(f'the data set has no column {key!r}, only {", ".join(dataset.column_names)}; mend {flag}')
    if not is_image:
        if key is not None and not _holds_labels(dataset.features[key]):
            raise InputError(
                f'column {key!r} holds {dataset.features[key]}, not class numbers; name another with {flag}')
        # A usual name for text or for several labels is no label column.
        labels = [name for name in usual if name in dataset.column_names and _holds_labels(dataset.features[name])]
        return key or next(iter(labels), None)
    key = key or next((name for name in usual if name in dataset.column_names), None)
    if key is None:
        images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        if len(images) != 1:
            raise InputError(
                f'the data set has no image column under a usual name, only {", ".join(dataset.column_names)}; '
                f'name it with --input-key')
        key = images[0]
    if not isinstance(dataset.features[key], datasets.Image):
        raise InputError(f'column {key!r} holds {dataset.features[key]}, not images; name another with --input-key')
    return key


def _holds_labels(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value) and feature.dtype.removeprefix('u').startswith('int'))


def class_names(dataset: datasets.Dataset, label_key: str) -> list[str] | None:
    """Names of the classes, where the label column knows them."""
    return getattr(dataset.features[label_key], 'names', None)


class ImageDataset(Dataset):
    """Images of a data set as (view, label), read in batches.

    Grey, RGBA, palette, CMYK and EXIF-rotated images all become upright RGB.

    Args:
        dataset: A map-style Hugging Face data set with an image column.
        transform: From an RGB image to a uint8 tensor [3, H, W].
        image_key: Its image column; found by its usual names by default.
        label_key: Its label column of integers, likewise; without one every label is -1.

    Raises:
        InputError: A column is missing or of the wrong kind.
    """

    def __init__(
            self,
            dataset: datasets.Dataset,
            transform: Callable[[Image.Image], torch.Tensor],
            image_key: str | None = None,
            label_key: str | None = None,
    ):
        self.image_key = find_column(dataset, image_key, is_image=True)
        self.label_key = find_column(dataset, label_key, is_image=False)
        # The arrow format hands out the stored bytes and no decoded image, whatever format was set.
        self.dataset = dataset.with_format('arrow')
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        images, labels = self.fetch(indices)
        return [dict(view=self.transform(image), label=label) for image, label in zip(images, labels)]

    def fetch(self, indices: list[int]) -> tuple[list[Image.Image], list[int]]:
        """Decoded RGB images and labels of some rows, read in one go.

        Raises:
            InputError: An image cannot be decoded; the message names its row.
        """
        table = self.dataset[indices]
        labels = [-1] * len(indices)
        if self.label_key is not None:
            labels = [-1 if label is None else int(label) for label in table[self.label_key].to_pylist()]
        return [
            _decode(source, index) for source, index in zip(table[self.image_key].to_pylist(), indices)
        ], labels


def _decode(source: dict[str, Any] | None, index: int) -> Image.Image:
    try:
        if not source or (source['bytes'] is None and source['path'] is None):
            raise OSError('it is empty')
        return decode_image(source['bytes'] if source['bytes'] is not None else source['path'])
    except Exception as error:
        # Pillow's readers of damaged files raise what happens to them: RuntimeError, struct.error, TypeError.
        path = f' ({source["path"]})' if source and source['path'] else ''
        raise InputError(
            f'the image of sample {index}{path} cannot be decoded: {error}; mend or remove it, '
            f'and make the store again if it was removed')


class SparseLogitDataset(ImageDataset):
    """The views of a store, each with its label and, once the store is filled, its record.

    Indexed by (epoch, index) pairs. Yields `view` uint8 [3, H, W], `label` int, `index` int, and with a store `record`
    uint8 [width]: a codec decodes records where the model is.

    Args:
        dataset: A map-style Hugging Face data set with an image column.
        replay: Makes the views.
        store: Where the records come from; None to fill a store, or to train on labels alone.
        image_key: The image column.
        label_key: The label column.

    Raises:
        InputError: The data set is not the store's, or has no image column.
    """

    def __init__(
            self,
            dataset: datasets.Dataset,
            replay: Replay,
            store: LogitStore | None = None,
            image_key: str | None = None,
            label_key: str | None = None,
    ):
        super().__init__(dataset, replay, image_key, label_key)
        self.replay = replay
        self.store = store
        if store is not None:
            check_fingerprint(store, dataset_fingerprint(dataset, self.image_key, self.label_key))

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[Key]) -> list[dict[str, Any]]:
        images, labels = self.fetch([index for _, index in keys])
        samples = [
            dict(view=view, label=label, index=index)
            for view, label, (_, index) in zip(self.replay.views(images, keys), labels, keys)]
        if self.store is not None:
            for sample, record in zip(samples, self._records(keys)):
                sample['record'] = record
        return samples

    def _records(self, keys: list[Key]) -> torch.Tensor:
        epochs, indices = np.array(keys, dtype=np.int64).T
        records = np.empty((len(keys), self.store.manifest.record_width), dtype=np.uint8)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            records[here] = self.store.read(epoch, indices[here])
        try:
            self.store.codec.check(records)
        except ValueError as error:
            raise InputError(f'the store {self.store.path} holds a bad record near sample {keys[0][1]}: {error}')
        return torch.from_numpy(records)


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch: `view` uint8 [B, 3, H, W], and where there are `label`, `index` int64 [B], `record` [B, width]."""
    batch = {'view': torch.stack([sample['view'] for sample in samples])}
    for name in ('label', 'index'):
        if name in samples[0]:
            batch[name] = torch.tensor([sample[name] for sample in samples])
    if 'record' in samples[0]:
        batch['record'] = torch.stack([sample['record'] for sample in samples])
    return batch


class EpochBatchSampler(BatchSampler):
    """Batches of (epoch, index) pairs for one rank: a seeded permutation per epoch, from any batch on.

    The permutation is cut into batches of all ranks together, so that a rank's share depends on nothing else.
    An incomplete last batch is dropped.

    Args:
        num_samples: Rows of the data set.
        batch_size: Samples per batch of one rank.
        seed: Seed of the order.
        rank: This rank.
        world_size: Number of ranks.
        store_epochs: Epochs of the store; training epoch e uses the one at e modulo their number. None for e itself.

    Raises:
        InputError: The data set is smaller than one batch of all ranks.
    """

    def __init__(
            self,
            num_samples: int,
            batch_size: int,
            seed: int,
            rank: int = 0,
            world_size: int = 1,
            store_epochs: Sequence[int] | None = None,
    ):
        if num_samples < batch_size * world_size:
            raise InputError(
                f'the data set has {num_samples} samples, fewer than one batch of {batch_size} on {world_size} '
                f'process(es); choose a smaller --batch-size')
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.store_epochs = store_epochs
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the training epoch, and the batch to begin with, of the next iteration."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        """Batches of one whole epoch."""
        return self.num_samples // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Key]]:
        view_epoch = self.epoch
        if self.store_epochs is not None:
            view_epoch = self.store_epochs[self.epoch % len(self.store_epochs)]
        order = np.random.Generator(np.random.PCG64([self.seed, self.epoch])).permutation(self.num_samples)
        for batch in range(self.start, len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [(view_epoch, index) for index in order[first:first + self.batch_size].tolist()]


def dataset_fingerprint(
        dataset: datasets.Dataset,
        image_key: str | None = None,
        label_key: str | None = None,
) -> dict[str, Any]:
    """What a data set is, on every machine and in every file format: rows, and a hash of labels and encoded images.

    All labels are hashed, and the encoded bytes of 256 rows spread evenly over the data.
    """
    image_key = find_column(dataset, image_key, is_image=True)
    label_key = find_column(dataset, label_key, is_image=False)
    digest = hashlib.blake2b(digest_size=16)
    arrow = dataset.with_format('arrow')
    if label_key is not None:
        for table in arrow.select_columns([label_key]).iter(1 << 16):
            column = table[label_key].combine_chunks()
            digest.update(np.asarray(column.cast(pa.int64()).fill_null(-1)).astype('<i8'))
    rows = len(dataset)
    picked = sorted({number * rows // NUM_FINGERPRINT_ROWS for number in range(NUM_FINGERPRINT_ROWS)}) if rows else []
    sources = arrow.select_columns([image_key])[picked][image_key].to_pylist() if rows else []
    for index, source in zip(picked, sources):
        data = (source or {}).get('bytes') or b''
        if source and source['bytes'] is None and source['path'] is not None:
            try:
                data = Path(source['path']).read_bytes()
            except OSError as error:
                raise InputError(f'the image of sample {index} ({source["path"]}) cannot be read: {error.strerror}')
        digest.update(len(data).to_bytes(8, 'little') + data)
    return {'num_samples': rows, 'hash': digest.hexdigest()}


def check_fingerprint(store: LogitStore, fingerprint: dict[str, Any]) -> None:
    """Refuse a data set that is not the store's.

    Raises:
        InputError: It has other rows, labels or images.
    """
    expected = store.manifest.dataset
    if fingerprint == expected:
        return
    found, wanted = fingerprint['num_samples'], expected.get('num_samples')
    what = f'{found} samples, the store has {wanted}' if found != wanted else f'{found} samples with other content'
    raise InputError(
        f'this is not the data set that the store {store.path} was made from: {what}; give the same --dataset and '
        f'--train-split, or make a store for this one')
