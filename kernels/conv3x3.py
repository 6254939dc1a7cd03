"""GroupNorm and SiLU of feature maps that lie pixel by pixel, for the convolution that follows.

Three kernels: the moments of each channel over a chunk of pixels, about the chunk's own mean; their
combination into a mean and a factor of each channel; and one pass that applies them. Every sum has
one order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titok_fast.kernels._arithmetic import interpreted, rounded

_PIXELS = 64  # of a chunk
_APPLIED = 16  # of a program of the last pass
_CHUNKS = 64  # that are combined at a time
_MOST_IMAGES = 65_535  # of a launch: they are its grid's last axis
_SIZES = ("pixels", "chunks")


@triton.jit(do_not_specialize=_SIZES)
def moments_kernel(
    x,  # [B, P, C]
    moments,  # [B, 2, chunks, C] float32: means, and sums of squared distances to them
    pixels,
    chunks,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    chunk, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    pixel = chunk * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
    where = (image * pixels + pixel)[:, None] * C + channel[None, :]
    value = tl.load(x + where, inside, 0.0).to(tl.float32)
    count = tl.minimum(pixels - chunk * PIXELS, PIXELS).to(tl.float32)
    # Sums are of differences to one of the values, so that nothing is left of a constant group.
    corner = x + (image * pixels + chunk * PIXELS) * C + channel
    first = tl.load(corner, channel < C, 0.0).to(tl.float32)
    total = tl.sum(tl.where(inside, value - first[None, :], 0.0), axis=0)
    mean = first + total / count
    distance = tl.where(inside, value - mean[None, :], 0.0)
    out = moments + (image * 2 * chunks + chunk) * C + channel
    tl.store(out, mean, channel < C)
    tl.store(
        out + chunks.to(tl.int64) * C,
        tl.sum(distance * distance, axis=0),
        channel < C,
    )


@triton.jit
def _chunks(
    start,
    pixels,
    chunks,
    group,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # Of a group's channels: what is there and where, [CHUNKS, WIDTH], and pixels, [CHUNKS, 1].
    chunk, within = start + tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
    inside = (chunk < chunks)[:, None] & (within < GROUP)[None, :]
    where = chunk.to(tl.int64)[:, None] * C + (group * GROUP + within)[None, :]
    return inside, where, tl.minimum(pixels - chunk * PIXELS, PIXELS).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=_SIZES)
def scales_kernel(
    moments,  # [B, 2, chunks, C] float32
    norm,  # [C]
    scales,  # [B, 2, C] float32: means and factors
    norm_eps,
    pixels,
    chunks,
    C: tl.constexpr,
    GROUP: tl.constexpr,  # channels of a group
    WIDTH: tl.constexpr,  # at least as many
    PIXELS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    within = tl.arange(0, WIDTH)
    channel = group * GROUP + within
    means = moments + image * 2 * chunks * C
    squares = means + chunks.to(tl.int64) * C

    first = tl.load(means + group * GROUP)
    total = tl.zeros([CHUNKS, WIDTH], tl.float32)
    for start in tl.range(0, chunks, CHUNKS):
        inside, where, count = _chunks(
            start, pixels, chunks, group, C, GROUP, WIDTH, PIXELS, CHUNKS
        )
        total += tl.where(inside, tl.load(means + where, inside, 0.0) - first, 0.0) * count
    size = pixels.to(tl.float32) * GROUP
    mean = first + tl.sum(tl.sum(total, axis=0), axis=0) / size

    total = tl.zeros([CHUNKS, WIDTH], tl.float32)
    for start in tl.range(0, chunks, CHUNKS):
        inside, where, count = _chunks(
            start, pixels, chunks, group, C, GROUP, WIDTH, PIXELS, CHUNKS
        )
        distance = tl.where(inside, tl.load(means + where, inside, 0.0) - mean, 0.0)
        total += tl.load(squares + where, inside, 0.0) + distance * distance * count
    rstd = tl.rsqrt(tl.sum(tl.sum(total, axis=0), axis=0) / size + norm_eps)

    inside = within < GROUP
    factor = tl.load(norm + channel, inside, 0.0).to(tl.float32) * rstd
    out = scales + image * 2 * C + channel
    tl.store(out, tl.zeros([WIDTH], tl.float32) + mean, inside)
    tl.store(out + C, factor, inside)


@triton.jit(do_not_specialize=_SIZES)
def norm_silu_kernel(
    x,  # [B, P, C]
    scales,  # [B, 2, C] float32
    norm_bias,  # [C]
    out,  # [B, P, C]
    pixels,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
    where = (image * pixels + pixel)[:, None] * C + channel[None, :]
    own = scales + image * 2 * C + channel
    mean = tl.load(own, channel < C, 0.0)
    factor = tl.load(own + C, channel < C, 0.0)
    bias = tl.load(norm_bias + channel, channel < C, 0.0).to(tl.float32)
    h = (tl.load(x + where, inside, 0.0).to(tl.float32) - mean[None, :]) * factor[None, :]
    h += bias[None, :]
    h *= tl.sigmoid(h)
    tl.store(out + where, rounded(h, out.dtype.element_ty, PRECISION), inside)


def _tile(channels: int, pixels: int) -> dict[str, Any]:
    least = min(128, triton.next_power_of_2(channels))
    return {"C": channels, "PIXELS": pixels, "CHANNELS": least}


def _group(channels: int, num_groups: int) -> dict[str, Any]:
    group = channels // num_groups
    width = triton.next_power_of_2(group)
    return {"C": channels, "GROUP": group, "WIDTH": width, "PIXELS": _PIXELS, "CHUNKS": _CHUNKS}


def launch_norm_silu(
    x: Tensor, norm: Tensor, norm_bias: Tensor, num_groups: int, norm_eps: float, out: Tensor
) -> None:
    """Fills `out` with SiLU(GroupNorm(x)), computed in float32.

    Args:
        x: [B, H, W, C], contiguous; float32, float16 or bfloat16, as is everything here.
        norm: [C], contiguous.
        norm_bias: [C], contiguous.
        num_groups: a divisor of C.
        norm_eps: of GroupNorm.
        out: like x.
    """
    batch, height, width, channels = x.shape
    if batch == 0:
        return
    if batch > _MOST_IMAGES:
        for part, into in zip(x.split(_MOST_IMAGES), out.split(_MOST_IMAGES), strict=True):
            launch_norm_silu(part, norm, norm_bias, num_groups, norm_eps, into)
        return
    pixels = height * width
    chunks = triton.cdiv(pixels, _PIXELS)
    moments = torch.empty((batch, 2, chunks, channels), dtype=torch.float32, device=x.device)
    scales = torch.empty((batch, 2, channels), dtype=torch.float32, device=x.device)

    def grid(options: dict[str, Any]) -> tuple[int, int, int]:
        across = triton.cdiv(channels, options["CHANNELS"])
        return triton.cdiv(pixels, options["PIXELS"]), across, batch

    moments_kernel[grid](x, moments, pixels, chunks, **_tile(channels, _PIXELS))
    scales_kernel[(num_groups, batch)](
        moments, norm, scales, norm_eps, pixels, chunks, **_group(channels, num_groups)
    )
    options = interpreted(x, {**_tile(channels, _APPLIED), "PRECISION": "ieee"})
    norm_silu_kernel[grid](x, scales, norm_bias, out, pixels, **options)


def launch_examples(main: bool = False) -> None:
    """Launches, on the meta device, of the numbers of channels that models have.

    Args:
        main: only 512 channels in bfloat16.
    """
    for dtype in (torch.bfloat16,) if main else (torch.bfloat16, torch.float16, torch.float32):
        for channels in (512,) if main else (32, 128, 256, 512, 1024):
            x = torch.empty(8, 32, 32, channels, dtype=dtype, device="meta")
            norm = x.new_empty(channels)
            launch_norm_silu(x, norm, norm, 32, 1e-6, torch.empty_like(x))
