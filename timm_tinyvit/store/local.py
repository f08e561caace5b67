"""LogitStore: the sparse targets of every view of a data set, in a folder, to write and to read.

A store is a folder: `store.json`, the manifest that says how each view and each record was made, and one folder per
epoch with shards, runs of `shard_size` consecutive samples.

A shard is written atomically: one that exists is complete, a kill costs the open shard and nothing else, and writers
need not know of each other, because a shard's bytes are a function of the manifest alone.
"""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ..base.errors import InputError
from ..base.files import check_no_link, remove_leftovers, write_atomic
from ..base.leases import Leases, exclusive
from .digests import DIGESTS_FOLDER, digests_name, encode_digests
from .keys import KeyIndex
from .manifest import MANIFEST_NAME, MAX_MANIFEST_SIZE, Manifest
from .projection import PROJECTION_NAME
from .reader import ShardStore
from .shard import shard_name

__all__ = ['LogitStore', 'check_joined']

Item = TypeVar('Item')


class LogitStore(ShardStore):
    """A store in a folder; use `create` or `open`."""

    def __init__(self, path: Path, manifest: Manifest):
        super().__init__(path, path, manifest)

    def __reduce__(self) -> tuple:
        # Memory maps do not travel to loader workers; each worker maps what it reads.
        return LogitStore, (self.path, self.manifest)

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether there is a manifest at this path."""
        return os.path.exists(Path(path) / MANIFEST_NAME)

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> 'LogitStore':
        """Make an empty store, or open the one of the same manifest that is there.

        A store that is there grows to the last epoch of the manifest if it was meant to end earlier.

        Raises:
            InputError: Another store, or something else, is at this path, or the store there begins at a later epoch.
        """
        path = Path(path)
        # Looked at before the manifest is: another process may make this very store meanwhile.
        try:
            others = path.is_dir() and any(
                not item.name.startswith('.') and item.name != PROJECTION_NAME for item in path.iterdir())
        except OSError as error:
            raise InputError(f'{path} cannot be read: {error.strerror}; name another folder')
        if not cls.exists(path):
            if path.is_file() or others:
                raise InputError(f'{path} exists and is not a logit store; name a new folder')
            manifest.check(f'the store {path}')
            with exclusive(path / MANIFEST_NAME) as check:
                if not cls.exists(path):
                    write_atomic(path / MANIFEST_NAME, manifest.to_json().encode(), check)
        store = cls.open(path)
        store.remove_leftovers()
        check_joined(store.manifest, manifest, path)
        if manifest.stored_epochs.stop > store.manifest.stored_epochs.stop:
            store.extend(manifest.stored_epochs.stop - store.manifest.first_epoch)
        return store

    @classmethod
    def open(cls, path: str | Path) -> 'LogitStore':
        """Open a store by its manifest; shards are looked at when they are read.

        Raises:
            InputError: There is no store, its manifest is damaged, or the folder of an epoch is a link.
        """
        path = Path(path)
        file = path / MANIFEST_NAME
        try:
            if file.exists() and not file.is_file():
                raise InputError(f'{file} cannot be read: it is not a file; copy the store again')
            with open(file, 'rb') as stream:
                content = stream.read(MAX_MANIFEST_SIZE + 1)
            if len(content) > MAX_MANIFEST_SIZE:
                raise InputError(f'{file} has more than {MAX_MANIFEST_SIZE} bytes; it is damaged, copy the store again')
            text = content.decode()
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f'there is no logit store at {path} (no {MANIFEST_NAME}); '
                f'make one with timm-tinyvit fill --teacher NAME --logits {path}')
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f'{file} cannot be read: {error}')
        for folder in path.glob('epoch-*'):
            check_no_link(folder)
        return cls(path, Manifest.from_json(text, str(file)))

    def extend(self, epochs: int) -> None:
        """Let the store hold at least so many epochs; what it holds stays as it is."""
        replace(self.manifest, epochs=epochs).check(f'the store {self.path}')
        with exclusive(self.path / MANIFEST_NAME) as check:
            # Other launches may extend it at the same time.
            manifest = LogitStore.open(self.path).manifest
            if manifest.epochs < epochs:
                manifest = replace(manifest, epochs=epochs)
                write_atomic(self.path / MANIFEST_NAME, manifest.to_json().encode(), check)
        self.manifest = manifest

    def check_files(self, epochs: Iterable[int]) -> None:
        for epoch in epochs:
            for shard in self._stored(epoch):
                self._format.check(self.shard_path(epoch, shard), epoch, shard)

    def verify(self, epochs: Iterable[int]) -> Iterator[str]:
        for shard in range(self.manifest.num_shards):
            try:
                self.read_digests(shard)
            except InputError as error:
                yield str(error)
        yield from super().verify(epochs)

    def has_shard(self, epoch: int, shard: int) -> bool:
        """Whether a shard is there just now."""
        return self.shard_path(epoch, shard).exists()

    def in_own_order(self, items: Sequence[Item]) -> list[Item]:
        """In the order of all, as leases tell writers of each other."""
        return list(items)

    def _stored(self, epoch: int) -> list[int]:
        folder = self.shard_path(epoch, 0).parent
        try:
            names = set(os.listdir(folder))
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise InputError(f'{folder} is a file where the folder of epoch {epoch} should be; move it away, and run '
                             f'the same command again')
        except OSError as error:
            raise InputError(f'{folder} cannot be read: {error.strerror}')
        return [shard for shard in range(self.manifest.num_shards) if shard_name(shard) in names]

    def remove_leftovers(self) -> None:
        """Remove the unfinished files and the leases of writers that are no more."""
        with Leases() as leases:
            for folder in [self.path, self.path / DIGESTS_FOLDER, *self.path.glob('epoch-*')]:
                remove_leftovers(folder)
                with suppress(InputError):  # a store that is only read
                    leases.expire_in(folder)

    def size(self) -> int:
        """Bytes of all shards on disk."""
        return sum(file.stat().st_size for file in self.path.glob('epoch-*/shard-*.arrow') if file.is_file())

    def write_shard(self, epoch: int, shard: int, records: np.ndarray) -> None:
        """Write the records of a whole shard, uint8 [rows, width], atomically.

        Raises:
            ValueError: The shape is not that of this shard.
            InputError: The disk is full or may not be written, or the store has vanished.
        """
        self._write(self.shard_path(epoch, shard), self._format.encode(epoch, shard, records))

    def write_digests(self, shard: int, digests: np.ndarray) -> None:
        """Write the digests, int64 [rows], of the images of a shard's rows.

        Raises:
            InputError: The disk is full or may not be written, or their folder leads elsewhere.
        """
        path = self.path / digests_name(shard)
        if path.parent.is_symlink():
            raise InputError(f'{path.parent} is a link; a store is written in its own folder alone, remove the link')
        self._write(path, [encode_digests(digests, self.manifest.identity)])

    def write_keys(self, hashes: np.ndarray) -> None:
        """Write the hashes, uint64 [num_samples], of the keys of all rows."""
        KeyIndex.write(self.path, self.manifest, hashes)

    def _write(self, path: Path, parts: list[bytes | memoryview]) -> None:
        if not LogitStore.exists(self.path):
            # Else the folders would come back with a file and no manifest in them.
            raise InputError(f'the store {self.path} has vanished; bring it back, or make it again')
        write_atomic(path, parts)


def check_joined(there: Manifest, manifest: Manifest, path: object) -> None:
    """Refuse a store that is there for one of another manifest.

    Raises:
        InputError: It is another one, or begins at a later epoch.
    """
    if differences := there.differences(manifest):
        raise InputError(
            f'{path} is a store of something else ({"; ".join(differences[:4])}); name another '
            f'folder, or give the same settings')
    if manifest.first_epoch < there.first_epoch:
        raise InputError(
            f'{path} begins at epoch {there.first_epoch}, what is put into it at epoch {manifest.first_epoch}; give it '
            f'a new folder, or --epochs from {there.first_epoch} on')
