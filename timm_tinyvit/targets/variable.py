"""The codec of targets whose number of classes varies from view to view, as the nucleus of a teacher's answer does.

The number of valid entries of a record is on a ladder of sizes: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., k. On disk a record
is the record of `CompactCodec` for as many classes; the ladder leaves out sizes whose records would not be shorter than
those of the next, so that the length tells the size. In memory all records are k classes wide: byte 0 is the place on
the ladder, then comes the record, then zeros.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch

from .bitfields import RecordError, refuse
from .codec import Codec
from .compact import MAX_CLASSES, CompactCodec
from .sparse import SparseTargets

__all__ = ['VariableCodec', 'ladder']


@contextmanager
def _naming(rows: np.ndarray, num_rows: int) -> Iterator[None]:
    """Let an error about a record of these rows name the row itself."""
    try:
        yield
    except RecordError as error:
        raise RecordError(int(rows[error.row]), num_rows, error.reason)


@cache
def ladder(num_classes: int, k: int) -> tuple[int, ...]:
    """The sizes up to k that records of a varying number of classes may have, in ascending order.

    Raises:
        ValueError: k is out of range.
    """
    def width(size: int) -> int:
        return CompactCodec(min(num_classes, MAX_CLASSES), size).width

    sizes = [k]
    steps = {step << shift for step in (2, 3) for shift in range(k.bit_length())} | {1}
    for size in sorted(step for step in steps if step < k)[::-1]:
        if width(size) < width(sizes[0]):
            sizes.insert(0, size)
    return tuple(sizes)


class VariableCodec(Codec):
    """`CompactCodec` for as many classes as each record needs, for the targets of `Nucleus`.

    Args:
        num_classes: Number of classes of the teacher, 2 to 65,536.
        k: Most entries per record, 1 to 1,024.
        remainder: The remainder rule of the decoded targets, `uniform`.

    Attributes:
        sizes: How many entries of a record may be valid, in ascending order.

    Raises:
        ValueError: An argument is out of range.
    """
    name = 'compact-variable'
    is_variable = True
    takes_padding = True

    def __init__(self, num_classes: int, k: int, remainder: str = 'uniform'):
        super().__init__(num_classes, k, remainder)
        CompactCodec(num_classes, k, remainder)  # refuses what does not fit
        self.sizes = ladder(num_classes, k)
        self._codecs = [CompactCodec(num_classes, size) for size in self.sizes]
        self._lengths = np.array([codec.width for codec in self._codecs])
        self.width = 1 + self._codecs[-1].width

    def encode(self, targets: SparseTargets) -> np.ndarray:
        """Records, uint8 [B, width], of targets on any device.

        Raises:
            ValueError: The targets are of another kind, a number of valid entries is not on the ladder, or
                `CompactCodec` refuses them.
        """
        self._check_targets(targets)
        targets = targets.to(torch.device('cpu'))
        num_valid = targets.num_valid.numpy()
        places = np.searchsorted(self.sizes, num_valid).clip(max=len(self.sizes) - 1)
        bad = np.flatnonzero(np.take(self.sizes, places) != num_valid)
        if len(bad):
            raise ValueError(
                f'row {bad[0]} of the targets has {num_valid[bad[0]]} valid entries, but codec {self.name} holds '
                f'{", ".join(map(str, self.sizes))} of them; use --sparsifier nucleus or codec float16')
        records = np.zeros((len(targets), self.width), dtype=np.uint8)
        records[:, 0] = places
        for rows, codec in self._groups(places):
            log_rest = targets.log_rest[rows] if codec.has_rest else None
            part = SparseTargets(
                targets.ids[rows, :codec.k], targets.log_probs[rows, :codec.k], log_rest, targets.num_valid[rows],
                self.num_classes)
            try:
                records[rows, 1:1 + codec.width] = codec.encode(part)
            except ValueError as error:
                raise ValueError(f'of the targets with {codec.k} entries, {error}')
        return records

    def check(self, records: np.ndarray) -> None:
        self._check_frame(records)
        for rows, codec in self._groups(records[:, 0]):
            with _naming(rows, len(records)):
                codec.check(records[rows, 1:1 + codec.width])

    def decode(self, records: torch.Tensor, check: bool = False) -> SparseTargets:
        if records.device.type != 'cpu':
            if check:
                self.check(records.cpu().numpy())
            return self._decode_every_size(records)
        if check:
            self._check_frame(records.numpy())
        targets = self._no_targets(records)
        for rows, codec in self._groups(records[:, 0].numpy()):
            with _naming(rows, len(records)):
                part = codec.decode(records[torch.from_numpy(rows), 1:1 + codec.width], check)
            targets.ids[rows, :codec.k] = part.ids
            targets.log_probs[rows, :codec.k] = part.log_probs
            targets.num_valid[rows] = part.num_valid
            if codec.has_rest:
                targets.log_rest[rows] = part.log_rest
        return targets

    def _check_frame(self, records: np.ndarray) -> None:
        """Check what lies around the compact records: the shape, the places on the ladder and the zeros."""
        self._check_shape(records)
        places = records[:, 0]
        refuse(places >= len(self.sizes), f'has a size beyond the {len(self.sizes)} that there are')
        refuse((records[:, 1:] != 0) & ~self._written(self._lengths[places]), 'has more bytes than its size has')

    def _decode_every_size(self, records: torch.Tensor) -> SparseTargets:
        """The same on a device, all rows at every size: to find the rows of one size is to wait for the device.

        As the ladder is geometric, this takes three times the work of the largest size.
        """
        targets = self._no_targets(records)
        for place, codec in enumerate(self._codecs):
            chosen = records[:, 0] == place
            ids, log_probs, log_rest, num_valid = codec._decode(records[:, 1:1 + codec.width], torch)
            for all_rows, part in (
                    (targets.ids[:, :codec.k], ids), (targets.log_probs[:, :codec.k], log_probs),
                    (targets.log_rest, log_rest), (targets.num_valid, num_valid)):
                if part is not None:
                    mask = chosen if part.ndim == 1 else chosen[:, None]
                    all_rows.copy_(torch.where(mask, part, all_rows))
        return targets

    def _no_targets(self, records: torch.Tensor) -> SparseTargets:
        """Targets for these records with nothing in them yet."""
        like = dict(device=records.device)
        batch = len(records)
        return SparseTargets(
            torch.zeros(batch, self.k, dtype=torch.int64, **like), torch.zeros(batch, self.k, **like),
            torch.full((batch,), -torch.inf, **like), torch.zeros(batch, dtype=torch.int64, **like), self.num_classes)

    def pack(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = self._lengths[records[:, 0]]
        return records[:, 1:][self._written(lengths)], np.concatenate([[0], lengths.cumsum()])

    def unpack(self, data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        lengths = np.diff(offsets)
        places = np.searchsorted(self._lengths, lengths).clip(max=len(self.sizes) - 1)
        bad = np.flatnonzero(self._lengths[places] != lengths)
        if len(bad):
            raise RecordError(int(bad[0]), len(lengths), f'has {lengths[bad[0]]} bytes, a length that no record has')
        if not 0 <= offsets[0] <= offsets[-1] <= len(data):
            raise ValueError(f'records are at bytes {offsets[0]} to {offsets[-1]} of {len(data)}')
        records = np.zeros((len(lengths), self.width), dtype=np.uint8)
        records[:, 0] = places
        records[:, 1:][self._written(lengths)] = data[offsets[0]:offsets[-1]]
        return records

    def _written(self, lengths: np.ndarray) -> np.ndarray:
        """Which bytes after the first belong to records of these lengths, bool [B, width - 1]."""
        return np.arange(self.width - 1) < lengths[:, None]

    def _groups(self, places: np.ndarray) -> list[tuple[np.ndarray, CompactCodec]]:
        """The rows of every size that there is, with the codec of the size."""
        return [(np.flatnonzero(places == place), self._codecs[place]) for place in np.unique(places)]
