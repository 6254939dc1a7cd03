"""Bidirectional attention in eager PyTorch, with dropout from a counter-based generator."""

import torch
from torch import Tensor

from titok_fast.reference._draw import philox


def dropout_mask(
    seed: Tensor,
    dropout_p: float,
    shape: tuple[int, int, int],
) -> Tensor:
    """Which probabilities dropout keeps.

    The counter is (key // 4, query, head, image); the word key % 4 keeps the pair where its upper
    31 bits are at least dropout_p * 2**31, rounded.

    Args:
        seed: [] int64.
        dropout_p: in [0, 1).
        shape: (B, H, L).

    Returns:
        [B, H, L, L], boolean.
    """
    b, h, length = shape

    def count(n: int, axis: int) -> Tensor:
        return torch.arange(n, device=seed.device).view([-1 if i == axis else 1 for i in range(4)])

    groups = (length + 3) // 4
    words = philox((count(groups, 3), count(length, 2), count(h, 1), count(b, 0)), seed)
    bits = torch.stack(words, -1).flatten(-2)[..., :length]
    return (bits >> 1) >= min(round(dropout_p * 2**31), 2**31 - 1)


def attention(qkv: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(Dh)) V, with every L x L matrix in memory; differentiable.

    Args:
        qkv: [B, L, 3, H, Dh], floating; products are in its dtype, the softmax in float32
            (float64 for float64).
        dropout_p: probability that a softmax probability is set to 0; the others are divided by
            1 - dropout_p.
        seed: [] int64, needed where dropout_p > 0.

    Returns:
        [B, L, H, Dh], in the dtype of `qkv`.
    """
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, L, Dh]
    scores = query @ key.mT * query.shape[-1] ** -0.5  # [B, H, L, L]
    wide = torch.promote_types(scores.dtype, torch.float32)
    probability = scores.softmax(-1, dtype=wide)
    if dropout_p > 0:
        assert seed is not None
        b, h, length, _ = query.shape
        kept = dropout_mask(seed, dropout_p, (b, h, length))
        probability = torch.where(kept, probability / (1 - dropout_p), 0.0)
    out: Tensor = (probability.to(qkv.dtype) @ value).transpose(1, 2)
    return out
