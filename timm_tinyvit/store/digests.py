"""Digests of the images that a store was filled from, so that a changed one among millions is found, and named.

`images/shard-00003.digests` holds for each row of that shard, whatever the epoch, the BLAKE2b hash of 8 bytes of its
image as it is encoded, and behind them the hash of 16 bytes of all of these, keyed with the store's identity. Who fills
writes them; no record and no manifest depends on them, and a store without them is a whole one.
"""

import hashlib
from pathlib import PurePosixPath

import numpy as np

from ..base.errors import InputError

__all__ = ['DIGESTS_FOLDER', 'decode_digests', 'digests_name', 'encode_digests', 'image_digest']

DIGESTS_FOLDER = 'images'
FOOTER_SIZE = 16


def image_digest(content: bytes) -> int:
    """The digest of an encoded image, a signed integer of 64 bits, as tensors hold them."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), 'little', signed=True)


def digests_name(shard: int) -> str:
    """The file of the digests of a shard's rows, from the folder of the store."""
    return str(PurePosixPath(DIGESTS_FOLDER, f'shard-{shard:05d}.digests'))


def encode_digests(digests: np.ndarray, identity: str) -> bytes:
    """The file of digests, int64 [rows], for the store of this identity."""
    content = digests.astype('<i8').tobytes()
    return content + _checksum(content, identity)


def decode_digests(data: bytes, rows: int, identity: str, path: object) -> np.ndarray:
    """The digests, int64 [rows], of a file at this path.

    Raises:
        InputError: It is damaged, or of another store.
    """
    content = data[:-FOOTER_SIZE]
    if len(content) != 8 * rows or data[-FOOTER_SIZE:] != _checksum(content, identity):
        raise InputError(f'{path} is damaged or of another store; delete it, and timm-tinyvit data check writes it '
                         f'again')
    return np.frombuffer(content, dtype='<i8').astype(np.int64)


def _checksum(content: bytes, identity: str) -> bytes:
    return hashlib.blake2b(content, digest_size=FOOTER_SIZE, key=identity.encode()).digest()
