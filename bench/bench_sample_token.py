"""sample_token against the official sequence of operations, which sorts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.harness import Bench, Call, Provider, own_providers
from bench.ops import Mode, compiled, eager
from titok_fast import sample_token

SHAPES = ((1, 262_144), (4, 262_144), (64, 16_384))
FILTERS = {"plain": (0, 1.0), "top-k 2000": (2000, 1.0), "top-p 0.9": (0, 0.9)}
SCALE = 2.0
SIGMAS = 6.0  # within which sampling error keeps the mean log-probability
EDGE = 1e-3  # of logits


@dataclass(frozen=True)
class Case(harness.Case):
    b: int
    v: int
    filter: str
    guidance: str


def cases(device: str, quick: bool) -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    found = [
        Case(b=b, v=v, filter=name, guidance="no guidance", device=device, dtype=dtype)
        for dtype in dtypes
        for b, v in (SHAPES[:1] if quick else SHAPES)
        for name in FILTERS
    ]
    guided = {"filter": "top-p 0.9", "guidance": "guided", "device": device}
    b, v = SHAPES[1]
    return found if quick else [*found, *(Case(b=b, v=v, dtype=t, **guided) for t in dtypes)]


@lru_cache(maxsize=1)
def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional logits of standard deviation 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, case.b, case.v, generator=generator)
    cond, uncond = logits.to(case.device, case.dtype)
    return cond, uncond


def work(case: Case) -> tuple[int, int]:
    """A maximum, an exponential and a sum; the logits read, tokens written."""
    read = (1 + (case.guidance == "guided")) * case.b * case.v
    return 4 * case.b * case.v, read * case.dtype.itemsize + 8 * case.b


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """SEED-Voken's top-k and top-p: -inf where a token is not to be drawn."""
    if top_k > 0:
        smallest = torch.topk(logits, top_k)[0][..., -1, None]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1.0:
        values, order = torch.sort(logits, descending=True)
        remove = torch.cumsum(torch.softmax(values, dim=-1), dim=-1) > top_p
        remove[..., 1:] = remove[..., :-1].clone()
        remove[..., 0] = False
        logits = logits.masked_fill(remove.scatter(1, order, remove), -math.inf)
    return logits


def guided(case: Case, cond: Tensor, uncond: Tensor) -> Tensor:
    return uncond + (cond - uncond) * SCALE if case.guidance == "guided" else cond


@lru_cache(maxsize=1)
def truth(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: guided logits, log-probabilities after the filters, the least logit kept."""
    logits = guided(case, *(x.double() for x in inputs(case)))
    kept = filtered(logits, *FILTERS[case.filter])
    least = kept.masked_fill(kept == -math.inf, math.inf).amin(-1, keepdim=True)
    return logits, kept.log_softmax(-1), least


def check(case: Case, tokens: Tensor) -> tuple[int, int]:
    """Rows with a token that the filters remove, or all where tokens do not follow the softmax.

    A logit may miss the least one that is kept by float32's rounding of the sums.
    """
    logits, log_p, least = truth(case)
    tokens = tokens.view(-1, 1)
    inside = (tokens >= 0) & (tokens < case.v)
    if not bool(inside.all()):
        return int((~inside).sum()), case.b
    wrong = int((logits.gather(-1, tokens) < least - EDGE).sum())
    p = log_p.exp()
    finite = log_p.masked_fill(p == 0, 0.0)
    mean = (p * finite).sum(-1)
    variance = (p * finite.square()).sum(-1) - mean.square()
    gap = float((finite.gather(-1, tokens).squeeze(-1) - mean).sum())
    return (case.b if abs(gap) > SIGMAS * math.sqrt(float(variance.sum())) else wrong), case.b


def official(case: Case, cond: Tensor, uncond: Tensor) -> Tensor:
    """SEED-Voken's sampling of one token, in the inputs' dtype."""
    kept = filtered(guided(case, cond, uncond) / 1.0, *FILTERS[case.filter])
    return torch.multinomial(torch.softmax(kept, dim=-1), num_samples=1).squeeze(-1)


def prepare_ours(backend: str) -> Callable[..., Call]:
    def prepare(case: Case, cond: Tensor, uncond: Tensor) -> Call:
        top_k, top_p = FILTERS[case.filter]
        options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "seed": 0, "step": 0}
        if case.guidance == "guided":
            options |= {"uncond_logits": uncond, "guidance_scale": SCALE}
        return lambda: sample_token(cond, backend=backend, **options)

    return prepare


def prepare_official(case: Case, cond: Tensor, uncond: Tensor, mode: Mode = eager) -> Call:
    run = mode(partial(official, case))
    return lambda: run(cond, uncond)


BENCH = Bench(
    op="sample_token",
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


def test_sample_token(measure: Callable[..., None], case: Case, provider: Provider) -> None:
    measure(BENCH, case, provider)
