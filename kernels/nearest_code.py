"""Nearest-code search on the GPU: fp16 tensor-core maxima of code blocks, then float64.

Four kernels. `prepare` turns rows and codes into scaled fp16 with rigorous error norms, `coarse`
keeps one maximum per (row, block of codes), `rescore` evaluates in float64 every block that the
error bound cannot exclude. Derivation: docs/ops/nearest_code.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

L2 = tl.constexpr(0)
COSINE = tl.constexpr(1)
DOT = tl.constexpr(2)
_METRICS = {"l2": 0, "cosine": 1, "dot": 2}

# Above this norm a row or code leaves the coarse pass; below it float32 cannot overflow.
_LARGEST_NORM = tl.constexpr(1e18)
_NORM_FLOOR = tl.constexpr(1e-12)
_TABLE_BYTES = 256 << 20
_TILE_CODES = 128
_CENTER_CODES = 64


@dataclass(frozen=True)
class Config:
    """Tile of the coarse kernel and its pipeline."""

    depth: int
    num_warps: int
    num_stages: int


# By compute capability; a capability that is not listed takes the nearest lower one.
CONFIGS = {
    80: Config(depth=32, num_warps=8, num_stages=4),
    90: Config(depth=64, num_warps=8, num_stages=4),
    100: Config(depth=64, num_warps=8, num_stages=4),
    120: Config(depth=32, num_warps=8, num_stages=4),
}


# n and row_tiles differ from call to call: no variant for a multiple of 16 or for 1.
@triton.jit(do_not_specialize=["n"])
def nearest_code_prepare_kernel(
    x,  # [n, D]
    center,  # [D] float32
    out,  # [rows padded to a tile, PADDED_D] float16
    scale,  # a power of two per row, or per block: x ~ out * scale
    norm,  # of the row, or the block's largest; inf: not representable
    error,  # norm of what float16 lost, likewise
    half_norm,  # [padded rows] ||x||^2 / 2 for l2 codes, inf for what must never score
    n,
    x_stride,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    METRIC: tl.constexpr,
    CODES: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = rows < n
    x_rows = x + rows[:, None] * x_stride

    largest = tl.zeros([BLOCK], tl.float32)
    multiplier = tl.full([BLOCK], 1.0, tl.float32)
    finite = inside
    square = tl.zeros([BLOCK], tl.float64)
    for start in range(0, D, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        mask = inside[:, None] & (columns < D)[None, :]
        values = tl.load(x_rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if METRIC == L2:
            values -= tl.load(center + columns, mask=columns < D, other=0.0)[None, :]
        magnitude = tl.abs(values)
        finite &= tl.min((magnitude <= _LARGEST_NORM).to(tl.int32), axis=1) == 1
        largest = tl.maximum(largest, tl.max(magnitude, axis=1))
        if CODES and METRIC == COSINE:
            square += tl.sum(values.to(tl.float64) * values.to(tl.float64), axis=1)
    if CODES and METRIC == COSINE:
        multiplier = (1.0 / tl.maximum(tl.sqrt(square), _NORM_FLOOR)).to(tl.float32)
    largest = tl.where(finite, largest * multiplier, 0.0)

    if CODES:  # one scale for the block
        largest = tl.zeros([BLOCK], tl.float32) + tl.max(largest, axis=0)
    # Powers of two that bring the largest entry to 2^9..2^10 and back.
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 21)
    down = ((263 - exponent) << 23).to(tl.float32, bitcast=True)
    up = ((exponent - 9) << 23).to(tl.float32, bitcast=True)

    lost = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, PADDED_D, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        mask = finite[:, None] & (columns < D)[None, :]
        values = tl.load(x_rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if METRIC == L2:
            shift = tl.load(center + columns, mask=columns < D, other=0.0)
            values = tl.where(mask, values - shift[None, :], 0.0)
        scaled = values * multiplier[:, None] * down[:, None]
        rounded = scaled.to(tl.float16)
        tl.store(
            out + rows[:, None] * PADDED_D + columns[None, :],
            rounded,
            mask=(columns < PADDED_D)[None, :],
        )
        loss = scaled - rounded.to(tl.float32)
        lost += tl.sum(loss * loss, axis=1)
        total += tl.sum(scaled * scaled, axis=1)

    length = tl.sqrt(total) * up
    finite &= length <= _LARGEST_NORM
    # 1.001 and (D + 8) 2^-24 cover the float32 roundings above.
    shortfall = tl.sqrt(lost) * up * 1.001 + length * ((D + 8) * 2.0**-24)
    bound = tl.where(finite, length * 1.001 + shortfall, float("inf"))
    if CODES:
        tl.store(scale + block, tl.max(up, axis=0))
        tl.store(norm + block, tl.max(tl.where(inside, bound, 0.0), axis=0))
        tl.store(error + block, tl.max(tl.where(finite, shortfall, 0.0), axis=0))
        half = length * length * 0.5 if METRIC == L2 else length * 0.0
        tl.store(half_norm + rows, tl.where(finite, half, float("inf")))
    else:
        tl.store(scale + rows, up)
        tl.store(norm + rows, bound)
        tl.store(error + rows, shortfall)


@triton.jit(do_not_specialize=["row_tiles"])
def nearest_code_coarse_kernel(
    z,  # [padded N, PADDED_D] float16
    codes,  # [padded K, PADDED_D] float16
    z_scale,  # [padded N] float32
    code_scale,  # [blocks] float32
    half_norm,  # [padded K] float32
    table,  # [padded N, blocks] float32: the largest coarse score of each block
    row_tiles,
    blocks,
    PADDED_D: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CODES: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Neighbouring programs share the code tile: z is small and stays in the cache.
    tile = tl.program_id(0)
    row_tile, code_tile = (tile % row_tiles).to(tl.int64), (tile // row_tiles).to(tl.int64)
    rows = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    columns = code_tile * TILE_CODES + tl.arange(0, TILE_CODES)
    depth = tl.arange(0, DEPTH)

    acc = tl.zeros([TILE_ROWS, TILE_CODES], tl.float32)
    for start in range(0, PADDED_D, DEPTH):
        a = tl.load(z + rows[:, None] * PADDED_D + (start + depth)[None, :])
        b = tl.load(codes + columns[None, :] * PADDED_D + (start + depth)[:, None])
        acc = tl.dot(a, b, acc)

    PARTS: tl.constexpr = TILE_CODES // BLOCK
    part = code_tile * PARTS + tl.arange(0, PARTS)
    scale = tl.load(z_scale + rows)[:, None] * tl.load(code_scale + part)[None, :]  # [rows, PARTS]
    scores = tl.reshape(acc, [TILE_ROWS, PARTS, BLOCK]) * scale[:, :, None]
    scores -= tl.reshape(tl.load(half_norm + columns), [PARTS, BLOCK])[None, :, :]
    tl.store(table + rows[:, None] * blocks + part[None, :], tl.max(scores, axis=2))


@triton.jit
def _coarse_error(
    code_norm,
    code_error,
    block,  # [CHUNK]
    inside,
    norm,
    error,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    METRIC: tl.constexpr,
):
    # Bounds |coarse - exact| of a row with these norms for every code of the block.
    m = tl.load(code_norm + block, mask=inside, other=0.0)
    lost = tl.load(code_error + block, mask=inside, other=0.0)
    # Tensor cores may truncate each partial sum.
    bound = error * m + norm * lost + norm * m * ((PADDED_D + 16) * 2.0**-22)
    if METRIC == L2:  # the rounded ||e||^2 / 2, and float64 distances
        bound += m * m * ((D + 8) * 2.0**-22) + (norm + m) * (norm + m) * ((D + 8) * 2.0**-50)
    subnormal = (1.0 + norm + m) * (D * 2.0**-124)
    return (bound + subnormal) * 1.001


@triton.jit
def _sum_pairs(x, ROWS: tl.constexpr):
    # [ROWS, 8] -> [ROWS] in the order of every backend.
    a, b = tl.split(tl.reshape(x, [ROWS, 4, 2]))
    a, b = tl.split(tl.reshape(a + b, [ROWS, 2, 2]))
    a, b = tl.split(a + b)
    return a + b


@triton.jit
def _exact_scores(
    z_row,
    codebook,
    code,  # [ROWS] int64
    inside,  # [ROWS]
    codebook_stride,
    D: tl.constexpr,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
):
    score = tl.zeros([ROWS, 8], tl.float64)
    square = tl.zeros([ROWS, 8], tl.float64)
    for start in range(0, D, 8):
        columns = start + tl.arange(0, 8)
        mask = inside[:, None] & (columns < D)[None, :]
        where = codebook + code[:, None] * codebook_stride + columns[None, :]
        e = tl.load(where, mask=mask, other=0.0).to(tl.float32).to(tl.float64)
        row = tl.load(z_row + columns, mask=columns < D, other=0.0).to(tl.float32).to(tl.float64)
        if METRIC == L2:
            difference = row[None, :] - e
            score += difference * difference
        else:
            score += row[None, :] * e
            if METRIC == COSINE:
                square += e * e
    total = _sum_pairs(score, ROWS)
    if METRIC == L2:
        total = -total
    if METRIC == COSINE:
        length = tl.sqrt(_sum_pairs(square, ROWS))
        total = total / tl.where(length < _NORM_FLOOR, _NORM_FLOOR, length)
    return total


@triton.jit
def _length(row, D: tl.constexpr):
    square = tl.zeros([1, 8], tl.float64)
    for start in range(0, D, 8):
        columns = start + tl.arange(0, 8)
        x = tl.load(row + columns, mask=columns < D, other=0.0).to(tl.float32).to(tl.float64)
        square += (x * x)[None, :]
    length = tl.sqrt(_sum_pairs(square, 1))
    return tl.where(length < _NORM_FLOOR, _NORM_FLOOR, length)  # [1]


@triton.jit
def nearest_code_rescore_kernel(
    z,  # [N, D]
    codebook,  # [K, D]
    table,  # [padded N, blocks] float32
    z_norm,  # [padded N] float32
    z_error,  # [padded N] float32
    code_norm,  # [blocks] float32
    code_error,  # [blocks] float32
    indices,  # [N] int64
    distances,  # [N] float32
    k,
    blocks,
    z_stride,
    codebook_stride,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z + row * z_stride
    table_row = table + row * blocks
    norm, error = tl.load(z_norm + row), tl.load(z_error + row)

    threshold = float("-inf")
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        inside = block < blocks
        coarse = tl.load(table_row + block, mask=inside, other=float("-inf"))
        bound = _coarse_error(
            code_norm, code_error, block, inside, norm, error, D, PADDED_D, METRIC
        )
        lower = coarse - bound
        threshold = tl.maximum(threshold, tl.max(tl.where(lower == lower, lower, float("-inf"))))

    nans = 0
    for start in range(0, D, 8):
        columns = start + tl.arange(0, 8)
        x = tl.load(z_row + columns, mask=columns < D, other=0.0).to(tl.float32)
        nans += tl.sum((x != x).to(tl.int32))

    best = tl.full([], float("nan"), tl.float64)
    best_index = tl.full([], 0, tl.int64)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        inside = block < blocks
        coarse = tl.load(table_row + block, mask=inside, other=float("-inf"))
        bound = _coarse_error(
            code_norm, code_error, block, inside, norm, error, D, PADDED_D, METRIC
        )
        # A NaN bound excludes nothing.
        excluded = (coarse + bound < threshold) | (nans > 0)
        pending = (inside & ~excluded).to(tl.int32)
        left = tl.sum(pending)
        while left > 0:
            hit = tl.min(tl.where(pending == 1, block, 2147483647))
            pending = tl.where(block == hit, 0, pending)
            left -= 1
            code = hit.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            real = code < k
            score = _exact_scores(z_row, codebook, code, real, codebook_stride, D, METRIC, BLOCK)
            real &= score == score
            top = tl.max(tl.where(real, score, float("-inf")))
            top_index = tl.min(tl.where(real & (score == top), code, 9223372036854775807))
            any_real = tl.max(real.to(tl.int32)) == 1
            nearer = (best != best) | (top > best) | ((top == best) & (top_index < best_index))
            nearer &= any_real
            best = tl.where(nearer, top, best)
            best_index = tl.where(nearer, top_index, best_index)

    distance = best
    if METRIC == L2:
        distance = -best
    if METRIC == COSINE:
        e_row = codebook + best_index * codebook_stride
        z_length, e_length = _length(z_row, D), _length(e_row, D)
        square = tl.zeros([1, 8], tl.float64)
        for start in range(0, D, 8):
            columns = start + tl.arange(0, 8)
            mask = columns < D
            a = tl.load(z_row + columns, mask=mask, other=0.0).to(tl.float32).to(tl.float64)
            b = tl.load(e_row + columns, mask=mask, other=0.0).to(tl.float32).to(tl.float64)
            difference = a / z_length - b / e_length
            square += (difference * difference)[None, :]
        distance = tl.sum(_sum_pairs(square, 1))
    tl.store(indices + row, best_index)
    tl.store(distances + row, tl.where(nans > 0, float("nan"), distance.to(tl.float32)))


def _config(device: torch.device) -> Config:
    if device.type != "cuda":
        return CONFIGS[80]
    major, minor = torch.cuda.get_device_capability(device)
    return CONFIGS[max(c for c in CONFIGS if c <= max(10 * major + minor, min(CONFIGS)))]


def _center(codebook: Tensor) -> Tensor:
    """The mean of some codes: any vector is valid, this one keeps float16 small."""
    k, count = codebook.shape[0], min(codebook.shape[0], _CENTER_CODES)
    sample = codebook[torch.arange(count, device=codebook.device) * k // count].float()
    center = sample.mean(0)
    return torch.where(center.abs() < _LARGEST_NORM.value, center, 0.0)


def _tiling(d: int, config: Config) -> tuple[int, int, int]:
    """(D padded, depth of a tile, codes per block): small D wants small blocks."""
    depth = min(config.depth, max(16, triton.next_power_of_2(d)))
    return triton.cdiv(d, depth) * depth, depth, 32 if d <= 64 else _TILE_CODES


def launch_nearest_code(z: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Indices [N] int64 and distances [N] float32; `z` [N, D] and `codebook` [K, D] by row."""
    (n, d), k = z.shape, codebook.shape[0]
    device = z.device
    indices = torch.empty(n, dtype=torch.int64, device=device)
    distances = torch.empty(n, dtype=torch.float32, device=device)
    if n == 0:
        return indices, distances

    config = _config(device)
    padded_d, depth, block = _tiling(d, config)
    code_tiles = triton.cdiv(k, _TILE_CODES)
    blocks = code_tiles * (_TILE_CODES // block)
    tile_rows = 64 if n <= 64 else 128
    chunk = max(tile_rows, _TABLE_BYTES // (4 * blocks) // tile_rows * tile_rows)
    rows = min(triton.cdiv(n, tile_rows) * tile_rows, chunk)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    def halves(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float16, device=device)

    kind = _METRICS[metric]
    center = _center(codebook) if metric == "l2" else floats(0)
    sizes = {"D": d, "PADDED_D": padded_d, "METRIC": kind}

    padded_k = code_tiles * _TILE_CODES
    codes, half_norm = halves(padded_k, padded_d), floats(padded_k)
    code_scale, code_norm, code_error = floats(blocks), floats(blocks), floats(blocks)
    nearest_code_prepare_kernel[(blocks,)](
        codebook, center, codes, code_scale, code_norm, code_error, half_norm,
        k, codebook.stride(0), **sizes, BLOCK=block, CHUNK=32, CODES=True, num_warps=8,
    )  # fmt: skip

    z_half, z_scale, z_norm, z_error = (
        halves(rows, padded_d),
        floats(rows),
        floats(rows),
        floats(rows),
    )
    table = floats(rows, blocks)
    for first in range(0, n, rows):
        part = z[first : first + rows]
        count = part.shape[0]
        tiles = triton.cdiv(count, tile_rows)
        nearest_code_prepare_kernel[(tiles * tile_rows // 32,)](
            part, center, z_half, z_scale, z_norm, z_error, z_norm,
            count, z.stride(0), **sizes, BLOCK=32, CHUNK=32, CODES=False,
        )  # fmt: skip
        nearest_code_coarse_kernel[(tiles * code_tiles,)](
            z_half, codes, z_scale, code_scale, half_norm, table, tiles, blocks,
            PADDED_D=padded_d, TILE_ROWS=tile_rows, TILE_CODES=_TILE_CODES, DEPTH=depth,
            BLOCK=block, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        nearest_code_rescore_kernel[(count,)](
            part, codebook, table, z_norm, z_error, code_norm, code_error,
            indices[first:], distances[first:], k, blocks, z.stride(0), codebook.stride(0),
            **sizes, BLOCK=block, CHUNK=512, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return indices, distances


def specializations(capability: int) -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """(kernel, argument types, constants and options) of what a launch on `capability` compiles.

    One entry for each kind of D that the models use; the static report compiles them all.
    """
    config = CONFIGS[capability]
    for d, dtype, metric in (
        (12, "fp32", "cosine"),
        (64, "fp32", "l2"),
        (256, "fp32", "l2"),
        (256, "bf16", "cosine"),
        (512, "fp16", "dot"),
    ):
        padded_d, depth, block = _tiling(d, config)
        sizes = {"D": d, "PADDED_D": padded_d, "METRIC": _METRICS[metric]}
        types = {"x": f"*{dtype}", "out": "*fp16", "n": "i32", "x_stride": "i32"}
        types |= dict.fromkeys(("scale", "norm", "error", "half_norm", "center"), "*fp32")
        chunk = {"CHUNK": 32}
        codes = {**sizes, **chunk, "BLOCK": block, "CODES": True, "num_warps": 8}
        yield nearest_code_prepare_kernel, types, codes
        yield nearest_code_prepare_kernel, types, {**sizes, **chunk, "BLOCK": 32, "CODES": False}

        types = {"z": "*fp16", "codes": "*fp16", "row_tiles": "i32", "blocks": "i32"}
        types |= dict.fromkeys(("z_scale", "code_scale", "half_norm", "table"), "*fp32")
        tile = {"PADDED_D": padded_d, "TILE_CODES": _TILE_CODES, "DEPTH": depth, "BLOCK": block}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        for tile_rows in (64, 128):
            yield nearest_code_coarse_kernel, types, {**tile, "TILE_ROWS": tile_rows, **options}

        types = {"z": f"*{dtype}", "codebook": f"*{dtype}", "indices": "*i64", "distances": "*fp32"}
        types |= dict.fromkeys(("table", "z_norm", "z_error", "code_norm", "code_error"), "*fp32")
        types |= dict.fromkeys(("k", "blocks", "z_stride", "codebook_stride"), "i32")
        options = {"num_warps": 8, "enable_fp_fusion": False}
        yield nearest_code_rescore_kernel, types, {**sizes, "BLOCK": block, "CHUNK": 512, **options}
