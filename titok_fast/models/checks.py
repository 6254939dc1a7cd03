"""Checks of arguments that the models share; each error is one line that names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from titok_fast.ops.arguments import has_values, python_number
from titok_fast.ops.attention import MAX_HEAD_WIDTH

Options = TypeVar("Options")


class Kind(NamedTuple):
    """What may stand at a key of a configuration."""

    allowed: str
    fits: Callable[[Any], bool]


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, largest: float = math.inf) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value <= largest and value < math.inf


COUNT = Kind("a positive int", lambda value: _is_int(value, 1))
WHOLE = Kind("an int from 0", lambda value: _is_int(value, 0))
COUNTS = Kind(
    "a list of positive ints, not empty",
    lambda value: isinstance(value, list) and bool(value) and all(_is_int(v, 1) for v in value),
)
WIDTH = Kind("a positive multiple of 32", lambda value: _is_int(value, 1) and value % 32 == 0)
NUMBER = Kind("a finite number from 0", _is_number)
POSITIVE = Kind("a finite number above 0", lambda value: _is_number(value) and value > 0)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value, 1))
MAPPING = Kind("a mapping", lambda value: isinstance(value, Mapping))
DECAY = Kind("a number from 0, below 1", lambda value: _is_number(value, 1) and value < 1)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))


NARROW = (torch.int32, torch.int16, torch.int8, torch.uint8)  # what a list of NumPy's numbers gives
HEAD_WIDTHS = f"a multiple of 8 up to {MAX_HEAD_WIDTH}"


def fits_heads(width: int, heads: int) -> bool:
    """Whether `attention` takes such heads."""
    return width % (8 * heads) == 0 and width // heads <= MAX_HEAD_WIDTH


def one_of(*values: Any) -> Kind:
    """One of these values."""
    return Kind(" or ".join(map(repr, values)), lambda value: value in values)


def or_none(kind: Kind) -> Kind:
    """Nothing, or what is of a kind."""
    return Kind(f"{kind.allowed} or None", lambda value: value is None or kind.fits(value))


def check_section(
    config: Mapping[str, Any],
    path: str,
    needed: Mapping[str, Kind],
    optional: Mapping[str, Kind] | None = None,
    *,
    model: str,
) -> Mapping[str, Any]:
    """A section of a configuration, after a check of its keys; it may have others.

    Args:
        config: of a model.
        path: keys with dots between levels; "" is the whole.
        needed: the kinds of the keys that the section must have.
        optional: the kinds of those that it may have.
        model: name of the model.

    Raises:
        ValueError: for something else than a mapping, a key that is missing, or a value of another
            kind; one line that begins with "config:".
    """
    section: Any = config
    keys = path.split(".") if path else []
    for level, key in enumerate(keys, 1):
        section = section.get(key, {})
        if not MAPPING.fits(section):
            name = ".".join(keys[:level])
            raise ValueError(f"config: {name} is {section!r}, allowed is {MAPPING.allowed}")
    missing = [key for key in needed if key not in section]
    if missing:
        raise ValueError(f"config: {path or model} lacks {', '.join(missing)}")
    for key, kind in {**needed, **(optional or {})}.items():
        if key in section and not kind.fits(section[key]):
            name = ".".join([*keys, key])
            raise ValueError(f"config: {name} is {section[key]!r}, allowed is {kind.allowed}")
    found: Mapping[str, Any] = section
    return found


def found_at(config: Any, path: str) -> Any:
    """What stands at a path of keys with dots; None where nothing does."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def replaced(options: Options, kind: str, **given: Any) -> Options:
    """A frozen dataclass with the fields that are given; None keeps.

    Raises:
        ValueError: for a name that it lacks, `kind` saying whose options they are, or a value that
            it does not take.
    """
    given = {name: python_number(value) for name, value in given.items() if value is not None}
    names = [field.name for field in fields(options)]  # type: ignore[arg-type]
    for name, value in given.items():
        if name not in names:
            raise ValueError(f"{name}: got {value!r}, but options of {kind} are {', '.join(names)}")
    return replace(options, **given)  # type: ignore[type-var]


def check_kind(name: str, value: object, kind: Kind) -> None:
    """Raises ValueError unless value is of a kind."""
    if not kind.fits(value):
        raise ValueError(f"{name}: got {value!r}, allowed is {kind.allowed}")


def check_fields(options: object, **kinds: Kind) -> None:
    """Raises ValueError unless each field that is named is of its kind; NumPy's become Python's."""
    for name, kind in kinds.items():
        value = python_number(getattr(options, name))
        check_kind(name, value, kind)
        object.__setattr__(options, name, value)


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


def as_labels(labels: Tensor | Sequence[int], num_classes: int, device: torch.device) -> Tensor:
    """Labels [B] int64 on the device; raises as `check_labels`."""
    if not isinstance(labels, Tensor | Sequence | np.ndarray):
        raise TypeError(f"labels: got {type(labels).__name__}, allowed is a tensor or a sequence")
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        labels = labels.astype(np.int64)  # of any size, byte order and strides
    shape = labels.shape if isinstance(labels, Tensor | np.ndarray) else [len(labels)]
    empty = not isinstance(labels, Tensor) and list(shape) == [0]  # has no dtype of its own
    try:
        found = torch.as_tensor(labels, dtype=torch.int64 if empty else None)
    except (RuntimeError, TypeError, ValueError):  # what torch says names no argument
        raise TypeError(f"labels: got {labels!r:.60}, allowed is integers") from None
    if found.dtype in NARROW and not isinstance(labels, Tensor):
        found = found.long()
    if found.ndim != 1:
        raise ValueError(f"labels: got shape {list(found.shape)}, allowed is [B]")
    check_labels(found, found.shape[0], num_classes)  # before the device, where it cannot look
    return found.to(device)


def check_labels(labels: Tensor, batch: int, num_classes: int) -> None:
    """Raises unless labels are [batch] int64 and, on the CPU, in [0, num_classes]."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels: got {_kind(labels)}, allowed is an int64 tensor")
    if labels.shape != (batch,):
        raise ValueError(f"labels: got shape {list(labels.shape)}, allowed is [{batch}]")
    _check_range("labels: got labels", labels, num_classes)


def _check_range(got: str, value: Tensor, largest: int) -> None:
    # Reading values of a CUDA tensor would synchronise, and of a traced one break the graph.
    if value.device.type == "cpu" and value.numel() and has_values(value):
        low, high = int(value.min()), int(value.max())
        if low < 0 or high > largest:
            raise ValueError(f"{got} in [{low}, {high}], allowed is [0, {largest}]")


def _kind(value: object) -> str:
    return f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
