"""What single tokens do: each is replaced in turn, and the image decoded again."""

from dataclasses import dataclass

import torch
from torch import Tensor

from titok_fast.models import TiTok

REPLACEMENTS = ("nearest", "farthest")


@dataclass(frozen=True)
class TokenChanges:
    """The effect of replacing each of the L tokens of an image, one at a time.

    Attributes:
        reconstruction: [3, S, S] in [0, 1], of the tokens as they are.
        replacements: [L] int64, the code put in place of each token; None for a VAE variant.
        images: [L, 3, S, S] in [0, 1], decoded with token i replaced.
        changes: [L, S, S], absolute difference to the reconstruction, mean over the channels.
    """

    reconstruction: Tensor
    replacements: Tensor | None
    images: Tensor
    changes: Tensor


@torch.no_grad()
def token_changes(
    model: TiTok, tokens: Tensor, *, replacement: str = "nearest", batch_size: int = 16
) -> TokenChanges:
    """Replaces each token by another and decodes: what it contributes to the image, and where.

    Args:
        model: of the tokens.
        tokens: [L] int64 of one image; for a VAE variant latents [L, C], floating, each of which
            is replaced by zero, the mean of the prior.
        replacement: by which other code, "nearest" to the token's code or "farthest" from it.
        batch_size: images decoded at a time.

    Returns:
        Tensors on the CPU, float32.

    Raises:
        TypeError: for tokens that the model does not decode.
        ValueError: for another shape, a token out of range, or an unknown replacement.
    """
    if replacement not in REPLACEMENTS:
        raise ValueError(
            f"replacement: got {replacement!r}, allowed are {', '.join(map(repr, REPLACEMENTS))}"
        )
    reconstruction = model.decode(tokens[None])[0].float().cpu()  # [3, S, S]
    codes = None
    if model.codebook_size is None:
        other = torch.zeros_like(tokens)  # [L, C]
    else:
        other = codes = other_codes(codebook(model), tokens, replacement)  # [L]
    images = []
    for positions in torch.arange(len(tokens), device=tokens.device).split(batch_size):
        changed = tokens.repeat(len(positions), *[1] * tokens.ndim)  # [b, L, ...]
        changed[torch.arange(len(positions)), positions] = other[positions]
        images.append(model.decode(changed).float().cpu())
    stacked = torch.cat(images)  # [L, 3, S, S]
    return TokenChanges(
        reconstruction=reconstruction,
        replacements=None if codes is None else codes.cpu(),
        images=stacked,
        changes=(stacked - reconstruction).abs().mean(1),
    )


def codebook(model: TiTok) -> Tensor:
    """The codes that a model with a codebook decodes, [K, C] float32."""
    every = torch.arange(model.quantize.codebook_size, device=model.latent_tokens.device)
    return model.quantize.get_codebook_entry(every).detach().float()


def other_codes(codes: Tensor, tokens: Tensor, replacement: str) -> Tensor:
    """For each token the code nearest to it or farthest from it, other than itself.

    Args:
        codes: [K, C], at least two.
        tokens: [L] int64 in [0, K).
        replacement: "nearest" or "farthest", by Euclidean distance; the lowest of equal ones.

    Returns:
        [L] int64.
    """
    sign = 1.0 if replacement == "nearest" else -1.0
    distance = sign * torch.cdist(codes[tokens].double(), codes.double())  # [L, K]
    distance.scatter_(1, tokens[:, None], torch.inf)
    return distance.argmin(1)


def code_colors(codes: Tensor) -> Tensor:
    """A colour for each code; similar codes have similar colours.

    Red, green and blue are the ranks of the codes along their three principal directions.

    Args:
        codes: [K, C].

    Returns:
        [K, 3] float32 in [0, 1].
    """
    centred = (codes - codes.mean(0)).double().cpu()  # [K, C]
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :3]  # [C, 3]
    # An eigenvector's sign is arbitrary.
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))  # [1, 3]
    ranks = (centred @ directions * largest.sign()).argsort(dim=0, stable=True).argsort(dim=0)
    colors = ranks.float() / max(1, len(codes) - 1)
    return torch.nn.functional.pad(colors, (0, 3 - colors.shape[1]))
