"""The benchmarks of a GPU run at toy size on a CPU, and the kernels among them equal the layers that they stand for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / 'benchmarks'
COMPARE = '''
import json
import sys

sys.path.insert(0, sys.argv[1])
import gpu_kernels
import torch
import torch.nn.functional as F

torch.manual_seed(0)
differences = {}

def compare(name, ours, theirs):
    assert ours.shape == theirs.shape
    differences[name] = ((ours - theirs).abs().max() / theirs.abs().max()).item()

for rows, ins, outs in ((5, 32, 64), (130, 64, 96), (128, 96, 128)):
    x, weight, bias, residual = (torch.randn(*shape) for shape in ((rows, ins), (outs, ins), (outs,), (rows, outs)))
    compare(f'linear {ins} {outs}', gpu_kernels.linear(x, weight, bias), F.linear(x, weight, bias))
    compare(
        f'linear {ins} {outs} gelu', gpu_kernels.linear(x, weight, bias, True, residual),
        F.gelu(F.linear(x, weight, bias) + residual))
for channels, height, width, stride, gelu in ((32, 7, 9, 1, False), (64, 8, 5, 2, True), (16, 1, 3, 1, True)):
    x, weight, bias = torch.randn(2, height, width, channels), torch.randn(channels, 1, 3, 3), torch.randn(channels)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, 1, 1, channels).permute(0, 2, 3, 1)
    compare(
        f'depthwise {channels}', gpu_kernels.depthwise(x, weight, bias, stride, gelu), F.gelu(y) if gelu else y)
for window, height, width in ((2, 4, 6), (3, 3, 3), (7, 7, 14), (9, 9, 9)):
    qkv, table = torch.randn(2, height, width, 2 * 3 * 16), torch.randn(2, window ** 2)
    side = torch.arange(window)
    gap = (side[:, None] - side).abs()
    bias = table[:, (gap[:, None, :, None] * window + gap[None, :, None, :]).view(window ** 2, -1)]
    tokens = qkv.view(2, height // window, window, width // window, window, 2, 48).permute(0, 1, 3, 5, 2, 4, 6)
    q, k, v = tokens.reshape(-1, 2, window ** 2, 48).split(16, dim=3)
    y = F.scaled_dot_product_attention(q, k, v, bias)
    y = y.view(2, height // window, width // window, 2, window, window, 16).permute(0, 1, 4, 2, 5, 3, 6)
    compare(
        f'attention {window}', gpu_kernels.window_attention(qkv, table, window), y.reshape(2, height, width, 32))
print(json.dumps(differences))
'''
COMPILE = '''
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, sys.argv[1])
import gpu_kernels

for kernel, types, constants in (
        (gpu_kernels._linear_kernel, '*bf16 *bf16 *fp32 *bf16 *bf16 i32',
         dict(IN=160, OUT=640, GELU=True, RESIDUAL=True, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32)),
        (gpu_kernels._depthwise_kernel, '*bf16 *fp32 *fp32 *bf16 i32 i32 i32 i32 i32',
         dict(C=256, STRIDE=2, GELU=True, BLOCK_P=64, BLOCK_C=64)),
        (gpu_kernels._attention_kernel, '*bf16 *fp32 *bf16 i32 i32 fp32',
         dict(C=160, WINDOW=14, TOKENS=196, DIM=32, BLOCK_M=64, BLOCK_N=256))):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types.split(), strict=True)) | dict.fromkeys(constants, 'constexpr')
    code = triton.compile(
        ASTSource(kernel, signature, constants), target=GPUTarget('cuda', 90, 32), options={'num_warps': 8})
    print(len(code.asm['cubin']))
'''


def run(*argv, **environment):
    done = subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, env={**os.environ, **environment}, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize('part', ['profile', 'models', 'ablation', 'compiled'])
def test_every_part_runs_at_toy_size(part, tmp_path):
    run(FOLDER / 'gpu.py', '--toy', '--device', 'cpu', '--part', part, '--output', tmp_path, TRITON_INTERPRET='1')
    figures = [json.loads(line) for line in (tmp_path / f'{part}.jsonl').read_text().splitlines()]
    assert len(figures) >= 2
    for figure in figures:
        assert 'error' not in figure and figure['part'] == part and figure['milliseconds'] > 0
        assert figure.get('difference', 0) < 0.1, figure


def test_the_kernels_equal_the_layers_in_the_interpreter():
    differences = json.loads(run('-c', COMPARE, FOLDER, TRITON_INTERPRET='1'))
    assert len(differences) == 13
    assert max(differences.values()) < 1e-5, differences


def test_the_compiler_makes_code_of_the_kernels_for_a_gpu(tmp_path):
    sizes = run('-c', COMPILE, FOLDER, TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(tmp_path)).split()
    assert len(sizes) == 3 and all(int(size) > 1000 for size in sizes)
