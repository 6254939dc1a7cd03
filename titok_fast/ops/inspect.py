"""What this installation can run, and for what is missing, why."""

import functools
import importlib
import importlib.util
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

TRITON_OPS = ("nearest_code", "index_propagation", "attention")
CAPABILITIES = (80, 90, 100, 120)
_PACKAGE = Path(__file__).resolve().parent.parent
# Bytes a block can have; sm_86 and sm_89 run what is configured for sm_80 and have the least.
_SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@functools.cache
def _extension() -> ModuleType | str:
    try:
        return importlib.import_module("titok_fast._C")
    except ImportError as error:
        if (_PACKAGE.parent / "csrc").is_dir():
            return f"titok_fast._C is not built; run 'pip install -e .' in {_PACKAGE.parent}"
        return f"titok_fast._C cannot be loaded ({error}); reinstall titok_fast"


@functools.cache
def _kernels() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run 'pip install triton'"
    if importlib.util.find_spec("titok_fast.kernels") is None:
        return f"titok_fast.kernels is not installed; run 'pip install -e .' in {_PACKAGE.parent}"
    return None


def extension() -> Any:
    """The compiled module `titok_fast._C`; RuntimeError with the command that builds it."""
    module = _extension()
    if isinstance(module, str):
        raise RuntimeError(module)
    return module


def kernels(op: str) -> Any:
    """The Triton module `titok_fast.kernels.<op>`; RuntimeError saying what is missing."""
    reason = _kernels()
    if reason is not None:
        raise RuntimeError(reason)
    return importlib.import_module(f"titok_fast.kernels.{op}")


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, and so on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def why_not(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run tensors of `device_type`, or None when it can."""
    if backend in ("reference", "streaming"):
        return None
    if backend == "triton":
        if device_type != "cuda" and not interpreting():
            return f"it needs CUDA tensors, got {device_type} (TRITON_INTERPRET=1 runs it on CPU)"
        return _kernels()
    if backend != device_type:
        return f"it needs {backend} tensors, got {device_type}"
    module = _extension()
    if isinstance(module, str):
        return module
    if backend == "cuda" and not module.cuda_architectures:
        return "this build has no CUDA C++ ops; rebuild with -C cmake.define.TITOK_FAST_CUDA=ON"
    return None


def choose_backend(backend: str, device_type: str, order: dict[str, tuple[str, ...]]) -> str:
    """The backend that an op's public function asks for; plain Python, so that it can be traced.

    Args:
        backend: one name of `order`'s values, "reference" or "auto".
        device_type: of the op's tensors.
        order: for each device type, the op's backends; "auto" takes the first.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: a backend that does not run on this type of device.
    """
    here = order.get(device_type, ())
    if backend == "auto" and here:
        return here[0]
    names = sorted({name for row in order.values() for name in row})
    if backend not in ("auto", "reference", *names):
        allowed = ", ".join(repr(name) for name in ("auto", *names, "reference"))
        raise ValueError(f"backend: {backend!r} is not one of {allowed}")
    if backend != "reference" and backend not in here:
        raise RuntimeError(f"backend {backend!r} is not available: it has no {device_type} version")
    return backend


def require_backend(backend: str, device_type: str) -> None:
    """RuntimeError saying what is missing, unless `backend` can run tensors of `device_type`."""
    reason = why_not(backend, device_type)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")


def versions() -> dict[str, str]:
    """Versions of the package and of what it runs on; "not installed" where missing."""
    from importlib.metadata import PackageNotFoundError, version

    # torch's own word names its build, such as +cpu, which its metadata may lack.
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("titok_fast", "triton", "numpy", "pillow", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def availability() -> dict[str, str]:
    """A line for each part of the package: what is in use, or why it is not."""
    module = _extension()
    report = {"CPU": f"{cpu_name()}, {torch.get_num_threads()} threads"}
    if isinstance(module, str):
        report["compiled ops"] = f"unavailable: {module}"
        report["CPU instruction set"] = "unavailable: no compiled ops"
    else:
        report["compiled ops"] = "available"
        in_use, best = module.active_isa(), module.detected_isa()
        report["CPU instruction set"] = in_use + (
            "" if in_use == best else f" (forced below {best})"
        )
    report["Triton kernels"] = _triton_line()
    report["CUDA C++ ops"] = _cuda_line(module)
    report["CUDA device"] = _device_line()
    return report


def _triton_line() -> str:
    reason = _kernels()
    if reason is not None:
        return f"unavailable: {reason}"
    if torch.cuda.is_available():
        return "available"
    if interpreting():
        return "available in Triton's interpreter, on CPU tensors"
    return "compile only: no CUDA device (TRITON_INTERPRET=1 runs them on CPU)"


def _device_line() -> str:
    if torch.version.cuda is None:
        return f"unavailable: torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return "unavailable: torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}), CUDA {torch.version.cuda}"


def _cuda_line(module: ModuleType | str) -> str:
    if isinstance(module, str):
        return "unavailable: no compiled ops"
    if not module.cuda_architectures:
        return "unavailable: built without CUDA (no nvcc was found, or TITOK_FAST_CUDA=OFF)"
    built = f"built for {module.cuda_architectures}, CUDA {module.cuda_runtime_version() / 1000:g}"
    if not torch.cuda.is_available():
        return f"{built}; not run: no CUDA device"
    code = module.cuda_code(torch.cuda.current_device())
    if code["error"]:
        return f"unavailable: {built}, which cannot run on this device: {code['error']}"
    return f"available: {built}; this device runs sm_{code['binary_capability']} code"


@dataclass(frozen=True)
class KernelReport:
    """What one Triton kernel compiles to, read from its machine code without a GPU."""

    kernel: str
    capability: int
    constants: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor_columns: int  # of tensor memory, where there is any; a program with more than 512 traps
    matrix_instructions: tuple[str, ...]


def kernel_report(
    capabilities: Iterable[int] = CAPABILITIES,
    ops: Iterable[str] = TRITON_OPS,
    *,
    main: bool = False,
) -> Iterator[KernelReport]:
    """Compile every Triton specialization ahead of time and read its resources.

    Args:
        capabilities: compute capabilities (90 for sm_90) from `CAPABILITIES`.
        ops: names from `TRITON_OPS`.
        main: only what decides the time of each op's main shape, in seconds instead of minutes.

    Raises:
        RuntimeError: Triton is missing, or TRITON_INTERPRET=1, under which nothing compiles.
    """
    if interpreting():
        raise RuntimeError("kernel_report: unset TRITON_INTERPRET, its kernels cannot be compiled")
    for op in ops:
        module = kernels(op)
        for capability in capabilities:
            for kernel, types, constants in module.specializations(capability, main):
                yield _compile(kernel, types, constants, capability)


def _compile(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int
) -> KernelReport:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.compiler import ASTSource

    options = {key: value for key, value in constants.items() if hasattr(CUDAOptions, key)}
    constexprs = {key: value for key, value in constants.items() if key not in options}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # Launches pass pointers that torch aligned, and so do these.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, constexprs, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output(binaries / "cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _output(binaries / "nvdisasm", cubin.name)
    resources = dict(re.findall(r"(\w+):(\d+)", usage.split(f"Function {kernel.__name__}")[1]))
    return KernelReport(
        kernel=kernel.__name__,
        capability=capability,
        constants=", ".join(f"{key}={value}" for key, value in constants.items()),
        registers=int(resources["REG"]),
        spilled_bytes=int(resources["STACK"]) + int(resources["LOCAL"]),
        shared_bytes=compiled.metadata.shared,
        shared_limit=_SHARED_LIMIT[capability],
        tensor_columns=compiled.metadata.tmem_size or 0,
        matrix_instructions=tuple(sorted(set(re.findall(r"\b(\w*[HQI]G?MMA)\b", sass)))),
    )


def _output(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout
