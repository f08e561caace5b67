"""What is kept of a teacher's output, the loss on it, and its records on disk.

Knows torch and numpy alone. `SparseTargets.from_logits` keeps a teacher's most probable classes, and
`sparse_soft_target_cross_entropy` learns from them; `FeatureTargets` are the vectors of any backbone, and
`feature_loss` learns from those. A `Codec` turns either into bytes and back.
"""

from .codec import ClassCodec, Codec
from .codecs import create_codec, create_feature_codec
from .features import FeatureTargets, feature_loss
from .sparse import SparseTargets, sparse_soft_target_cross_entropy

__all__ = [
    'ClassCodec', 'Codec', 'FeatureTargets', 'SparseTargets', 'create_codec', 'create_feature_codec', 'feature_loss',
    'sparse_soft_target_cross_entropy',
]
