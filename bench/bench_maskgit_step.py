"""maskgit_step with guidance against the official sequence of operations."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from bench import harness
from bench.harness import Bench, Call, Provider, own_providers
from bench.ops import Mode, compiled, eager
from titok_fast import maskgit_step

SHAPES = (
    (32, 32, 4096),  # the release l-32
    (32, 64, 4096),  # b-64
    (32, 128, 4096),  # s-128
    (1, 32, 4096),  # one image
)
LARGE = ((1024, 32, 4096),)  # where there is a GPU
SCALE, SOFTMAX, TEMPERATURE = 4.5, 0.9, 2.0
SIGMAS = 6.0  # within which sampling error keeps the mean log-probability

Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case(harness.Case):
    b: int
    l: int  # noqa: E741
    v: int

    @property
    def kept(self) -> int:
        """How many positions stay masked: half."""
        return self.l // 2


def cases(device: str, quick: bool) -> list[Case]:
    shapes = SHAPES if device == "cpu" else (*SHAPES, *LARGE)
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    return [
        Case(
            b=min(images, 4) if quick else images,
            l=length,
            v=vocabulary,
            device=device,
            dtype=dtype,
        )
        for dtype in dtypes
        for images, length, vocabulary in (SHAPES[:1] if quick else shapes)
    ]


@lru_cache(maxsize=1)
def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Conditional and unconditional logits of standard deviation 1; every position is masked."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, case.b, case.l, case.v, generator=generator)
    cond, uncond = logits.to(case.device, case.dtype)
    return cond, uncond, torch.full((case.b, case.l), case.v, device=case.device)


def work(case: Case) -> tuple[int, int]:
    """Guidance, a maximum, an exponential and a sum; both logits read, tokens and ids written."""
    logits = case.b * case.l * case.v
    return 6 * logits, 2 * logits * case.dtype.itemsize + 16 * case.b * case.l


@lru_cache(maxsize=1)
def truth(case: Case) -> tuple[Tensor, float, float]:
    """Log-probabilities in float64, and the mean and deviation of their sum over drawn tokens."""
    cond, uncond, _ = (x.double() for x in inputs(case))
    log_p = ((cond + SCALE * (cond - uncond)) / SOFTMAX / TEMPERATURE).log_softmax(-1)
    p = log_p.exp()
    mean = (p * log_p).sum(-1)
    variance = (p * log_p.square()).sum(-1) - mean.square()
    return log_p, float(mean.sum()), math.sqrt(float(variance.sum()))


def check(case: Case, output: Result) -> tuple[int, int]:
    """Images with a wrong count or token, or all where the tokens do not follow the softmax."""
    ids_next, tokens = output
    again = ids_next == case.v
    inside = ((tokens >= 0) & (tokens < case.v)).all(1)
    right = inside & (again.sum(1) == case.kept) & ((ids_next == tokens) | again).all(1)
    log_p, mean, deviation = truth(case)
    if bool(inside.all()):
        total = float(log_p.gather(-1, tokens.unsqueeze(-1)).sum())
        if abs(total - mean) > SIGMAS * deviation:
            return case.b, case.b
    return int((~right).sum()), case.b


def official(cond: Tensor, uncond: Tensor, ids: Tensor, mask_id: int, kept: int) -> Result:
    """1d-tokenizer's sampling step, in the inputs' dtype."""

    def log(t: Tensor) -> Tensor:
        return torch.log(t.clamp(min=1e-20))

    def add_gumbel_noise(t: Tensor) -> Tensor:
        return t + TEMPERATURE * -log(-log(torch.zeros_like(t).uniform_(0, 1)))

    masked = ids == mask_id
    logits = (cond + (cond - uncond) * SCALE) / SOFTMAX
    tokens = add_gumbel_noise(logits).argmax(-1)
    scores = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    tokens = torch.where(masked, tokens, ids)
    confidence = add_gumbel_noise(torch.where(masked, scores, math.inf).float())
    cut_off = confidence.sort(-1).values[:, kept - 1 : kept]
    return torch.where(confidence <= cut_off, mask_id, tokens), tokens


def prepare_ours(backend: str) -> Callable[..., Call]:
    def prepare(case: Case, cond: Tensor, uncond: Tensor, ids: Tensor) -> Call:
        def call() -> Result:
            ids_next, tokens, _ = maskgit_step(
                cond,
                ids,
                mask_id=case.v,
                num_masked=case.kept,
                uncond_logits=uncond,
                guidance_scale=SCALE,
                softmax_temperature=SOFTMAX,
                token_temperature=TEMPERATURE,
                confidence_temperature=TEMPERATURE,
                seed=0,
                step=0,
                backend=backend,
            )
            return ids_next, tokens

        return call

    return prepare


def prepare_official(
    case: Case, cond: Tensor, uncond: Tensor, ids: Tensor, mode: Mode = eager
) -> Call:
    run = mode(official)
    return lambda: run(cond, uncond, ids, case.v, case.kept)


BENCH = Bench(
    op="maskgit_step",
    cases=cases,
    providers=(
        *own_providers(prepare_ours),
        Provider("official", prepare_official),
        Provider("compiled", partial(prepare_official, mode=compiled)),
    ),
    inputs=inputs,
    work=work,
    check=check,
)


def test_maskgit_step(measure: Callable[..., None], case: Case, provider: Provider) -> None:
    measure(BENCH, case, provider)
