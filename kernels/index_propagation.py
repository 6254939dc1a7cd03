"""Index back-propagation on the GPU, forward and backward, without the N x K matrix.

Tile kernels stream codes past rows, or rows past codes, on tensor cores: `fwd`, `bwd_z` and
`bwd_codebook`, which recompute the logits, and `fwd_codes` and `bwd_weights`, which only run where
the sharp softmax takes its logits from tensor cores. Where float32 logits are not enough for it,
`fwd_rows`, `bwd_rows` and `bwd_sparse` evaluate in float64 the blocks of codes that can carry any
of it, as a table of block maxima tells. float32 inputs enter as two fp16 parts, of which three
products are taken. Derivation: docs/ops/index_propagation.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titok_fast.kernels._arithmetic import LOG2E, powers
from titok_fast.kernels._device import device_of, floats
from titok_fast.kernels._exact import DOT, NONE, best_of, exact_scores, merge

_LARGEST_NORM = tl.constexpr(1e15)  # of what float32 can square; the bounds skip what is above
_SCALE = tl.constexpr(14)  # entries of up to 2^15 in fp16
_SHIFT = tl.constexpr(15)  # weights of up to 2^15 keep small ones normal in fp16
# Of (s - max) / T: below, a sum of a million terms loses nothing.
_SHARP_REACH = tl.constexpr(32.0)
# What float32 logits may cost the sharp softmax, relative, before it needs float64 ones.
_SHARP_ERROR = tl.constexpr(2e-5)
_FIXED_POINT = tl.constexpr(2.0**40)  # sums of integers do not depend on their order
_LOWEST = tl.constexpr(-200.0)

_TABLE_BYTES = 64 << 20
_COPY_BYTES = 64 << 20
_PARTIAL_BYTES = 64 << 20
_LONGEST_SUM = 256  # blocks; tensor cores truncate each partial sum, which float32 inputs notice
_MEANS_ROWS = 128
_PREPARE_REGISTERS = 128  # left alone, ptxas spills

# Columns of `statistics`.
_TOP = tl.constexpr(0)
_LOG_SUM = tl.constexpr(1)
_SHARP_TOP = tl.constexpr(2)
_SHARP_LOG_SUM = tl.constexpr(3)  # of a row that is not in float: what float32 drops of its top
_ENTROPY = tl.constexpr(4)
_MAX_PROBABILITY = tl.constexpr(5)
_MEAN_EXPONENT = tl.constexpr(6)  # of (s - sharp top) / T under q
_IN_FLOAT = tl.constexpr(7)  # 1: the sharp softmax of the row comes from tensor-core logits


@dataclass(frozen=True)
class Tile:
    """Rows by codes that a program multiplies at a time."""

    rows: int
    codes: int
    num_warps: int
    num_stages: int
    depth: int | None = None  # columns multiplied at a time, where all are too many,
    out: int | None = None  # and columns of the output to a program
    sharp: int | None = None  # what a backward launch for rows in float streams at a time instead

    def slices(self, d: int) -> int:
        """Programs that share `d` columns of the output."""
        return triton.cdiv(d, self.out or d)


@dataclass(frozen=True)
class Config:
    """Tiles of the kernels that own rows (forward, backward) and of those that own codes."""

    fwd: Tile
    bwd_z: Tile
    bwd_codebook: Tile


# By compute capability, then by (D rounded up to a power of two, parts), the latter up to the
# first that is large enough, the last ones for any D; a capability that is not listed takes the
# nearest lower one.
_WIDE = 1 << 20
_HOPPER = {
    (64, 1): Config(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    (64, 2): Config(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (128, 1): Config(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    (128, 2): Config(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (256, 1): Config(
        Tile(128, 64, 8, 3), Tile(128, 64, 8, 2, sharp=32), Tile(64, 128, 8, 2, sharp=32)
    ),
    (256, 2): Config(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2, sharp=16), Tile(32, 64, 4, 2)),
    (_WIDE, 2): Config(
        Tile(64, 32, 8, 3, 64, 256), Tile(64, 64, 8, 2, 64, 256), Tile(64, 64, 8, 2, 64, 256)
    ),
}
_AMPERE = {
    (64, 1): Config(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (64, 2): Config(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    (128, 1): Config(Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (128, 2): Config(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2, sharp=16), Tile(32, 32, 4, 2)),
    (256, 1): Config(Tile(64, 64, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (_WIDE, 1): Config(
        Tile(64, 32, 8, 3, 64, 256), Tile(64, 32, 8, 2, 64, 256), Tile(32, 64, 8, 2, 64, 256)
    ),
    (_WIDE, 2): Config(
        Tile(64, 32, 8, 2, 64, 256), Tile(64, 32, 8, 2, 64, 256), Tile(32, 64, 8, 2, 64, 256)
    ),
}
# Sums live in tensor memory: each of the three products of two parts takes columns of its own.
_BLACKWELL = {
    (64, 1): Config(Tile(64, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 128, 8, 2)),
    (64, 2): Config(Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2)),
    (128, 1): Config(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 128, 8, 2)),
    (128, 2): Config(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2, 64, 64), Tile(32, 128, 8, 2, 64, 64)),
    (256, 1): Config(Tile(128, 32, 8, 3), Tile(128, 64, 8, 2, sharp=32), Tile(32, 128, 8, 2)),
    (_WIDE, 1): Config(
        Tile(128, 32, 8, 2, 64, 256), Tile(128, 32, 8, 2, 64, 256), Tile(32, 128, 8, 2, 64, 256)
    ),
    (_WIDE, 2): Config(
        Tile(128, 32, 8, 2, 64, 128), Tile(128, 32, 8, 2, 64, 64), Tile(32, 128, 8, 2, 64, 64)
    ),
}
CONFIGS = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL, 120: _AMPERE}
# Small enough that tests reach several tiles.
_INTERPRETER = {
    (64, 2): Config(
        Tile(32, 128, 4, 1), Tile(32, 128, 4, 1, sharp=64), Tile(32, 128, 4, 1, sharp=16)
    ),
    (_WIDE, 2): Config(
        Tile(32, 128, 4, 1, 32, 64), Tile(32, 128, 4, 1, 32, 64), Tile(32, 128, 4, 1, 32, 64)
    ),
}


@triton.jit
def _up(top, PARTS: tl.constexpr):
    # What undoes the scale of a copy in two parts.
    if PARTS == 1:
        return 1.0
    _, up = powers(tl.load(top), _SCALE)
    return up


@triton.jit(do_not_specialize=["n"])
def index_propagation_measure_kernel(
    x,  # [N, D]
    norm,  # [N], or [blocks] with FOLD: the largest; inf: not representable, NaN: has a NaN
    top,  # [programs] largest finite entry
    n,
    stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK
    columns = tl.arange(0, WIDTH)[None, :]
    longest, largest = 0.0, 0.0
    for start in range(0, BLOCK, ROWS):
        row = first + start + tl.arange(0, ROWS)
        where = x + tl.minimum(row, n - 1).to(tl.int64)[:, None] * stride + columns
        values = tl.abs(tl.load(where, mask=columns < D, other=0.0).to(tl.float32))
        nan = tl.max((values != values).to(tl.int32), axis=1) == 1
        finite = tl.max((values > _LARGEST_NORM).to(tl.int32), axis=1) == 0
        values = tl.where(values <= _LARGEST_NORM, values, 0.0)
        entry = tl.max(values, axis=1)
        down, up = powers(entry, _SCALE)
        scaled = values * down[:, None]  # up to 2^15
        length = tl.sqrt(tl.sum(scaled * scaled, axis=1)) * up * 1.001
        length = tl.where(finite, length, float("inf"))
        if FOLD:
            longest = tl.maximum(longest, tl.max(tl.where(nan, float("inf"), length), axis=0))
        else:
            tl.store(norm + row, tl.where(nan, float("nan"), length), mask=row < n)
        largest = tl.maximum(largest, tl.max(entry, axis=0))
    if FOLD:
        tl.store(norm + tl.program_id(0), longest)
    tl.store(top + tl.program_id(0), largest)


@triton.jit(do_not_specialize=["first", "n", "rows"])
def index_propagation_copy_kernel(
    x,  # [N, D]
    top,  # []
    out,  # [PARTS, rows, WIDTH]
    first,
    n,
    rows,
    stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)[None, :]
    where = x + (first + row)[:, None] * stride + columns
    inside = (row < rows) & (first + row < n)
    values = tl.load(where, mask=inside[:, None] & (columns < D), other=0.0)
    to = out + row[:, None] * WIDTH + columns
    kept = (row < rows)[:, None]
    if PARTS == 2:
        down, _ = powers(tl.load(top), _SCALE)
        values = values.to(tl.float32) * down
        high = values.to(tl.float16)
        tl.store(to, high, mask=kept)
        low = (values - high.to(tl.float32)).to(tl.float16)
        tl.store(to + rows.to(tl.int64) * WIDTH, low, mask=kept)
    else:
        tl.store(to, values, mask=kept)


@triton.jit
def _load(
    x,  # pointer; from the high parts to the low ones; stride: both in units of 16 elements,
    first,  # which tells the compiler about alignment
    size,
    at,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
):
    # Columns at.. of rows first.. of `size` and their low parts; past the end, of the last row.
    pointer, part, stride = x
    columns = at + tl.arange(0, WIDTH)[None, :]
    row = tl.arange(0, ROWS)
    if not EVEN:
        row = tl.minimum(row, size - 1 - first)
    where = tl.cast(first, tl.int64) * (stride * 16) + (row[:, None] * (stride * 16) + columns)
    where += pointer
    whole: tl.constexpr = D % WIDTH == 0
    high = tl.load(where) if whole else tl.load(where, mask=columns < D, other=0.0)
    low = high
    if PARTS == 2:
        where += tl.cast(part, tl.int64) * 16
        low = tl.load(where) if whole else tl.load(where, mask=columns < D, other=0.0)
    return high, low


@triton.jit
def _store_tile(
    to,
    sums,  # [ROWS, OUT]
    first,  # row of the output
    rows,  # how many there are
    at,  # column
    D: tl.constexpr,
):
    row = tl.arange(0, sums.shape[0])[:, None]
    columns = at + tl.arange(0, sums.shape[1])[None, :]
    to += tl.cast(first, tl.int64) * D
    mask = (row < rows) & (columns < D)
    tl.store(to + (row * D + columns), sums.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _product(a, a_low, b, b_low, total, PARTS: tl.constexpr, CODES_FIRST: tl.constexpr = False):
    # total + a b^T; the same bits for rows by codes as, with CODES_FIRST, for codes by rows
    if PARTS == 2:
        if CODES_FIRST:
            total = tl.dot(a, tl.trans(b_low), total)
        total = tl.dot(a_low, tl.trans(b), total)
        if not CODES_FIRST:
            total = tl.dot(a, tl.trans(b_low), total)
    return tl.dot(a, tl.trans(b), total, input_precision="ieee")


@triton.jit
def _sliced(
    x, x_first, x_size, y, y_first, y_size,
    D: tl.constexpr, DEPTH: tl.constexpr, X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr,
    PARTS: tl.constexpr, EVEN: tl.constexpr, CODES_FIRST: tl.constexpr = False,
):  # fmt: skip
    # x y^T of rows that are too wide to be held, a slice of columns at a time.
    total = tl.zeros([X_ROWS, Y_ROWS], tl.float32)
    for at in tl.range(0, D, DEPTH):
        a, a_low = _load(x, x_first, x_size, at, D, DEPTH, X_ROWS, PARTS, False)
        b, b_low = _load(y, y_first, y_size, at, D, DEPTH, Y_ROWS, PARTS, EVEN)
        total = _product(a, a_low, b, b_low, total, PARTS, CODES_FIRST)
    return total


@triton.jit
def _slice(D: tl.constexpr, DEPTH: tl.constexpr, OUT: tl.constexpr):
    # First column of the output.
    return 0 if D <= DEPTH else tl.program_id(1) * OUT


@triton.jit
def _accumulate(weights, b, b_low, total, PARTS: tl.constexpr):
    # total + weights b, the weights rounded as b is
    high = weights.to(b.dtype)
    if PARTS == 2:
        low = (weights - high.to(tl.float32)).to(b.dtype)
        total = tl.dot(low, b, total)
        total = tl.dot(high, b_low, total)
    return tl.dot(high, b, total, input_precision="ieee")


@triton.jit
def _in_float(norm, code_norm, inverse_t):
    # Whether tensor-core logits serve the sharp softmax of a row; a NaN must pass through it.
    return ~(norm * code_norm * 2.0**-24 * inverse_t > _SHARP_ERROR)


@triton.jit
def _coarse_error(norm, code_norm, D: tl.constexpr, PARTS: tl.constexpr):
    # Bounds the error of tensor-core logits, which may truncate each partial sum.
    if PARTS == 1:
        unit: tl.constexpr = (D + 32) * 2.0**-22 * 1.05
    else:
        unit: tl.constexpr = (3 * D + 64) * 2.0**-22 * 1.05
    return unit * norm * code_norm + (1.0 + norm + code_norm) * ((D + 16) * 2.0**-124)


@triton.jit
def _row_tile(row_tiles, steps, blocks, ROWS: tl.constexpr):
    # Neighbouring programs share their codes, which thus come from memory once.
    program = tl.program_id(0)
    split = program // row_tiles
    begin = split * steps
    return program % row_tiles * ROWS, split, begin, tl.minimum(begin + steps, blocks)


@triton.jit(
    do_not_specialize=[
        "first", "n", "k", "inverse_t", "first_block", "blocks", "row_tiles", "steps", "slot",
        "slots", "z_part", "z_stride", "code_part", "code_stride",
    ]
)  # fmt: skip
def index_propagation_fwd_kernel(
    z,  # [PARTS, N, D]
    codes,  # [PARTS, k, D] of this launch
    z_top,  # []
    code_top,  # []
    z_norm,  # [N]
    code_norm,  # []
    state,  # [4, slots, n]: largest logit; sums of exp(s - top) 2^15, of q and of q x, unscaled
    mean,  # [slots, n, D]: sum of exp(s - top) 2^15 e
    table,  # [all blocks, n] largest logits
    first,  # row
    n,  # rows of this launch
    k,
    inverse_t,
    first_block,
    blocks,
    row_tiles,
    steps,  # blocks to a program
    slot,  # of the first program
    slots,
    z_part,  # between the parts, in units of 16 elements
    z_stride,
    code_part,
    code_stride,
    D: tl.constexpr,
    DEPTH: tl.constexpr,  # columns multiplied at a time; where fewer than D, a program has
    OUT: tl.constexpr,  # columns of the output
    OUT_D: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    SHARP: tl.constexpr,  # of two launches, that for tiles with rows in float
):
    start, split, begin, end = _row_tile(row_tiles, steps, blocks, ROWS)
    rows, book, out = (z, z_part, z_stride), (codes, code_part, code_stride), _slice(D, DEPTH, OUT)
    entry = start + tl.arange(0, ROWS)
    inside = entry < n
    if ENTROPY:
        row = first + tl.minimum(entry, n - 1)
        flags = _in_float(tl.load(z_norm + row), tl.load(code_norm), inverse_t)
        if tl.max(flags.to(tl.int32), axis=0) != SHARP:
            return
    scale = _up(z_top, PARTS) * _up(code_top, PARTS)
    last = first + n
    first += start
    if D <= DEPTH:
        a, a_low = _load(rows, first, last, 0, D, DEPTH, ROWS, PARTS, False)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sharp = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    if MEAN:
        sums = tl.zeros([ROWS, OUT], tl.float32)
    # Without the assumption products run one by one; invariants would spill.
    tl.assume(begin < end)
    for block in tl.range(begin, end, disable_licm=True):
        code = block * CODES
        if D <= DEPTH:
            e, e_low = _load(book, code, k, 0, D, DEPTH, CODES, PARTS, EVEN)
            s = _product(a, a_low, e, e_low, tl.zeros([ROWS, CODES], tl.float32), PARTS)
        else:
            s = _sliced(rows, first, last, book, code, k, D, DEPTH, ROWS, CODES, PARTS, EVEN)
            if MEAN:
                e, e_low = _load(book, code, k, out, D, OUT, CODES, PARTS, EVEN)
        s *= scale
        if not EVEN:
            s = tl.where((tl.arange(0, CODES) < k - code)[None, :], s, float("-inf"))
        largest = tl.max(s, axis=1)
        to = table + (first_block + block).to(tl.int64) * n + entry
        tl.store(to, largest, mask=inside)
        new_top = tl.maximum(top, largest)
        s -= new_top[:, None]
        p = tl.exp2(s * LOG2E + _SHIFT)
        if SHARP:
            x = tl.maximum(s * inverse_t, _LOWEST)
            q = tl.exp2(x * LOG2E)
            step = tl.maximum((top - new_top) * inverse_t, _LOWEST)
            factor = tl.exp2(step * LOG2E)
            weighted = factor * (weighted + sharp * step) + tl.sum(q * x, axis=1)
            sharp = factor * sharp + tl.sum(q, axis=1)
        factor = tl.exp2((top - new_top) * LOG2E)
        total = total * factor + tl.sum(p, axis=1)
        if MEAN:
            sums = _accumulate(p, e, e_low, sums * factor[:, None], PARTS)
        top = new_top

    at = tl.cast(slot + split, tl.int64) * n
    plane = tl.cast(slots, tl.int64) * n
    own = state + at + entry
    tl.store(own, top, mask=inside)
    tl.store(own + plane, total, mask=inside)
    if SHARP:
        tl.store(own + 2 * plane, sharp, mask=inside)
        tl.store(own + 3 * plane, weighted, mask=inside)
    if MEAN:
        _store_tile(mean, sums, at + start, n - start, out, OUT_D)


@triton.jit
def _wide_row(x, row, stride, D: tl.constexpr, WIDTH: tl.constexpr):  # [1, WIDTH] float64
    columns = tl.arange(0, WIDTH)[None, :]
    values = tl.load(x + row * stride + columns, mask=columns < D, other=0.0)
    return values.to(tl.float32).to(tl.float64)


@triton.jit
def _wide_logits(
    a,  # [1, WIDTH] float64
    codebook,
    code,  # [PIECE, 1]
    inside,  # [PIECE, 1]
    codebook_stride,
    D: tl.constexpr,
):
    # The codes [PIECE, WIDTH] and their logits [PIECE, 1] in float64.
    columns = tl.arange(0, a.shape[1])[None, :]
    where = codebook + code.to(tl.int64) * codebook_stride + columns
    e = tl.load(where, mask=inside & (columns < D), other=0.0).to(tl.float32)
    return e, tl.sum(a * e.to(tl.float64), axis=1)[:, None]


@triton.jit
def _wide_top(own):  # of a row that is not in float
    low = tl.load(own + _SHARP_LOG_SUM).to(tl.float64)
    return tl.load(own + _SHARP_TOP).to(tl.float64) + low


@triton.jit
def _sharpen(
    a, codebook, k, codebook_stride, entries, size, blocks, norm, block_norm, best, threshold,
    log_sum, inverse_t, counts,
    D: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, CHUNK: tl.constexpr,
    PARTS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    # Sums of q and q x over the blocks that reach the threshold; or, with COUNT, q to the counts.
    total = tl.zeros([1], tl.float64)
    weighted = tl.zeros([1], tl.float64)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        real = block < blocks
        error = _coarse_error(norm, tl.load(block_norm + block, mask=real, other=0.0), D, PARTS)
        top = tl.load(entries + block.to(tl.int64) * size, mask=real, other=0.0)
        pending = real & ~(top + error < threshold)
        hit = tl.min(tl.where(pending, block, NONE), axis=0)
        while hit < NONE:
            for at in range(0, BLOCK, PIECE):
                code = hit * BLOCK + at + tl.arange(0, PIECE)[:, None]
                inside = code < k
                _, score = _wide_logits(a, codebook, code, inside, codebook_stride, D)
                x = ((score - best[None, :]) * inverse_t).to(tl.float32)
                x = tl.where(x < _LOWEST, _LOWEST, x)  # lets a NaN pass
                if COUNT:
                    q = tl.where(inside, tl.exp(x - log_sum), 0.0)
                    fixed = (q * _FIXED_POINT + 0.5).to(tl.int64)
                    tl.atomic_add(counts + code, fixed, mask=q * _FIXED_POINT >= 0.5, sem="relaxed")
                else:
                    q = tl.where(inside, tl.exp(x), 0.0).to(tl.float64)
                    total += tl.sum(q, axis=0)
                    weighted += tl.sum(q * x, axis=0)
            pending &= block != hit
            hit = tl.min(tl.where(pending, block, NONE), axis=0)
    return total, weighted


@triton.jit(do_not_specialize=["first", "n", "k", "inverse_t", "blocks", "slots"])
def index_propagation_fwd_rows_kernel(
    z,  # [N, D]
    codebook,  # [K, D]
    z_norm,  # [N]
    block_norm,  # [blocks]
    code_norm,  # []
    code_top,  # []
    state,  # [4, slots, n]
    mean,  # [slots, n, D]
    table,  # [blocks, n]
    indices,  # [N] int64
    mean_code,  # [N, D]
    statistics,  # [N, 8]
    counts,  # [K + 1] int64: sums of q in fixed point, and the number of rows with a NaN
    first,
    n,
    k,
    inverse_t,
    blocks,
    slots,
    z_stride,
    codebook_stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    row = first + entry
    size = tl.cast(n, tl.int64)
    plane = slots * size
    own = statistics + row * 8
    split = tl.arange(0, STEP)
    columns = tl.arange(0, WIDTH)

    norm = tl.load(z_norm + row)
    in_float = _in_float(norm, tl.load(code_norm), inverse_t)
    top = float("-inf")
    for at in range(0, slots, STEP):
        where = state + (at + split) * size + entry
        top = tl.maximum(top, tl.max(tl.load(where, at + split < slots, float("-inf")), axis=0))
    total, sharp, weighted = 0.0, 0.0, 0.0
    sums = tl.zeros([WIDTH], tl.float32)
    for at in range(0, slots, STEP):
        real = at + split < slots
        where = state + (at + split) * size + entry
        step = tl.load(where, real, float("-inf")) - top
        factor = tl.exp(step)
        total += tl.sum(tl.load(where + plane, real, 0.0) * factor, axis=0)
        if MEAN:
            part = mean + ((at + split) * size + entry)[:, None] * D + columns[None, :]
            part = tl.load(part, real[:, None] & (columns < D)[None, :], 0.0)
            sums += tl.sum(part * factor[:, None], axis=0)
        if ENTROPY and in_float:
            step = tl.maximum(step * inverse_t, _LOWEST)
            factor = tl.exp(step)
            part_sharp = tl.load(where + 2 * plane, real, 0.0)
            sharp += tl.sum(part_sharp * factor, axis=0)
            part_weighted = tl.load(where + 3 * plane, real, 0.0)
            weighted += tl.sum((part_weighted + part_sharp * step) * factor, axis=0)
    if MEAN:
        sums = sums / total * _up(code_top, PARTS)
        tl.store(mean_code + row * D + columns, sums, mask=columns < D)
    total *= 2.0**-_SHIFT
    tl.store(own + _TOP, top)
    tl.store(own + _LOG_SUM, tl.log(total))
    tl.store(own + _MAX_PROBABILITY, 1.0 / total)

    entries = table + entry
    threshold = float("-inf")
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        real = block < blocks
        error = _coarse_error(norm, tl.load(block_norm + block, mask=real, other=0.0), D, PARTS)
        lower = tl.load(entries + block.to(tl.int64) * size, mask=real, other=float("-inf")) - error
        threshold = tl.maximum(threshold, tl.max(tl.where(lower == lower, lower, float("-inf"))))

    z_row = z + row * z_stride + tl.zeros([1], tl.int64)
    best = tl.full([1], float("nan"), tl.float64)
    best_index = tl.full([1], NONE, tl.int32)
    for start in range(0, tl.where(norm != norm, 0, blocks), CHUNK):
        block = start + tl.arange(0, CHUNK)
        real = block < blocks
        error = _coarse_error(norm, tl.load(block_norm + block, mask=real, other=0.0), D, PARTS)
        upper = tl.load(entries + block.to(tl.int64) * size, mask=real, other=0.0) + error
        pending = real & ~(upper < threshold)  # a NaN excludes nothing
        hit = tl.min(tl.where(pending, block, NONE), axis=0)
        while hit < NONE:
            code = hit * BLOCK + tl.arange(0, BLOCK)[:, None]
            score = exact_scores(z_row, codebook, code, code < k, codebook_stride, D, DOT, 4)
            here, index = best_of(score, code, code < k)
            best, best_index = merge(best, best_index, here, index)
            pending &= block != hit
            hit = tl.min(tl.where(pending, block, NONE), axis=0)
    index = tl.where(best_index == NONE, 0, best_index).to(tl.int64)
    tl.store(indices + row + tl.zeros([1], tl.int64), index)

    if ENTROPY:
        one = tl.zeros([1], tl.int64)
        if in_float:
            base = top + tl.zeros([1], tl.float32)
            log_sum = tl.log(sharp) + tl.zeros([1], tl.float32)
            exponent = weighted / sharp + tl.zeros([1], tl.float32)
            exponent = tl.where(total == total, exponent, float("nan"))
            kept = log_sum
        else:
            a = _wide_row(z, row, z_stride, D, WIDTH)
            base = best.to(tl.float32)
            kept = (best - base.to(tl.float64)).to(tl.float32)
            reach = base - _SHARP_REACH / inverse_t
            exact, exact_weighted = _sharpen(
                a, codebook, k, codebook_stride, entries, size, blocks, norm, block_norm, best,
                reach, base, inverse_t, counts, D, BLOCK, PIECE, CHUNK, PARTS, False,
            )  # fmt: skip
            log_sum = tl.log(exact.to(tl.float32))
            exponent = (exact_weighted / exact).to(tl.float32)
            _sharpen(
                a, codebook, k, codebook_stride, entries, size, blocks, norm, block_norm, best,
                reach, log_sum, inverse_t, counts, D, BLOCK, PIECE, CHUNK, PARTS, True,
            )  # fmt: skip
        tl.store(own + _SHARP_TOP + one, base)
        tl.store(own + _SHARP_LOG_SUM + one, kept)
        tl.store(own + _ENTROPY + one, log_sum - exponent)
        tl.store(own + _MEAN_EXPONENT + one, exponent)
        tl.store(own + _IN_FLOAT, in_float.to(tl.float32))
        tl.atomic_add(counts + k + one, one + 1, mask=exponent != exponent, sem="relaxed")
    else:
        tl.store(own + _SHARP_TOP, top)
        tl.store(own + _SHARP_LOG_SUM, 0.0)
        tl.store(own + _ENTROPY, 0.0)
        tl.store(own + _MEAN_EXPONENT, 0.0)
        tl.store(own + _IN_FLOAT, 0.0)


@triton.jit(
    do_not_specialize=[
        "n", "k", "inverse_t", "first_code", "last", "z_part", "z_stride", "code_part",
        "code_stride",
    ]
)  # fmt: skip
def index_propagation_fwd_codes_kernel(
    z,  # [PARTS, N, D]
    codes,  # [PARTS, k, D] of this launch
    z_top,  # []
    code_top,  # []
    statistics,  # [N, 8]
    any_in_float,  # []
    counts,  # [K + 1] int64
    code_probability,  # [K]
    n,
    k,
    inverse_t,
    first_code,
    last,  # K
    z_part,
    z_stride,
    code_part,
    code_stride,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    PARTS: tl.constexpr,
):
    start = tl.program_id(0) * CODES
    rows, book = (z, z_part, z_stride), (codes, code_part, code_stride)
    code = start.to(tl.int64) + tl.arange(0, CODES)
    inside = code < k
    code += first_code
    total = tl.load(counts + code, mask=inside, other=0).to(tl.float32) / _FIXED_POINT
    if tl.load(any_in_float) > 0:
        if D <= DEPTH:
            e, e_low = _load(book, start, k, 0, D, DEPTH, CODES, PARTS, False)
        scale = _up(z_top, PARTS) * _up(code_top, PARTS)
        sums = tl.zeros([CODES, ROWS], tl.float32)
        for first in tl.range(0, n, ROWS):
            row = first + tl.arange(0, ROWS)
            inside_rows = row < n
            row = tl.minimum(row, n - 1)
            own = statistics + row.to(tl.int64) * 8
            real = inside_rows & (tl.load(own + _IN_FLOAT) > 0)
            top = tl.where(real, tl.load(own + _SHARP_TOP), float("inf"))
            log_sum = tl.load(own + _SHARP_LOG_SUM)
            if D <= DEPTH:
                a, a_low = _load(rows, first, n, 0, D, DEPTH, ROWS, PARTS, False)
                zeros = tl.zeros([CODES, ROWS], tl.float32)
                s = _product(e, e_low, a, a_low, zeros, PARTS, True)
            else:
                s = _sliced(
                    book, start, k, rows, first, n, D, DEPTH, CODES, ROWS, PARTS, False, True
                )
            x = (s * scale - top[None, :]) * inverse_t - log_sum[None, :]
            x = tl.where(x > _LOWEST, x, _LOWEST)  # no NaN from a row that is not in float
            sums += tl.exp2(x * LOG2E)
        total += tl.sum(sums, axis=1)
    nans = tl.load(counts + last)
    total = tl.where(nans > 0, float("nan"), total / n)
    tl.store(code_probability + code, total, mask=inside)


@triton.jit(do_not_specialize=["n", "inverse_t"])
def index_propagation_bwd_prepare_kernel(
    grad,  # [N, D]
    grad_norm,  # [N]
    mean_code,  # [N, D]
    statistics,  # [N, 8]
    sample_weight,  # []
    largest_weight,  # [] of code_weight
    code_norm,  # []
    mean_score,  # [N] g . mean_code
    bound,  # [N] of the gradient of a logit
    n,
    inverse_t,
    grad_stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    columns = tl.arange(0, WIDTH)[None, :]
    kept = inside[:, None] & (columns < D)
    g = tl.load(grad + row[:, None] * grad_stride + columns, kept, 0.0).to(tl.float32)
    mean = tl.load(mean_code + row[:, None] * D + columns, kept, 0.0)
    product = tl.sum(g.to(tl.float64) * mean.to(tl.float64), axis=1).to(tl.float32)
    tl.store(mean_score + row, product, mask=inside)

    own = statistics + row * 8
    largest = tl.load(own + _MAX_PROBABILITY, inside, 0.0)
    largest *= 2.0 * tl.load(grad_norm + row, inside, 0.0) * tl.load(code_norm)
    log_sum = tl.load(own + _SHARP_LOG_SUM, inside, 0.0)
    slope = tl.abs(tl.load(sample_weight)) * (log_sum + tl.load(own + _ENTROPY, inside, 0.0) + 1.0)
    slope += 2.0 * tl.abs(tl.load(largest_weight))
    in_float = tl.load(own + _IN_FLOAT, inside, 0.0) > 0
    largest += tl.where(in_float, slope * tl.exp(-log_sum) * inverse_t / n, 0.0)
    tl.store(bound + row, tl.where(largest < float("inf"), largest, 0.0), mask=inside)


@triton.jit
def _sharp(below, log_sum, inverse_t):
    # (s - top) / T from s - top, bounded so that a weight of 0 gives no NaN, and q.
    x = tl.maximum(below * inverse_t, _LOWEST)
    return x, tl.exp2((x - log_sum) * LOG2E)


@triton.jit
def _wide_sharp(score, inside, top, log_sum, inverse_t):
    # The same from float64 logits, in float64: the two entropies may nearly cancel. A NaN passes.
    x = (score - top) * inverse_t
    x = tl.where(x < _LOWEST, _LOWEST, x)
    return x, tl.where(inside, tl.exp(x - log_sum), 0.0)


@triton.jit
def _sharp_gradient(x, q, mean_exponent, mean_weight, sample_weight, weight):
    # T N times dL/ds of the two entropies; x - mean_exponent is log q + H.
    return q * (weight - mean_weight - sample_weight * (x - mean_exponent))


@triton.jit(
    do_not_specialize=[
        "first", "n", "k", "inverse_t", "first_code", "blocks", "row_tiles", "steps", "slot",
        "slots", "z_part", "z_stride", "code_part", "code_stride",
    ]
)  # fmt: skip
def index_propagation_bwd_weights_kernel(
    z,  # [PARTS, N, D]
    codes,  # [PARTS, k, D] of this launch
    z_top,  # []
    code_top,  # []
    statistics,  # [N, 8]
    code_weight,  # [K]
    sharp_sums,  # [3, slots, n] of rows in float: sums of q, q (s - top) / T and q code_weight
    first,  # row
    n,  # rows of this launch
    k,
    inverse_t,
    first_code,
    blocks,
    row_tiles,
    steps,
    slot,
    slots,
    z_part,
    z_stride,
    code_part,
    code_stride,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    PARTS: tl.constexpr,
):
    start, split, begin, end = _row_tile(row_tiles, steps, blocks, ROWS)
    rows, book = (z, z_part, z_stride), (codes, code_part, code_stride)
    entry = start + tl.arange(0, ROWS)
    own = statistics + (first + tl.minimum(entry, n - 1)).to(tl.int64) * 8
    in_float = tl.load(own + _IN_FLOAT) > 0
    total = tl.zeros([ROWS], tl.float32)
    exponent = tl.zeros([ROWS], tl.float32)
    average = tl.zeros([ROWS], tl.float32)
    if tl.max(in_float.to(tl.int32), axis=0) == 1:
        top = tl.load(own + _SHARP_TOP)[:, None]
        log_sum = tl.where(in_float, tl.load(own + _SHARP_LOG_SUM), float("inf"))[:, None]
        scale = _up(z_top, PARTS) * _up(code_top, PARTS)
        last = first + n
        first += start
        if D <= DEPTH:
            a, a_low = _load(rows, first, last, 0, D, DEPTH, ROWS, PARTS, False)
        within = tl.arange(0, CODES)
        tl.assume(begin < end)
        for block in tl.range(begin, end, disable_licm=True):
            code = block * CODES
            weight = code_weight + first_code + code + within
            weight = tl.load(weight, mask=within < k - code, other=0.0)
            if D <= DEPTH:
                e, e_low = _load(book, code, k, 0, D, DEPTH, CODES, PARTS, False)
                s = _product(a, a_low, e, e_low, tl.zeros([ROWS, CODES], tl.float32), PARTS)
            else:
                s = _sliced(rows, first, last, book, code, k, D, DEPTH, ROWS, CODES, PARTS, False)
            x, q = _sharp(s * scale - top, log_sum, inverse_t)
            q = tl.where((within < k - code)[None, :], q, 0.0)
            total += tl.sum(q, axis=1)
            exponent += tl.sum(q * x, axis=1)
            average += tl.sum(q * weight[None, :], axis=1)
    to = sharp_sums + (slot + split).to(tl.int64) * n + entry
    plane = tl.cast(slots, tl.int64) * n
    tl.store(to, total, mask=entry < n)
    tl.store(to + plane, exponent, mask=entry < n)
    tl.store(to + 2 * plane, average, mask=entry < n)


@triton.jit(do_not_specialize=["first", "size", "n", "slots"])
def index_propagation_bwd_means_kernel(
    sharp_sums,  # [3, slots, size]
    statistics,  # [N, 8]
    sharp_means,  # [3, N] of rows in float: log sum exp(x) for x = (s - top) / T; under q the means
    first,  # of x and of code_weight. 0 in other rows
    size,
    n,
    slots,
    ROWS: tl.constexpr,
):
    # All of the backward's own logits, so that in each row the gradients of s sum to zero: those of
    # the forward may differ in the last bit, and 1 / T makes that a hundred times larger.
    entry = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = entry < size
    plane = tl.cast(slots, tl.int64) * size
    total = tl.zeros([ROWS], tl.float32)
    exponent = tl.zeros([ROWS], tl.float32)
    average = tl.zeros([ROWS], tl.float32)
    for slot in range(slots):
        part = sharp_sums + tl.cast(slot, tl.int64) * size + entry
        total += tl.load(part, inside, 0.0)
        exponent += tl.load(part + plane, inside, 0.0)
        average += tl.load(part + 2 * plane, inside, 0.0)
    row = first + entry
    own = statistics + row.to(tl.int64) * 8
    in_float = inside & (tl.load(own + _IN_FLOAT, inside, 0.0) > 0)
    log_sum = tl.load(own + _SHARP_LOG_SUM, inside, 0.0) + tl.log(total)
    to, plane = sharp_means + row, tl.cast(n, tl.int64)
    tl.store(to, tl.where(in_float, log_sum, 0.0), mask=inside)
    tl.store(to + plane, tl.where(in_float, exponent / total, 0.0), mask=inside)
    tl.store(to + 2 * plane, tl.where(in_float, average / total, 0.0), mask=inside)


@triton.jit(
    do_not_specialize=[
        "first", "size", "n", "k", "inverse_t", "first_code", "first_block", "blocks", "row_tiles",
        "steps", "slot", "z_part", "z_stride", "code_part", "code_stride",
    ]
)  # fmt: skip
def index_propagation_bwd_z_kernel(
    z,  # [PARTS, N, D]
    grad,  # [PARTS, N, D]
    codes,  # [PARTS, k, D] of this launch
    z_top,  # []
    grad_top,  # []
    code_top,  # []
    bound,  # [] of the gradients of logits
    statistics,  # [N, 8]
    mean_score,  # [N]
    z_norm,  # [N]
    block_norm,  # [all blocks]
    code_weight,  # [K]
    sharp_means,  # [3, N]
    sample_weight,  # []
    partial,  # [slots, size, D] ds E, scaled
    residuals,  # [slots, size] of the straight-through ds, which sum to 0 but for rounding, scaled
    needed,  # [all blocks, N] int8: where float64 logits carry some of the sharp softmax
    first,  # row
    size,  # rows of this launch
    n,
    k,
    inverse_t,
    first_code,
    first_block,
    blocks,
    row_tiles,
    steps,
    slot,
    z_part,
    z_stride,
    code_part,
    code_stride,
    D: tl.constexpr,
    DEPTH: tl.constexpr,  # columns multiplied at a time; where fewer than D, a program has
    OUT: tl.constexpr,  # columns of the output
    OUT_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # codes to an entry of `needed`
    CODES: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    SHARP: tl.constexpr,  # of two launches, that for tiles with rows in float
):
    to_a_block: tl.constexpr = BLOCK // CODES
    start, split, begin, end = _row_tile(row_tiles, steps * to_a_block, blocks * to_a_block, ROWS)
    rows, grads = (z, z_part, z_stride), (grad, z_part, z_stride)
    book, out = (codes, code_part, code_stride), _slice(D, DEPTH, OUT)
    entry = start + tl.arange(0, ROWS)
    inside = entry < size
    row = first + tl.minimum(entry, size - 1)
    own = statistics + row.to(tl.int64) * 8
    if ENTROPY:
        in_float = tl.load(own + _IN_FLOAT) > 0
        if tl.max(in_float.to(tl.int32), axis=0) != SHARP:
            return
        threshold = tl.load(own + _SHARP_TOP) - _SHARP_REACH / inverse_t
        norm = tl.load(z_norm + row)
    code_scale = _up(code_top, PARTS)
    scale, grad_scale = _up(z_top, PARTS) * code_scale, _up(grad_top, PARTS) * code_scale
    down, _ = powers(tl.load(bound), _SCALE)
    last = first + size
    first += start
    if D <= DEPTH:
        a, a_low = _load(rows, first, last, 0, D, DEPTH, ROWS, PARTS, False)
        g, g_low = _load(grads, first, last, 0, D, DEPTH, ROWS, PARTS, False)
    top = tl.load(own + _TOP)[:, None]
    # With the scale of the gradient, so that small ones stay normal in fp16.
    log_sum = (tl.load(own + _LOG_SUM) * LOG2E - tl.log2(down))[:, None]
    score = tl.load(mean_score + row)[:, None]
    if SHARP:
        # The two softmaxes of a row in float have one top.
        means, plane = sharp_means + row, tl.cast(n, tl.int64)
        sharp_log_sum = tl.load(means) - tl.log(down) - tl.log(inverse_t / n)
        sharp_log_sum = tl.where(in_float, sharp_log_sum, float("inf"))[:, None]
        mean_exponent = tl.load(means + plane)[:, None]
        mean = tl.load(means + 2 * plane)[:, None]
        spread = tl.load(sample_weight)

    within = tl.arange(0, CODES)
    wanted = tl.zeros([ROWS], tl.int1)
    residual = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, OUT], tl.float32)
    zeros = tl.zeros([ROWS, CODES], tl.float32)
    # Without the assumption products run one by one; invariants would spill.
    tl.assume(begin < end)
    for block in tl.range(begin, end, disable_licm=True):
        code = block * CODES
        if D <= DEPTH:
            e, e_low = _load(book, code, k, 0, D, DEPTH, CODES, PARTS, EVEN)
            s = _product(a, a_low, e, e_low, zeros, PARTS)
            slope = _product(g, g_low, e, e_low, zeros, PARTS)
        else:
            s = _sliced(rows, first, last, book, code, k, D, DEPTH, ROWS, CODES, PARTS, EVEN)
            slope = _sliced(grads, first, last, book, code, k, D, DEPTH, ROWS, CODES, PARTS, EVEN)
            e, e_low = _load(book, code, k, out, D, OUT, CODES, PARTS, EVEN)
        s *= scale
        if not EVEN:
            s = tl.where((within < k - code)[None, :], s, float("-inf"))
        below = s - top
        p = tl.exp2(below * LOG2E - log_sum)
        ds = p * (slope * grad_scale - score)
        residual += tl.sum(ds, axis=1)
        if ENTROPY:
            entry_block = first_block + block // to_a_block
            error = _coarse_error(norm, tl.load(block_norm + entry_block), D, PARTS)
            wanted &= block % to_a_block != 0
            wanted |= ~(tl.max(s, axis=1) + error < threshold) & ~in_float
            to = needed + entry_block.to(tl.int64) * n + row
            tl.store(to, wanted.to(tl.int8), mask=inside)
        if SHARP:
            weight = code_weight + first_code + code + within
            weight = tl.load(weight, mask=within < k - code, other=0.0)[None, :]
            x, q = _sharp(below, sharp_log_sum, inverse_t)
            ds += _sharp_gradient(x, q, mean_exponent, mean, spread, weight)
        sums = _accumulate(ds, e, e_low, sums, PARTS)

    at = tl.cast(slot + split, tl.int64) * size
    tl.store(residuals + at + entry, residual, mask=inside)
    _store_tile(partial, sums, at + start, size - start, out, OUT_D)


@triton.jit(do_not_specialize=["first", "size", "n", "k", "inverse_t", "blocks", "slots"])
def index_propagation_bwd_rows_kernel(
    z,  # [N, D]
    codebook,  # [K, D]
    statistics,  # [N, 8]
    mean_code,  # [N, D]
    code_weight,  # [K] float64
    sample_weight,  # []
    code_top,  # []
    bound,  # []
    partial,  # [slots, size, D]
    residuals,  # [slots, size]
    needed,  # [blocks, N] int8
    wide,  # [N, 3] float64: log sum exp(x), means of x = (s - top) / T and code_weight under q
    residual,  # [N]
    grad_z,  # [N, D]
    first,
    size,
    n,
    k,
    inverse_t,
    blocks,
    slots,
    z_stride,
    codebook_stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    row = first + entry
    own = statistics + row * 8
    split = tl.arange(0, STEP)
    columns = tl.arange(0, WIDTH)
    _, up = powers(tl.load(bound), _SCALE)
    rest = 0.0
    sums = tl.zeros([WIDTH], tl.float32)
    for at in range(0, slots, STEP):
        real = at + split < slots
        where = (at + split) * tl.cast(size, tl.int64) + entry
        rest += tl.sum(tl.load(residuals + where, real, 0.0), axis=0)
        part = tl.load(
            partial + where[:, None] * D + columns[None, :],
            mask=real[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        sums += tl.sum(part, axis=0)
    rest *= up
    tl.store(residual + row, rest)
    mean = tl.load(mean_code + row * D + columns, mask=columns < D, other=0.0)
    sums = sums * up * _up(code_top, PARTS) - rest * mean

    if ENTROPY and tl.load(own + _IN_FLOAT) == 0:
        a = _wide_row(z, row, z_stride, D, WIDTH)
        top = _wide_top(own)
        spread = tl.load(sample_weight).to(tl.float64)
        total = tl.zeros([1], tl.float64)
        exponent = tl.zeros([1], tl.float64)
        average = tl.zeros([1], tl.float64)
        for stage in tl.static_range(2):  # the means, then the gradient
            for start in range(0, blocks, CHUNK):
                block = start + tl.arange(0, CHUNK)
                where = needed + block.to(tl.int64) * n + row
                pending = tl.load(where, mask=block < blocks, other=0) != 0
                hit = tl.min(tl.where(pending, block, NONE), axis=0)
                while hit < NONE:
                    for at in range(0, BLOCK, PIECE):
                        code = hit * BLOCK + at + tl.arange(0, PIECE)[:, None]
                        inside = code < k
                        e, score = _wide_logits(a, codebook, code, inside, codebook_stride, D)
                        weight = tl.load(code_weight + code, mask=inside, other=0.0)
                        if stage == 0:
                            x, q = _wide_sharp(score, inside, top, 0.0, inverse_t)
                            total += tl.sum(q, axis=0)
                            exponent += tl.sum(q * x, axis=0)
                            average += tl.sum(q * weight, axis=0)
                        else:
                            log_sum = tl.log(total)[None, :]
                            x, q = _wide_sharp(score, inside, top, log_sum, inverse_t)
                            ds = _sharp_gradient(
                                x, q, exponent[None, :], average[None, :], spread, weight
                            )
                            sums += tl.sum((ds * (inverse_t / n)).to(tl.float32) * e, axis=0)
                    pending &= block != hit
                    hit = tl.min(tl.where(pending, block, NONE), axis=0)
            if stage == 0:
                exponent /= total
                average /= total
        means = wide + row * 3 + tl.zeros([1], tl.int64)
        tl.store(means, tl.log(total))
        tl.store(means + 1, exponent)
        tl.store(means + 2, average)
    to = grad_z + row * D + columns
    tl.store(to, sums.to(grad_z.dtype.element_ty), mask=columns < D)


@triton.jit(
    do_not_specialize=[
        "n", "k", "inverse_t", "first_code", "z_part", "z_stride", "code_part",
        "code_stride",
    ]
)  # fmt: skip
def index_propagation_bwd_codebook_kernel(
    z,  # [PARTS, N, D]
    grad,  # [PARTS, N, D]
    codes,  # [PARTS, k, D] of this launch
    z_top,  # []
    grad_top,  # []
    code_top,  # []
    bound,  # []
    statistics,  # [N, 8]
    any_in_float,  # []
    mean_score,  # [N]
    residual,  # [N]
    code_weight,  # [K]
    sharp_means,  # [3, N]
    sample_weight,  # []
    grad_codebook,  # [K, OUT_D]
    n,
    k,
    inverse_t,
    first_code,
    z_part,
    z_stride,
    code_part,
    code_stride,
    D: tl.constexpr,
    DEPTH: tl.constexpr,  # columns multiplied at a time; where fewer than D, a program has
    OUT: tl.constexpr,  # columns of the output
    OUT_D: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    PARTS: tl.constexpr,
    ENTROPY: tl.constexpr,
    SHARP: tl.constexpr,  # of two launches, that for when rows are in float
):
    if ENTROPY and (tl.load(any_in_float) > 0) != SHARP:
        return
    start = tl.program_id(0) * CODES
    code_scale, z_scale = _up(code_top, PARTS), _up(z_top, PARTS)
    scale, grad_scale = z_scale * code_scale, _up(grad_top, PARTS) * code_scale
    down, up = powers(tl.load(bound), _SCALE)
    up *= z_scale
    shift = tl.log2(down)
    rows, grads = (z, z_part, z_stride), (grad, z_part, z_stride)
    book, out = (codes, code_part, code_stride), _slice(D, DEPTH, OUT)
    if D <= DEPTH:
        e, e_low = _load(book, start, k, 0, D, DEPTH, CODES, PARTS, False)
    if SHARP:
        code = tl.arange(0, CODES)[:, None]
        weight = tl.load(code_weight + first_code + start + code, mask=code < k - start, other=0.0)
        unit, plane = tl.log(down) + tl.log(inverse_t / n), tl.cast(n, tl.int64)
        spread = tl.load(sample_weight)
    sums = tl.zeros([CODES, OUT], tl.float32)
    zeros = tl.zeros([CODES, ROWS], tl.float32)
    tl.assume(n > 0)
    for first in tl.range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)
        real = row < n
        row = tl.minimum(row, n - 1)
        if D <= DEPTH:
            a, a_low = _load(rows, first, n, 0, D, DEPTH, ROWS, PARTS, False)
            g, g_low = _load(grads, first, n, 0, D, DEPTH, ROWS, PARTS, False)
            s = _product(e, e_low, a, a_low, zeros, PARTS, True)
            slope = _product(e, e_low, g, g_low, zeros, PARTS, True)
        else:
            s = _sliced(book, start, k, rows, first, n, D, DEPTH, CODES, ROWS, PARTS, False, True)
            slope = _sliced(
                book, start, k, grads, first, n, D, DEPTH, CODES, ROWS, PARTS, False, True
            )
            a, a_low = _load(rows, first, n, out, D, OUT, ROWS, PARTS, False)
        s *= scale
        slope *= grad_scale
        own = statistics + row.to(tl.int64) * 8
        top = tl.where(real, tl.load(own + _TOP), float("inf"))
        log_sum = tl.load(own + _LOG_SUM) * LOG2E - shift
        score, rest = tl.load(mean_score + row), tl.load(residual + row)
        below = s - top[None, :]
        p = tl.exp2(below * LOG2E - log_sum[None, :])
        if PARTS == 1:  # half precision can do with fewer registers
            ds = p * (slope - (score + rest)[None, :])
        else:
            ds = p * (slope - score[None, :] - rest[None, :])
        if SHARP:
            real &= tl.load(own + _IN_FLOAT) > 0
            means = sharp_means + row
            sharp_log_sum = tl.where(real, tl.load(means) - unit, float("inf"))[None, :]
            mean_exponent = tl.load(means + plane)[None, :]
            mean = tl.load(means + 2 * plane)[None, :]
            x, q = _sharp(below, sharp_log_sum, inverse_t)
            ds += _sharp_gradient(x, q, mean_exponent, mean, spread, weight)
        sums = _accumulate(ds, a, a_low, sums, PARTS)
    _store_tile(grad_codebook, sums * up, first_code + start, k - start, out, OUT_D)


@triton.jit(do_not_specialize=["n", "k", "inverse_t"])
def index_propagation_bwd_sparse_kernel(
    z,  # [N, D]
    grad,  # [N, D]
    codebook,  # [K, D]
    indices,  # [N] int64
    statistics,  # [N, 8]
    code_weight,  # [K] float64
    wide,  # [N, 3] float64, of bwd_rows
    sample_weight,  # []
    needed,  # [blocks, N] int8
    grad_codebook,  # [K, D], added to
    n,
    k,
    inverse_t,
    z_stride,
    grad_stride,
    codebook_stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    CHUNK: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    this = tl.program_id(0)
    flags = needed + this // (BLOCK // PIECE) * tl.cast(n, tl.int64)
    columns = tl.arange(0, WIDTH)
    real = columns < D
    code = this * PIECE + tl.arange(0, PIECE)[:, None]
    inside = code < k
    sums = tl.zeros([PIECE, WIDTH], tl.float32)
    found = 0
    for start in range(0, n, CHUNK):
        row = start + tl.arange(0, CHUNK)
        pending = tl.load(indices + row, mask=row < n, other=-PIECE) // PIECE == this
        if ENTROPY:
            pending |= tl.load(flags + row, mask=row < n, other=0) != 0
        hit = tl.min(tl.where(pending, row, NONE), axis=0)
        while hit < NONE:
            found = 1
            at = hit.to(tl.int64)
            g = tl.load(grad + at * grad_stride + columns, mask=real, other=0.0).to(tl.float32)
            sums += tl.where(code == tl.load(indices + at), g[None, :], 0.0)
            if ENTROPY and tl.load(flags + at) != 0:
                own = statistics + at * 8
                a = _wide_row(z, at, z_stride, D, WIDTH)
                _, score = _wide_logits(a, codebook, code, inside, codebook_stride, D)
                means = wide + at * 3
                x, q = _wide_sharp(score, inside, _wide_top(own), tl.load(means), inverse_t)
                ds = _sharp_gradient(
                    x, q, tl.load(means + 1), tl.load(means + 2),
                    tl.load(sample_weight).to(tl.float64),
                    tl.load(code_weight + code, mask=inside, other=0.0),
                )  # fmt: skip
                sums += (ds * (inverse_t / n)).to(tl.float32) * a.to(tl.float32)
            pending &= row != hit
            hit = tl.min(tl.where(pending, row, NONE), axis=0)
    if found == 1:
        to = grad_codebook + code.to(tl.int64) * D + columns[None, :]
        kept = inside & real[None, :]
        sums += tl.load(to, mask=kept, other=0.0).to(tl.float32)
        tl.store(to, sums.to(grad_codebook.dtype.element_ty), mask=kept)


@dataclass(frozen=True)
class _Layout:
    """How tile kernels see rows and codes: `parts` operands of `d` columns, `width` with padding.

    Inputs are read in place where they are half precision and aligned, and all rows have one
    stride; otherwise copied.
    """

    d: int
    width: int
    parts: int
    copy: bool

    @property
    def dtype(self) -> torch.dtype | None:
        return torch.float16 if self.parts == 2 else None


def _layout(*inputs: Tensor) -> _Layout:
    """For the rows z, perhaps those of their gradient, and the codebook."""
    d, parts = inputs[0].shape[1], 2 if inputs[0].dtype == torch.float32 else 1
    strides = [x.stride(0) for x in inputs]
    aligned = all((d | stride) % 16 == 0 and stride < 1 << 22 for stride in strides)
    return _layout_of(d, parts, aligned and strides[0] == strides[-2])


def _layout_of(d: int, parts: int, in_place: bool) -> _Layout:
    width, copy = max(16, triton.next_power_of_2(d)), parts == 2 or not in_place
    return _Layout(width if copy else d, width, parts, copy)


def _operand(x: Tensor) -> Tensor:
    """`x`, in float32 in the interpreter, which cannot multiply bfloat16."""
    return x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x


def _measure(x: Tensor, layout: _Layout, block: int | None = None) -> tuple[Tensor, Tensor]:
    """Norms [N], or the largest of each block of rows, rounded up; and the largest entry []."""
    n, d = x.shape
    most = max(1, 4096 // layout.width)
    rows = min(most, block or most)
    programs = triton.cdiv(n, block or rows)
    norm = torch.empty(programs if block else n, dtype=torch.float32, device=x.device)
    top = torch.empty(programs, dtype=torch.float32, device=x.device)
    index_propagation_measure_kernel[(programs,)](
        x, norm, top, n, x.stride(0),
        D=d, WIDTH=layout.width, ROWS=rows, BLOCK=block or rows, FOLD=block is not None,
    )  # fmt: skip
    top = top.amax()
    if layout.parts == 2:  # what fp16 loses of entries far below the largest
        norm += top * (d**0.5 * 2.0**-18)
    return norm, top


def _copy(x: Tensor, top: Tensor, layout: _Layout, first: int, out: Tensor) -> None:
    """Rows first.. of `x` to the operands `out` [parts, rows, width]; zeros past the end."""
    rows = max(1, 4096 // layout.width)
    index_propagation_copy_kernel[(triton.cdiv(out.shape[1], rows),)](
        x, top, out, first, x.shape[0], out.shape[1], x.stride(0),
        D=x.shape[1], WIDTH=layout.width, PARTS=layout.parts, ROWS=rows,
    )  # fmt: skip


def _rows(x: Tensor, top: Tensor, layout: _Layout) -> tuple[Tensor, int, int]:
    """Operand of all rows, the distance between its parts and its row stride, in 16 elements."""
    x = _operand(x)
    if not layout.copy:
        return x, 0, x.stride(0) // 16
    shape = (layout.parts, x.shape[0], layout.width)
    out = torch.empty(shape, dtype=layout.dtype or x.dtype, device=x.device)
    _copy(x, top, layout, 0, out)
    return out, out.stride(0) // 16, layout.width // 16


def _codes_to_a_chunk(layout: _Layout, k: int, multiple: int) -> int:
    """How many codes are copied at a time."""
    most = _COPY_BYTES // (2 * layout.parts * layout.width) // multiple * multiple
    return min(k, most) if layout.copy else k


def _codes(
    codebook: Tensor, top: Tensor, layout: _Layout, multiple: int
) -> Iterator[tuple[int, int, Tensor, int, int]]:
    """Chunks of the codebook: first code, number of codes, then as `_rows`."""
    k, most = codebook.shape[0], _codes_to_a_chunk(layout, codebook.shape[0], multiple)
    codebook = _operand(codebook)
    if not layout.copy:
        yield 0, k, codebook, 0, codebook.stride(0) // 16
        return
    shape = (layout.parts, most, layout.width)
    out = torch.empty(shape, dtype=layout.dtype or codebook.dtype, device=codebook.device)
    for first in range(0, k, most):
        _copy(codebook, top, layout, first, out)
        yield first, min(k - first, most), out, out.stride(0) // 16, layout.width // 16


def _config(device: torch.device, layout: _Layout) -> tuple[Config, int]:
    """Tiles and number of multiprocessors."""
    gpu = device_of(device)
    if gpu is None:
        return _choose(_INTERPRETER, layout), 1
    return _choose(CONFIGS[gpu.capability], layout), gpu.multiprocessors


def _choose(table: dict[tuple[int, int], Config], layout: _Layout) -> Config:
    return next(
        config
        for (width, parts), config in table.items()
        if layout.width <= width and layout.parts <= parts
    )


@dataclass(frozen=True)
class _Plan:
    """How a kernel that owns rows is launched: a program to a tile of rows and a part of the codes.

    Partial sums have a slot for each part of each chunk of codes.
    """

    n: int
    chunk: int  # rows of a launch
    steps: int  # blocks of codes to a program
    splits: int  # programs to a whole chunk of codes
    slots: int
    tile: Tile

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """First row, number of rows and of tiles of each launch."""
        for first in range(0, self.n, self.chunk):
            size = min(self.chunk, self.n - first)
            yield first, size, triton.cdiv(size, self.tile.rows)

    def codes(self, count: int) -> tuple[int, int]:
        """Blocks of a chunk of codes and the programs that share them."""
        blocks = triton.cdiv(count, self.tile.codes)
        return blocks, triton.cdiv(blocks, self.steps)


def _plan(
    n: int, k: int, d: int, layout: _Layout, tile: Tile, multiprocessors: int, table: bool
) -> _Plan:
    """Chunks of rows that keep partial sums, and a table of block maxima, within bounds."""
    codes = _codes_to_a_chunk(layout, k, tile.codes)
    chunks, blocks = triton.cdiv(k, codes), triton.cdiv(codes, tile.codes)
    least = triton.cdiv(blocks, _LONGEST_SUM) if layout.parts == 2 else 1  # programs to a chunk
    most = _PARTIAL_BYTES // (4 * d * chunks * least)
    if table:
        most = min(most, _TABLE_BYTES // (4 * triton.cdiv(k, tile.codes)))
    chunk = min(n, max(1, most // tile.rows) * tile.rows)

    row_tiles = triton.cdiv(chunk, tile.rows)
    most = max(1, min(blocks, _PARTIAL_BYTES // (4 * d * chunks * chunk)))

    def cost(steps: int) -> int:  # the last wave of programs should be nearly full
        waves = triton.cdiv(row_tiles * triton.cdiv(blocks, steps), multiprocessors)
        return waves * (steps + 2)

    choices = (max(least, min(most, waves * multiprocessors // row_tiles)) for waves in range(1, 9))
    steps = min((triton.cdiv(blocks, splits) for splits in choices), key=cost)
    splits = triton.cdiv(blocks, steps)
    last = triton.cdiv(triton.cdiv(k - (chunks - 1) * codes, tile.codes), steps)
    return _Plan(n, chunk, steps, splits, (chunks - 1) * splits + last, tile)


def _tile_options(tile: Tile, layout: _Layout, out_d: int | None = None) -> dict[str, Any]:
    """Of the kernels with tiles; `out_d`: columns of their output, if it has any."""
    out = {"OUT": tile.out or layout.width, "OUT_D": out_d} if out_d else {}
    return {
        "D": layout.d,
        "DEPTH": tile.depth or layout.width,
        **out,
        "PARTS": layout.parts,
        "ROWS": tile.rows,
        "CODES": tile.codes,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _bwd_z_options(tile: Tile, layout: _Layout, out_d: int, sharp: bool) -> dict[str, Any]:
    codes = tile.sharp if sharp and tile.sharp else tile.codes
    options = _tile_options(replace(tile, codes=codes), layout, out_d)
    return {"SHARP": sharp, "BLOCK": tile.codes, **options}


def _bwd_codebook_options(tile: Tile, layout: _Layout, out_d: int, sharp: bool) -> dict[str, Any]:
    rows = tile.sharp if sharp and tile.sharp else tile.rows
    return {"SHARP": sharp, **_tile_options(replace(tile, rows=rows), layout, out_d)}


def _block_options(d: int, layout: _Layout, block: int, interpreted: bool) -> dict[str, Any]:
    """Of the kernels that read codes in float64, a few at a time."""
    return {
        "D": d,
        "WIDTH": layout.width,
        "BLOCK": block,
        "PIECE": block if interpreted else min(block, max(1, 4096 // layout.width)),
        "CHUNK": 1024,
        "num_warps": 8,
        # Left alone, ptxas spills to run more programs at a time.
        "maxnreg": 128 if layout.width <= 256 else 255,
        "enable_fp_fusion": False,
    }


def _row_options(d: int, layout: _Layout, block: int, interpreted: bool) -> dict[str, Any]:
    return {"STEP": 8, "PARTS": layout.parts, **_block_options(d, layout, block, interpreted)}


def _fwd_rows_options(d: int, layout: _Layout, block: int, interpreted: bool) -> dict[str, Any]:
    options = _row_options(d, layout, block, interpreted)
    if layout.parts == 1 and layout.width == 256:
        options["maxnreg"] = 112 if d == 256 else 104  # with 120 to 168 ptxas spills on sm_90
    return options


def launch_index_propagation_fwd(
    z: Tensor,
    codebook: Tensor,
    temperature: float,
    entropy: bool,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the op `index_propagation_fwd`; `z` [N, D] and `codebook` [K, D] by row.

    Args:
        z: float32, float16 or bfloat16.
        codebook: likewise.
        temperature: of the sharp softmax.
        entropy: whether to compute it.
        gradients: whether a backward pass follows; without, the mean code is empty.
    """
    (n, d), k = z.shape, codebook.shape[0]
    device, interpreted = z.device, z.device.type == "cpu"
    indices = torch.empty(n, dtype=torch.int64, device=device)
    mean_code = torch.empty(n if gradients else 0, d, dtype=torch.float32, device=device)
    statistics = torch.empty(n, 8, dtype=torch.float32, device=device)
    code_probability = torch.zeros(k, dtype=torch.float32, device=device)
    support_codes = torch.empty(n, 0, dtype=torch.int32, device=device)
    support_weights = torch.empty(n, 0, dtype=torch.float32, device=device)
    outputs = indices, mean_code, statistics, code_probability, support_codes, support_weights
    if n == 0:
        return outputs

    layout = _layout(z, codebook)
    config, multiprocessors = _config(z.device, layout)
    tile, inverse_t = config.fwd, 1.0 / temperature
    z_norm, z_top = _measure(z, layout)
    block_norm, code_top = _measure(codebook, layout, tile.codes)
    code_norm = block_norm.amax()
    rows, z_part, z_stride = _rows(z, z_top, layout)
    counts = torch.zeros(k + 1, dtype=torch.int64, device=device)

    blocks = block_norm.shape[0]
    plan = _plan(n, k, d, layout, tile, multiprocessors, table=True)
    slots = plan.slots
    table = torch.empty(blocks * plan.chunk, dtype=torch.float32, device=device)
    state = torch.empty(4 * slots * plan.chunk, dtype=torch.float32, device=device)
    mean = torch.empty(slots * plan.chunk * d * gradients, dtype=torch.float32, device=device)
    slices = tile.slices(d) if gradients else 1
    for first, size, row_tiles in plan.rows():
        for part, chunk in enumerate(_codes(codebook, code_top, layout, tile.codes)):
            code, count, codes, code_part, code_stride = chunk
            here, programs = plan.codes(count)
            for sharp in (False, True)[: 1 + entropy]:
                index_propagation_fwd_kernel[(row_tiles * programs, slices)](
                    rows, codes, z_top, code_top, z_norm, code_norm, state, mean, table, first,
                    size, count, inverse_t, code // tile.codes, here, row_tiles, plan.steps,
                    part * plan.splits, slots, z_part, z_stride, code_part, code_stride,
                    EVEN=count % tile.codes == 0, ENTROPY=entropy, MEAN=gradients, SHARP=sharp,
                    **_tile_options(tile, layout, d),
                )  # fmt: skip
        index_propagation_fwd_rows_kernel[(size,)](
            z, codebook, z_norm, block_norm, code_norm, code_top, state, mean, table, indices,
            mean_code, statistics, counts, first, size, k, inverse_t, blocks, slots, z.stride(0),
            codebook.stride(0), ENTROPY=entropy, MEAN=gradients,
            **_fwd_rows_options(d, layout, tile.codes, interpreted),
        )  # fmt: skip
    if entropy:
        tile = config.bwd_codebook
        any_in_float = statistics[:, _IN_FLOAT.value].amax()
        for code, count, codes, code_part, code_stride in _codes(
            codebook, code_top, layout, tile.codes
        ):
            index_propagation_fwd_codes_kernel[(triton.cdiv(count, tile.codes),)](
                rows, codes, z_top, code_top, statistics, any_in_float, counts, code_probability,
                n, count, inverse_t, code, k, z_part, z_stride, code_part, code_stride,
                **_tile_options(tile, layout),
            )  # fmt: skip
    return outputs


def launch_index_propagation_bwd(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    mean_code: Tensor,
    statistics: Tensor,
    sample_weight: Tensor,
    code_weight: Tensor,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs of the op `index_propagation_bwd`, in the inputs' dtype.

    Args:
        grad: [N, D] of the quantized rows.
        z: [N, D].
        codebook: [K, D].
        indices: [N] int64.
        mean_code: [N, D] float32, of the forward pass.
        statistics: [N, 8] float32, likewise.
        sample_weight: [] gradient of the mean entropy of the rows.
        code_weight: [K] gradient of the mean over rows of q.
        temperature: as in the forward pass.
        entropy: likewise.
    """
    (n, d), k = z.shape, codebook.shape[0]
    device, interpreted = z.device, z.device.type == "cpu"
    grad_z = torch.empty(n, d, dtype=z.dtype, device=device)
    if n == 0:
        return grad_z, torch.zeros(k, d, dtype=codebook.dtype, device=device)
    grad_codebook = torch.empty(k, d, dtype=codebook.dtype, device=device)

    grad = grad.to(z.dtype)
    wide_weight, code_weight = code_weight.double().contiguous(), code_weight.float().contiguous()
    wide = torch.empty(n, 3, dtype=torch.float64, device=device)
    mean_code, statistics = mean_code.contiguous(), statistics.contiguous()
    layout = _layout(z, grad, codebook)
    config, multiprocessors = _config(z.device, layout)
    tile, inverse_t = config.bwd_z, 1.0 / temperature
    z_norm, z_top = _measure(z, layout)
    grad_norm, grad_top = _measure(grad, layout)
    block_norm, code_top = _measure(codebook, layout, tile.codes)
    rows, z_part, z_stride = _rows(z, z_top, layout)
    grads, _, _ = _rows(grad, grad_top, layout)
    mean_score, bound, residual = floats(device, n, n, n)
    own_rows = max(1, 4096 // layout.width)
    index_propagation_bwd_prepare_kernel[(triton.cdiv(n, own_rows),)](
        grad, grad_norm, mean_code, statistics, sample_weight, code_weight.abs().amax(),
        block_norm.amax(), mean_score, bound, n, inverse_t, grad.stride(0),
        D=d, WIDTH=layout.width, ROWS=own_rows, maxnreg=_PREPARE_REGISTERS,
    )  # fmt: skip
    bound = bound.amax()

    blocks = block_norm.shape[0]
    plan = _plan(n, k, d, layout, tile, multiprocessors, table=False)
    slots = plan.slots
    needed = torch.empty(blocks * n if entropy else 1, dtype=torch.int8, device=device)
    partial = torch.empty(slots * plan.chunk * d, dtype=torch.float32, device=device)
    all_parts = slots * plan.chunk
    residuals, sharp_sums, sharp_means = floats(
        device, all_parts, 3 * all_parts if entropy else 1, 3 * n if entropy else 1
    )
    options = _row_options(d, layout, tile.codes, interpreted)
    for first, size, row_tiles in plan.rows():
        if entropy:
            for part, chunk in enumerate(_codes(codebook, code_top, layout, tile.codes)):
                code, count, codes, code_part, code_stride = chunk
                here, programs = plan.codes(count)
                index_propagation_bwd_weights_kernel[(row_tiles * programs,)](
                    rows, codes, z_top, code_top, statistics, code_weight, sharp_sums, first, size,
                    count, inverse_t, code, here, row_tiles, plan.steps, part * plan.splits, slots,
                    z_part, z_stride, code_part, code_stride, **_tile_options(tile, layout),
                )  # fmt: skip
            index_propagation_bwd_means_kernel[(triton.cdiv(size, _MEANS_ROWS),)](
                sharp_sums, statistics, sharp_means, first, size, n, slots, ROWS=_MEANS_ROWS
            )
        for part, chunk in enumerate(_codes(codebook, code_top, layout, tile.codes)):
            code, count, codes, code_part, code_stride = chunk
            here, programs = plan.codes(count)
            for sharp in (False, True)[: 1 + entropy]:
                index_propagation_bwd_z_kernel[(row_tiles * programs, tile.slices(d))](
                    rows, grads, codes, z_top, grad_top, code_top, bound, statistics, mean_score,
                    z_norm, block_norm, code_weight, sharp_means, sample_weight, partial,
                    residuals, needed, first, size, n, count, inverse_t, code, code // tile.codes,
                    here, row_tiles, plan.steps, part * plan.splits, z_part, z_stride,
                    code_part, code_stride, EVEN=count % tile.codes == 0, ENTROPY=entropy,
                    **_bwd_z_options(tile, layout, d, sharp),
                )  # fmt: skip
        index_propagation_bwd_rows_kernel[(size,)](
            z, codebook, statistics, mean_code, wide_weight, sample_weight, code_top, bound,
            partial, residuals, needed, wide, residual, grad_z, first, size, n, k,
            inverse_t, blocks, slots, z.stride(0), codebook.stride(0), ENTROPY=entropy, **options,
        )  # fmt: skip

    block, tile = tile.codes, config.bwd_codebook
    any_in_float = statistics[:, _IN_FLOAT.value].amax()
    for chunk in _codes(codebook, code_top, layout, tile.codes):
        code, count, codes, code_part, code_stride = chunk
        for sharp in (False, True)[: 1 + entropy]:
            index_propagation_bwd_codebook_kernel[(triton.cdiv(count, tile.codes), tile.slices(d))](
                rows, grads, codes, z_top, grad_top, code_top, bound, statistics, any_in_float,
                mean_score, residual, code_weight, sharp_means, sample_weight, grad_codebook, n,
                count, inverse_t, code, z_part, z_stride, code_part, code_stride,
                ENTROPY=entropy, **_bwd_codebook_options(tile, layout, d, sharp),
            )  # fmt: skip
    options = _block_options(d, layout, block, interpreted)
    index_propagation_bwd_sparse_kernel[(triton.cdiv(k, options["PIECE"]),)](
        z, grad, codebook, indices, statistics, wide_weight, wide, sample_weight, needed,
        grad_codebook, n, k, inverse_t, z.stride(0), grad.stride(0), codebook.stride(0),
        ENTROPY=entropy, **options,
    )  # fmt: skip
    return grad_z, grad_codebook


def launch_examples(main: bool = False) -> None:
    """Launches, on the meta device, that compile every tile, forward and backward.

    Args:
        main: only D = 256 in float32, whose products are the largest.
    """
    shapes = [(256, torch.float32)]
    if not main:
        shapes += [
            (12, torch.bfloat16),
            (12, torch.float32),
            (48, torch.bfloat16),
            (64, torch.float32),
            (64, torch.bfloat16),
            (96, torch.float32),
            (96, torch.bfloat16),
            (128, torch.bfloat16),
            (128, torch.float32),
            (192, torch.bfloat16),
            (256, torch.bfloat16),
            (512, torch.float16),
            (512, torch.float32),
            (768, torch.float32),
            (1024, torch.float32),
        ]
    for d, dtype in shapes:
        _launch_example(1024, 16384, d, dtype, True)
        if not main:
            _launch_example(1024, 16384, d, dtype, False)
            _launch_example(1000, 9999, d, dtype, True)


def _launch_example(n: int, k: int, d: int, dtype: torch.dtype, entropy: bool) -> None:
    z = torch.empty(n, d, dtype=dtype, device="meta")
    codebook = torch.empty(k, d, dtype=dtype, device="meta")
    launch_index_propagation_fwd(z, codebook, 0.01, entropy, False)
    outputs = launch_index_propagation_fwd(z, codebook, 0.01, entropy, True)
    indices, mean_code, statistics, code_probability = outputs[:4]
    sample_weight = statistics.new_empty([])
    launch_index_propagation_bwd(
        z, z, codebook, indices, mean_code, statistics, sample_weight, code_probability, 0.01,
        entropy,
    )  # fmt: skip
