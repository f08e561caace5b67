"""Ways to compute TinyViT on a GPU, to be measured beside the package's own before one of them goes into it.

Each technique changes the layers of a model in place. Those in `INFERENCE_ONLY` have no backward pass. `VARIANTS` are
the sets of techniques that `benchmarks/gpu.py --part ablation` measures.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from timm_tinyvit.models.cpu import ConvNorm, FusedConv
from timm_tinyvit.models.tiny_vit import Attention, MBConv, NormMlp, PatchMerging, TinyVitBlock

__all__ = ['INFERENCE_ONLY', 'TRITON', 'VARIANTS', 'depthwise', 'linear', 'window_attention', 'with_techniques']


@triton.jit
def _gelu(x):
    return 0.5 * x * (1. + tl.erf(x * 0.7071067811865476))


@triton.jit
def _linear_kernel(
        x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, num_rows, IN: tl.constexpr, OUT: tl.constexpr,
        GELU: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
):
    # neighbouring programs share their rows of x, which the second finds in the cache
    rows = (tl.program_id(0) // tl.cdiv(OUT, BLOCK_N)).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % tl.cdiv(OUT, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    there = rows[:, None] < num_rows
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, IN, BLOCK_K):
        x = tl.load(x_ptr + rows[:, None] * IN + first + inner[None, :], mask=there, other=0.)
        weight = tl.load(
            weight_ptr + columns[None, :] * IN + first + inner[:, None], mask=columns[None, :] < OUT, other=0.)
        total = tl.dot(x, weight, total)
    total += tl.load(bias_ptr + columns, mask=columns < OUT, other=0.).to(tl.float32)[None, :]
    place = rows[:, None] * OUT + columns[None, :]
    mask = there & (columns[None, :] < OUT)
    if RESIDUAL:
        total += tl.load(residual_ptr + place, mask=mask, other=0.).to(tl.float32)
    if GELU:
        total = _gelu(total)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


def linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        gelu: bool = False,
        residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`gelu(linear(x) + residual)` of contiguous [..., in] in one kernel."""
    in_features, out_features = weight.shape[1], weight.shape[0]
    out = x.new_empty(*x.shape[:-1], out_features)
    num_rows = x.numel() // in_features
    block_m, block_n, block_k = 128, 128 if out_features % 128 == 0 else 64, 64 if in_features % 64 == 0 else 32
    _linear_kernel[(triton.cdiv(num_rows, block_m) * triton.cdiv(out_features, block_n),)](
        x, weight.to(x.dtype), bias, x if residual is None else residual, out, num_rows, in_features, out_features,
        gelu, residual is not None, block_m, block_n, block_k, num_warps=8 if block_n == 128 else 4, num_stages=3)
    return out


@triton.jit
def _depthwise_kernel(
        x_ptr, weight_ptr, bias_ptr, out_ptr, num_pixels, H, W, OUT_H, OUT_W, C: tl.constexpr, STRIDE: tl.constexpr,
        GELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    pixels = (tl.program_id(0) // (C // BLOCK_C)) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = (tl.program_id(0) % (C // BLOCK_C)) * BLOCK_C + tl.arange(0, BLOCK_C)
    left = pixels % OUT_W * STRIDE - 1
    top = pixels // OUT_W % OUT_H * STRIDE - 1
    image = (pixels // (OUT_W * OUT_H)).to(tl.int64) * H * W
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            y, x = top + i, left + j
            inside = (pixels < num_pixels) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            value = tl.load(
                x_ptr + (image + y * W + x)[:, None] * C + channels[None, :], mask=inside[:, None], other=0.)
            weight = tl.load(weight_ptr + (3 * i + j) * C + channels)
            total += value.to(tl.float32) * weight.to(tl.float32)[None, :]
    total += tl.load(bias_ptr + channels).to(tl.float32)[None, :]
    if GELU:
        total = _gelu(total)
    tl.store(
        out_ptr + pixels.to(tl.int64)[:, None] * C + channels[None, :], total.to(out_ptr.dtype.element_ty),
        mask=(pixels < num_pixels)[:, None])


def depthwise(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int = 1, gelu: bool = False) -> torch.Tensor:
    """`gelu(conv2d(x))`, depthwise 3x3, of contiguous [B, H, W, C], in one kernel."""
    B, H, W, C = x.shape
    out_h, out_w = (H - 1) // stride + 1, (W - 1) // stride + 1
    out = x.new_empty(B, out_h, out_w, C)
    block_c = next(size for size in (64, 32, 16) if C % size == 0)
    block_p = 4096 // block_c
    _depthwise_kernel[(triton.cdiv(B * out_h * out_w, block_p) * (C // block_c),)](
        x, weight.view(C, 9).t().contiguous(), bias, out, B * out_h * out_w, H, W, out_h, out_w, C, stride, gelu,
        block_p, block_c, num_warps=4)
    return out


@triton.jit
def _attention_kernel(
        qkv_ptr, table_ptr, out_ptr, H, W, scale, C: tl.constexpr, WINDOW: tl.constexpr, TOKENS: tl.constexpr,
        DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    window, head, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_M
    across = W // WINDOW
    image = window // (across * (H // WINDOW))
    top = window // across % (H // WINDOW) * WINDOW
    left = window % across * WINDOW
    rows, columns, dims = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, DIM)
    row_y, row_x, column_y, column_x = rows // WINDOW, rows % WINDOW, columns // WINDOW, columns % WINDOW
    row_pixels = (image * H + top + row_y).to(tl.int64) * W + left + row_x
    column_pixels = (image * H + top + column_y).to(tl.int64) * W + left + column_x
    rows_there, columns_there = rows < TOKENS, columns < TOKENS
    qkv_ptr += head * 3 * DIM
    q = tl.load(qkv_ptr + row_pixels[:, None] * (3 * C) + dims[None, :], mask=rows_there[:, None], other=0.)
    place = column_pixels[:, None] * (3 * C) + dims[None, :]
    k = tl.load(qkv_ptr + place + DIM, mask=columns_there[:, None], other=0.)
    v = tl.load(qkv_ptr + place + 2 * DIM, mask=columns_there[:, None], other=0.)
    distance = tl.abs(row_y[:, None] - column_y[None, :]) * WINDOW + tl.abs(row_x[:, None] - column_x[None, :])
    both = rows_there[:, None] & columns_there[None, :]
    bias = tl.load(table_ptr + head * TOKENS + distance, mask=both, other=0.).to(tl.float32)
    scores = tl.where(columns_there[None, :], tl.dot(q, tl.trans(k)) * scale + bias, float('-inf'))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    out = tl.dot(weights.to(v.dtype), v) / tl.sum(weights, axis=1)[:, None]
    tl.store(
        out_ptr + row_pixels[:, None] * C + head * DIM + dims[None, :], out.to(out_ptr.dtype.element_ty),
        mask=rows_there[:, None])


def window_attention(qkv: torch.Tensor, table: torch.Tensor, window: int) -> torch.Tensor:
    """Attention in windows of contiguous [B, H, W, 3C], with the bias table [heads, window * window]; [B, H, W, C]."""
    B, H, W, C = *qkv.shape[:3], qkv.shape[3] // 3
    num_heads, num_tokens = table.shape
    out = qkv.new_empty(B, H, W, C)
    block_n = max(16, triton.next_power_of_2(num_tokens))
    block_m = min(64, block_n)
    _attention_kernel[(B * (H // window) * (W // window), num_heads, triton.cdiv(num_tokens, block_m))](
        qkv, table, out, H, W, (C // num_heads) ** -0.5, C, window, num_tokens, C // num_heads, block_m, block_n,
        num_warps=8 if block_n > 64 else 4)
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).contiguous()  # [B, C, H, W] -> [B, H, W, C], free where channels-last


def _images(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def _folded(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return layer._folded() if isinstance(layer, ConvNorm) else (layer.weight, layer.bias)


def _conv_of(layer: nn.Module) -> nn.Conv2d:
    return layer.conv if isinstance(layer, ConvNorm) else layer


def _layers(model: nn.Module, *types: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) in types]


def channels_last(model: nn.Module) -> nn.Module:
    """The images change their memory format once, in front of the stem."""
    model.to(memory_format=torch.channels_last)
    forward = model.patch_embed.forward
    model.patch_embed.forward = lambda x: forward(x.contiguous(memory_format=torch.channels_last))
    return model


def folded(model: nn.Module) -> nn.Module:
    """Batch norm is folded once instead of in every forward."""
    return reparameterize_model(model)


def layer_norm(model: nn.Module) -> nn.Module:
    """Layer norm reads and writes what it gets; autocast would read bfloat16 and write float32, with a cast each."""

    def forward(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)

    for norm in _layers(model, nn.LayerNorm):
        norm.forward = functools.partial(forward, norm)
    return model


def pointwise(model: nn.Module) -> nn.Module:
    """A 1x1 convolution is a linear layer, which adds the bias as it writes; a convolution adds it afterwards."""

    def forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, ConvNorm) and layer.bn.training:
            return layer.bn(_images(F.linear(_rows(x), layer.conv.weight.flatten(1))))
        weight, bias = _folded(layer)
        return _images(F.linear(_rows(x), weight.flatten(1), bias))

    for layer in _layers(model, ConvNorm, FusedConv):
        if _conv_of(layer).kernel_size == (1, 1):
            layer.forward = functools.partial(forward, layer)
    return model


def depthwise_kernel(model: nn.Module) -> nn.Module:
    """Depthwise convolution with its bias, and the GELU that follows it, in one kernel."""

    def forward(layer: nn.Module, gelu: bool, x: torch.Tensor) -> torch.Tensor:
        weight, bias = _folded(layer)
        return _images(depthwise(_rows(x), weight, bias, _conv_of(layer).stride[0], gelu))

    for block in _layers(model, MBConv, PatchMerging):
        block.conv2.forward = functools.partial(forward, block.conv2, True)
        block.act2 = nn.Identity()
    for block in _layers(model, TinyVitBlock):
        block.local_conv.forward = functools.partial(forward, block.local_conv, False)
    return model


def linear_kernel(model: nn.Module) -> nn.Module:
    """Linear layers and 1x1 convolutions that a GELU follows, with it and the shortcut in one kernel."""

    def conv(layer: nn.Module, gelu: bool, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        weight, bias = _folded(layer)
        return _images(linear(_rows(x), weight.flatten(1), bias, gelu, residual))

    def block_forward(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = block.act2(block.conv2(block.conv1(x)))
        return conv(block.conv3, True, y, _rows(x))

    def fc1(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return linear(x.to(dtype).contiguous(), layer.weight, layer.bias, gelu=True)

    for block in _layers(model, MBConv, PatchMerging):
        block.conv1.forward = functools.partial(conv, block.conv1, True)
        block.act1 = nn.Identity()
        if isinstance(block, MBConv):
            block.forward = functools.partial(block_forward, block)
    for mlp in _layers(model, NormMlp):
        mlp.fc1.forward = functools.partial(fc1, mlp.fc1)
        mlp.act = nn.Identity()
    return model


def attention_kernel(model: nn.Module) -> nn.Module:
    """Attention that finds the tokens of a window where they are, and the biases in their table; no padding."""

    def forward(block: TinyVitBlock, x: torch.Tensor) -> torch.Tensor:
        attn = block.attn
        return attn.proj(window_attention(attn.qkv(attn.norm(x.contiguous())), attn.attention_biases, attn.window_size))

    for block in _layers(model, TinyVitBlock):
        block._window_attn = functools.partial(forward, block)
    return model


def cudnn_attention(model: nn.Module) -> nn.Module:
    """cuDNN's fused attention instead of the one that PyTorch chooses."""

    def with_backend(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], True):
            return forward(x)

    for attn in _layers(model, Attention):
        attn.forward = functools.partial(with_backend, attn.forward)
    return model


TRITON = (depthwise_kernel, linear_kernel, attention_kernel)
INFERENCE_ONLY = (folded, depthwise_kernel, linear_kernel, attention_kernel)
VARIANTS = {
    'ours': (),
    'folded once': (folded,),
    'channels-last': (channels_last,),
    'layer norm': (layer_norm,),
    'cudnn attention': (cudnn_attention,),
    'channels-last, layer norm': (channels_last, layer_norm),
    'channels-last, layer norm, pointwise': (channels_last, layer_norm, pointwise),
    'attention kernel': (channels_last, layer_norm, pointwise, attention_kernel),
    'depthwise kernel': (channels_last, layer_norm, pointwise, depthwise_kernel),
    'linear kernel': (channels_last, layer_norm, pointwise, linear_kernel),
    'all kernels': (channels_last, layer_norm, pointwise, depthwise_kernel, linear_kernel, attention_kernel),
    'all kernels, folded once': (
        folded, channels_last, layer_norm, pointwise, depthwise_kernel, linear_kernel, attention_kernel),
}


def with_techniques(model: nn.Module, techniques: tuple[Callable[[nn.Module], nn.Module], ...]) -> nn.Module:
    """The model, changed in place, with the techniques of a variant."""
    for technique in techniques:
        model = technique(model)
    return model
