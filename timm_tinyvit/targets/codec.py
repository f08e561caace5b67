"""Targets to records and back.

A codec turns what is kept of a teacher's output for one view into `width` bytes. Encoding happens once, on the way to
disk, in numpy; decoding happens in every training step, on whatever device the records are: there all shapes are static
and nothing waits for the device. `check` is the part that can fail; it runs where the records come from disk.

The last byte of a record is never zero, since readers of Arrow files like to strip trailing zero bytes.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from .sparse import SparseTargets

__all__ = ['ClassCodec', 'Codec']


class Codec(ABC):
    """What every codec provides; a subclass sets `name` and `width` and is listed in `codecs`.

    Attributes:
        name: Its name, as in `--codec`.
        width: Bytes of a record.
    """
    name: str
    width: int

    @abstractmethod
    def keep(self, output: torch.Tensor) -> Any:
        """What the records hold of a teacher's output for B views.

        Raises:
            ValueError: The output holds NaN or infinity, or is not what this codec keeps.
        """

    @abstractmethod
    def encode(self, targets: Any) -> np.ndarray:
        """Records, uint8 [B, width], of targets on any device."""

    @abstractmethod
    def check(self, records: np.ndarray) -> None:
        """Raise a ValueError that names a row of uint8 [B, width] that `encode` cannot have written."""

    @abstractmethod
    def decode(self, records: torch.Tensor, check: bool = False) -> Any:
        """Targets of records, uint8 [B, width], on the device of the records.

        Args:
            records: Records that were checked, unless they are now.
            check: Check them on the way, which in main memory takes less time than a `check` before.

        Raises:
            ValueError: Records were to be checked, and `encode` cannot have written one of them.
        """

    def _check_shape(self, records: np.ndarray) -> None:
        if records.ndim != 2 or records.shape[1] != self.width:
            raise ValueError(f'records are {list(records.shape)}, but codec {self.name} reads [B, {self.width}]')


class ClassCodec(Codec):
    """A codec of `SparseTargets`: k of a teacher's classes.

    Args:
        num_classes: Number of classes of the teacher.
        k: Number of entries per record.

    Attributes:
        has_rest: Whether there are classes that a record does not name.
    """

    def __init__(self, num_classes: int, k: int):
        if not 1 <= k <= num_classes:
            raise ValueError(f'k = {k} does not fit {num_classes} classes; choose k from 1 to {num_classes}')
        self.num_classes = num_classes
        self.k = k
        self.has_rest = k < num_classes

    def keep(self, output: torch.Tensor) -> SparseTargets:
        """The k most probable classes of teacher logits [B, C]."""
        return SparseTargets.from_logits(output, self.k)

    def _check_targets(self, targets: SparseTargets) -> None:
        shape, expected = (targets.num_classes, targets.k), (self.num_classes, self.k)
        if shape != expected:
            raise ValueError(f'targets have (classes, k) = {shape}, but the codec was made for {expected}')
