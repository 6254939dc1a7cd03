"""A token drawn from each row of logits, in eager PyTorch and by sorting."""

import math

import torch
from torch import Tensor

from titok_fast.reference._draw import (
    argmax,
    combine,
    draw,
    random_words,
    sharpness,
    wide_weights,
)


def top_k_weights(logits: Tensor, weights: Tensor, k: Tensor) -> Tensor:
    """`weights` [B, V], zero where fewer than k [] logits are as large; not k in [1, V]: all."""
    vocabulary = logits.shape[-1]
    k = torch.where((k > 0) & (k < vocabulary), k, vocabulary)
    smallest = logits.sort(dim=-1, descending=True).values.gather(
        -1, (k - 1).expand(len(logits), 1)
    )
    return weights.where(logits >= smallest, 0)


def top_p_weights(logits: Tensor, weights: Tensor, p: Tensor) -> Tensor:
    """`weights` [B, V], zero where those of larger logits make up more than p [] of their sum."""
    values, order = logits.sort(dim=-1, descending=True)
    ordered = weights.gather(-1, order)
    larger = ordered.cumsum(-1) - ordered
    first = torch.ones_like(values, dtype=torch.bool)  # of equal logits
    first[:, 1:] = values[:, 1:] != values[:, :-1]
    larger = larger.where(first, 0).cummax(-1).values
    limit = (p.double().clamp(min=0.0) * weights.sum(-1, keepdim=True).double()).long()
    kept = (larger <= limit) | ~(p < 1)
    return weights.where(torch.zeros_like(kept).scatter(-1, order, kept), 0)


def sample_token(
    logits: Tensor,
    *,
    uncond_logits: Tensor | None,
    guidance_scale: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    step: Tensor,
    image_ids: Tensor | None,
) -> Tensor:
    """The public op's tokens [B]; every number is a tensor [] on the device.

    `top_k`, `seed` and `step` are int64, the others float32.
    """
    batch, device = len(logits), logits.device
    if batch == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    guided = combine(logits, uncond_logits, guidance_scale, "uncond")
    guided = torch.where(guidance_scale == 1, logits.float(), guided)
    guided = guided.masked_fill(guided.isnan(), -math.inf)  # [B, V]
    weights = wide_weights(guided, guided.amax(-1, keepdim=True), sharpness(temperature))
    weights = top_k_weights(guided, weights, top_k)
    weights = top_p_weights(guided, weights, top_p)

    images = torch.arange(batch, device=device) if image_ids is None else image_ids
    words = random_words(seed, images, step, torch.zeros_like(images), 1)
    drawn = draw(weights, words[:, 0].contiguous(), words[:, 1].contiguous())
    return torch.where(temperature == 0, argmax(guided), drawn)
