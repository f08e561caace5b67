"""Samples known by name: 64-bit hashes of a key column, and the file that finds the row of each in a store.

The hash of a key is BLAKE2b with a digest of 8 bytes, read as a little-endian number without sign, of one byte that
says what it is and the key itself: `s` and the UTF-8 text (bytes are taken as text), or `i` and the decimal digits of
an integer of any width, with a minus sign where it is negative. Read as a signed number, the hash is the index that
views are drawn by, so that a filtered, re-ordered or merged data set sees the same views.

`keys.arrow` is an Arrow IPC stream of one record batch, with the footer of a shard: the hashes in ascending order, and
the row of each in the store. It is searched where it lies in a memory map; nothing is built from it.
"""

import hashlib
import json
from pathlib import Path
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ..base.errors import InputError
from ..base.files import write_atomic
from .arrow import METADATA_KEY
from .manifest import FORMAT, Manifest
from .shard import FOOTER_SIZE, MAGIC, file_status

__all__ = ['KeyIndex', 'hash_keys']

FILE_NAME = 'keys.arrow'


def hash_keys(keys: pa.Array | pa.ChunkedArray, samples: Sequence[int] | None = None) -> np.ndarray:
    """Hashes, uint64 [N], of a column of strings, bytes or integers.

    Args:
        keys: The column [N].
        samples: Numbers of its samples [N], to name one that has no key.

    Raises:
        InputError: A key is null.
    """
    blake2b = hashlib.blake2b
    values = keys.to_pylist()
    if keys.null_count:
        who = 'a sample' if samples is None else f'sample {samples[values.index(None)]}'
        raise InputError(f'{who} has no key; name another column with --key, or leave it out')
    if pa.types.is_integer(keys.type):
        content = [b'i%d' % value for value in values]
    else:
        content = [b's' + (value if isinstance(value, bytes) else value.encode()) for value in values]
    return np.frombuffer(b''.join([blake2b(key, digest_size=8).digest() for key in content]), dtype='<u8')


class KeyIndex:
    """The rows of a store by the hashes of their keys; use `write` and `open`.

    Attributes:
        folder: The store's directory.
        manifest: The store's manifest.
        hashes: All hashes in ascending order, uint64 [N], in a memory map.
        rows: The row of each in the store, uint64 [N], likewise.
        status: What the file looked like before it was mapped.
    """

    def __init__(
            self,
            folder: Path,
            manifest: Manifest,
            hashes: np.ndarray,
            rows: np.ndarray,
            status: tuple[int, ...] | None,
    ):
        self.folder = folder
        self.manifest = manifest
        self.hashes = hashes
        self.rows = rows
        self.status = status

    def __reduce__(self) -> tuple:
        # A map does not travel to loader workers. Its content was checked where it was opened first.
        return KeyIndex.open, (self.folder, self.manifest, False)

    def __len__(self) -> int:
        return len(self.hashes)

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether the keys of the store in this folder are on disk."""
        return (folder / FILE_NAME).exists()

    @staticmethod
    def write(folder: Path, manifest: Manifest, hashes: np.ndarray) -> None:
        """Write the keys of a store.

        Args:
            folder: The store's directory.
            manifest: The store's manifest.
            hashes: Hash of the key of each of its rows, uint64 [num_samples], no two of them the same.

        Raises:
            InputError: The disk is full or may not be written.
        """
        order = np.argsort(hashes)
        batch = pa.record_batch([pa.array(hashes[order]), pa.array(order.astype(np.uint64))], schema=_schema(manifest))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        content = sink.getvalue()
        write_atomic(folder / FILE_NAME, [content, MAGIC + hashlib.blake2b(content, digest_size=16).digest()])

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, check: bool = True) -> 'KeyIndex':
        """Map the keys of a store into memory.

        Args:
            folder: The store's directory.
            manifest: The store's manifest.
            check: Compare the checksum of the whole file.

        Raises:
            InputError: The file is missing or damaged, or belongs to another store.
        """
        path = folder / FILE_NAME
        again = f'delete it and fill the store again with timm-tinyvit fill --logits {folder}'
        status = file_status(path)
        try:
            content = memoryview(pa.memory_map(str(path)).read_buffer())
        except FileNotFoundError:
            raise InputError(f'the store {folder} has no {FILE_NAME}: the command that makes it was stopped early; run '
                             f'it again')
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f'{path} cannot be read: {error}')
        footer, content = bytes(content[-FOOTER_SIZE:]), content[:-FOOTER_SIZE]
        if check and footer != MAGIC + hashlib.blake2b(content, digest_size=16).digest():
            raise InputError(f'{path} is damaged: its checksum does not match; {again}')
        try:
            batch = pa.ipc.open_stream(pa.py_buffer(content)).read_next_batch()
            batch.validate(full=True)
        except (pa.ArrowException, OSError, StopIteration) as error:
            raise InputError(f'{path} is damaged: {str(error).strip() or type(error).__name__}; {again}')
        if not batch.schema.equals(_schema(manifest), check_metadata=True) or batch.num_rows != manifest.num_samples:
            raise InputError(f'{path} holds the keys of another store; {again}')
        # Arrow's own way to numpy imports pandas: 23 MB in every process.
        hashes, rows = (np.frombuffer(column.buffers()[1], '<u8', batch.num_rows) for column in batch.columns)
        return cls(folder, manifest, hashes, rows, status)

    def rows_of(self, keys: pa.Array | pa.ChunkedArray, hashes: np.ndarray) -> np.ndarray:
        """Rows, int64 [B], of the samples of these keys [B], whose hashes, uint64 [B], are known already.

        Raises:
            InputError: The store does not have a key.
        """
        rows = self.find(hashes)
        absent = np.flatnonzero(rows < 0)
        if len(absent):
            raise InputError(f'the store {self.folder} has no sample with key {keys[absent[0]].as_py()!r}; leave '
                             f'out what it was not made from, or make a store for this data set')
        return rows

    def by_row(self) -> np.ndarray:
        """The hash of the key of each row, uint64 [num_samples].

        Raises:
            InputError: The rows are not those of the store.
        """
        hashes = np.empty_like(self.hashes)
        if not np.array_equal(np.sort(self.rows), np.arange(len(self))):
            raise InputError(f'the keys of {self.folder} name rows that it does not have; fill it again with '
                             f'timm-tinyvit fill --logits {self.folder}')
        hashes[self.rows] = self.hashes
        return hashes

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Rows, int64 [B], of the samples with these hashes, uint64 [B]; -1 where the store has none.

        Raises:
            InputError: The file has changed since it was mapped, and is damaged.
        """
        if file_status(self.folder / FILE_NAME) not in (None, self.status):
            # What was cut short where it lies would end the process with SIGBUS.
            vars(self).update(vars(KeyIndex.open(self.folder, self.manifest)))
        # In ascending order neighbours are found in the same pages: 0.25 us a key among 14 million instead of 1.4.
        order = np.argsort(hashes)
        places = np.empty_like(order)
        places[order] = np.searchsorted(self.hashes, hashes[order])
        places[places == len(self.hashes)] = 0
        return np.where(self.hashes[places] == hashes, self.rows[places].astype(np.int64), -1)


def _schema(manifest: Manifest) -> pa.Schema:
    columns = [pa.field(name, pa.uint64(), nullable=False) for name in ('hash', 'row')]
    metadata = {'format': FORMAT, 'store': manifest.identity}
    return pa.schema(columns, metadata={METADATA_KEY: json.dumps(metadata)})
