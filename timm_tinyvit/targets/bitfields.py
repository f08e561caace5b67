"""Records as strings of bits: fields of numbers, and a check over all of them.

Bit i of a record is bit i % 8 of byte i // 8. A field is one number, or several of equally many bits each.

    bytes     of every field of several numbers of b bits: their lowest b // 8 bytes, byte after byte: the lowest byte
              of each number, then the next byte of each
    bits      every field in turn, without gaps: one number with its lowest bit first; of several numbers the b % 8
              bits that are left, bit after bit: the lowest of each number, then the next of each
    spare     zeros, so that the check ends with a byte
    check     one number of 8 bits, of 16 where the fields have more than 218

The record, read as one number, is a multiple of q, and the check is the one from f to f + q - 1 that makes it so:
f = 1 and q = 227 with 8 bits, 256 and 65269 with 16. The last byte is never zero. A record with one bit changed is
refused, and so is one with a bit moved from anywhere to anywhere: all powers of two in a record differ modulo q, as 2
has the order 226 modulo 227 and 65268 modulo 65269.

Reading is written once, for numpy and torch: `xp` is either, and what is used of both has the same name.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ['Array', 'FieldLayout', 'FieldReader', 'refuse']

Array = Any  # of numpy or torch


class _Field(NamedTuple):
    count: int  # how many numbers
    bits: int  # of each number
    whole: int  # of it, bytes at the beginning of the record
    first_byte: int  # of them
    first_bit: int  # of the other bits


def refuse(bad: np.ndarray, reason: str) -> None:
    """Raise a ValueError that names the first bad row; `bad` is bool [B], or [B, anything]."""
    if bad.any():
        row = bad.reshape(len(bad), -1).any(axis=1).argmax()
        raise ValueError(f'record {row} of {len(bad)} {reason}')


class FieldLayout:
    """Where the fields of a record are.

    Args:
        fields: Name, count and bits of each: how many numbers, and of how many bits. One number has 62 bits at most,
            and what has more than 56 comes first; of several each has 16 at most.

    Attributes:
        width: Bytes of a record.
    """

    def __init__(self, fields: Sequence[tuple[str, int, int]]):
        self._bits_from = sum(count * (bits // 8) for _, count, bits in fields if count > 1)
        self._planes_to = self._bits_from  # the byte after the last bit of several numbers
        byte, bit = 0, 8 * self._bits_from
        self._fields: dict[str, _Field] = {}
        for name, count, bits in fields:
            whole = bits // 8 if count > 1 else 0
            self._fields[name] = _Field(count, bits, whole, byte, bit)
            byte += count * whole
            bit += count * (bits - 8 * whole)
            if count > 1:
                self._planes_to = -(-bit // 8)
        check_bits = 8 if bit <= 218 else 16
        spare_bits = -(bit + check_bits) % 8
        self._fields['spare'] = _Field(1, spare_bits, 0, 0, bit)
        self._fields['check'] = _Field(1, check_bits, 0, 0, bit + spare_bits)
        self.width = (bit + spare_bits + check_bits) // 8
        self._check_first, self._modulus = (1, 227) if check_bits == 8 else (256, 65269)
        # Products and sums of bytes with these stay below 2^53, where float64, the fast way, is exact.
        self._check_weights = np.array([pow(256, byte, self._modulus) for byte in range(self.width)], dtype=np.float64)

    def write(self, numbers: dict[str, np.ndarray]) -> np.ndarray:
        """Records, uint8 [B, width], of the numbers of every field, each an integer array [B, count]."""
        batch = len(next(iter(numbers.values())))
        records = np.empty((batch, self.width), dtype=np.uint8)
        bits = np.zeros((batch, 8 * (self.width - self._bits_from)), dtype=np.uint8)
        for name, values in numbers.items():
            count, width, whole, first_byte, first_bit = self._fields[name]
            for byte in range(whole):
                start = first_byte + byte * count
                records[:, start:start + count] = values >> 8 * byte & 0xFF
            for bit in range(width - 8 * whole):
                start = first_bit - 8 * self._bits_from + bit * count
                bits[:, start:start + count] = values >> 8 * whole + bit & 1
        records[:, self._bits_from:] = np.packbits(bits, axis=1, bitorder='little')

        start = self._fields['check'].first_bit
        share = pow(2, -start, self._modulus)
        checks = self._check_first + (-self._remainders(records) * share - self._check_first) % self._modulus
        for byte in range(start // 8, self.width):
            records[:, byte] |= (checks << start % 8 >> 8 * (byte - start // 8) & 0xFF).astype(np.uint8)
        return records

    def check(self, reader: 'FieldReader') -> None:
        """Raise a ValueError that names the first record whose check or spare bits are wrong."""
        refuse(self._remainders(reader.records) != 0, 'does not match its check')
        excess = reader.number('check') - self._check_first
        refuse((excess < 0) | (excess >= self._modulus), 'has a check out of range')
        refuse(reader.number('spare') != 0, 'has spare bits that are not zero')

    def _remainders(self, records: np.ndarray) -> np.ndarray:
        """Each record as one number modulo that of the check, int64 [B]."""
        return (records @ self._check_weights).astype(np.int64) % self._modulus


class FieldReader:
    """The fields of records, uint8 [B, width]; what several fields share is unpacked once.

    Args:
        layout: The layout of the records.
        records: The records, of numpy or torch.
        xp: numpy or torch.
    """

    def __init__(self, layout: FieldLayout, records: Array, xp: Any):
        self.layout = layout
        self.records = records
        self.xp = xp
        self._words: dict[int, Array] = {}
        part = records[:, layout._bits_from:layout._planes_to]
        if xp is np:
            self._planes = np.unpackbits(part, axis=1, bitorder='little')
        else:
            bits = 1 << torch.arange(8, dtype=torch.uint8, device=records.device)
            self._planes = ((part[:, :, None] & bits) != 0).view(torch.uint8).flatten(1)  # [B, bits]

    def number(self, name: str) -> Array:
        """A field of one number, int64 [B]."""
        field = self.layout._fields[name]
        first = max(0, min(field.first_bit // 8, self.layout.width - 8))
        if first not in self._words:
            word = self.records[:, first:first + 8]
            if self.layout.width < 8:
                empty = (len(word), 8 - self.layout.width)
                word = self.xp.concat([word, self.xp.zeros(empty, dtype=self.xp.uint8, device=word.device)], 1)
            # A copy, since a view of one row keeps the odd stride and offset of the records.
            word = word.copy() if self.xp is np else word.clone(memory_format=torch.contiguous_format)
            self._words[first] = word.view(self.xp.int64)[:, 0]
        return self._words[first] >> field.first_bit - 8 * first & (1 << field.bits) - 1

    def numbers(self, name: str) -> Array:
        """The numbers of a field, [B, count], of any integer type."""
        count, width, whole, first_byte, first_bit = self.layout._fields[name]
        if count == 1:
            return self.number(name)[:, None]
        first_bit -= 8 * self.layout._bits_from
        numbers = None
        for bit in reversed(range(width - 8 * whole)):
            plane = self._planes[:, first_bit + bit * count:first_bit + (bit + 1) * count]
            if numbers is None:
                numbers = plane
            else:
                numbers = numbers + numbers
                numbers += plane
        for byte in reversed(range(whole)):
            part = self.records[:, first_byte + byte * count:first_byte + (byte + 1) * count]
            numbers = part if numbers is None else self.xp.asarray(numbers, dtype=self.xp.int32) << 8 | part
        return numbers
