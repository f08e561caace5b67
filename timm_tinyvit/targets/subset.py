"""Sparse targets of some of a teacher's classes: the condition that a view is of one of them, in any order.

The probabilities of these classes are divided by their sum, listed ones and those that share what is left alike. All
shapes are static and all is done where the records are, as in decoding; the dense target is never built.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .sparse import SparseTargets

__all__ = ['SubsetCodec', 'restrict']


def restrict(targets: SparseTargets, places: torch.Tensor, num_classes: int) -> SparseTargets:
    """Targets of a part of the classes, renormalised.

    Equal to `targets.densify()[:, classes]` divided by its sums, to float32 rounding. Where a class that a row lists is
    none of the part, another one takes its place in the row, with the share that it has anyway.

    Args:
        targets: Of B views, k of C classes each.
        places: The number of each of the C classes in the part, int64 [C]; -1 of a class that is none of it.
        num_classes: S, the classes of the part.

    Returns:
        Targets of min(k, S) of S classes.
    """
    k = min(targets.k, num_classes)
    ids = places[targets.ids]  # [B, k of the teacher]
    # Those that stay come first; there are no more than k of them.
    order = (ids < 0).int().argsort(dim=1, stable=True)[:, :k]
    ids, log_probs = ids.gather(1, order), targets.log_probs.gather(1, order)
    is_free = ids < 0
    # As many of the first classes as can be listed and replaced, those first that no row lists.
    num_candidates = min(2 * k, num_classes)
    is_candidate = ~is_free & (ids < num_candidates)
    is_listed = ids.new_zeros(len(ids), num_candidates + 1).scatter(
        1, torch.where(is_candidate, ids, num_candidates), 1)[:, :-1]  # [B, 2k]
    unlisted = is_listed.argsort(dim=1, stable=True)
    ids = torch.where(is_free, unlisted.gather(1, (is_free.cumsum(dim=1) - 1).clamp(min=0)), ids)
    if targets.log_rest is None:
        return SparseTargets(ids, log_probs.log_softmax(dim=1), None, num_classes)
    share = targets.log_rest - math.log(targets.num_classes - targets.k)  # [B], of each class that is not listed
    log_probs = torch.where(is_free, share[:, None], log_probs)
    if k == num_classes:
        return SparseTargets(ids, log_probs.log_softmax(dim=1), None, num_classes)
    rest = share + math.log(num_classes - k)
    whole = torch.cat([log_probs, rest[:, None]], dim=1).log_softmax(dim=1)
    return SparseTargets(ids, whole[:, :-1], whole[:, -1], num_classes)


class SubsetCodec:
    """Reads the records of another codec, or of several side by side, as targets of some of the classes.

    Args:
        codec: What decodes the records.
        classes: The teacher's number of each class of the part, in its order; all different.
        num_classes: Classes of the teacher.
    """

    def __init__(self, codec: Any, classes: Sequence[int], num_classes: int):
        self.codec = codec
        self.width = codec.width
        self.num_classes = len(classes)
        self._places = torch.full((num_classes,), -1)
        self._places[torch.tensor(classes)] = torch.arange(len(classes))

    def check(self, records: np.ndarray) -> None:
        """Raise a ValueError that names the first row that the codec cannot have written."""
        self.codec.check(records)

    def decode(self, records: torch.Tensor) -> Any:
        """What the codec decodes, class targets restricted to the part."""
        if self._places.device != records.device:
            self._places = self._places.to(records.device)
        targets = self.codec.decode(records)
        if isinstance(targets, Sequence):
            return [self._restricted(part) for part in targets]
        return self._restricted(targets)

    def _restricted(self, targets: Any) -> Any:
        if isinstance(targets, SparseTargets):
            return restrict(targets, self._places, self.num_classes)
        return targets  # features have no classes
