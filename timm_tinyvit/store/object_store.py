"""ObjectStore: a store behind a URL, to fill; what `LogitStore` is in a folder.

Its writers share nothing. A file is put whole, or not at all; what is missing is what a listing lacks, and whoever is
about to make a shard looks once more whether it is there. Two who make the same shard make the same bytes, because
these are a function of the manifest alone. The manifest itself is put on condition that there is none yet, where the
service knows such conditions, and is read back before it counts.
"""

import random
import time
from bisect import insort
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import numpy as np

from ..base.errors import InputError
from ..base.files import write_atomic
from ..base.remote_folder import RemoteFolder, is_remote
from .digests import digests_name, encode_digests
from .keys import FILE_NAME, KeyIndex
from .local import LogitStore, check_joined
from .manifest import MANIFEST_NAME, Manifest
from .remote import RemoteStore, open_reader, read_manifest

__all__ = ['ObjectStore', 'store_class']

# Seconds between two listings, at least; and how many times as long as a listing takes.
LISTING_SECONDS, LISTING_SHARE = 5., 20
# Attempts at a manifest that others change too.
MAX_CONFLICTS = 8

Item = TypeVar('Item')


def store_class(location: str) -> 'type[LogitStore] | type[ObjectStore]':
    """What fills a store at this location."""
    return ObjectStore if is_remote(location) else LogitStore


class ObjectStore(RemoteStore):
    """A store behind a URL, to fill; use `create` or `open`."""

    # When the store is to be listed again.
    _next_look = 0.

    @staticmethod
    def exists(url: str) -> bool:
        """Whether there is a manifest at this URL."""
        return RemoteFolder.resolve(url).has(MANIFEST_NAME)

    @classmethod
    def open(cls, url: str) -> 'ObjectStore':
        """Open a store by its manifest; see `open_reader`."""
        return open_reader(url, kind=cls)

    @classmethod
    def create(cls, url: str, manifest: Manifest) -> 'ObjectStore':
        """Make an empty store, or open the one of the same manifest that is there, and let it grow; see `LogitStore`.

        Raises:
            InputError: Another store, or something else, is there, or it may not be written to.
        """
        source = RemoteFolder.resolve(url)
        if not source.has(MANIFEST_NAME):
            manifest.check(f'the store {source}')
            # Another launch may have put the manifest since.
            if (files := source.files()) and MANIFEST_NAME not in files:
                raise InputError(f'{source} holds something else and no logit store; name a new folder')
            source.write(MANIFEST_NAME, manifest.to_json().encode(), is_new=True)
        there = read_manifest(source)
        check_joined(there, manifest, source)
        _grow(source, there, manifest.stored_epochs.stop - there.first_epoch)
        return cls.open(url)

    def extend(self, epochs: int) -> None:
        """Let the store hold at least so many epochs."""
        self.manifest = _grow(self.source, read_manifest(self.source), epochs)

    def has_shard(self, epoch: int, shard: int) -> bool:
        """Whether a shard is there just now."""
        is_there = shard in self._cache.shards[epoch] or self.source.has(self._shard_name(epoch, shard))
        if is_there:
            self._note(epoch, shard)
        return is_there

    def in_own_order(self, items: Sequence[Item]) -> list[Item]:
        """In an order that no other process has, so that writers who know nothing of each other seldom meet."""
        return random.Random().sample(list(items), len(items))

    def write_shard(self, epoch: int, shard: int, records: np.ndarray) -> None:
        """Put the records of a whole shard, uint8 [rows, width].

        Raises:
            ValueError: The shape is not that of this shard.
            InputError: It may not be written, or cannot be reached for a day.
        """
        self.source.write(self._shard_name(epoch, shard), b''.join(self._format.encode(epoch, shard, records)))
        self._note(epoch, shard)

    def write_digests(self, shard: int, digests: np.ndarray) -> None:
        """Put the digests, int64 [rows], of the images of a shard's rows."""
        self._put(digests_name(shard), encode_digests(digests, self.manifest.identity))

    def write_keys(self, hashes: np.ndarray) -> None:
        """Put the hashes, uint64 [num_samples], of the keys of all rows."""
        KeyIndex.write(self.folder, self.manifest, hashes)
        self.source.write(FILE_NAME, (self.folder / FILE_NAME).read_bytes())

    def _put(self, name: str, content: bytes) -> None:
        self.source.write(name, content)
        write_atomic(self.folder / name, content)

    def _have(self, name: str) -> None:
        # Another launch may have put it a moment ago.
        if not (self.folder / name).exists() and (content := self.source.read(name)) is not None:
            write_atomic(self.folder / name, content)

    def _stored(self, epoch: int) -> list[int]:
        start = time.monotonic()
        if start >= self._next_look:
            # What is listed late is looked at once more before it is made.
            with suppress(InputError):
                self._cache.look(anew=True)
            end = time.monotonic()
            self._next_look = end + max(LISTING_SECONDS, LISTING_SHARE * (end - start))
        return super()._stored(epoch)

    def _note(self, epoch: int, shard: int) -> None:
        if shard not in self._cache.shards[epoch]:
            insort(self._cache.shards[epoch], shard)

    def _shard_name(self, epoch: int, shard: int) -> str:
        return self.shard_path(epoch, shard).relative_to(self.folder).as_posix()


def _grow(source: RemoteFolder, manifest: Manifest, epochs: int) -> Manifest:
    """Let the store of this manifest hold at least so many epochs; others may do the same just now."""
    for _ in range(MAX_CONFLICTS):
        if manifest.epochs >= epochs:
            return manifest
        longer = replace(manifest, epochs=epochs)
        longer.check(f'the store {source}')
        source.write(MANIFEST_NAME, longer.to_json().encode())
        manifest = read_manifest(source)
    raise InputError(f'others write the manifest of {source} all the time; run the same command again')
