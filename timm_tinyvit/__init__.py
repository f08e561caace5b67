"""TinyViT and fast pretraining distillation for timm.

Importing this package registers the five TinyViT models and the paper's CLIP teacher with timm; everything else is
imported from its own module.
"""

from .models import clip_teacher  # noqa: F401  registers the teacher
from .models.tiny_vit import TinyVit
from .version import __version__

__all__ = ['TinyVit', '__version__']
