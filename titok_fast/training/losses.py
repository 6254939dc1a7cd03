"""What training minimises."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Mean squared error over all pixels: the loss that PSNR measures.

    Args:
        reconstructions: [B, 3, S, S] floating, not clamped.
        images: [B, 3, S, S] in [0, 1], floating.

    Returns:
        A scalar, differentiable in both.
    """
    return F.mse_loss(reconstructions, images)


def tokenizer_loss(
    output: tuple[Tensor, Mapping[str, Tensor]], images: Tensor, *, quantizer_weight: float = 1.0
) -> Tensor:
    """Reconstruction loss plus the quantizer's codebook and commitment losses.

    Args:
        output: what `TiTok.forward` returns for a model that predicts pixels from tokens:
            reconstructions [B, 3, S, S] and a mapping with the scalar `quantizer_loss`.
        images: [B, 3, S, S] in [0, 1], floating.
        quantizer_weight: weight of the quantizer's losses.

    Returns:
        A scalar, differentiable in both parts of the output.

    Source: arXiv 1711.00937, equation 3; arXiv 2406.07550 trains with the same two parts.
    """
    reconstructions, quantizer = output
    loss = reconstruction_loss(reconstructions, images)
    return loss + quantizer_weight * quantizer["quantizer_loss"]


def masked_token_loss(
    logits: Tensor,
    tokens: Tensor,
    masked: Tensor,
    *,
    label_smoothing: float = 0.1,
    unmasked_weight: float = 0.1,
) -> Tensor:
    """Cross-entropy of the tokens, weighted by whether they were masked.

    Args:
        logits: [B, L, V], floating.
        tokens: [B, L] int64 in [0, V), what was there before masking.
        masked: [B, L] bool.
        label_smoothing: probability spread evenly over all tokens.
        unmasked_weight: weight of a token that the model could see; 1 for a masked one.

    Returns:
        A scalar, the weighted mean, differentiable in the logits.

    Source: MaskGIT (arXiv 2202.04200, equation 1); the weights are those of TiTok's generators.
    """
    losses = F.cross_entropy(
        logits.flatten(0, 1), tokens.flatten(), label_smoothing=label_smoothing, reduction="none"
    )
    weights = torch.where(masked.flatten(), 1.0, unmasked_weight)
    return (losses * weights).sum() / weights.sum().clamp_min(1e-8)
