"""The one `torch.library.Library` of the package, and what every op needs to register with it."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("titok_fast", "DEF")


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that `torch.compile` runs and never looks into.

    Where a compiled function calls it after a graph break, tracing it would free tensors whose
    addresses are all that is left of them. As long as nothing was compiled this costs nothing:
    `torch.compiler.disable` would import the compiler, which takes a second.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*arguments)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*arguments)

    return run


def on_its_device(cuda: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs on the device of its first tensor, which need not be the current one."""

    @functools.wraps(cuda)
    def run(*arguments: Any) -> Any:
        first = next(x for x in arguments if isinstance(x, Tensor))
        with torch.cuda.device(first.device):
            return cuda(*arguments)

    return run


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Define `titok_fast::<schema>` and return the callable op.

    Args:
        schema: name, arguments and returns in PyTorch's schema language.
        cpu: implementation for CPU tensors.
        cuda: implementation for CUDA tensors; their device is current when it is called.
        fake: output shapes and dtypes for tracing.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, untraced(cpu), "CPU")
    _library.impl(name, untraced(on_its_device(cuda)), "CUDA")
    torch.library.register_fake(f"titok_fast::{name}", fake, lib=_library)
    op: Callable[..., Any] = getattr(torch.ops.titok_fast, name).default
    return op


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(x.view_as(x) for x in tensors[:count] if x is not None)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.op}: has no double backward; backend='reference' has one")


def once(op: str, gradients: tuple[Tensor, ...], *sources: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients that refuse to be differentiated with respect to the tensors they come from.

    Args:
        op: name, for the RuntimeError.
        gradients: what an op's backward returns.
        *sources: what it computed them from.
    """
    result: tuple[Tensor, ...] = _Once.apply(  # type: ignore[no-untyped-call]
        op, len(gradients), *gradients, *sources
    )
    return result
