"""Prints as JSON how far the Triton kernels of the loss are from the reference, case by case: loss and gradient.

A program of its own, as Triton decides when it is imported whether it interprets (TRITON_INTERPRET=1).
"""

import json

import torch

from timm_tinyvit.targets.sparse import SparseTargets, _SparseSoftTargetCrossEntropy
from timm_tinyvit.targets.sparse_triton import SparseSoftTargetCrossEntropy

CASES = [
    # rows, classes, k, temperature, reduction, type of the logits
    (3, 5000, 7, 1., 'none', torch.float32), (3, 50, 50, 3., 'none', torch.float32),
    (3, 2, 1, 1., 'none', torch.float32), (1, 1, 1, 1., 'mean', torch.float32),
    (3, 4096, 10, 2., 'sum', torch.bfloat16), (3, 4097, 100, 4., 'mean', torch.float16),
    (2, 21841, 100, 1., 'mean', torch.float32),
]


def differences(logits: torch.Tensor, targets: SparseTargets, temperature: float, reduction: str) -> list[float]:
    """The largest difference of the losses, and of the gradients as a share of the largest."""
    found = []
    for function in (SparseSoftTargetCrossEntropy, _SparseSoftTargetCrossEntropy):
        leaf = logits.clone().requires_grad_()
        # The reference gathers by them, which torch 2.7 does by ids of 64 bits only.
        ids = targets.ids.long() if function is _SparseSoftTargetCrossEntropy else targets.ids
        loss = function.apply(leaf, ids, targets.log_probs, targets.log_rest, temperature, reduction)
        upstream = torch.linspace(-1, 2, len(logits)) if reduction == 'none' else torch.tensor(0.3)
        found.append((loss, torch.autograd.grad(loss, leaf, upstream)[0].float()))
    (loss, grad), (expected, expected_grad) = found
    scale = expected_grad.abs().max().clamp(min=1e-6)
    return [(loss - expected).abs().max().item(), ((grad - expected_grad).abs().max() / scale).item()]


def main() -> None:
    torch.manual_seed(0)
    found = {}
    for rows, num_classes, k, temperature, reduction, dtype in CASES:
        targets = SparseTargets.from_logits(torch.randn(rows, num_classes) * 3, k)
        logits = (torch.randn(rows, num_classes) * 2 + 100).to(dtype)
        name = f'{rows} x {num_classes}, k = {k}, temperature {temperature}, {reduction}, {dtype}'
        found[name] = differences(logits, targets, temperature, reduction)
    # Strided logits and log-probabilities, a class and a rest without any mass, and ids of 32 bits.
    targets = SparseTargets(
        torch.tensor([[3, 0, 4], [5, 1, 2]], dtype=torch.int32),
        torch.tensor([[-.5, -1., -torch.inf], [-1., -2., -3.]]).repeat_interleave(2, dim=1)[:, ::2],
        torch.tensor([-2., -torch.inf]), 6)
    found['strided'] = differences(torch.randn(6, 2).T, targets, 1.5, 'none')
    print(json.dumps(found))


if __name__ == '__main__':
    main()
