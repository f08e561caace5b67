"""The student's half: what train_distill.py is made of.

`SparseLogitTask` is what is learnt from in a batch, `TrainBatches` where batches come from, `TrainState` what a
checkpoint holds, and `Evaluator` what becomes of the weights after an epoch.
"""

from .batches import TrainBatches
from .checkpoint import TrainState
from .evaluate import Evaluator
from .student import create_student
from .task import SparseLogitTask

__all__ = ['Evaluator', 'SparseLogitTask', 'TrainBatches', 'TrainState', 'create_student']
