"""What benchmarks of single ops share."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.harness import Call, Provider
from titok_fast.testing import relative_error

CACHE = 128 * 2**20  # bytes that pass every cache of a CPU
TOLERANCE = {torch.float32: 2**-20, torch.bfloat16: 2**-6}  # as much as 16 and 4 roundings
REFERENCE_TERMS = 2**29  # of float64

Mode = Callable[[Callable[..., Any]], Callable[..., Any]]


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of one case; what was compiled for others is dropped."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def copies(case: harness.Case, size: int) -> int:
    """How many copies of `size` bytes come from memory in turn; a GPU's cache is overwritten."""
    return 1 if case.device == "cuda" else min(64, -(-CACHE // size))


def in_turn(function: Callable[..., Tensor], given: list[dict[str, Any]], **options: Any) -> Call:
    """A call with the next copy of the arguments."""
    turns: Iterator[dict[str, Any]] = itertools.cycle(given)
    return lambda: function(**next(turns), **options)


def too_far(case: harness.Case, output: Tensor, expected: Tensor) -> tuple[int, int]:
    """Rows that are farther from float64 than rounding explains, and rows."""
    pairs = zip(output, expected, strict=True)
    wrong = sum(not relative_error(*pair) <= TOLERANCE[case.dtype] for pair in pairs)
    return wrong, len(expected)


def slower_kinds(case: harness.Case, provider: Provider) -> bool:
    """The reference, what compiles first, and slower instruction sets."""
    return provider.name in ("reference", "compiled") or "[" in provider.name


def matrices(count: int, itemsize: int | None = None) -> Callable[[Any], str | None]:
    """Whether `count` N x K matrices, in the inputs' dtype or of `itemsize` bytes, are too much."""
    return lambda case: harness.over_budget(
        count * case.n * case.k * (itemsize or case.dtype.itemsize)
    )


def too_much_for_reference(count: int) -> Callable[[Any], str | None]:
    """Whether its float64 terms, or `count` matrices of them, are too much."""

    def too_much(case: Any) -> str | None:
        terms = case.n * case.k * case.d
        if terms > REFERENCE_TERMS:
            return f"{terms:.1e} float64 terms, over {REFERENCE_TERMS:.1e}"
        return matrices(count, itemsize=8)(case)

    return too_much
