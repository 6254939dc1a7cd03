"""conv3x3 on the layers of VQGAN's decoders against the official sequence of operations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.harness import Bench, Call, Provider, own_providers
from bench.ops import Mode, compiled, eager, slower_kinds
from titok_fast import conv3x3, pack_conv3x3
from titok_fast.testing import relative_error

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case(harness.Case):
    b: int
    c: int
    side: int
    layer: str


def cases(device: str, quick: bool) -> list[Case]:
    layers = [(512, 16, "block"), (256, 64, "block"), (128, 256, "block"), (128, 128, "upsample")]
    if quick:
        layers = [(32, 8, "block"), (32, 8, "upsample")]
    return [
        Case(b=16 if device == "cuda" and not quick else 1, c=c, side=side, layer=layer, **rest)
        for dtype in (torch.float32, torch.bfloat16)
        for rest in ({"device": device, "dtype": dtype},)
        for c, side, layer in layers
    ]


@lru_cache(maxsize=1)
def inputs(case: Case) -> tuple[Arguments]:
    """Arguments of `conv3x3`: the second half of a residual block, or what doubles a map."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.b, case.c, case.side, case.side)
    shapes = {"x": shape, "weight": (case.c, case.c, 3, 3), "bias": (case.c,)}
    if case.layer == "block":
        shapes |= {"norm": (case.c,), "norm_bias": (case.c,), "residual": shape}

    def random(name: str) -> Tensor:
        std = (9 * case.c) ** -0.5 if name == "weight" else 1.0
        tensor = (torch.randn(shapes[name], generator=generator) * std).to(case.device, case.dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    arguments: Arguments = {name: random(name) for name in shapes}
    return (arguments | {"upsample": case.layer == "upsample"},)


def work(case: Case) -> tuple[int, int]:
    """The products of nine taps; every argument read, the result written."""
    (arguments,) = inputs(case)
    outputs = case.b * case.c * case.side**2 * (4 if arguments["upsample"] else 1)
    read = sum(tensor.nbytes for tensor in arguments.values() if isinstance(tensor, Tensor))
    return 18 * case.c * outputs, read + outputs * case.dtype.itemsize


@lru_cache(maxsize=1)
def truth(case: Case) -> Tensor:
    """The first image's result in float64."""
    (arguments,) = inputs(case)
    first = {k: v[:1] if k in ("x", "residual") else v for k, v in arguments.items()}
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in first.items()}
    return conv3x3(**wide, backend="reference")


def check(case: Case, output: Tensor) -> tuple[int, int]:
    """Whether the first image is farther from float64 than rounding explains."""
    tf32 = case.device == "cuda" and case.dtype == torch.float32
    allowed = TOLERANCE[torch.bfloat16] if tf32 else TOLERANCE[case.dtype]
    return int(not relative_error(output[:1], truth(case)) <= allowed), 1


def official(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    upsample: bool = False,
) -> Tensor:
    """SEED-Voken's and 1d-tokenizer's operations, in the inputs' dtype."""
    if norm is not None:
        x = F.silu(F.group_norm(x, 32, norm, norm_bias, 1e-6))
    if upsample:
        x = F.interpolate(x, scale_factor=2.0)
    out = F.conv2d(x, weight, bias, padding=1)
    return out if residual is None else residual + out


def prepare_ours(backend: str) -> Callable[[Case, Arguments], Call]:
    def prepare(case: Case, arguments: Arguments) -> Call:
        packed = pack_conv3x3(arguments["weight"]) if backend == "cpu" else None
        return lambda: conv3x3(**arguments, packed=packed, backend=backend)

    return prepare


def prepare_official(case: Case, arguments: Arguments, mode: Mode = eager) -> Call:
    run = mode(official)
    return lambda: run(**arguments)


BENCH = Bench(
    op="conv3x3",
    cases=cases,
    providers=(
        *own_providers(prepare_ours, gpu="triton", bf16=True),
        Provider("official", prepare_official),
        Provider("compiled", partial(prepare_official, mode=compiled)),
    ),
    inputs=inputs,
    work=work,
    check=check,
    slow=slower_kinds,
)


def test_conv3x3(measure: Callable[..., None], case: Case, provider: Provider) -> None:
    measure(BENCH, case, provider)
