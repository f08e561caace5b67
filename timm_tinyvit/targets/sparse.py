"""Sparse targets, and the soft-target cross-entropy computed on them without the dense target.

The top k of a teacher's prediction are kept as class ids with their log-probabilities and the log of the remaining
mass. The loss here equals the dense soft-target cross-entropy of the paper (TinyViT, ECCV 2022, arXiv 2207.10666) to
float32 rounding, forward and backward, at every temperature, and needs memory for the student's logits and their
gradient only. This module knows torch alone: no files, no images.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

__all__ = ['SparseTargets', 'check_logits', 'ensemble_loss', 'sparse_soft_target_cross_entropy']

CACHED_LOGITS = 1 << 18  # 1 MiB


def check_logits(logits: torch.Tensor) -> None:
    """Raise a ValueError if teacher logits are not [B, C], or hold NaN or infinity."""
    if logits.ndim != 2:
        raise ValueError(f'teacher logits must be [B, C], but are {list(logits.shape)}')
    bad_rows = (~torch.isfinite(logits)).any(dim=1).sum().item()
    if bad_rows:
        raise ValueError(
            f'{bad_rows} of {len(logits)} rows of teacher logits hold NaN or infinity; '
            f'check the teacher, or run it in float32')


@dataclass(frozen=True)
class SparseTargets:
    """Teacher probabilities of B views, k of C classes each, at temperature 1; the other classes have equal shares.

    Attributes:
        ids: Class ids, int64 [B, k], all of a row different.
        log_probs: Natural-log probabilities of these classes, float [B, k].
        log_rest: Log of the probability mass of all other classes, float [B]; None where k = C leaves no other class.
        num_classes: C.
    """
    ids: torch.Tensor
    log_probs: torch.Tensor
    log_rest: torch.Tensor | None
    num_classes: int

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.log_probs.shape:
            raise ValueError(
                f'ids and log_probs must both be [B, k], but are {list(self.ids.shape)} and '
                f'{list(self.log_probs.shape)}')
        if self.k > self.num_classes:
            raise ValueError(f'k = {self.k} is more than the {self.num_classes} classes; choose a smaller k')
        shape = None if self.log_rest is None else list(self.log_rest.shape)
        expected = [len(self)] if self.k < self.num_classes else None
        if shape != expected:
            raise ValueError(f'log_rest is {shape}, but must be {expected} for {self.k} of {self.num_classes} classes')

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def k(self) -> int:
        return self.ids.shape[1]

    @classmethod
    def from_logits(cls, logits: torch.Tensor, k: int) -> 'SparseTargets':
        """Keep the k most probable classes of each row, most probable first.

        Args:
            logits: Teacher logits [B, C] of any float type; probabilities are computed in float32 (float64 stays).
            k: Number of classes to keep, 1 to C.

        Returns:
            Targets on the device of `logits`.

        Raises:
            ValueError: The logits are not [B, C], hold NaN or infinity, or k is out of range.
        """
        check_logits(logits)
        num_classes = logits.shape[1]
        if not 1 <= k <= num_classes:
            raise ValueError(f'k = {k} does not fit {num_classes} classes; choose k from 1 to {num_classes}')
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)
        top, ids = log_probs.topk(k, dim=1)
        log_rest = None
        if k < num_classes:
            # From the other classes themselves: 1 - sum(top) has no digits left where they have nearly all mass.
            log_rest = log_probs.scatter(1, ids, -math.inf).logsumexp(dim=1)
        return cls(ids, top, log_rest, num_classes)

    def to(self, device: torch.device, non_blocking: bool = False) -> 'SparseTargets':
        """The same targets on another device."""
        move = dict(device=device, non_blocking=non_blocking)
        return replace(
            self,
            ids=self.ids.to(**move),
            log_probs=self.log_probs.to(**move),
            log_rest=None if self.log_rest is None else self.log_rest.to(**move),
        )

    def densify(self, temperature: float = 1.0) -> torch.Tensor:
        """The dense target [B, C] that these targets stand for, at a temperature."""
        delta, rest = _split(self.log_probs, self.log_rest, self.num_classes, _check_temperature(temperature))
        return rest[:, None].expand(-1, self.num_classes).scatter_add(1, self.ids, delta)


def _check_temperature(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f'the temperature is {temperature}; it must be above 0')
    return float(temperature)


def _split(
        log_probs: torch.Tensor,
        log_rest: torch.Tensor | None,
        num_classes: int,
        temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The dense target at a temperature as a sum: `delta` [B, k] at the listed classes, and `rest` [B] everywhere."""
    scaled = log_probs / temperature  # [B, k]
    if log_rest is None:
        return scaled.softmax(dim=1), torch.zeros_like(scaled[:, 0])
    log_num_rest = math.log(num_classes - log_probs.shape[1])
    rest = (log_rest - log_num_rest) / temperature  # [B], of each other class
    log_norm = torch.cat([scaled, (rest + log_num_rest)[:, None]], dim=1).logsumexp(dim=1)
    rest = (rest - log_norm).exp()
    return (scaled - log_norm[:, None]).exp() - rest[:, None], rest


def _passes(logits: torch.Tensor) -> Iterator[slice]:
    """Rows to work on at a time: on a CPU as many as stay in its cache, which more than doubles the speed."""
    rows = len(logits)
    if logits.device.type == 'cpu':
        rows = max(1, CACHED_LOGITS // logits.shape[1])
    return (slice(first, first + rows) for first in range(0, len(logits), max(1, rows)))


def _scaled(logits: torch.Tensor, temperature: float, dtype: torch.dtype) -> torch.Tensor:
    logits = logits.to(dtype)
    return logits if temperature == 1 else logits / temperature


class _SparseSoftTargetCrossEntropy(torch.autograd.Function):
    """-sum_c t_c log softmax(z / T)_c of every row, where t is `rest` everywhere plus `delta` at `ids`.

    The gradient is made on the way forward, from the log-probabilities that the loss has just left in the cache. Where
    the loss is scaled, the way back takes as much memory again.
    """

    @staticmethod
    def forward(ctx, logits, ids, log_probs, log_rest, temperature, reduction):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        delta, rest = _split(log_probs, log_rest, logits.shape[1], temperature)
        delta, rest = delta.to(dtype), rest.to(dtype)
        loss = torch.empty_like(rest)
        grad = None
        if ctx.needs_input_grad[0]:  # float16 has no digits for it before the loss scale, which comes with the backward
            grad = torch.empty_like(logits, dtype=dtype if logits.dtype == torch.float16 else logits.dtype)
        scale = 1 / temperature / (max(1, len(logits)) if reduction == 'mean' else 1)
        scaled_delta, scaled_rest = -scale * delta, -scale * rest[:, None]
        for part in _passes(logits):
            out = grad[part] if grad is not None and grad.dtype == dtype else None
            log_probs = torch.log_softmax(_scaled(logits[part], temperature, dtype), dim=1, out=out)  # [b, C]
            listed = (delta[part] * log_probs.gather(1, ids[part])).sum(dim=1)
            loss[part] = -rest[part] * log_probs.sum(dim=1) - listed
            if grad is not None:
                probs = log_probs.exp_()
                torch.add(scaled_rest[part], probs, alpha=scale, out=probs)
                probs.scatter_add_(1, ids[part], scaled_delta[part])
                if out is None:
                    grad[part] = probs
        ctx.save_for_backward(grad)
        ctx.dtype = logits.dtype
        return loss if reduction == 'none' else loss.mean() if reduction == 'mean' else loss.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        grad, = ctx.saved_tensors
        if grad_output.ndim:
            grad_output = grad_output[:, None]
        elif grad_output.device.type == 'cpu' and not torch.compiler.is_compiling() and grad_output == 1:
            return grad.to(ctx.dtype), None, None, None, None, None  # a look at it waits for any other device
        return (grad * grad_output).to(ctx.dtype), None, None, None, None, None


def _function(logits: torch.Tensor, k: int) -> type[torch.autograd.Function]:
    """The implementation for these logits: the kernels on a GPU, where Triton is there."""
    if logits.device.type == 'cuda' and logits.dtype != torch.float64 and len(logits):
        try:
            from .sparse_triton import MAX_K, SparseSoftTargetCrossEntropy
        except ImportError:
            return _SparseSoftTargetCrossEntropy
        if k <= MAX_K:
            return SparseSoftTargetCrossEntropy
    return _SparseSoftTargetCrossEntropy


def sparse_soft_target_cross_entropy(
        logits: torch.Tensor,
        targets: SparseTargets,
        temperature: float = 1.0,
        reduction: str = 'mean',
) -> torch.Tensor:
    """Soft-target cross-entropy of student logits to sparse teacher targets, both at a temperature.

    Equal to `-(targets.densify(T) * log_softmax(logits / T)).sum(1)`; multiply by T squared to keep the size of the
    gradients (Hinton et al., arXiv 1503.02531). Float16 and bfloat16 logits are computed in float32.

    Args:
        logits: Student logits [B, C].
        targets: Teacher targets of the same B views, on the same device.
        temperature: Softens teacher and student alike, above 0.
        reduction: `mean` or `sum` over the batch, or `none` for [B].

    Raises:
        ValueError: Shapes do not match, or an argument is out of range.
    """
    if logits.shape != (len(targets), targets.num_classes):
        raise ValueError(
            f'student logits are {list(logits.shape)}, but the targets are for [{len(targets)}, '
            f'{targets.num_classes}]; give the student the number of classes of its store')
    if reduction not in ('mean', 'sum', 'none'):
        raise ValueError(f'reduction is {reduction!r}; use mean, sum or none')
    return _function(logits, targets.k).apply(
        logits, targets.ids, targets.log_probs, targets.log_rest, _check_temperature(temperature), reduction)


def ensemble_loss(
        logits: torch.Tensor,
        targets: SparseTargets | Sequence[SparseTargets],
        temperature: float = 1.0,
) -> torch.Tensor:
    """Soft-target cross-entropy to the average prediction of several teachers, or to that of one.

    Args:
        logits: Student logits [B, C].
        targets: Targets of the same B views, of one teacher or of each.
        temperature: Softens the student and each teacher.

    Returns:
        The mean over the batch, a scalar.
    """
    if isinstance(targets, SparseTargets):
        return sparse_soft_target_cross_entropy(logits, targets, temperature)
    return sum(sparse_soft_target_cross_entropy(logits, part, temperature) for part in targets) / len(targets)
