"""The bytes of an Arrow IPC stream before its data: one schema, one record batch, one column of records.

They are laid out here and not by pyarrow, so that they are the same on every machine and with every version of pyarrow:
a reader compares them with what they must be, and no parser ever sees the bytes of a damaged or hostile file.
`HEADER_SIZE` is the same for every column, so that data begin at a fixed place. Messages are flatbuffers; the numbers
of fields and types are those of Arrow's `Message.fbs` and `Schema.fbs`.
"""

import struct
from dataclasses import dataclass
from collections.abc import Sequence

__all__ = ['END_OF_STREAM', 'HEADER_SIZE', 'METADATA_KEY', 'stream_header']

METADATA_KEY = b'timm_tinyvit'
HEADER_SIZE = 576  # a multiple of 64, as Arrow likes its data
END_OF_STREAM = struct.pack('<II', 0xFFFFFFFF, 0)
METADATA_VERSION = 4  # V5
SCHEMA_MESSAGE, BATCH_MESSAGE = 1, 3
FIXED_SIZE_BINARY_TYPE = 15


@dataclass(frozen=True)
class _Object:
    """A flatbuffer object: its bytes, where in them it starts, and which objects the offsets in them point to."""
    data: bytes
    start: int = 0
    targets: Sequence[tuple[int, '_Object']] = ()


def _table(*fields: tuple[str, int] | _Object | None) -> _Object:
    """A table of numbers as (struct code, value), of objects, and of absent fields."""
    body, places, targets = bytearray(4), [], []
    for field in fields:
        if field is None:
            places.append(0)
            continue
        code, value = ('I', 0) if isinstance(field, _Object) else field
        body += bytes(-len(body) % struct.calcsize(code))
        places.append(len(body))
        if isinstance(field, _Object):
            targets.append((len(body), field))
        body += struct.pack(f'<{code}', value)
    vtable = struct.pack(f'<{2 + len(places)}H', 4 + 2 * len(places), len(body), *places)
    vtable += bytes(-len(vtable) % 8)
    struct.pack_into('<i', body, 0, len(vtable))
    return _Object(vtable + body, len(vtable), [(len(vtable) + place, target) for place, target in targets])


def _text(text: str) -> _Object:
    data = text.encode()
    return _Object(struct.pack('<I', len(data)) + data + b'\0')


def _vector(*items: _Object) -> _Object:
    return _Object(struct.pack('<I', len(items)) + bytes(4 * len(items)),
                   targets=[(4 + 4 * place, item) for place, item in enumerate(items)])


def _pairs(*pairs: tuple[int, int]) -> _Object:
    """A vector of structs of two 64-bit numbers, which begin at a multiple of 8."""
    numbers = [number for pair in pairs for number in pair]
    return _Object(struct.pack(f'<II{len(numbers)}q', 0, len(pairs), *numbers), start=4)


def _append(out: bytearray, item: _Object) -> int:
    """Append an object and what it points to; returns where it starts."""
    out += bytes(-len(out) % 8)
    first = len(out)
    out += item.data
    for place, target in item.targets:
        struct.pack_into('<I', out, first + place, _append(out, target) - first - place)
    return first + item.start


def _message(kind: int, header: _Object, body_size: int, size: int = 0) -> bytes:
    """An encapsulated message, zeros up to `size` included."""
    out = bytearray(8)
    root = _append(out, _table(('h', METADATA_VERSION), ('B', kind), header, ('q', body_size)))
    struct.pack_into('<I', out, 0, root)
    out += bytes(max(-len(out) % 8, size - 8 - len(out)))
    return struct.pack('<Ii', 0xFFFFFFFF, len(out)) + out


def stream_header(width: int, num_rows: int, metadata: str) -> bytes:
    """The first `HEADER_SIZE` bytes of a stream of one batch of the column `record`.

    Args:
        width: Bytes of a record.
        num_rows: Records in the batch.
        metadata: What the schema says under the key `timm_tinyvit`.
    """
    column = _table(_text('record'), ('B', 0), ('B', FIXED_SIZE_BINARY_TYPE), _table(('i', width)), None, _vector())
    schema = _table(None, _vector(column), _vector(_table(_text(METADATA_KEY.decode()), _text(metadata))))
    start = _message(SCHEMA_MESSAGE, schema, 0)
    size = width * num_rows
    # Two buffers: no validity bits, as no record is null, and the records.
    batch = _table(('q', num_rows), _pairs((num_rows, 0)), _pairs((0, 0), (0, size)))
    start += _message(BATCH_MESSAGE, batch, size + -size % 8, HEADER_SIZE - len(start))
    assert len(start) == HEADER_SIZE
    return start
