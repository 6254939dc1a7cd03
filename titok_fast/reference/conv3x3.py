"""A 3x3 convolution with its neighbours, in eager PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    norm_bias: Tensor | None = None,
    num_groups: int = 32,
    norm_eps: float = 1e-6,
    upsample: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """The public op; differentiable, and for float64 too.

    Everything is in float32 (float64 for float64), and the result rounded once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)

    def widened(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(wide)

    h = x.to(wide)
    if norm is not None:
        h = F.silu(F.group_norm(h, num_groups, widened(norm), widened(norm_bias), norm_eps))
    if upsample:
        h = F.interpolate(h, scale_factor=2.0)
    out = F.conv2d(h, weight.to(wide), widened(bias), padding=1)
    if residual is not None:
        out = out + residual.to(wide)
    return out.to(x.dtype)
