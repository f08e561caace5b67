"""The format of a shard: a run of consecutive samples of one epoch, in one file.

A shard is an Arrow IPC stream of one record batch with one column, followed by a footer of 24 bytes (the magic
`TTVSHARD` and the BLAKE2b-128 of everything before it), which Arrow's readers pass over. Records of fixed width lie one
after the other at a fixed place; those of variable length are a `binary` column, its offsets before its data. The
header names the store, the epoch and the shard, and is compared byte by byte with what it must be, so that nothing is
parsed: what is read is either this very shard, whole and unchanged, or an `InputError`. docs/format.md has every byte.
"""

import hashlib
import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ..base.errors import InputError
from ..targets.codec import Codec
from .arrow import END_OF_STREAM, HEADER_SIZE, stream_header
from .manifest import FORMAT, Manifest

__all__ = ['FOOTER_SIZE', 'MAGIC', 'MappedShard', 'ShardFormat', 'shard_name']

MAGIC = b'TTVSHARD'
FOOTER_SIZE = len(MAGIC) + 16
MAX_OFFSET = (1 << 31) - 1
# Stands in a header for the numbers of epoch and shard, which are as wide.
NUMBER = ' <number>'


def shard_name(shard: int) -> str:
    """The name of a shard's file in the folder of its epoch."""
    return f'shard-{shard:05d}.arrow'


def _padding(size: int) -> int:
    return -size % 8


class MappedShard(NamedTuple):
    """A checked shard in memory: views of its file, which stay valid as long as they are held.

    Attributes:
        data: The bytes of its records.
        offsets: Where each record begins in `data`, and where the last one ends; None if all have the same width.
    """
    data: memoryview
    offsets: memoryview | None = None


class ShardFormat:
    """The shards of one store as bytes, written and read.

    Args:
        manifest: The store's manifest.
        codec: The codec of its records.
    """

    def __init__(self, manifest: Manifest, codec: Codec):
        self.manifest = manifest
        self.codec = codec
        self._identity = manifest.identity

    def encode(self, epoch: int, shard: int, records: np.ndarray) -> list[bytes | memoryview]:
        """A whole shard as parts to write one after the other.

        Args:
            epoch: Its epoch.
            shard: Its place in the epoch.
            records: Its records, uint8 [rows, width].

        Raises:
            ValueError: The shape is not that of this shard.
            InputError: The records take more than Arrow's offsets can count.
        """
        shape = (self.manifest.shard_rows(shard), self.manifest.record_width)
        if records.shape != shape or records.dtype != np.uint8:
            raise ValueError(f'shard {shard} takes uint8 {list(shape)}, not {records.dtype} {list(records.shape)}')
        if self.codec.is_variable:
            data, offsets = self.codec.pack(records)
            if len(data) > MAX_OFFSET:
                raise InputError(
                    f'a shard of {shape[0]:,} samples takes {len(data):,} bytes, expected {MAX_OFFSET:,} at most; '
                    f'choose a smaller --shard-size')
            offsets = offsets.astype('<i4').tobytes()
            parts = [offsets + bytes(_padding(len(offsets))), np.ascontiguousarray(data).data]
        else:
            data = np.ascontiguousarray(records).reshape(-1)
            parts = [data.data]
        parts = [self._header(epoch, shard, len(data)), *parts, bytes(_padding(len(data))) + END_OF_STREAM]
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(part)
        return [*parts, MAGIC + digest.digest()]

    def check(self, path: Path, epoch: int, shard: int) -> int:
        """Check the length and the header of a shard, and nothing else.

        Returns:
            Bytes of its records.

        Raises:
            InputError: The file is missing, cut short, or another shard.
        """
        rows = self.manifest.shard_rows(shard)
        smallest = HEADER_SIZE + rows * (4 if self.codec.is_variable else self.manifest.record_width) + FOOTER_SIZE
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f'{path} is not a file; {_remedy(path)}')
            if status.st_size < smallest:
                raise InputError(f'{path} is cut short: {status.st_size} bytes for {rows} records; {_remedy(path)}')
            with open(path, 'rb', buffering=0) as file:
                header = file.read(HEADER_SIZE)
                size = rows * self.manifest.record_width
                if self.codec.is_variable:
                    file.seek(HEADER_SIZE + 4 * rows)
                    size = int.from_bytes(file.read(4), 'little')
        except OSError as error:
            raise _unreadable(path, epoch, shard, error)
        if header != self._header(epoch, shard, size):
            raise InputError(f'{path} is damaged, or a shard of another store, epoch or place; {_remedy(path)}')
        expected = self._file_size(rows, size)
        if status.st_size != expected:
            raise InputError(f'{path} has {status.st_size} bytes, expected {expected}: it is damaged; {_remedy(path)}')
        return size

    def map(self, path: Path, epoch: int, shard: int) -> MappedShard:
        """Map a shard into memory and check it whole: that it is this very shard, and its checksum.

        Raises:
            InputError: The file is missing, damaged, or another shard.
        """
        size = self.check(path, epoch, shard)
        rows = self.manifest.shard_rows(shard)
        try:
            # Unlike Python's own, a map of pyarrow needs no open file, of which there are few.
            with pa.memory_map(str(path)) as file:
                content = memoryview(file.read_buffer()).cast('B')
        except OSError as error:
            raise _unreadable(path, epoch, shard, error)
        body, footer = content[:-FOOTER_SIZE], content[-FOOTER_SIZE:]
        if len(content) != self._file_size(rows, size) or \
                footer != MAGIC + hashlib.blake2b(body, digest_size=16).digest():
            raise InputError(f'{path} is damaged: its checksum does not match; {_remedy(path)}')
        start = self._data_start(rows)
        data = content[start:start + size]
        if not self.codec.is_variable:
            return MappedShard(data)
        offsets = content[HEADER_SIZE:HEADER_SIZE + 4 * (rows + 1)].cast('i')
        lengths = np.diff(np.asarray(offsets, dtype=np.int64))
        if offsets[0] != 0 or lengths.min() < 0 or lengths.max() > self.codec.width:
            raise InputError(f'{path} is damaged: its records have lengths that there are not; {_remedy(path)}')
        return MappedShard(data, offsets)

    def _data_start(self, rows: int) -> int:
        """Where the bytes of the records begin."""
        offsets = 4 * (rows + 1) if self.codec.is_variable else 0
        return HEADER_SIZE + offsets + _padding(offsets)

    def _file_size(self, rows: int, data_size: int) -> int:
        return self._data_start(rows) + data_size + _padding(data_size) + len(END_OF_STREAM) + FOOTER_SIZE

    def _header(self, epoch: int, shard: int, data_size: int) -> bytes:
        width = None if self.codec.is_variable else self.manifest.record_width
        before, between, after = _header_parts(self._identity, width, self.manifest.shard_rows(shard), data_size)
        return before + b'%9d' % epoch + between + b'%9d' % shard + after


@lru_cache(maxsize=16)
def _header_parts(identity: str, width: int | None, rows: int, data_size: int) -> Sequence[bytes]:
    """What stands in a header before, between and after the numbers of epoch and shard."""
    metadata = f'{{"format": "{FORMAT}", "store": "{identity}", "epoch":{NUMBER}, "shard":{NUMBER}}}'
    buffers = [(0, 0), (0, data_size)]
    if width is None:
        offsets = 4 * (rows + 1)
        buffers = [(0, 0), (0, offsets), (offsets + _padding(offsets), data_size)]
    return stream_header(width, rows, buffers, metadata).split(NUMBER.encode())


def _remedy(path: Path) -> str:
    return f'delete it and fill the store again (save_logits --logits {path.parents[1]})'


def _unreadable(path: Path, epoch: int, shard: int, error: OSError) -> InputError:
    if not isinstance(error, FileNotFoundError):
        return InputError(f'{path} cannot be read: {error.strerror or error}')
    if not os.path.exists(path.parents[1]):
        return InputError(f'the store {path.parents[1]} has vanished; bring it back, or fill it again')
    return InputError(
        f'the store {path.parents[1]} has no shard {shard} of epoch {epoch}: it was not filled to the end; run the '
        f'save_logits command that made it again')
