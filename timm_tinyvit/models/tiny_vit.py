"""TinyViT, the architecture and its five variants, registered with timm.

TinyViT (arXiv 2207.10666) is a convolutional stem and one stage of inverted residuals, then three stages of windowed
attention with a depthwise convolution inside each block. The state dict has timm's names, so that weights trained here
load in plain timm and the weights of timm's Hub repos load here; the official `.pth` files load through
`checkpoint_filter_fn`. Windows follow the image size, at creation (`img_size=`) and afterwards (`set_input_size`).

What differs from timm's class is how the same function is computed; that is the business of `layers`.
"""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerNorm2d,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    get_device_dtype,
    to_2tuple,
    trunc_normal_,
    use_fused_attn,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import nn

from .layers import GELU, ConvNorm, LayerNorm, Linear, in_slices, takes_mask, to_channels_last

__all__ = ['TinyVit', 'calc_window_sizes', 'checkpoint_filter_fn', 'rename_official', 'resize_attention_biases']


def calc_window_sizes(img_size: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Attention windows of the four stages for an image size, in the proportions of the paper.

    At 224, 384 and 512 these are the paper's (7, 7, 14, 7), (12, 12, 24, 12) and (16, 16, 32, 16): the last two stages
    see their whole feature map in one window, the second a quarter of it in each direction. Windows are square, so an
    oblong image takes those of its shorter side; a side that 32 does not divide is rounded up.

    Args:
        img_size: Side of a square image, or (height, width).

    Returns:
        One window side per stage; the first stage is convolutional and makes no use of its own.

    Raises:
        ValueError: If the size is not one or two positive integers.
    """
    sides = to_2tuple(img_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f'img_size is {img_size!r}, but must be a positive integer or a pair (height, width).')
    last = -(-min(sides) // 32)
    return last, last, -(-min(sides) // 16), last


def _check_window_sizes(window_sizes: Sequence[int], num_stages: int) -> tuple[int, ...]:
    window_sizes = tuple(window_sizes)
    if len(window_sizes) != num_stages or not all(isinstance(size, int) and size > 0 for size in window_sizes):
        raise ValueError(f'window_sizes is {window_sizes}, but must be {num_stages} positive integers, one per stage.')
    return window_sizes


def resize_attention_biases(biases: torch.Tensor, window_size: int) -> torch.Tensor:
    """Interpolate a table of attention biases to another window, bicubically as the official code does.

    Args:
        biases: Table of the old window, [num_heads, old_size * old_size], ordered by (vertical, horizontal) distance.
        window_size: Side of the new window.

    Returns:
        Table of the new window, [num_heads, window_size * window_size], in the dtype of the old one.

    Raises:
        ValueError: If the old table does not belong to a square window.
    """
    num_heads, length = biases.shape
    old_size = math.isqrt(length)
    if old_size * old_size != length:
        raise ValueError(f'A table of {length} attention biases does not belong to a square window.')
    if old_size == window_size:
        return biases
    table = biases.float().view(1, num_heads, old_size, old_size)
    table = F.interpolate(table, size=(window_size, window_size), mode='bicubic')
    return table.reshape(num_heads, window_size * window_size).to(biases.dtype)


@register_notrace_module
class PatchEmbed(nn.Module):
    """Stem: two strided 3x3 convolutions, a quarter of the image's height and width."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            act_layer: type[nn.Module],
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.stride = 4
        mid_chs = out_chs // 2
        self.expansion = mid_chs / (4 * in_chs)
        self.conv1 = ConvNorm(in_chs, mid_chs, 3, 2, 1, **dd)
        self.act = act_layer()
        self.conv2 = ConvNorm(mid_chs, out_chs, 3, 2, 1, **dd)

    @in_slices
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:  # all that follows keeps the memory format that it gets
            x = to_channels_last(x)
        x = self.act(self.conv1(x))
        return self.conv2(x)


@register_notrace_module
class MBConv(nn.Module):
    """Inverted residual: expand, depthwise 3x3, project; the activation follows the sum."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            expand_ratio: float,
            act_layer: type[nn.Module],
            drop_path: float,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        mid_chs = int(in_chs * expand_ratio)
        self.expansion = mid_chs / in_chs
        self.conv1 = ConvNorm(in_chs, mid_chs, **dd)
        self.act1 = act_layer()
        self.conv2 = ConvNorm(mid_chs, mid_chs, 3, 1, 1, groups=mid_chs, **dd)
        self.act2 = act_layer()
        self.conv3 = ConvNorm(mid_chs, out_chs, bn_weight_init=0., **dd)
        self.act3 = act_layer()
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    @in_slices
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.act1(self.conv1(x))
        x = self.act2(self.conv2(x))
        x = self.drop_path(self.conv3(x))
        return self.act3(x + shortcut)


@register_notrace_module
class PatchMerging(nn.Module):
    """Halve height and width between stages: project, depthwise 3x3 with stride 2, project."""

    def __init__(
            self,
            dim: int,
            out_dim: int,
            act_layer: type[nn.Module],
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.expansion = out_dim / dim
        self.conv1 = ConvNorm(dim, out_dim, **dd)
        self.act1 = act_layer()
        self.conv2 = ConvNorm(out_dim, out_dim, 3, 2, 1, groups=out_dim, **dd)
        self.act2 = act_layer()
        self.conv3 = ConvNorm(out_dim, out_dim, **dd)

    @in_slices
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.conv1(x))
        x = self.act2(self.conv2(x))
        return self.conv3(x)


class ConvLayer(nn.Module):
    """First stage: a run of inverted residuals."""

    def __init__(
            self,
            dim: int,
            depth: int,
            act_layer: type[nn.Module],
            drop_path: Sequence[float],
            conv_expand_ratio: float = 4.,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.depth = depth
        self.blocks = nn.Sequential(*[
            MBConv(dim, dim, conv_expand_ratio, act_layer, drop_path[i], device=device, dtype=dtype)
            for i in range(depth)
        ])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class NormMlp(nn.Module):
    """MLP with its layer norm in front."""

    def __init__(
            self,
            in_features: int,
            hidden_features: int,
            act_layer: type[nn.Module] = GELU,
            drop: float = 0.,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.expansion = hidden_features / in_features
        self.norm = LayerNorm(in_features, **dd)
        self.fc1 = Linear(in_features, hidden_features, **dd)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden_features, in_features, **dd)
        self.drop2 = nn.Dropout(drop)

    @in_slices
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop1(self.act(self.fc1(self.norm(x))))
        return self.drop2(self.fc2(x))


class Attention(nn.Module):
    """Attention over the tokens of one window, with a learned bias per head for every distance between two tokens."""

    fused_attn: torch.jit.Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int,
            window_size: int,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim ** -0.5
        self.window_size = window_size
        self.fused_attn = use_fused_attn()

        self.norm = LayerNorm(dim, **dd)
        self.qkv = Linear(dim, 3 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)

        num_tokens = window_size * window_size
        # a window has as many (vertical, horizontal) distances as it has tokens
        self.attention_biases = nn.Parameter(torch.empty(num_heads, num_tokens, **dd))
        self.register_buffer(
            'attention_bias_idxs',
            torch.empty((num_tokens, num_tokens), device=device, dtype=torch.long),
            persistent=False,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.attention_biases)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute which entry of the bias table belongs to each pair of tokens."""
        side = torch.arange(self.window_size, device=self.attention_bias_idxs.device)
        gap = (side[:, None] - side[None, :]).abs()  # [w, w]
        idxs = gap[:, None, :, None] * self.window_size + gap[None, :, None, :]  # [w, w, w, w]
        self.attention_bias_idxs.copy_(idxs.reshape(self.attention_bias_idxs.shape))

    @torch.no_grad()
    def set_window_size(self, window_size: int) -> None:
        """Interpolate the biases to another window."""
        if window_size == self.window_size:
            return
        biases = resize_attention_biases(self.attention_biases, window_size)
        self.attention_biases = nn.Parameter(biases, requires_grad=self.attention_biases.requires_grad)
        num_tokens = window_size * window_size
        self.attention_bias_idxs = self.attention_bias_idxs.new_empty((num_tokens, num_tokens))
        self.window_size = window_size
        self.init_non_persistent_buffers()

    def _biases(self) -> torch.Tensor:
        # index_select is several times cheaper than advanced indexing, cheap enough that nothing needs to be cached
        N = self.attention_bias_idxs.shape[0]
        biases = self.attention_biases.index_select(1, self.attention_bias_idxs.view(-1))
        # The CPU's fused attention takes no mask of three dimensions. Nor does cuDNN's, which PyTorch prefers on newer
        # GPUs, and which took 2.7 ms on an H200 where the memory-efficient one took 1.9.
        return biases.view(self.num_heads, N, N) if biases.is_cuda else biases.view(1, self.num_heads, N, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        # the official layout: for every head its query, key and value side by side
        qkv = self.qkv(self.norm(x)).view(B, N, self.num_heads, 3 * self.head_dim).transpose(1, 2)
        q, k, v = qkv.split(self.head_dim, dim=3)  # [B, heads, N, head_dim]
        biases = self._biases()
        if self.fused_attn and takes_mask(biases):
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=biases.to(q.dtype))
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1) + biases  # [B, heads, N, N]
            x = attn.softmax(dim=-1).to(v.dtype) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


@register_notrace_module
class TinyVitBlock(nn.Module):
    """Windowed attention, a depthwise convolution that joins the windows, and an MLP, on [B, H, W, C].

    Args:
        dim: Number of channels.
        num_heads: Number of attention heads.
        window_size: Side of the attention window; a feature map that it does not divide is padded with zeros, and
            the padding takes part in the attention.
        mlp_ratio: Ratio of the MLP's hidden width to `dim`.
        drop: Dropout rate in the MLP.
        drop_path: Stochastic depth rate.
        local_conv_size: Kernel size of the depthwise convolution.
        act_layer: Activation of the MLP.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            window_size: int = 7,
            mlp_ratio: float = 4.,
            drop: float = 0.,
            drop_path: float = 0.,
            local_conv_size: int = 3,
            act_layer: type[nn.Module] = GELU,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'dim is {dim}, but must be divisible by num_heads, which is {num_heads}.')
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = window_size
        self.mlp_ratio = mlp_ratio

        self.attn = Attention(dim, num_heads, window_size, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.mlp = NormMlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.local_conv = ConvNorm(dim, dim, local_conv_size, 1, local_conv_size // 2, groups=dim, **dd)

    def set_window_size(self, window_size: int) -> None:
        """Give the attention another window."""
        self.attn.set_window_size(window_size)
        self.window_size = window_size

    def _window_attn(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        w = self.window_size
        if H == w and W == w:
            return self.attn(x.reshape(B, H * W, C)).view(B, H, W, C)

        pad_b, pad_r = (w - H % w) % w, (w - W % w) % w
        padded = pad_b > 0 or pad_r > 0
        if padded:
            x = F.pad(x, (0, 0, 0, pad_r, 0, pad_b))
        nH, nW = (H + pad_b) // w, (W + pad_r) // w
        x = x.view(B, nH, w, nW, w, C).transpose(2, 3).reshape(B * nH * nW, w * w, C)
        x = self.attn(x)
        x = x.view(B, nH, nW, w, w, C).transpose(2, 3).reshape(B, nH * w, nW * w, C)
        if padded:
            x = x[:, :H, :W].contiguous()
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self._window_attn(x))
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path2(self.mlp(x))

    def extra_repr(self) -> str:
        return f'dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, mlp_ratio={self.mlp_ratio}'


class TinyVitStage(nn.Module):
    """Downsampling, then a run of attention blocks.

    Args:
        dim: Number of channels that come in.
        out_dim: Number of channels of the blocks.
        depth: Number of blocks.
        num_heads: Number of attention heads.
        window_size: Side of the attention window.
        drop_path: Stochastic depth rate of each block.
        mlp_ratio: Ratio of the MLPs' hidden width to `out_dim`.
        drop: Dropout rate in the MLPs.
        local_conv_size: Kernel size of the depthwise convolutions.
        act_layer: Activation.
    """

    def __init__(
            self,
            dim: int,
            out_dim: int,
            depth: int,
            num_heads: int,
            window_size: int,
            drop_path: Sequence[float],
            mlp_ratio: float = 4.,
            drop: float = 0.,
            local_conv_size: int = 3,
            act_layer: type[nn.Module] = GELU,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.depth = depth
        self.out_dim = out_dim
        self.downsample = PatchMerging(dim, out_dim, act_layer, **dd)
        self.blocks = nn.Sequential(*[
            TinyVitBlock(
                dim=out_dim,
                num_heads=num_heads,
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                drop=drop,
                drop_path=drop_path[i],
                local_conv_size=local_conv_size,
                act_layer=act_layer,
                **dd,
            )
            for i in range(depth)
        ])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        x = x.permute(0, 2, 3, 1)  # NCHW -> NHWC
        x = self.blocks(x)
        x = x.permute(0, 3, 1, 2)  # NHWC -> NCHW
        return x

    def extra_repr(self) -> str:
        return f'dim={self.out_dim}, depth={self.depth}'


class TinyVit(nn.Module):
    """TinyViT.

    A PyTorch impl of: `TinyViT: Fast Pretraining Distillation for Small Vision Transformers` -
        https://arxiv.org/abs/2207.10666

    Args:
        in_chans: Number of image channels.
        num_classes: Number of classes, 0 for no classifier.
        global_pool: Pooling in front of the classifier, '' for none.
        embed_dims: Number of channels of each stage.
        depths: Number of blocks of each stage.
        num_heads: Number of attention heads of each stage.
        window_sizes: Side of the attention windows of each stage; derived from `img_size` if None.
        mlp_ratio: Ratio of the MLPs' hidden width to the number of channels.
        drop_rate: Dropout rate in front of the classifier.
        proj_drop_rate: Dropout rate in the MLPs.
        drop_path_rate: Stochastic depth rate of the last block.
        use_checkpoint: Recompute activations in the backward pass.
        mbconv_expand_ratio: Expansion of the inverted residuals.
        local_conv_size: Kernel size of the depthwise convolutions between attention and MLP.
        act_layer: Activation.
        img_size: Image size that the windows are made for; the model still takes images of any size.

    Attributes:
        window_sizes: Side of the attention windows of each stage, kept current by `set_input_size`.
    """

    __jit_unused_properties__ = ['_model_args']

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            embed_dims: Sequence[int] = (96, 192, 384, 768),
            depths: Sequence[int] = (2, 2, 6, 2),
            num_heads: Sequence[int] = (3, 6, 12, 24),
            window_sizes: Sequence[int] | None = None,
            mlp_ratio: float = 4.,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.1,
            use_checkpoint: bool = False,
            mbconv_expand_ratio: float = 4.,
            local_conv_size: int = 3,
            act_layer: type[nn.Module] = GELU,
            img_size: int | Sequence[int] = 224,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self._factory_args = {}
        self.depths = tuple(depths)
        self.num_stages = len(depths)
        self.mlp_ratio = mlp_ratio
        self.grad_checkpointing = use_checkpoint
        self.window_sizes = _check_window_sizes(
            calc_window_sizes(img_size) if window_sizes is None else window_sizes, self.num_stages)

        self.patch_embed = PatchEmbed(in_chans, embed_dims[0], act_layer, **dd)

        drop_path = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.Sequential()
        self.feature_info = []
        stride = self.patch_embed.stride
        for i, dim in enumerate(embed_dims):
            if i == 0:
                stage = ConvLayer(dim, depths[i], act_layer, drop_path[i], mbconv_expand_ratio, **dd)
            else:
                stage = TinyVitStage(
                    dim=embed_dims[i - 1],
                    out_dim=dim,
                    depth=depths[i],
                    num_heads=num_heads[i],
                    window_size=self.window_sizes[i],
                    drop_path=drop_path[i],
                    mlp_ratio=mlp_ratio,
                    drop=proj_drop_rate,
                    local_conv_size=local_conv_size,
                    act_layer=act_layer,
                    **dd,
                )
                stride *= 2
            self.stages.append(stage)
            self.feature_info += [{'num_chs': dim, 'reduction': stride, 'module': f'stages.{i}'}]

        self.num_features = embed_dims[-1]
        self.head = NormMlpClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            norm_layer=partial(LayerNorm2d, eps=1e-5),
            drop_rate=drop_rate,
            **dd,
        )
        self.head_hidden_size = self.head.num_features

        self.init_weights(needs_reset=False)

    @property
    def _model_args(self) -> dict[str, Any]:
        # timm writes these into a published config, where its own class must understand them: windows, not image sizes
        args = {name: value for name, value in self._factory_args.items() if name != 'img_size'}
        return {**args, 'window_sizes': list(self.window_sizes)}

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self._factory_args = args

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise the weights.

        Args:
            needs_reset: Also reset the modules that initialise themselves when made, for a model that was made on the
                meta device.
        """
        self.apply(partial(self._init_weights, needs_reset=needs_reset))

    def _init_weights(self, m: nn.Module, needs_reset: bool = True) -> None:
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif needs_reset and hasattr(m, 'reset_parameters'):
            m.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of the names of parameters that take no weight decay, as the official optimizer asks for them."""
        return {'attention_biases'}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay, besides those of one dimension."""
        return {name for name, _ in self.named_parameters() if 'attention_biases' in name}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str] | Callable[[str], int]:
        """Groups of parameters from the image to the classifier, for `timm.models.group_parameters`.

        Args:
            coarse: One group per stage instead of one per block.

        Returns:
            Regular expressions of the groups if `coarse`; else a function from a parameter's name to its layer, those
            of the paper's layer-wise learning rates: the stem goes with the first block, a downsampling with the
            block in front of it and the head with the last block.
        """
        if coarse:
            return {'stem': r'^patch_embed', 'blocks': r'^stages\.(\d+)'}
        return self._layer_of

    @torch.jit.ignore
    def _layer_of(self, name: str) -> int:
        if name.startswith('patch_embed'):
            return 0
        match = re.match(r'stages\.(\d+)\.(?:downsample|blocks\.(\d+))', name)
        if match is None:
            return sum(self.depths) - 1
        stage, block = match.groups()
        return sum(self.depths[:int(stage)]) + (-1 if block is None else int(block))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages' activations in the backward pass, or stop doing so."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(
            self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replace the classifier.

        Args:
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Pooling in front of the classifier, unchanged if None, '' for none.
            reset_other: Remove the head's norm too.
        """
        self.num_classes = num_classes
        self.head.reset(
            num_classes,
            pool_type=global_pool,
            reset_other=reset_other,
            in_features=self.num_features,
            **get_device_dtype(self),
        )
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def set_input_size(
            self,
            img_size: int | Sequence[int] | None = None,
            window_sizes: Sequence[int] | None = None,
    ) -> None:
        """Give the attention the windows of another image size; the biases are interpolated.

        The biases become new parameters, so an optimizer is made afterwards.

        Args:
            img_size: Side of a square image, or (height, width); any size will do.
            window_sizes: Side of the windows of each stage, instead of those that follow from `img_size`.

        Raises:
            ValueError: If a size or a window is not a positive integer, or there is not one window per stage.
        """
        if window_sizes is None:
            if img_size is None:
                return
            window_sizes = calc_window_sizes(img_size)
        elif img_size is not None:
            calc_window_sizes(img_size)
        window_sizes = _check_window_sizes(window_sizes, self.num_stages)
        for stage, window_size in zip(self.stages, window_sizes):
            if isinstance(stage, TinyVitStage):
                for block in stage.blocks:
                    block.set_window_size(window_size)
        self.window_sizes = window_sizes
        if img_size is not None and hasattr(self, 'pretrained_cfg'):
            _set_input_cfg(self, img_size)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Forward features that returns intermediates.

        Args:
            x: Images, [B, in_chans, H, W].
            indices: Take the last n stages if int, all if None, the given ones if a sequence.
            norm: Has no effect, the stages' outputs have no norm of their own.
            stop_early: Stop after the last stage asked for.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Return the intermediates only.

        Returns:
            The final features and a list of the stages' outputs, or the list alone.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)

        x = self.patch_embed(x)
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]

        for i, stage in enumerate(stages):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(stage, x)
            else:
                x = stage(x)
            if i in take_indices:
                intermediates.append(x)

        if intermediates_only:
            return intermediates
        return x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages that the given intermediates do not need, and the head with them."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if prune_end:
            # features now end at the last stage kept; the head was made for the final ones, so it goes too
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '', reset_other=True)
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Features of the last stage, [B, num_features, ceil(H / 32), ceil(W / 32)]."""
        x = self.patch_embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x)
        return self.stages(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits [B, num_classes] of the features, or what the classifier sees if `pre_logits`."""
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)


_OFFICIAL_NAMES = tuple((re.compile(pattern), name) for pattern, name in (
    (r'^patch_embed\.seq\.0\.', 'patch_embed.conv1.'),
    (r'^patch_embed\.seq\.2\.', 'patch_embed.conv2.'),
    (r'^layers\.(\d+)\.blocks\.', r'stages.\1.blocks.'),
    (r'\.c\.weight$', '.conv.weight'),
    (r'^norm_head\.', 'head.norm.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
))


def rename_official(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Give the entries of a state dict of the official code timm's names; timm's own names stay as they are."""
    out = {}
    for name, value in state_dict.items():
        if name.endswith('attention_bias_idxs'):
            continue  # follows from the window size
        # the official code puts the downsampling at the end of a stage, timm at the start of the next
        name = re.sub(r'^layers\.(\d+)\.downsample\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.', name)
        for pattern, replacement in _OFFICIAL_NAMES:
            name = pattern.sub(replacement, name)
        out[name] = value
    return out


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Make a checkpoint of timm or of the official code fit a model.

    Args:
        state_dict: Weights with timm's or the official names, bare or as the 'model' entry of a training checkpoint.
        model: Model whose windows the attention biases are interpolated to.

    Returns:
        State dict with timm's names.
    """
    target = model.state_dict()
    out = rename_official(state_dict.get('model', state_dict))
    for name, value in out.items():
        if name.endswith('attention_biases') and name in target:
            out[name] = resize_attention_biases(value, math.isqrt(target[name].shape[1]))
    return out


def _cfg(url: str = '', **kwargs: Any) -> dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000,
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.conv1.conv',
        'classifier': 'head.fc',
        'pool_size': (7, 7),
        'input_size': (3, 224, 224),
        'crop_pct': 0.95,
        'license': 'apache-2.0',
        **kwargs,
    }


def _set_input_cfg(model: nn.Module, img_size: int | Sequence[int]) -> None:
    # a copy, since the registry's own must not change; `resolve_model_data_config` and published configs read it
    height, width = to_2tuple(img_size)
    model.pretrained_cfg = dict(
        model.pretrained_cfg,
        input_size=(model.pretrained_cfg['input_size'][0], height, width),
        pool_size=(-(-height // 32), -(-width // 32)),
    )
    model.default_cfg = model.pretrained_cfg


# The first tag of a variant is its default: the ImageNet-1k classifier, as in the paper's code.
default_cfgs = generate_default_cfgs({
    'tiny_vit_5m_224.dist_in22k_ft_in1k': _cfg(hf_hub_id='timm/'),
    'tiny_vit_5m_224.dist_in22k': _cfg(hf_hub_id='timm/', num_classes=21841),
    'tiny_vit_5m_224.in1k': _cfg(hf_hub_id='timm/'),
    'tiny_vit_11m_224.dist_in22k_ft_in1k': _cfg(hf_hub_id='timm/'),
    'tiny_vit_11m_224.dist_in22k': _cfg(hf_hub_id='timm/', num_classes=21841),
    'tiny_vit_11m_224.in1k': _cfg(hf_hub_id='timm/'),
    'tiny_vit_21m_224.dist_in22k_ft_in1k': _cfg(hf_hub_id='timm/'),
    'tiny_vit_21m_224.dist_in22k': _cfg(hf_hub_id='timm/', num_classes=21841),
    'tiny_vit_21m_224.in1k': _cfg(hf_hub_id='timm/'),
    'tiny_vit_21m_384.dist_in22k_ft_in1k': _cfg(
        hf_hub_id='timm/', input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
    'tiny_vit_21m_512.dist_in22k_ft_in1k': _cfg(
        hf_hub_id='timm/', input_size=(3, 512, 512), pool_size=(16, 16), crop_pct=1.0, crop_mode='squash'),
})


def _create_tiny_vit(
        variant: str,
        pretrained: bool,
        variant_args: dict[str, Any],
        img_size: int | Sequence[int] | None = None,
        **kwargs: Any,
) -> nn.Module:
    if img_size is not None:
        # windows that come from a checkpoint's config, not from the caller, give way to the size asked for
        saved_windows = kwargs.get('pretrained_model_args', {}).get('window_sizes')
        if kwargs.get('window_sizes') is None or kwargs['window_sizes'] is saved_windows:
            kwargs['window_sizes'] = calc_window_sizes(img_size)
    kwargs = {**variant_args, **kwargs}
    out_indices = kwargs.pop('out_indices', (0, 1, 2, 3))
    model = build_model_with_cfg(
        TinyVit,
        variant,
        pretrained,
        feature_cfg={'flatten_sequential': True, 'out_indices': out_indices},
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )
    if img_size is not None:
        _set_input_cfg(model, img_size)
    return model


def _register_model(fn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    # taking over the name from timm is the point: only the warning about it is silenced
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message=f'Overwriting {fn.__name__} in registry')
        return register_model(fn)


@_register_model
def tiny_vit_5m_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TinyViT-5M for 224x224 images."""
    variant_args = {
        'embed_dims': (64, 128, 160, 320),
        'depths': (2, 2, 6, 2),
        'num_heads': (2, 4, 5, 10),
        'window_sizes': (7, 7, 14, 7),
        'drop_path_rate': 0.,
    }
    return _create_tiny_vit('tiny_vit_5m_224', pretrained, variant_args, **kwargs)


@_register_model
def tiny_vit_11m_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TinyViT-11M for 224x224 images."""
    variant_args = {
        'embed_dims': (64, 128, 256, 448),
        'depths': (2, 2, 6, 2),
        'num_heads': (2, 4, 8, 14),
        'window_sizes': (7, 7, 14, 7),
        'drop_path_rate': 0.1,
    }
    return _create_tiny_vit('tiny_vit_11m_224', pretrained, variant_args, **kwargs)


@_register_model
def tiny_vit_21m_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TinyViT-21M for 224x224 images."""
    variant_args = {
        'embed_dims': (96, 192, 384, 576),
        'depths': (2, 2, 6, 2),
        'num_heads': (3, 6, 12, 18),
        'window_sizes': (7, 7, 14, 7),
        'drop_path_rate': 0.2,
    }
    return _create_tiny_vit('tiny_vit_21m_224', pretrained, variant_args, **kwargs)


@_register_model
def tiny_vit_21m_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TinyViT-21M for 384x384 images."""
    variant_args = {
        'embed_dims': (96, 192, 384, 576),
        'depths': (2, 2, 6, 2),
        'num_heads': (3, 6, 12, 18),
        'window_sizes': (12, 12, 24, 12),
        'drop_path_rate': 0.1,
    }
    return _create_tiny_vit('tiny_vit_21m_384', pretrained, variant_args, **kwargs)


@_register_model
def tiny_vit_21m_512(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TinyViT-21M for 512x512 images."""
    variant_args = {
        'embed_dims': (96, 192, 384, 576),
        'depths': (2, 2, 6, 2),
        'num_heads': (3, 6, 12, 18),
        'window_sizes': (16, 16, 32, 16),
        'drop_path_rate': 0.1,
    }
    return _create_tiny_vit('tiny_vit_21m_512', pretrained, variant_args, **kwargs)
