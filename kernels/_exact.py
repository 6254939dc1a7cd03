"""Scores in float64, in the order of additions of every backend, and the best of them."""

import triton
import triton.language as tl

L2 = tl.constexpr(0)
COSINE = tl.constexpr(1)
DOT = tl.constexpr(2)
METRICS = {"l2": 0, "cosine": 1, "dot": 2}

NONE = tl.constexpr(2147483647)  # no code
NORM_FLOOR = tl.constexpr(1e-12)


@triton.jit
def to_double(x):
    return x.to(tl.float32).to(tl.float64)


@triton.jit
def _part(
    row,  # [1, A] pointers
    code_row,  # [B, A] pointers
    inside,  # [B, A]
    part: tl.constexpr,
    D: tl.constexpr,
    METRIC: tl.constexpr,
):
    # Every eighth term of the sum, and of the code's squares.
    total = tl.zeros(inside.shape, tl.float64)
    square = tl.zeros(inside.shape, tl.float64)
    for i in tl.static_range(part, D, 8):
        a, b = to_double(tl.load(row + i)), to_double(tl.load(code_row + i, mask=inside, other=0.0))
        if METRIC == L2:
            total += (a - b) * (a - b)
        else:
            total += a * b
            square += b * b
    return total, square


@triton.jit
def sum_pairs(x):
    # [B, A, 8] -> [B, A] in the order of every backend.
    a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 4, 2]))
    a, b = tl.split(tl.reshape(a + b, [x.shape[0], x.shape[1], 2, 2]))
    a, b = tl.split(a + b)
    return a + b


@triton.jit
def floored(length):
    return tl.where(length < NORM_FLOOR, NORM_FLOOR, length)


@triton.jit
def exact_scores(
    z_row,  # [A] pointers
    codebook,
    code,  # [B, A]
    inside,  # [B, A]
    codebook_stride,
    D: tl.constexpr,
    METRIC: tl.constexpr,
    UNROLL: tl.constexpr = 6,  # loads under way; with eight ptxas spills
):
    code_row = codebook + code.to(tl.int64) * codebook_stride
    row = z_row[None, :]
    if D <= 16:  # a thread to a score: nothing moves between lanes
        total0, square0 = _part(row, code_row, inside, 0, D, METRIC)
        total1, square1 = _part(row, code_row, inside, 1, D, METRIC)
        total2, square2 = _part(row, code_row, inside, 2, D, METRIC)
        total3, square3 = _part(row, code_row, inside, 3, D, METRIC)
        total4, square4 = _part(row, code_row, inside, 4, D, METRIC)
        total5, square5 = _part(row, code_row, inside, 5, D, METRIC)
        total6, square6 = _part(row, code_row, inside, 6, D, METRIC)
        total7, square7 = _part(row, code_row, inside, 7, D, METRIC)
        total = (total0 + total1) + (total2 + total3)
        total += (total4 + total5) + (total6 + total7)
        square = (square0 + square1) + (square2 + square3)
        square += (square4 + square5) + (square6 + square7)
    else:  # eight threads to a score, so that loads are wide
        totals = tl.zeros([code.shape[0], code.shape[1], 8], tl.float64)
        squares = tl.zeros([code.shape[0], code.shape[1], 8], tl.float64)
        # With more loads under way, or unrolled whole, cosine's two sums spill.
        unroll: tl.constexpr = min(UNROLL, 4, max(1, D // 16)) if METRIC == COSINE else UNROLL
        for start in tl.range(0, D, 8, loop_unroll_factor=unroll):
            columns = start + tl.arange(0, 8)[None, None, :]
            a = to_double(tl.load(row[:, :, None] + columns, mask=columns < D, other=0.0))
            b = to_double(
                tl.load(
                    code_row[:, :, None] + columns,
                    mask=inside[:, :, None] & (columns < D),
                    other=0.0,
                )
            )
            if METRIC == L2:
                totals += (a - b) * (a - b)
            else:
                totals += a * b
                if METRIC == COSINE:
                    squares += b * b
        total = sum_pairs(totals)
        square = sum_pairs(squares)
    if METRIC == L2:
        total = -total
    if METRIC == COSINE:
        total = total / floored(tl.sqrt(square))
    return total


@triton.jit
def best_of(score, code, inside):
    # The best of [B, A] scores along B and its code: NaN is worst, then NONE; ties go low.
    real = inside & (score == score)
    top = tl.max(tl.where(real, score, float("-inf")), axis=0)
    index = tl.min(tl.where(real & (score == top[None, :]), code, NONE), axis=0)
    return top, index


@triton.jit
def merge(best, best_index, top, index):
    nearer = (best_index == NONE) | (top > best) | ((top == best) & (index < best_index))
    nearer &= index != NONE
    return tl.where(nearer, top, best), tl.where(nearer, index, best_index)
