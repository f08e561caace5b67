"""CompactCodec: teacher probabilities in a third of the official bytes, hardly further from the teacher.

docs/format.md has every bit of a record. The class ids are kept as a set, see `elias_fano`. The probability of an entry
is quantised as its eighth root relative to the largest, so that the levels lie closer where there is more mass; levels
of two entries share a number, and how far the levels reach is one of 16 or 32 ranges. The rest mass is quantised as its
logit. Entries and rest sum to one again when they are decoded.
"""

from functools import cached_property
from math import log
from typing import Any

import numpy as np
import torch

from .bitfields import Array, FieldLayout, FieldReader, refuse
from .codec import ClassCodec
from .elias_fano import ClassSets
from .sparse import SparseTargets

__all__ = ['CompactCodec']

MAX_K = 1024
MAX_CLASSES = 1 << 16
POWER = 8  # of a level; its root is what is quantised
LOWEST_REST = -10.  # as a logit; 5e-5 of the mass


class CompactCodec(ClassCodec):
    """The codec of choice: 18 bytes for 10 of 1,000 classes, 137 for 100 of 1,000, 194 for 100 of 21,841.

    Decoded entries are in class order, and their masses and the rest mass sum to one. Records in main memory are
    decoded by numpy, those on a device there, by torch.

    Args:
        num_classes: Number of classes of the teacher, 2 to 65,536.
        k: Number of entries per record, 1 to 1,024.

    Raises:
        ValueError: An argument is out of range.
    """
    name = 'compact'

    def __init__(self, num_classes: int, k: int):
        super().__init__(num_classes, k)
        if not 2 <= num_classes <= MAX_CLASSES:
            raise ValueError(f'codec {self.name} holds 2 to {MAX_CLASSES:,} classes, not {num_classes}; use float16')
        if k > MAX_K:
            raise ValueError(f'codec {self.name} holds at most {MAX_K:,} entries, not k = {k}; use float16')
        # So many that rounding adds 0.3% at most to the divergence from the teacher at k = 10, 1% at k = 200.
        self.levels = 22 if k <= 16 else 45 if k <= 128 else 90
        range_bits, rest_bits = (5, 8) if k > 16 else (4, 7)
        if not self.has_rest:
            rest_bits = 0
        self._pair_bits = (self.levels ** 2 - 1).bit_length()
        self._sets = ClassSets(k, num_classes)
        self._layout = FieldLayout([
            *self._sets.fields,
            ('levels', k // 2, self._pair_bits),
            ('odd', k % 2, (self.levels - 1).bit_length()),
            ('range', 1, range_bits),
            ('rest', 1, rest_bits),
        ])
        self.width = self._layout.width

        # The step of u from level to level for each range.
        spread = 2 ** (4 * np.arange(1 << range_bits) / ((1 << range_bits) - 1))
        self._steps = ((1 - np.exp(-spread / POWER)) / (self.levels - 1)).astype(np.float32)
        self._max_rest = (1 << rest_bits) - 1
        self._highest_rest = log((num_classes - k) / k) if self.has_rest else 0.
        self._limits = np.full(-(-k // 2), self.levels ** 2, dtype=np.int32)
        if k % 2:
            self._limits[-1] = self.levels
        self._tables: dict[torch.device, torch.Tensor] = {}

    @cached_property
    def _table(self) -> np.ndarray:
        """The logarithms of u^8 of the two entries of every number at every range, float32 [ranges * 2^w, 2]."""
        numbers = np.arange(1 << self._pair_bits)
        levels = np.stack([numbers % self.levels, np.minimum(numbers // self.levels, self.levels - 1)], axis=1)
        u = 1 - self._steps[:, None, None].astype(np.float64) * levels
        return (POWER * np.log(u)).astype(np.float32).reshape(-1, 2)

    def encode(self, targets: SparseTargets) -> np.ndarray:
        """Records, uint8 [B, width], of targets on any device.

        Raises:
            ValueError: The targets are of another k or another number of classes, name a class twice or one that
                there is not, or hold NaN.
        """
        self._check_targets(targets)
        ids = targets.ids.cpu().numpy()  # [B, k]
        log_probs = targets.log_probs.float().cpu().numpy()
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_classes:
            raise ValueError(f'targets name classes from {ids.min()} to {ids.max()}, not 0 to {self.num_classes - 1}')
        if np.isnan(log_probs).any() or self.has_rest and targets.log_rest.isnan().any():
            raise ValueError('the log-probabilities of the targets hold NaN; check the teacher')

        # Levels travel in the low byte of the ids while these are sorted.
        levels, ranges = self._quantise(log_probs)
        keys = ids.astype(np.uint32) << 8 | levels
        keys.sort(axis=1)
        levels, ids = keys.astype(np.uint8), keys >> 8
        bad = np.flatnonzero((ids[:, 1:] == ids[:, :-1]).any(axis=1))
        if len(bad):
            raise ValueError(f'row {bad[0]} of the targets names a class twice')
        return self._layout.write(dict(
            **self._sets.numbers(ids),
            levels=levels[:, 1::2] * np.uint16(self.levels) + levels[:, :self.k // 2 * 2:2],
            odd=levels[:, self.k // 2 * 2:],
            range=ranges[:, None],
            rest=self._quantise_rest(targets)[:, None]))

    def _quantise(self, log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The level of each entry, uint8 [B, k], and the range of each row [B]."""
        log_probs = np.maximum(log_probs, -1e4)
        log_probs -= log_probs.max(axis=1, keepdims=True)
        drop = np.exp(log_probs / POWER)
        np.subtract(1, drop, out=drop)  # 1 - u
        last = self.levels - 1
        # The narrowest range that reaches the smallest entry.
        reach = np.searchsorted(self._steps * last, drop.max(axis=1) * (1 - 1e-6))
        reach = reach.clip(max=len(self._steps) - 1)

        def levels_of(ranges: np.ndarray) -> np.ndarray:
            levels = drop / self._steps[ranges][:, None]
            np.rint(levels, out=levels)
            return np.minimum(levels, last, out=levels)

        if self.k > 16:
            return levels_of(reach).astype(np.uint8), reach
        # With few entries it pays to try the ranges nearby: a fifth less divergence, a third with confident teachers.
        weights = np.exp(log_probs)
        weights /= weights.sum(axis=1, keepdims=True)
        best_cost = None
        for offset in range(-1, 3):
            ranges = (reach + offset).clip(0, len(self._steps) - 1)
            levels = levels_of(ranges)
            u = 1 - self._steps[ranges][:, None] * levels
            cost = np.log((u ** POWER).sum(axis=1)) - POWER * (weights * np.log(u)).sum(axis=1)
            if best_cost is None:
                best_cost, best_levels, best_ranges = cost, levels, ranges
                continue
            better = cost < best_cost
            best_cost = np.where(better, cost, best_cost)
            best_levels = np.where(better[:, None], levels, best_levels)
            best_ranges = np.where(better, ranges, best_ranges)
        return best_levels.astype(np.uint8), best_ranges

    def _quantise_rest(self, targets: SparseTargets) -> np.ndarray:
        """The field `rest` of each row, int [B]."""
        if not self.has_rest:
            return np.zeros(len(targets), dtype=np.int32)
        log_rest = targets.log_rest.double().cpu().numpy().clip(max=-1e-9)
        logit = log_rest - np.log(-np.expm1(log_rest))
        lowest, highest = LOWEST_REST, self._highest_rest
        share = (highest - logit.clip(lowest, highest)) / (highest - lowest)
        return np.rint(share * self._max_rest).astype(np.int32)

    def check(self, records: np.ndarray) -> None:
        self._check_shape(records)
        self._symbols(FieldReader(self._layout, records, np), check=True)

    def decode(self, records: torch.Tensor, check: bool = False) -> SparseTargets:
        if records.device.type == 'cpu':
            fields = [
                None if item is None else torch.from_numpy(item) for item in self._decode(records.numpy(), np, check)]
        else:
            if check:
                self.check(records.cpu().numpy())
            fields = self._decode(records, torch)
        return SparseTargets(*fields, self.num_classes)

    def _symbols(self, reader: FieldReader, check: bool) -> tuple[Array, Array]:
        """The class ids, int64 [B, k], and the numbers of their levels, integer [B, ceil(k / 2)]."""
        if check:
            self._layout.check(reader)
        ids = self._sets.read(reader, check)
        numbers = reader.numbers('levels')
        if self.k % 2:
            numbers = reader.xp.concat([numbers, reader.numbers('odd')], 1)
        if check:
            refuse(numbers >= self._limits, f'has levels beyond {self.levels}')
        return ids, numbers

    def _decode(self, records: Array, xp: Any, check: bool = False) -> tuple[Array, Array, Array | None]:
        """ids, log_probs and log_rest of the targets of records [B, width]."""
        if check:
            self._check_shape(records)
        reader = FieldReader(self._layout, records, xp)
        ids, numbers = self._symbols(reader, check)
        places = (reader.number('range')[:, None] << self._pair_bits) + numbers
        log_probs = self._table.take(places, axis=0) if xp is np else self._device_table(records.device)[places]
        log_probs = log_probs.reshape(len(records), 2 * numbers.shape[1])[:, :self.k]
        log_norm = -xp.log(xp.einsum('bk->b', xp.exp(log_probs)))
        log_rest = None
        if self.has_rest:
            step = (self._highest_rest - LOWEST_REST) / self._max_rest
            logit = self._highest_rest - step * xp.asarray(reader.number('rest'), dtype=xp.float32)
            log_rest = -xp.log1p(xp.exp(-logit))
            log_norm += log_rest - logit
        log_probs += log_norm[:, None]
        return ids, log_probs, log_rest

    def _device_table(self, device: torch.device) -> torch.Tensor:
        if device not in self._tables:
            self._tables[device] = torch.from_numpy(self._table).to(device)
        return self._tables[device]
