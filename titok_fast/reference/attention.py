"""Bidirectional attention in eager PyTorch, with dropout from a counter-based generator."""

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words for each counter, the same on every device.

    Args:
        counter: four int64 tensors of values below 2**32 that broadcast together.
        seed: [] int64, whose low and high halves are the key.

    Returns:
        Four int64 tensors of the common shape, uniform in [0, 2**32).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    a, b, c, d = torch.broadcast_tensors(*counter)
    low, high = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # A 64-bit product may wrap below zero; its bits are right.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((second >> 32) & _LOW) ^ b ^ low,
            second & _LOW,
            ((first >> 32) & _LOW) ^ d ^ high,
            first & _LOW,
        )
        low, high = (low + _WEYL[0]) & _LOW, (high + _WEYL[1]) & _LOW
    return a, b, c, d


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
