"""Which classes of a teacher's answer are kept: logits to `SparseTargets`.

What is kept of a view is a function of its logits and of (seed, epoch, index) alone, never of the batch it came in.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from .sparse import SparseTargets

__all__ = ['Sparsifier', 'TopK', 'create_sparsifier', 'sparsifiers']


class Sparsifier(ABC):
    """What every sparsifier provides; a subclass sets `name` and `remainder` and is listed in `sparsifiers`.

    Attributes:
        name: Its name, as in `--sparsifier`.
        remainder: The remainder rule of its targets, see `SparseTargets`.
        default_codec: The codec that suits its targets best.
    """
    name: str
    remainder: str
    default_codec: str

    def __init__(self, k: int, top_p: float = 1.0, seed: int = 0):
        self.k = k
        self.top_p = top_p
        self.seed = seed

    @abstractmethod
    def __call__(self, logits: torch.Tensor, epoch: int, indices: Sequence[int]) -> SparseTargets:
        """Sparse targets of teacher logits [B, C], of the views of these sample indices [B] in an epoch.

        Raises:
            ValueError: The logits hold NaN or infinity, or k does not fit.
        """


class TopK(Sparsifier):
    """The k most probable classes, as in the paper."""
    name = 'topk'
    remainder = 'uniform'
    default_codec = 'compact'

    def __call__(self, logits: torch.Tensor, epoch: int, indices: Sequence[int]) -> SparseTargets:
        return SparseTargets.from_logits(logits, self.k)


def sparsifiers() -> dict[str, type[Sparsifier]]:
    """The sparsifiers by name."""
    return {kind.name: kind for kind in (TopK,)}


def create_sparsifier(name: str, k: int, top_p: float = 1.0, seed: int = 0) -> Sparsifier:
    """The sparsifier of a name.

    Args:
        name: One of `sparsifiers`.
        k: Most classes that are kept of a view.
        top_p: Mass that `nucleus` covers.
        seed: The store's seed, for `sample`.

    Raises:
        ValueError: No sparsifier has this name, or an argument is out of range.
    """
    known = sparsifiers()
    if name not in known:
        raise ValueError(f'there is no sparsifier {name!r}; use one of {", ".join(sorted(known))}')
    return known[name](k, top_p, seed)
