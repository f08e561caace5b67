"""The loss on sparse targets as two Triton kernels, for logits on a GPU.

The same function as the one in `sparse`, which stays the reference. Besides the mean over the batch there is one kernel
on the way forward and one on the way back: what a small kernel costs is its launch. The teacher's probabilities are
softened in them, the logits are read once each way, and nothing of the size of the logits is written but the gradient.
"""

import torch
import triton
import triton.language as tl

__all__ = ['MAX_K', 'SparseSoftTargetCrossEntropy']

MAX_K = 4096
FORWARD_BLOCK, BACKWARD_BLOCK = 8192, 4096
ELEMENTS_PER_THREAD = 16


@triton.jit
def _forward_kernel(
        logits_ptr, ids_ptr, log_probs_ptr, log_rest_ptr, loss_ptr, norms_ptr,
        row_stride, num_classes, k, inverse_temperature, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The loss of a row, by one program, and the log-sum-exps of student and teacher, both at the temperature."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    lowest = -1e30  # unlike infinity it can be subtracted from itself
    # A row may be shifted; relative to its own first logit, the sum of all of them cancels no digits.
    origin = tl.load(logits_ptr).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], lowest, tl.float32)
    norm = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_classes, BLOCK):
        inside = first + columns < num_classes
        scaled = tl.load(logits_ptr + first + columns, mask=inside, other=0.).to(tl.float32)
        scaled = tl.where(inside, (scaled - origin) * inverse_temperature, lowest)
        total += tl.where(inside, scaled, 0.)
        higher = tl.maximum(highest, scaled)
        norm = norm * tl.exp(highest - higher) + tl.exp(scaled - higher)
        highest = higher
    top = tl.max(highest, axis=0)
    log_norm = top + tl.log(tl.sum(norm * tl.exp(highest - top), axis=0))

    entries = tl.arange(0, BLOCK_K)
    listed = entries < k
    ids = tl.load(ids_ptr + row * k + entries, mask=listed, other=0)
    scaled = (tl.load(logits_ptr + ids, mask=listed, other=0.).to(tl.float32) - origin) * inverse_temperature
    log_probs = tl.load(log_probs_ptr + row * k + entries, mask=listed, other=0.).to(tl.float32) * inverse_temperature
    log_probs = tl.where(listed, log_probs, lowest)
    top = tl.max(log_probs, axis=0)
    if log_rest_ptr is None:
        target_norm = top + tl.log(tl.sum(tl.exp(log_probs - top), axis=0))
        loss = tl.sum(tl.where(listed, tl.exp(log_probs - target_norm) * (log_norm - scaled), 0.), axis=0)
    else:
        num_rest = (num_classes - k).to(tl.float32)
        log_rest = (tl.load(log_rest_ptr + row).to(tl.float32) - tl.log(num_rest)) * inverse_temperature
        top = tl.maximum(top, log_rest)
        norm_of_both = tl.sum(tl.exp(log_probs - top), axis=0) + num_rest * tl.exp(log_rest - top)
        target_norm = top + tl.log(norm_of_both)
        rest = tl.exp(log_rest - target_norm)
        delta = tl.where(listed, tl.exp(log_probs - target_norm) - rest, 0.)
        loss = rest * (num_classes * log_norm - tl.sum(total, axis=0)) + tl.sum(delta * (log_norm - scaled), axis=0)
    tl.store(loss_ptr + row, loss)
    tl.store(norms_ptr + 2 * row, log_norm)
    tl.store(norms_ptr + 2 * row + 1, target_norm)


@triton.jit
def _backward_kernel(
        logits_ptr, ids_ptr, log_probs_ptr, log_rest_ptr, norms_ptr, grad_output_ptr, grad_ptr,
        row_stride, grad_output_stride, num_classes, k, inverse_temperature, scale,
        BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The gradient of one block of one row, by one program."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    logits_ptr += row * row_stride
    grad_ptr += row * num_classes
    origin = tl.load(logits_ptr).to(tl.float32)
    log_norm, target_norm = tl.load(norms_ptr + 2 * row), tl.load(norms_ptr + 2 * row + 1)
    scale *= tl.load(grad_output_ptr + row * grad_output_stride)
    rest = 0.
    if log_rest_ptr is not None:
        log_rest = tl.load(log_rest_ptr + row).to(tl.float32) - tl.log((num_classes - k).to(tl.float32))
        rest = tl.exp(log_rest * inverse_temperature - target_norm)
    columns = first + tl.arange(0, BLOCK)
    inside = columns < num_classes
    scaled = (tl.load(logits_ptr + columns, mask=inside, other=0.).to(tl.float32) - origin) * inverse_temperature
    grad = (tl.exp(scaled - log_norm) - rest) * scale
    tl.store(grad_ptr + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)
    # The listed classes once more, in float32 up to the end: there the difference of two near numbers is what counts.
    tl.debug_barrier()
    entries = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * k + entries, mask=entries < k, other=-1)
    in_block = (ids >= first) & (ids < first + BLOCK)
    log_probs = tl.load(log_probs_ptr + row * k + entries, mask=in_block, other=0.).to(tl.float32)
    scaled = (tl.load(logits_ptr + ids, mask=in_block, other=0.).to(tl.float32) - origin) * inverse_temperature
    grad = (tl.exp(scaled - log_norm) - tl.exp(log_probs * inverse_temperature - target_norm)) * scale
    tl.store(grad_ptr + ids, grad.to(grad_ptr.dtype.element_ty), mask=in_block)


def _sizes(num_classes: int, k: int, largest_block: int) -> dict[str, int]:
    block = min(largest_block, triton.next_power_of_2(num_classes))
    num_warps = max(1, block // ELEMENTS_PER_THREAD // 32)
    return dict(BLOCK=block, BLOCK_K=triton.next_power_of_2(k), num_warps=num_warps)


class SparseSoftTargetCrossEntropy(torch.autograd.Function):
    """The loss of logits [B, C] of float32 or less to targets of up to `MAX_K` entries; see `sparse`."""

    @staticmethod
    def forward(ctx, logits, ids, log_probs, log_rest, temperature, reduction):
        ids, log_probs = ids.contiguous(), log_probs.contiguous()
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        (batch, num_classes), k = logits.shape, ids.shape[1]
        loss = torch.empty(batch, dtype=torch.float32, device=logits.device)
        norms = torch.empty(batch, 2, dtype=torch.float32, device=logits.device)
        _forward_kernel[(batch,)](
            logits, ids, log_probs, log_rest, loss, norms, logits.stride(0), num_classes, k, 1 / temperature,
            **_sizes(num_classes, k, FORWARD_BLOCK))
        ctx.save_for_backward(logits, ids, log_probs, log_rest, norms)
        ctx.temperature, ctx.reduction = temperature, reduction
        return loss if reduction == 'none' else loss.mean() if reduction == 'mean' else loss.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        logits, ids, log_probs, log_rest, norms = ctx.saved_tensors
        (batch, num_classes), k = logits.shape, ids.shape[1]
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        sizes = _sizes(num_classes, k, BACKWARD_BLOCK)
        scale = 1 / ctx.temperature / (batch if ctx.reduction == 'mean' else 1)
        _backward_kernel[(batch, -(-num_classes // sizes['BLOCK']))](
            logits, ids, log_probs, log_rest, norms, grad_output, grad, logits.stride(0),
            grad_output.stride(0) if grad_output.ndim else 0, num_classes, k, 1 / ctx.temperature, scale, **sizes)
        return grad, None, None, None, None, None
