"""Bidirectional attention on the GPU, on packed queries, keys and values.

A program of the forward owns a tile of rows and steps over the keys; one of the backward owns the
gradient of a tile of queries, or of keys and values, and steps over the other side. A short
sequence is one program to a head, of as few warps as its tile needs. Most sequences here have a
few rows over a power of two, so both a short tile and the last step may be a small tail.
Derivation: docs/ops/attention.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titok_fast.kernels._arithmetic import LOG2E, dot, interpreted, rounded
from titok_fast.kernels._device import device_of

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
# Integers of which no value is compiled into a kernel.
_SIZES = (
    "length", "heads", "tiles", "batch_stride", "row_stride", "part_stride", "head_stride",
    "threshold",
)  # fmt: skip
_GRAD_STRIDES = ("grad_batch_stride", "grad_row_stride", "grad_head_stride")


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    return dot(a, b, tl.zeros([a.shape[0], b.shape[1]], tl.float32), PRECISION)


@triton.jit
def _load(base, row_stride, first, length, ROWS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, DIM)
    where = base + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    return tl.load(where, mask=(row < length)[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _store(
    values,  # [ROWS, DIM] float32
    base,
    row_stride,
    first,
    length,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = first + tl.arange(0, values.shape[0])
    column = tl.arange(0, values.shape[1])
    where = base + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    inside = (row < length)[:, None] & (column < D)[None, :]
    tl.store(where, rounded(values, base.dtype.element_ty, PRECISION), mask=inside)


@triton.jit
def _load_lse(lse, first, length, ROWS: tl.constexpr):
    # Rows past the end get probability 0.
    row = first + tl.arange(0, ROWS)
    return tl.load(lse + row, mask=row < length, other=float("inf"))


@triton.jit
def _elements(stride):
    # Strides come in units of 8 elements, which tells the compiler about alignment.
    return tl.cast(stride, tl.int64) * 8


@triton.jit
def _head(base, item, heads, batch_stride, head_stride):
    return base + item // heads * _elements(batch_stride) + item % heads * _elements(head_stride)


@triton.jit
def _packed(base, item, length, heads, PARTS: tl.constexpr, D: tl.constexpr):
    # Of a contiguous [B, L, PARTS, H, D].
    batch, head = item // heads, item % heads
    return base + (batch.to(tl.int64) * length * (PARTS * heads) + head) * D


@triton.jit
def _kept(
    seed,
    item,
    heads,
    first_row,
    first_key,
    threshold,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    # [ROWS, KEYS]; one Philox counter gives the bits of four neighbouring keys.
    group = first_key // 4 + tl.arange(0, KEYS // 4)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    row = first_row + tl.arange(0, ROWS)[:, None] + tl.zeros([1, KEYS // 4], tl.int32)
    a, b, c, d = tl.philox(tl.load(seed), group, row, item % heads, item // heads)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [ROWS, KEYS])
    return (bits >> 1).to(tl.int32) >= threshold


@triton.jit
def _scores(
    q,  # [ROWS, DIM]
    k,  # [KEYS, DIM]
    first_key,
    length,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # [ROWS, KEYS], before the scale.
    scores = _product(q, tl.trans(k), PRECISION)
    if MASKED:
        inside = first_key + tl.arange(0, k.shape[0]) < length
        scores = tl.where(inside[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _fwd_keys(
    q,  # [ROWS, DIM]
    keys,
    values,
    top,  # [ROWS] running maximum
    total,  # [ROWS] running sum
    acc,  # [ROWS, DIM]
    seed,
    item,
    first_row,
    first_key,
    length,
    heads,
    row_stride,
    scale,
    threshold,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k = _load(keys, row_stride, first_key, length, KEYS, D, DIM)
    scores = _scores(q, k, first_key, length, MASKED, PRECISION)
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # The difference first: large scores lose nothing to the scale.
    shrink = tl.exp2((top - new_top) * (scale * LOG2E))
    p = tl.exp2((scores - new_top[:, None]) * (scale * LOG2E))
    total = total * shrink + tl.sum(p, axis=1)
    if DROPOUT:
        kept = _kept(seed, item, heads, first_row, first_key, threshold, q.shape[0], KEYS)
        p = tl.where(kept, p, 0.0)
    v = _load(values, row_stride, first_key, length, KEYS, D, DIM)
    acc = dot(rounded(p, v.dtype, PRECISION), v, acc * shrink[:, None], PRECISION)
    return new_top, total, acc


@triton.jit
def _fwd_tile(
    query,
    keys,
    values,
    out,
    lse,
    seed,
    item,
    first_row,
    length,
    heads,
    row_stride,
    scale,
    threshold,
    keep_scale,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STEP_TAIL: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    q = _load(query, row_stride, first_row, length, ROWS, D, DIM)
    top = tl.full([ROWS], LOWEST, tl.float32)  # finite: a first step may have scores of -inf alone
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    full = (length - 1) // STEP * STEP if STEP_TAIL > 0 else length
    if STEP_TAIL > 0:  # first: a product after the loop makes ptxas wait for each one in it (sm_90)
        top, total, acc = _fwd_keys(
            q, keys, values, top, total, acc, seed, item, first_row, full, length, heads,
            row_stride, scale, threshold, STEP_TAIL, True, D, DIM, DROPOUT, PRECISION,
        )  # fmt: skip
    for first_key in tl.range(0, full, STEP):
        top, total, acc = _fwd_keys(
            q, keys, values, top, total, acc, seed, item, first_row, first_key, length, heads,
            row_stride, scale, threshold, STEP, STEP_TAIL == 0, D, DIM, DROPOUT, PRECISION,
        )  # fmt: skip
    _store(acc * (keep_scale / total)[:, None], out, heads * D, first_row, length, D, PRECISION)
    row = first_row + tl.arange(0, ROWS)
    tl.store(lse + row, top * (scale * LOG2E) + tl.log2(total), mask=row < length)


@triton.jit(do_not_specialize=_SIZES)
def attention_fwd_kernel(
    qkv,  # [B, L, 3, H, D]
    out,  # [B, L, H, D], contiguous
    lse,  # [B, H, L] float32, in base 2
    seed,  # [] int64, with DROPOUT
    length,
    heads,
    tiles,  # to a head; 1 with TILE_TAIL
    batch_stride,
    row_stride,
    part_stride,
    head_stride,
    scale,
    threshold,  # of 31 random bits
    keep_scale,  # 1 / (1 - dropout_p)
    TILE: tl.constexpr,
    TILE_TAIL: tl.constexpr,
    STEP: tl.constexpr,
    STEP_TAIL: tl.constexpr,  # 0: every step is masked
    D: tl.constexpr,
    DIM: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * TILE
    row_stride = _elements(row_stride)
    query = _head(qkv, item, heads, batch_stride, head_stride)
    keys = query + _elements(part_stride)
    values = keys + _elements(part_stride)
    out = _packed(out, item, length, heads, 1, D)
    lse += item.to(tl.int64) * length
    _fwd_tile(
        query, keys, values, out, lse, seed, item, first, length, heads, row_stride, scale,
        threshold, keep_scale, TILE, STEP, STEP_TAIL, D, DIM, DROPOUT, PRECISION,
    )  # fmt: skip
    if TILE_TAIL > 0:  # its keys and values are in the L1 cache by now
        _fwd_tile(
            query, keys, values, out, lse, seed, item, TILE, length, heads, row_stride, scale,
            threshold, keep_scale, TILE_TAIL, STEP, STEP_TAIL, D, DIM, DROPOUT, PRECISION,
        )  # fmt: skip


@triton.jit
def _bwd_query_keys(
    q,  # [ROWS, DIM]
    do,  # [ROWS, DIM]
    lse,  # [ROWS]
    delta,  # [ROWS]
    dq,  # [ROWS, DIM]
    keys,
    values,
    seed,
    item,
    first_row,
    first_key,
    length,
    heads,
    row_stride,
    scale,
    threshold,
    keep_scale,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k = _load(keys, row_stride, first_key, length, KEYS, D, DIM)
    scores = _scores(q, k, first_key, length, MASKED, PRECISION)
    p = tl.exp2(scores * (scale * LOG2E) - lse[:, None])
    v = _load(values, row_stride, first_key, length, KEYS, D, DIM)
    dp = _product(do, tl.trans(v), PRECISION)
    if DROPOUT:
        kept = _kept(seed, item, heads, first_row, first_key, threshold, q.shape[0], KEYS)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    return dot(rounded(ds, k.dtype, PRECISION), k, dq, PRECISION)


@triton.jit
def _bwd_query_tile(
    query,
    keys,
    values,
    out,
    grad,
    grad_query,
    lse,
    delta,
    seed,
    item,
    first_row,
    length,
    heads,
    row_stride,
    grad_row_stride,
    scale,
    threshold,
    keep_scale,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STEP_TAIL: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    q = _load(query, row_stride, first_row, length, ROWS, D, DIM)
    do = _load(grad, grad_row_stride, first_row, length, ROWS, D, DIM)
    o = _load(out, heads * D, first_row, length, ROWS, D, DIM)
    row = first_row + tl.arange(0, ROWS)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(delta + row, row_delta, mask=row < length)
    row_lse = _load_lse(lse, first_row, length, ROWS)
    dq = tl.zeros([ROWS, DIM], tl.float32)
    full = (length - 1) // STEP * STEP if STEP_TAIL > 0 else length
    if STEP_TAIL > 0:
        dq = _bwd_query_keys(
            q, do, row_lse, row_delta, dq, keys, values, seed, item, first_row, full, length,
            heads, row_stride, scale, threshold, keep_scale,
            STEP_TAIL, True, D, DIM, DROPOUT, PRECISION,
        )  # fmt: skip
    for first_key in tl.range(0, full, STEP):
        dq = _bwd_query_keys(
            q, do, row_lse, row_delta, dq, keys, values, seed, item, first_row, first_key, length,
            heads, row_stride, scale, threshold, keep_scale,
            STEP, STEP_TAIL == 0, D, DIM, DROPOUT, PRECISION,
        )  # fmt: skip
    _store(dq * scale, grad_query, 3 * heads * D, first_row, length, D, PRECISION)


@triton.jit
def _bwd_key_rows(
    k,  # [KEYS, DIM]
    v,  # [KEYS, DIM]
    dk,  # [KEYS, DIM]
    dv,  # [KEYS, DIM]
    query,
    grad,
    lse,
    delta,
    seed,
    item,
    first_row,
    first_key,
    length,
    heads,
    row_stride,
    grad_row_stride,
    scale,
    threshold,
    keep_scale,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Everything is [KEYS, ROWS] here. Keys past the end get gradients too, which are not stored.
    q = _load(query, row_stride, first_row, length, ROWS, D, DIM)
    row_lse = _load_lse(lse, first_row, length, ROWS)
    scores = _scores(k, q, 0, length, False, PRECISION)
    p = tl.exp2(scores * (scale * LOG2E) - row_lse[None, :])
    do = _load(grad, grad_row_stride, first_row, length, ROWS, D, DIM)
    dp = _product(v, tl.trans(do), PRECISION)
    used = p
    if DROPOUT:
        kept = _kept(seed, item, heads, first_row, first_key, threshold, ROWS, k.shape[0])
        factor = tl.where(tl.trans(kept), keep_scale, 0.0)
        used, dp = p * factor, dp * factor
    dv = dot(rounded(used, do.dtype, PRECISION), do, dv, PRECISION)
    row = first_row + tl.arange(0, ROWS)
    row_delta = tl.load(delta + row, mask=row < length, other=0.0)
    ds = p * (dp - row_delta[None, :])
    dk = dot(rounded(ds, q.dtype, PRECISION), q, dk, PRECISION)
    return dk, dv


@triton.jit
def _bwd_key_tile(
    query,
    keys,
    values,
    grad,
    grad_query,
    lse,
    delta,
    seed,
    item,
    first_key,
    length,
    heads,
    row_stride,
    grad_row_stride,
    scale,
    threshold,
    keep_scale,
    KEYS: tl.constexpr,
    STEP: tl.constexpr,
    STEP_TAIL: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k = _load(keys, row_stride, first_key, length, KEYS, D, DIM)
    v = _load(values, row_stride, first_key, length, KEYS, D, DIM)
    dk = tl.zeros([KEYS, DIM], tl.float32)
    dv = tl.zeros([KEYS, DIM], tl.float32)
    full = (length - 1) // STEP * STEP if STEP_TAIL > 0 else length
    if STEP_TAIL > 0:
        dk, dv = _bwd_key_rows(
            k, v, dk, dv, query, grad, lse, delta, seed, item, full, first_key, length, heads,
            row_stride, grad_row_stride, scale, threshold, keep_scale,
            STEP_TAIL, D, DIM, DROPOUT, PRECISION,
        )  # fmt: skip
    for first_row in tl.range(0, full, STEP):
        dk, dv = _bwd_key_rows(
            k, v, dk, dv, query, grad, lse, delta, seed, item, first_row, first_key, length, heads,
            row_stride, grad_row_stride, scale, threshold, keep_scale,
            STEP, D, DIM, DROPOUT, PRECISION,
        )  # fmt: skip
    grad_keys = grad_query + heads * D
    _store(dk * scale, grad_keys, 3 * heads * D, first_key, length, D, PRECISION)
    _store(dv, grad_keys + heads * D, 3 * heads * D, first_key, length, D, PRECISION)


@triton.jit(do_not_specialize=_SIZES + _GRAD_STRIDES)
def attention_bwd_kernel(
    qkv,  # [B, L, 3, H, D]
    out,  # [B, L, H, D], contiguous
    grad,  # [B, L, H, D]
    grad_qkv,  # [B, L, 3, H, D], contiguous
    lse,  # [B, H, L] float32, in base 2
    delta,  # [B, H, L] float32: the sum of out * grad, written with QUERY and read with KEY
    seed,  # [] int64, with DROPOUT
    length,
    heads,
    tiles,  # to a head; 1 with TILE_TAIL, or with both QUERY and KEY
    batch_stride,
    row_stride,
    part_stride,
    head_stride,
    grad_batch_stride,
    grad_row_stride,
    grad_head_stride,
    scale,
    threshold,  # of 31 random bits
    keep_scale,  # 1 / (1 - dropout_p)
    QUERY: tl.constexpr,  # the gradient of the queries
    KEY: tl.constexpr,  # that of the keys and values
    TILE: tl.constexpr,
    TILE_TAIL: tl.constexpr,
    STEP: tl.constexpr,
    STEP_TAIL: tl.constexpr,  # 0: every step is masked
    D: tl.constexpr,
    DIM: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * TILE
    row_stride = _elements(row_stride)
    query = _head(qkv, item, heads, batch_stride, head_stride)
    keys = query + _elements(part_stride)
    values = keys + _elements(part_stride)
    grad_row_stride = _elements(grad_row_stride)
    grad = _head(grad, item, heads, grad_batch_stride, grad_head_stride)
    out = _packed(out, item, length, heads, 1, D)
    grad_query = _packed(grad_qkv, item, length, heads, 3, D)
    lse += item.to(tl.int64) * length
    delta += item.to(tl.int64) * length
    if QUERY:
        _bwd_query_tile(
            query, keys, values, out, grad, grad_query, lse, delta, seed, item, first, length,
            heads, row_stride, grad_row_stride, scale, threshold, keep_scale,
            TILE, STEP, STEP_TAIL, D, DIM, DROPOUT, PRECISION,
        )  # fmt: skip
        if TILE_TAIL > 0:
            _bwd_query_tile(
                query, keys, values, out, grad, grad_query, lse, delta, seed, item, TILE, length,
                heads, row_stride, grad_row_stride, scale, threshold, keep_scale,
                TILE_TAIL, STEP, STEP_TAIL, D, DIM, DROPOUT, PRECISION,
            )  # fmt: skip
    if QUERY and KEY:
        tl.debug_barrier()  # other threads read delta than wrote it
    if KEY:
        _bwd_key_tile(
            query, keys, values, grad, grad_query, lse, delta, seed, item, first, length, heads,
            row_stride, grad_row_stride, scale, threshold, keep_scale,
            TILE, STEP, STEP_TAIL, D, DIM, DROPOUT, PRECISION,
        )  # fmt: skip
        if TILE_TAIL > 0:
            _bwd_key_tile(
                query, keys, values, grad, grad_query, lse, delta, seed, item, TILE, length, heads,
                row_stride, grad_row_stride, scale, threshold, keep_scale,
                TILE_TAIL, STEP, STEP_TAIL, D, DIM, DROPOUT, PRECISION,
            )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """Shape of a program: `rows` and `tail` rows (or keys, for their gradient), `step` at a time.

    With `last`, the last step is a power of two that just covers what is left, and only it is
    masked. That code is twice as long and takes more registers: it is for tiles that would
    otherwise compute much more, where it does not spill.
    """

    rows: int
    tail: int
    step: int
    warps: int
    stages: int = 1
    last: bool = True


@dataclass(frozen=True)
class Config:
    """`fwd` and `bwd` by the longest sequence that they serve with one program to a head.

    The long tiles serve any length, the backward in two launches. `with_dropout` replaces all.
    """

    fwd: dict[int, Tile]
    bwd: dict[int, Tile]
    long_fwd: Tile
    long_query: Tile
    long_key: Tile
    with_dropout: "Config | None" = None


_HALF = Config(
    fwd={
        16: Tile(16, 0, 16, warps=1, last=False),
        32: Tile(32, 0, 32, warps=1, last=False),
        48: Tile(32, 16, 32, warps=2),
        64: Tile(64, 0, 64, warps=4, last=False),
        80: Tile(64, 16, 64, warps=4),
        96: Tile(64, 32, 64, warps=4),
        128: Tile(128, 0, 64, warps=8),
        144: Tile(128, 16, 64, warps=8),
    },
    bwd={
        16: Tile(16, 0, 16, warps=1),
        32: Tile(32, 0, 32, warps=2, last=False),
        48: Tile(32, 16, 16, warps=2),
        64: Tile(64, 0, 32, warps=4, last=False),
        80: Tile(64, 16, 32, warps=4),
        96: Tile(64, 32, 32, warps=4, last=False),
        128: Tile(128, 0, 32, warps=8),
        144: Tile(128, 16, 32, warps=8),
    },
    long_fwd=Tile(64, 0, 64, warps=4, stages=3),
    long_query=Tile(64, 0, 32, warps=4, stages=3),
    long_key=Tile(64, 0, 32, warps=4, stages=3),
)
_HALF_DROPOUT = replace(
    _HALF,
    bwd=_HALF.bwd
    | {
        16: Tile(16, 0, 16, warps=1, last=False),
        48: Tile(32, 16, 16, warps=2, last=False),
    },
)
_HALF_WGMMA = replace(_HALF, with_dropout=_HALF_DROPOUT)
# mma, of sm_80 and sm_120, takes every operand from registers.
_HALF_MMA = replace(
    _HALF,
    fwd=_HALF.fwd | {64: Tile(64, 0, 64, warps=4)},
    bwd=_HALF.bwd
    | {
        80: Tile(64, 16, 32, warps=4, last=False),
        128: Tile(128, 0, 32, warps=8, last=False),
        144: Tile(128, 16, 16, warps=8, last=False),
    },
    long_key=Tile(64, 0, 32, warps=4, stages=3, last=False),
    with_dropout=replace(
        _HALF_DROPOUT,
        fwd=_HALF.fwd | {96: Tile(64, 32, 64, warps=4, last=False)},
        bwd=_HALF_DROPOUT.bwd
        | {
            80: Tile(64, 16, 16, warps=4, last=False),
            128: Tile(128, 0, 32, warps=8, last=False),
            144: Tile(128, 16, 16, warps=8, last=False),
        },
        long_fwd=Tile(64, 0, 64, warps=4, stages=3, last=False),
        long_query=Tile(64, 0, 32, warps=4, stages=3, last=False),
        long_key=Tile(64, 0, 32, warps=4, stages=2, last=False),
    ),
)
_HALF_WIDE = Config(
    fwd={16: Tile(16, 0, 16, warps=2)},
    bwd={16: Tile(16, 0, 16, warps=4)},
    long_fwd=Tile(64, 0, 32, warps=8, stages=2),
    long_query=Tile(64, 0, 32, warps=8, stages=2),
    long_key=Tile(64, 0, 32, warps=8, stages=2),
)
_HALF_WIDE_MMA = replace(
    _HALF_WIDE,
    long_fwd=Tile(64, 0, 32, warps=8, stages=2, last=False),
    long_query=Tile(64, 0, 32, warps=8, stages=2, last=False),
    long_key=Tile(64, 0, 32, warps=8, stages=2, last=False),
)
_FLOAT = Config(
    fwd={16: Tile(16, 0, 16, warps=4, last=False), 32: Tile(32, 0, 32, warps=4, last=False)},
    bwd={16: Tile(16, 0, 16, warps=4, last=False)},
    long_fwd=Tile(64, 0, 32, warps=8, last=False),
    long_query=Tile(32, 0, 16, warps=4, last=False),
    long_key=Tile(32, 0, 16, warps=8, last=False),
)
_FLOAT_WIDE = Config(
    fwd={},
    bwd={},
    long_fwd=Tile(16, 0, 16, warps=4, last=False),
    long_query=Tile(16, 0, 16, warps=4, last=False),
    long_key=Tile(16, 0, 16, warps=4, last=False),
)
_FLOAT_WIDE_MMA = replace(
    _FLOAT_WIDE,
    long_query=Tile(16, 0, 16, warps=8, last=False),
    long_key=Tile(16, 0, 16, warps=8, last=False),
    with_dropout=replace(
        _FLOAT_WIDE,
        long_query=Tile(16, 0, 32, warps=8, last=False),
        long_key=Tile(16, 0, 16, warps=8, last=False),
    ),
)
_MMA = {
    (False, False): _HALF_MMA,
    (False, True): _HALF_WIDE_MMA,
    (True, False): _FLOAT,
    (True, True): _FLOAT_WIDE_MMA,
}
_WGMMA = {
    (False, False): _HALF_WGMMA,
    (False, True): _HALF_WIDE,
    (True, False): replace(_FLOAT, long_fwd=Tile(64, 0, 32, warps=4, last=False)),
    (True, True): _FLOAT_WIDE,
}
# By compute capability; by (float32, D > 64).
CONFIGS = {80: _MMA, 90: _WGMMA, 100: _WGMMA | {(True, False): _FLOAT}, 120: _MMA}


def _capability(device: torch.device) -> int:
    gpu = device_of(device)
    return gpu.capability if gpu else 90


def _tile(length: int, tiles: dict[int, Tile]) -> Tile | None:
    return next((tile for longest, tile in tiles.items() if length <= longest), None)


def _options(tile: Tile, length: int, d: int, dtype: torch.dtype) -> dict[str, Any]:
    rest = length % tile.step if tile.last else 0
    # With nothing left over the last step is a whole one.
    tail = max(16, triton.next_power_of_2(rest or tile.step)) if tile.last else 0
    return {
        "TILE": tile.rows,
        "TILE_TAIL": tile.tail,
        "STEP": tile.step,
        "STEP_TAIL": tail,
        "D": d,
        "DIM": max(16, triton.next_power_of_2(d)),
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _config(capability: int, d: int, dtype: torch.dtype, dropout: bool) -> Config:
    config = CONFIGS[capability][dtype == torch.float32, d > 64]
    return config.with_dropout or config if dropout else config


def _forward(
    capability: int, length: int, d: int, dtype: torch.dtype, dropout: bool
) -> tuple[Tile, dict[str, Any]]:
    config = _config(capability, d, dtype, dropout)
    tile = _tile(length, config.fwd) or config.long_fwd
    return tile, {"DROPOUT": dropout, **_options(tile, length, d, dtype)}


def _backward(
    capability: int, length: int, d: int, dtype: torch.dtype, dropout: bool
) -> Iterator[tuple[Tile, dict[str, Any]]]:
    """One launch for all gradients, or one for the queries' and then one for the others."""
    config = _config(capability, d, dtype, dropout)
    short = _tile(length, config.bwd)
    launches = (
        [(short, True, True)]
        if short
        else [(config.long_query, True, False), (config.long_key, False, True)]
    )
    for tile, query, key in launches:
        options = _options(tile, length, d, dtype)
        yield tile, {"QUERY": query, "KEY": key, "DROPOUT": dropout, **options}


def _sizes(qkv: Tensor, tile: Tile) -> tuple[int, int, int, int, int, int, int]:
    length, heads = qkv.shape[1], qkv.shape[3]
    tiles = 1 if tile.tail else triton.cdiv(length, tile.rows)
    batch_stride, row_stride, part_stride, head_stride = (s // 8 for s in qkv.stride()[:4])
    return length, heads, tiles, batch_stride, row_stride, part_stride, head_stride


def _dropout(dropout_p: float) -> tuple[int, float]:
    return min(round(dropout_p * 2**31), 2**31 - 1), 1 / (1 - dropout_p)


def launch_attention_fwd(
    qkv: Tensor, seed: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """`out` [B, L, H, D] and the scores' logsumexp in base 2, [B, H, L] float32.

    Args:
        qkv: [B, L, 3, H, D]; its last dimension is dense and all other strides, and D, are
            multiples of 8.
        seed: [] int64, if dropout_p > 0.
        dropout_p: probability that a probability is dropped.
    """
    b, length, _, h, d = qkv.shape
    out = torch.empty((b, length, h, d), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((b, h, length), dtype=torch.float32, device=qkv.device)
    if out.numel() == 0:
        return out, lse
    tile, options = _forward(_capability(qkv.device), length, d, qkv.dtype, dropout_p > 0)
    sizes = _sizes(qkv, tile)
    attention_fwd_kernel[(b * h * sizes[2],)](
        qkv, out, lse, lse if seed is None else seed, *sizes, d**-0.5, *_dropout(dropout_p),
        **interpreted(qkv, options),
    )  # fmt: skip
    return out, lse


def launch_attention_bwd(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """The gradient of `qkv`, contiguous; arguments as of and from the forward.

    Args:
        grad: [B, L, H, D], that of `out`, with strides like those of `qkv`.
        qkv: as in the forward.
        out: as from the forward, contiguous.
        lse: as from the forward, contiguous.
        seed: as in the forward.
        dropout_p: as in the forward.
    """
    b, length, _, h, d = qkv.shape
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if grad_qkv.numel() == 0:
        return grad_qkv
    delta = torch.empty_like(lse)
    grad_strides = [stride // 8 for stride in grad.stride()[:3]]
    capability = _capability(qkv.device)
    for tile, options in _backward(capability, length, d, qkv.dtype, dropout_p > 0):
        sizes = _sizes(qkv, tile)
        attention_bwd_kernel[(b * h * sizes[2],)](
            qkv, out, grad, grad_qkv, lse, delta, lse if seed is None else seed, *sizes,
            *grad_strides, d**-0.5, *_dropout(dropout_p), **interpreted(qkv, options),
        )  # fmt: skip
    return grad_qkv


_LENGTHS = (16, 32, 33, 64, 65, 96, 128, 129, 289, 320, 577)  # every tile and every last step


def launch_examples(main: bool = False) -> None:
    """Launches, on the meta device, that compile every tile, forward and backward.

    Args:
        main: only TiTok's length at 256 px and the longest that MaskGIT has, in bfloat16.
    """
    kinds = [(torch.bfloat16, 64, 0.0)]
    if not main:
        kinds += [
            (dtype, d, dropout_p)
            for dtype, widths in (
                (torch.bfloat16, (64, 128)),
                (torch.float16, (48,)),
                (torch.float32, (48, 64, 128)),
            )
            for d in widths
            for dropout_p in (0.0, 0.1)
        ]
    for dtype, d, dropout_p in kinds:
        for length in (129, 289) if main else _LENGTHS:
            qkv = torch.empty(2, length, 3, 16, d, dtype=dtype, device="meta")
            seed = torch.empty([], dtype=torch.int64, device="meta") if dropout_p else None
            out, lse = launch_attention_fwd(qkv, seed, dropout_p)
            launch_attention_bwd(out, qkv, out, lse, seed, dropout_p)
