"""MaskGIT's generate, whole, against the official sequence of operations in float32."""

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
    model = "maskgit-digits" if quick else "maskgit-vit-l-32"
    batches = (2,) if quick else (1, 8) if device == "cpu" else (1, 64)
    return [Case(b=b, model=model, device=device, dtype=torch.float32) for b in batches]


def inputs(case: Case) -> tuple[Tensor]:
    return (models.labels_of(models.generator(case.model, case.device), case.b, case.device),)


def work(case: Case) -> tuple[int, int]:
    moved = models.parameter_bytes(models.generator(case.model, case.device))
    return case.b * models.generator_flops(case.model), moved


def prepare_official(dtype: torch.dtype) -> Callable[[Case, Tensor], Call]:
    def prepare(case: Case, labels: Tensor) -> Call:
        model = models.official_generator(case.model, case.device, dtype)
        return lambda: models.official_generate(model, labels)

    return prepare


def prepare_ours(dtype: torch.dtype) -> Callable[[Case, Tensor], Call]:
    def prepare(case: Case, labels: Tensor) -> Call:
        model = models.prepared(models.generator(case.model, case.device), dtype)
        return models.generating(model, labels)

    return prepare


def check(case: Case, output: Tensor) -> tuple[int, int]:
    return models.outside(models.generator(case.model, case.device), output)


BENCH = Bench(
    op="maskgit",
    cases=cases,
    providers=models.providers(prepare_ours, prepare_official),
    inputs=inputs,
    work=work,
    check=check,
    # Eight images in our float32 on a CPU.
    slow=lambda case, provider: (
        case.device == "cpu" and case.b == 8 and provider.name == "titok_fast-float32"
    ),
)


def test_maskgit(measure: Callable[..., None], case: Case, provider: Provider) -> None:
    measure(BENCH, case, provider)
