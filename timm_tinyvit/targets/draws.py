"""The codec of random samples: a record is which classes N draws gave, exactly, and nothing else.

A record has the fields `classes` and `low` of a multiset of N of C classes, as `class_sets` says, laid out and checked
as `fields` says. The probability of a class is the share of its draws.
"""

from typing import Any

import numpy as np
import torch

from .bitfields import Array, FieldLayout, FieldReader
from .codec import Codec
from .compact import MAX_CLASSES
from .elias_fano import ClassSets
from .sparse import SparseTargets

__all__ = ['MAX_DRAWS', 'DrawsCodec']

MAX_DRAWS = 4096


class DrawsCodec(Codec):
    """Samples of N draws, as `Sample` makes them: 11 bytes for 10 of 1,000 classes, 68 for 100.

    Decoded entries are in class order; there are min(N, C) of them, with padding for classes drawn several times.

    Args:
        num_classes: Number of classes of the teacher, 2 to 65,536.
        k: Number of draws per record, N, 1 to 4,096; there may be more than classes.
        remainder: The remainder rule of the decoded targets, `none`.

    Raises:
        ValueError: An argument is out of range.
    """
    name = 'draws'
    takes_padding = True

    def __init__(self, num_classes: int, k: int, remainder: str = 'none'):
        super().__init__(num_classes, min(k, num_classes), remainder)
        if remainder != 'none':
            raise ValueError(
                f'codec {self.name} holds random samples alone, not targets with the remainder rule {remainder}; '
                f'use --sparsifier sample, or another codec')
        if not 2 <= num_classes <= MAX_CLASSES:
            raise ValueError(f'codec {self.name} holds 2 to {MAX_CLASSES:,} classes, not {num_classes}; use float16')
        if k > MAX_DRAWS:
            raise ValueError(f'codec {self.name} holds at most {MAX_DRAWS:,} draws, not {k}; use float16')
        self.num_draws = k
        self._sets = ClassSets(k, num_classes, repeats=True)
        self._layout = FieldLayout(self._sets.fields)
        self.width = self._layout.width

    def encode(self, targets: SparseTargets) -> np.ndarray:
        """Records, uint8 [B, width], of targets on any device.

        Raises:
            ValueError: The targets are of another kind, name a class twice or one that there is not, or are not the
                shares of N draws.
        """
        self._check_targets(targets)
        valid = targets.valid.cpu().numpy()
        ids = np.where(valid, targets.ids.cpu().numpy(), 0)
        shares = np.where(valid, targets.log_probs.double().exp().cpu().numpy() * self.num_draws, 0.)
        counts = np.rint(np.nan_to_num(shares)).astype(np.int64)
        num_valid = targets.num_valid.cpu().numpy()
        exact = (np.abs(shares - counts) < 0.01).all(axis=1) & (counts.sum(axis=1) == self.num_draws)
        bad = np.flatnonzero(~exact | ((counts > 0).sum(axis=1) != num_valid))
        if len(bad):
            raise ValueError(
                f'row {bad[0]} of the targets is not the shares of {self.num_draws} draws, and codec {self.name} '
                f'holds nothing else; use --sparsifier sample, or codec float16')
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_classes:
            raise ValueError(f'targets name classes from {ids.min()} to {ids.max()}, not 0 to {self.num_classes - 1}')
        draws = np.repeat(ids.reshape(-1), counts.reshape(-1)).reshape(len(ids), self.num_draws)
        draws.sort(axis=1)
        bad = np.flatnonzero((draws[:, 1:] != draws[:, :-1]).sum(axis=1) + 1 != num_valid)
        if len(bad):
            raise ValueError(f'row {bad[0]} of the targets names a class twice')
        return self._layout.write(self._sets.numbers(draws))

    def check(self, records: np.ndarray) -> None:
        self._read(records, np, check=True)

    def decode(self, records: torch.Tensor, check: bool = False) -> SparseTargets:
        if records.device.type == 'cpu':
            draws = torch.from_numpy(self._read(records.numpy(), np, check))
        else:
            if check:
                self.check(records.cpu().numpy())
            draws = self._read(records, torch)
        return SparseTargets.from_draws(draws, self.num_classes)

    def _read(self, records: Array, xp: Any, check: bool = False) -> Array:
        """The draws, in ascending order, int64 [B, N]."""
        self._check_shape(records)
        reader = FieldReader(self._layout, records, xp)
        if check:
            self._layout.check(reader)
        return self._sets.read(reader, check)
