"""LogitStore: the sparse targets of every view of a data set, on disk.

A store is a directory: `store.json`, the manifest that says how each view and each record was made, and one folder
per epoch with shards, runs of `shard_size` consecutive samples.

A shard is written aside, synced and renamed: a shard that exists is complete, a kill costs the open shard and nothing
else, and writers need not know of each other, because a shard's bytes are a function of the manifest alone. Reading
maps the shards into memory and builds no index: a row is found by arithmetic.
"""

import os
from dataclasses import replace
from pathlib import Path
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from ..base.errors import InputError
from ..base.files import remove_stale, write_aside
from ..base.leases import exclusive
from ..targets.codec import Codec
from ..targets.codecs import create_codec
from .keys import KeyIndex
from .manifest import Manifest
from .reader import MAX_MAPS, MappedEpoch
from .shard import ShardFormat, shard_name

__all__ = ['LogitStore', 'Manifest', 'write_aside']

MANIFEST_NAME = 'store.json'
MAX_MANIFEST_SIZE = 1 << 20
NUM_VERIFIED = 1024
MAX_MAPPED_EPOCHS = 8


class LogitStore:
    """A store that exists; use `create` or `open`.

    Attributes:
        path: Its directory.
        manifest: Its manifest.
        codec: The codec of its records.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self.codec: Codec = create_codec(manifest.codec, manifest.num_classes, manifest.k)
        self._format = ShardFormat(manifest)
        self._mapped: dict[int, MappedEpoch] = {}  # the one that was read last stands last

    def __getstate__(self) -> tuple[Path, Manifest]:
        # Maps do not travel to loader workers; each worker maps what it reads.
        return self.path, self.manifest

    def __setstate__(self, state: tuple[Path, Manifest]) -> None:
        self.__init__(*state)

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
            others = path.is_dir() and any(not item.name.startswith('.') for item in path.iterdir())
        except OSError as error:
            raise InputError(f'{path} cannot be read: {error.strerror}; give --logits another folder')
        if not cls.exists(path):
            if path.is_file() or others:
                raise InputError(f'{path} exists and is not a logit store; give --logits a new folder')
            manifest.check(f'the store {path}')
            with exclusive(path / MANIFEST_NAME):
                if not cls.exists(path):
                    write_aside(path / MANIFEST_NAME, manifest.to_json().encode())
        store = cls.open(path)
        differences = store.manifest.differences(manifest)
        if differences:
            raise InputError(
                f'{path} is a store of something else ({"; ".join(differences[:4])}; there and in this command); '
                f'give --logits another folder, or the command the same settings')
        first_epoch = store.manifest.first_epoch
        if manifest.first_epoch < first_epoch:
            raise InputError(
                f'{path} begins at epoch {first_epoch}, what is put into it at epoch {manifest.first_epoch}; give it a '
                f'new folder, or --epochs from {first_epoch} on')
        if manifest.stored_epochs.stop > store.manifest.stored_epochs.stop:
            store.extend(manifest.stored_epochs.stop - first_epoch)
        return store

    @classmethod
    def open(cls, path: str | Path) -> 'LogitStore':
        """Open a store by its manifest; shards are looked at when they are read.

        Raises:
            InputError: There is no store, or its manifest is damaged.
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
                f'make one with `accelerate launch -m timm_tinyvit.save_logits --teacher NAME --logits {path}`')
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f'{file} cannot be read: {error}')
        return cls(path, Manifest.from_json(text, str(file)))

    def extend(self, epochs: int) -> None:
        """Let the store hold at least so many epochs; what it holds stays as it is."""
        replace(self.manifest, epochs=epochs).check(f'the store {self.path}')
        with exclusive(self.path / MANIFEST_NAME):
            # Other launches may extend it at the same time.
            manifest = LogitStore.open(self.path).manifest
            if manifest.epochs < epochs:
                manifest = replace(manifest, epochs=epochs)
                write_aside(self.path / MANIFEST_NAME, manifest.to_json().encode())
        self.manifest = manifest

    def shard_path(self, epoch: int, shard: int) -> Path:
        return self.path / f'epoch-{epoch:05d}' / shard_name(shard)

    def missing(self, epochs: Iterable[int]) -> list[tuple[int, int]]:
        """The (epoch, shard) pairs of these epochs that are not on disk yet."""
        found = []
        for epoch in epochs:
            there = self._files(epoch)
            found += [(epoch, shard) for shard in range(self.manifest.num_shards) if shard_name(shard) not in there]
        return found

    def prefetch(self, epochs: Sequence[int], then: Sequence[int] = ()) -> None:
        """Have these epochs brought to disk, and others after them; one in a folder has nothing to do."""

    def wait(self, stop: Callable[[], bool] = bool) -> bool:
        """Wait until the epochs of the last `prefetch` are on disk.

        Args:
            stop: Is asked now and then whether to wait no longer.

        Returns:
            Whether they can be read; False if `stop` said so before.

        Raises:
            InputError: They will not come.
        """
        return True

    def open_keys(self) -> KeyIndex:
        """The keys of its samples, mapped into memory.

        Raises:
            InputError: The file is missing or damaged.
        """
        return KeyIndex.open(self.path, self.manifest)

    def check_files(self, epochs: Iterable[int]) -> None:
        """Check the length and the header of every shard of these epochs that is on disk, and nothing else.

        Raises:
            InputError: A shard is cut short, or of another store, epoch or place.
        """
        for epoch in epochs:
            folder, there = self.shard_path(epoch, 0).parent, self._files(epoch)
            for shard in range(self.manifest.num_shards):
                name = shard_name(shard)
                if name in there:
                    self._format.check(folder / name, epoch, shard)

    def verify(self, epochs: Iterable[int]) -> Iterator[str]:
        """Check every byte and every record of these epochs.

        Yields:
            What is wrong: a sentence for each epoch that lacks shards, for each damaged part of a shard, and for keys
                that are missing or damaged.
        """
        if self.manifest.key:
            try:
                self.open_keys()
            except InputError as error:
                yield str(error)
        for epoch in epochs:
            there = self._files(epoch)
            missing = [shard for shard in range(self.manifest.num_shards) if shard_name(shard) not in there]
            if missing:
                yield (
                    f'the store {self.path} lacks {len(missing)} of the {self.manifest.num_shards} shards of epoch '
                    f'{epoch}, first shard {missing[0]}; run the save_logits command that made it again')
            for shard in range(self.manifest.num_shards):
                if shard_name(shard) in there:
                    yield from self._verify_shard(epoch, shard)

    def _verify_shard(self, epoch: int, shard: int) -> Iterator[str]:
        path = self.shard_path(epoch, shard)
        mapped = MappedEpoch(self._format, path.parent, epoch)
        first = shard * self.manifest.shard_size
        stop = first + self.manifest.shard_rows(shard)
        for start in range(first, stop, NUM_VERIFIED):
            rows = np.arange(start, min(start + NUM_VERIFIED, stop))
            try:
                self.codec.check(mapped.read(rows))
            except InputError as error:
                yield str(error)
                return
            except ValueError as error:
                yield (
                    f'{path} holds a bad record among samples {start} to {rows[-1]} ({error}); delete it and fill the '
                    f'store again')

    def _files(self, epoch: int) -> set[str]:
        """Names of the files in the folder of an epoch."""
        folder = self.shard_path(epoch, 0).parent
        try:
            return set(os.listdir(folder))
        except FileNotFoundError:
            return set()
        except NotADirectoryError:
            raise InputError(f'{folder} is a file where the folder of epoch {epoch} should be; move it away, and run '
                             f'the same command again')
        except OSError as error:
            raise InputError(f'{folder} cannot be read: {error.strerror}')

    def remove_stale(self) -> None:
        """Remove the unfinished files of writers that are no more."""
        for folder in [self.path, *self.path.glob('epoch-*')]:
            remove_stale(folder)

    def size(self) -> int:
        """Bytes of all shards on disk."""
        return sum(file.stat().st_size for file in self.path.glob('epoch-*/shard-*.arrow') if file.is_file())

    def write_shard(self, epoch: int, shard: int, records: np.ndarray) -> None:
        """Write the records of a whole shard, uint8 [rows, width], atomically.

        Raises:
            ValueError: The shape is not that of this shard.
            InputError: The disk is full or may not be written, the store has vanished, or the shard would be too large.
        """
        parts = self._format.encode(epoch, shard, records)
        if not LogitStore.exists(self.path):
            # Else the folders would come back with a shard and no manifest in them.
            raise InputError(f'the store {self.path} has vanished; bring it back, or make it again')
        write_aside(self.shard_path(epoch, shard), parts)

    def read(self, epoch: int, indices: Sequence[int]) -> np.ndarray:
        """Records, uint8 [n, width], of samples of one epoch in any order.

        A shard is checked whole when one of its records is read for the first time. Shards of several epochs stay
        mapped, for batches with several views of each image.

        Args:
            epoch: Epoch of the store.
            indices: Sample indices [n].

        Raises:
            InputError: An index is not in the store, or a shard is missing or damaged.
        """
        indices = np.asarray(indices, dtype=np.int64)
        mapped = self._mapped.pop(epoch, None)
        if mapped is None:
            mapped = MappedEpoch(self._format, self.shard_path(epoch, 0).parent, epoch)
        self._mapped[epoch] = mapped
        while len(self._mapped) > 1 and (
                len(self._mapped) > MAX_MAPPED_EPOCHS or sum(map(len, self._mapped.values())) > MAX_MAPS):
            del self._mapped[next(iter(self._mapped))]
        try:
            return mapped.read(indices)
        except IndexError:
            outside = next(index for index in indices.tolist() if not 0 <= index < self.manifest.num_samples)
            raise InputError(
                f'sample {outside} was asked of a store of {self.manifest.num_samples} samples; use the data set that '
                f'the store was made from')
