"""A linear layer of a decoding step, with its neighbours, in eager PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    norm_eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    up_weight: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
) -> Tensor:
    """The public op; differentiable, for any number of rows, and for float64 too.

    The normalised input is rounded to the dtype of `x` before the products, which are in float32
    (float64 for float64), as is all after them up to the result.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    if norm is not None:
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norm_eps) * norm.to(wide)
    if scale is not None:
        h = h * scale.to(wide)
    if shift is not None:
        h = h + shift.to(wide)
    h = h.to(x.dtype).to(wide)
    out = h @ weight.to(wide).mT
    if up_weight is not None:
        out = F.silu(out) * (h @ up_weight.to(wide).mT)
    if residual_scale is not None:
        out = out * residual_scale.to(wide)
    if residual is not None:
        out = out + residual.to(wide)
    return out.to(x.dtype)
