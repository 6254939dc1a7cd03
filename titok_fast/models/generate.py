"""From class labels to images: a tokenizer and the generator of its tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from titok_fast.models.maskgit import MaskGIT
from titok_fast.models.titok import TiTok

# A tokenizer's name, and its generator's.
GENERATORS: Mapping[str, str] = {
    "titok-l-32": "maskgit-vit-l-32",
    "titok-b-64": "maskgit-vit-b-64",
    "titok-s-128": "maskgit-uvit-s-128",
    "titok-digits": "maskgit-digits",
}


def generate(
    labels: Tensor | Sequence[int],
    *,
    model: str = "titok-l-32",
    seed: int = 0,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Tensor:
    """One image for each label. The pair of models is loaded once and kept.

    Image i is the same for a seed whatever the labels around it and the batch size, up to rounding
    in the networks' matrix products.

    Args:
        labels: [N] int64 in [0, num_classes], or a sequence of them.
        model: the tokenizer's name: "titok-l-32", "titok-b-64", "titok-s-128" or "titok-digits".
        seed: in [0, 2**63).
        batch_size: images generated at a time.
        dtype: of both networks; None keeps that of the weights.
        device: None is the first GPU if there is one, otherwise the CPU.
        **options: of `MaskGIT.generate`, such as steps or guidance_scale.

    Returns:
        [N, 3, S, S] in [0, 1], in the dtype of the tokenizer, on the device.

    Raises:
        ValueError: an unknown model, a label or a number out of range.
        FileNotFoundError: the weights are missing and cannot be downloaded.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, allowed is a positive int")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer, generator = load_pair(model, dtype, device)
    labels = torch.as_tensor(labels, dtype=torch.int64, device=device)
    if labels.ndim != 1:
        raise ValueError(f"labels: got shape {list(labels.shape)}, allowed is [N]")
    numbers = torch.arange(len(labels), device=device)
    images = [
        tokenizer.decode(generator.generate(part, seed=seed, image_ids=ids, **options))
        for part, ids in zip(labels.split(batch_size), numbers.split(batch_size), strict=True)
    ]
    return torch.cat(images)


@functools.lru_cache(maxsize=1)
def load_pair(model: str, dtype: torch.dtype | None, device: torch.device) -> tuple[TiTok, MaskGIT]:
    """The tokenizer of a name in `GENERATORS` and its generator, in evaluation mode."""
    if model not in GENERATORS:
        raise ValueError(f"model: {model!r} is not one of {', '.join(map(repr, GENERATORS))}")
    return (
        TiTok.from_pretrained(model, dtype=dtype, device=device),
        MaskGIT.from_pretrained(GENERATORS[model], dtype=dtype, device=device),
    )
