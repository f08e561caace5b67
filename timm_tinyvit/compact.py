"""CompactCodec: teacher probabilities in a third of the official bytes, hardly further from the teacher.

The format
----------
A record is a string of bits; bit i is bit i % 8 of byte i // 8. Its fields follow each other without gaps. Of one
number the lowest bit comes first; of several, the lowest bit of each of them, then the next bit of each, and so on.
All widths follow from the number of classes C, k, the number of levels n, the remainder rule, and whether records are
`counted`, so that fewer than k entries may count; they are where the remainder is `none`, and else on demand.

    classes    where the k ones of a string of U bits are: the string itself, or its rank where that is shorter
    low        k numbers of l bits
    levels     G numbers of w bits
    range      1 number of 5 bits
    rest       1 number of 8 bits; 16 with the remainder `none`; else no bits where k = C, which leaves no other class
    valid      how many entries count, a number of as many bits as k has; no bits unless counted
    spare      zeros, so that the check ends with a byte
    check      1 number of 8 bits, 16 if the fields before `spare` take more than 218

Up to k = 16 `range` has 4 bits and `rest` 7 instead of 8; in the small setting up to k = 16 they have 5 and 6, and
`check` has 2. Unless chosen, n is 24 up to k = 16, 45 up to 128, else 80; in the small setting 12, 32 and 45; with the
remainder `none` 80.

Classes (after Elias and Fano). Entries are in class order, c_0 < c_1 < ... The gap m_j = c_j - j never falls from one
entry to the next and reaches M = C - k at most. `low` holds m_j mod 2^l, and the string has its ones at the places
p_j = floor(m_j / 2^l) + j, so that U = k + floor(M / 2^l). The rank of a string is the sum of binomial(p_j, j + 1);
it has the bits of the number binomial(U, k) - 1, and is used for k up to 24 and ranks of up to 62 bits. Of all l from
0 to 16, with string and with rank, the one with the fewest bits is taken: the smallest l, and at that l the rank.
In counted records M = C - 1, and the entries that do not count repeat the gap of the last one that does, or 0.

Probabilities. The level v_j of entry j, 0 to n - 1, is digit floor(j / G) in base n of number j mod G. A number has d
digits, 1 to 5, and the w bits of n^d - 1, 30 at most; G = ceil(k / d), and d is what makes G * w smallest, the
smallest such d. With R = 2^(4 * range / (2^bits - 1)), 1 to 16, the probability of entry j is in proportion to u_j^8,
u_j = 1 - (1 - exp(-R / 8)) * v_j / (n - 1): the largest is at level 0, R is how far below it level n - 1 is in
natural logarithms, and the levels lie closer where there is more mass. The entries sum to 1 less the rest mass
1 / (1 + exp(-y)), where y = t - (t + 10) * rest / (2^bits - 1), t = log(M / k) (log(M) if counted), the most
there can be. With the remainder `none` they sum to exp(rest / 2048 - 16) and there is no rest mass.

Check. The record, read as one number, is a multiple of q, and the check is the one from f to f + q - 1 that makes it
so: f = 1 and q = 3 with 2 bits, 1 and 227 with 8, 256 and 65269 with 16. The last byte is never zero, and a record
with one bit changed is refused. With 8 bits or more so is one with a bit moved from anywhere to anywhere: all powers
of two in a record differ modulo q, as 2 has the order 226 modulo 227 and 65268 modulo 65269.
"""

from functools import cache
from math import comb, log
from typing import Any

import numpy as np
import torch

from .codec import Codec
from .sparse import SparseTargets

__all__ = ['CompactCodec', 'SmallCompactCodec']

MAX_K = 1024
MAX_CLASSES = 1 << 16
POWER = 8
LOWEST_REST = -10.  # as a logit; 5e-5 of the mass

# Decoding is written once, for numpy and torch: `xp` is either, and what is used of both has the same name.
Array = Any


@cache
def _classes_layout(k: int, max_gap: int) -> tuple[int, int, int, bool]:
    """The shortest way to store k gaps up to max_gap: bits of the field `classes`, U, l, whether it is a rank."""
    options = []
    for low_bits in range(17):
        num_places = k + (max_gap >> low_bits)
        rank_bits = (comb(num_places, k) - 1).bit_length()
        if k <= 24 and rank_bits <= 62:
            options.append((rank_bits + k * low_bits, low_bits, 0, num_places))
        options.append((num_places + k * low_bits, low_bits, 1, num_places))
    bits, low_bits, is_string, num_places = min(options)
    return bits - k * low_bits, num_places, low_bits, not is_string


@cache
def _levels_layout(k: int, levels: int) -> tuple[int, int, int]:
    """How k digits in base `levels` take the fewest bits: numbers, digits in each, bits of each."""
    options = []
    for digits in range(1, 6):
        numbers, bits = -(-k // digits), (levels ** digits - 1).bit_length()
        if bits <= 30:
            options.append((numbers * bits, digits, numbers, bits))
    _, digits, numbers, bits = min(options)
    return numbers, digits, bits


@cache
def _binomials(k: int, num_places: int) -> np.ndarray:
    """binomial(p, j + 1) of every entry j and place p, int64 [k, U]."""
    rows = [np.arange(num_places, dtype=np.int64)]
    for _ in range(k - 1):
        rows.append(np.concatenate([[0], rows[-1][:-1].cumsum()]))
    return np.stack(rows)


class CompactCodec(Codec):
    """The codec of choice: 18 bytes for 10 of 1,000 classes, 137 for 100 of 1,000, 194 for 100 of 21,841.

    Decoded entries are in class order, and their masses and the rest mass sum to one. Records in main memory are
    decoded by numpy, those on a device there, by torch.

    Args:
        num_classes: Number of classes of the teacher, 2 to 65,536.
        k: Number of entries per record, 1 to 1,024.
        remainder: The remainder rule of the decoded targets, see `SparseTargets`.
        levels: In how many steps probabilities are kept, 2 to 256; None for as many as k needs.
        counted: Whether fewer than k entries of a record may count; None for yes if the remainder is `none`.

    Raises:
        ValueError: An argument is out of range.
    """
    name = 'compact'
    is_small = False

    def __init__(
            self,
            num_classes: int,
            k: int,
            remainder: str = 'uniform',
            levels: int | None = None,
            counted: bool | None = None,
    ):
        super().__init__(num_classes, k, remainder)
        if not 2 <= num_classes <= MAX_CLASSES:
            raise ValueError(f'codec {self.name} holds 2 to {MAX_CLASSES:,} classes, not {num_classes}; use float16')
        if k > MAX_K:
            raise ValueError(f'codec {self.name} holds at most {MAX_K:,} entries, not k = {k}; use float16')
        self.levels = self._suitable_levels() if levels is None else levels
        if not 2 <= self.levels <= 256:
            raise ValueError(f'codec {self.name} keeps 2 to 256 levels, not {levels}')
        self.counted = remainder == 'none' if counted is None else counted
        self._max_gap = num_classes - (1 if self.counted else k)
        classes_bits, self._num_places, self._low_bits, self._has_rank = _classes_layout(k, self._max_gap)
        numbers, self._digits, number_bits = _levels_layout(k, self.levels)
        range_bits, rest_bits = (5, 8) if k > 16 else (5, 6) if self.is_small else (4, 7)
        if not self.has_rest:
            rest_bits = 16 if remainder == 'none' else 0

        # Where each field starts, how many numbers it has, and how many bits each of them.
        self._fields: dict[str, tuple[int, int, int]] = {}
        start = 0
        for name, count, bits in (
                ('classes', 1, classes_bits),
                ('low', k, self._low_bits),
                ('levels', numbers, number_bits),
                ('range', 1, range_bits),
                ('rest', 1, rest_bits),
                ('valid', 1, k.bit_length() if self.counted else 0),
        ):
            self._fields[name] = start, count, bits
            start += count * bits
        check_bits = 2 if self.is_small and k <= 16 else 8 if start <= 218 else 16
        spare_bits = -(start + check_bits) % 8
        self._fields['spare'] = start, 1, spare_bits
        self._fields['check'] = start + spare_bits, 1, check_bits
        self.width = (start + spare_bits + check_bits) // 8

        self._check_first, self._modulus = {2: (1, 3), 8: (1, 227), 16: (256, 65269)}[check_bits]
        # Products and sums of bytes with these stay below 2^53, where float64, the fast way, is exact.
        self._check_weights = np.array([pow(256, byte, self._modulus) for byte in range(self.width)], dtype=np.float64)
        # The step of u from level to level for each range.
        spread = 2 ** (4 * np.arange(1 << range_bits) / ((1 << range_bits) - 1))
        self._steps = ((1 - np.exp(-spread / POWER)) / (self.levels - 1)).astype(np.float32)
        self._max_rest = (1 << rest_bits) - 1
        self._highest_rest = log(self._max_gap / (1 if self.counted else k)) if self.has_rest else 0.
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def _suitable_levels(self) -> int:
        """So many that rounding adds 0.3% at most to the divergence from the teacher at k = 10, 1% at k = 200."""
        if self.remainder == 'none':
            return 80
        large, medium, small = (45, 32, 12) if self.is_small else (80, 45, 24)
        return small if self.k <= 16 else medium if self.k <= 128 else large

    def encode(self, targets: SparseTargets) -> np.ndarray:
        """Records, uint8 [B, width], of targets on any device.

        Raises:
            ValueError: The targets are of another k, another number of classes or another remainder rule, name a
                class twice or one that there is not, or have padding that the codec was not made for.
        """
        self._check_targets(targets)
        ids = targets.ids.cpu().numpy()  # [B, k]
        log_probs = targets.log_probs.float().cpu().numpy()
        num_valid = targets.num_valid.cpu().numpy()
        entries = np.arange(self.k, dtype=np.int32)
        valid = entries < num_valid[:, None] if self.counted else None
        fewest = 0 if self.counted else self.k
        if ((num_valid < fewest) | (num_valid > self.k)).any():
            hint = '' if self.counted else '; make the codec with counted=True'
            raise ValueError(f'targets have {num_valid.min()} to {num_valid.max()} valid entries, not {self.k}{hint}')
        if valid is not None:
            ids = np.where(valid, ids, 0)
            log_probs = np.where(valid, log_probs, -np.inf)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_classes:
            raise ValueError(f'targets name classes from {ids.min()} to {ids.max()}, not 0 to {self.num_classes - 1}')
        if np.isnan(log_probs).any() or self.has_rest and targets.log_rest.isnan().any():
            raise ValueError('the log-probabilities of the targets hold NaN; check the teacher')

        # Levels travel in the low byte of the ids while these are sorted.
        levels, ranges = self._quantise(log_probs, valid)
        keys = ids.astype(np.uint32) << 8 | levels
        if valid is not None:
            keys[~valid] = 0xFFFFFF00
        keys.sort(axis=1)
        levels = keys.astype(np.uint8)
        gaps = (keys >> 8).astype(np.int32) - entries
        if valid is not None:
            gaps = np.maximum.accumulate(np.where(valid, gaps, 0), axis=1)
        bad = np.flatnonzero((gaps[:, 1:] < gaps[:, :-1]).any(axis=1))
        if len(bad):
            raise ValueError(f'row {bad[0]} of the targets names a class twice')

        bits = np.zeros((len(ids), 8 * self.width), dtype=np.uint8)
        places = (gaps >> self._low_bits) + entries
        if self._has_rank:
            self._write(bits, 'classes', _binomials(self.k, self._num_places)[entries, places].sum(axis=1)[:, None])
        else:
            bits[np.arange(len(bits))[:, None], places] = 1
        self._write(bits, 'low', gaps & (1 << self._low_bits) - 1)
        self._write(bits, 'levels', self._from_digits(levels))
        self._write(bits, 'range', ranges[:, None])
        self._write(bits, 'rest', self._quantise_rest(targets, log_probs)[:, None])
        self._write(bits, 'valid', num_valid[:, None])
        records = np.packbits(bits, axis=1, bitorder='little')
        start = self._fields['check'][0]
        share = pow(2, -start, self._modulus)
        checks = self._check_first + (-self._remainders(records) * share - self._check_first) % self._modulus
        for byte in range(start // 8, self.width):
            records[:, byte] |= (checks << start % 8 >> 8 * (byte - start // 8) & 0xFF).astype(np.uint8)
        return records

    def _quantise(self, log_probs: np.ndarray, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The level of each entry, uint8 [B, k], and the range of each row [B]."""
        log_probs = np.maximum(log_probs, -1e4)
        log_probs = log_probs - log_probs.max(axis=1, keepdims=True, initial=-1e4)
        drop = 1 - np.exp(log_probs / POWER)  # 1 - u
        if valid is not None:
            drop = np.where(valid, drop, 0)
        last = self.levels - 1
        # The narrowest range that reaches the smallest entry.
        reach = np.searchsorted(self._steps * last, drop.max(axis=1, initial=0) * (1 - 1e-6))
        reach = reach.clip(max=len(self._steps) - 1)

        def levels_of(ranges: np.ndarray) -> np.ndarray:
            return np.rint(drop / self._steps[ranges][:, None]).clip(max=last)

        if self.k > 16:
            return levels_of(reach).astype(np.uint8), reach
        # With few entries it pays to try the ranges nearby: a fifth less divergence, and a third where one is sure.
        weights = np.exp(log_probs)
        weights /= weights.sum(axis=1, keepdims=True)
        best_cost = None
        for offset in range(-2, 5) if len(self._steps) > 16 else range(-1, 3):
            ranges = (reach + offset).clip(0, len(self._steps) - 1)
            levels = levels_of(ranges)
            u = 1 - self._steps[ranges][:, None] * levels
            mass = u ** POWER if valid is None else np.where(valid, u ** POWER, 0)
            cost = np.log(mass.sum(axis=1).clip(min=1e-30)) - POWER * (weights * np.log(u)).sum(axis=1)
            if best_cost is None:
                best_cost, best_levels, best_ranges = cost, levels, ranges
                continue
            better = cost < best_cost
            best_cost = np.where(better, cost, best_cost)
            best_levels = np.where(better[:, None], levels, best_levels)
            best_ranges = np.where(better, ranges, best_ranges)
        return best_levels.astype(np.uint8), best_ranges

    def _quantise_rest(self, targets: SparseTargets, log_probs: np.ndarray) -> np.ndarray:
        """The field `rest` of each row, int [B]."""
        if self.remainder == 'none':
            log_mass = np.logaddexp.reduce(log_probs.astype(np.float64), axis=1)
            return np.rint((log_mass + 16) * 2048).clip(0, 65535).astype(np.int32)
        if not self.has_rest:
            return np.zeros(len(targets), dtype=np.int32)
        log_rest = targets.log_rest.double().cpu().numpy().clip(max=-1e-9)
        logit = log_rest - np.log(-np.expm1(log_rest))
        lowest, highest = LOWEST_REST, self._highest_rest
        share = (highest - logit.clip(lowest, highest)) / (highest - lowest)
        return np.rint(share * self._max_rest).astype(np.int32)

    def _from_digits(self, levels: np.ndarray) -> np.ndarray:
        """The numbers of the field `levels`, int32 [B, G], with the digits levels [B, k]."""
        count = self._fields['levels'][1]
        digits = np.zeros((len(levels), count * self._digits), dtype=np.int32)
        digits[:, :self.k] = levels
        numbers = digits[:, -count:]
        for digit in range(self._digits - 2, -1, -1):
            numbers = numbers * self.levels + digits[:, digit * count:(digit + 1) * count]
        return numbers

    def _write(self, bits: np.ndarray, field: str, numbers: np.ndarray) -> None:
        """Write numbers [B, count] into a field of bits [B, 8 * width]."""
        start, count, width = self._fields[field]
        for bit in range(width):
            bits[:, start + bit * count:start + (bit + 1) * count] = numbers >> bit & 1

    def _remainders(self, records: np.ndarray) -> np.ndarray:
        """Each record as one number modulo that of the check, int64 [B]."""
        return (records @ self._check_weights).astype(np.int64) % self._modulus

    def check(self, records: np.ndarray) -> None:
        self._check_shape(records)

        def refuse(bad: np.ndarray, reason: str) -> None:  # bad is [B] or [B, anything]
            if bad.any():
                row = bad.reshape(len(records), -1).any(axis=1).argmax()
                raise ValueError(f'record {row} of {len(records)} {reason}')

        columns = records.T
        refuse(self._remainders(records) != 0, 'does not match its check')
        excess = self._number(columns, 'check', np) - self._check_first
        refuse((excess < 0) | (excess >= self._modulus), 'has a check out of range')
        refuse(self._number(columns, 'spare', np) != 0, 'has spare bits that are not zero')
        if self._has_rank:
            ranks = self._number(columns, 'classes', np)
            refuse(ranks >= comb(self._num_places, self.k), f'has a rank that no {self.k} classes have')
        else:
            refuse(self._string(records, np).sum(axis=1, dtype=np.uint16) != self.k, f'has not {self.k} classes')
        numbers = self._numbers(columns, 'levels', np)
        refuse((numbers >= self.levels ** self._digits).T, f'has levels beyond {self.levels}')
        gaps = self._gaps(records, columns, np)
        refuse(gaps[:, 1:] < gaps[:, :-1], 'does not name its classes in order')
        last, num_valid = gaps[:, -1], self.k
        if self.counted:
            num_valid = self._number(columns, 'valid', np)
            refuse(num_valid > self.k, f'has more than {self.k} entries')
            last = np.where(num_valid > 0, gaps[np.arange(len(gaps)), num_valid - 1], 0)
            padding = np.arange(self.k) >= num_valid[:, None]
            refuse(padding & (gaps != last[:, None]), 'has padding that is none')
        refuse(last + num_valid > self.num_classes, f'names a class beyond {self.num_classes}')

    def decode(self, records: torch.Tensor) -> SparseTargets:
        if records.device.type == 'cpu':
            fields = [None if item is None else torch.from_numpy(item) for item in self._decode(records.numpy(), np)]
        else:
            fields = self._decode(records, torch)
        return SparseTargets(*fields, self.num_classes, self.remainder)

    def _decode(self, records: Array, xp: Any) -> tuple[Array, Array, Array | None, Array]:
        """ids, log_probs, log_rest and num_valid of the targets of records [B, width]."""
        columns = records.T
        entries = xp.arange(self.k, device=records.device)
        ids = self._gaps(records, columns, xp)
        ids += entries

        digits = []
        numbers = self._numbers(columns, 'levels', xp)  # [G, B]
        for _ in range(self._digits - 1):
            higher = numbers // self.levels
            digits.append(numbers - higher * self.levels)
            numbers = higher
        levels = xp.asarray(xp.concat([*digits, numbers], 0)[:self.k], dtype=xp.float32)  # [k, B]
        steps, _ = self._device_tables(records, xp)
        u = 1 - steps[self._number(columns, 'range', xp)] * levels
        mass = u * u
        mass *= mass
        mass *= mass

        log_mass, log_rest, num_valid = 0., None, xp.full((len(records),), self.k, device=records.device)
        if self.counted:
            num_valid = self._number(columns, 'valid', xp)
            mass = xp.where(entries[:, None] < num_valid, mass, 0.)
            ids = ids.clip(max=self.num_classes - 1)  # padding may lie beyond
        if self.remainder == 'none':
            log_mass = xp.asarray(self._number(columns, 'rest', xp), dtype=xp.float32) / 2048 - 16
        elif self.has_rest:
            step = (self._highest_rest - LOWEST_REST) / self._max_rest
            logit = self._highest_rest - step * xp.asarray(self._number(columns, 'rest', xp), dtype=xp.float32)
            log_rest = -xp.log1p(xp.exp(-logit))
            log_mass = log_rest - logit
        log_probs = xp.log(u)
        log_probs *= POWER
        log_probs += log_mass - xp.log(mass.sum(0).clip(min=1e-30))
        return ids, log_probs.T.reshape(-1).reshape(ids.shape), log_rest, num_valid

    def _gaps(self, records: Array, columns: Array, xp: Any) -> Array:
        """The gaps of the classes, int64 [B, k]."""
        batch = len(records)
        entries = xp.arange(self.k, device=records.device)
        if self._has_rank:
            rank = self._number(columns, 'classes', xp)
            _, binomials = self._device_tables(records, xp)
            places = []  # from the last entry to the first
            for entry in reversed(range(self.k)):
                places.append(xp.searchsorted(binomials[entry], rank, side='right') - 1)
                rank = rank - binomials[entry][places[-1]]
            gaps = xp.stack(places[::-1], 1) - entries
        elif xp is np:
            places = np.flatnonzero(self._string(records, np))
            gaps = places.reshape(batch, self.k)
            gaps -= np.arange(0, batch * self._num_places, self._num_places)[:, None]
            gaps -= entries
        else:
            string = self._string(records, torch)
            order = torch.where(string, string.cumsum(1) - 1, self.k).clip(max=self.k)
            gaps = order.new_zeros(batch, self.k + 1)
            gaps.scatter_(1, order, torch.arange(self._num_places, device=records.device).expand_as(order))
            gaps = gaps[:, :self.k] - entries
        if self._low_bits:
            gaps <<= self._low_bits
            gaps += self._numbers(columns, 'low', xp).T
        return gaps

    def _string(self, records: Array, xp: Any) -> Array:
        """The bits of the field `classes`, bool [B, U]."""
        string = records[:, :-(-self._num_places // 8)]
        if xp is np:
            return np.unpackbits(string, axis=1, count=self._num_places, bitorder='little').view(bool)
        bits = 1 << torch.arange(8, dtype=torch.uint8, device=records.device)
        return ((string[:, :, None] & bits) != 0).flatten(1)[:, :self._num_places]

    def _number(self, columns: Array, field: str, xp: Any) -> Array:
        """A field of one number, int64 [B], of records as columns [width, B]."""
        start, _, width = self._fields[field]
        number = xp.zeros(columns.shape[1], dtype=xp.int64, device=columns.device)
        for byte in range(start // 8, -(-(start + width) // 8)):
            number |= xp.asarray(columns[byte], dtype=xp.int64) << 8 * byte - start // 8 * 8
        return number >> start % 8 & (1 << width) - 1

    def _numbers(self, columns: Array, field: str, xp: Any) -> Array:
        """A field of several numbers [count, B] of records as columns [width, B], uint8 or int32."""
        start, count, width = self._fields[field]
        columns = columns[start // 8:-(-(start + count * width) // 8)]
        shape = columns.shape
        columns = columns.reshape(-1).reshape(shape)  # now row after row in memory, with long runs to work on
        bits = 1 << xp.arange(8, dtype=xp.uint8, device=columns.device)
        planes = ((columns[:, None] & bits[:, None]) != 0).view(xp.uint8)  # [bytes, 8, B]
        planes = planes.reshape(8 * shape[0], shape[1])[start % 8:][:count * width].reshape(width, count, shape[1])
        numbers = None
        for first in reversed(range(0, width, 8)):
            byte = planes[min(first + 8, width) - 1]
            for plane in reversed(range(first, min(first + 8, width) - 1)):
                byte = byte + byte | planes[plane]
            if width > 8:
                byte = xp.asarray(byte, dtype=xp.int32)
            numbers = byte if numbers is None else numbers << 8 | byte
        return numbers

    def _device_tables(self, records: Array, xp: Any) -> tuple[Array, Array]:
        """The steps and the binomials, where the records are."""
        binomials = _binomials(self.k, self._num_places) if self._has_rank else np.zeros(0)
        if xp is np:
            return self._steps, binomials
        if records.device not in self._tables:
            self._tables[records.device] = tuple(
                torch.from_numpy(table).to(records.device) for table in (self._steps, binomials))
        return self._tables[records.device]


class SmallCompactCodec(CompactCodec):
    """The small setting: 16 bytes for 10 of 1,000 classes, 131 for 100 of 1,000, 188 for 100 of 21,841.

    Probabilities are coarser, and up to k = 16 the check sees every changed bit, but only every other moved one.
    """
    name = 'compact-small'
    is_small = True
