"""Nearest code in float64, materialising the N x K scores."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_PARTS = 8


def _sum_of(terms: Iterable[Tensor]) -> Tensor:
    """Sum in the order that every backend follows: eight interleaved parts, then pairs."""
    parts: list[Tensor] = []
    for i, term in enumerate(terms):
        if i < _PARTS:
            parts.append(term + 0.0)  # as a sum that starts from zero: never -0.0
        else:
            parts[i % _PARTS] += term
    parts += [torch.zeros_like(parts[0])] * (_PARTS - len(parts))
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded, as in C++ and on GPUs; torch's on CPU is an ulp off for 1% of values."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.sqrt()
    return x.clone().apply_(math.sqrt)


def nearest_code(z: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Indices [N] int64 and distances [N] float32 of `z` [N, D] against `codebook` [K, D].

    Scores are float64 and summed in one fixed order, so that the fused backends can return the
    same bits. A NaN score is worst, the lowest index wins a tie, a row with a NaN gives index 0.
    """
    n, d = z.shape
    if n == 0:
        return z.new_empty(0, dtype=torch.int64), z.new_empty(0, dtype=torch.float32)
    rows, codes = z.double(), codebook.double()  # [N, D], [K, D]
    columns = range(d)
    if metric == "l2":
        score = -_sum_of((rows[:, i, None] - codes[None, :, i]).square() for i in columns)
    else:
        score = _sum_of(rows[:, i, None] * codes[None, :, i] for i in columns)  # [N, K]
    row_norm = _sqrt(_sum_of(rows[:, i].square() for i in columns)).clamp_min(1e-12)  # [N]
    code_norm = _sqrt(_sum_of(codes[:, i].square() for i in columns)).clamp_min(1e-12)  # [K]
    if metric == "cosine":
        score = score / code_norm

    # torch's argmax takes NaN for the largest; here it loses even to -inf.
    comparable = ~score.isnan()
    best = score.masked_fill(~comparable, -torch.inf).amax(1, keepdim=True)  # [N, 1]
    is_best = (score == best) & comparable | ~comparable.any(1, keepdim=True)
    indices = is_best.to(torch.uint8).argmax(1)
    if metric == "cosine":
        chosen, chosen_norm = codes[indices], code_norm[indices]
        distance = _sum_of(
            (rows[:, i] / row_norm - chosen[:, i] / chosen_norm).square() for i in columns
        )
    else:
        distance = score.gather(1, indices[:, None]).squeeze(1)
        distance = -distance if metric == "l2" else distance

    nan_row = rows.isnan().any(1)
    indices = indices.masked_fill(nan_row, 0)
    return indices, distance.masked_fill(nan_row, torch.nan).float()
