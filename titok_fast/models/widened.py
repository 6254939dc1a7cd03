"""16-bit layers on CPUs that multiply 16 bits slower than float32: widened, and rounded once."""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast.ops import inspect

# None: this PyTorch does not say.
HAS_AMX = getattr(torch.cpu, "_is_amx_tile_supported", lambda: None)()


def _widened() -> dict[torch.dtype, int]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return {}
    if not torch.backends.mkldnn.is_available():
        return {torch.bfloat16: 0, torch.float16: 0}
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    float16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    # PyTorch's loops take ten times as long as float32's products.
    rows = {} if bfloat16 else {torch.bfloat16: 0}
    rows |= {} if float16 else {torch.float16: 0}
    # Of Intel's CPUs those that have float16, too, multiply bfloat16 at half float32's rate but for
    # AMX, which a virtual machine may hide.
    if bfloat16 and float16 and HAS_AMX is False and "Intel" in inspect.cpu_name():
        rows[torch.bfloat16] = 128
    return rows


# Of 16 bits, what this CPU multiplies slower than float32, and how many rows it takes for a product
# to save the time that widening a weight costs.
WIDENED = _widened()


def widens(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these on the CPU is to be taken in float32, and rounded once."""
    if x.device.type != "cpu" or x.dtype not in WIDENED or x.dtype != weight.dtype:
        return False
    enough = x.numel() >= WIDENED[x.dtype] * weight.shape[1]
    return enough and not torch.is_autocast_enabled("cpu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for x [..., in], W [out, in] and b [out]; [..., out]."""
    if not widens(x, weight):
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.float()
    return F.linear(x.float(), weight.float(), bias).to(x.dtype)


class Linear(nn.Linear):
    """`nn.Linear`; in float32, rounded once, where the CPU's product of 16 bits takes longer."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features]."""
        return linear(x, self.weight, self.bias)


class Conv(nn.Conv2d):
    """`nn.Conv2d`; likewise."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, in_channels, H, W] to [B, out_channels, H', W']."""
        if not widens(x, self.weight):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        out: Tensor = self._conv_forward(x.float(), self.weight.float(), bias)
        return out.to(x.dtype)
