"""From class labels to images, every model, whole: a generator's tokens and their decoder."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import bench_autoregressive, bench_ibq, harness, models
from bench.harness import Bench, Call, Provider
from titok_fast.models import ARTransformer
from titok_fast.models.auto import Tokenizer
from titok_fast.models.generate import PAIRS, Generator, Sampler, arranged


@dataclass(frozen=True)
class Case(harness.Case):
    b: int
    model: str


def cases(device: str, quick: bool) -> list[Case]:
    names = ["titok-digits"] if quick else list(PAIRS)
    batches = (2,) if quick else (1,) if device == "cpu" else (1, 64)
    return [
        Case(b=b, model=name, device=device, dtype=torch.float32) for name in names for b in batches
    ]


def is_ibq(case: Case) -> bool:
    return case.model in ARTransformer.releases


def pair(case: Case) -> tuple[Tokenizer, Generator]:
    names = PAIRS[case.model]
    if is_ibq(case):
        tokenizer = bench_ibq.model_of(names.tokenizer, case.device)
        return tokenizer, bench_autoregressive.model_of(names.generator, case.device)
    tokenizer = models.tokenizer(case.model, case.device)
    return tokenizer, models.generator(names.generator, case.device)


def inputs(case: Case) -> tuple[Tensor]:
    return (models.labels_of(pair(case)[1], case.b, case.device),)


def work(case: Case) -> tuple[int, int]:
    names = PAIRS[case.model]
    if is_ibq(case):
        of_tokens = bench_autoregressive.Case(
            b=case.b, model=case.model, task="generate", device=case.device, dtype=case.dtype
        )
        flops, _ = bench_autoregressive.work(of_tokens)
        flops += case.b * bench_ibq.image_flops(names.tokenizer, 256, "decode")
        return flops, models.parameter_bytes(*pair(case))
    flops = models.generator_flops(names.generator) + models.tokenizer_flops(case.model)[1]
    return case.b * flops, models.parameter_bytes(*pair(case))


def prepare_official(dtype: torch.dtype) -> Callable[[Case, Tensor], Call]:
    def prepare(case: Case, labels: Tensor) -> Call:
        names = PAIRS[case.model]
        if is_ibq(case):
            tokenizer = bench_ibq.official_model(replace(case, model=names.tokenizer), dtype)
            generator = copy.deepcopy(pair(case)[1]).to(dtype)

            def call() -> Tensor:
                tokens = bench_autoregressive.Official(generator, labels).generate()
                return bench_ibq.official_decode(tokenizer, arranged(tokenizer, tokens))

            return call
        tokenizer = models.official_tokenizer(case.model, case.device, dtype)
        generator = models.official_generator(names.generator, case.device, dtype)

        def call() -> Tensor:
            tokens = models.official_generate(generator, labels)
            return models.official_decode(tokenizer, tokens).clamp(0, 1)

        return call

    return prepare


def prepare_ours(dtype: torch.dtype) -> Callable[[Case, Tensor], Call]:
    def prepare(case: Case, labels: Tensor) -> Call:
        tokenizer, generator = pair(case)
        tokenizer = models.prepared(tokenizer, dtype)
        if is_ibq(case):  # which packs nothing
            generator = copy.deepcopy(generator).cast(dtype)
        else:
            generator = models.prepared(generator, dtype)
        options = {"count": case.b, "batch_size": case.b, "seed": 0}
        sampler = Sampler(tokenizer, generator, capture=case.device == "cuda", **options)
        numbers = torch.arange(case.b, device=case.device)
        return lambda: sampler(labels, numbers)[1]

    return prepare


def check(case: Case, output: Tensor) -> tuple[int, int]:
    """Images that are blank or leave [0, 1]; that the samples are right is for the tests."""
    pixels = output.float().flatten(1)
    right = ((pixels >= 0) & (pixels <= 1)).all(1) & (pixels.std(1) > 0)
    return int((~right).sum()), case.b


def slow(case: Case, provider: Provider) -> bool:
    """64 steps or 256 tokens take a CPU up to a minute an image, and the largest models its memory;
    512 px in float32 a GPU seconds a batch."""
    half = provider.name == "titok_fast-bfloat16"
    large = case.model in ("titok-l-64-512", "titok-s-128", "titok-b-128-512")
    if case.model in ("ibq-ar-xl", "ibq-ar-xxl"):
        return True
    if case.device == "cuda":
        float32 = provider.name in ("titok_fast-float32", "official")
        return (large and float32) or case.model in ("titok-b-128-512", "ibq-ar-l")
    if "128" in case.model or is_ibq(case):
        return not half
    return large and provider.name == "titok_fast-float32"


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
