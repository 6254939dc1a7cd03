"""Nearest-code search on the GPU: tensor-core maxima of code blocks, then float64.

A small problem takes one launch: `direct` scores every code in float64. Otherwise `prepare` bounds
rows and codes and, where the tensor cores cannot take the inputs as they are, copies them to scaled
fp16; `coarse` keeps the two largest sub-block maxima of each (row, block of codes); `rescore`
evaluates in float64 what the error bound cannot exclude. Derivation: docs/ops/nearest_code.md.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titok_fast.kernels._arithmetic import powers
from titok_fast.kernels._device import device_of, floats
from titok_fast.kernels._exact import (
    COSINE,
    L2,
    METRICS,
    NONE,
    NORM_FLOOR,
    best_of,
    exact_scores,
    floored,
    merge,
    sum_pairs,
    to_double,
)

# Above this norm a row or code leaves the coarse pass; below it float32 cannot overflow.
_LARGEST_NORM = tl.constexpr(1e18)
_SCALE = tl.constexpr(9)  # entries of up to 2^10 in fp16, whose products cannot overflow
_CENTER_CODES = tl.constexpr(8)
_TABLE_BYTES = 256 << 20


@dataclass(frozen=True)
class Tile:
    """Shape of the coarse kernel for one range of D.

    A program multiplies `rows` rows by `codes` codes, `depth` columns at a time; when `depth`
    covers D, the rows stay in shared memory. `group` products are merged element by element before
    `fold` neighbouring maxima are, so that a sub-block has group x fold codes; a product gives
    `parts` blocks (4: one to a lane of a row, so that no lane talks to another).
    """

    rows: int
    codes: int
    depth: int
    group: int
    fold: int
    parts: int
    num_warps: int
    num_stages: int
    programs: int  # that a multiprocessor holds at a time

    @property
    def span(self) -> int:
        """Codes that share one scale and one error bound."""
        return self.codes * self.group

    @property
    def block(self) -> int:
        """Codes to one entry of the table."""
        return self.span // self.parts

    @property
    def subs(self) -> int:
        """Sub-blocks of a block."""
        return self.codes // self.parts // self.fold


@dataclass(frozen=True)
class Config:
    """`tiles` by the largest D they serve, the last one any D; limits of the direct kernel."""

    tiles: dict[int, Tile]
    direct: int  # N K D
    direct_row: int  # K D, which one multiprocessor scans


_AMPERE = {
    16: Tile(64, 64, 16, 8, 1, 4, num_warps=4, num_stages=3, programs=3),
    32: Tile(64, 64, 32, 4, 2, 4, num_warps=4, num_stages=2, programs=3),
    64: Tile(128, 128, 64, 1, 8, 1, num_warps=8, num_stages=3, programs=1),
    512: Tile(128, 128, 32, 1, 8, 1, num_warps=8, num_stages=4, programs=1),
}
_HOPPER = {
    16: Tile(128, 64, 16, 8, 1, 4, num_warps=8, num_stages=3, programs=2),
    32: Tile(64, 64, 32, 8, 1, 4, num_warps=4, num_stages=2, programs=3),
    64: Tile(128, 128, 64, 1, 8, 1, num_warps=8, num_stages=3, programs=2),
    128: Tile(128, 64, 128, 1, 4, 1, num_warps=8, num_stages=3, programs=2),
    256: Tile(256, 64, 256, 1, 4, 1, num_warps=8, num_stages=3, programs=1),
    512: Tile(128, 256, 64, 1, 8, 1, num_warps=8, num_stages=4, programs=1),
    1024: Tile(128, 128, 64, 1, 8, 1, num_warps=8, num_stages=4, programs=1),
}
_BLACKWELL = _HOPPER | {
    16: Tile(64, 64, 16, 4, 2, 4, num_warps=4, num_stages=3, programs=4),
    32: Tile(64, 64, 32, 4, 2, 4, num_warps=4, num_stages=2, programs=4),
}
# By compute capability.
CONFIGS = {
    80: Config(_AMPERE, direct=1 << 24, direct_row=1 << 17),
    90: Config(_HOPPER, direct=1 << 24, direct_row=1 << 17),
    100: Config(_BLACKWELL, direct=1 << 24, direct_row=1 << 17),
    120: Config(_AMPERE, direct=1 << 21, direct_row=1 << 16),  # float64 at 1/64 of the rate
}
# Small enough that tests reach every kernel.
_INTERPRETER = Config(_HOPPER, direct=1 << 11, direct_row=1 << 11)


@triton.jit
def _load_rows(
    x,
    row,  # [ROWS], clamped to the last row
    last,
    stride,
    center,  # [WIDTH]
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    columns = tl.arange(0, WIDTH)
    where = x + tl.minimum(row, last).to(tl.int64)[:, None] * stride + columns[None, :]
    values = tl.load(where, mask=(columns < D)[None, :], other=0.0).to(tl.float32)
    return values - center[None, :]


@triton.jit
def _center(codebook, k, stride, D: tl.constexpr, WIDTH: tl.constexpr, CENTERED: tl.constexpr):
    # The mean of some codes: any vector is valid, this one keeps float16 small.
    columns = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    if CENTERED:
        for i in tl.static_range(_CENTER_CODES):
            code = tl.cast(i, tl.int64) * k // _CENTER_CODES
            total += tl.load(codebook + code * stride + columns, columns < D, 0.0).to(tl.float32)
        total /= _CENTER_CODES
    return tl.where(tl.abs(total) < _LARGEST_NORM, total, 0.0)


@triton.jit
def _measure(values):  # [ROWS, WIDTH]
    # (representable, largest entry, norm) of each row, at any scale.
    magnitude = tl.abs(values)
    finite = tl.min((magnitude <= _LARGEST_NORM).to(tl.int32), axis=1) == 1
    magnitude = tl.where(finite[:, None], magnitude, 0.0)
    largest = tl.max(magnitude, axis=1)
    down, up = powers(largest, _SCALE)
    scaled = magnitude * down[:, None]
    length = tl.sqrt(tl.sum(scaled * scaled, axis=1)) * up
    return finite & (length <= _LARGEST_NORM), largest, length


@triton.jit
def _round(
    values,  # [ROWS, WIDTH]
    finite,  # [ROWS]
    down,  # [ROWS]
    up,  # [ROWS]
    out,
    row,  # [ROWS]
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # Stores the rows as float16; their length, and at most how far from them the copy is.
    columns = tl.arange(0, WIDTH)
    scaled = tl.where(finite[:, None], values, 0.0) * down[:, None]
    rounded = scaled.to(tl.float16)
    where = out + row.to(tl.int64)[:, None] * PADDED_D + columns[None, :]
    tl.store(where, rounded, mask=(columns < PADDED_D)[None, :])
    loss = scaled - rounded.to(tl.float32)
    length = tl.sqrt(tl.sum(scaled * scaled, axis=1)) * up
    # 1.001 and (D + 8) 2^-24 cover the float32 roundings.
    shortfall = tl.sqrt(tl.sum(loss * loss, axis=1)) * up * 1.001 + length * ((D + 8) * 2.0**-24)
    return length, shortfall


@triton.jit(do_not_specialize=["n", "k", "spans"])
def nearest_code_prepare_kernel(
    z,  # [N, D]
    codebook,  # [K, D]
    z_half,  # [N, PADDED_D] float16, with COPY
    code_half,  # [spans SPAN, PADDED_D] float16, with COPY; past K, the last code again
    z_scale,  # [N] a power of two: z ~ z_half * z_scale
    z_norm,  # [N]; inf: not representable, NaN: has a NaN
    z_error,  # [N] norm of what float16 lost
    span_scale,  # [spans]
    span_bound,  # [3, spans]: see _coarse_error
    column,  # [spans SPAN] -||e||^2 / 2 for l2, 1 / ||e|| for cosine without COPY
    n,
    k,
    spans,
    z_stride,
    codebook_stride,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    SUBS: tl.constexpr,
    METRIC: tl.constexpr,
    COPY: tl.constexpr,
):
    program = tl.program_id(0)
    center = _center(codebook, k, codebook_stride, D, WIDTH, COPY and METRIC == L2)
    if program < spans:
        first = program * SPAN
        down, up = tl.full([ROWS], 1.0, tl.float32), tl.full([ROWS], 1.0, tl.float32)
        if COPY:
            largest = tl.zeros([ROWS], tl.float32)
            for start in range(0, SPAN, ROWS):
                code = first + start + tl.arange(0, ROWS)
                values = _load_rows(codebook, code, k - 1, codebook_stride, center, D, WIDTH)
                finite, entry, length = _measure(values)
                if METRIC == COSINE:
                    entry = entry / tl.maximum(length, NORM_FLOOR)
                largest = tl.maximum(largest, tl.where(finite, entry, 0.0))
            down, up = powers(tl.zeros([ROWS], tl.float32) + tl.max(largest, axis=0), _SCALE)
        norm = tl.zeros([ROWS], tl.float32)
        error = tl.zeros([ROWS], tl.float32)
        for start in range(0, SPAN, ROWS):
            code = first + start + tl.arange(0, ROWS)
            values = _load_rows(codebook, code, k - 1, codebook_stride, center, D, WIDTH)
            finite, _, length = _measure(values)
            if METRIC == COSINE:
                inverse = 1.0 / tl.maximum(length, NORM_FLOOR)
                if COPY:
                    values *= inverse[:, None]
                else:
                    length *= inverse
                    tl.store(column + code, inverse)
            if COPY:
                length, lost = _round(values, finite, down, up, code_half, code, D, PADDED_D, WIDTH)
            else:
                lost = length * ((D + 8) * 2.0**-22) if METRIC == COSINE else length * 0.0
            if METRIC == L2:
                tl.store(column + code, length * length * -0.5)
            bound = length * 1.001 + lost
            norm = tl.maximum(norm, tl.where(finite, bound, float("inf")))
            error = tl.maximum(error, tl.where(finite, lost, 0.0))
        m, most_lost = tl.max(norm, axis=0), tl.max(error, axis=0)
        # Tensor cores may truncate each partial sum; the lowest bits hold a number. What they drop
        # below float32's numbers, a product with 1 / ||e|| makes larger by 2^40 at most.
        tiny = (D + 16) * 2.0**-124
        if METRIC == COSINE and not COPY:
            tiny = (D + 16) * 2.0**-84
        per_norm = most_lost + m * ((D + 32 + SUBS) * 2.0**-22) + tiny
        alone = (1.0 + m) * tiny
        if METRIC == L2:  # the rounded ||e||^2 / 2, and float64 distances
            alone += m * m * ((D + 16 + SUBS) * 2.0**-22)
        tl.store(span_bound + program, m * 1.001)
        tl.store(span_bound + spans + program, per_norm * 1.001)
        tl.store(span_bound + 2 * spans + program, alone * 1.001)
        if COPY:
            tl.store(span_scale + program, tl.max(up, axis=0))
    else:
        row = (program - spans) * ROWS + tl.arange(0, ROWS)
        inside = row < n
        values = _load_rows(z, row, n - 1, z_stride, center, D, WIDTH)
        finite, largest, length = _measure(values)
        lost = tl.zeros([ROWS], tl.float32)
        if COPY:
            # Rows past the end write the last row again, with the same values.
            down, up = powers(tl.where(finite, largest, 0.0), _SCALE)
            row = tl.minimum(row, n - 1)
            length, lost = _round(values, finite, down, up, z_half, row, D, PADDED_D, WIDTH)
            tl.store(z_scale + row, up, mask=inside)
        bound = tl.where(finite, length * 1.001 + lost, float("inf"))
        nans = tl.max((values != values).to(tl.int32), axis=1)
        tl.store(z_norm + row, tl.where(nans == 1, float("nan"), bound), mask=inside)
        tl.store(z_error + row, lost, mask=inside)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _load_slice(where, depth, D: tl.constexpr, DEPTH: tl.constexpr):  # masked only if it must be
    if D % DEPTH == 0:
        return tl.load(where)
    return tl.load(where, mask=depth < D, other=0.0)


@triton.jit
def _scores(
    rows,  # [TILE_ROWS, D], or the pointers to its first columns where DEPTH < D
    codes,
    column,
    scale,  # [TILE_ROWS]
    start,  # first code
    k,
    code_stride,
    D: tl.constexpr,
    TILE_CODES: tl.constexpr,
    DEPTH: tl.constexpr,
    METRIC: tl.constexpr,
    COPY: tl.constexpr,
):
    # Without the scale where every score of the row has it.
    within = tl.arange(0, TILE_CODES)
    depth = tl.arange(0, DEPTH)
    if METRIC == L2 or (METRIC == COSINE and not COPY):
        of_code = tl.load(column + start.to(tl.int64) + within)[None, :]
    if COPY:
        where = codes + start.to(tl.int64) * D + (within[None, :] * D + depth[:, None])
    else:  # past the end comes the last code again: maxima do not change
        base = codes + start.to(tl.int64) * (code_stride * 16)
        code = tl.minimum(within, k - 1 - start).to(tl.int64)
        where = base + code[None, :] * (code_stride * 16) + depth[:, None]
    if DEPTH >= D:
        scores = tl.dot(rows, _load_slice(where, depth[:, None], D, DEPTH))
    else:
        scores = tl.zeros([rows.shape[0], TILE_CODES], tl.float32)
        for at in range(0, D, DEPTH):
            a = _load_slice(rows + at, at + depth[None, :], D, DEPTH)
            b = _load_slice(where + at, at + depth[:, None], D, DEPTH)
            scores = tl.dot(a, b, scores)
    if METRIC == L2:
        scores = scores * scale[:, None] + of_code if COPY else scores + of_code
    elif METRIC == COSINE and not COPY:
        scores *= of_code
    return scores


@triton.jit
def _top_two(top, second, other_top, other_second):
    beaten = tl.maximum(second, other_second)
    return tl.maximum(top, other_top), tl.maximum(beaten, tl.minimum(top, other_top))


@triton.jit(
    do_not_specialize=["first", "n", "k", "row_tiles", "spans", "steps", "z_stride", "code_stride"]
)
def nearest_code_coarse_kernel(
    z,  # rows of `z`, or their float16 copies
    codes,  # likewise
    z_scale,  # [N] float32
    span_scale,  # [spans] float32
    column,  # [spans SPAN] float32
    table,  # [spans PARTS, rows of the chunk] int64: the two largest sub-block maxima
    first,  # row of the chunk
    n,
    k,
    row_tiles,
    spans,
    steps,  # spans to a program
    z_stride,  # in units of 16 elements, which tells the compiler about alignment
    code_stride,
    D: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CODES: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
    PARTS: tl.constexpr,
    METRIC: tl.constexpr,
    COPY: tl.constexpr,
):
    # Neighbouring programs share their codes, which thus come from memory once.
    tile = tl.program_id(0)
    entry = (tile % row_tiles).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    row = first + entry
    inside = row < n
    row = tl.minimum(row, n - 1)
    begin = tile // row_tiles * steps
    end = tl.minimum(begin + steps, spans)

    depth = tl.arange(0, DEPTH)[None, :]
    rows = z + row[:, None] * (z_stride * 16) + depth
    if DEPTH >= D:
        rows = _load_slice(rows, depth, D, DEPTH)
    row_scale = tl.full([TILE_ROWS], 1.0, tl.float32)
    if COPY:
        row_scale = tl.load(z_scale + row)

    SUBS: tl.constexpr = TILE_CODES // PARTS // FOLD
    for span in tl.range(begin, end):
        scale = row_scale
        if COPY:
            scale = row_scale * tl.load(span_scale + span)
        start = span * (GROUP * TILE_CODES)
        best = _scores(
            rows, codes, column, scale, start, k, code_stride, D, TILE_CODES, DEPTH, METRIC, COPY
        )
        for g in tl.static_range(1, GROUP):
            scores = _scores(
                rows, codes, column, scale, start + g * TILE_CODES, k, code_stride,
                D, TILE_CODES, DEPTH, METRIC, COPY,
            )  # fmt: skip
            best = tl.maximum(best, scores)

        # In each group of 8 columns a lane of the tensor-core layout holds two: no data moves.
        best = tl.reshape(best, [TILE_ROWS, TILE_CODES // 8, 4, 2])
        best = tl.permute(best, [0, 2, 1, 3])
        if FOLD > 1:
            best = tl.max(tl.reshape(best, [TILE_ROWS, PARTS, SUBS, FOLD]), axis=3)
        else:
            best = tl.reshape(best, [TILE_ROWS, PARTS, SUBS])
        if COPY and METRIC != L2:
            best *= scale[:, None, None]
        # The lowest bits make room for the number of the sub-block.
        best = (_bits(best) & -SUBS) | tl.arange(0, SUBS)[None, None, :]
        best = best.to(tl.float32, bitcast=True)
        a, b = tl.split(tl.reshape(best, [TILE_ROWS, PARTS, SUBS // 2, 2]))
        top, second = tl.reduce((tl.maximum(a, b), tl.minimum(a, b)), 2, _top_two)
        packed = (_bits(top).to(tl.int64) << 32) | (_bits(second).to(tl.int64) & 0xFFFFFFFF)
        part = span * PARTS + tl.arange(0, PARTS)
        to = table + part.to(tl.int64)[None, :] * (n - first) + entry[:, None]
        tl.store(to, packed, mask=inside[:, None])


@triton.jit
def _coarse_error(
    span_bound,
    span,  # [CHUNK]
    spans,
    real,  # [CHUNK]
    norm,  # [ROWS]
    error,  # [ROWS]
    own,  # [ROWS]
):
    # Bounds |coarse - exact| of these rows for every code of the span.
    per_error = tl.load(span_bound + span, mask=real, other=0.0)[:, None]
    per_norm = tl.load(span_bound + spans + span, mask=real, other=0.0)[:, None]
    alone = tl.load(span_bound + 2 * spans + span, mask=real, other=0.0)[:, None]
    return error[None, :] * per_error + norm[None, :] * per_norm + (alone + own[None, :])


@triton.jit
def _length(row, D: tl.constexpr):  # [A] pointers -> [1, A, 1]
    square = tl.zeros([1, row.shape[0], 8], tl.float64)
    for start in tl.range(0, D, 8, loop_unroll_factor=2):
        columns = start + tl.arange(0, 8)[None, None, :]
        x = to_double(tl.load(row[None, :, None] + columns, mask=columns < D, other=0.0))
        square += x * x
    return floored(tl.sqrt(sum_pairs(square)))[:, :, None]


@triton.jit
def _store(
    indices,
    distances,
    row,  # [A]
    inside,  # [A]
    z_row,  # [A] pointers
    codebook,
    codebook_stride,
    best,  # [A] float64
    best_index,  # [A]
    has_nan,  # [A]
    D: tl.constexpr,
    METRIC: tl.constexpr,
    DISTANCE: tl.constexpr,
):
    none = best_index == NONE
    best_index = tl.where(none, 0, best_index).to(tl.int64)
    tl.store(indices + row, best_index, mask=inside)
    if not DISTANCE:
        return
    distance = best
    if METRIC == L2:
        distance = -best
    if METRIC == COSINE:
        code_row = codebook + best_index * codebook_stride
        z_length, code_length = _length(z_row, D), _length(code_row, D)
        square = tl.zeros([1, best.shape[0], 8], tl.float64)
        for start in tl.range(0, D, 8, loop_unroll_factor=2):
            columns = start + tl.arange(0, 8)[None, None, :]
            a = (
                to_double(tl.load(z_row[None, :, None] + columns, mask=columns < D, other=0.0))
                / z_length
            )
            b = (
                to_double(tl.load(code_row[None, :, None] + columns, mask=columns < D, other=0.0))
                / code_length
            )
            square += (a - b) * (a - b)
        distance = tl.max(sum_pairs(square), axis=0)
    distance = tl.where(has_nan | none, float("nan"), distance.to(tl.float32))
    tl.store(distances + row, distance, mask=inside)


@triton.jit
def _code(
    block,
    position,  # of a column in the block's part of a product
    product,
    TILE_CODES: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    # Undoes what the coarse kernel does to its columns.
    position = block % PARTS * (TILE_CODES // PARTS) + position
    lane, i = position // (TILE_CODES // 4), position % (TILE_CODES // 4)
    product = block // PARTS * GROUP + product
    return product * TILE_CODES + i // 2 * 8 + lane * 2 + i % 2


@triton.jit(do_not_specialize=["first", "n", "k", "spans"])
def nearest_code_rescore_kernel(
    z,  # [N, D]
    codebook,  # [K, D]
    table,  # [spans PARTS, rows of the chunk] int64
    z_norm,  # [N] float32
    z_error,  # [N] float32
    span_bound,  # [3, spans] float32
    indices,  # [N] int64
    distances,  # [N] float32, with DISTANCE
    rescored,  # [N] int64, with COUNT
    first,
    n,
    k,
    spans,
    z_stride,
    codebook_stride,
    D: tl.constexpr,
    TILE_CODES: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
    PARTS: tl.constexpr,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    PIECE: tl.constexpr,
    DISTANCE: tl.constexpr,
    COUNT: tl.constexpr,
):
    SIZE: tl.constexpr = TILE_CODES // PARTS  # columns of a product that belong to one block
    SUBS: tl.constexpr = SIZE // FOLD
    blocks = spans * PARTS
    one = tl.arange(0, ROWS)
    row = first + tl.program_id(0).to(tl.int64) * ROWS + one
    inside = row < n
    row = tl.minimum(row, n - 1)
    entry = table + (row - first)
    z_row = z + row * z_stride
    norm, error = tl.load(z_norm + row), tl.load(z_error + row)
    has_nan = norm != norm
    wanted = (inside & ~has_nan)[None, :]
    own = norm * 0.0
    if METRIC == L2:  # float64 distances
        own = norm * norm * ((D + 8) * 2.0**-48)

    threshold = tl.full([ROWS], float("-inf"), tl.float32)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        in_table = block < blocks
        real = wanted & in_table[:, None]
        where = entry[None, :] + block.to(tl.int64)[:, None] * (n - first)
        top = (tl.load(where, mask=real, other=0) >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        lower = top - _coarse_error(span_bound, block // PARTS, spans, in_table, norm, error, own)
        lower = tl.where((lower == lower) & real, lower, float("-inf"))
        threshold = tl.maximum(threshold, tl.max(lower, axis=0))

    best = tl.full([ROWS], float("nan"), tl.float64)
    best_index = tl.full([ROWS], NONE, tl.int32)
    count = tl.zeros([ROWS], tl.int32)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        in_table = block < blocks
        real = wanted & in_table[:, None]
        where = entry[None, :] + block.to(tl.int64)[:, None] * (n - first)
        pair = tl.load(where, mask=real, other=0)
        top = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        second = pair.to(tl.int32).to(tl.float32, bitcast=True)
        bound = _coarse_error(span_bound, block // PARTS, spans, in_table, norm, error, own)
        # A NaN excludes nothing.
        whole = real & ~(second + bound < threshold[None, :])
        pending = real & ~(top + bound < threshold[None, :]) & ~whole

        # Rows advance together, each through its own sub-blocks.
        hit = tl.min(tl.where(pending, block[:, None], NONE), axis=0)  # [ROWS]
        while tl.min(hit, axis=0) < NONE:
            active = hit < NONE
            number = tl.load(entry + hit.to(tl.int64) * (n - first), mask=active, other=0) >> 32
            position = (number.to(tl.int32) & (SUBS - 1))[None, :] * FOLD
            for at in range(0, GROUP * FOLD, STEP):
                i = at + tl.arange(0, STEP)[:, None]
                code = _code(hit[None, :], position + i % FOLD, i // FOLD, TILE_CODES, GROUP, PARTS)
                present = active[None, :] & (code < k)
                score = exact_scores(z_row, codebook, code, present, codebook_stride, D, METRIC)
                top_here, index = best_of(score, code, present)
                best, best_index = merge(best, best_index, top_here, index)
                if COUNT:
                    count += tl.sum(present.to(tl.int32), axis=0)
            pending &= block[:, None] != hit[None, :]
            hit = tl.min(tl.where(pending, block[:, None], NONE), axis=0)

        # Whole blocks, one row at a time.
        key = one[None, :] * CHUNK + tl.arange(0, CHUNK)[:, None]
        least = tl.min(tl.min(tl.where(whole, key, NONE), axis=0), axis=0)
        while least < NONE:
            this_row = first + tl.program_id(0).to(tl.int64) * ROWS + least // CHUNK
            this_z = z + (this_row + tl.zeros([1], tl.int64)) * z_stride
            this_block = start + least % CHUNK
            for at in range(0, GROUP * SIZE, PIECE):
                i = at + tl.arange(0, PIECE)[:, None]
                code = _code(this_block, i % SIZE, i // SIZE, TILE_CODES, GROUP, PARTS)
                score = exact_scores(this_z, codebook, code, code < k, codebook_stride, D, METRIC)
                top_here, index = best_of(score, code, code < k)
                index = tl.where(one == least // CHUNK, index, NONE)
                best, best_index = merge(best, best_index, top_here, index)
                if COUNT:
                    real_codes = tl.sum((code < k).to(tl.int32), axis=0)
                    count += tl.where(one == least // CHUNK, real_codes, 0)
            whole &= key != least
            least = tl.min(tl.min(tl.where(whole, key, NONE), axis=0), axis=0)

    _store(
        indices, distances, row, inside, z_row, codebook, codebook_stride, best, best_index,
        has_nan, D, METRIC, DISTANCE,
    )  # fmt: skip
    if COUNT:
        tl.store(rescored + row, count, mask=inside)


@triton.jit(do_not_specialize=["k"])
def nearest_code_direct_kernel(
    z,  # [N, D]
    codebook,  # [K, D]
    indices,  # [N] int64
    distances,  # [N] float32, with DISTANCE
    rescored,  # [N] int64, with COUNT
    k,
    z_stride,
    codebook_stride,
    D: tl.constexpr,
    METRIC: tl.constexpr,
    CODES: tl.constexpr,
    DISTANCE: tl.constexpr,
    COUNT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    z_row = z + row * z_stride
    # Each of the CODES has its own best: they meet once, after the loop.
    best = tl.full([CODES, 1], float("nan"), tl.float64)
    best_index = tl.full([CODES, 1], NONE, tl.int32)
    for start in range(0, k, CODES):
        code = start + tl.arange(0, CODES)[:, None]
        score = exact_scores(z_row, codebook, code, code < k, codebook_stride, D, METRIC)
        index = tl.where((code < k) & (score == score), code, NONE)
        best, best_index = merge(best, best_index, score, index)
    best, best_index = best_of(best, best_index, best_index != NONE)
    # A NaN in the row makes every score NaN, and only a NaN in every code does too.
    every = tl.full([1], 1, tl.int1)
    _store(
        indices, distances, row, every, z_row, codebook, codebook_stride, best, best_index,
        ~every, D, METRIC, DISTANCE,
    )  # fmt: skip
    if COUNT:
        tl.store(rescored + row, tl.zeros([1], tl.int32) + k)


def _tile(d: int, tiles: dict[int, Tile]) -> tuple[Tile, int]:
    """The tile for `d` and the padded D of copies."""
    tile = next((tile for largest, tile in tiles.items() if d <= largest), None)
    tile = tile or list(tiles.values())[-1]
    return tile, triton.cdiv(d, tile.depth) * tile.depth


def _steps(row_tiles: int, spans: int, slots: int) -> int:
    """Spans to a program, such that the last wave of `slots` programs is nearly full."""

    def cost(steps: int) -> int:
        waves = triton.cdiv(row_tiles * triton.cdiv(spans, steps), slots)
        return waves * (steps + 1)

    splits = (max(1, waves * slots // row_tiles) for waves in range(1, 9))
    return min((triton.cdiv(spans, split) for split in splits), key=cost)


def _prepare_options(padded_d: int, tile: Tile) -> dict[str, Any]:
    width = triton.next_power_of_2(padded_d)
    rows = min(tile.span, max(1, 4096 // width))
    return {"WIDTH": width, "SPAN": tile.span, "ROWS": rows, "SUBS": tile.subs, "num_warps": 8}


def _coarse_options(tile: Tile, rows: int) -> dict[str, Any]:
    return {
        "TILE_ROWS": rows,
        "TILE_CODES": tile.codes,
        "DEPTH": tile.depth,
        "GROUP": tile.group,
        "FOLD": tile.fold,
        "PARTS": tile.parts,
        "num_warps": 4 if rows == 64 else tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _tile_rows(tile: Tile, n: int) -> int:
    return min(tile.rows, max(64, triton.next_power_of_2(n)))


def _rescore_options(d: int, tile: Tile, rows: int) -> dict[str, Any]:
    sub_block = tile.group * tile.fold
    # A register limit keeps the compiler from trading spills for occupancy.
    if rows <= 4096:  # a warp or two to a row, or most multiprocessors would idle
        shape = {"ROWS": 4, "CHUNK": 256} if d <= 16 else {"ROWS": 8, "CHUNK": 512}
        shape |= {"STEP": sub_block, "num_warps": 8, "maxnreg": 255}
    elif d <= 16:
        shape = {"ROWS": 8, "CHUNK": 32, "STEP": sub_block, "num_warps": 1, "maxnreg": 168}
    else:
        step = min(sub_block, 4 if d <= 256 else 2)
        shape = {"ROWS": 8, "CHUNK": 64, "STEP": step, "num_warps": 1, "maxnreg": 255}
    return {
        "TILE_CODES": tile.codes,
        "GROUP": tile.group,
        "FOLD": tile.fold,
        "PARTS": tile.parts,
        "PIECE": min(tile.block, 32 * shape["num_warps"]),
        "enable_fp_fusion": False,
        **shape,
    }


_DIRECT = {"CODES": 256, "num_warps": 8, "maxnreg": 128, "enable_fp_fusion": False}


def launch_nearest_code(
    z: Tensor,
    codebook: Tensor,
    metric: str,
    distance: bool = False,
    rescored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices [N] int64 and distances [N] float32; `z` [N, D] and `codebook` [K, D] by row.

    Args:
        z: float32, float16 or bfloat16.
        codebook: likewise.
        metric: "l2", "cosine" or "dot".
        distance: whether distances are computed; without it there are none.
        rescored: [N] int64, filled with the number of codes that were scored in float64.
    """
    (n, d), k = z.shape, codebook.shape[0]
    device = z.device
    indices = torch.empty(n, dtype=torch.int64, device=device)
    distances = torch.empty(n if distance else 0, dtype=torch.float32, device=device)
    if n == 0:
        return indices, distances

    gpu = device_of(device)
    config = CONFIGS[gpu.capability] if gpu else _INTERPRETER
    multiprocessors = gpu.multiprocessors if gpu else 1
    kind = METRICS[metric]
    z_stride, codebook_stride = z.stride(0), codebook.stride(0)
    if k * d <= config.direct_row and n * k * d <= config.direct:
        nearest_code_direct_kernel[(n,)](
            z, codebook, indices, distances, rescored, k, z_stride, codebook_stride,
            D=d, METRIC=kind, DISTANCE=distance, COUNT=rescored is not None, **_DIRECT,
        )  # fmt: skip
        return indices, distances

    tile, padded_d = _tile(d, config.tiles)
    spans = triton.cdiv(k, tile.span)
    far = max(z_stride, codebook_stride) >= 2**31  # the coarse pass has strides of 32 bits
    copy = z.dtype == torch.float32 or far or bool((d | z_stride | codebook_stride) % 16)
    z_scale, z_norm, z_error, span_scale, span_bound, column = floats(
        device, n, n, n, spans, 3 * spans, spans * tile.span
    )
    z_half, code_half = z, codebook
    if device.type == "cpu" and z.dtype == torch.bfloat16:
        z_half, code_half = z.float(), codebook.float()  # the interpreter cannot multiply bfloat16
    if copy:
        halves = torch.empty((n + spans * tile.span, padded_d), dtype=torch.float16, device=device)
        z_half, code_half = halves[:n], halves[n:]

    options = _prepare_options(padded_d, tile)
    nearest_code_prepare_kernel[(spans + triton.cdiv(n, options["ROWS"]),)](
        z, codebook, z_half, code_half, z_scale, z_norm, z_error, span_scale, span_bound,
        column, n, k, spans, z_stride, codebook_stride,
        D=d, PADDED_D=padded_d, METRIC=kind, COPY=copy, **options,
    )  # fmt: skip

    blocks = spans * tile.parts
    tile_rows = _tile_rows(tile, n)
    chunk = min(n, max(tile_rows, _TABLE_BYTES // (8 * blocks) // tile_rows * tile_rows))
    table = torch.empty(chunk * blocks, dtype=torch.int64, device=device)
    coarse = _coarse_options(tile, tile_rows)
    rescore = _rescore_options(d, tile, chunk)
    for first in range(0, n, chunk):
        end = min(first + chunk, n)
        row_tiles = triton.cdiv(end - first, tile_rows)
        steps = _steps(row_tiles, spans, multiprocessors * tile.programs)
        nearest_code_coarse_kernel[(row_tiles * triton.cdiv(spans, steps),)](
            z_half, code_half, z_scale, span_scale, column, table, first, end, k, row_tiles,
            spans, steps, z_half.stride(0) // 16, code_half.stride(0) // 16,
            D=padded_d if copy else d, METRIC=kind, COPY=copy, **coarse,
        )  # fmt: skip
        nearest_code_rescore_kernel[(triton.cdiv(end - first, rescore["ROWS"]),)](
            z, codebook, table, z_norm, z_error, span_bound, indices, distances,
            rescored, first, end, k, spans, z_stride, codebook_stride,
            D=d, METRIC=kind, DISTANCE=distance, COUNT=rescored is not None, **rescore,
        )  # fmt: skip
    return indices, distances


def launch_examples(main: bool = False) -> None:
    """Launches, on the meta device, that compile every tile with the inputs that models have.

    Args:
        main: only D = 256 in bfloat16.
    """
    shapes = [(256, torch.bfloat16, "cosine")]
    if not main:
        shapes += [
            (256, torch.bfloat16, "dot"),
            (256, torch.float32, "l2"),
            (12, torch.bfloat16, "cosine"),
            (12, torch.float32, "cosine"),
            (12, torch.float32, "l2"),
            (16, torch.float16, "l2"),
            (32, torch.bfloat16, "l2"),
            (48, torch.float32, "l2"),
            (64, torch.float32, "l2"),
            (64, torch.bfloat16, "cosine"),
            (128, torch.float32, "l2"),
            (128, torch.float32, "cosine"),
            (256, torch.float32, "cosine"),
            (128, torch.bfloat16, "l2"),
            (512, torch.float16, "dot"),
            (768, torch.float32, "l2"),
            (1024, torch.bfloat16, "cosine"),
        ]
    for d, dtype, metric in shapes:
        codebook = torch.empty(100_000, d, dtype=dtype, device="meta")
        for n in (60, 100, 1024, 65536):
            launch_nearest_code(codebook.new_empty(n, d), codebook, metric)
        launch_nearest_code(codebook.new_empty(65536, d), codebook, metric, True)
        rescored = torch.empty(1024, dtype=torch.int64, device="meta")
        launch_nearest_code(codebook[:1024], codebook, metric, True, rescored)
        launch_nearest_code(codebook[:1], codebook[:1], metric, True)
