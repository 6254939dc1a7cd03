"""Layers that keep a copy of their weight in the order in which a CPU multiplies fastest."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from titok_fast.models import widened
from titok_fast.models.widened import linear
from titok_fast.ops.arguments import check_module, differentiated, has_values

Model = TypeVar("Model", bound=nn.Module)

# Set once an optimizer, of which PyTorch's fused ones leave a weight's version as it is, may have
# moved the weight.
_moved_of: MutableMapping[Tensor, threading.Event] = WeakTensorKeyDictionary()


def _note_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if moved := _moved_of.get(weight):
                moved.set()


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_note_step)


class _Packed:
    """A copy of a weight in another order; a copy or a pickle of a model leaves it out."""

    def __init__(self, weight: Tensor, copy: Tensor) -> None:
        moved = _moved_of.get(weight)
        if moved is None or moved.is_set():
            moved = threading.Event()
        self._moved, self._watch = moved, None
        self.copy = copy
        self.of = self._state(weight)
        if weight.is_inference():
            return
        _watch_optimizers()
        _moved_of[weight] = moved
        if weight.requires_grad and weight.is_leaf:  # for optimizers that are none of PyTorch's
            self._watch = weight.register_post_accumulate_grad_hook(lambda _: moved.set())

    def __del__(self) -> None:
        if self._watch is not None:
            self._watch.remove()

    def is_of(self, weight: Tensor) -> bool:
        if not weight.is_inference() and weight.requires_grad and self._watch is None:
            return False  # frozen before, it may have moved
        moved = self._moved.is_set() or _has_gradient(weight)
        return not moved and self.of == self._state(weight)

    @staticmethod
    def _state(weight: Tensor) -> tuple[Any, ...]:
        if not weight.is_inference():
            return weight.data_ptr(), weight._version
        # Such a tensor has no version: some of its elements instead.
        count = min(16, weight.numel())
        some = weight.as_strided((count,), (weight.numel() // count,), weight.storage_offset())
        return weight.data_ptr(), *some.tolist()

    def __reduce__(self) -> Any:
        return type(None), ()


def _has_gradient(weight: Tensor) -> bool:
    return weight.is_leaf and weight.grad is not None


def plain(*tensors: Tensor | None) -> bool:
    """Whether a fused op may take these: of one dtype, not empty, no graph, autocast or tracing."""
    if torch.compiler.is_compiling():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    if any(map(differentiated, given)):
        return False
    first = given[0]
    same = all(tensor.numel() and tensor.dtype == first.dtype for tensor in given)
    return same and not torch.is_autocast_enabled(first.device.type)


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module is of this very kind, not replaced, by an adapter say, and has no hook.

    Only then may an op do the module's work from its parameters, without calling it.
    """
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)


def ordinary(weight: Tensor) -> bool:
    """Whether it is a plain tensor: a quantised or sharded weight keeps its numbers elsewhere."""
    return type(weight) in (Tensor, nn.Parameter)


class Packable(nn.Module):
    """A layer with a weight of which `pack_weights` makes it keep a copy."""

    _weight = "weight"
    _packed: _Packed | None = None

    def pack(self) -> None:
        """Keeps a copy of the weight, where a product by it is faster and it has no gradient."""
        weight = getattr(self, self._weight)
        fit = ordinary(weight) and not _has_gradient(weight)
        copy = self._arranged(weight.detach()) if fit else None
        self._packed = None if copy is None else _Packed(weight, copy)

    def is_packed(self) -> bool:
        """Whether it keeps a copy of the weight as it is now."""
        packed = self._packed
        return packed is not None and packed.is_of(getattr(self, self._weight))

    def unpack(self) -> None:
        """Frees the copy."""
        self._packed = None

    def _arranged(self, weight: Tensor) -> Tensor | None:
        raise NotImplementedError

    def _copy_for(self, x: Tensor, *others: Tensor | None) -> Tensor | None:
        """The copy, if it is of the weight as it is now and `plain` of x and the others."""
        packed = self._packed  # which another thread may take away
        if packed is None:
            return None
        weight = getattr(self, self._weight)
        if not has_values(weight):
            return None
        if not packed.is_of(weight):
            self.unpack()
            return None
        return packed.copy if plain(x, weight, *others) else None


class PackableMatrix(Packable):
    """A layer that multiplies by a matrix."""

    def _arranged(self, weight: Tensor) -> Tensor | None:
        if not _can_pack(weight.dtype):
            return None
        weight = weight.float() if weight.dtype in widened.WIDENED else weight
        copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        return copy

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b for x [..., in], W [out, in] and b [out]; [..., out]."""
        copy = self._copy_for(x)
        if copy is None:
            return linear(x, getattr(self, self._weight), bias)
        return _multiply(x, copy, bias)


class PackableLinear(PackableMatrix, nn.Linear):
    """`nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features]."""
        return self.product(x, self.bias)


def gelu_of(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU of layer(x), in one product with a packed weight."""
    if untouched(layer, PackableLinear):
        packed_layer: Any = layer
        copy = packed_layer._copy_for(x)
        if copy is not None:
            return _multiply(x, copy, packed_layer.bias, gelu=True)
    return F.gelu(layer(x))


# With AMX and two threads oneDNN leaves products of few outputs to one of them, where more rows a
# thread than these come at once, and not more than three times as many.
_ROWS, _OUTPUTS = 192, 768


def _parts(x: Tensor, copy: Tensor) -> int:
    """How many parts of the rows of x to multiply apart."""
    if not widened.HAS_AMX or x.dtype != torch.bfloat16 or copy.shape[0] > _OUTPUTS:
        return 1
    threads = torch.get_num_threads()
    parts = -(-x.shape[:-1].numel() // (_ROWS * threads))
    return parts if threads > 1 and parts <= 3 else 1


def _multiply(x: Tensor, copy: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    dtype = x.dtype
    activation: tuple[Any, ...] = ("gelu", [], "none") if gelu else ("none", [], "")
    if copy.dtype != dtype:
        x, bias = x.float(), None if bias is None else bias.float()
    multiply = torch.ops.mkldnn._linear_pointwise
    if (parts := _parts(x, copy)) > 1:
        rows = [multiply(part, copy, bias, *activation) for part in x.flatten(0, -2).chunk(parts)]
        result: Tensor = torch.cat(rows).unflatten(0, x.shape[:-1])
    else:
        result = multiply(x, copy, bias, *activation)
    return result.to(dtype)


def packable(model: nn.Module) -> list[Packable]:
    """The layers of a model that keep copies of their weights."""
    return [module for module in model.modules() if isinstance(module, Packable)]


def pack_weights(model: Model) -> Model:
    """Lets a model on the CPU keep copies of its weights in the order of the fastest product.

    Inference without gradients then takes less time: linear layers multiply by weights in oneDNN's
    order, most for small batches, and 3x3 convolutions run as `conv3x3` does. It takes twice the
    memory for weights, of convolutions 2.8 times (4.6 where the CPU multiplies float32 in place of
    their 16 bits, and twice that of linear layers then). A weight that changes afterwards is used
    in its own order until it is packed again; a change through `weight.data`, or of single entries
    of a weight that was made under `torch.inference_mode`, is not seen, and must be followed by
    another call. A linear layer is not packed where PyTorch has no oneDNN. One that
    is replaced, by an adapter say, or has a forward hook is called as it is; a weight with a
    gradient, which an optimizer is about to change, is not packed.
    Compiled code does not read the copies.
    `ARTransformer.generate` has no use for it: it reads weights as they are for up to 16 rows, and
    packs them by itself for more.

    Args:
        model: any model of this package, or a module that holds its blocks, on the CPU.

    Returns:
        The model; its state_dict is unchanged, and a copy or a file of it is not packed.

    Raises:
        RuntimeError: the model is not on the CPU.
        TypeError: for something else than a module.
        ValueError: when the module has no layer to pack.
    """
    check_module("model", model)
    layers = packable(model)
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no layer of titok_fast")
    for parameter in model.parameters():
        if parameter.device.type != "cpu":
            raise RuntimeError(f"pack_weights: the model is on {parameter.device}, allowed is cpu")
    for layer in layers:
        layer.pack()
    return model


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Within it, the weights of a model on the CPU are packed."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    layers = [layer for layer in packable(model) if on_cpu and layer._packed is None]
    try:
        for layer in layers:
            layer.pack()
        yield
    finally:
        for layer in layers:
            layer.unpack()


def _can_pack(dtype: torch.dtype) -> bool:
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_linear_pointwise"):
        return False
    return dtype in (torch.float32, torch.bfloat16, torch.float16)
