"""What is kept of a teacher's output: its k most probable classes, the loss on them, and their records on disk.

Knows torch and numpy alone. `SparseTargets.from_logits` keeps classes, `sparse_soft_target_cross_entropy` learns from
them, and a `Codec` turns them into bytes and back.
"""

from .codec import Codec
from .codecs import create_codec
from .sparse import SparseTargets, sparse_soft_target_cross_entropy

__all__ = ['Codec', 'SparseTargets', 'create_codec', 'sparse_soft_target_cross_entropy']
