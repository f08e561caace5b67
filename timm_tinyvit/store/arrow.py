"""The bytes of an Arrow IPC stream before its data: one schema, one record batch, one column of fixed-size records.

They are kept here and not made by pyarrow, so that they are the same on every machine and with every version of
pyarrow: a reader compares them with what they must be, and no parser ever sees the bytes of a damaged or hostile file.
But for some numbers and the name of the store they are the same for every shard; docs/format.md explains them.
"""

import struct

__all__ = ['END_OF_STREAM', 'HEADER_SIZE', 'METADATA_KEY', 'stream_header']

METADATA_KEY = b'timm_tinyvit'
HEADER_SIZE = 576  # a multiple of 64, as Arrow likes its data
END_OF_STREAM = struct.pack('<II', 0xFFFFFFFF, 0)
# Of shard 7 of epoch 3, of 16,384 records of 18 bytes: a schema message and a record batch message, as flatbuffers.
EXAMPLE = bytes.fromhex("""
    ffffffff 60010000 18000000 00000000 0c001800 04000600 08001000 00000000
    10000000 04000100 20000000 00000000 00000000 00000000 0a000c00 00000400
    08000000 00000000 10000000 0c000000 60000000 00000000 01000000 14000000
    10001400 04000800 09000c00 00001000 10000000 14000000 000f0000 24000000
    28000000 00000000 06000000 7265636f 72640000 00000000 06000800 04000000
    08000000 12000000 00000000 00000000 01000000 0c000000 08000c00 04000800
    08000000 0c000000 20000000 00000000 0c000000 74696d6d 5f74696e 79766974
    00000000 00000000 74000000 7b22666f 726d6174 223a2022 74696d6d 5f74696e
    79766974 2e6c6f67 69747322 2c202273 746f7265 223a2022 30313233 34353637
    38396162 63646566 30313233 34353637 38396162 63646566 222c2022 65706f63
    68223a20 20202020 20202033 2c202273 68617264 223a2020 20202020 2020377d
    00000000 00000000 ffffffff d0000000 18000000 00000000 0c001800 04000600
    08001000 00000000 10000000 04000300 20000000 00000000 00800400 00000000
    0a001800 08001000 14000000 00000000 10000000 00000000 00400000 00000000
    0c000000 20000000 00000000 01000000 00400000 00000000 00000000 00000000
    00000000 02000000 00000000 00000000 00000000 00000000 00000000 00000000
    00800400 00000000 00000000 00000000 00000000 00000000 00000000 00000000
    00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000
""")
METADATA_OFFSET = 236


def stream_header(width: int, num_rows: int, metadata: str) -> bytes:
    """The first `HEADER_SIZE` bytes of a stream of one batch of the column `record`.

    Args:
        width: Bytes of a record.
        num_rows: Records in the batch.
        metadata: The text of the schema under the key `timm_tinyvit`, as long as that of every shard.
    """
    header, text, size = bytearray(EXAMPLE), metadata.encode(), width * num_rows
    header[METADATA_OFFSET:METADATA_OFFSET + len(text)] = text
    struct.pack_into('<i', header, 164, width)
    # Bytes of the body, records of the batch and of its column, bytes of the records.
    for offset, number in ((408, size + -size % 8), (440, num_rows), (464, num_rows), (512, size)):
        struct.pack_into('<q', header, offset, number)
    return bytes(header)
