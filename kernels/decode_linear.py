"""A linear layer of at most 16 rows on the GPU, with its neighbours: bound by reading the weights.

A program owns a few outputs of every row. Its tiles of weights are wide and go to registers, one
tile ahead of the products and the first ahead of the norm's statistics, which so cost little time.
Each warp multiplies a slice of a tile's columns on the tensor cores; the slices are added at the
end.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titok_fast.kernels._arithmetic import dot, interpreted, rounded

# Integers of which no value is compiled into the kernel; with ALIGNED in units of 8 elements.
_UNITS = ("width", "x_stride", "weight_stride", "scale_stride", "shift_stride", "up_stride")
_SIZES = (*_UNITS, "batch", "size", "residual_stride", "residual_scale_stride", "out_stride")


@triton.jit
def _elements(units, ALIGNED: tl.constexpr):
    # Tells the compiler about alignment.
    return units * 8 if ALIGNED else units


@triton.jit
def _load(
    base,
    row,  # [ROWS]
    stride,
    start,
    width,
    EVICT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SLICES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # [SLICES, ROWS, DEPTH]; zeros past the width.
    within = tl.arange(0, SLICES)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    column = start + within
    first = row.to(tl.int64)[None, :, None] * _elements(tl.cast(stride, tl.int64), ALIGNED)
    return tl.load(base + first + column, mask=column < width, other=0.0, eviction_policy=EVICT)


@triton.jit(do_not_specialize=_SIZES)
def decode_linear_kernel(
    x,  # [B, W]
    weight,  # [N, W]
    norm,  # [W] or None, as are the others down to residual_scale
    scale,  # [B, W]
    shift,  # [B, W]
    up_weight,  # [N, W]
    residual,  # [B, N]
    residual_scale,  # [B, N]
    out,  # [B, N]
    norm_eps,
    batch,
    size,
    width,
    x_stride,
    weight_stride,
    scale_stride,
    shift_stride,
    up_stride,
    residual_stride,
    residual_scale_stride,
    out_stride,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCK_K: tl.constexpr = SLICES * DEPTH
    width = _elements(width, ALIGNED)
    # Past the end comes the last row again: it is not stored.
    row = tl.minimum(tl.arange(0, ROWS), batch - 1)
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.minimum(column, size - 1)

    w = _load(weight, own, weight_stride, 0, width, "evict_first", ALIGNED, SLICES, DEPTH)
    if up_weight is not None:
        up = _load(up_weight, own, up_stride, 0, width, "evict_first", ALIGNED, SLICES, DEPTH)
    if norm is not None:
        squares = tl.zeros([SLICES, ROWS], tl.float32)
        for start in tl.range(0, width, BLOCK_K):
            h = _load(x, row, x_stride, start, width, "", ALIGNED, SLICES, DEPTH).to(tl.float32)
            squares += tl.sum(h * h, axis=2)
        rstd = tl.rsqrt(tl.sum(squares, axis=0) / width + norm_eps)[None, :, None]

    acc = tl.zeros([SLICES, ROWS, BLOCK_N], tl.float32)
    up_acc = tl.zeros([SLICES, ROWS, BLOCK_N], tl.float32)
    for start in tl.range(0, width, BLOCK_K):
        ahead = start + BLOCK_K
        next_w = _load(
            weight, own, weight_stride, ahead, width, "evict_first", ALIGNED, SLICES, DEPTH
        )
        if up_weight is not None:
            next_up = _load(
                up_weight, own, up_stride, ahead, width, "evict_first", ALIGNED, SLICES, DEPTH
            )
        h = _load(x, row, x_stride, start, width, "", ALIGNED, SLICES, DEPTH).to(tl.float32)
        if norm is not None:
            h *= rstd * _load(norm, row, 0, start, width, "", ALIGNED, SLICES, DEPTH)
        if scale is not None:
            h *= _load(scale, row, scale_stride, start, width, "", ALIGNED, SLICES, DEPTH)
        if shift is not None:
            h += _load(shift, row, shift_stride, start, width, "", ALIGNED, SLICES, DEPTH)
        h = rounded(h, x.dtype.element_ty, PRECISION)
        acc = dot(h, tl.permute(w, [0, 2, 1]), acc, PRECISION)
        w = next_w
        if up_weight is not None:
            up_acc = dot(h, tl.permute(up, [0, 2, 1]), up_acc, PRECISION)
            up = next_up

    y = tl.sum(acc, axis=0)  # [ROWS, BLOCK_N]
    if up_weight is not None:
        y *= tl.sigmoid(y) * tl.sum(up_acc, axis=0)
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    column = column[None, :]
    inside = (row < batch) & (column < size)
    if residual_scale is not None:
        y *= tl.load(residual_scale + row * residual_scale_stride + column, inside, 0.0)
    if residual is not None:
        y += tl.load(residual + row * residual_stride + column, inside, 0.0)
    tl.store(out + row * out_stride + column, rounded(y, out.dtype.element_ty, PRECISION), inside)


def _options(batch: int, size: int, dtype: torch.dtype, aligned: bool, up: bool) -> dict[str, Any]:
    # Narrow blocks occupy every multiprocessor, wide ones repeat less of the norm.
    many = batch > 4
    wide = size >= 4096 or many
    depth = 64 if wide else 128
    if dtype == torch.float32:  # whose products take all operands from registers
        depth //= 4 if many else 2
    elif many and not aligned:
        depth //= 2
    # A register limit keeps the compiler from trading spills for occupancy.
    heavy = many or (dtype == torch.float32 and batch > 2 and wide)
    limit = {"maxnreg": 255 if up else 128} if heavy else {}
    return {
        "ALIGNED": aligned,
        "ROWS": max(2, triton.next_power_of_2(batch)),
        "BLOCK_N": 16 if wide else 8,
        "SLICES": 8,
        "DEPTH": depth,
        "PRECISION": "ieee",
        "num_warps": 8,
        "num_stages": 1,
        **limit,
    }


def launch_decode_linear(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    norm_eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    up_weight: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    out: Tensor,
) -> None:
    """Fills `out` [B, N]; the last dimension of every argument is dense.

    Args:
        x: [B, W], B up to 16; float32, float16 or bfloat16, as is everything here.
        weight: [N, W].
        norm: [W].
        norm_eps: of RMSNorm.
        scale: [B, W].
        shift: [B, W].
        up_weight: [N, W].
        residual: [B, N].
        residual_scale: [B, N].
        out: [B, N].
    """
    (batch, width), size = x.shape, weight.shape[0]
    if batch == 0:
        return
    strides = [
        0 if tensor is None or len(tensor) == 1 else tensor.stride(0)
        for tensor in (x, weight, scale, shift, up_weight, residual, residual_scale, out)
    ]
    units = [width, *strides[:5]]
    aligned = all(unit % 8 == 0 for unit in units)
    if aligned:
        units = [unit // 8 for unit in units]
    options = _options(batch, size, x.dtype, aligned, up_weight is not None)
    decode_linear_kernel[(triton.cdiv(size, options["BLOCK_N"]),)](
        x, weight, norm, scale, shift, up_weight, residual, residual_scale, out, norm_eps,
        batch, size, *units, *strides[5:], **interpreted(x, options),
    )  # fmt: skip


def launch_examples(main: bool = False) -> None:
    """Launches, on the meta device, of a transformer's layers.

    Args:
        main: only in bfloat16 and for two rows.
    """
    kinds = [(torch.bfloat16, 2, 1024)]
    if not main:
        kinds += [(torch.float16, 2, 1024)]
        kinds += [
            (dtype, batch, size)
            for dtype in (torch.bfloat16, torch.float32)
            for batch in (2, 4, 8, 16)
            for size in (1024, 16384)
        ]
    for dtype, batch, size in kinds:
        for width in (1024,) if main else (1024, 1020):  # with 1020 rows are not aligned
            x = torch.empty(batch, width, dtype=dtype, device="meta")
            weight, out = x.new_empty(size, width), x.new_empty(batch, size)
            modulated = x.new_empty(width), 1e-6, x, x
            launch_decode_linear(x, weight, *modulated, None, None, None, out)
            launch_decode_linear(x, weight, *modulated, weight, None, None, out)
            launch_decode_linear(x, weight, None, 0.0, None, None, None, out, out, out)
            launch_decode_linear(x, weight, None, 0.0, None, None, None, None, None, out)
