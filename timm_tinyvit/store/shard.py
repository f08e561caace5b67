"""The format of a shard: a run of consecutive samples of one epoch, in one file.

A shard is an Arrow IPC stream of one record batch with one column, followed by a footer of 24 bytes (the magic
`TTVSHARD` and the BLAKE2b-128 of everything before it), which Arrow's readers pass over. Records have one width and lie
one after the other at a fixed place. The header names the store, the epoch and the shard, and is compared byte by byte
with what it must be, so that nothing is parsed: what is read is either this very shard, whole and unchanged, or an
`InputError`. docs/format.md has every byte.
"""

import hashlib
import os
import re
import stat
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..base.errors import InputError
from .arrow import END_OF_STREAM, HEADER_SIZE, stream_header
from .manifest import FORMAT, Manifest

__all__ = ['FOOTER_SIZE', 'MAGIC', 'SHARD_PATH', 'ShardFormat', 'epoch_name', 'file_status', 'shard_name']

MAGIC = b'TTVSHARD'
FOOTER_SIZE = len(MAGIC) + 16
# The file of a shard in a store, its numbers of epoch and shard as groups.
SHARD_PATH = re.compile(r'epoch-(\d{5,})/shard-(\d{5,})\.arrow')


def epoch_name(epoch: int) -> str:
    """The name of an epoch's folder."""
    return f'epoch-{epoch:05d}'


def shard_name(shard: int) -> str:
    """The name of a shard's file in the folder of its epoch."""
    return f'shard-{shard:05d}.arrow'


class ShardFormat:
    """The shards of one store as bytes, written and read.

    Args:
        manifest: The store's manifest.
    """

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._identity = manifest.identity

    def encode(self, epoch: int, shard: int, records: np.ndarray) -> list[bytes | memoryview]:
        """A whole shard as parts to write one after the other.

        Args:
            epoch: Its epoch.
            shard: Its place in the epoch.
            records: Its records, uint8 [rows, width].

        Raises:
            ValueError: The shape is not that of this shard.
        """
        shape = (self.manifest.shard_rows(shard), self.manifest.record_width)
        if records.shape != shape or records.dtype != np.uint8:
            raise ValueError(f'shard {shard} takes uint8 {list(shape)}, not {records.dtype} {list(records.shape)}')
        data = np.ascontiguousarray(records).reshape(-1)
        parts = [self._header(epoch, shard), data.data, bytes(-len(data) % 8) + END_OF_STREAM]
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(part)
        return [*parts, MAGIC + digest.digest()]

    def check(self, path: Path, epoch: int, shard: int) -> None:
        """Check the length and the header of a shard, and nothing else.

        Raises:
            InputError: The file is missing, cut short, or another shard.
        """
        expected = self.file_size(shard)
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f'{path} is not a file; {_remedy(path)}')
            if status.st_size < expected:
                raise InputError(f'{path} is cut short: {status.st_size} bytes, expected {expected}; {_remedy(path)}')
            with open(path, 'rb', buffering=0) as file:
                header = file.read(HEADER_SIZE)
        except OSError as error:
            raise _unreadable(path, epoch, shard, error)
        if header != self._header(epoch, shard):
            raise InputError(f'{path} is damaged, or a shard of another store, epoch or place; {_remedy(path)}')
        if status.st_size != expected:
            raise InputError(f'{path} has {status.st_size} bytes, expected {expected}: it is damaged; {_remedy(path)}')

    def map(self, path: Path, epoch: int, shard: int) -> memoryview:
        """Map a shard into memory and check it whole: that it is this very shard, and its checksum.

        Returns:
            Its records one after the other, a view of the file that stays valid as long as it is held.

        Raises:
            InputError: The file is missing, damaged, or another shard.
        """
        self.check(path, epoch, shard)
        try:
            # Unlike Python's own, a map of pyarrow needs no open file, of which there are few.
            with pa.memory_map(str(path)) as file:
                content = memoryview(file.read_buffer()).cast('B')
        except OSError as error:
            raise _unreadable(path, epoch, shard, error)
        body, footer = content[:-FOOTER_SIZE], content[-FOOTER_SIZE:]
        if len(content) != self.file_size(shard) or \
                footer != MAGIC + hashlib.blake2b(body, digest_size=16).digest():
            raise InputError(f'{path} is damaged: its checksum does not match; {_remedy(path)}')
        return content[HEADER_SIZE:HEADER_SIZE + self._data_size(shard)]

    def _data_size(self, shard: int) -> int:
        return self.manifest.shard_rows(shard) * self.manifest.record_width

    def file_size(self, shard: int) -> int:
        """Bytes of the file of a shard."""
        size = self._data_size(shard)
        return HEADER_SIZE + size + -size % 8 + len(END_OF_STREAM) + FOOTER_SIZE

    def _header(self, epoch: int, shard: int) -> bytes:
        metadata = f'{{"format": "{FORMAT}", "store": "{self._identity}", "epoch":{epoch:9}, "shard":{shard:9}}}'
        return stream_header(self.manifest.record_width, self.manifest.shard_rows(shard), metadata)


def file_status(path: str | Path) -> tuple[int, ...] | None:
    """What changes when a file is written anew, in place or not: inode, time and length; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _remedy(path: Path) -> str:
    return f'delete it and fill the store again with timm-tinyvit fill --logits {path.parents[1]}'


def _unreadable(path: Path, epoch: int, shard: int, error: OSError) -> InputError:
    if not isinstance(error, FileNotFoundError):
        return InputError(f'{path} cannot be read: {error.strerror or error}')
    if not os.path.exists(path.parents[1]):
        return InputError(f'the store {path.parents[1]} has vanished; bring it back, or fill it again')
    return InputError(
        f'the store {path.parents[1]} has no shard {shard} of epoch {epoch}: it was not filled to the end; fill '
        f'it with timm-tinyvit fill --logits {path.parents[1]}')
