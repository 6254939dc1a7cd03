"""Random numbers and tokens drawn by them in eager PyTorch: what csrc/draw.h is in C++.

Every backend repeats this arithmetic to the bit.
"""

import math

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
FLOAT_MAX = torch.finfo(torch.float32).max
WEIGHT_BITS, WIDE_BITS = 30, 40
UNIFORM_FLOOR = 1e-20  # the official code's guard against log(0)
_LOWEST = -40.0  # 2^-40 is far below half a weight
_WIDE_LOWEST = -41.0  # below 2^-40, where wide weights end
_MAGIC = 12582912.0 + WEIGHT_BITS  # 1.5 * 2^23: a sum with it is rounded to an integer
# 2^f = 1 + f (c1 + f (c2 + ...)) on [-1/2, 1/2]
_EXP2 = tuple(
    map(
        float.fromhex,
        ("0x1.5bba14p-10", "0x1.3cea88p-7", "0x1.c6b752p-5", "0x1.ebf9bcp-3", "0x1.62e42ap-1"),
    )
)
_LIMB = (1 << 30) - 1
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words for each counter, the same on every device.

    Args:
        counter: four int64 tensors of values below 2**32 that broadcast together.
        seed: [] int64, whose low and high halves are the key.

    Returns:
        Four int64 tensors of the common shape, uniform in [0, 2**32).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    a, b, c, d = torch.broadcast_tensors(*counter)
    low, high = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # A 64-bit product may wrap below zero; its bits are right.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((second >> 32) & _LOW) ^ b ^ low,
            second & _LOW,
            ((first >> 32) & _LOW) ^ d ^ high,
            first & _LOW,
        )
        low, high = (low + _WEYL[0]) & _LOW, (high + _WEYL[1]) & _LOW
    return a, b, c, d


def random_words(seed: Tensor, image: Tensor, step: Tensor, position: Tensor, draw: int) -> Tensor:
    """Philox words [..., 4] of counter (image, step, position, draw), each modulo 2^32."""
    counter = (image, step, position, torch.full_like(position, draw))
    return torch.stack(philox(tuple(word & _LOW for word in counter), seed), -1)


def natural_log(x: Tensor) -> Tensor:
    """log of positive float64, by additions, multiplications and a division alone."""
    mantissa, exponent = torch.frexp(x)
    low = mantissa < math.sqrt(0.5)
    mantissa = torch.where(low, mantissa + mantissa, mantissa)
    exponent = (exponent - low.to(exponent.dtype)).to(x.dtype)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = torch.full_like(x, 1.0 / 23.0)
    for odd in range(21, 0, -2):  # atanh
        series = series * square + 1.0 / odd
    return exponent * LN_2 + s * 2.0 * series


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, of float64 uniforms."""
    inner = -natural_log(uniform.clamp(min=UNIFORM_FLOOR))
    return -natural_log(inner.clamp(min=UNIFORM_FLOOR)).float()


def sharpness(*temperatures: Tensor) -> Tensor:
    """Factor from a difference of logits to an exponent of 2, float32 []; never negative or NaN."""
    product = torch.ones_like(temperatures[0], dtype=torch.float64)
    for temperature in temperatures:
        product = product * temperature.double()
    factor = torch.full_like(product, LOG2_E) / product  # a number / x rounds twice
    return torch.where(factor > 0, factor, 0.0).clamp(max=FLOAT_MAX).float()


def exponents(logits: Tensor, largest: Tensor, factor: Tensor, lowest: float) -> Tensor:
    """factor (logits - largest), within [lowest, 0]; NaN and -inf are `lowest`, +inf is 0."""
    t = (logits - largest.clamp(max=FLOAT_MAX)) * factor
    return torch.where(t > lowest, t, lowest).clamp(max=0.0)


def power_of_two(t: Tensor) -> tuple[Tensor, Tensor]:
    """2^t as a mantissa, about 1, times 2^n, where n + WEIGHT_BITS ends the second's bits."""
    shifted = t + _MAGIC
    f = t - (shifted - _MAGIC)
    p = torch.full_like(f, _EXP2[0])
    for coefficient in (*_EXP2[1:], 1.0):
        p = p * f + coefficient
    return p, shifted


def weights(logits: Tensor, largest: Tensor, factor: Tensor) -> Tensor:
    """round(2^30 2^(factor (logits - largest))) as int64; 0 for NaN and -inf.

    Sums of integers have one value in any order, so that every backend draws the same token.
    """
    p, shifted = power_of_two(exponents(logits, largest, factor, _LOWEST))
    scaled = (p.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)
    return scaled.round().long()


def wide_weights(logits: Tensor, largest: Tensor, factor: Tensor) -> Tensor:
    """floor(2^40 2^(factor (logits - largest))) as int64; 0 for NaN and -inf."""
    p, shifted = power_of_two(exponents(logits, largest, factor, _WIDE_LOWEST))
    return (p * 2.0**30).long() << (WIDE_BITS - 30) >> (_MAGIC - shifted).long()


def scaled_uniform(high: Tensor, low: Tensor, total: Tensor) -> Tensor:
    """floor(u total) for u = (2^32 high + low) / 2^64 and total < 2^60, exact, in [0, total)."""
    product = torch.zeros_like(total)
    for word in (low, high):  # floor((word total + product) / 2^32)
        product = (word * (total >> 30) + ((word * (total & _LIMB) + product) >> 30)) >> 2
    return product


def draw(weights: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Index [...] drawn in proportion to integer weights [..., V]; 0 where all are zero."""
    cumulative = weights.cumsum(-1)
    target = scaled_uniform(high, low, cumulative[..., -1])
    index = torch.searchsorted(cumulative, target.unsqueeze(-1), right=True).squeeze(-1)
    return index.where(cumulative[..., -1] > 0, 0)


def combine(cond: Tensor, uncond: Tensor | None, scale: Tensor, form: str) -> Tensor:
    """Guided logits, float32."""
    cond = cond.float()
    if uncond is None:
        return cond
    uncond = uncond.float()
    return (cond if form == "cond" else uncond) + scale * (cond - uncond)


def argmax(values: Tensor) -> Tensor:
    """Lowest index of the largest value that is not NaN; 0 where none is above -inf."""
    values = values.masked_fill(values.isnan(), -math.inf)
    return (values == values.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
