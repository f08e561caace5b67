"""Float16Codec: records that any program reads with two lines of numpy."""

import numpy as np
import torch

from .codec import ClassCodec
from .sparse import SparseTargets

__all__ = ['Float16Codec']


class Float16Codec(ClassCodec):
    """The readable codec: plain little-endian numbers, 4k + 6 bytes (6k + 6 above 65,536 classes).

    k class ids as uint16 (uint32 above 65,536 classes), most probable first; k float16 log-probabilities; unless k is
    the number of classes, the log of the rest mass as float32; and two check bytes, the sum of all bytes before them
    modulo 256, and 1 plus that sum modulo 255. The first shows every single changed byte, which no byte that is never
    zero can do alone (255 values cannot tell 256 apart); the second is never zero.
    """
    name = 'float16'

    def __init__(self, num_classes: int, k: int):
        super().__init__(num_classes, k)
        self.id_dtype = np.dtype('<u2' if num_classes <= 1 << 16 else '<u4')
        self._probs_at = k * self.id_dtype.itemsize
        self._rest_at = self._probs_at + 2 * k
        self._sums_at = self._rest_at + 4 * self.has_rest
        self.width = self._sums_at + 2
        if k >= 1 << 16:
            raise ValueError(f'codec {self.name} holds at most 65,535 entries per record, not k = {k}')

    def encode(self, targets: SparseTargets) -> np.ndarray:
        self._check_targets(targets)
        records = np.empty((len(targets), self.width), dtype=np.uint8)
        records[:, :self._probs_at] = _bytes(targets.ids.cpu().numpy().astype(self.id_dtype))
        # Half precision ends at -65504; a class of that log-probability has no mass in any precision.
        log_probs = targets.log_probs.cpu().numpy().clip(min=-65504.)
        records[:, self._probs_at:self._rest_at] = _bytes(log_probs.astype('<f2'))
        if self.has_rest:
            log_rest = targets.log_rest.cpu().numpy().astype('<f4')
            records[:, self._rest_at:self._sums_at] = _bytes(log_rest[:, None])
        records[:, self._sums_at:] = self._sums(records)
        return records

    def check(self, records: np.ndarray) -> None:
        self._check_shape(records)
        bad = np.flatnonzero((records[:, self._sums_at:] != self._sums(records)).any(axis=1))
        if len(bad):
            raise ValueError(f'record {bad[0]} of {len(records)} does not match its check bytes')
        ids = np.ascontiguousarray(records[:, :self._probs_at]).view(self.id_dtype)
        bad = np.flatnonzero((ids >= self.num_classes).any(axis=1))
        if len(bad):
            raise ValueError(f'record {bad[0]} of {len(records)} names class {ids[bad[0]].max()} of {self.num_classes}')

    def decode(self, records: torch.Tensor, check: bool = False) -> SparseTargets:
        if check:
            self.check(records.cpu().numpy())

        def numbers(start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
            # A copy, since a view of one row keeps the odd stride and offset of the records.
            return records[:, start:stop].clone(memory_format=torch.contiguous_format).view(dtype)

        # Torch reads signed integers; the mask undoes the sign that a large id got.
        bits = 8 * self.id_dtype.itemsize
        ids = numbers(0, self._probs_at, torch.int16 if bits == 16 else torch.int32).long() & ((1 << bits) - 1)
        log_probs = numbers(self._probs_at, self._rest_at, torch.float16).float()
        log_rest = numbers(self._rest_at, self._sums_at, torch.float32)[:, 0] if self.has_rest else None
        return SparseTargets(ids, log_probs, log_rest, self.num_classes)

    def _sums(self, records: np.ndarray) -> np.ndarray:
        total = records[:, :self._sums_at].sum(axis=1, dtype=np.uint32)
        return np.stack([total % 256, 1 + total % 255], axis=1)  # [B, 2]


def _bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of each row of a [B, n] array, uint8 [B, n * itemsize]."""
    return np.ascontiguousarray(array).view(np.uint8)
