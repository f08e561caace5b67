"""Which classes of a teacher's answer are kept: logits to `SparseTargets`.

What is kept of a view is a function of its logits and of (seed, epoch, index) alone, never of the batch it came in.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from .codec import Codec
from .sparse import SparseTargets, check_logits

__all__ = ['Sample', 'Sparsifier', 'TopK', 'create_sparsifier', 'sparsifiers']


class Sparsifier(ABC):
    """What every sparsifier provides; a subclass sets the attributes and is listed in `sparsifiers`.

    Args:
        k: Classes that are kept of a view; the number of draws of `Sample`.
        seed: The store's seed, for `Sample`.

    Attributes:
        name: Its name, as in `--sparsifier`.
        remainder: The remainder rule of its targets, see `SparseTargets`.
        default_codec: The codec that suits its targets best.
        makes_padding: Whether fewer than k entries may be valid.

    Raises:
        ValueError: An argument is out of range.
    """
    name: str
    remainder: str
    default_codec: str
    makes_padding = False

    def __init__(self, k: int, seed: int = 0):
        if k < 1:
            raise ValueError(f'k = {k} keeps no class; choose k from 1 on')
        self.k = k
        self.seed = seed

    @abstractmethod
    def __call__(self, logits: torch.Tensor, epoch: int | Sequence[int], indices: Sequence[int]) -> SparseTargets:
        """Sparse targets of teacher logits [B, C].

        Args:
            logits: The teacher's logits, on any device.
            epoch: The epoch of the views, or that of each.
            indices: The sample indices of the views [B].

        Returns:
            Targets of k entries (C, where there are more draws than classes) on the device of the logits.

        Raises:
            ValueError: The logits hold NaN or infinity, or k does not fit.
        """

    def check_codec(self, codec: Codec) -> None:
        """Raise a ValueError if a codec of the same remainder rule cannot hold these targets."""
        if self.makes_padding and not codec.takes_padding:
            raise ValueError(
                f'codec {codec.name} holds exactly {codec.k} classes of every view, but the sparsifier {self.name} '
                f'keeps fewer where they are enough; use codec {self.default_codec} or float16')


class TopK(Sparsifier):
    """The k most probable classes, as in the paper."""
    name = 'topk'
    remainder = 'uniform'
    default_codec = 'compact'

    def __call__(self, logits: torch.Tensor, epoch: int | Sequence[int], indices: Sequence[int]) -> SparseTargets:
        return SparseTargets.from_logits(logits, self.k)


class Sample(Sparsifier):
    """k independent draws from the teacher's distribution; the target of a class is the share of its draws.

    Its expectation is that distribution, so that the gradient of the loss is unbiased (Sparse Logit Sampling, ACL 2025,
    arXiv 2503.16870, with the teacher's probabilities as the proposal).
    """
    name = 'sample'
    remainder = 'none'
    default_codec = 'draws'
    makes_padding = True

    def __call__(self, logits: torch.Tensor, epoch: int | Sequence[int], indices: Sequence[int]) -> SparseTargets:
        check_logits(logits)
        state = torch.full((len(logits),), _signed(self.seed), device=logits.device)
        for part in (epoch, indices):
            state = _split_mix(state, 1)[:, 0] ^ torch.as_tensor(part, dtype=torch.int64, device=logits.device)
        uniform = _uniform(_split_mix(state, 1)[:, 0], self.k)
        mass = logits.double().softmax(dim=1).cumsum(dim=1)
        mass = mass / mass[:, -1:]
        draws = torch.searchsorted(mass, uniform, right=True)  # [B, N]
        return SparseTargets.from_draws(draws.sort(dim=1).values, logits.shape[1])


def _signed(number: int) -> int:
    """The lowest 64 bits of a number as torch keeps them."""
    return ((number & (1 << 64) - 1) ^ 1 << 63) - (1 << 63)


def _split_mix(state: torch.Tensor, count: int) -> torch.Tensor:
    """The next numbers, int64 [B, count], of the generator SplitMix64 in a state, int64 [B].

    Multiplication wraps around in int64 as the generator wants it; only its shifts must lose the sign.
    """
    x = state[:, None] + torch.arange(1, count + 1, device=state.device) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ x >> 30 & (1 << 34) - 1) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ x >> 27 & (1 << 37) - 1) * _signed(0x94D049BB133111EB)
    return x ^ x >> 31 & (1 << 33) - 1


def _uniform(state: torch.Tensor, count: int) -> torch.Tensor:
    """Uniform numbers from 0 to below 1, float64 [B, count], of the generator in a state, int64 [B]."""
    return (_split_mix(state, count) >> 11 & (1 << 53) - 1).double() * 2. ** -53


def sparsifiers() -> dict[str, type[Sparsifier]]:
    """The sparsifiers by name."""
    return {kind.name: kind for kind in (TopK, Sample)}


def create_sparsifier(name: str, k: int, seed: int = 0) -> Sparsifier:
    """The sparsifier of a name.

    Args:
        name: One of `sparsifiers`.
        k: Classes that are kept of a view; the number of draws of `sample`.
        seed: The store's seed, for `sample`.

    Raises:
        ValueError: No sparsifier has this name, or an argument is out of range.
    """
    known = sparsifiers()
    if name not in known:
        raise ValueError(f'there is no sparsifier {name!r}; use one of {", ".join(sorted(known))}')
    return known[name](k, seed)
