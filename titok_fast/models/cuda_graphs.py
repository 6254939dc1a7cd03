"""CUDA graphs of what models do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

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
