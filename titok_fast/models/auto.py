"""Models by name, path or hub id, whatever their class."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from titok_fast.models.autoregressive import ARTransformer
from titok_fast.models.checks import found_at
from titok_fast.models.ibq import IBQTokenizer
from titok_fast.models.maskgit import MaskGIT
from titok_fast.models.maskgit_vqgan import MaskGITVQGAN
from titok_fast.models.pretrained import Model, PretrainedModel, Release, locate
from titok_fast.models.titok import TiTok

# A generator's configuration also has its tokenizer's key, so generators come first.
MODELS: tuple[type[PretrainedModel], ...] = (
    MaskGIT, MaskGITVQGAN, TiTok, IBQTokenizer, ARTransformer
)  # fmt: skip

Tokenizer: TypeAlias = TiTok | IBQTokenizer
TOKENIZERS: tuple[type[Tokenizer], ...] = (TiTok, IBQTokenizer)


def load_tokenizer(
    path_or_hub_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Tokenizer:
    """Loads a `TiTok` or an `IBQTokenizer`, whichever the source is.

    Args:
        path_or_hub_id: a name in `releases` of either, or as for `from_pretrained` a folder, a file
            or a repository on the Hugging Face Hub.
        revision, dtype, device: as for `from_pretrained`.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: as `from_pretrained`.
        ValueError: for a configuration of neither, and as `from_pretrained`.
    """
    weights, config = locate(path_or_hub_id, releases(TOKENIZERS), revision=revision)
    kind = model_class(config, TOKENIZERS)
    if "dataset" not in config and found_at(config, "model.generator") is not None:
        raise ValueError(f"config: got a MaskGIT's in {weights.parent}, allowed is a tokenizer's")
    return kind.from_pretrained(weights, config=config, dtype=dtype, device=device)


def model_class(config: Mapping[str, Any], classes: Sequence[type[Model]]) -> type[Model]:
    """The first of the classes that a configuration is of.

    Raises:
        ValueError: when it is of none.
    """
    for kind in classes:
        if found_at(kind.narrowed(config), kind.config_key) is not None:
            return kind
    keys = ", ".join(f"{kind.config_key} ({kind.__name__})" for kind in classes)
    raise ValueError(f"config: got keys {', '.join(config)}, allowed is one that has {keys}")


def releases(classes: Sequence[type[PretrainedModel]]) -> dict[str, Release]:
    """The named configurations of all the classes."""
    return {name: release for kind in classes for name, release in kind.releases.items()}
