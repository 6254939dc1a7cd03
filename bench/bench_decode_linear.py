"""decode_linear on the layers of IBQ's transformers against the official sequence of operations."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import harness
from bench.harness import Bench, Call, Provider, own_providers
from titok_fast import decode_linear
from titok_fast.models.packed import PackableLinear, _can_pack
from titok_fast.testing import relative_error

MODELS = {1024: 2816, 1920: 5120}  # width of ibq-ar-b and -xxl: channels inside SwiGLU
MODULATED = ("norm", "scale", "shift")
PARTS = {
    "wqkv": MODULATED,
    "wo": ("residual", "residual_scale"),
    "w1-w3": (*MODULATED, "up_weight"),
    "w2": ("residual", "residual_scale"),
    "head": MODULATED,
}
CACHE = 128 * 2**20  # bytes that pass every cache of a CPU
TOLERANCE = {torch.float32: 2**-20, torch.bfloat16: 2**-6}  # as much as 16 and 4 roundings

Layer = dict[str, Any]


@dataclass(frozen=True)
class Case(harness.Case):
    b: int
    n: int
    w: int
    layer: str


def sizes(width: int, hidden: int, vocabulary: int) -> dict[str, tuple[int, int]]:
    """[N, W] of each layer."""
    return {
        "wqkv": (3 * width, width),
        "wo": (width, width),
        "w1-w3": (hidden, width),
        "w2": (width, hidden),
        "head": (vocabulary, width),
    }


def cases(device: str, quick: bool) -> list[Case]:
    gpu = device == "cuda"
    rows = [(torch.bfloat16, 2), (torch.bfloat16, 16)]
    if not gpu:
        rows = [(torch.bfloat16, 2), (torch.bfloat16, 8), (torch.float32, 8)]
    models = [sizes(w, MODELS[w], 16384) for w in ((1024, 1920) if gpu else (1024,))]
    if quick:
        rows, models = rows[1:], [{"w1-w3": (176, 64)}]
    return [
        Case(b=b, n=n, w=w, layer=layer, device=device, dtype=dtype)
        for dtype, b in rows
        for layers in models
        for layer, (n, w) in layers.items()
    ]


def copies(case: harness.Case, size: int) -> int:
    """How many copies of `size` bytes come from memory in turn; a GPU's cache is overwritten."""
    return 1 if case.device == "cuda" else min(64, -(-CACHE // size))


@lru_cache(maxsize=1)
def inputs(case: Case) -> tuple[list[Layer]]:
    """Arguments of `decode_linear`, once for each copy of the weights; outputs are around 1."""
    generator = torch.Generator().manual_seed(0)
    inner, outer, matrix = (case.b, case.w), (case.b, case.n), (case.n, case.w)
    shapes = {"x": inner, "weight": matrix, "norm": (case.w,), "scale": inner, "shift": inner}
    shapes |= {"up_weight": matrix, "residual": outer, "residual_scale": outer}

    def random(name: str) -> Tensor:
        std = case.w**-0.5 if shapes[name] == matrix else 1.0
        return (torch.randn(shapes[name], generator=generator) * std).to(case.device, case.dtype)

    layer = {name: random(name) for name in ("x", "weight", *PARTS[case.layer])}
    own = [name for name in layer if name.endswith("weight")]
    count = copies(case, sum(layer[name].nbytes for name in own))
    others = [{name: layer[name].clone() for name in own} for _ in range(count - 1)]
    return ([layer, *({**layer, **weights} for weights in others)],)


def work(case: Case) -> tuple[int, int]:
    """The products; every argument read, the result written."""
    ((layer, *_),) = inputs(case)
    read = sum(tensor.nbytes for tensor in layer.values())
    products = 2 * case.b * case.n * case.w * (1 + ("up_weight" in layer))
    return products, read + case.b * case.n * case.dtype.itemsize


@lru_cache(maxsize=1)
def truth(case: Case) -> Tensor:
    """The result in float64."""
    ((layer, *_),) = inputs(case)
    return decode_linear(**{k: v.double() for k, v in layer.items()}, backend="reference")


def too_far(case: harness.Case, output: Tensor, expected: Tensor) -> tuple[int, int]:
    """Rows that are farther from float64 than rounding explains, and rows."""
    pairs = zip(output, expected, strict=True)
    wrong = sum(not relative_error(*pair) <= TOLERANCE[case.dtype] for pair in pairs)
    return wrong, len(expected)


def official(
    x: Tensor,
    weight: Any,
    *,
    norm: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    up_weight: Any = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    linear: Callable[[Tensor, Any], Tensor] = F.linear,
) -> Tensor:
    """SEED-Voken's layer and its neighbours, in the inputs' dtype."""
    if norm is not None:
        x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * norm
        x = x * scale + shift
    out = linear(x, weight)
    if up_weight is not None:
        out = F.silu(out) * linear(x, up_weight)
    return out if residual is None else residual + out * residual_scale


def in_turn(function: Callable[..., Tensor], layers: list[Layer], **options: Any) -> Call:
    """A call with the next copy."""
    turns: Iterator[Layer] = itertools.cycle(layers)
    return lambda: function(**next(turns), **options)


def prepare_ours(backend: str) -> Callable[[Case, list[Layer]], Call]:
    return lambda case, layers: in_turn(decode_linear, layers, backend=backend)


def prepare_official(case: Case, layers: list[Layer]) -> Call:
    return in_turn(official, layers)


def prepare_compiled(case: Case, layers: list[Layer]) -> Call:
    return in_turn(harness.compiled(official), layers)


def prepare_packed(case: Case, layers: list[Layer]) -> Call:
    """The weights in oneDNN's order, as a user packs them once."""

    def packed(weight: Tensor) -> PackableLinear:
        with torch.device("meta"):
            linear = PackableLinear(case.w, case.n, bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.pack()
        return linear

    own = [{k: packed(v) for k, v in layer.items() if k.endswith("weight")} for layer in layers]
    both = [{**layer, **weights} for layer, weights in zip(layers, own, strict=True)]
    return in_turn(official, both, linear=lambda x, layer: layer(x))


def slow(case: harness.Case, provider: Provider) -> bool:
    return provider.name in ("reference", "compiled") or "[" in provider.name


BENCH = Bench(
    op="decode_linear",
    cases=cases,
    providers=(
        *own_providers(prepare_ours, gpu="triton", bf16=True),
        Provider("official", prepare_official),
        Provider("compiled", prepare_compiled),
        Provider(
            "packed",
            prepare_packed,
            devices=("cpu",),
            too_much=lambda case: None if _can_pack(case.dtype) else "oneDNN lacks the dtype",
        ),
    ),
    inputs=inputs,
    work=work,
    check=lambda case, output: too_far(case, output, truth(case)),
    slow=slow,
)


def test_decode_linear(measure: Callable[..., None], case: Case, provider: Provider) -> None:
    measure(BENCH, case, provider)
