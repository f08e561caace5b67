"""Sets of classes as bits, after Elias and Fano.

Of k classes in ascending order, c_0 < c_1 < ..., the gaps m_j = c_j - j never fall from one entry to the next, and
reach M = C - k at most. Two fields keep them:

    classes    where the k ones of a string of U bits are: the string itself, or its rank where that is shorter
    low        k numbers of l bits

`low` holds m_j mod 2^l, and the string has its ones at the places p_j = floor(m_j / 2^l) + j, so that U = k +
floor(M / 2^l). The string is a field of U numbers of 1 bit. The rank, one number, is the sum of binomial(p_j, j + 1);
it has the bits of the number binomial(U, k) - 1, and is used for k up to 24 and ranks of up to 62 bits. Of all l from 0
to 16, with string and with rank, the one with the fewest bits is taken: the smallest l, and at that l the rank.
"""

from functools import cache
from math import comb
from typing import Any

import numpy as np
import torch

from .bitfields import Array, FieldReader, refuse

__all__ = ['ClassSets']


@cache
def _layout(k: int, max_gap: int) -> tuple[int, int, bool]:
    """The shortest way to store k gaps up to max_gap: U, l, whether the string is stored by its rank."""
    options = []
    for low_bits in range(17):
        num_places = k + (max_gap >> low_bits)
        if k <= 24 and (rank_bits := (comb(num_places, k) - 1).bit_length()) <= 62:
            options.append((rank_bits + k * low_bits, low_bits, 0, num_places))
        options.append((num_places + k * low_bits, low_bits, 1, num_places))
    _, low_bits, is_string, num_places = min(options)
    return num_places, low_bits, not is_string


@cache
def _binomials(k: int, num_places: int) -> np.ndarray:
    """binomial(p, j + 1) of every entry j and place p, int64 [k, U]."""
    rows = [np.arange(num_places, dtype=np.int64)]
    for _ in range(k - 1):
        rows.append(np.concatenate([[0], rows[-1][:-1].cumsum()]))
    return np.stack(rows)


class ClassSets:
    """k of num_classes classes, written to and read from the fields `classes` and `low`.

    Args:
        k: Number of entries.
        num_classes: Number of classes there are.

    Attributes:
        fields: The two fields, for a `FieldLayout`.
    """

    def __init__(self, k: int, num_classes: int):
        self.k = k
        self.num_classes = num_classes
        self._num_places, self._low_bits, self._has_rank = _layout(k, num_classes - k)
        self._num_sets = comb(self._num_places, k) if self._has_rank else None
        rank_bits = (self._num_sets - 1).bit_length() if self._has_rank else 0
        self.fields = [
            ('classes', 1, rank_bits) if self._has_rank else ('classes', self._num_places, 1),
            ('low', k, self._low_bits),
        ]
        entries = np.arange(k)
        self._excess = (entries << self._low_bits) - entries  # of p_j << l over c_j
        self._row_excess = np.zeros((0, k), dtype=np.int64)
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def numbers(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The numbers of the two fields for class ids in ascending order, integer [B, k]."""
        entries = np.arange(self.k, dtype=np.int32)
        gaps = ids.astype(np.int32) - entries
        places = (gaps >> self._low_bits) + entries
        if self._has_rank:
            classes = _binomials(self.k, self._num_places)[entries, places].sum(axis=1)[:, None]
        else:
            classes = np.zeros((len(ids), self._num_places), dtype=np.uint8)
            # As one long string, which is twice as fast as by row and place.
            classes.reshape(-1)[places + np.arange(0, classes.size, self._num_places)[:, None]] = 1
        low = gaps & (1 << self._low_bits) - 1
        return dict(classes=classes, low=low.astype(np.uint8) if self._low_bits <= 8 else low)

    def read(self, reader: FieldReader, check: bool = False) -> Array:
        """Class ids in ascending order, int64 [B, k].

        Args:
            reader: A reader of the fields; with torch its records may be anything, but of what no encoder wrote the
                ids mean nothing, and may be beyond the classes.
            check: Refuse what no encoder wrote; numpy only.

        Raises:
            ValueError: Checked records do not name k classes in order; the first is named.
        """
        xp = reader.xp
        excess, binomials = self._device_tables(reader.records, xp)
        if self._has_rank:
            rank = reader.number('classes')
            if check:
                refuse(rank >= self._num_sets, f'has a rank that no {self.k} classes have')
            places = []  # from the last entry to the first
            for entry in reversed(range(self.k)):
                # That of place 0 is 0, and never beyond the rank.
                places.append(xp.searchsorted(binomials[entry, 1:], rank, side='right'))
                rank = rank - binomials[entry][places[-1]]
            ids = xp.stack(places[::-1], 1)
        elif xp is np:
            ids, excess = self._places(reader.numbers('classes'), check)
        else:
            string = reader.numbers('classes')
            order = torch.where(string != 0, string.cumsum(1) - 1, self.k).clip(max=self.k)
            ids = order.new_zeros(len(string), self.k + 1)
            ids.scatter_(1, order, torch.arange(self._num_places, device=string.device).expand_as(order))
            ids = ids[:, :self.k]
        if self._low_bits:
            ids <<= self._low_bits
            ids += reader.numbers('low')
        ids -= excess
        if check:
            # Fast over the rows as one; only from row to row may the classes fall.
            flat = ids.reshape(-1)
            if np.count_nonzero(flat[1:] <= flat[:-1]) > np.count_nonzero(ids[1:, 0] <= ids[:-1, -1]):
                refuse(ids[:, 1:] <= ids[:, :-1], 'does not name its classes in order')
            refuse(ids[:, -1] >= self.num_classes, f'names a class beyond {self.num_classes}')
        return ids

    def _places(self, string: np.ndarray, check: bool) -> tuple[np.ndarray, np.ndarray]:
        """Where the ones of strings [B, U] are, counted over all rows, and the excess that has; int64 [B, k]."""
        batch = len(string)
        starts = np.arange(0, batch * self._num_places, self._num_places)
        places = np.flatnonzero(string.view(bool))
        if check:
            # Row sums are slow, and needed only to name the row.
            first, last = places[::self.k], places[self.k - 1::self.k]
            if (len(places) != batch * self.k or (first < starts).any()
                    or (last >= starts + self._num_places).any()):
                refuse(string.sum(axis=1, dtype=np.uint32) != self.k, f'has not {self.k} classes')
        excess = self._row_excess  # kept, as batches mostly have one size
        if len(excess) != batch:
            excess = self._row_excess = (starts << self._low_bits)[:, None] + self._excess
        return places.reshape(batch, self.k), excess

    def _device_tables(self, records: Array, xp: Any) -> tuple[Array, Array]:
        """What a place has too much, int64 [k], and the binomials, int64 [k, U], where the records are."""
        binomials = _binomials(self.k, self._num_places) if self._has_rank else np.zeros(0)
        if xp is np:
            return self._excess, binomials
        if records.device not in self._tables:
            self._tables[records.device] = tuple(
                torch.from_numpy(table).to(records.device) for table in (self._excess, binomials))
        return self._tables[records.device]
