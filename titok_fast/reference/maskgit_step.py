"""One MaskGIT sampling step in eager PyTorch; every backend repeats its arithmetic to the bit."""

import math

import torch
from torch import Tensor

from titok_fast.reference.attention import philox

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
_WORD = 0xFFFFFFFF
_LIMB = (1 << 30) - 1


def random_words(seed: Tensor, image: Tensor, step: Tensor, position: Tensor, draw: int) -> Tensor:
    """Philox words [..., 4] of counter (image, step, position, draw), each modulo 2^32."""
    counter = (image, step, position, torch.full_like(position, draw))
    return torch.stack(philox(tuple(word & _WORD for word in counter), seed), -1)


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


def maskgit_step(
    cond_logits: Tensor,
    ids: Tensor,
    *,
    mask_id: int,
    num_masked: Tensor,
    uncond_logits: Tensor | None,
    guidance_scale: Tensor,
    guidance_form: str,
    softmax_temperature: Tensor,
    token_temperature: Tensor,
    confidence: str,
    confidence_temperature: Tensor,
    seed: Tensor,
    step: Tensor,
    image_ids: Tensor | None,
    positions: Tensor | None,
    noise: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The public op's `(ids_next, tokens, confidence)`; every number is a tensor on the device.

    Counts, seeds and steps are int64, temperatures and the scale float32, each with shape [];
    `num_masked` has shape [] or [B].
    """
    batch, length, _ = cond_logits.shape
    device = ids.device
    masked = ids == mask_id
    if batch * length == 0:
        return ids.clone(), ids.clone(), ids.float()
    logits = combine(cond_logits, uncond_logits, guidance_scale, guidance_form)  # [B, L, V]
    largest = logits.masked_fill(logits.isnan(), -math.inf).amax(-1, keepdim=True)

    images = torch.arange(batch, device=device) if image_ids is None else image_ids
    columns = torch.arange(length, device=device).expand(batch, length)
    positions = columns if positions is None else positions
    words = random_words(seed, images[:, None], step, positions, 0)
    sharp = weights(logits, largest, sharpness(softmax_temperature, token_temperature))
    drawn = draw(sharp, words[..., 0].contiguous(), words[..., 1].contiguous())
    uniform = (words[..., 2].double() + 0.5) * 2.0**-32
    if noise is not None:
        uniform = noise[1].double()
        drawn = argmax(logits / softmax_temperature + token_temperature * gumbel(noise[0].double()))
    tokens = torch.where(token_temperature == 0, argmax(logits), drawn)  # [B, L]

    score = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    nothing = ~(score > -math.inf)
    if confidence == "logit":
        score = score / softmax_temperature
    else:
        largest = largest.squeeze(-1)
        total = weights(logits, largest.unsqueeze(-1), sharpness(softmax_temperature)).sum(-1)
        total = total.clamp(min=1).double() * 2.0**-WEIGHT_BITS
        score = ((score - largest.clamp(max=FLOAT_MAX)) / softmax_temperature).clamp(max=0.0)
        score = score - natural_log(total).float()
    score = score + confidence_temperature * gumbel(uniform)
    score = score.masked_fill(nothing | score.isnan(), -math.inf) + 0.0  # never -0.0

    # A stable sort of the masked positions by confidence leaves ties in order of position.
    order = score.masked_fill(~masked, math.inf).argsort(dim=-1, stable=True)
    order = order.gather(
        -1, (~masked).gather(-1, order).to(torch.uint8).argsort(dim=-1, stable=True)
    )
    rank = torch.empty_like(order).scatter_(-1, order, columns)
    again = masked & (rank < num_masked.reshape(-1, 1))
    tokens = torch.where(masked, tokens, ids)
    return torch.where(again, mask_id, tokens), tokens, score.masked_fill(~masked, math.inf)
