"""Stores made from stores, with no teacher: parts copied out, and parts put together.

What is taken over is checked first, so that damage does not spread. Epochs are copied bit by bit. Samples are gathered
into shards of their own, and the views stay those that the teacher saw: the copy of a range knows its first sample,
and samples with keys have their views by key. Stopped at any moment, the same command goes on.
"""

from dataclasses import replace
from pathlib import Path
from collections.abc import Callable, Sequence

import datasets
import numpy as np

from ..base.console import info, progress
from ..base.errors import InputError
from ..base.files import write_atomic
from ..data.fingerprint import (
    check_fingerprint, check_keys, dataset_fingerprint, key_fingerprint, keyed_fingerprint, stored_samples,
)
from ..data.sources import find_column
from ..data.view_config import ViewConfig
from ..store.keys import KeyIndex
from ..store.local import LogitStore
from ..store.manifest import Manifest
from ..store.reader import ShardStore

__all__ = ['copy_epochs', 'copy_keys', 'copy_range', 'merge_stores']

# Where the records of a shard's rows are: stores, the store of each row, and its row in it.
Places = tuple[Sequence[ShardStore], np.ndarray, np.ndarray]


def copy_epochs(store: ShardStore, path: str | Path, epochs: range) -> LogitStore:
    """Copy epochs of a store, those of their shards that it has.

    Args:
        store: The store.
        path: Where to; a copy that is there is completed.
        epochs: Which epochs.

    Returns:
        The copy, which numbers its epochs as the store does.

    Raises:
        InputError: The store is not meant to hold these epochs, or a shard of it is damaged.
    """
    _check_epochs(store, epochs)
    copy = _create_like(store, path, replace(store.manifest, first_epoch=epochs.start, epochs=len(epochs)))
    if store.manifest.key and not KeyIndex.exists(copy.path):
        KeyIndex.write(copy.path, copy.manifest, store.open_keys().by_row())
    _take_shards(copy, [store], epochs)
    return copy


def copy_range(
        store: ShardStore,
        path: str | Path,
        samples: range,
        dataset: datasets.Dataset,
        epochs: range | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
) -> LogitStore:
    """Copy consecutive samples of a store without keys.

    Args:
        store: The store, whose shards are all there.
        path: Where to; a copy that is there is completed.
        samples: Which rows.
        dataset: The whole data set of the store; the copy belongs to the slice of it.
        epochs: Which epochs; all by default.
        image_column: The image column.
        label_column: The label column.

    Raises:
        InputError: The store has keys, mixed views or not these rows, the data set is another one, or a shard is
            missing or damaged.
    """
    manifest = store.manifest
    if manifest.key:
        raise InputError(f'the samples of {store.path} have keys; leave --samples out, and give --dataset the ones to '
                         f'copy')
    if not 0 <= samples.start < samples.stop <= manifest.num_samples:
        raise InputError(f'samples {samples.start}:{samples.stop} were asked for, but {store.path} has only samples '
                         f'0:{manifest.num_samples}; fix --samples')
    if ViewConfig.from_dict(manifest.recipe).is_mixed:
        raise InputError(f'the views of {store.path} are mixed in pairs from the whole data set, so that a range of '
                         f'samples lacks partners; leave --samples out to copy whole epochs')
    check_fingerprint(store, dataset_fingerprint(dataset, image_column, label_column))
    rows = np.arange(samples.start, samples.stop)
    epochs = epochs or manifest.stored_epochs
    copy = _create(store, path, epochs, replace(
        manifest, num_samples=len(rows), first_sample=manifest.first_sample + samples.start,
        dataset=dataset_fingerprint(dataset.select(samples), image_column, label_column)))
    _gather(copy, epochs, ([store], np.zeros_like(rows), rows))
    return copy


def copy_keys(
        store: ShardStore,
        path: str | Path,
        dataset: datasets.Dataset,
        epochs: range | None = None,
        image_column: str | None = None,
        key_column: str | None = None,
) -> LogitStore:
    """Copy the samples of a data set out of a store with keys, in the order of the data set.

    Args:
        store: The store, whose shards are all there.
        path: Where to; a copy that is there is completed.
        dataset: What to copy: any part of the store's data set, in any order.
        epochs: Which epochs; all by default.
        image_column: The image column.
        key_column: The column of keys; by default the store's.

    Raises:
        InputError: The store has no keys or lacks some of the data set's, an image is another one, or a shard is
            missing or damaged.
    """
    if not store.manifest.key:
        raise InputError(f'the samples of {store.path} have no keys; name a range of them with --samples')
    key_column = key_column or store.manifest.key
    index = store.open_keys()
    check_keys(store, index, dataset, key_column, find_column(dataset, image_column, is_image=True))
    fingerprint, hashes = keyed_fingerprint(dataset, key_column, image_column)
    rows = index.find(hashes)
    epochs = epochs or store.manifest.stored_epochs
    manifest = replace(store.manifest, num_samples=len(rows), key=key_column, dataset=fingerprint)
    copy = _create(store, path, epochs, manifest, hashes)
    _gather(copy, epochs, ([store], np.zeros_like(rows), rows))
    return copy


def merge_stores(path: str | Path, sources: Sequence[ShardStore], log: Callable[[str], None] = info) -> LogitStore:
    """Put stores together into one, which may be there already.

    Stores of the same views and the same samples give the shards that they have, of whatever epochs. Stores with keys
    that differ in their samples give all their samples, one source after the other, for the epochs that all of them
    hold; what comes out is the store that their data sets one after the other would have given.

    Args:
        path: Where to.
        sources: One or more stores.
        log: Takes a line about samples that more than one store has, of which the first counts.

    Raises:
        InputError: The stores do not fit together, or a shard is damaged or, where samples are put together, missing.
    """
    first = sources[0].manifest
    if not any(first.differences(source.manifest) for source in sources):
        start = min(source.manifest.stored_epochs.start for source in sources)
        stop = max(source.manifest.stored_epochs.stop for source in sources)
        there = LogitStore.open(path).manifest if LogitStore.exists(path) else None
        if there and not there.differences(first):
            if start < there.first_epoch:
                raise InputError(f'{path} begins at epoch {there.first_epoch}, what is merged into it at epoch '
                                 f'{start}; name a new folder')
            start, stop = there.first_epoch, max(stop, there.stored_epochs.stop)
        merged = _create_like(sources[0], path, replace(first, first_epoch=start, epochs=stop - start))
        if first.key and not KeyIndex.exists(merged.path):
            KeyIndex.write(merged.path, merged.manifest, sources[0].open_keys().by_row())
        _take_shards(merged, sources, range(start, stop))
        return merged
    for source in sources[1:]:
        # Samples may differ, and nothing else.
        alike = replace(source.manifest, num_samples=first.num_samples, dataset=first.dataset)
        differences = first.differences(alike)
        if differences or not first.key:
            reason = '; '.join(differences[:4]) or 'other samples, without keys'
            raise InputError(f'the stores {sources[0].path} and {source.path} do not fit together ({reason}); merge '
                             f'stores of the same views, of the same samples or with keys')
    start = max(source.manifest.stored_epochs.start for source in sources)
    stop = min(source.manifest.stored_epochs.stop for source in sources)
    if start >= stop:
        raise InputError('the stores hold no epoch in common; fill the same epochs of each first')
    by_row = [source.open_keys().by_row() for source in sources]
    hashes = np.concatenate(by_row)
    owners = np.repeat(np.arange(len(sources)), [len(rows) for rows in by_row])
    rows = np.concatenate([np.arange(len(rows)) for rows in by_row])
    kept = np.sort(np.unique(hashes, return_index=True)[1])
    if len(kept) < len(hashes):
        log(f'{len(hashes) - len(kept)} samples are in more than one store; the first counts')
    samples = {}
    for source in reversed(sources):
        samples |= stored_samples(source)
    merged = _create(
        sources[0], path, range(start, stop),
        replace(first, num_samples=len(kept), dataset=key_fingerprint(hashes[kept], samples)), hashes[kept])
    _gather(merged, range(start, stop), (sources, owners[kept], rows[kept]))
    return merged


def _check_epochs(store: ShardStore, epochs: range) -> None:
    known = store.manifest.stored_epochs
    if not epochs or epochs.start < known.start or epochs.stop > known.stop:
        raise InputError(f'epochs {epochs.start}:{epochs.stop} were asked for, but {store.path} is meant to hold '
                         f'{known.start}:{known.stop}; fix --epochs')


def _create_like(store: ShardStore, path: str | Path, manifest: Manifest) -> LogitStore:
    """An empty store of this manifest with the projection of another, or the one that is there."""
    projection = store.open_projection()
    copy = LogitStore.create(path, manifest)
    if projection is not None:
        projection.write(copy.path)
    return copy


def _create(
        store: ShardStore,
        path: str | Path,
        epochs: range,
        manifest: Manifest,
        hashes: np.ndarray | None = None,
) -> LogitStore:
    """An empty store of other samples for some epochs of a store, with its keys, or the one that is there."""
    _check_epochs(store, epochs)
    copy = _create_like(store, path, replace(manifest, first_epoch=epochs.start, epochs=len(epochs)))
    if hashes is not None and not KeyIndex.exists(copy.path):
        KeyIndex.write(copy.path, copy.manifest, hashes)
    return copy


def _take_shards(target: LogitStore, sources: Sequence[ShardStore], epochs: range) -> None:
    """Copy the shards that a store lacks from stores of the same identity."""
    lacking = [dict.fromkeys(source.missing(epochs)) for source in sources]
    for epoch, shard in progress(target.missing(epochs), unit='shard', desc='copying'):
        for source, missing in zip(sources, lacking):
            if (epoch, shard) not in missing:
                # Reading one record checks the whole file.
                source.read(epoch, [shard * source.manifest.shard_size])
                write_atomic(target.shard_path(epoch, shard), source.shard_path(epoch, shard).read_bytes())
                break
    rows = np.arange(target.manifest.num_samples)
    for source in sources:
        _take_digests(target, ([source], np.zeros_like(rows), rows))


def _gather(target: LogitStore, epochs: range, places: Places) -> None:
    """Write the shards that a store lacks of these epochs from records of other stores."""
    sources, owners, rows = places
    size = target.manifest.shard_size
    for epoch, shard in progress(target.missing(epochs), unit='shard', desc='gathering'):
        here = slice(shard * size, shard * size + target.manifest.shard_rows(shard))
        records = np.empty((target.manifest.shard_rows(shard), target.manifest.record_width), dtype=np.uint8)
        for number, source in enumerate(sources):
            picked = owners[here] == number
            records[picked] = source.read(epoch, rows[here][picked])
        try:
            target.codec.check(records)
        except ValueError as error:
            raise InputError(f'epoch {epoch} of {" and ".join(str(source.path) for source in sources)} holds a bad '
                             f'record: {error}; run timm-tinyvit store verify on it')
        target.write_shard(epoch, shard, records)
    _take_digests(target, places)


def _take_digests(target: LogitStore, places: Places) -> None:
    """Write the digests of images that a store lacks, if the stores that its rows are from know all of theirs."""
    sources, owners, rows = places
    shards = [shard for shard in range(target.manifest.num_shards) if target.read_digests(shard) is None]
    if not shards:
        return
    digests = np.empty(len(rows), dtype=np.int64)
    for number, source in enumerate(sources):
        known = [source.read_digests(shard) for shard in range(source.manifest.num_shards)]
        if any(part is None for part in known):
            return
        digests[owners == number] = np.concatenate(known)[rows[owners == number]]
    size = target.manifest.shard_size
    for shard in shards:
        target.write_digests(shard, digests[shard * size:(shard + 1) * size])
