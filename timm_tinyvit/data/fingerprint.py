"""What a data set is, on every machine and in every file format, so that a store finds its own again.

Without keys a data set is its rows in their order: their number, all labels, and the encoded bytes of 256 images spread
evenly over it. With keys it is its names: those of all samples, and the encoded bytes of the 256 images whose keys
have the smallest hashes. Any data set whose keys are all in the store belongs to it, whatever was left out and however
it was ordered, and it has those of the 256 images that it has not left out among its own 256.
"""

import functools
import hashlib
from typing import Any
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa

from ..base.errors import InputError
from ..store.base import StoreReader
from ..store.keys import KeyIndex, hash_keys
from .sources import (
    Source, column, encoded_image, find_column, find_key_column, image_root, labels_of, select_columns,
)

__all__ = [
    'check_fingerprint', 'check_image', 'check_keys', 'dataset_fingerprint', 'iterate_keys', 'key_fingerprint',
    'keyed_fingerprint', 'stored_samples',
]

NUM_FINGERPRINT_ROWS = 256


@functools.lru_cache(maxsize=2)  # a program asks more than once, and reading all labels takes its time
def dataset_fingerprint(
        dataset: datasets.Dataset,
        image_column: str | None = None,
        label_column: str | None = None,
) -> dict[str, Any]:
    """Number of rows, and a hash of the labels and of 256 encoded images, of a data set known by position."""
    image_column = find_column(dataset, image_column, is_image=True)
    label_column = find_column(dataset, label_column, is_image=False)
    digest = hashlib.blake2b(digest_size=16)
    if label_column is not None:
        for table in select_columns(dataset, label_column).iter(1 << 16):
            digest.update(labels_of(table, label_column))
    rows = len(dataset)
    picked = sorted({number * rows // NUM_FINGERPRINT_ROWS for number in range(NUM_FINGERPRINT_ROWS)}) if rows else []
    for data in _encoded_images(dataset, image_column, picked):
        digest.update(len(data).to_bytes(8, 'little') + data)
    return {'num_samples': rows, 'hash': digest.hexdigest()}


def check_fingerprint(store: StoreReader, fingerprint: dict[str, Any]) -> None:
    """Refuse a data set that is not the store's, of a store without keys.

    Raises:
        InputError: It has other rows, labels or images.
    """
    expected = store.manifest.dataset
    if fingerprint == expected:
        return
    found, wanted = fingerprint['num_samples'], expected.get('num_samples')
    what = f'{found} samples, the store has {wanted}' if found != wanted else f'{found} samples with other content'
    raise InputError(
        f'this is not the data set that the store {store.path} was made from: {what}; give the same --dataset, '
        f'--train-split, --input-key and --target-key, or make a store for this one')


def keyed_fingerprint(
        dataset: Source,
        key_column: str,
        image_column: str | None = None,
) -> tuple[dict[str, Any], np.ndarray]:
    """What a data set known by a key column is, from one pass over it.

    Returns:
        The fingerprint: the number of rows, a hash of all keys in their order, and short hashes of 256 encoded images;
        and the hashes of all keys, uint64 [num_samples].

    Raises:
        InputError: There is no such column, a key is missing, or two samples have the same.
    """
    image_column = find_column(dataset, image_column, is_image=True)
    is_stream, root = isinstance(dataset, datasets.IterableDataset), image_root(dataset)
    parts, samples = [], {}
    for hashes, table in iterate_keys(dataset, key_column, *([image_column] if is_stream else [])):
        parts.append(hashes)
        if is_stream:
            # A stream is not read once more for its images.
            bound = max(samples) if len(samples) == NUM_FINGERPRINT_ROWS else (1 << 64) - 1
            for place in np.flatnonzero(hashes <= bound).tolist():
                source = column(table, image_column)[place].as_py()
                key = column(table, key_column)[place].as_py()
                samples[int(hashes[place])] = _digest(_read_image(source, key, root))
            samples = {number: samples[number] for number in sorted(samples)[:NUM_FINGERPRINT_ROWS]}
    hashes = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)
    order = np.argsort(hashes)
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    if len(same):
        first, second = sorted(order[same[0]:same[0] + 2].tolist())
        raise InputError(f'samples {first} and {second} have the same key {_key_at(dataset, key_column, first)!r}; '
                         f'name a column without duplicates with --key')
    if not is_stream:
        picked = order[:NUM_FINGERPRINT_ROWS]
        images = _encoded_images(dataset, image_column, picked.tolist())
        samples = {number: _digest(data) for number, data in zip(hashes[picked].tolist(), images)}
    return key_fingerprint(hashes, samples), hashes


def key_fingerprint(hashes: np.ndarray, samples: dict[int, str]) -> dict[str, Any]:
    """The fingerprint of a data set from the hashes of its keys and what is remembered of some of its images.

    Args:
        hashes: Of all keys in the order of the rows, uint64 [num_samples].
        samples: Short hashes of encoded images by the hashes of their keys, at least of the 256 smallest ones.
    """
    return {
        'num_samples': len(hashes),
        'keys': hashlib.blake2b(hashes, digest_size=16).hexdigest(),
        'samples': {f'{number:016x}': samples[number] for number in sorted(samples)[:NUM_FINGERPRINT_ROWS]},
    }


def check_keys(
        store: StoreReader,
        index: KeyIndex,
        dataset: datasets.Dataset,
        key_column: str,
        image_column: str,
) -> None:
    """Refuse a data set whose keys are not all in a store, or whose images are others than those that it was made from.

    Raises:
        InputError: The store lacks a key, a key is missing, or an image changed.
    """
    checked = stored_samples(store)
    wanted = np.array(list(checked), dtype=np.uint64)
    first, here = 0, {}
    for hashes, table in iterate_keys(dataset, key_column):
        index.rows_of(column(table, key_column), hashes)
        here |= {first + place: int(hashes[place]) for place in np.flatnonzero(np.isin(hashes, wanted)).tolist()}
        first += len(hashes)
    for (row, number), data in zip(here.items(), _encoded_images(dataset, image_column, list(here))):
        check_image(store, _key_at(dataset, key_column, row), data, checked[number])


def check_image(store: StoreReader, key: Any, data: bytes, digest: str) -> None:
    """Refuse encoded bytes of an image that are not those that a store remembers of the image of this key.

    Raises:
        InputError: They are others.
    """
    if _digest(data) != digest:
        raise InputError(f'the image with key {key!r} is not the one that the store {store.path} was made from: its '
                         f'file has other bytes; give the data set as it was, or make a store for this one')


def stored_samples(store: StoreReader) -> dict[int, str]:
    """Short hashes of the encoded images that a keyed store remembers, by the hashes of their keys.

    Raises:
        InputError: The manifest is damaged.
    """
    try:
        samples = {int(number, 16): digest for number, digest in store.manifest.dataset['samples'].items()}
        np.array(list(samples), dtype=np.uint64)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        raise InputError(f'the manifest of {store.path} is damaged: it does not list the images that were hashed; copy '
                         f'the store again')
    return samples


def iterate_keys(dataset: Source, key_column: str, *others: str) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Hashes of all keys of a data set, uint64 [n] at a time, each with a table of the same rows.

    Args:
        dataset: The data set.
        key_column: Its column of keys.
        others: Columns that the table has too; with them fewer rows come at a time.

    Raises:
        InputError: There is no such column of strings or integers, or a key is missing.
    """
    find_key_column(dataset, key_column)
    first = 0
    for table in select_columns(dataset, key_column, *others).iter(1 << (8 if others else 16)):
        yield hash_keys(column(table, key_column), range(first, first + len(table))), table
        first += len(table)


def _encoded_images(dataset: datasets.Dataset, image_column: str, rows: list[int]) -> Iterator[bytes]:
    if not rows:
        return
    sources, root = column(select_columns(dataset, image_column)[rows], image_column).to_pylist(), image_root(dataset)
    for row, source in zip(rows, sources):
        yield _read_image(source, row, root)


def _read_image(source: dict[str, Any] | bytes | None, name: Any, root: str | None) -> bytes:
    try:
        return encoded_image(source, root)
    except OSError as error:
        raise InputError(f'the image of sample {name!r} ({source["path"]}) cannot be read: {error.strerror or error}')


def _key_at(dataset: Source, key_column: str, row: int) -> Any:
    keys = select_columns(dataset, key_column)
    table = next(keys.skip(row).iter(1)) if isinstance(dataset, datasets.IterableDataset) else keys[row:row + 1]
    return column(table, key_column)[0].as_py()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
