"""Trains a generator on token files: MaskGIT on masked tokens, ARTransformer on the next one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from titok_fast.models import ARTransformer, MaskGIT, Tokenizer
from titok_fast.models.checks import SHARE, check_fields
from titok_fast.models.generate import Generator, arranged, image_size
from titok_fast.tokens import TokenFile
from titok_fast.training.data import mask_tokens
from titok_fast.training.loop import UNDECAYED, Optimization
from titok_fast.training.losses import masked_token_loss, next_token_loss
from titok_fast.training.run import Options, Task
from titok_fast.training.tokenizer import predicts_proxies

SHOWN = 16  # images of a sheet, in rows of eight


@dataclass(frozen=True)
class Losses:
    """What `GeneratorTask` minimises.

    Attributes:
        label_dropout: share of the labels that are left out, for guidance. `ARTransformer` leaves
            out a tenth by itself, whatever this is.
        label_smoothing: probability spread evenly over all tokens (MaskGIT).
        unmasked_weight: of a token that the model can see, 1 for a masked one (MaskGIT).

    Raises:
        ValueError: for a number out of range.
    """

    label_dropout: float = 0.1
    label_smoothing: float = 0.1
    unmasked_weight: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self, label_dropout=SHARE, label_smoothing=SHARE, unmasked_weight=SHARE)


# MaskGIT: configs/training/generator/maskgit.yaml of 1d-tokenizer. ARTransformer:
# configs/IBQ/gpu/imagenet_conditional_llama_B.yaml of SEED-Voken, 300 epochs of ImageNet; its rate
# falls along a line, and it takes no average.
RECIPES: Mapping[type[Generator], tuple[Optimization, Options]] = {
    MaskGIT: (
        Optimization(
            steps=500_000, learning_rate=2e-4, warmup_steps=10_000, final_fraction=0.05,
            betas=(0.9, 0.96), weight_decay=0.03,
        ),
        Options(batch_size=2048),
    ),
    ARTransformer: (
        Optimization(
            steps=500_000, learning_rate=3e-4, warmup_steps=10_000, final_fraction=0.1,
            betas=(0.9, 0.95), weight_decay=0.05,
        ),
        Options(batch_size=768, average_decay=0.9999),
    ),
}  # fmt: skip


class GeneratorTask(Task):
    """Tokens and labels for `titok_fast.training.run.run`.

    Args:
        model: whose sizes are those of the tokens; put into training mode.
        file: its tokens, a grid row by row. An image without a class trains what guidance needs; if
            none has one, and the model has one class, all are of that.
        losses: what is minimised.
        tokenizer: decodes its samples, of classes spread over all; on the model's device. None
            gives none.

    Attributes:
        model: the same.
        count: number of images.

    Raises:
        ValueError: for a file without images or with latents, tokens or labels that are not the
            model's, or a tokenizer of other tokens or without pixels.
    """

    model: Generator

    def __init__(
        self,
        model: Generator,
        file: TokenFile,
        losses: Losses = Losses(),
        *,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        _check_fits(model, file)
        if tokenizer is not None:
            image_size(tokenizer, model)
            if predicts_proxies(tokenizer.config):
                raise ValueError("tokenizer: got one of the first stage, which makes no pixels")
        self.model, self.count = model.train(), len(file.tokens)
        self.undecayed = UNDECAYED if isinstance(model, MaskGIT) else ()
        self._losses, self._tokenizer = losses, tokenizer
        self._tokens = torch.from_numpy(file.tokens.reshape(self.count, -1).astype(np.int32))
        labels = torch.full([self.count], 0 if model.num_classes == 1 else -1)
        if file.labels is not None:
            labels = torch.from_numpy(file.labels)
        self._labels = torch.where(labels < 0, model.num_classes, labels)

    def batch(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self._tokens[rows].long(), self._labels[rows]  # [B, L], [B]

    def loss(
        self, network: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> Tensor:
        tokens, labels = (each.to(generator.device, non_blocking=True) for each in batch)
        if isinstance(self.model, ARTransformer):
            return next_token_loss(network(tokens[:, :-1], labels), tokens)
        return masked_loss(self.model, network, tokens, labels, generator, self._losses)

    def samples(self, network: nn.Module) -> Sequence[Tensor]:
        if self._tokenizer is None:
            return ()
        model: Any = network
        classes = model.num_classes
        labels = torch.arange(SHOWN) % classes
        if classes > SHOWN:
            labels = torch.linspace(0, classes - 1, SHOWN).long()
        tokens = model.generate(labels.to(next(model.parameters()).device), seed=0)
        images = self._tokenizer.decode(arranged(self._tokenizer, tokens))
        return [images[:8], images[8:]]


def masked_loss(
    model: MaskGIT,
    network: nn.Module,
    tokens: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    losses: Losses = Losses(),
) -> Tensor:
    """The loss of images of which some tokens are masked and some labels left out, at random.

    Args:
        model: a MaskGIT.
        network: called in its place.
        tokens: [B, L] int64.
        labels: [B] int64.
        generator: source of the draws, on the device of both.
        losses: shares and weights.

    Returns:
        A scalar, as `masked_token_loss` gives.
    """
    dropped = torch.rand(len(labels), generator=generator, device=labels.device)
    labels = torch.where(dropped < losses.label_dropout, model.num_classes, labels)
    ids, masked = mask_tokens(tokens, model.mask_id, generator)
    return masked_token_loss(
        network(ids, labels),
        tokens,
        masked,
        label_smoothing=losses.label_smoothing,
        unmasked_weight=losses.unmasked_weight,
    )


def _check_fits(model: Generator, file: TokenFile) -> None:
    """Raises ValueError unless the model generates such tokens, and knows such classes."""
    for name, mine, allowed in zip(
        ("codes", "tokens of an image", "classes"), _sizes(file), _own(model), strict=True
    ):
        fits = mine <= allowed if name == "classes" else mine == allowed
        if not fits:
            raise ValueError(f"tokens: got {mine} {name}, allowed is {allowed}, as of the model")


def _own(model: Generator) -> tuple[int, int, int]:
    return model.codebook_size, model.num_tokens, model.num_classes


def _sizes(file: TokenFile) -> tuple[int, int, int]:
    """Codes, tokens of an image and classes.

    Raises:
        ValueError: for a file of latents or without images.
    """
    if file.codebook_size is None:
        raise ValueError("tokens: got latents, allowed are codes")
    if not len(file.tokens):
        raise ValueError("tokens: got no image")
    return file.codebook_size, file.tokens[0].size, len(file.class_names or ())


def generator_config(name: str, file: TokenFile) -> dict[str, Any]:
    """A release's configuration for the tokens of a file: their number, codebook and classes.

    Args:
        name: of a `MaskGIT` or `ARTransformer`, in its releases.
        file: what it is to generate; without labels there is one class.

    Raises:
        ValueError: for a file of latents or without images.
    """
    codes, length, classes = _sizes(file)
    kind = ARTransformer if name in ARTransformer.releases else MaskGIT
    config: dict[str, Any] = copy.deepcopy(dict(kind.releases[name].config))
    if kind is ARTransformer:
        return config | {"vocab_size": codes, "block_size": length, "class_num": max(1, classes)}
    config["model"]["vq_model"]["codebook_size"] = codes
    config["model"]["generator"] |= {
        "image_seq_len": length, "condition_num_classes": max(1, classes),
    }  # fmt: skip
    return config
