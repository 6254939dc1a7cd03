"""decode_attention at IBQ's sizes against the official sequence of operations and a plain SDPA."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.harness import Bench, Call, Provider, own_providers
from bench.ops import copies, in_turn, slower_kinds, too_far
from titok_fast import decode_attention
from titok_fast.reference.decode_attention import rotate

SHAPES = ((2, 16), (8, 16), (2, 30))  # B and H: of ibq-ar-b, and of -xxl
LENGTH, WIDTH = 257, 64

Step = dict[str, Any]


@dataclass(frozen=True)
class Case(harness.Case):
    b: int
    h: int
    s: int
    d: int
    p: int


def cases(device: str, quick: bool) -> list[Case]:
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.bfloat16, torch.float32)
    shapes, length = (((2, 2),), 17) if quick else (SHAPES, LENGTH)
    return [
        Case(b=b, h=h, s=length, d=WIDTH, p=position, device=device, dtype=dtype)
        for dtype in dtypes
        for b, h in shapes
        for position in ((length // 2,) if quick else (length // 2, length - 1))
    ]


@lru_cache(maxsize=1)
def inputs(case: Case) -> tuple[list[Step]]:
    """Arguments of `decode_attention`, once for each copy of the cache."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.device)

    angles = random(case.s, case.d // 2)
    caches = [random(case.b, case.h, case.s, case.d).to(case.dtype) for _ in "kv"]
    own = {
        "qkv": random(case.b, 3 * case.h * case.d).to(case.dtype),
        "rotation": torch.stack([angles.cos(), angles.sin()], dim=-1),
        "position": torch.tensor([case.p], device=case.device),
    }
    count = copies(case, sum(cache.nbytes for cache in caches))
    pairs = [caches, *([cache.clone() for cache in caches] for _ in range(count - 1))]
    return ([{**own, "keys": keys, "values": values} for keys, values in pairs],)


def work(case: Case) -> tuple[int, int]:
    """Two products; qkv and the cache up to the position read, result and position written."""
    row = case.b * case.h * case.d
    return 4 * row * (case.p + 1), (2 * case.p + 6) * row * case.dtype.itemsize


@lru_cache(maxsize=1)
def truth(case: Case) -> Tensor:
    """The result in float64."""
    ((step, *_),) = inputs(case)
    wide = {name: step[name].double() for name in ("qkv", "keys", "values")}
    return decode_attention(**{**step, **wide}, backend="reference")


def store(case: Case, qkv: Tensor, keys: Tensor, values: Tensor, turn: Tensor, at: Any) -> Tensor:
    """Writes key and value to the cache; returns the query, [B, H, 1, Dh]."""
    q, k, v = qkv.unflatten(1, (3, case.h, 1, case.d)).unbind(1)
    q, k = (rotate(part, turn).to(part.dtype) for part in (q, k))
    keys[:, :, at], values[:, :, at] = k, v
    return q


def prepare_ours(backend: str) -> Callable[[Case, list[Step]], Call]:
    return lambda case, steps: in_turn(decode_attention, steps, backend=backend)


def prepare_official(case: Case, steps: list[Step]) -> Call:
    """SEED-Voken's: a mask over the whole cache, and copies of keys and values."""
    triangle = torch.ones(case.s, case.s, dtype=torch.bool, device=case.device).tril()
    masks = triangle.repeat(case.b, 1, 1)

    def official(
        qkv: Tensor, keys: Tensor, values: Tensor, rotation: Tensor, position: Tensor
    ) -> Tensor:
        q = store(case, qkv, keys, values, rotation[position], position)
        keys, values = (cache.repeat_interleave(1, dim=1) for cache in (keys, values))
        mask = masks[:, None, position]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).flatten(1)

    return in_turn(official, steps)


def prepare_sdpa(case: Case, steps: list[Step]) -> Call:
    """Attention to the part of the cache that is full; the position is a number."""

    def sdpa(
        qkv: Tensor, keys: Tensor, values: Tensor, rotation: Tensor, position: Tensor
    ) -> Tensor:
        now = slice(case.p, case.p + 1)
        q = store(case, qkv, keys, values, rotation[now], now)
        keys, values = (cache[:, :, : case.p + 1] for cache in (keys, values))
        return F.scaled_dot_product_attention(q, keys, values).flatten(1)

    return in_turn(sdpa, steps)


BENCH = Bench(
    op="decode_attention",
    cases=cases,
    providers=(
        *own_providers(prepare_ours, gpu="triton"),
        Provider("official", prepare_official),
        Provider("sdpa", prepare_sdpa),
    ),
    inputs=inputs,
    work=work,
    check=lambda case, output: too_far(case, output, truth(case)),
    slow=slower_kinds,
)


def test_decode_attention(measure: Callable[..., None], case: Case, provider: Provider) -> None:
    measure(BENCH, case, provider)
