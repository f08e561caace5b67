"""The loss on sparse targets as two Triton kernels, for logits on a GPU.

The same function as the one in `sparse`, which stays the reference: the logits are read once on the way forward and
once on the way back, and nothing but the gradient is written. One program works on one row, block by block.
"""

import torch
import triton
import triton.language as tl

__all__ = ['MAX_K', 'SparseSoftTargetCrossEntropy']

BLOCK = 2048
MAX_K = 4096
LOWEST = tl.constexpr(-1e30)  # unlike infinity it can be subtracted from itself


@triton.jit
def _forward_kernel(
        logits_ptr, ids_ptr, delta_ptr, rest_ptr, loss_ptr, log_norm_ptr,
        row_stride, num_classes, k, inverse_temperature, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    # A row may be shifted; relative to its own first logit, the sum of all of them cancels no digits.
    origin = tl.load(logits_ptr).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], LOWEST, tl.float32)
    norm = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_classes, BLOCK):
        inside = first + columns < num_classes
        scaled = tl.load(logits_ptr + first + columns, mask=inside, other=0.).to(tl.float32)
        scaled = (scaled - origin) * inverse_temperature
        total += tl.where(inside, scaled, 0.)
        higher = tl.maximum(highest, tl.where(inside, scaled, LOWEST))
        norm = norm * tl.exp(highest - higher) + tl.where(inside, tl.exp(scaled - higher), 0.)
        highest = higher
    top = tl.max(highest, axis=0)
    log_norm = top + tl.log(tl.sum(norm * tl.exp(highest - top), axis=0))
    rest = tl.load(rest_ptr + row)
    loss = rest * (num_classes * log_norm - tl.sum(total, axis=0))
    entries = tl.arange(0, BLOCK_K)
    listed = entries < k
    ids = tl.load(ids_ptr + row * k + entries, mask=listed, other=0)
    delta = tl.load(delta_ptr + row * k + entries, mask=listed, other=0.)
    scaled = (tl.load(logits_ptr + ids, mask=listed, other=0.).to(tl.float32) - origin) * inverse_temperature
    loss += tl.sum(tl.where(listed, delta * (log_norm - scaled), 0.), axis=0)
    tl.store(loss_ptr + row, loss)
    tl.store(log_norm_ptr + row, log_norm)


@triton.jit
def _backward_kernel(
        logits_ptr, ids_ptr, delta_ptr, rest_ptr, mass_ptr, log_norm_ptr, grad_output_ptr, grad_ptr,
        row_stride, num_classes, k, inverse_temperature, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    grad_ptr += row * num_classes
    origin = tl.load(logits_ptr).to(tl.float32)
    log_norm = tl.load(log_norm_ptr + row)
    mass, rest = tl.load(mass_ptr + row), tl.load(rest_ptr + row)
    scale = tl.load(grad_output_ptr + row) * inverse_temperature
    columns = tl.arange(0, BLOCK)
    for first in range(0, num_classes, BLOCK):
        inside = first + columns < num_classes
        scaled = (tl.load(logits_ptr + first + columns, mask=inside, other=0.).to(tl.float32) - origin)
        probs = tl.exp(scaled * inverse_temperature - log_norm)
        grad = (probs * mass - rest) * scale
        tl.store(grad_ptr + first + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)
    # The listed classes once more, in float32 up to the end: there the difference of two near numbers is what counts.
    tl.debug_barrier()
    entries = tl.arange(0, BLOCK_K)
    delta = tl.load(delta_ptr + row * k + entries, mask=entries < k, other=0.)
    # Padding has no delta, and may repeat a class.
    listed = (entries < k) & (delta != 0.)
    ids = tl.load(ids_ptr + row * k + entries, mask=listed, other=0)
    scaled = (tl.load(logits_ptr + ids, mask=listed, other=0.).to(tl.float32) - origin)
    probs = tl.exp(scaled * inverse_temperature - log_norm)
    grad = (probs * mass - rest - delta) * scale
    tl.store(grad_ptr + ids, grad.to(grad_ptr.dtype.element_ty), mask=listed)


class SparseSoftTargetCrossEntropy(torch.autograd.Function):
    """Rows of -sum_c t_c log softmax(z / T)_c, where t is `rest` everywhere plus `delta` at `ids`.

    Takes logits [B, C] of any float type with contiguous rows, distinct ids int64 [B, k], delta float32 [B, k] and
    rest float32 [B]; gives float32 [B].
    """

    @staticmethod
    def forward(ctx, logits, ids, delta, rest, temperature):
        ids, delta, rest = ids.contiguous(), delta.contiguous(), rest.contiguous()
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        loss, log_norm = torch.empty_like(rest), torch.empty_like(rest)
        sizes = dict(BLOCK=BLOCK, BLOCK_K=triton.next_power_of_2(ids.shape[1]), num_warps=8)
        _forward_kernel[(len(logits),)](
            logits, ids, delta, rest, loss, log_norm, logits.stride(0), logits.shape[1], ids.shape[1],
            1 / temperature, **sizes)
        ctx.save_for_backward(logits, ids, delta, rest, log_norm)
        ctx.temperature, ctx.sizes = temperature, sizes
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        logits, ids, delta, rest, log_norm = ctx.saved_tensors
        mass = delta.sum(dim=1) + rest * logits.shape[1]
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        _backward_kernel[(len(logits),)](
            logits, ids, delta, rest, mass, log_norm, grad_output.contiguous(), grad, logits.stride(0),
            logits.shape[1], ids.shape[1], 1 / ctx.temperature, **ctx.sizes)
        return grad, None, None, None, None
