"""Arithmetic that kernels share, and what Triton's interpreter lacks of it."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "widened":  # Triton's interpreter cannot multiply bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    if PRECISION == "widened":  # its conversion to bfloat16 truncates
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def powers(largest, SCALE: tl.constexpr):
    # Powers of two that bring the largest entry to 2^SCALE..2^(SCALE + 1) and back.
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 21)
    down = ((254 - exponent + SCALE) << 23).to(tl.float32, bitcast=True)
    up = ((exponent - SCALE) << 23).to(tl.float32, bitcast=True)
    return down, up


def interpreted(x: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a launch, with "PRECISION" as the interpreter needs it for `x`."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return {**options, "PRECISION": "widened"}
    return options
