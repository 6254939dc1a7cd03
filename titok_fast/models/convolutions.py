"""Convolutions of the pixel networks, fused with what stands before and after them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast.models.packed import Packable, plain, untouched
from titok_fast.models.widened import Conv, linear
from titok_fast.ops import conv3x3, inspect, pack_conv3x3
from titok_fast.ops.arguments import DTYPES


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution that rounds as a linear layer does; cuDNN's rounds float32 to TF32.

    Args:
        in_channels: of the input.
        out_channels: of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, in_channels, H, W] to [B, out_channels, H, W]."""
        return linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


def group_norm(channels: int) -> nn.GroupNorm:
    """The normalisation of every VQGAN: 32 groups."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class PackableConv(Packable, Conv):
    """A 3x3 convolution, of which `convolve` makes the op `conv3x3` where that is faster."""

    _LEAST = 64  # channels; with fewer PyTorch is as fast

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def _arranged(self, weight: Tensor) -> Tensor | None:
        small = min(weight.shape[:2]) < self._LEAST
        missing = inspect.why_not("cpu", "cpu") is not None
        return None if small or missing or weight.dtype not in DTYPES else pack_conv3x3(weight)


def convolve(
    conv: nn.Module,
    x: Tensor,
    *,
    norm: nn.Module | None = None,
    upsample: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + conv(SiLU(norm(x))), with `upsample` at twice the height and width.

    One op on a CPU after `pack_weights`, and on a GPU with Triton; PyTorch's in turn otherwise.

    Args:
        conv: a `PackableConv`, or what a user has put in its place.
        x: [B, in_channels, H, W].
        norm: a GroupNorm or its replacement.
        upsample: nearest neighbours.
        residual: [B, out_channels, H, W], or twice the height and width.
    """
    fused = _fused(conv, x, norm, upsample, residual)
    if fused is not None:
        return fused
    if norm is not None:
        x = activated(norm, x)
    if upsample:
        x = F.interpolate(x, scale_factor=2.0)
    out: Tensor = conv(x)
    return out if residual is None else added(conv, out, residual)


def _fused(
    conv: Any, x: Tensor, norm: Any, upsample: bool, residual: Tensor | None
) -> Tensor | None:
    if not untouched(conv, PackableConv) or not (norm is None or untouched(norm, nn.GroupNorm)):
        return None
    others = (conv.bias, residual, *(norm.parameters() if norm is not None else ()))
    copy = conv._copy_for(x, *others)
    on_gpu = x.is_cuda and plain(x, conv.weight, *others) and _triton_takes(x.dtype)
    if copy is None and not on_gpu:
        return None
    options: dict[str, Any] = {"upsample": upsample, "residual": residual, "packed": copy}
    if norm is not None:
        options |= {"norm": norm.weight, "norm_bias": norm.bias}
        options |= {"num_groups": norm.num_groups, "norm_eps": norm.eps}
    return conv3x3(x, conv.weight, conv.bias, **options)


def _triton_takes(dtype: torch.dtype) -> bool:
    return dtype in DTYPES and inspect.why_not("triton", "cuda") is None


def activated(norm: nn.Module, x: Tensor) -> Tensor:
    """SiLU of norm(x), in its memory where nobody else needs that."""
    return F.silu(norm(x), inplace=_is_ours_alone(norm))


def added(module: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    """h + x for a module's output h, in its memory where nobody else needs that."""
    return h.add_(x) if _is_ours_alone(module) else h + x


def _is_ours_alone(module: nn.Module) -> bool:
    """Whether the module's output is new, without a gradient, and seen by no hook."""
    kinds = (nn.GroupNorm, nn.Conv2d, Conv, PackableConv)
    return not torch.is_grad_enabled() and any(untouched(module, kind) for kind in kinds)


def image_by_image(network: nn.Module, x: Tensor) -> Tensor:
    """network(x) for a network that treats every image alike.

    On a CPU one at a time, where no gradient is asked for: each op's result then fits into memory
    that the one before has freed, and a batch's would be fetched from the system, page by page.
    """
    traced = torch.compiler.is_compiling()  # perhaps for every number of images
    if traced or x.device.type != "cpu" or x.shape[0] < 2 or torch.is_grad_enabled():
        whole: Tensor = network(x)
        return whole
    return torch.cat([network(image) for image in x.split(1)])
