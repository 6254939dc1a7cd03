"""Checks of arguments that the models share; each error is one line that names the argument."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Options = TypeVar("Options")


def replaced(options: Options, kind: str, **given: Any) -> Options:
    """A frozen dataclass with the fields that are given; None keeps.

    Raises:
        ValueError: for a name that it lacks, `kind` saying whose options they are, or a value that
            it does not take.
    """
    given = {name: value for name, value in given.items() if value is not None}
    names = [field.name for field in fields(options)]  # type: ignore[arg-type]
    for name, value in given.items():
        if name not in names:
            raise ValueError(f"{name}: got {value!r}, but options of {kind} are {', '.join(names)}")
    return replace(options, **given)  # type: ignore[type-var]


def check_number(name: str, value: float) -> None:
    """Raises ValueError unless value is a finite number from 0."""
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: got {value!r}, allowed is a finite number from 0")


def check_floating(name: str, value: Tensor) -> None:
    """Raises TypeError unless value is a floating tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: got {_kind(value)}, allowed is a floating tensor")


def check_tokens(name: str, value: Tensor, codebook_size: int, shape: str = "B, L") -> None:
    """Raises unless value is [`shape`] int64 and, on the CPU, within the codebook."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name}: got {_kind(value)}, allowed is an int64 tensor")
    if value.ndim != shape.count(",") + 1:
        raise ValueError(f"{name}: got shape {list(value.shape)}, allowed is [{shape}]")
    _check_range(f"{name}: got tokens", value, codebook_size - 1)


def check_labels(labels: Tensor, batch: int, num_classes: int) -> None:
    """Raises unless labels are [batch] int64 and, on the CPU, in [0, num_classes]."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels: got {_kind(labels)}, allowed is an int64 tensor")
    if labels.shape != (batch,):
        raise ValueError(f"labels: got shape {list(labels.shape)}, allowed is [{batch}]")
    _check_range("labels: got labels", labels, num_classes)


def _check_range(got: str, value: Tensor, largest: int) -> None:
    # Reading values of a CUDA tensor would synchronise, and of a traced one break the graph.
    if value.device.type == "cpu" and value.numel() and not torch.compiler.is_compiling():
        low, high = int(value.min()), int(value.max())
        if low < 0 or high > largest:
            raise ValueError(f"{got} in [{low}, {high}], allowed is [0, {largest}]")


def _kind(value: object) -> str:
    return f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
