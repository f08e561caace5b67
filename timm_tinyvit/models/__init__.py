"""The models: TinyViT and the paper's CLIP teacher, registered with timm, and how weights are loaded and saved.

`tiny_vit.py`, with the layers that it is built of, and `clip_teacher.py` know timm alone and can be taken out.
"""

from ..base.lazy import lazy_names

_PUBLIC = {
    'Normalize': 'loading', 'TinyVit': 'tiny_vit', 'create_pretrained': 'loading', 'export_model': 'saving',
    'load_weights': 'loading',
}
__all__ = list(_PUBLIC)
__getattr__ = lazy_names(__name__, _PUBLIC)
