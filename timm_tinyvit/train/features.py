"""A student that learns features: its own pooled vector or map, and a projector to the size of the teacher's.

The projector is trained with the student and is kept in checkpoints; what is evaluated and exported is the student.
"""

import copy

import torch
from timm.task.distillation import FeatureDistillationTrainableModule
from torch import nn

from ..base.errors import InputError
from ..models.features import feature_vectors

__all__ = ['FeatureStudent']


class FeatureStudent(FeatureDistillationTrainableModule):
    """What is called in training in place of the student: it gives logits and projected features.

    Weights that neither loss reaches, as those of a pooled norm where a map is learned, are frozen, so that processes
    need not wait for their gradients. The groups of the optimiser are those of timm's own feature distillation.

    Args:
        student: A timm model.
        dim: Numbers of a stored vector.
        grid: Cells of one side of a stored grid; 0 for one pooled vector.
        size: Height and width of the views.
        projector: `linear`, or `mlp` with one hidden layer of the size of the stored vectors.

    Raises:
        InputError: The student has no such features.
    """

    def __init__(
            self,
            student: nn.Module,
            dim: int,
            grid: int,
            size: tuple[int, int],
            projector: str = 'linear',
    ):
        super().__init__(student)
        self.grid = grid
        # A copy sees an empty image: batch norms and hooks of the student are as they were.
        trial = copy.deepcopy(student).eval()
        try:
            with torch.enable_grad():
                features = trial.forward_features(torch.zeros(1, 3, *size))
                vectors = feature_vectors(trial, features, size, grid)
                logits = trial.forward_head(features).sum() if student.num_classes else 0.
                (vectors.sum() + logits).backward()
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f'the student does not give the features of the store: {str(error).splitlines()[0]}; '
                             f'choose another --model or --img-size, or another store')
        unused = {name for name, weight in trial.named_parameters() if weight.grad is None}
        for name, weight in student.named_parameters():
            if name in unused:
                weight.requires_grad_(False)
        self.projection = nn.Linear(vectors.shape[2], dim)
        if projector == 'mlp':
            self.projection = nn.Sequential(self.projection, nn.GELU(), nn.Linear(dim, dim))

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, C] and projected features [B, cells, D] of normalised views [B, 3, H, W]."""
        features = self.student.forward_features(input)
        vectors = feature_vectors(self.student, features, input.shape[-2:], self.grid)
        return self.student.forward_head(features), self.projection(vectors)
