"""attention, forward and with its backward, against PyTorch's scaled_dot_product_attention.

`python -m bench.bench_attention FILE` prints the table of "auto" that the results in FILE ask for.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import harness
from bench.harness import Bench, Call, Provider, own_providers
from titok_fast import attention
from titok_fast.ops.attention import TRITON_UP_TO
from titok_fast.testing import relative_error

LENGTHS = (33, 65, 129, 289, 577, 1089)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SDPA = {
    "flash": (SDPBackend.FLASH_ATTENTION, ("cpu", "cuda")),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, ("cuda",)),
    "math": (SDPBackend.MATH, ("cpu", "cuda")),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, ("cuda",)),
}


@dataclass(frozen=True)
class Case(harness.Case):
    b: int
    l: int  # noqa: E741
    h: int
    d: int
    direction: str


def cases(device: str, quick: bool) -> list[Case]:
    batch, heads = (64, 16) if device == "cuda" else (2, 8)
    return [
        Case(b=batch, l=length, h=heads, d=64, direction=direction, device=device, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for length in (LENGTHS[:2] if quick else LENGTHS)
        for direction in ("forward", "backward")
        # Who trains on a CPU does it in float32.
        if device == "cuda" or dtype == torch.float32 or direction == "forward"
    ]


@lru_cache(maxsize=1)
def inputs(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(case.b, case.l, 3, case.h, case.d, generator=generator)
    grad = torch.randn(case.b, case.l, case.h, case.d, generator=generator)
    return qkv.to(case.device, case.dtype), grad.to(case.device, case.dtype)


def work(case: Case) -> tuple[int, int]:
    """Two products forward, five backward; qkv and out, then these, dout and dqkv."""
    product = 2 * case.b * case.h * case.l**2 * case.d
    rows = case.b * case.l * case.h * case.d * case.dtype.itemsize
    return (2 * product, 4 * rows) if case.direction == "forward" else (5 * product, 8 * rows)


@lru_cache(maxsize=1)
def truth(case: Case) -> Tensor:
    """The result for the first images in float64."""
    qkv, grad = (x[:2].double() for x in inputs(case))
    if case.direction == "forward":
        return attention(qkv, backend="reference")
    with torch.enable_grad():
        qkv.requires_grad_()
        out = attention(qkv, backend="reference")
        return torch.autograd.grad(out, qkv, grad)[0]


def check(case: Case, output: Tensor) -> tuple[int, int]:
    """Images that are too far from float64, and images looked at."""
    pairs = list(zip(output[:2], truth(case), strict=True))
    wrong = sum(not relative_error(*pair) <= TOLERANCE[case.dtype] for pair in pairs)
    return wrong, len(pairs)


def prepare(backend: str) -> Callable[[Case, Tensor, Tensor], Call]:
    """The call returns the output, or of the backward the packed gradient."""

    def prepare(case: Case, qkv: Tensor, grad: Tensor) -> Call:
        if case.direction == "forward":
            return lambda: attention(qkv, backend=backend)
        leaf = qkv.detach().requires_grad_()
        with torch.enable_grad():
            out = attention(leaf, backend=backend)
        return lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]

    return prepare


def weights(case: Case) -> str | None:
    return harness.over_budget(8 * case.b * case.h * case.l**2 * case.dtype.itemsize)


def without_gradient(case: Case) -> str | None:
    return "has no gradient" if case.direction == "backward" else None


def slow(case: Case, provider: Provider) -> bool:
    gpu_float32 = case.device == "cuda" and case.dtype == torch.float32
    return provider.name == "reference" or (gpu_float32 and provider.name.startswith("sdpa-"))


BENCH = Bench(
    op="attention",
    cases=cases,
    providers=(
        *own_providers(
            prepare,
            gpu="triton",
            bf16=True,
            too_much={
                "cpu": without_gradient,
                "cpu[isa]": without_gradient,
                "reference": weights,
            },
        ),
        Provider("sdpa", prepare("torch")),
        *(
            Provider(
                f"sdpa-{name}",
                prepare("torch"),
                devices=devices,
                setting=partial(sdpa_kernel, backend),
                too_much=weights if name == "math" else lambda case: None,
            )
            for name, (backend, devices) in SDPA.items()
        ),
    ),
    inputs=inputs,
    work=work,
    check=check,
    baseline="sdpa",
    slow=slow,
)


def test_attention(measure: Callable[..., None], case: Case, provider: Provider) -> None:
    measure(BENCH, case, provider)


def longest_for_triton(results: dict[str, object]) -> dict[tuple[torch.dtype, int], int]:
    """The entries of `TRITON_UP_TO` that the results tell.

    Each is the largest L up to which Triton won every case over "sdpa" at the largest measured Dh
    that the entry serves and no smaller one does.
    """
    times: dict[tuple[str, int], dict[int, dict[tuple[str, str], float]]] = {}
    for entry in results["benchmarks"]:  # type: ignore[attr-defined]
        info = entry["extra_info"]
        if info.get("op") == "attention" and info["device"] == "cuda":
            lengths = times.setdefault((info["dtype"], info["D"]), {})
            row = lengths.setdefault(info["L"], {})
            row[info["provider"], info["direction"]] = info["device_ms"]
    measured = {}
    for (name, width), lengths in times.items():
        longest = 0
        for length, row in sorted(lengths.items()):
            if any(
                row["titok_fast-triton", way] > row["sdpa", way]
                for way in {direction for _, direction in row}
            ):
                break
            longest = length
        measured[getattr(torch, name), width] = longest
    table = {}
    for dtype, width in TRITON_UP_TO:
        # float16 runs in bfloat16's tiles.
        for like in (torch.bfloat16, dtype) if dtype is torch.float16 else (dtype,):
            within = {d: n for (kind, d), n in measured.items() if kind is like and d <= width}
            if within and max(within) > width // 2:
                table[dtype, width] = within[max(within)]
    return table


if __name__ == "__main__":
    measured = longest_for_triton(json.loads(Path(sys.argv[1]).read_text()))
    for entry, predicted in TRITON_UP_TO.items():
        word = "measured" if entry in measured else "predicted"
        print(f"{entry}: {measured.get(entry, predicted)},  # {word}")
