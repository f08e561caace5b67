"""What a student learns from in one batch, as a task of timm: labels, stored classes, stored features, or several.

`SparseLogitTask` has the interface of `timm.task.TrainingTask`, so that any loop that drives timm's tasks can learn
from a store: `task(batch['view'], batch)['loss'].backward()`.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from timm.loss import BinaryCrossEntropy
from timm.task import TrainingTask
from torch import nn

from ..data.pairing import mixed_cross_entropy, mixed_target
from ..models.loading import Normalize
from ..targets.features import FeatureTargets, feature_loss
from ..targets.losses import DistillLoss
from ..targets.sparse import SparseTargets
from .features import FeatureStudent
from .sharding import ModelEma, prepare_student
from .student import freeze_batch_norm

__all__ = ['LOSSES', 'SparseLogitTask', 'split_targets']

# What a run keeps of the losses of a batch; with features `feature_loss` too.
LOSSES = ('loss', 'label_loss', 'distill_loss')

# What is used of a batch besides its views.
TARGETS = ('label', 'label2', 'lam', 'record')


class SparseLogitTask(TrainingTask):
    """Cross-entropy with the stored classes of a teacher, with labels, or a weighted sum of both; and stored features.

    The loss is `(1 - alpha) * label_loss + alpha * T**2 * distill_loss + feature_weight * feature_loss`; the square of
    the temperature keeps the size of the gradients (Hinton et al., arXiv 1503.02531). The method is that of TinyViT
    (ECCV 2022, arXiv 2207.10666).

    Args:
        student: A timm model; or a `FeatureStudent` of it, to learn from a store of features as well.
        codec: Decodes the records of a store on the device, as `store.codec` does; None to learn from labels alone.
        normalize: Makes of uint8 views [B, 3, H, W] what the student takes; None where the loader has done it.
        alpha: Weight of the distillation loss; without a codec it is 0.
        distill_loss: Of logits and the stored targets, with the temperature that softens both; the paper's by default.
        label_loss: Of logits [B, C] and labels: int64 [B], or what `mixup` makes of them. Where two labels share a
            view, that of timm's dense target if it is a `BinaryCrossEntropy`, and else cross-entropy.
        smoothing: Label smoothing where two labels share a view.
        mixup: timm's `Mixup` of whole batches, of normalised views and labels.
        channels_last: Give the views to the student in channels-last memory.
        freeze_bn: Keep the running statistics of batch norms as they are.
        autocast: Gives the context that the student runs in.
        device: Where student and losses are computed.
        feature_kind: One of `FEATURE_LOSSES`.
        feature_weight: Weight of the loss on features.

    Attributes:
        student: The timm model, which is evaluated and exported.
        trained: What the optimiser trains: the student, or with its projector the `FeatureStudent`.
        losses: What a run keeps of the losses of a batch.
    """

    def __init__(
            self,
            student: nn.Module,
            codec: Any | None = None,
            normalize: Normalize | None = None,
            alpha: float = 1.,
            distill_loss: DistillLoss | None = None,
            label_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
            smoothing: float = 0.,
            mixup: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
            channels_last: bool = False,
            freeze_bn: bool = False,
            autocast: Callable[[], AbstractContextManager] = nullcontext,
            device: torch.device | None = None,
            feature_kind: str = 'cosine',
            feature_weight: float = 1.,
    ):
        super().__init__(device=device, verbose=False)
        self.trained = self.trainable_module = student
        self.has_features = isinstance(student, FeatureStudent)
        self.student = student.student if self.has_features else student
        self.losses = LOSSES + ('feature_loss',) * self.has_features
        self.feature_kind = feature_kind
        self.feature_weight = feature_weight
        self.normalize = nn.Identity() if normalize is None else normalize.to(self.device)
        self.codec = codec
        self.alpha = 0. if codec is None else alpha
        self.distill_loss = distill_loss or DistillLoss()
        self.label_loss = label_loss or nn.CrossEntropyLoss()
        self.smoothing = smoothing
        self.mixup = mixup
        self.channels_last = channels_last
        self.freeze_bn = freeze_bn
        self.autocast = autocast
        # A whole copy of a sharded model, the model itself where it is whole.
        self.whole_model: Callable[[nn.Module], nn.Module] = lambda model: model

    def setup_ema(self, decay: float = 0.9998, use_warmup: bool = False, **kwargs: Any) -> ModelEma:
        """Also average the weights; to be called before `prepare`."""
        self.trainable_module_ema = ModelEma(self.trained, decay, use_warmup=use_warmup, **kwargs)
        return self.trainable_module_ema

    def prepare(
            self,
            accelerator: Accelerator,
            optimizer: torch.optim.Optimizer,
            backend: str | None = None,
    ) -> torch.optim.Optimizer:
        """Set the student up for the processes of a launch: as it is, under DDP, or sharded by FSDP2.

        Args:
            accelerator: Of all processes.
            optimizer: Of the parameters of `trained`.
            backend: Of torch.compile, to compile the student too.

        Returns:
            The optimiser as accelerate steps it.

        Raises:
            InputError: The student cannot be sharded.
        """
        self.trainable_module, optimizer, self.whole_model = prepare_student(
            accelerator, self.trained, optimizer, self.get_trainable_module(ema=True), self.student)
        if backend:
            self.compile(backend)
        return optimizer

    def compile(self, backend: str = 'inductor', mode: str | None = None, **kwargs: Any) -> nn.Module:
        """Compile the student as it is called in training."""
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **kwargs)
        return self.trainable_module

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The bare model that is evaluated and exported: the student, or the average of its weights."""
        if module is not None:
            return module
        if not ema:
            return self.student
        if not self.has_ema():
            return None
        average = self.trainable_module_ema.module
        return average.student if self.has_features else average

    def models(self) -> dict[str, nn.Module]:
        """The sets of weights that a run evaluates and exports: `student`, and `ema` where they are averaged."""
        return {'student': self.student} | ({'ema': self.get_eval_model(ema=True)} if self.has_ema() else {})

    def weights(self) -> dict[str, nn.Module]:
        """Everything that is trained, as a checkpoint names it: timm, too, looks for a model under `model`."""
        found = {{'student': 'model'}.get(name, name): model for name, model in self.models().items()}
        if self.has_features:
            found['projector'] = self.trained.projection
            if self.has_ema():
                found['projector_ema'] = self.trainable_module_ema.module.projection
        return found

    def train(self, mode: bool = True) -> 'SparseLogitTask':
        """Put the student, and not the average of its weights, in training mode."""
        self.training = mode
        self.trainable_module.train(mode)
        if mode and self.freeze_bn:
            freeze_batch_norm(self.student)
        return self

    def forward(self, input: torch.Tensor, target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses of a batch.

        Args:
            input: Views [B, 3, H, W], uint8, or as the student takes them where nothing normalises them here.
            target: The batch of a `SparseLogitDataset`: `record` uint8 [B, width] with a codec; `label` int64 [B] where
                alpha is below 1, and `label2` int64 [B] with `lam` float [B] where views are mixed in pairs.

        Returns:
            `loss`, and its parts before they are weighted, `label_loss`, `distill_loss` and where there are features
            `feature_loss`, all scalars; `output`, the logits [B, C], or pooled features of a student without classes.
        """
        views = self.normalize(input.to(self.device, non_blocking=True))
        target = {name: target[name].to(self.device, non_blocking=True) for name in TARGETS if name in target}
        labels = target.get('label')
        if self.mixup is not None:
            views, labels = self.mixup(views, labels)
        if self.channels_last:
            views = views.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            logits = self.trainable_module(views)
        if self.has_features:
            logits, vectors = logits
        label_loss = distill_loss = torch.zeros((), device=self.device)
        if self.alpha < 1 and 'lam' in target:
            mixed = labels, target['label2'], target['lam']
            if isinstance(self.label_loss, BinaryCrossEntropy):
                label_loss = self.label_loss(
                    logits.float(), mixed_target(*mixed, logits.shape[1], self.smoothing))
            else:
                label_loss = mixed_cross_entropy(logits.float(), *mixed, self.smoothing)
        elif self.alpha < 1:
            label_loss = self.label_loss(logits.float(), labels)
        if self.codec is not None:
            targets = self.codec.decode(target['record'])
            if self.has_features:
                targets, features = split_targets(targets)
            if targets:
                distill_loss = self.distill_loss(logits, targets, labels)
        loss = (1 - self.alpha) * label_loss + self.alpha * self.distill_loss.temperature ** 2 * distill_loss
        losses = {'label_loss': label_loss, 'distill_loss': distill_loss}
        if self.has_features:
            losses['feature_loss'] = feature_loss(vectors, features, self.feature_kind)
            loss = loss + self.feature_weight * losses['feature_loss']
        return {'loss': loss, **losses, 'output': logits}


def split_targets(
        targets: SparseTargets | FeatureTargets | Sequence[SparseTargets | FeatureTargets],
) -> tuple[list[SparseTargets], FeatureTargets | None]:
    """What stores that are read together hold of the same views: class targets of each teacher, and features."""
    parts = targets if isinstance(targets, Sequence) else [targets]
    features = [part for part in parts if isinstance(part, FeatureTargets)]
    return [part for part in parts if isinstance(part, SparseTargets)], features[0] if features else None
