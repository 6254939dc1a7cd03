"""CUDA tensors without memory or a GPU: what is on which device, and what waits for it."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::DeviceType;
static c10::impl::DeviceGuardImplRegistrar registrar(
    DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA>());
"""


@functools.cache
def _allow_cuda_tensors() -> None:
    """Gives a PyTorch without CUDA, or without a GPU, the device that indexing asks for."""
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
        return
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        command = [
            compiler, "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}",
            "-x", "c++", "-", f"-L{torch_folder / 'lib'}", "-lc10", "-o", str(library),
        ]  # fmt: skip
        run = subprocess.run(command, input=_GUARD, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        ctypes.CDLL(str(library))


@contextmanager
def fake_gpu() -> Iterator[torch.device]:
    """Within it tensors have shapes, dtypes and devices alone; the CUDA device is to be named.

    What mixes devices raises RuntimeError, what needs a value of a tensor, and so would wait for
    the GPU, `torch._subclasses.fake_tensor.DataDependentOutputException` or
    `DynamicOutputShapeException`. Ops of this package give what their `fake` says.
    """
    _allow_cuda_tensors()
    with (
        # Checks the values of what it fills.
        mock.patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor),
        mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
        FakeTensorMode(),
    ):
        yield torch.device("cuda", 0)
