"""Losses between student logits and sparse targets beside the paper's cross-entropy, all without the dense target.

Each equals its dense formula on `targets.densify()` to float rounding, and needs memory for a few tensors of the size
of the student's logits. This module knows torch alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .sparse import SparseTargets, ensemble_loss, sparse_soft_target_cross_entropy

__all__ = ['DISTILL_LOSSES', 'REMAINDERS', 'DistillLoss']

# Least standard deviation, or product of two of them.
EPSILON = 1e-8


def reverse_kl(logits: torch.Tensor, targets: SparseTargets, labels: torch.Tensor | None = None) -> torch.Tensor:
    """KL divergence of the teacher from the student, `sum(q * log(q / p))`: the student goes where the teacher is sure.

    As in MiniLLM (arXiv 2306.08543), here over classes.

    Args:
        logits: Student logits [B, C].
        targets: Of the same B views.
        labels: Not used.

    Returns:
        In nats, the mean over the batch.
    """
    log_probs = logits.log_softmax(dim=1)
    probs = log_probs.exp()
    # log(p) is that of the other classes everywhere, and something more at the listed ones.
    rest = _log_rest_of_each(targets)
    listed = probs.gather(1, targets.ids) * (targets.log_probs - rest[:, None])
    return ((probs * log_probs).sum(dim=1) - listed.sum(dim=1) - rest).mean()


def decoupled(logits: torch.Tensor, targets: SparseTargets, labels: torch.Tensor, beta: float = 8.) -> torch.Tensor:
    """Decoupled knowledge distillation (DKD, CVPR 2022, arXiv 2203.08679).

    The KL divergence splits into that of the label's class against all others, and that among the others, which has a
    weight of its own here.

    Args:
        logits: Student logits [B, C].
        targets: Of the same B views.
        labels: Classes, int64 [B].
        beta: Weight of the part among the other classes; the paper's for CIFAR-100.

    Returns:
        In nats, the mean over the batch.
    """
    labels = labels[:, None]
    log_probs = logits.log_softmax(dim=1)
    is_label = targets.ids == labels
    rest = _log_rest_of_each(targets)
    # Of the teacher: the label's class, all others together, and each of the others.
    is_listed = is_label.any(dim=1)
    others = targets.log_probs.masked_fill(is_label, -math.inf)
    num_rest = (targets.num_classes - targets.k - (~is_listed).to(rest.dtype)).clamp(min=0)
    teacher_label = torch.where(is_listed, torch.where(is_label, targets.log_probs, 0.).sum(dim=1), rest)
    teacher_other = torch.cat([others, (rest + num_rest.log())[:, None]], dim=1).logsumexp(dim=1)
    student_label = log_probs.gather(1, labels)[:, 0]
    student_other = logits.scatter(1, labels, -math.inf).logsumexp(dim=1) - logits.logsumexp(dim=1)
    target_part = sum(
        (teacher.exp() * (teacher - student))
        for teacher, student in ((teacher_label, student_label), (teacher_other, student_other)))
    listed_gap = others - teacher_other[:, None] - log_probs.gather(1, targets.ids) + student_other[:, None]
    listed = torch.where(is_label, 0., (others - teacher_other[:, None]).exp() * listed_gap.masked_fill(is_label, 0.))
    rest = rest - teacher_other
    # The others that are not listed: all classes, less the listed ones, less the label's.
    unlisted = log_probs.sum(dim=1) - log_probs.gather(1, targets.ids).sum(dim=1) - torch.where(
        is_listed, 0., student_label)
    tail = torch.where(
        num_rest > 0, rest.exp() * (num_rest * (rest.masked_fill(num_rest == 0, 0.) + student_other) - unlisted), 0.)
    return (target_part + beta * (listed.sum(dim=1) + tail)).mean()


def relational(logits: torch.Tensor, targets: SparseTargets, labels: torch.Tensor | None = None) -> torch.Tensor:
    """DIST (NeurIPS 2022, arXiv 2205.10536): one minus Pearson's correlation of probabilities, twice.

    Of student and teacher over the classes of each view, and over the views of each class; the mean of each, summed.

    Args:
        logits: Student logits [B, C].
        targets: Of the same B views; those of one process make the batch.
        labels: Not used.
    """
    probs = logits.softmax(dim=1)
    num_views, num_classes = probs.shape
    rest = _log_rest_of_each(targets).exp() * (targets.k < num_classes)
    # The teacher's probabilities are `rest` everywhere, and `delta` more at the listed classes.
    delta = targets.log_probs.exp() - rest[:, None]

    student = probs - probs.mean(dim=1, keepdim=True)
    covariance = (student.gather(1, targets.ids) * delta).sum(dim=1)
    mean = 1 / num_classes
    variance = (delta + rest[:, None] - mean).square().sum(dim=1) + (num_classes - targets.k) * (rest - mean).square()
    inter = _correlation(covariance, student.square().sum(dim=1), variance)

    student = probs - probs.mean(dim=0)
    rest = rest - rest.mean()

    def over_views(everywhere: torch.Tensor, listed: torch.Tensor) -> torch.Tensor:
        """Sum over the views [C] of what is `listed` [B, k] at the listed classes beside a sum `everywhere` [C]."""
        return everywhere.scatter_add(0, targets.ids.flatten(), listed.flatten())

    covariance = over_views((student * rest[:, None]).sum(dim=0), student.gather(1, targets.ids) * delta)
    total = over_views(rest.new_zeros(num_classes), delta)
    squares = over_views(rest.square().sum().expand(num_classes), delta * (delta + 2 * rest[:, None]))
    intra = _correlation(covariance, student.square().sum(dim=0), squares - total.square() / num_views)
    return 2 - inter.mean() - intra.mean()


def _correlation(covariance: torch.Tensor, variance: torch.Tensor, other_variance: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation; 0 where one of the two never changes."""
    return covariance / (variance * other_variance).clamp(min=EPSILON ** 2).sqrt()


def _log_rest_of_each(targets: SparseTargets) -> torch.Tensor:
    """Log-probability of each class that is not listed [B]; zeros where all are."""
    if targets.log_rest is None:
        return torch.zeros_like(targets.log_probs[:, 0])
    return targets.log_rest - math.log(targets.num_classes - targets.k)


def _spread(targets: SparseTargets) -> torch.Tensor:
    """Standard deviation over the classes of the log-probabilities, and so of the logits, of each row [B]."""
    rest = _log_rest_of_each(targets)
    num_rest = targets.num_classes - targets.k
    mean = (targets.log_probs.sum(dim=1) + num_rest * rest) / targets.num_classes
    squares = (targets.log_probs - mean[:, None]).square().sum(dim=1) + num_rest * (rest - mean).square()
    return (squares / (targets.num_classes - 1)).sqrt()


def _with_ghost(logits: torch.Tensor, targets: SparseTargets) -> tuple[torch.Tensor, SparseTargets]:
    """Logits [B, k + 1] and their targets, where all classes that are not listed are one."""
    if targets.log_rest is None:
        return logits, targets
    outside = logits.scatter(1, targets.ids, -math.inf).logsumexp(dim=1)
    num_classes = targets.k + 1
    return torch.cat([logits.gather(1, targets.ids), outside[:, None]], dim=1), SparseTargets(
        torch.arange(num_classes, device=logits.device).expand(len(targets), -1),
        torch.cat([targets.log_probs, targets.log_rest[:, None]], dim=1), None, num_classes)


def _cross_entropy(logits: torch.Tensor, targets: SparseTargets, labels: torch.Tensor | None = None) -> torch.Tensor:
    return sparse_soft_target_cross_entropy(logits, targets)


DISTILL_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    'cross-entropy': _cross_entropy, 'reverse-kl': reverse_kl, 'dkd': decoupled, 'dist': relational}
REMAINDERS = ('share', 'ghost')


@dataclass(frozen=True)
class DistillLoss:
    """A loss of student logits and sparse targets, as `SparseLogitTask` takes it.

    Attributes:
        name: One of `DISTILL_LOSSES`.
        temperature: Softens teacher and student.
        standardize: Divide the logits of both by their standard deviation over the classes first (CVPR 2024,
            arXiv 2403.01047); the teacher's is that of `targets.densify()`, which has all classes outside the list
            alike.
        remainder: `share`: the mass that is not listed has equal parts on all other classes. `ghost`: it is compared
            with the student's mass there as that of one class.
    """
    name: str = 'cross-entropy'
    temperature: float = 1.
    standardize: bool = False
    remainder: str = 'share'

    @property
    def needs_labels(self) -> bool:
        """Whether each view must have one label."""
        return self.name == 'dkd'

    def __call__(
            self,
            logits: torch.Tensor,
            targets: SparseTargets | Sequence[SparseTargets],
            labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mean over the batch, a scalar; of several teachers the mean over them.

        Args:
            logits: Student logits [B, C].
            targets: Targets of the same B views, of one teacher or of each.
            labels: Classes, int64 [B], where the loss needs them.
        """
        if (self.name, self.standardize, self.remainder) == ('cross-entropy', False, 'share'):
            return ensemble_loss(logits, targets, self.temperature)
        if not isinstance(targets, SparseTargets):
            return sum(self(logits, part, labels) for part in targets) / len(targets)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.standardize:
            logits = logits / (logits.std(dim=1, keepdim=True) * self.temperature).clamp(min=EPSILON)
            targets = targets.soften(_spread(targets).clamp(min=EPSILON))
        targets = targets.soften(self.temperature)
        if self.remainder == 'ghost':
            logits, targets = _with_ghost(logits, targets)
        return DISTILL_LOSSES[self.name](logits, targets, labels)
