"""MaskGIT's generate, whole, against the official sequence of operations in float32."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bench import harness
from bench.harness import Bench, Call, Provider
from titok_fast.models import MaskGIT

PASS = 11.8e9  # multiplications and additions of one image's pass through maskgit-vit-l-32


@dataclass(frozen=True)
class Case(harness.Case):
    b: int
    model: str


def cases(device: str, quick: bool) -> list[Case]:
    model = "maskgit-digits" if quick else "maskgit-vit-l-32"
    batches = (2,) if quick else (1, 8) if device == "cpu" else (1, 64)
    return [Case(b=b, model=model, device=device, dtype=torch.float32) for b in batches]


@lru_cache(maxsize=1)
def model_of(name: str, device: str) -> MaskGIT:
    """Generated weights: time does not depend on them."""
    torch.manual_seed(0)
    return MaskGIT.from_config(name).to(device).eval()


def inputs(case: Case) -> tuple[Tensor]:
    classes = model_of(case.model, case.device).num_classes
    return ((torch.arange(case.b) * 37 % classes).to(case.device),)


def work(case: Case) -> tuple[int, int]:
    model = model_of(case.model, case.device)
    moved = sum(p.numel() * p.itemsize for p in model.parameters())
    if case.model != "maskgit-vit-l-32":
        return 0, moved
    return int(case.b * PASS * (2 * model.sampling.steps - 1)), moved


def official(model: MaskGIT, labels: Tensor) -> Tensor:
    """1d-tokenizer's loop: two passes a step, every position's logits, noise for every token."""
    sampling, length = model.sampling, model.num_tokens
    ids = torch.full((len(labels), length), model.mask_id, device=labels.device)
    scale = 0.0

    def gumbel(x: Tensor) -> Tensor:
        uniform = torch.zeros_like(x).uniform_(0, 1)
        return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()

    for step in range(sampling.steps):
        ratio = (step + 1) / sampling.steps
        temperature = sampling.randomize_temperature * (1 - ratio)
        masked = ids == model.mask_id
        logits = model.logits(ids, labels)
        if scale != 0:
            logits = logits + scale * (logits - model.logits(ids, None))
        logits = logits / (0.5 + 0.8 * (1 - ratio))
        tokens = (logits + temperature * gumbel(logits)).argmax(-1)
        scores = logits.gather(-1, tokens[..., None]).squeeze(-1)
        tokens = torch.where(masked, tokens, ids)
        scores = torch.where(masked, scores, math.inf)
        left = torch.tensor(math.floor(length * math.acos(ratio) / (math.pi / 2)))
        left = left.to(ids).minimum(masked.sum(-1, keepdim=True) - 1).clamp(min=1)[0]
        confidence = scores + temperature * gumbel(scores)
        cut = confidence.sort(-1).values[:, left.long() - 1]
        ids = tokens
        if step < sampling.steps - 1:
            ids = torch.where(confidence <= cut, model.mask_id, tokens)
        scale = ratio * sampling.guidance_scale
    return ids


def prepare_official(case: Case, labels: Tensor) -> Call:
    model = model_of(case.model, case.device)
    return lambda: official(model, labels)


def prepare_ours(dtype: torch.dtype) -> Callable[[Case, Tensor], Call]:
    def prepare(case: Case, labels: Tensor) -> Call:
        model = copy.deepcopy(model_of(case.model, case.device)).cast(dtype)
        if case.device == "cuda":
            run, seed = model.capture(case.b), torch.zeros((), dtype=torch.int64, device="cuda")
            numbers = torch.arange(case.b, device="cuda")
            return lambda: run(labels, seed, numbers)
        return lambda: model.generate(labels)

    return prepare


def check(case: Case, output: Tensor) -> tuple[int, int]:
    """Tokens outside the codebook; that the samples are right is for the tests to show."""
    size = model_of(case.model, case.device).codebook_size
    return int(((output < 0) | (output >= size)).sum()), output.numel()


BENCH = Bench(
    op="maskgit",
    cases=cases,
    providers=(
        Provider("titok_fast-float32", prepare_ours(torch.float32), ours=True),
        Provider("titok_fast-bfloat16", prepare_ours(torch.bfloat16), ours=True),
        Provider("official", prepare_official),
    ),
    inputs=inputs,
    work=work,
    check=check,
)


def test_maskgit(measure, case, provider):
    measure(BENCH, case, provider)
