"""decode_linear on the layers of IBQ's transformers against the official sequence of operations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import harness
from bench.harness import Bench, Call, Provider, own_providers
from bench.ops import Mode, compiled, copies, eager, in_turn, slower_kinds, too_far
from titok_fast import decode_linear
from titok_fast.models.packed import PackableLinear, _can_pack

MODELS = {1024: 2816, 1920: 5120}  # width of ibq-ar-b and -xxl: channels inside SwiGLU
VOCABULARY = 16384
MODULATED = ("norm", "scale", "shift")
PARTS = {
    "wqkv": MODULATED,
    "wo": ("residual", "residual_scale"),
    "w1-w3": (*MODULATED, "up_weight"),
    "w2": ("residual", "residual_scale"),
    "head": MODULATED,
}

Layer = dict[str, Any]


@dataclass(frozen=True)
class Case(harness.Case):
    b: int
    n: int
    w: int
    layer: str


def sizes(width: int, hidden: int) -> dict[str, tuple[int, int]]:
    """[N, W] of each layer."""
    return {
        "wqkv": (3 * width, width),
        "wo": (width, width),
        "w1-w3": (hidden, width),
        "w2": (width, hidden),
        "head": (VOCABULARY, width),
    }


def cases(device: str, quick: bool) -> list[Case]:
    gpu = device == "cuda"
    rows = [(torch.bfloat16, 2), (torch.bfloat16, 16)]
    if not gpu:
        rows = [(torch.bfloat16, 2), (torch.bfloat16, 8), (torch.float32, 8)]
    models = [sizes(w, MODELS[w]) for w in ((1024, 1920) if gpu else (1024,))]
    if quick:
        rows, models = rows[1:], [{"w1-w3": (176, 64)}]
    return [
        Case(b=b, n=n, w=w, layer=layer, device=device, dtype=dtype)
        for dtype, b in rows
        for layers in models
        for layer, (n, w) in layers.items()
    ]


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


def prepare_ours(backend: str) -> Callable[[Case, list[Layer]], Call]:
    return lambda case, layers: in_turn(decode_linear, layers, backend=backend)


def prepare_official(case: Case, layers: list[Layer], mode: Mode = eager) -> Call:
    return in_turn(mode(official), layers)


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


BENCH = Bench(
    op="decode_linear",
    cases=cases,
    providers=(
        *own_providers(prepare_ours, gpu="triton", bf16=True),
        Provider("official", prepare_official),
        Provider("compiled", partial(prepare_official, mode=compiled)),
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
    slow=slower_kinds,
)


def test_decode_linear(measure: Callable[..., None], case: Case, provider: Provider) -> None:
    measure(BENCH, case, provider)
