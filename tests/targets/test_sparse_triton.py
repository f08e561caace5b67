"""The Triton kernels of the loss: equal to the reference in Triton's interpreter, and accepted by its compiler."""

import json
import os
import subprocess
import sys

import pytest
import torch

from timm_tinyvit.targets.sparse import SparseTargets, _SparseSoftTargetCrossEntropy, sparse_soft_target_cross_entropy

pytest.importorskip('triton')

# Both run in processes of their own: Triton decides when it is imported whether it interprets.
COMPARE = '''
import json
import torch
from timm_tinyvit.targets.sparse import SparseTargets, _SparseSoftTargetCrossEntropy as Reference
from timm_tinyvit.targets.sparse_triton import SparseSoftTargetCrossEntropy as Kernels

def both(targets, logits, temperature, upstream):
    delta, rest = targets.split(temperature)
    found = []
    for function in (Kernels, Reference):
        leaf = logits.clone().requires_grad_()
        loss = function.apply(leaf, targets.ids, delta, rest, temperature)
        found += [loss, torch.autograd.grad(loss, leaf, upstream)[0].float()]
    scale = found[3].abs().max()
    return ((found[0] - found[1 + 1]).abs().max().item(), ((found[1] - found[3]).abs().max() / scale).item())

torch.manual_seed(0)
differences = {}
for num_classes, k, temperature, dtype in (
        (5000, 7, 1., 'float32'), (50, 50, 3., 'float32'), (2, 1, 1., 'float32'), (2048, 10, 2., 'bfloat16'),
        (2049, 100, 4., 'float16'), (21841, 100, 1., 'float32')):
    targets = SparseTargets.from_logits(torch.randn(3, num_classes) * 3, k)
    logits = (torch.randn(3, num_classes) * 2 + 100).to(getattr(torch, dtype))
    differences[f'{num_classes} {k} {temperature} {dtype}'] = both(targets, logits, temperature, torch.randn(3))
# Fewer entries than k, with padding that names a listed class, and the rule without a remainder; strided logits.
targets = SparseTargets(
    torch.tensor([[3, 0, 0], [5, 1, 2]]), torch.tensor([[-.5, -1., 0.], [-1., -2., -3.]]), None, torch.tensor([2, 3]),
    6, 'none')
differences['padding'] = both(targets, torch.randn(6, 2).T, 1., torch.ones(2))
print(json.dumps(differences))
'''
COMPILE = '''
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from timm_tinyvit.targets import sparse_triton

def pointers(names, kind):
    return {f'{name}_ptr': '*' + kind for name in names.split()}

for dtype in ('fp32', 'bf16', 'fp16'):
    shared = {**pointers('logits', dtype), **pointers('ids', 'i64'), **pointers('delta rest', 'fp32')}
    sizes = {'row_stride': 'i32', 'num_classes': 'i32', 'k': 'i32', 'inverse_temperature': 'fp32',
             'BLOCK': 'constexpr', 'BLOCK_K': 'constexpr'}
    for kernel, more in (
            (sparse_triton._forward_kernel, pointers('loss log_norm', 'fp32')),
            (sparse_triton._backward_kernel,
             {**pointers('mass log_norm grad_output', 'fp32'), **pointers('grad', dtype)})):
        source = ASTSource(kernel, {**shared, **more, **sizes}, {'BLOCK': sparse_triton.BLOCK, 'BLOCK_K': 128})
        code = triton.compile(source, target=GPUTarget('cuda', 90, 32), options={'num_warps': 8})
        print(len(code.asm['cubin']))
'''


def run(script, **environment):
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kernels_equal_the_reference_in_the_interpreter():
    differences = json.loads(run(COMPARE, TRITON_INTERPRET='1'))
    assert len(differences) == 7
    for case, (loss, grad) in differences.items():
        half = 'float16' in case
        assert loss < 1e-5 and grad < (1e-2 if half else 1e-5), (case, loss, grad)


def test_the_compiler_makes_code_of_the_kernels_for_a_gpu(tmp_path):
    sizes = run(COMPILE, TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(tmp_path)).split()
    assert len(sizes) == 6 and all(int(size) > 1000 for size in sizes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU; the interpreter runs the same kernels above')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_equal_the_reference_on_a_gpu(dtype):
    targets = SparseTargets.from_logits(torch.randn(128, 21841, device='cuda') * 3, 100)
    logits = torch.randn(128, 21841, device='cuda', dtype=dtype, requires_grad=True)
    loss = sparse_soft_target_cross_entropy(logits, targets, 2.)
    delta, rest = targets.split(2.)
    expected = _SparseSoftTargetCrossEntropy.apply(logits, targets.ids, delta, rest, 2.).mean()
    torch.testing.assert_close(loss, expected)
    grad, expected_grad = (torch.autograd.grad(value, logits)[0].float() for value in (loss, expected))
    assert (grad - expected_grad).abs().max() < (1e-5 if dtype == torch.float32 else 1e-2) * expected_grad.abs().max()
