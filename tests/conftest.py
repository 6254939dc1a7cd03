"""Shared set-up: fixed seeds, poisoned memory, the command, Triton's interpreter without a GPU."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before the first import of torch
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of a kernel
    if importlib.util.find_spec("triton"):
        interpreter = importlib.import_module("triton.runtime.interpreter")

        def create_dot(_, a, b, total, *options):
            """A sum in float64, rounded once: as on tensor cores, no bit depends on the tile.

            BLAS's may. Tensor cores round worse, which no interpreter shows.
            """
            with np.errstate(invalid="ignore", over="ignore"):
                product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
                sums = (product + total.data).astype(total.data.dtype)
            return interpreter.TensorHandle(sums, total.dtype.scalar)

        interpreter.InterpreterBuilder.create_dot = create_dot

with torch.device("meta"):
    torch.empty(0)  # torch caches its constructors here, before a test replaces torch.empty

from titok_fast.testing import CPU_ISAS, cpu_isa, peak_extra_bytes, supported_isas


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def flushed_subnormals() -> Iterator[None]:
    """This thread takes subnormal numbers as zero; others of torch's pool do not."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.empty makes starts as NaN or a huge integer, so that an unwritten one shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor: torch.Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        if tensor.device.type == "meta" or torch.compiler.is_compiling():
            return tensor
        if tensor.is_floating_point():
            tensor.detach().fill_(torch.nan)
        elif tensor.dtype is torch.int64:
            tensor.fill_(2**62)
        elif tensor.dtype is torch.uint8 and tensor.device.type == "cpu":
            tensor.numpy().fill(255)  # a workspace: NaN in every format
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[*CPU_ISAS, "triton"])
def backend(request: pytest.FixtureRequest):
    """Each fused backend; on CPU the C++ one once for each instruction set."""
    if request.param == "triton":
        yield "triton"
        return
    if request.param not in supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    with cpu_isa(request.param):
        yield "cpu"


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512bf16", "amx", "triton", "streaming"])
def ibq_backend(request: pytest.FixtureRequest):
    """Each backend of index_propagation but the reference."""
    if request.param in ("triton", "streaming"):
        yield request.param
        return
    if request.param not in supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    with cpu_isa(request.param):
        yield "cpu"


@pytest.fixture
def device(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone after the test."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.fixture
def peak() -> Callable[[Callable[[], object]], int]:
    """`peak(call)`: its extra bytes on the CPU; skips the test where the system does not tell."""

    def peak(call: Callable[[], object]) -> int:
        extra = peak_extra_bytes(call)
        if extra is None:
            pytest.skip("this system does not count peak memory")
        return extra

    return peak


@pytest.fixture
def titok_fast(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process, on the CPU; arguments are strings or paths."""
    from titok_fast import cli

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # results to the bit

    def run(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["titok-fast", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return SimpleNamespace(returncode=caught.value.code or 0, **capsys.readouterr()._asdict())

    return run
