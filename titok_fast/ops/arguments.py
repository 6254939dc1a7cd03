"""What the ops share of their arguments: dtypes, checks and how they are passed to C++."""

import math
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST = torch.finfo(torch.float32).max
Number = float | Tensor
Count = int | Tensor


def python_number(value: Any) -> Any:
    """A number of NumPy's as Python's; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def check_module(name: str, module: object) -> None:
    """TypeError unless it is a PyTorch module; a model's name is not."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {type(module).__name__}")


def strided(name: str, tensor: object) -> Tensor:
    """`tensor` itself; TypeError unless it is a Tensor that is neither sparse nor oneDNN's."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: layout {tensor.layout} is not torch.strided")
    return tensor


def check_dtype(
    name: str, tensor: object, dtypes: tuple[torch.dtype, ...] = DTYPES, *, wide: bool = False
) -> Tensor:
    """`tensor` itself; TypeError unless its dtype is one of these or, where `wide`, float64."""
    tensor = strided(name, tensor)
    if wide:
        dtypes = (*dtypes, torch.float64)
    if tensor.dtype not in dtypes:
        *others, last = map(dtype_name, dtypes)
        names = f"{', '.join(others)} or {last}" if others else last
        raise TypeError(f"{name}: dtype {tensor.dtype} is not {names}")
    return tensor


def check_tensor(
    name: str,
    tensor: object,
    shape: list[int] | None,
    dtypes: tuple[torch.dtype, ...],
    like: Tensor,
    like_name: str,
) -> None:
    """`tensor` has this shape, if any, one of these dtypes and the device of `like`."""
    tensor = check_dtype(name, tensor, dtypes)
    if shape is not None and list(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {list(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: on {tensor.device}, but {like_name} is on {like.device}")


def check_norm_eps(norm_eps: object) -> None:
    """`norm_eps` is a finite number from 0."""
    if not isinstance(norm_eps, int | float):
        raise TypeError(f"norm_eps: expected a float, got {type(norm_eps).__name__}")
    if not 0 <= norm_eps < math.inf:
        raise ValueError(f"norm_eps: {norm_eps} is not in [0, inf)")


def check_number(
    name: str,
    value: object,
    whole: bool,
    shapes: tuple[list[int], ...],
    like: Tensor,
    like_name: str,
) -> None:
    """`value` is a finite number, whole or not, or such a tensor on the device of `like`."""
    if isinstance(value, Tensor):
        if value.is_floating_point() == whole or value.is_complex() or value.dtype == torch.bool:
            kind = "an integer" if whole else "a floating"
            raise TypeError(f"{name}: dtype {value.dtype} is not {kind} dtype")
        if list(value.shape) not in shapes:
            allowed = " or ".join(map(str, shapes))
            raise ValueError(f"{name}: expected shape {allowed}, got {list(value.shape)}")
        if value.device != like.device:
            raise ValueError(f"{name}: on {value.device}, but {like_name} is on {like.device}")
        return
    kinds = (int, torch.SymInt) if whole else (int, float, torch.SymInt, torch.SymFloat)
    if not isinstance(value, kinds) or isinstance(value, bool):
        kind = "an int" if whole else "a float"
        raise TypeError(f"{name}: expected {kind} or a Tensor, got {type(value).__name__}")
    if not whole and not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name}: {value} is not finite in float32")


def check_sizes(**sizes: object) -> None:
    """Each is a positive int."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}: got {size!r}, allowed is a positive int")


def check_weights(**weights: object) -> None:
    """Each is a finite number."""
    for name, weight in weights.items():
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise ValueError(f"{name}: got {weight!r}, allowed is a finite number")


def check_counters(fixed: dict[str, Any]) -> None:
    """`seed` and `step`, where they are numbers, are Philox's."""
    for name in ("seed", "step"):
        if not 0 <= fixed.get(name, 0) < 2**63:
            raise ValueError(f"{name}: {fixed[name]} is not in [0, 2**63)")


def differentiated(tensor: Tensor | None) -> bool:
    """Whether a gradient of `tensor` is asked for, backward or forward.

    So it is of any batch of vmap in a function that is being compiled, unless gradients are off.
    """
    if tensor is None:
        return False
    functorch = torch._C._functorch
    while True:
        backward = torch.is_grad_enabled() and tensor.requires_grad
        if backward or forward_ad.unpack_dual(tensor).tangent is not None:
            return True
        if torch.compiler.is_compiling():  # which cannot look into a batch
            return torch.is_grad_enabled() and functorch.is_batchedtensor(tensor)
        if not functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)  # what is wrapped may ask for one, too


def has_values(tensor: Tensor) -> bool:
    """Whether values can be read: not while compiling, of a fake, or within a torch.func."""
    if torch.compiler.is_compiling():
        return False
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return not (wrapped or isinstance(tensor, FakeTensor))


def autocast_dtype(tensor: object) -> torch.dtype | None:
    """Autocast's dtype where it is on for a tensor's device and casts its dtype, otherwise None."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.dtype not in DTYPES:
        return None  # there is no autocast for the meta device, nor a need of one
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def check_no_gradient(tensors: dict[str, Tensor | None]) -> None:
    """RuntimeError if a gradient is asked for, of an op that has none."""
    for name, tensor in tensors.items():
        if differentiated(tensor):
            raise RuntimeError(
                f"{name}: has no gradient here; call it under torch.no_grad(), or with "
                "backend='reference'"
            )


def as_autocast(x: Any) -> Any:
    """A tensor in autocast's dtype where that is on for it; anything else as it is."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off for the device of `x`."""
    # There is no autocast for the meta device, nor a need of one.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def dtype_name(dtype: torch.dtype) -> str:
    """As C++ takes it: "float32"."""
    return str(dtype).removeprefix("torch.")


def dense_rows(x: Tensor) -> Tensor:
    """`x` itself where each row is contiguous, otherwise a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def address(tensor: Tensor | None) -> int:
    """Where a tensor's memory begins; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def by_address(
    count_names: tuple[str, ...],
    factor_names: tuple[str, ...],
    counts: list[int],
    factors: list[float],
    tensors: list[Tensor | None],
) -> tuple[dict[str, tuple[float, int]], list[Tensor | None]]:
    """For each name (number, address of its tensor or 0), and the tensors, to be kept alive."""
    dtypes = [torch.int64] * len(counts) + [torch.float32] * len(factors)
    tensors = [None if x is None else x.to(t) for x, t in zip(tensors, dtypes, strict=True)]
    names, numbers = (*count_names, *factor_names), [*counts, *factors]
    pairs = zip(numbers, map(address, tensors), strict=True)
    return dict(zip(names, pairs, strict=True)), tensors


def as_tensors(
    count_names: tuple[str, ...],
    numbers: dict[str, Any],
    given: list[Tensor | None],
    device: torch.device,
) -> dict[str, Tensor]:
    """The numbers, or the tensors given for them, as the reference takes them."""
    return {
        name: torch.as_tensor(
            number if tensor is None else tensor,
            dtype=torch.int64 if name in count_names else torch.float32,
            device=device,
        )
        for (name, number), tensor in zip(numbers.items(), given, strict=True)
    }
