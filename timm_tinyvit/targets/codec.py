"""SparseTargets to records and back.

A codec turns every row of a `SparseTargets` into `width` bytes, or, where lengths vary, into as many bytes as it takes,
which in memory are padded to `width`. Encoding happens once, on the way to disk, in numpy; decoding happens in every
training step, on whatever device the records are: there all shapes are static and nothing waits for the device. `check`
is the part that can fail; it runs where the records come from disk.

The last byte of a record is never zero, since readers of Arrow files like to strip trailing zero bytes.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch

from .sparse import REMAINDERS, SparseTargets

__all__ = ['Codec', 'Float16Codec', 'codecs', 'create_codec']


class Codec(ABC):
    """What every codec provides; a subclass sets `name` and `width` and is listed in `codecs`.

    Args:
        num_classes: Number of classes of the teacher.
        k: Number of entries per record.
        remainder: The remainder rule of the decoded targets, see `SparseTargets`.

    Attributes:
        name: Its name, as in `--codec`.
        width: Bytes of a record in memory.
        is_variable: Whether records are shorter on disk than in memory; then it has `pack` and `unpack` too.
        takes_padding: Whether fewer than k entries of a record may be valid.
    """
    name: str
    width: int
    is_variable = False
    takes_padding = False

    def __init__(self, num_classes: int, k: int, remainder: str = 'uniform'):
        if not 1 <= k <= num_classes:
            raise ValueError(f'k = {k} does not fit {num_classes} classes; choose k from 1 to {num_classes}')
        if remainder not in REMAINDERS:
            raise ValueError(f'the remainder rule is {remainder!r}; use one of {", ".join(REMAINDERS)}')
        self.num_classes = num_classes
        self.k = k
        self.remainder = remainder
        self.has_rest = remainder == 'uniform' and k < num_classes

    @abstractmethod
    def encode(self, targets: SparseTargets) -> np.ndarray:
        """Records, uint8 [B, width], of targets on any device."""

    @abstractmethod
    def check(self, records: np.ndarray) -> None:
        """Raise a ValueError that names a row of uint8 [B, width] that `encode` cannot have written."""

    @abstractmethod
    def decode(self, records: torch.Tensor, check: bool = False) -> SparseTargets:
        """Targets of records, uint8 [B, width], on the device of the records.

        Args:
            records: Records that were checked, unless they are now.
            check: Check them on the way, which in main memory takes less time than a `check` before.

        Raises:
            ValueError: Records were to be checked, and `encode` cannot have written one of them.
        """

    def pack(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Records in memory, uint8 [B, width], as they are on disk: uint8 [bytes], with offsets int64 [B + 1]."""
        raise NotImplementedError(f'records of codec {self.name} are the same on disk and in memory')

    def unpack(self, data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """The opposite of `pack`; raises a ValueError that names the first record of a length that there is not."""
        raise NotImplementedError(f'records of codec {self.name} are the same on disk and in memory')

    def _check_shape(self, records: np.ndarray) -> None:
        if records.ndim != 2 or records.shape[1] != self.width:
            raise ValueError(f'records are {list(records.shape)}, but codec {self.name} reads [B, {self.width}]')

    def _check_targets(self, targets: SparseTargets) -> None:
        found = (targets.num_classes, targets.k, targets.remainder)
        expected = (self.num_classes, self.k, self.remainder)
        if found != expected:
            raise ValueError(
                f'targets have (classes, k, remainder) = {found}, but the codec was made for {expected}')


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


def codecs() -> dict[str, type[Codec]]:
    """The codecs by name."""
    # They are built on this module.
    from .compact import CompactCodec, SmallCompactCodec
    from .draws import DrawsCodec
    from .variable import VariableCodec

    return {codec.name: codec for codec in (CompactCodec, SmallCompactCodec, VariableCodec, DrawsCodec, Float16Codec)}


def create_codec(name: str, num_classes: int, k: int, remainder: str = 'uniform') -> Codec:
    """The codec of a name, for records of k of num_classes classes.

    Raises:
        ValueError: No codec has this name, k does not fit, or the remainder rule is unknown.
    """
    known = codecs()
    if name not in known:
        raise ValueError(f'there is no codec {name!r}; use one of {", ".join(sorted(known))}')
    return known[name](num_classes, k, remainder)
