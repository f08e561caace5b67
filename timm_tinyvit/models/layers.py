"""Layers that compute what timm's and torch's do, faster.

Each layer decides by itself from the tensor that it gets, so that a model made of them has one forward for all devices,
and whoever hooks or replaces a module sees it called as in timm. Nothing that derives from the weights is ever cached.

On a CPU every convolution gets channels-last memory and takes in its batch norm, in every forward pass, whenever the
norm uses running statistics; linear layers go where AVX-512 is used, and inference takes a few images at a time where
that keeps the activations in the cache. On a GPU the stem makes the images channels-last and everything behind it stays
so; batch norm stays by itself, one kernel like the bias that folding would leave; and layer norm keeps to autocast's
dtype in inference.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import nn
from torch.nn.modules import module as torch_module

__all__ = ['GELU', 'ConvNorm', 'FusedConv', 'LayerNorm', 'Linear', 'in_slices', 'takes_mask', 'to_channels_last']

_TENSOR_TYPES = (torch.Tensor, nn.Parameter)
_GLOBAL_HOOKS = (
    '_global_forward_hooks', '_global_forward_pre_hooks', '_global_backward_hooks', '_global_backward_pre_hooks')


def _is_cpu(x: torch.Tensor) -> bool:
    # what is traced or exported may run elsewhere, and a proxy or a subclass has no device to go by
    return (
        type(x) in _TENSOR_TYPES and x.is_cpu
        and not torch.jit.is_tracing() and not torch.compiler.is_exporting()
    )


def _is_hooked(*modules: nn.Module) -> bool:
    # accelerate hooks a module by giving it a `forward` of its own
    return any(getattr(torch_module, name) for name in _GLOBAL_HOOKS) or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        or 'forward' in m.__dict__
        for m in modules
    )


def _is_plain(module: nn.Module, module_type: type[nn.Module]) -> bool:
    # a hook, or another class (a parametrised weight, a converted norm), has a right to see the module called
    return type(module) is module_type and not _is_hooked(module)


# On x86 PyTorch gives a linear layer to MKL, which keeps to AVX2 on processors that are not Intel's, and a convolution
# to oneDNN, which uses AVX-512 on all of them.
_HAS_MKL_AND_ONEDNN = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def _prefers_conv(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        _HAS_MKL_AND_ONEDNN and type(weight) in _TENSOR_TYPES and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled('cpu')
        and (torch.compiler.is_compiling() or torch.backends.mkldnn.enabled)
    )


def _linear_by_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` of [..., in], as a 1x1 convolution of what looks like channels-last images."""
    if torch.compiler.is_compiling():
        # the compiler wants a height and a width; tokens [B, N, C] come from square windows
        y = x if x.ndim == 4 else x.reshape(x.shape[0], math.isqrt(x.shape[1]), -1, x.shape[-1])
    else:
        num_rows = x.numel() // x.shape[-1]
        if num_rows < 128:  # too few to be worth the convolution's overhead
            return F.linear(x, weight, bias)
        # with a single thread, PyTorch gives batches below 16 to a slower kernel; up to 64, the split costs nothing
        y = x.reshape(next((n for n in range(16, 65) if num_rows % n == 0), 1), -1, 1, x.shape[-1])
    y = F.conv2d(y.permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


@register_notrace_module
class Linear(nn.Linear):
    """Linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return F.linear(x, self.weight, self.bias)
        else:
            linear = _linear_by_conv if _is_cpu(x) and _prefers_conv(x, self.weight) else F.linear
            return linear(x, self.weight, self.bias)


@register_notrace_module
class LayerNorm(nn.LayerNorm):
    """Layer norm, which autocast gives to float32: on a GPU, that costs inference two casts and twice the memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        else:
            if not x.is_cuda or torch.is_grad_enabled() or not torch.is_autocast_enabled('cuda'):
                return super().forward(x)
            dtype = torch.get_autocast_dtype('cuda')
            with torch.autocast('cuda', enabled=False):
                return F.layer_norm(
                    x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps)


@register_notrace_module
class GELU(nn.GELU):
    """GELU, of what lies contiguously in memory: the CPU is slow on channels-last images [B, C, H, W]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return F.gelu(x, approximate=self.approximate)
        else:
            if _is_cpu(x) and x.ndim == 4 and x.stride(1) == 1:
                return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return super().forward(x)


def to_channels_last(x: torch.Tensor) -> torch.Tensor:
    """Images [B, C, H, W] in channels-last memory."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # vmap knows no memory formats


def _conv(layer: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if _is_cpu(x):
        x = to_channels_last(x)
        pointwise = layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
        if pointwise and not torch.compiler.is_compiling() and _prefers_conv(x, weight):
            return _linear_by_conv(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return layer._conv_forward(x, weight, bias)


@register_notrace_module
class FusedConv(nn.Conv2d):
    """Convolution that has taken in its batch norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        else:
            return _conv(self, x, self.weight, self.bias)


@register_notrace_module
class ConvNorm(nn.Sequential):
    """Convolution and batch norm, run as one convolution where that is faster and the norm uses running statistics."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            kernel_size: int = 1,
            stride: int = 1,
            padding: int = 0,
            groups: int = 1,
            bn_weight_init: float = 1.,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.bn_weight_init = bn_weight_init
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding, groups=groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_chs, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.bn.weight, self.bn_weight_init)
        nn.init.zeros_(self.bn.bias)

    def _folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        # in at least float32: a product of two low-precision factors would be rounded twice
        bn, dtype = self.bn, self.conv.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        scale = bn.weight.to(wide) * torch.rsqrt(bn.running_var.to(wide) + bn.eps)
        weight = self.conv.weight.to(wide) * scale[:, None, None, None]
        bias = bn.bias.to(wide) - bn.running_mean.to(wide) * scale
        return weight.to(dtype), bias.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.bn(self.conv(x))
        else:
            return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        conv, bn = self.conv, self.bn
        if x.is_cuda or not _is_plain(conv, nn.Conv2d):
            return bn(conv(x))
        if (
            bn.training or conv.bias is not None or not _is_plain(bn, nn.BatchNorm2d)
            or bn.running_var is None or bn.weight is None
        ):
            return bn(_conv(conv, x, conv.weight, conv.bias))
        return _conv(conv, x, *self._folded())

    @torch.no_grad()
    def fuse(self) -> FusedConv:
        """Fold the norm for good, as `timm.utils.reparameterize_model` asks; names in the state dict change."""
        conv = self.conv
        weight, bias = self._folded()
        fused = FusedConv(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, device=weight.device, dtype=weight.dtype)
        fused.weight.copy_(weight)
        fused.bias.copy_(bias)
        return fused.train(self.training)


def takes_mask(mask: torch.Tensor) -> bool:
    """Whether fused attention is fast with this mask.

    The CPU's takes no mask that needs a gradient, and PyTorch's own fallback is slower than writing attention out.
    """
    if torch.jit.is_scripting():
        return True
    else:
        return not (mask.requires_grad and _is_cpu(mask))


# Large enough to keep the processor busy, small enough for its cache and for memory that malloc does not give back.
_SLICE_BYTES = 8 * 2 ** 20


def in_slices(
        forward: Callable[[nn.Module, torch.Tensor], torch.Tensor],
) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """Let a forward run on a few images at a time, so that what lies between its layers stays in the CPU's cache.

    Args:
        forward: The method of a module that treats each image of a batch [B, ...] by itself. The module's `expansion`
            says how many values there are at the widest place between its layers for each one that comes in.

    Returns:
        The method, which takes the batch as a whole where gradients are wanted or a layer trains or is hooked.
    """

    @functools.wraps(forward)
    def sliced(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not _is_cpu(x) or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return forward(self, x)
        size = max(1, int(_SLICE_BYTES // (math.prod(x.shape[1:]) * self.expansion * x.element_size())))
        if size < x.shape[0]:
            layers = list(self.modules())[1:]
            # a batch norm that trains or has no running statistics looks at all images together
            by_itself = not any(layer.training or getattr(layer, 'running_var', layer) is None for layer in layers)
            if by_itself and not _is_hooked(*layers):
                return torch.cat([forward(self, images) for images in x.split(size)])
        return forward(self, x)

    return sliced
