"""A tower of images as a classifier: the cosine of an image with one text vector of each class, as in CLIP and SigLIP.

The vectors are made elsewhere, once, by the text tower (docs/teacher.md), and lie in a safetensors file: a tensor
`class_embeddings` [C, D], and in its metadata `logit_scale`, by which cosines are multiplied, and perhaps
`class_names`, a JSON list.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from ..base.errors import InputError
from ..base.types import mismatch, read_json
from ..models.loading import look_at_zeros

__all__ = ['ZeroShotClassifier']

MAX_SCALE = 1e4
TENSOR = 'class_embeddings'


class ZeroShotClassifier(nn.Module):
    """From images [B, 3, H, W] to logits [B, C].

    Args:
        tower: A timm model from images to embeddings [B, D].
        path: The file of text vectors.

    Raises:
        InputError: The file is none of this kind, or its vectors are not as long as the tower's.
    """

    def __init__(self, tower: nn.Module, path: str):
        super().__init__()
        self.tower = tower
        vectors, self.scale, names = _read(Path(path).expanduser())
        self.register_buffer('class_embeddings', F.normalize(vectors, dim=1))
        config = dict(getattr(tower, 'pretrained_cfg', None) or {})
        self.num_classes = len(vectors)
        self.pretrained_cfg = config | {'num_classes': len(vectors), 'label_names': names}
        found = list(look_at_zeros(tower, config.get('input_size', (3, 224, 224))).shape[1:])
        if found != [vectors.shape[1]]:
            raise InputError(f'--class-embeddings {path} holds vectors of {vectors.shape[1]} numbers, and the teacher '
                             f'gives {found} for an image; make them with the text tower of this model')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * F.normalize(self.tower(x).float(), dim=1) @ self.class_embeddings.T


def _read(path: Path) -> tuple[torch.Tensor, float, list[str] | None]:
    """The vectors, float32 [C, D], what cosines are multiplied by, and the names of the classes."""
    remedy = f'write {TENSOR} [classes, numbers] and logit_scale as docs/teacher.md shows'
    try:
        with safe_open(path, 'pt') as file:
            about, vectors = file.metadata() or {}, file.get_tensor(TENSOR).float()
        scale, names = float(about['logit_scale']), about.get('class_names')
        names = None if names is None else read_json(names)
    except OSError as error:
        raise InputError(f'--class-embeddings {path} cannot be read: {error.strerror or error}; name the file of the '
                         f'text vectors')
    except (KeyError, SafetensorError, ValueError) as error:
        raise InputError(f'--class-embeddings {path} is no file of text vectors ({error}); {remedy}')
    if vectors.ndim != 2 or not vectors.numel() or not vectors.isfinite().all() or not vectors.norm(dim=1).all():
        why = f'{TENSOR} is {list(vectors.shape)}, or holds zeros, NaN or infinity'
    elif not (math.isfinite(scale) and 0 < scale <= MAX_SCALE):
        why = f'logit_scale is {scale:g}, expected more than 0 and {MAX_SCALE:g} at most'
    else:
        why = mismatch(names, ([str], None), 'class_names')
        if why is None and names is not None and len(names) != len(vectors):
            why = f'there are {len(names)} class_names for {len(vectors)} vectors'
    if why:
        raise InputError(f'--class-embeddings {path} is no file of text vectors ({why}); {remedy}')
    return vectors, scale, names
