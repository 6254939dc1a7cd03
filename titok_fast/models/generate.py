"""From class labels to images: a tokenizer and the generator of its tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from titok_fast.models.auto import Tokenizer, load_tokenizer
from titok_fast.models.autoregressive import ARTransformer
from titok_fast.models.checks import COUNT, as_labels, check_kind
from titok_fast.models.cuda_graphs import capture as record
from titok_fast.models.maskgit import MaskGIT
from titok_fast.models.packed import pack_weights, packable
from titok_fast.models.titok import TiTok
from titok_fast.ops.arguments import check_counters, python_number

Generator: TypeAlias = MaskGIT | ARTransformer

CAPTURED_FROM = 8  # whole batches; recording one takes as long as three


class Pair(NamedTuple):
    """Names of a tokenizer and of a generator of its tokens."""

    tokenizer: str
    generator: str

    @property
    def generator_class(self) -> type[Generator]:
        """The class that has the generator's name."""
        return ARTransformer if self.generator in ARTransformer.releases else MaskGIT


# By the name that stands for both: a TiTok tokenizer's, or an IBQ generator's.
PAIRS: Mapping[str, Pair] = {
    "titok-l-32": Pair("titok-l-32", "maskgit-vit-l-32"),
    "titok-b-64": Pair("titok-b-64", "maskgit-vit-b-64"),
    "titok-s-128": Pair("titok-s-128", "maskgit-uvit-s-128"),
    "titok-l-64-512": Pair("titok-l-64-512", "maskgit-vit-l-64-512"),  # weights never released
    "titok-b-128-512": Pair("titok-b-128-512", "maskgit-vit-b-128-512"),
    "titok-digits": Pair("titok-digits", "maskgit-digits"),
    **{name: Pair("ibq-16384", name) for name in ARTransformer.releases},
}


def generate(
    labels: Tensor | Sequence[int],
    *,
    model: str = "titok-l-32",
    seed: int = 0,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    capture: bool | None = None,
    **options: Any,
) -> Tensor:
    """One image for each label. The pair of models is loaded once and kept, on a CPU packed.

    Image i is the same for a seed whatever the labels around it and the batch size, up to rounding
    in the networks' matrix products.

    Args:
        labels: [N] int64 in [0, num_classes], or a sequence of them; num_classes is no class.
        model: a name in `PAIRS`: "titok-l-32", "titok-b-64", "titok-s-128", "titok-digits",
            "ibq-ar-b", "ibq-ar-l", "ibq-ar-xl" or "ibq-ar-xxl".
        seed: in [0, 2**63).
        batch_size: images generated at a time.
        dtype: of both networks; None keeps that of the weights.
        device: None is the first GPU if there is one, otherwise the CPU.
        capture: whether whole batches are recorded as CUDA graphs and replayed; None is on a GPU
            from 8 whole batches on, where nothing but a setting of the sampling is given. Graphs
            keep the memory of both networks' work; False takes that of one at a time.
        **options: of `MaskGIT.generate`, such as steps or guidance_scale, or of
            `ARTransformer.generate`, such as temperature or top_k. Of image_ids, ids and prefix
            there is one entry for each label; return_steps and num_tokens are not allowed, noise
            only where there is one batch.

    Returns:
        [N, 3, S, S] in [0, 1], in the dtype of the tokenizer, on the device.

    Raises:
        TypeError: labels of another dtype than int64, an unknown option.
        ValueError: an unknown model, a label or a number out of range, another number of entries
            than labels, an option that is not allowed, or `capture` with what cannot be recorded.
        RuntimeError: `capture` without a GPU.
        FileNotFoundError: the weights are missing and cannot be downloaded.
    """
    batch_size = python_number(batch_size)
    check_kind("batch_size", batch_size, COUNT)
    if options.pop("return_steps", False):
        raise ValueError("return_steps: got True, allowed is False: only whole images are decoded")
    if options.get("num_tokens") is not None:
        raise ValueError(f"num_tokens: got {options['num_tokens']}, allowed is None: only whole "
                         "images are decoded")  # fmt: skip
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer, generator = load_pair(model, dtype, device)
    labels = as_labels(labels, generator.num_classes, device)
    if options.get("noise") is not None and len(labels) > batch_size:
        raise ValueError(f"noise: allowed with one batch, got {len(labels)} labels in batches of "
                         f"{batch_size}")  # fmt: skip
    of_each: dict[str, Tensor] = {"image_ids": torch.arange(len(labels), device=device)}
    for name in ("image_ids", "ids", "prefix"):
        value = options.pop(name, None)
        if value is not None:  # tokens are checked where they are, before the device
            of_each[name] = torch.as_tensor(value, device=device if name == "image_ids" else None)
            if of_each[name].shape[:1] != labels.shape:
                raise ValueError(
                    f"{name}: got shape {list(of_each[name].shape)}, allowed is "
                    f"[{len(labels)}, ...], one entry for each label"
                )
    sampler = Sampler(
        tokenizer,
        generator,
        count=len(labels),
        batch_size=batch_size,
        seed=seed,
        capture=capture,
        given=of_each.keys() - {"image_ids"},
        **options,
    )
    images = []
    for start in range(0, max(1, len(labels)), batch_size):
        rows = slice(start, start + batch_size)
        given: dict[str, Any] = {name: value[rows] for name, value in of_each.items()}
        images.append(sampler(labels[rows], **given)[1])
    return torch.cat(images)


class Sampler:
    """Tokens and images of one batch of labels after another.

    Args:
        tokenizer: decodes the tokens.
        generator: of tokens.
        count: of all images.
        batch_size: of every batch but the last.
        seed: in [0, 2**63).
        capture: whether whole batches are recorded as CUDA graphs; None is as in `generate`.
        given: names of what calls give beside labels and image_ids.
        **options: of the generator's `generate`.

    Raises:
        TypeError: a seed that is not an int.
        ValueError: a seed out of range, `capture` with what cannot be recorded.
        RuntimeError: `capture` without a GPU.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: Generator,
        *,
        count: int,
        batch_size: int,
        seed: int,
        capture: bool | None = None,
        given: Iterable[str] = (),
        **options: Any,
    ) -> None:
        seed = python_number(seed)
        if not isinstance(seed, int):
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
        check_counters({"seed": seed})
        self._tokenizer, self._generator = tokenizer, generator
        self._batch_size, self._seed, self._options = batch_size, seed, options
        self._recorded: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None
        settings = {field.name for field in fields(generator.sampling)}
        other = sorted({*given, *options} - settings)
        if capture and other:
            raise ValueError(f"capture: got True with {', '.join(other)}, which no graph takes")
        weight = next(generator.parameters())
        if capture and not weight.is_cuda:
            raise RuntimeError(
                f"capture: the model is on {weight.device}, allowed is a CUDA device"
            )
        if capture is None:
            many = count // batch_size >= CAPTURED_FROM
            ordinary = isinstance(generator, MaskGIT) or generator.decodes()
            capture = weight.is_cuda and many and ordinary and not other
        self.captures = capture

    def __call__(self, labels: Tensor, image_ids: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        """Tokens [B, L] and images [B, 3, S, S] of labels [B] and image_ids [B]."""
        if not self.captures or len(labels) != self._batch_size:
            tokens = self._generator.generate(
                labels, seed=self._seed, image_ids=image_ids, **given, **self._options
            )
            return tokens, self._decode(tokens)
        arguments = labels, torch.tensor(self._seed, device=labels.device), image_ids
        if self._recorded is None:
            generate = self._generator.capture(self._batch_size, **self._options)
            self._recorded = generate, record(self._decode, generate(*arguments))
        generate, decode = self._recorded
        tokens = generate(*arguments)
        return tokens, decode(tokens)

    def _decode(self, tokens: Tensor) -> Tensor:
        return self._tokenizer.decode(arranged(self._tokenizer, tokens))


def arranged(tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """Generated tokens [B, L] as the tokenizer decodes them; IBQ's are the rows of a square."""
    if isinstance(tokenizer, TiTok):
        return tokens
    rows: Tensor = tokens.unflatten(1, (math.isqrt(tokens.shape[1]), -1))  # [B, h, w]
    return rows


def image_size(tokenizer: Tokenizer, generator: Generator) -> int:
    """Side in pixels of the images that a pair generates.

    Raises:
        ValueError: when the generator's tokens are not the tokenizer's.
    """
    given = generator.num_tokens, generator.codebook_size
    if isinstance(tokenizer, TiTok):
        length, size = tokenizer.num_latent_tokens, tokenizer.image_size
    else:
        length = given[0]
        size = tokenizer.stride * math.isqrt(length)
    if given != (length, tokenizer.codebook_size):
        raise ValueError(
            f"generator: got one of {given[0]} tokens of {given[1]} codes, allowed is {length} "
            f"tokens of {tokenizer.codebook_size} codes, as the tokenizer's"
        )
    return size


@functools.lru_cache(maxsize=1)
def load_pair(
    model: str, dtype: torch.dtype | None, device: torch.device
) -> tuple[Tokenizer, Generator]:
    """The tokenizer and the generator of a name in `PAIRS`, in evaluation mode."""
    if model not in PAIRS:
        raise ValueError(f"model: {model!r} is not one of {', '.join(map(repr, PAIRS))}")
    pair = PAIRS[model]
    tokenizer = load_tokenizer(pair.tokenizer, dtype=dtype, device=device)
    generator = pair.generator_class.from_pretrained(pair.generator, dtype=dtype, device=device)
    pack_pair(tokenizer, generator)
    return tokenizer, generator


def pack_pair(tokenizer: Tokenizer, generator: Generator) -> None:
    """`pack_weights` of what generates images on a CPU."""
    if next(generator.parameters()).device.type != "cpu":
        return
    if isinstance(generator, MaskGIT):  # ARTransformer packs its own where it gains by it
        pack_weights(generator)
    for name, part in tokenizer.named_children():
        if name != "encoder" and packable(part):
            pack_weights(part)
