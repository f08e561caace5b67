"""LogitStore: the sparse targets of every view of a data set, on disk.

A store is a directory: `store.json`, the manifest that says how each view and each record was made, and one folder
per epoch with shards, runs of `shard_size` consecutive samples. A shard is an Arrow IPC stream of one record batch
with one column of fixed-size records, followed by a footer of 24 bytes (the magic `TTVSHARD` and the BLAKE2b-128 of
everything before it), which Arrow's readers pass over. The stream's schema names the store, the epoch and the shard.

A shard is written aside, synced and renamed: a shard that exists is complete, a kill costs the open shard and nothing
else, and writers need not know of each other, because a shard's bytes are a function of the manifest alone. Reading
maps the shards into memory and builds no index: a row is found by arithmetic.
"""

import errno
import hashlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_origin
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from .codec import Codec, create_codec
from .errors import InputError

__all__ = ['FORMAT', 'LogitStore', 'Manifest', 'write_aside']

FORMAT = 'timm_tinyvit.logits'
FORMAT_VERSION = 2
MANIFEST_NAME = 'store.json'
MAGIC = b'TTVSHARD'
FOOTER_SIZE = len(MAGIC) + 16
METADATA_KEY = b'timm_tinyvit'
STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Manifest:
    """How a store was made, the content of its `store.json`.

    Attributes:
        num_samples: Rows of the data set.
        num_classes: Classes of the teacher.
        k: Entries per record.
        record_width: Bytes per record; the most of them where their number varies.
        epochs: How many passes over the data the store is meant to hold.
        seed: The store's seed; a view is a function of (seed, epoch, sample).
        shard_size: Samples per shard; the last shard of an epoch holds the rest.
        first_epoch: Number of its first epoch, above 0 where the earlier ones were left out when it was copied.
        first_sample: Sample of its first row, above 0 where the earlier ones were left out when it was copied.
        sparsifier: How classes are chosen: `topk`, `nucleus` or `sample`.
        top_p: Mass that `nucleus` covers; 1 for the others.
        remainder: What the other classes get, see `SparseTargets`.
        codec: Name of the codec of the records.
        key: Column whose values name the samples, or empty where their position does.
        teacher: Name, weights' hash, mean, std, input size, dtype, batch size and device kind of the teacher.
        recipe: How a view is made: the arguments of timm's transform factory, the decoder, the EXIF rule.
        versions: Versions of everything that has a hand in the views.
        probe: Hash of probe views; where it differs, so do the views.
        dataset: Fingerprint of the data set.
        format: Always `timm_tinyvit.logits`.
        version: Version of the format.
    """
    num_samples: int
    num_classes: int
    k: int
    record_width: int
    epochs: int
    seed: int
    shard_size: int
    first_epoch: int = 0
    first_sample: int = 0
    sparsifier: str = 'topk'
    top_p: float = 1.0
    remainder: str = 'uniform'
    codec: str = 'float16'
    key: str = ''
    teacher: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    probe: str = ''
    dataset: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    version: int = FORMAT_VERSION

    @property
    def num_shards(self) -> int:
        """Shards of one epoch."""
        return -(-self.num_samples // self.shard_size)

    def _decisive(self) -> dict[str, Any]:
        """All that decides a shard's bytes: not which epochs there are, and no name or version behind the same hash."""
        free = ('epochs', 'first_epoch', 'versions')
        values = {key: value for key, value in asdict(self).items() if key not in free}
        values['teacher'].pop('name', None)
        return values

    @property
    def identity(self) -> str:
        """Hash that ties a shard to its store."""
        fixed = self._decisive()
        return hashlib.blake2b(json.dumps(fixed, sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def stored_epochs(self) -> range:
        """Numbers of the epochs that the store is meant to hold."""
        return range(self.first_epoch, self.first_epoch + self.epochs)

    def shard_rows(self, shard: int) -> int:
        """Samples in a shard."""
        return min(self.shard_size, self.num_samples - shard * self.shard_size)

    def differences(self, other: 'Manifest') -> list[str]:
        """Which fields make another manifest's shards different ones, each as `name: here, there`."""
        found = []
        there = other._decisive()
        for name, value in self._decisive().items():
            if isinstance(value, dict):
                keys = [key for key in {**value, **there[name]} if value.get(key) != there[name].get(key)]
                found += [f'{name} {key}: {value.get(key)!r}, {there[name].get(key)!r}' for key in keys]
            elif value != there[name]:
                found.append(f'{name}: {value!r}, {there[name]!r}')
        return found

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + '\n'

    @classmethod
    def from_json(cls, text: str, source: str) -> 'Manifest':
        """Read and check a manifest.

        Raises:
            InputError: The text is no manifest of this format, or its numbers cannot be.
        """
        try:
            values = json.loads(text)
        except (RecursionError, ValueError) as error:
            raise InputError(f'{source} is not readable as JSON ({error}); it is damaged, copy the store again')
        if not isinstance(values, dict) or values.get('format') != FORMAT:
            raise InputError(f'{source} is not the manifest of a logit store (no format {FORMAT!r} in it)')
        if values.get('version') != FORMAT_VERSION:
            raise InputError(
                f'{source} has format version {values.get("version")!r}, this package reads {FORMAT_VERSION}; '
                f'install the version of timm_tinyvit that wrote it')
        types = {item.name: item.type for item in fields(cls)}
        if set(values) != set(types):
            odd = sorted(set(values) ^ set(types))
            raise InputError(f'{source} is damaged: unknown or missing entries {", ".join(odd)}')
        for name, value in values.items():
            kind = get_origin(types[name]) or types[name]
            if type(value) is not kind:
                raise InputError(f'{source} is damaged: {name} is {value!r}, expected {kind.__name__}')
        manifest = cls(**values)
        limits = dict(num_samples=1 << 40, num_classes=1 << 31, k=1 << 16, record_width=1 << 20, shard_size=1 << 32)
        for name, limit in limits.items():
            if not 1 <= getattr(manifest, name) <= limit:
                raise InputError(f'{source} is damaged: {name} is {getattr(manifest, name)}, expected 1 to {limit}')
        if manifest.num_shards > 1 << 24:
            raise InputError(f'{source} is damaged: {manifest.num_shards} shards an epoch, expected 16,777,216 at most')
        for name, limit in dict(epochs=100_000, first_epoch=100_000, first_sample=1 << 40, top_p=1).items():
            if not 0 <= getattr(manifest, name) <= limit:
                raise InputError(f'{source} is damaged: {name} is {getattr(manifest, name)}, expected 0 to {limit}')
        if not -1 << 63 <= manifest.seed < 1 << 63:
            raise InputError(f'{source} is damaged: seed is {manifest.seed}, expected a number of 64 bits')
        try:
            width = create_codec(manifest.codec, manifest.num_classes, manifest.k, manifest.remainder).width
        except ValueError as error:
            raise InputError(f'{source} cannot be read: {error}')
        if width != manifest.record_width:
            raise InputError(f'{source} is damaged: records of {manifest.record_width} bytes, {width} expected')
        return manifest


def write_aside(path: Path, data: bytes | memoryview | Sequence[bytes]) -> None:
    """Write a file so that it is there whole or not at all, also after a kill or a power cut.

    Raises:
        InputError: The disk is full, or may not be written; nothing is left behind.
    """
    aside = path.with_name(f'.{path.name}.{socket.gethostname()}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, 'wb') as file:
            for part in [data] if isinstance(data, (bytes, memoryview)) else data:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        if os.name == 'posix':  # elsewhere a folder cannot be opened
            # The new name must be on disk too.
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        try:
            aside.unlink(missing_ok=True)
        except OSError:
            pass
        hint = {
            errno.ENOSPC: 'the disk is full, make room',
            errno.EDQUOT: 'the disk quota is used up, make room',
            errno.EFBIG: 'the file-size limit is reached, raise it (ulimit -f)',
            errno.EROFS: 'the disk is read-only, choose another folder',
            errno.EACCES: 'permission denied, choose another folder',
        }.get(error.errno, error.strerror)
        raise InputError(
            f'cannot write {path}: {hint}; what was complete is kept, and the same command goes on from there')


def _remove_stale(folder: Path) -> None:
    """Remove what killed writers left aside: of a dead process of this machine, or a day old."""
    for aside in folder.glob('.*.tmp'):
        host, _, pid = aside.name.removesuffix('.tmp').rpartition('.')
        try:
            if os.name == 'posix' and host.endswith('.' + socket.gethostname()) and pid.isdigit():
                try:
                    os.kill(int(pid), 0)
                    stale = False
                except ProcessLookupError:
                    stale = True
                except PermissionError:
                    stale = False
            else:
                stale = time.time() - aside.stat().st_mtime > STALE_SECONDS
            if stale:
                aside.unlink()
        except FileNotFoundError:
            continue


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
        self.codec: Codec = create_codec(manifest.codec, manifest.num_classes, manifest.k, manifest.remainder)
        self._epoch = -1
        self._records: dict[int, np.ndarray] = {}

    def __getstate__(self) -> tuple[Path, Manifest]:
        # Maps do not travel to loader workers; each worker maps what it reads.
        return self.path, self.manifest

    def __setstate__(self, state: tuple[Path, Manifest]) -> None:
        self.__init__(*state)

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether there is a manifest at this path."""
        return (Path(path) / MANIFEST_NAME).exists()

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> 'LogitStore':
        """Make an empty store, or open the one of the same manifest that is there.

        A store that is there grows to `manifest.epochs` if it was meant to hold fewer.

        Raises:
            InputError: Another store, or something else, is at this path.
        """
        path = Path(path)
        # Looked at before the manifest is: another process may make this very store meanwhile.
        others = path.is_dir() and any(not item.name.startswith('.') for item in path.iterdir())
        if not cls.exists(path):
            if path.is_file() or others:
                raise InputError(f'{path} exists and is not a logit store; give --logits a new folder')
            write_aside(path / MANIFEST_NAME, manifest.to_json().encode())
            return cls(path, manifest)
        store = cls.open(path)
        differences = store.manifest.differences(manifest)
        if differences:
            raise InputError(
                f'{path} is a store of something else ({"; ".join(differences[:4])}; there and in this command); '
                f'give --logits another folder, or the command the same settings')
        if manifest.epochs > store.manifest.epochs:
            store.extend(manifest.epochs)
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
            if file.stat().st_size > 1 << 20:
                raise InputError(f'{file} has {file.stat().st_size} bytes; it is damaged, copy the store again')
            text = file.read_text(encoding='utf-8')
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f'there is no logit store at {path} (no {MANIFEST_NAME}); '
                f'make one with `accelerate launch -m timm_tinyvit.save_logits --teacher NAME --logits {path}`')
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f'{file} cannot be read: {error}')
        return cls(path, Manifest.from_json(text, str(file)))

    def extend(self, epochs: int) -> None:
        """Let the store hold more epochs; what it holds stays as it is."""
        self.manifest = replace(self.manifest, epochs=epochs)
        write_aside(self.path / MANIFEST_NAME, self.manifest.to_json().encode())

    def shard_path(self, epoch: int, shard: int) -> Path:
        return self.path / f'epoch-{epoch:05d}' / f'shard-{shard:05d}.arrow'

    def missing(self, epochs: Iterable[int]) -> list[tuple[int, int]]:
        """The (epoch, shard) pairs of these epochs that are not on disk yet."""
        found = []
        for epoch in epochs:
            folder = self.path / f'epoch-{epoch:05d}'
            there = set(os.listdir(folder)) if folder.is_dir() else set()
            found += [
                (epoch, shard) for shard in range(self.manifest.num_shards)
                if self.shard_path(epoch, shard).name not in there
            ]
        return found

    def remove_stale(self) -> None:
        """Remove the unfinished files of writers that are no more."""
        for folder in [self.path, *self.path.glob('epoch-*')]:
            _remove_stale(folder)

    def size(self) -> int:
        """Bytes of all shards on disk."""
        return sum(file.stat().st_size for file in self.path.glob('epoch-*/shard-*.arrow'))

    def _schema(self, epoch: int, shard: int) -> pa.Schema:
        metadata = {'format': FORMAT, 'store': self.manifest.identity, 'epoch': epoch, 'shard': shard}
        column = pa.field('record', pa.binary(self.manifest.record_width), nullable=False)
        return pa.schema([column], metadata={METADATA_KEY: json.dumps(metadata)})

    def write_shard(self, epoch: int, shard: int, records: np.ndarray) -> None:
        """Write the records of a whole shard, uint8 [rows, width], atomically.

        Raises:
            ValueError: The shape is not that of this shard.
            InputError: The disk is full or may not be written.
        """
        shape = (self.manifest.shard_rows(shard), self.manifest.record_width)
        if records.shape != shape or records.dtype != np.uint8:
            raise ValueError(f'shard {shard} takes uint8 {list(shape)}, not {records.dtype} {list(records.shape)}')
        schema = self._schema(epoch, shard)
        column = pa.FixedSizeBinaryArray.from_buffers(
            schema.field(0).type, len(records), [None, pa.py_buffer(np.ascontiguousarray(records))])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as stream:
            stream.write_batch(pa.record_batch([column], schema=schema))
        content = sink.getvalue()
        footer = MAGIC + hashlib.blake2b(content, digest_size=16).digest()
        write_aside(self.shard_path(epoch, shard), [content, footer])

    def read_shard(self, epoch: int, shard: int) -> np.ndarray:
        """Map a shard into memory and check it whole: its length, its checksum, and that it is this very shard.

        Returns:
            Its records, uint8 [rows, width], as a read-only view of the file.

        Raises:
            InputError: The shard is missing, or damaged, or another one.
        """
        path = self.shard_path(epoch, shard)
        again = f'delete it and fill the store again (save_logits --logits {self.path})'
        rows, width = self.manifest.shard_rows(shard), self.manifest.record_width
        try:
            if path.stat().st_size < rows * width + FOOTER_SIZE:
                raise InputError(f'{path} is cut short: {path.stat().st_size} bytes for {rows} records; {again}')
            file = pa.memory_map(str(path))
        except FileNotFoundError:
            raise InputError(
                f'the store {self.path} has no shard {shard} of epoch {epoch}: it was not filled to the end; '
                f'run the save_logits command that made it again')
        except OSError as error:
            raise InputError(f'{path} cannot be read: {error}')
        content = memoryview(file.read_buffer())
        footer, content = content[-FOOTER_SIZE:], content[:-FOOTER_SIZE]
        if bytes(footer) != MAGIC + hashlib.blake2b(content, digest_size=16).digest():
            raise InputError(f'{path} is damaged: its checksum does not match; {again}')
        batch = pa.ipc.open_stream(pa.py_buffer(content)).read_next_batch()
        if not batch.schema.equals(self._schema(epoch, shard), check_metadata=True) or batch.num_rows != rows:
            raise InputError(f'{path} is a shard of another store, epoch or place; {again}')
        return np.frombuffer(batch.column(0).buffers()[1], dtype=np.uint8, count=rows * width).reshape(rows, width)

    def read(self, epoch: int, indices: Sequence[int]) -> np.ndarray:
        """Records, uint8 [n, width], of samples of one epoch in any order.

        Args:
            epoch: Epoch of the store.
            indices: Sample indices [n].

        Raises:
            InputError: An index is not in the store, or a shard is missing or damaged.
        """
        indices = np.asarray(indices, dtype=np.int64)
        outside = (indices < 0) | (indices >= self.manifest.num_samples)
        if outside.any():
            raise InputError(
                f'sample {indices[outside][0]} was asked of a store of {self.manifest.num_samples} samples; '
                f'use the data set that the store was made from')
        if epoch != self._epoch:
            self._epoch, self._records = epoch, {}
        shards, rows = np.divmod(indices, self.manifest.shard_size)
        records = np.empty((len(indices), self.manifest.record_width), dtype=np.uint8)
        for shard in np.unique(shards).tolist():
            if shard not in self._records:
                self._records[shard] = self.read_shard(epoch, shard)
            here = shards == shard
            records[here] = self._records[shard][rows[here]]
        return records
