"""One MaskGIT sampling step in eager PyTorch; every backend repeats its arithmetic to the bit."""

import math

import torch
from torch import Tensor

from titok_fast.reference._draw import (
    FLOAT_MAX,
    WEIGHT_BITS,
    argmax,
    combine,
    draw,
    gumbel,
    natural_log,
    random_words,
    sharpness,
    weights,
)


def maskgit_step(
    cond_logits: Tensor,
    ids: Tensor,
    *,
    mask_id: int,
    num_masked: Tensor,
    uncond_logits: Tensor | None,
    guidance_scale: Tensor,
    guidance_form: str,
    softmax_temperature: Tensor,
    token_temperature: Tensor,
    confidence: str,
    confidence_temperature: Tensor,
    seed: Tensor,
    step: Tensor,
    image_ids: Tensor | None,
    positions: Tensor | None,
    noise: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The public op's `(ids_next, tokens, confidence)`; every number is a tensor on the device.

    Counts, seeds and steps are int64, temperatures and the scale float32, each with shape [];
    `num_masked` has shape [] or [B].
    """
    batch, length, _ = cond_logits.shape
    device = ids.device
    masked = ids == mask_id
    if batch * length == 0:
        return ids.clone(), ids.clone(), ids.float()
    logits = combine(cond_logits, uncond_logits, guidance_scale, guidance_form)  # [B, L, V]
    largest = logits.masked_fill(logits.isnan(), -math.inf).amax(-1, keepdim=True)

    images = torch.arange(batch, device=device) if image_ids is None else image_ids
    columns = torch.arange(length, device=device).expand(batch, length)
    positions = columns if positions is None else positions
    words = random_words(seed, images[:, None], step, positions, 0)
    sharp = weights(logits, largest, sharpness(softmax_temperature, token_temperature))
    drawn = draw(sharp, words[..., 0].contiguous(), words[..., 1].contiguous())
    uniform = (words[..., 2].double() + 0.5) * 2.0**-32
    if noise is not None:
        uniform = noise[1].double()
        drawn = argmax(logits / softmax_temperature + token_temperature * gumbel(noise[0].double()))
    tokens = torch.where(token_temperature == 0, argmax(logits), drawn)  # [B, L]

    score = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    nothing = ~(score > -math.inf)
    if confidence == "logit":
        score = score / softmax_temperature
    else:
        largest = largest.squeeze(-1)
        total = weights(logits, largest.unsqueeze(-1), sharpness(softmax_temperature)).sum(-1)
        total = total.clamp(min=1).double() * 2.0**-WEIGHT_BITS
        score = ((score - largest.clamp(max=FLOAT_MAX)) / softmax_temperature).clamp(max=0.0)
        score = score - natural_log(total).float()
    score = score + confidence_temperature * gumbel(uniform)
    score = score.masked_fill(nothing | score.isnan(), -math.inf) + 0.0  # never -0.0

    # A stable sort of the masked positions by confidence leaves ties in order of position.
    order = score.masked_fill(~masked, math.inf).argsort(dim=-1, stable=True)
    order = order.gather(
        -1, (~masked).gather(-1, order).to(torch.uint8).argsort(dim=-1, stable=True)
    )
    rank = torch.empty_like(order).scatter_(-1, order, columns)
    again = masked & (rank < num_masked.reshape(-1, 1))
    tokens = torch.where(masked, tokens, ids)
    return torch.where(again, mask_id, tokens), tokens, score.masked_fill(~masked, math.inf)
