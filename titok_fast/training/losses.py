"""What training minimises."""

from __future__ import annotations

from collections.abc import Mapping

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
