"""Checksums of weights and checkpoints: what this package has written is read as it was written, or not at all.

A checkpoint of torch ends with a footer of 24 bytes, a magic and the BLAKE2b-128 of everything before it, which torch
passes over; torch itself looks at no checksum when it reads. safetensors allows nothing after its tensors: there the
same hash stands in the metadata of the header, and is taken with zeros in its own place. Files of others have neither,
and are read as they are.
"""

import hashlib
import json
import os
import re
from pathlib import Path

from .errors import InputError

__all__ = ['check_checksum', 'footer', 'with_checksum']

MAGIC = b'TTVTORCH'
SIZE = 16
FOOTER_SIZE = len(MAGIC) + SIZE
# A checkpoint of a run is known by its name too, so that one without its footer is not taken for somebody else's.
CHECKPOINT = re.compile(r'checkpoint-\d{6,}-\d{12,}\.pt')
# In the header of safetensors. A bit that flips leaves at least one of the two, by which it is known.
KEY, PREFIX = b'"checksum":"', b'blake2b-128 of timm_tinyvit: '
MAX_HEADER = 100_000_000  # as in safetensors
CHUNK = 1 << 20


def footer(content: bytes | memoryview) -> bytes:
    """What is to follow the content of a checkpoint."""
    return MAGIC + hashlib.blake2b(content, digest_size=SIZE).digest()


def with_checksum(content: bytes) -> list[bytes | memoryview]:
    """The parts of a file of safetensors with its checksum, of one without it."""
    start = 8 + int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:start])
    zeros = '0' * 2 * SIZE
    header['__metadata__'] = header.get('__metadata__', {}) | {'checksum': PREFIX.decode() + zeros}
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    head, tensors = len(text).to_bytes(8, 'little') + text, memoryview(content)[start:]
    digest = hashlib.blake2b(head, digest_size=SIZE)
    digest.update(tensors)
    return [head.replace(PREFIX + zeros.encode(), PREFIX + digest.hexdigest().encode(), 1), tensors]


def check_checksum(path: Path) -> None:
    """Compare a file with its checksum, where it has one or should have one.

    Raises:
        InputError: It is not as it was written.
        OSError: It cannot be read.
    """
    with open(path, 'rb') as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - FOOTER_SIZE))
        last = file.read(FOOTER_SIZE)
        if last.startswith(MAGIC) or CHECKPOINT.fullmatch(path.name):
            file.seek(0)
            digest, left = hashlib.blake2b(digest_size=SIZE), size - FOOTER_SIZE
            while left > 0 and (part := file.read(min(CHUNK, left))):
                digest.update(part)
                left -= len(part)
            is_whole = last == MAGIC + digest.digest()
        else:
            file.seek(0)
            length = file.read(8)
            header = file.read(min(int.from_bytes(length, 'little'), MAX_HEADER, size))
            if KEY not in header and PREFIX not in header:
                return
            place = header.find(KEY + PREFIX) + len(KEY + PREFIX)
            digest = hashlib.blake2b(length + header[:place] + b'0' * 2 * SIZE, digest_size=SIZE)
            digest.update(header[place + 2 * SIZE:])
            while part := file.read(CHUNK):
                digest.update(part)
            is_whole = header[place:place + 2 * SIZE] == digest.hexdigest().encode()
    if not is_whole:
        raise InputError(f'{path} is not as it was written: its checksum does not match')
