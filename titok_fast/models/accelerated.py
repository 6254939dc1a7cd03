"""Ways to run a model faster: `torch.compile` of its blocks, CUDA graphs, packed weights."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor, nn

from titok_fast.models.blocks import (
    BertBlock,
    LlamaBlock,
    ResidualAttentionBlock,
    UViTBlock,
)
from titok_fast.models.ibq import ResidualBlock
from titok_fast.models.maskgit_vqgan import ResnetBlock
from titok_fast.models.packed import packable

Model = TypeVar("Model", bound=nn.Module)

_COMPILE_OPTIONS = inspect.signature(torch.compile).parameters  # torch 2.10 lacks some


def compile(model: Model) -> Model:
    """Applies `torch.compile` to each block of a model, in place.

    The blocks of one kind share their compiled code, so that this takes seconds, not minutes; what
    lies between them is not worth compiling. The first call for a new shape compiles. Of
    `ARTransformer` that is `logits` and a prefix; decoding steps are ops of their own.

    Args:
        model: any model of this package, or a module that holds its blocks.

    Returns:
        The model; its state_dict is unchanged.

    Raises:
        ValueError: when the module has none of the blocks.
    """
    kinds = (BertBlock, LlamaBlock, ResidualAttentionBlock, ResidualBlock, ResnetBlock, UViTBlock)
    blocks = [module for module in model.modules() if isinstance(module, kinds)]
    if not blocks:
        raise ValueError(f"model: {type(model).__name__} has no block of a model of titok_fast")
    # IBQ's blocks alone have more shapes than the 8 that torch compiles one code for.
    raised = {"recompile_limit": 64} if "recompile_limit" in _COMPILE_OPTIONS else {}
    for block in blocks:
        block.compile(**raised)
    return model


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
    `ARTransformer.generate` has no use for it: it reads weights as they are for up to 16 rows, and
    packs them by itself for more.

    Args:
        model: any model of this package, or a module that holds its blocks, on the CPU.

    Returns:
        The model; its state_dict is unchanged, and a copy or a file of it is not packed.

    Raises:
        RuntimeError: the model is not on the CPU.
        ValueError: when the module has no layer to pack.
    """
    layers = packable(model)
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no layer of titok_fast")
    for parameter in model.parameters():
        if parameter.device.type != "cpu":
            raise RuntimeError(f"pack_weights: the model is on {parameter.device}, allowed is cpu")
    for layer in layers:
        layer.pack()
    return model


_recording = ContextVar("recording", default=False)


@contextmanager
def recording(device: torch.device) -> Iterator[None]:
    """What `capture` runs in: its tensors can be written anywhere, and no weight is cast."""
    autocast = torch.autocast(device.type, enabled=False)
    token = _recording.set(True)
    try:
        with torch.inference_mode(False), torch.no_grad(), autocast:
            yield
    finally:
        _recording.reset(token)


def is_recording(tensor: Tensor) -> bool:
    """Whether what is done with the tensor becomes part of a CUDA graph, or prepares one."""
    return _recording.get() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def capture(function: Callable[..., Tensor], *examples: Tensor) -> Callable[..., Tensor]:
    """Records a function of CUDA tensors as one CUDA graph, which a call replays.

    It is recorded without gradients and without autocast, whose copies of weights would not outlive
    it.

    Args:
        function: does not synchronise, and depends on nothing but its arguments and parameters
            that stay where they are.
        *examples: arguments of the shapes, dtypes and device to record.

    Returns:
        A function of such arguments; its result is a copy of the graph's.

    Raises:
        RuntimeError: the examples are not on a CUDA device.
        ValueError: from the returned function, for another number of arguments, shape or dtype.
    """
    device = examples[0].device
    if device.type != "cuda":
        raise RuntimeError(f"capture: the model is on {device}, allowed is a CUDA device")
    with torch.cuda.device(device), recording(device):
        static = [example.clone() for example in examples]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and libraries set up before
            for _ in range(2):
                function(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The default stream of a capture is that of the first device that anything was captured on.
        with torch.cuda.graph(graph, stream=stream):
            result = function(*static)

    @functools.wraps(function)  # keeps what the graph reads and writes: parameters, caches
    def replay(*arguments: Tensor) -> Tensor:
        if len(arguments) != len(static):
            raise ValueError(f"capture: got {len(arguments)} arguments, allowed is {len(static)}")
        for i, (argument, target) in enumerate(zip(arguments, static, strict=True)):
            if argument.shape != target.shape or argument.dtype != target.dtype:
                raise ValueError(
                    f"capture: argument {i} is {argument.dtype} {list(argument.shape)}, allowed is "
                    f"{target.dtype} {list(target.shape)}"
                )
        with torch.cuda.device(device):
            for argument, target in zip(arguments, static, strict=True):
                target.copy_(argument)
            graph.replay()
            return result.clone()

    return replay
