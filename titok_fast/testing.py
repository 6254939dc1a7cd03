"""Comparison helpers, CPU instruction sets, peak memory and sample inputs for tests and bench."""

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from titok_fast.ops import inspect

CPU_ISAS = ("portable", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`, in float64; NaN never passes.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"actual: got {list(actual.shape)}, allowed is {list(expected.shape)}")
    truth = expected.detach().double()
    difference = (actual.detach().double() - truth).norm()
    return float(difference / truth.norm().clamp_min(1e-300))


def supported_isas() -> tuple[str, ...]:
    """The instruction sets of `CPU_ISAS` that this CPU has."""
    best: str = inspect.extension().detected_isa()
    return CPU_ISAS[: CPU_ISAS.index(best) + 1]


@contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Run the CPU ops with one instruction set of `supported_isas()`, in this process."""
    extension = inspect.extension()
    extension.force_isa(name)
    try:
        yield
    finally:
        extension.force_isa("")


def rows_and_codes(
    n: int,
    k: int,
    d: int,
    *,
    dtype: torch.dtype = torch.float32,
    mean: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Normal rows [n, d] and codes [k, d] around `mean`, the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator) + mean
    codebook = torch.randn(k, d, generator=generator) + mean
    return z.to(device, dtype), codebook.to(device, dtype)


def peak_extra_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Peak bytes during one call beyond what was allocated before it and its output.

    GPU: PyTorch's allocator, so memory that a peer takes past it is not seen. CPU: growth of the
    peak resident set, which Linux keeps (VmHWM) and resets on writing 5 to clear_refs. The heap is
    trimmed first, so that freed pages count again when they are reused; exact to some 100 kB.
    None where the system has no such counter.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _status_bytes("VmRSS")
            output = call()
            peak = _status_bytes("VmHWM")
        except (OSError, AttributeError):
            return None
    return max(0, peak - before - (output.nbytes if isinstance(output, Tensor) else 0))


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])
