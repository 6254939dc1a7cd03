"""IBQ's tokenizer, encode and decode at 256 px, against the official arithmetic in float32."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import harness, models
from bench.harness import Bench, Call, Provider
from titok_fast import IBQTokenizer
from titok_fast.models.ibq import SpatialAttention


@dataclass(frozen=True)
class Case(harness.Case):
    b: int
    size: int
    model: str
    task: str


def cases(device: str, quick: bool) -> list[Case]:
    model, size = ("ibq-1024", 32) if quick else ("ibq-262144", 256)
    return [
        Case(b=b, size=size, model=model, task=task, device=device, dtype=torch.float32)
        for b in ((1,) if device == "cpu" or quick else (1, 16))
        for task in ("encode", "decode")
    ]


@lru_cache(maxsize=1)
def model_of(name: str, device: str) -> IBQTokenizer:
    """Generated weights: time does not depend on them."""
    return models.generated(IBQTokenizer, name, device)


@lru_cache(maxsize=2)
def inputs(case: Case) -> tuple[Tensor]:
    model = model_of(case.model, case.device)
    generator = torch.Generator().manual_seed(1)
    if case.task == "encode":
        shape: tuple[int, ...] = (case.b, 3, case.size, case.size)
        return (torch.rand(shape, generator=generator).to(case.device),)
    shape = (case.b, case.size // model.stride, case.size // model.stride)
    return (torch.randint(model.codebook_size, shape, generator=generator).to(case.device),)


@lru_cache(maxsize=2)
def image_flops(name: str, size: int, task: str) -> int:
    """Multiplications and additions of an image's network, and of its search of the codes."""
    with torch.device("meta"):
        model = IBQTokenizer.from_config(name)
        image, side = torch.empty(1, 3, size, size), size // model.stride
        z = torch.empty(1, model.quantize.embedding.weight.shape[1], side, side)
        search = 2 * model.quantize.embedding.weight.numel() * side**2
        with torch.no_grad(), models.FlopCounterMode(display=False) as counter:
            if task == "encode":
                model.quant_conv(model.encoder(image))
            else:
                model.decoder(model.post_quant_conv(z))
    return counter.get_total_flops() + (search if task == "encode" else 0)


def work(case: Case) -> tuple[int, int]:
    flops = image_flops(case.model, case.size, case.task)
    return case.b * flops, models.parameter_bytes(model_of(case.model, case.device))


class OfficialAttention(nn.Module):
    """SEED-Voken's: every weight in memory, the result laid out as its input."""

    def __init__(self, layer: SpatialAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, hidden = self.layer, self.layer.norm(x)
        q, k, v = (part(hidden).flatten(2) for part in (layer.q, layer.k, layer.v))  # [B, C, P]
        weights = (q.mT @ k * q.shape[1] ** -0.5).softmax(2)
        return x + layer.proj_out((v @ weights.mT).view_as(x))


def official_model(case: Case, dtype: torch.dtype) -> IBQTokenizer:
    model = copy.deepcopy(model_of(case.model, case.device)).to(dtype)
    models.replace(model, SpatialAttention, OfficialAttention)
    models.official_convolutions(model)
    return model


def logits(model: IBQTokenizer, images: Tensor) -> Tensor:
    """SEED-Voken's scores of every code, [B h w, K]."""
    encoder = model.encoder
    x = encoder.conv_in(2 * images.to(encoder.conv_in.weight.dtype) - 1)
    for part in (*encoder.down, *encoder.mid.values()):
        x = part(x)
    z = model.quant_conv(encoder.conv_out(F.silu(encoder.norm_out(x))))
    return z.permute(0, 2, 3, 1).flatten(0, 2) @ model.quantize.embedding.weight.T


def official_encode(model: IBQTokenizer, images: Tensor) -> Tensor:
    side = images.shape[-1] // model.stride
    return logits(model, images).softmax(1).argmax(1).view(-1, side, side)


def official_decode(model: IBQTokenizer, tokens: Tensor) -> Tensor:
    decoder, z = model.decoder, model.quantize.embedding.weight[tokens]
    x = decoder.conv_in(model.post_quant_conv(z.permute(0, 3, 1, 2).contiguous()))
    for part in (*decoder.mid.values(), *reversed(decoder.up)):
        x = part(x)
    return ((decoder.conv_out(F.silu(decoder.norm_out(x))) + 1) / 2).clamp(0, 1)


def prepare_official(dtype: torch.dtype) -> Callable[[Case, Tensor], Call]:
    def prepare(case: Case, x: Tensor) -> Call:
        model = official_model(case, dtype)
        run = official_encode if case.task == "encode" else official_decode
        return lambda: run(model, x)

    return prepare


def prepare_ours(dtype: torch.dtype) -> Callable[[Case, Tensor], Call]:
    def prepare(case: Case, x: Tensor) -> Call:
        model = models.prepared(model_of(case.model, case.device), dtype)
        return lambda: (model.encode if case.task == "encode" else model.decode)(x)

    return prepare


@lru_cache(maxsize=1)
def truth(case: Case) -> Tensor:
    """The scores of every code in float32, or the pixels."""
    model = official_model(case, torch.float32)
    with torch.no_grad(), models.true_float32():
        return (logits if case.task == "encode" else official_decode)(model, *inputs(case))


def check(case: Case, output: Tensor) -> tuple[int, int]:
    """Tokens whose score is clearly below the best, or images that are not those of float32."""
    expected = truth(case)
    if case.task == "decode":
        allowed = models.tolerance(case, output) * expected.flatten(1).norm(dim=1)
        difference = (output.float() - expected).flatten(1).norm(dim=1)
        return int((~(difference <= allowed)).sum()), case.b
    chosen = expected.gather(1, output.reshape(-1, 1)).squeeze(1)
    spread = expected.amax(1) - expected.amin(1)
    return int((~(chosen >= expected.amax(1) - 0.05 * spread)).sum()), output.numel()


BENCH = Bench(
    op="ibq",
    cases=cases,
    providers=models.providers(prepare_ours, prepare_official),
    inputs=inputs,
    work=work,
    check=check,
    slow=lambda case, provider: case.device == "cuda" and provider.name == "titok_fast-float32",
)


def test_ibq(measure: Callable[..., None], case: Case, provider: Provider) -> None:
    measure(BENCH, case, provider)
