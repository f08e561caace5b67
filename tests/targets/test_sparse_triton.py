"""The Triton kernels of the loss: equal to the reference in Triton's interpreter, and accepted by its compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from timm_tinyvit.targets.sparse import SparseTargets, _SparseSoftTargetCrossEntropy, sparse_soft_target_cross_entropy

pytest.importorskip('triton')

SUPPORT = Path(__file__).parents[1] / 'support'


def run(program, **environment):
    return subprocess.run(
        [sys.executable, str(SUPPORT / program)], capture_output=True, text=True, env={**os.environ, **environment},
        timeout=300)


def test_the_kernels_equal_the_reference_in_the_interpreter():
    done = run('triton_compare.py', TRITON_INTERPRET='1')
    if 'only 0-dimensional arrays can be converted' in done.stderr:
        pytest.skip('the interpreter of this Triton does not work with this numpy; the test on a GPU does the same')
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout)
    assert len(differences) == 8
    for case, (loss, grad) in differences.items():
        half = 'float16' in case
        assert loss < 1e-5 and grad < (1e-2 if half else 1e-5), (case, loss, grad)


def test_the_compiler_makes_code_of_the_kernels_for_a_gpu(tmp_path):
    done = run('triton_compile.py', TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    sizes = done.stdout.split()
    assert len(sizes) == 8 and all(int(size) > 1000 for size in sizes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU; the interpreter runs the same kernels above')
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('num_classes, k', [(21841, 100), (1000, 10), (1000, 1000), (2, 1)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_equal_the_reference_on_a_gpu(dtype, num_classes, k, reduction):
    targets = SparseTargets.from_logits(torch.randn(128, num_classes, device='cuda') * 3, k)
    logits = torch.randn(128, num_classes, device='cuda', dtype=dtype, requires_grad=True)
    loss = sparse_soft_target_cross_entropy(logits, targets, 2., reduction)
    expected = _SparseSoftTargetCrossEntropy.apply(
        logits, targets.ids, targets.log_probs, targets.log_rest, 2., reduction)
    torch.testing.assert_close(loss, expected)
    grad, expected_grad = (
        torch.autograd.grad(value.sum(), logits)[0].float() for value in (loss, expected))
    assert (grad - expected_grad).abs().max() < (1e-5 if dtype == torch.float32 else 1e-2) * expected_grad.abs().max()
