"""Feature targets: a teacher's pooled vector of a view, or a grid of vectors; their losses, and their records on disk.

Any backbone gives them, with or without a classifier. A record is a run of plain numbers, a CRC-32 and the byte 1.
"""

import zlib
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from .codec import Codec

__all__ = ['FEATURE_LOSSES', 'FeatureCodec', 'FeatureTargets', 'Float16FeatureCodec', 'Int8FeatureCodec',
           'feature_loss']

# A grid of 64 x 64 cells of 256 numbers, as of SAM, takes 1 MiB.
MAX_WIDTH = 1 << 24
CHECK_BYTES = 5
MAX_FLOAT16 = 65504.

# Of predicted and stored vectors, float32 [B, cells, D]; means over all of a batch.
FEATURE_LOSSES = {
    'cosine': lambda found, stored: 1 - F.cosine_similarity(found, stored, dim=-1).mean(),
    'smooth-l1': F.smooth_l1_loss,
    'mse': F.mse_loss,
}


@dataclass(frozen=True)
class FeatureTargets:
    """A teacher's features of B views.

    Attributes:
        vectors: Float [B, cells, D]: the cells of a grid in rows from the top left, or one pooled vector.
    """
    vectors: torch.Tensor

    def __post_init__(self) -> None:
        if self.vectors.ndim != 3:
            raise ValueError(f'feature vectors must be [B, cells, D], but are {list(self.vectors.shape)}')

    def __len__(self) -> int:
        return len(self.vectors)

    def to(self, device: torch.device, non_blocking: bool = False) -> 'FeatureTargets':
        """The same targets on another device."""
        return FeatureTargets(self.vectors.to(device, non_blocking=non_blocking))


def feature_loss(features: torch.Tensor, targets: FeatureTargets, kind: str = 'cosine') -> torch.Tensor:
    """How far predicted features are from stored ones, computed in float32.

    Args:
        features: Projected features of the student, [B, cells, D].
        targets: Those of the teacher, on the same device.
        kind: One of `FEATURE_LOSSES`: `cosine`, 1 minus the cosine of each pair of vectors; `smooth-l1`; `mse`.

    Returns:
        The mean over the batch, a scalar.

    Raises:
        ValueError: Shapes do not match.
    """
    if features.shape != targets.vectors.shape:
        raise ValueError(f'student features are {list(features.shape)}, those of the teacher '
                         f'{list(targets.vectors.shape)}; give the student a projector to the size of its store')
    return FEATURE_LOSSES[kind](features.float(), targets.vectors.float())


class FeatureCodec(Codec):
    """A codec of `FeatureTargets`.

    Args:
        dim: Numbers of a vector, D.
        grid: Cells of one side of a grid; 0 for one pooled vector.
    """

    def __init__(self, dim: int, grid: int = 0):
        self.dim = dim
        self.cells = max(1, grid * grid)
        self._numbers = self._bytes() if dim >= 1 and grid >= 0 else 0
        self.width = self._numbers + CHECK_BYTES
        if not CHECK_BYTES < self.width <= MAX_WIDTH:
            raise ValueError(f'features of {dim} numbers on a grid of {grid} take records of {self.width:,} bytes, '
                             f'expected some and {MAX_WIDTH:,} at most; choose another --feature-grid or --feature-dim')

    @abstractmethod
    def _bytes(self) -> int:
        """Bytes of the numbers of a record."""

    @abstractmethod
    def _pack(self, vectors: np.ndarray) -> np.ndarray:
        """The numbers of float32 vectors [B, cells, D] as uint8 [B, bytes]."""

    @abstractmethod
    def _halves(self, records: np.ndarray) -> np.ndarray:
        """The numbers of records that are 16-bit floats, [B, any]."""

    def keep(self, output: torch.Tensor) -> FeatureTargets:
        """Features [B, cells, D] as they are."""
        bad = (~torch.isfinite(output)).flatten(1).any(dim=1).sum().item()
        if bad:
            raise ValueError(f'the features of {bad} of {len(output)} views hold NaN or infinity; check the teacher, '
                             f'or run it in float32')
        return FeatureTargets(output)

    def encode(self, targets: FeatureTargets) -> np.ndarray:
        vectors = targets.vectors.float().cpu().numpy()
        if vectors.shape[1:] != (self.cells, self.dim):
            raise ValueError(f'feature vectors are {list(vectors.shape)}, but the codec was made for '
                             f'[B, {self.cells}, {self.dim}]')
        if not np.isfinite(vectors).all():
            raise ValueError('feature vectors hold NaN or infinity')
        records = np.empty((len(vectors), self.width), dtype=np.uint8)
        records[:, :self._numbers] = self._pack(vectors)
        records[:, self._numbers:] = self._checks(records)
        return records

    def check(self, records: np.ndarray) -> None:
        self._check_shape(records)
        bad = np.flatnonzero((records[:, self._numbers:] != self._checks(records)).any(axis=1))
        if len(bad):
            raise ValueError(f'record {bad[0]} of {len(records)} does not match its check bytes')
        bad = np.flatnonzero(~np.isfinite(self._halves(records)).all(axis=1))
        if len(bad):
            raise ValueError(f'record {bad[0]} of {len(records)} holds NaN or infinity')

    def decode(self, records: torch.Tensor, check: bool = False) -> FeatureTargets:
        if check:
            self.check(records.cpu().numpy())
        return FeatureTargets(self._unpack(records))

    @abstractmethod
    def _unpack(self, records: torch.Tensor) -> torch.Tensor:
        """Float32 vectors [B, cells, D] of records on any device."""

    def _checks(self, records: np.ndarray) -> np.ndarray:
        sums = [zlib.crc32(record) for record in np.ascontiguousarray(records[:, :self._numbers])]
        checks = np.ones((len(records), CHECK_BYTES), dtype=np.uint8)
        checks[:, :4] = np.array(sums, dtype='<u4')[:, None].view(np.uint8)
        return checks


def _numbers(records: torch.Tensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    # A copy, since a view of one row keeps the odd stride and offset of the records.
    return records[:, start:stop].clone(memory_format=torch.contiguous_format).view(dtype)


class Int8FeatureCodec(FeatureCodec):
    """A 16-bit float as the scale of each vector, its largest number over 127; then D signed bytes for each."""
    name = 'int8'

    def _bytes(self) -> int:
        return self.cells * (2 + self.dim)

    def _pack(self, vectors: np.ndarray) -> np.ndarray:
        scales = np.abs(vectors).max(axis=2) / 127  # [B, cells]
        if scales.max(initial=0) > MAX_FLOAT16:
            raise ValueError(f'feature vectors have numbers up to {127 * scales.max():.3g}, which codec {self.name} '
                             f'does not hold; expected {127 * MAX_FLOAT16:.3g} at most')
        scales = scales.astype('<f2')
        # Divided by the scale as it is stored, so that its rounding adds no error.
        divisors = np.where(scales > 0, scales, 1).astype(np.float32)
        levels = (vectors / divisors[:, :, None]).round().clip(-127, 127).astype(np.int8)
        parts = (scales.view(np.uint8), levels.reshape(len(vectors), -1).view(np.uint8))
        return np.concatenate(parts, axis=1)

    def _halves(self, records: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(records[:, :2 * self.cells]).view('<f2')

    def _unpack(self, records: torch.Tensor) -> torch.Tensor:
        scales = _numbers(records, 0, 2 * self.cells, torch.float16)  # [B, cells]
        levels = _numbers(records, 2 * self.cells, self._numbers, torch.int8)
        return scales.float()[:, :, None] * levels.view(-1, self.cells, self.dim)


class Float16FeatureCodec(FeatureCodec):
    """All numbers as 16-bit floats."""
    name = 'float16'

    def _bytes(self) -> int:
        return 2 * self.cells * self.dim

    def _pack(self, vectors: np.ndarray) -> np.ndarray:
        if (largest := np.abs(vectors).max(initial=0)) > MAX_FLOAT16:
            raise ValueError(f'feature vectors have numbers up to {largest:.3g}, which codec {self.name} does not '
                             f'hold; choose --codec int8')
        return np.ascontiguousarray(vectors.reshape(len(vectors), -1).astype('<f2')).view(np.uint8)

    def _halves(self, records: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(records[:, :self._numbers]).view('<f2')

    def _unpack(self, records: torch.Tensor) -> torch.Tensor:
        return _numbers(records, 0, self._numbers, torch.float16).float().view(-1, self.cells, self.dim)
