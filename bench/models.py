"""Whole models for the benchmarks: generated weights, and the official sequence of operations."""

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import Call, Case, Provider
from titok_fast.models import MaskGIT, TiTok, pack_weights
from titok_fast.models.blocks import (
    FusedSelfAttention,
    ResidualAttentionBlock,
    SeparateSelfAttention,
)
from titok_fast.models.convolutions import PackableConv
from titok_fast.models.generate import Generator
from titok_fast.models.pretrained import PretrainedModel

# Of pixels, as a share of their norm. On a GPU PyTorch's float32 convolutions multiply in TF32, by
# default, which has three bits more than bfloat16.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.05}
TF32_TOLERANCE = TOLERANCE[torch.bfloat16] / 8

Model = TypeVar("Model", bound=PretrainedModel)
Make = Callable[[torch.dtype], Callable[..., Call]]


def generated(kind: type[Model], config: str | Mapping[str, Any], device: str) -> Model:
    """A model made on its device, where a GPU needs no time for billions of random numbers."""
    torch.manual_seed(0)
    with torch.device(device):
        return kind.from_config(config).eval()


@lru_cache(maxsize=2)
def tokenizer(name: str, device: str) -> TiTok:
    """Generated weights, since time does not depend on them; "titok-digits" has its own."""
    if name == "titok-digits":
        return TiTok.from_pretrained(name, device=device)
    return generated(TiTok, name, device)


@lru_cache(maxsize=2)
def generator(name: str, device: str) -> MaskGIT:
    """Generated weights, as of `tokenizer`."""
    return generated(MaskGIT, name, device)


def prepared(model: Model, dtype: torch.dtype) -> Model:
    """A copy as our providers run it: its networks in `dtype`, on a CPU with packed weights."""
    model = copy.deepcopy(model).cast(dtype)
    model.to(memory_format=torch.channels_last)
    if next(model.parameters()).device.type == "cpu":
        pack_weights(model)
    return model


def labels_of(model: Generator, count: int, device: str) -> Tensor:
    return (torch.arange(count) * 37 % model.num_classes).to(device)


def generating(model: Generator, labels: Tensor, **options: Any) -> Callable[[], Tensor]:
    """The call of our `generate`; on a GPU of its graph."""
    if not labels.is_cuda:
        return lambda: model.generate(labels, **options)
    run, seed = model.capture(len(labels), **options), labels.new_zeros(())
    numbers = torch.arange(len(labels), device=labels.device)
    return lambda: run(labels, seed, numbers)


def tolerance(case: Case, output: Tensor) -> float:
    """That of pixels."""
    tf32 = case.device == "cuda" and output.dtype == torch.float32
    return TF32_TOLERANCE if tf32 else TOLERANCE[output.dtype]


def true_float32() -> AbstractContextManager[None]:
    """Within it, convolutions of float32 multiply in it on a GPU too."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def outside(model: Generator, tokens: Tensor) -> tuple[int, int]:
    """Tokens outside the codebook, of how many; that they are right is for the tests to show."""
    return int(((tokens < 0) | (tokens >= model.codebook_size)).sum()), tokens.numel()


def parameter_bytes(*models: nn.Module) -> int:
    return sum(p.numel() * p.itemsize for model in models for p in model.parameters())


@cache
def tokenizer_flops(name: str) -> tuple[int, int]:
    """Multiplications and additions of an image's encoding, and of its decoding."""
    with torch.device("meta"):
        model = TiTok.from_config(name)
        image = torch.empty(1, 3, model.image_size, model.image_size)
        tokens = torch.empty(1, model.num_latent_tokens, dtype=torch.int64)
        with torch.no_grad(), FlopCounterMode(display=False) as encoding:
            model.encoder(image, model.latent_tokens)
        with torch.no_grad(), FlopCounterMode(display=False) as decoding:
            model._to_pixels(model.decoder(model._embed(tokens)))
    return encoding.get_total_flops(), decoding.get_total_flops()


@cache
def generator_flops(name: str) -> int:
    """Multiplications and additions of an image's tokens, all steps with their guidance."""
    with torch.device("meta"):
        model = MaskGIT.from_config(name)
        ids = torch.empty(1, model.num_tokens, dtype=torch.int64)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model._head(model._hidden(ids, torch.empty(1, dtype=torch.int64)))
    sampling = model.sampling
    guided = sum(sampling.guidance(step) is not None for step in range(sampling.steps))
    return (sampling.steps + guided) * counter.get_total_flops()


class OfficialStack(nn.Module):
    """The official order of operations: sequence first, `nn.MultiheadAttention`."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in blocks)
        for block in self.blocks:
            own = block.attn
            attention = nn.MultiheadAttention(own.out_proj.in_features, own.num_heads)
            attention.load_state_dict(own.state_dict())
            block.attn = attention.to(own.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(1, 0, 2)
        for block in self.blocks:
            assert isinstance(block, ResidualAttentionBlock)
            hidden = block.ln_1(x)
            x = x + block.attn(hidden, hidden, hidden, need_weights=False)[0]
            x = x + block.mlp(block.ln_2(x))
        return x.permute(1, 0, 2)


def replace(model: nn.Module, kind: Any, make: Callable[[Any], nn.Module]) -> None:
    """Puts make(layer) in the place of each layer of a kind, or of a union of kinds."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, kind):
                parent.add_module(name, make(child))


def official_convolutions(model: nn.Module) -> None:
    """Replaces the convolutions of a model's pixel networks by PyTorch's own."""

    def official(own: PackableConv) -> nn.Module:
        with torch.device("meta"):
            layer = nn.Conv2d(own.in_channels, own.out_channels, 3, padding=1)
        layer.weight, layer.bias = own.weight, own.bias
        return layer

    replace(model, PackableConv, official)


@lru_cache(maxsize=1)
def official_tokenizer(name: str, device: str, dtype: torch.dtype) -> TiTok:
    model = copy.deepcopy(tokenizer(name, device))
    for part in (model.encoder, model.decoder):
        part.transformer = nn.ModuleList([OfficialStack(part.transformer)])
    official_convolutions(model)
    return model.to(dtype, memory_format=torch.contiguous_format)


def official_encode(model: TiTok, images: Tensor) -> Tensor:
    rows, codes = model.latents(images), model.quantize.embedding.weight
    if model.quantize.use_l2_norm:
        rows, codes = F.normalize(rows, dim=-1), F.normalize(codes, dim=-1)
    norms = rows.square().sum(-1, keepdim=True) + codes.square().sum(-1)
    return (norms - 2 * rows @ codes.T).argmin(-1)


def official_decode(model: TiTok, tokens: Tensor) -> Tensor:
    decoded = model.decoder(model._embed(tokens))
    if not model.finetune_decoder:
        return decoded
    codes = model.pixel_quantize.embedding.weight
    z, pixels = torch.einsum("nchw,cd->ndhw", decoded.softmax(1), codes), model.pixel_decoder
    x = pixels.mid(pixels.conv_in(z.contiguous()))
    for level in reversed(pixels.up):
        x = level(x)
    return pixels.conv_out(F.silu(pixels.norm_out(x)))


class OfficialAttention(nn.Module):
    """Self-attention as BERT's and UViT's code has it: PyTorch's own, of separate projections."""

    def __init__(self, own: SeparateSelfAttention | FusedSelfAttention) -> None:
        super().__init__()
        self.num_heads = own.num_heads
        if isinstance(own, FusedSelfAttention):
            self.projections, self.proj = nn.ModuleList([own.qkv]), own.proj
            return
        self.projections, self.proj = nn.ModuleList(), nn.Identity()
        weights = own.in_proj_weight.chunk(3), own.in_proj_bias.chunk(3)
        for weight, bias in zip(*weights, strict=True):
            with torch.device("meta"):
                projection = nn.Linear(weight.shape[1], weight.shape[0])
            projection.weight, projection.bias = nn.Parameter(weight), nn.Parameter(bias)
            self.projections.append(projection)

    def forward(self, x: Tensor) -> Tensor:
        parts = [projection(x) for projection in self.projections]
        parts = parts[0].chunk(3, -1) if len(parts) == 1 else parts
        heads = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        out: Tensor = self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return out


def official_generator(name: str, device: str, dtype: torch.dtype) -> MaskGIT:
    """A generator with the official attention; `official_generate` samples it."""
    model = copy.deepcopy(generator(name, device))
    replace(model, SeparateSelfAttention | FusedSelfAttention, OfficialAttention)
    return model.to(dtype)


def official_generate(model: MaskGIT, labels: Tensor) -> Tensor:
    """1d-tokenizer's loop: two passes a step, every position's logits, noise for every token."""
    sampling, length = model.sampling, model.num_tokens
    ids = torch.full((len(labels), length), model.mask_id, device=labels.device)

    def gumbel(x: Tensor) -> Tensor:
        uniform = torch.zeros_like(x).uniform_(0, 1)
        return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()

    for step in range(sampling.steps):
        options = sampling.options(step)
        scale, temperature = options["guidance_scale"], options["token_temperature"]
        masked = ids == model.mask_id
        logits = model.logits(ids, labels)
        if scale != 0:
            without = model.logits(ids, None)
            start = without if options["guidance_form"] == "uncond" else logits
            logits = start + scale * (logits - without)
        logits = logits / options["softmax_temperature"]
        tokens = (logits + temperature * gumbel(logits)).argmax(-1)
        scores = logits.gather(-1, tokens[..., None]).squeeze(-1)
        tokens = torch.where(masked, tokens, ids)
        scores = torch.where(masked, scores, math.inf)
        left = torch.tensor(
            math.floor(length * math.acos((step + 1) / sampling.steps) * 2 / math.pi)
        )
        left = left.to(ids).minimum(masked.sum(-1, keepdim=True) - 1).clamp(min=1)[0]
        confidence = scores + temperature * gumbel(scores)
        cut = confidence.sort(-1).values[:, left.long() - 1]
        ids = tokens
        if step < sampling.steps - 1:
            ids = torch.where(confidence <= cut, model.mask_id, tokens)
    return ids


def providers(ours: Make, official: Make) -> tuple[Provider, ...]:
    """Our models in two dtypes, the official arithmetic in float32 and, on a GPU, in bfloat16."""
    half = torch.bfloat16
    return (
        Provider("titok_fast-float32", ours(torch.float32), ours=True),
        Provider("titok_fast-bfloat16", ours(half), ours=True, dtype=half),
        Provider("official", official(torch.float32)),
        Provider("official-bfloat16", official(half), devices=("cuda",), dtype=half),
    )
