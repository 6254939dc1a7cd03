"""From class labels to images, every model: MaskGIT's tokens and TiTok's decoder, whole."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import harness, models
from bench.harness import Bench, Call, Provider


@dataclass(frozen=True)
class Case(harness.Case):
    b: int
    model: str


def cases(device: str, quick: bool) -> list[Case]:
    names = ["titok-digits"] if quick else list(models.GENERATORS)
    batches = (2,) if quick else (1,) if device == "cpu" else (1, 64)
    return [
        Case(b=b, model=name, device=device, dtype=torch.float32) for name in names for b in batches
    ]


def pair(case: Case) -> tuple[models.TiTok, models.MaskGIT]:
    tokenizer = models.tokenizer(case.model, case.device)
    return tokenizer, models.generator(models.GENERATORS[case.model], case.device)


def inputs(case: Case) -> tuple[Tensor]:
    return (models.labels_of(pair(case)[1], case.b, case.device),)


def work(case: Case) -> tuple[int, int]:
    flops = models.generator_flops(models.GENERATORS[case.model])
    flops += models.tokenizer_flops(case.model)[1]
    return case.b * flops, models.parameter_bytes(*pair(case))


def prepare_official(dtype: torch.dtype) -> Callable[[Case, Tensor], Call]:
    def prepare(case: Case, labels: Tensor) -> Call:
        tokenizer = models.official_tokenizer(case.model, case.device, dtype)
        generator = models.official_generator(models.GENERATORS[case.model], case.device, dtype)

        def call() -> Tensor:
            tokens = models.official_generate(generator, labels)
            return models.official_decode(tokenizer, tokens).clamp(0, 1)

        return call

    return prepare


def prepare_ours(dtype: torch.dtype) -> Callable[[Case, Tensor], Call]:
    def prepare(case: Case, labels: Tensor) -> Call:
        tokenizer, generator = (models.prepared(model, dtype) for model in pair(case))
        generate = models.generating(generator, labels)
        decode = tokenizer.capture(case.b)[1] if case.device == "cuda" else tokenizer.decode
        return lambda: decode(generate())

    return prepare


def check(case: Case, output: Tensor) -> tuple[int, int]:
    """Images that are blank or leave [0, 1]; that the samples are right is for the tests."""
    pixels = output.float().flatten(1)
    right = ((pixels >= 0) & (pixels <= 1)).all(1) & (pixels.std(1) > 0)
    return int((~right).sum()), case.b


def slow(case: Case, provider: Provider) -> bool:
    """64 steps take a CPU a minute an image; 512 px in float32 a GPU seconds a batch."""
    float32 = provider.name in ("titok_fast-float32", "official")
    large = case.model in ("titok-l-64-512", "titok-s-128", "titok-b-128-512")
    if case.device == "cuda":
        return (large and float32) or case.model == "titok-b-128-512"
    return "128" in case.model or (large and provider.name == "titok_fast-float32")


BENCH = Bench(
    op="generate",
    cases=cases,
    providers=models.providers(prepare_ours, prepare_official),
    inputs=inputs,
    work=work,
    check=check,
    slow=slow,
)


def test_generate(measure: Callable[..., None], case: Case, provider: Provider) -> None:
    measure(BENCH, case, provider)
