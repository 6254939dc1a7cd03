"""What training minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Loss: TypeAlias = Tensor | Mapping[str, Tensor]  # a scalar, or by name scalars to be added

PIXEL_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": F.l1_loss,
    "l2": F.mse_loss,  # what PSNR measures
}


def total(loss: Loss) -> Tensor:
    """The scalar that is minimised."""
    return loss if isinstance(loss, Tensor) else reduce(torch.add, loss.values())


def tokenizer_losses(
    output: tuple[Tensor, Mapping[str, Tensor]],
    images: Tensor,
    *,
    pixel_loss: str = "l2",
    quantizer_weight: float = 1.0,
    entropy_weight: float = 0.05,
) -> dict[str, Tensor]:
    """The mean error over all pixels and the quantizer's losses, each with its weight.

    Args:
        output: what `TiTok.forward` of a model that predicts pixels from tokens, or
            `IBQTokenizer.forward`, returns: reconstructions [B, 3, S, S], not clamped, and a
            mapping with the scalar `quantizer_loss` and perhaps `entropy_loss`.
        images: [B, 3, S, S] in [0, 1], floating.
        pixel_loss: "l1" or "l2".
        quantizer_weight: of the quantizer's loss.
        entropy_weight: of its loss of entropies.

    Returns:
        Scalars whose sum is minimised, differentiable in both parts of the output:
        `reconstruction`, `quantizer` and perhaps `entropy`.

    Source: arXiv 1711.00937, equation 3; arXiv 2406.07550 trains with the same two parts, and
    arXiv 2412.02692 with entropies too.
    """
    reconstructions, quantizer = output
    losses = {
        "reconstruction": PIXEL_LOSSES[pixel_loss](reconstructions, images),
        "quantizer": quantizer_weight * quantizer["quantizer_loss"],
    }
    if "entropy_loss" in quantizer:
        losses["entropy"] = entropy_weight * quantizer["entropy_loss"]
    return losses


def proxy_code_losses(
    output: tuple[Tensor, Mapping[str, Tensor]], codes: Tensor, *, quantizer_weight: float = 1.0
) -> dict[str, Tensor]:
    """TiTok's first stage: the proxy codes' cross-entropy and the weighted quantizer's losses.

    Args:
        output: what `TiTok.forward` returns for a first-stage model: logits [B, 1024, G, G] and a
            mapping with the scalar `quantizer_loss`.
        codes: [B, G G] int64, of `MaskGITVQGAN.encode` for the same images.
        quantizer_weight: weight of the quantizer's losses.

    Returns:
        Scalars whose sum is minimised, differentiable in both parts of the output: `proxy_codes`
        and `quantizer`.

    Source: arXiv 2406.07550, section 3.3.
    """
    logits, quantizer = output
    return {
        "proxy_codes": F.cross_entropy(logits.flatten(2), codes),
        "quantizer": quantizer_weight * quantizer["quantizer_loss"],
    }


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


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it.

    Args:
        logits: [B, L, V], floating, as of `ARTransformer.logits(tokens[:, :-1], labels)`.
        tokens: [B, L] int64 in [0, V).

    Returns:
        A scalar, the mean, differentiable in the logits.
    """
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
