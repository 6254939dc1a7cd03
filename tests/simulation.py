"""The CUDA C++ ops on a CPU: built with a header that stands in for CUDA's, thread by thread."""

import fcntl
import functools
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

_ROOT = Path(__file__).resolve().parent.parent
_SIMULATOR, _CSRC = _ROOT / "tests/cuda_simulator", _ROOT / "csrc"
_SOURCES = (
    *sorted(_SIMULATOR.glob("*.cpp")),
    _CSRC / "maskgit_step_bind.cpp",
    _CSRC / "sample_token_bind.cpp",
)
# A kernel's arrays are thread_local: no constructor waits behind an `extern` one.
# Fibers jump between stacks, which fortified code takes for a mistake.
_FLAGS = (
    "-U_FORTIFY_SOURCE -std=c++17 -O2 -fPIC -shared -ffp-contract=off -fvisibility=hidden "
    "-fno-extern-tls-init"
)


@functools.cache
def cuda_simulator() -> ModuleType:
    """The module of tests/cuda_simulator, built once for each state of the sources."""
    compiler = shutil.which("g++")
    if compiler is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs g++ and pybind11 to build the simulator")
    pybind11 = importlib.import_module("pybind11").get_include()
    include = [_SIMULATOR, _CSRC, pybind11, sysconfig.get_path("include")]
    command = [compiler, *_FLAGS.split(), "-DTITOK_FAST_CUDA", *(f"-I{path}" for path in include)]
    digest = hashlib.sha256(" ".join([sys.version, *command]).encode())
    for path in (
        *sorted((_ROOT / "tests/cuda_simulator").iterdir()),
        *sorted((_ROOT / "csrc").iterdir()),
    ):
        digest.update(path.read_bytes())
    folder = _ROOT / "build/cuda_simulator"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / digest.hexdigest()[:16] / "cuda_simulator.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several workers one builds
        if not library.exists():
            library.parent.mkdir(exist_ok=True)
            unfinished = library.with_suffix(".unfinished")
            run = subprocess.run(
                [*command, *_SOURCES, "-o", unfinished], capture_output=True, text=True, check=False
            )
            assert run.returncode == 0, run.stderr[-3000:]
            unfinished.rename(library)
    spec = importlib.util.spec_from_file_location("cuda_simulator", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_cpu_ops(order: int) -> SimpleNamespace:
    """What stands in for the extension, so that its CPU ops are the simulated CUDA ones.

    Args:
        order: of a block's threads and of a grid's blocks; 0 and 1: ascending and descending,
            otherwise the seed of a new one each time that threads wait.
    """
    simulator = cuda_simulator()
    simulator.set_order(order)
    return SimpleNamespace(
        maskgit_step_cpu=simulator.maskgit_step_cuda,
        maskgit_step_cpu_workspace=lambda length, vocabulary, threads: 0,
        sample_token_cpu=simulator.sample_token_cuda,
        sample_token_cpu_workspace=lambda batch, vocabulary, threads: (
            simulator.sample_token_cuda_workspace(batch, vocabulary, (0, 0), (0.0, 0))
        ),
        philox4x32=simulator.philox4x32,
    )
