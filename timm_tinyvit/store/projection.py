"""Projection: what a store of features makes of its teacher's vectors, in `projection.safetensors` beside the manifest.

It is fitted once, when the store is made, and the manifest has its hash: whoever fills the store, or copies it, uses
this very file.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..base.errors import InputError
from ..base.files import write_atomic
from .manifest import Manifest

__all__ = ['PROJECTION_NAME', 'Projection']

PROJECTION_NAME = 'projection.safetensors'


@dataclass(frozen=True)
class Projection:
    """An orthogonal projection of vectors x of E numbers to D: `components @ (x - mean)`.

    Attributes:
        mean: Float32 [E].
        components: Float32 [D, E], orthonormal rows.
    """
    mean: torch.Tensor
    components: torch.Tensor

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors [..., E] as [..., D]."""
        return (vectors - self.mean) @ self.components.T

    def to(self, device: torch.device) -> 'Projection':
        return Projection(self.mean.to(device), self.components.to(device))

    def to_bytes(self) -> bytes:
        """The content of the file."""
        return save({'mean': self.mean.cpu(), 'components': self.components.cpu()})

    @property
    def hash(self) -> str:
        return _hash(self.to_bytes())

    def write(self, folder: Path) -> None:
        """Write the file of a store in this folder.

        Raises:
            InputError: The disk is full, or may not be written.
        """
        write_atomic(folder / PROJECTION_NAME, self.to_bytes())

    @classmethod
    def open(cls, folder: Path, manifest: Manifest) -> 'Projection | None':
        """The projection of the store in this folder; None where its features are the teacher's own.

        Raises:
            InputError: The file is missing, damaged or another one.
        """
        if not manifest.features.get('projection'):
            return None
        file = folder / PROJECTION_NAME
        try:
            content = file.read_bytes()
            if _hash(content) == manifest.features['projection']:
                return cls(**load(content))
            reason = 'damaged, or that of another store'
        except OSError as error:
            reason = 'missing' if isinstance(error, FileNotFoundError) else f'not readable ({error.strerror})'
        except (SafetensorError, TypeError) as error:
            reason = f'not one that this package writes ({type(error).__name__})'
        raise InputError(f'the projection {file} is {reason}; copy it from where the store is whole, or make the store '
                         f'again')


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
