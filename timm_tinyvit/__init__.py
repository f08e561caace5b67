"""TinyViT and fast pretraining distillation for timm.

Importing this package registers the five TinyViT models and the paper's CLIP teacher with timm. The public names below
are imported on first use, so that importing the package costs little more than importing timm.
"""

import os
import sys

from .base.lazy import lazy_names
from .version import __version__

# Public name -> module.
_PUBLIC = {
    'EpochBatchSampler': 'data.sampler', 'LogitStore': 'store.local', 'Replay': 'data.views',
    'SparseLogitDataset': 'data.dataset', 'SparseLogitTask': 'train.task', 'SparseTargets': 'targets.sparse',
    'TinyVit': 'models.tiny_vit', 'ViewConfig': 'data.view_config', 'collate': 'data.dataset',
    'create_loader': 'data.loader', 'distill': 'distilling', 'evaluate': 'train.evaluate', 'fill_store': 'teacher.api',
    'load_split': 'data.sources', 'open_store': 'data.opening', 'sparse_soft_target_cross_entropy': 'targets.sparse',
}
__all__ = ['__version__', 'register_models', *_PUBLIC]
__getattr__ = lazy_names(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register_models() -> None:
    """Register the models with timm, as importing this package does."""
    from .models import clip_teacher, tiny_vit  # noqa: F401


def _is_own_program() -> bool:
    """Whether Python imports this package to run `timm-tinyvit` or `python -m timm_tinyvit`.

    These read their arguments first, which takes no torch, and then register the models themselves.
    """
    argv = getattr(sys, 'argv', None) or ['']
    if argv[0] == '-m':
        # While Python looks for the module, whose name stands before its arguments.
        module = sys.orig_argv[-len(argv)].removeprefix('-m')
        return module == __name__ or module.startswith(f'{__name__}.')
    return os.path.basename(argv[0]) in ('timm-tinyvit', 'timm-tinyvit.exe')


if not _is_own_program():
    register_models()
