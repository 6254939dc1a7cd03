"""The device that kernels are launched on, by which their tiles are chosen, and memory there."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

CAPABILITIES = (80, 90, 100, 120)  # for which there are tiles


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        capability: 90 for sm_90; of `CAPABILITIES`, the nearest lower one, or the lowest.
        multiprocessors: how many it has.
    """

    capability: int
    multiprocessors: int


_assumed: ContextVar[Device] = ContextVar("assumed")


@contextmanager
def assume(device: Device) -> Iterator[None]:
    """What `device_of` gives for the meta device, where launches are recorded without a GPU."""
    token = _assumed.set(device)
    try:
        yield
    finally:
        _assumed.reset(token)


def device_of(device: torch.device) -> Device | None:
    """The GPU that a device is; None for the CPU, which Triton's interpreter runs on."""
    if device.type == "cuda":
        return _cuda(device)
    return _assumed.get() if device.type == "meta" else None


@functools.cache
def _cuda(device: torch.device) -> Device:
    major, minor = torch.cuda.get_device_capability(device)
    lower = [c for c in CAPABILITIES if c <= 10 * major + minor]
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return Device(max(lower, default=min(CAPABILITIES)), multiprocessors)


def floats(device: torch.device, *sizes: int) -> list[Tensor]:
    """New float32 tensors of one allocation, each of its size."""
    # Whole 16-byte units: a kernel is compiled again for a pointer of another alignment.
    units = [-size % 4 + size for size in sizes]
    parts = torch.empty(sum(units), dtype=torch.float32, device=device).split(units)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]
