"""Images and their augmented views: sources, replayable augmentation, data sets, samplers and loaders.

A view is a pure function of (seed, epoch, index): `Replay` makes it from an image with timm's transforms, the same in
every process. `open_store` opens a store only where this machine makes the views that the store was made from.
"""

from ..base.lazy import lazy_names

_PUBLIC = {
    'EpochBatchSampler': 'sampler', 'Replay': 'views', 'SparseLogitDataset': 'dataset', 'collate': 'dataset',
    'load_split': 'sources', 'open_store': 'opening',
}
__all__ = list(_PUBLIC)
__getattr__ = lazy_names(__name__, _PUBLIC)
