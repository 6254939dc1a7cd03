"""TiTok's encode and decode, whole models, against the official arithmetic in float32."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness, models
from bench.harness import Bench, Call, Provider


@dataclass(frozen=True)
class Case(harness.Case):
    b: int
    model: str
    task: str


def cases(device: str, quick: bool) -> list[Case]:
    """One image and many; and the held-out digits, the one set of images that is at hand."""
    batches = (1, 8) if device == "cpu" else (1, 64)
    points = [("titok-l-32", b, task) for b in batches for task in ("encode", "decode")]
    if quick:
        points = [("titok-digits", 2, "encode"), ("titok-digits", 2, "decode")]
    elif harness.not_installed("scikit-learn") is None:
        points.append(("titok-digits", len(digits()), "encode"))
    return [
        Case(b=b, model=model, task=task, device=device, dtype=torch.float32)
        for model, b, task in points
    ]


@lru_cache(maxsize=1)
def digits() -> Tensor:
    from titok_fast.training.data import digits

    return digits("test")[0]


@lru_cache(maxsize=2)
def inputs(case: Case) -> tuple[Tensor]:
    model = models.tokenizer(case.model, case.device)
    generator = torch.Generator().manual_seed(1)
    if case.task == "encode":
        if case.model == "titok-digits" and case.b > 2:
            return (digits().to(case.device),)
        shape = (case.b, 3, model.image_size, model.image_size)
        return (torch.rand(shape, generator=generator).to(case.device),)
    shape = (case.b, model.num_latent_tokens)
    return (torch.randint(model.codebook_size, shape, generator=generator).to(case.device),)


def work(case: Case) -> tuple[int, int]:
    flops = models.tokenizer_flops(case.model)[case.task == "decode"]
    return case.b * flops, models.parameter_bytes(models.tokenizer(case.model, case.device))


def prepare_official(dtype: torch.dtype) -> Callable[[Case, Tensor], Call]:
    def prepare(case: Case, x: Tensor) -> Call:
        model = models.official_tokenizer(case.model, case.device, dtype)
        if case.task == "encode":
            return lambda: models.official_encode(model, x)
        return lambda: models.official_decode(model, x)

    return prepare


def prepare_ours(dtype: torch.dtype) -> Callable[[Case, Tensor], Call]:
    def prepare(case: Case, x: Tensor) -> Call:
        model = models.prepared(models.tokenizer(case.model, case.device), dtype)
        if case.device == "cuda":
            encode, decode = model.capture(case.b)
            run = encode if case.task == "encode" else decode
            return lambda: run(x.to(dtype) if case.task == "encode" else x)
        if case.task == "encode":
            return lambda: model.encode(x)
        return lambda: model.decode(x, clamp=False)

    return prepare


@lru_cache(maxsize=2)
def truth(case: Case) -> Tensor:
    """The official latents of the images, or the official pixels of the tokens."""
    model = models.official_tokenizer(case.model, case.device, torch.float32)
    with torch.no_grad(), models.true_float32():
        if case.task == "encode":
            return model.latents(*inputs(case))
        return models.official_decode(model, *inputs(case))


def check(case: Case, output: Tensor) -> tuple[int, int]:
    """Tokens whose code is clearly farther from the official latent than the best, or images that
    are not the official ones; 16-bit networks have a tolerance of their own."""
    if case.task == "decode":
        allowed = models.tolerance(case, output)
        official, output = truth(case), output.float()
        if case.device == "cuda":  # what is captured clamps
            official, output = official.clamp(0, 1), output.clamp(0, 1)
        difference = (output - official).flatten(1).norm(dim=1)
        return int((~(difference <= allowed * official.flatten(1).norm(dim=1))).sum()), case.b
    rows = F.normalize(truth(case), dim=-1)
    codes = F.normalize(models.tokenizer(case.model, case.device).quantize.embedding.weight, dim=-1)
    cosine = rows @ codes.T
    chosen = cosine.gather(-1, output.unsqueeze(-1)).squeeze(-1)
    return int((~(chosen >= cosine.amax(-1) - 0.05)).sum()), output.numel()


def figures(case: Case, output: Tensor) -> dict[str, float]:
    """The share of tokens that are those of the float32 model."""
    if case.task == "decode":
        return {}
    with torch.no_grad():
        tokens = models.tokenizer(case.model, case.device).encode(*inputs(case))
    return {"tokens_equal": float((output == tokens).double().mean())}


BENCH = Bench(
    op="titok",
    cases=cases,
    providers=models.providers(prepare_ours, prepare_official),
    inputs=inputs,
    work=work,
    check=check,
    figures=figures,
)


def test_titok(measure: Callable[..., None], case: Case, provider: Provider) -> None:
    measure(BENCH, case, provider)
