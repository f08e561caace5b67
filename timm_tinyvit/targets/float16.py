"""Float16Codec: records that any program reads with two lines of numpy."""

import numpy as np
import torch

from .codec import Codec
from .sparse import SparseTargets

__all__ = ['Float16Codec']


def _bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of each row of a [B, n] array, uint8 [B, n * itemsize]."""
    return np.ascontiguousarray(array).view(np.uint8)


class Float16Codec(Codec):
    """The readable codec: plain little-endian numbers, 4k + 8 bytes (6k + 8 above 65,536 classes).

    k class ids as uint16 (uint32 above 65,536 classes), most probable first; k float16 log-probabilities; the log of
    the rest mass as float32, minus infinity where there is none; the number of valid entries as uint16; and two check
    bytes, the sum of all bytes before them modulo 256, and 1 plus that sum modulo 255. The first shows every single
    changed byte, which no byte that is never zero can do alone (255 values cannot tell 256 apart); the second is never
    zero.
    """
    name = 'float16'
    takes_padding = True

    def __init__(self, num_classes: int, k: int, remainder: str = 'uniform'):
        super().__init__(num_classes, k, remainder)
        self.id_dtype = np.dtype('<u2' if num_classes <= 1 << 16 else '<u4')
        self._probs_at = k * self.id_dtype.itemsize
        self._rest_at = self._probs_at + 2 * k
        self._valid_at = self._rest_at + 4
        self._sums_at = self._valid_at + 2
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
        log_rest = np.full((len(targets), 1), -np.inf, dtype='<f4')
        if targets.log_rest is not None:
            log_rest[:, 0] = targets.log_rest.cpu().numpy()
        records[:, self._rest_at:self._valid_at] = _bytes(log_rest)
        records[:, self._valid_at:self._sums_at] = _bytes(targets.num_valid.cpu().numpy().astype('<u2')[:, None])
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
        valid = np.ascontiguousarray(records[:, self._valid_at:self._sums_at]).view('<u2')[:, 0]
        bad = np.flatnonzero(valid > self.k)
        if len(bad):
            raise ValueError(f'record {bad[0]} of {len(records)} counts {valid[bad[0]]} entries of at most {self.k}')

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
        log_rest = numbers(self._rest_at, self._valid_at, torch.float32)[:, 0]
        if self.remainder == 'none':
            log_rest = None
        num_valid = numbers(self._valid_at, self._sums_at, torch.int16)[:, 0].long() & 0xFFFF
        return SparseTargets(ids, log_probs, log_rest, num_valid, self.num_classes, self.remainder)

    def _sums(self, records: np.ndarray) -> np.ndarray:
        total = records[:, :self._sums_at].sum(axis=1, dtype=np.uint32)
        return np.stack([total % 256, 1 + total % 255], axis=1)  # [B, 2]
