"""Mixup and CutMix with stored targets: who is mixed with whom, and the label loss of what comes out.

The teacher has to see the mixed view that the student will see, so the partners of an epoch are a function of (seed,
epoch, number of samples) and of nothing else: no batch size, no rank, no order. They stand side by side in a keyed
permutation of the whole data set, a Feistel network on the numbers of its samples. It is computed in both directions
where it is asked for, and for 14 million samples it takes 256 kB. `Replay.mix` mixes the views of a pair.
"""

import functools
import hashlib
import struct

import numpy as np
import torch
from torch.nn import functional as F

__all__ = ['Pairing', 'mixed_cross_entropy', 'mixed_target']

# With 6, partners among 16 samples are not quite equally frequent.
NUM_ROUNDS = 8


class Pairing:
    """The pairs of each epoch: a perfect matching of all samples, another one in every epoch.

    Where the number of samples is odd, one of them is its own partner, and mixing leaves its view as it is.

    Args:
        seed: The store's seed.
        num_samples: Rows of the whole data set.
    """

    def __init__(self, seed: int, num_samples: int):
        self.seed = seed
        self.num_samples = num_samples

    def members(self, epoch: int, pairs: np.ndarray) -> np.ndarray:
        """Both samples, int64 [P, 2], of the pairs, int64 [P] from 0 to (num_samples - 1) // 2, of an epoch."""
        places = np.minimum(2 * pairs[:, None] + [0, 1], self.num_samples - 1)
        return self._walk(epoch, places, forwards=True)

    def pairs_of(self, epoch: int, samples: np.ndarray) -> np.ndarray:
        """The pairs, int64 [B], in which an epoch has these samples, int64 [B]."""
        return self._walk(epoch, samples, forwards=False) // 2

    def _walk(self, epoch: int, numbers: np.ndarray, forwards: bool) -> np.ndarray:
        """The permutation, or its inverse, of numbers below num_samples.

        The network permutes more numbers than that, up to four times as many. What lands beyond goes on until it is
        back, which is a permutation of the rest.
        """
        half_bits = _half_bits(self.num_samples)
        tables = _round_tables(self.seed, epoch, self.num_samples)
        found = _feistel(numbers, tables, half_bits, forwards)
        while (beyond := found >= self.num_samples).any():
            found[beyond] = _feistel(found[beyond], tables, half_bits, forwards)
        return found


def _half_bits(num_samples: int) -> int:
    """Bits of half a number of the network."""
    return max(1, ((num_samples - 1).bit_length() + 1) // 2)


@functools.lru_cache(maxsize=8)
def _round_tables(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """What each round adds to one half for each value of the other, int64 [rounds, 2 ** half_bits].

    They come from a hash and not from a generator of numpy, whose versions may draw differently.
    """
    size = 1 << _half_bits(num_samples)
    content = hashlib.shake_256(struct.pack('<qqq', seed, epoch, num_samples)).digest(4 * NUM_ROUNDS * size)
    return np.frombuffer(content, dtype='<u4').reshape(NUM_ROUNDS, size).astype(np.int64) % size


def _feistel(numbers: np.ndarray, tables: np.ndarray, half_bits: int, forwards: bool) -> np.ndarray:
    left, right = numbers >> half_bits, numbers & ((1 << half_bits) - 1)
    if forwards:
        for table in tables:
            left, right = right, left ^ table[right]
    else:
        for table in tables[::-1]:
            left, right = right ^ table[left], left
    return left << half_bits | right


def mixed_cross_entropy(
        logits: torch.Tensor,
        labels: torch.Tensor,
        labels2: torch.Tensor,
        lam: torch.Tensor,
        smoothing: float = 0.,
) -> torch.Tensor:
    """Label loss on mixed views: that of timm's dense mixup target, which is not built.

    Args:
        logits: Student logits [B, C].
        labels: Labels of the samples, int64 [B].
        labels2: Labels of their partners, int64 [B].
        lam: Share of the first label, [B].
        smoothing: Label smoothing.

    Returns:
        The mean over the batch, a scalar.
    """
    first, second = (
        F.cross_entropy(logits, target, reduction='none', label_smoothing=smoothing) for target in (labels, labels2))
    return (lam * first + (1 - lam) * second).mean()


def mixed_target(
        labels: torch.Tensor,
        labels2: torch.Tensor,
        lam: torch.Tensor,
        num_classes: int,
        smoothing: float = 0.,
) -> torch.Tensor:
    """timm's dense mixup target, for losses that need it.

    Args:
        labels: Labels of the samples, int64 [B].
        labels2: Labels of their partners, int64 [B].
        lam: Share of the first label, [B].
        num_classes: C.
        smoothing: Label smoothing.

    Returns:
        The probability of each class, [B, C].
    """
    first, second = (F.one_hot(target, num_classes) for target in (labels, labels2))
    mixed = lam[:, None] * first + (1 - lam[:, None]) * second
    return (1 - smoothing) * mixed + smoothing / num_classes
