"""What this installation can run, and for what is missing, why."""

import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import pkgutil
import platform
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

OPS = tuple(
    sorted(
        module.name
        for module in pkgutil.iter_modules([str(Path(__file__).parent)])
        if module.name[0] != "_" and module.name not in ("arguments", "inspect")
    )
)
TRITON_OPS = (
    "nearest_code",
    "index_propagation",
    "attention",
    "conv3x3",
    "decode_attention",
    "decode_linear",
)
CAPABILITIES = (80, 90, 100, 120)
_PACKAGE = Path(__file__).resolve().parent.parent
# Bytes a block can have; sm_86 and sm_89 run what is configured for sm_80 and have the least.
_SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
_SYSTEM_SHARED = 1024  # bytes of a block's shared memory that are the system's
_TENSOR_COLUMNS = 512  # of a multiprocessor's tensor memory; a program that asks for more traps


@functools.cache
def _extension() -> ModuleType | str:
    try:
        return importlib.import_module("titok_fast._C")
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "titok_fast._C"
        if absent and (_PACKAGE.parent / "csrc").is_dir():
            return f"titok_fast._C is not built; run 'pip install -e .' in {_PACKAGE.parent}"
        return f"titok_fast._C cannot be loaded ({error}); reinstall titok_fast"


# A child of fork must not wait for threads that it lacks: the extension has to see the fork.
os.register_at_fork(before=_extension)


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
        return "this build has no CUDA C++ ops; put nvcc on PATH and install titok_fast again"
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
    check_backend(backend, order)
    if backend != "reference" and backend not in here:
        raise RuntimeError(f"backend {backend!r} is not available: it has no {device_type} version")
    return backend


def check_backend(backend: str, order: dict[str, tuple[str, ...]]) -> None:
    """ValueError unless `backend` is a name that `choose_backend` knows."""
    names = sorted({name for row in order.values() for name in row})
    if backend not in ("auto", "reference", *names):
        allowed = ", ".join(repr(name) for name in ("auto", *names, "reference"))
        raise ValueError(f"backend: {backend!r} is not one of {allowed}")


def choose_or_reference(backend: str, device_type: str, order: dict[str, tuple[str, ...]]) -> str:
    """As `choose_backend`; "auto" is the reference on a device where no other can run.

    Not so without the extension, of which the op's call then says how to build it.
    """
    reason = why_not(order["cuda"][0], "cuda") if device_type == "cuda" else None
    bare = reason is not None and reason != _extension()
    if backend == "auto" and (device_type not in order or bare):
        return "reference"
    return choose_backend(backend, device_type, order)


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
    """The processor's model name, without trade marks; with the family and model numbers where a
    virtual machine gives a name without a number, such as "AMD EPYC"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in lines)}
    name = re.sub(r"\((R|TM)\)", "", fields.get("model name", ""))
    if not name:
        return platform.processor() or platform.machine()
    if re.search(r"\d", name) or "cpu family" not in fields:
        return name
    return f"{name}, family {fields['cpu family']} model {fields.get('model', '?')}"


def availability() -> dict[str, str]:
    """A line for each part of the package: what is in use, or why it is not."""
    module = _extension()
    report = {"CPU": f"{cpu_name()}, {torch.get_num_threads()} threads"}
    if isinstance(module, str):
        report["compiled ops"] = f"unavailable: {module}"
        report["CPU instruction set"] = "unavailable: no compiled ops"
    else:
        report["compiled ops"] = "available"
        report["CPU instruction set"] = _isa_line(module)
    report["Triton kernels"] = _triton_line()
    report["CUDA C++ ops"] = _cuda_line(module)
    report["CUDA device"] = _device_line()
    return report


def _isa_line(module: ModuleType) -> str:
    in_use, fastest, best = module.active_isa(), module.fastest_isa(), module.detected_isa()
    if in_use != fastest:
        return f"{in_use} (forced, not {fastest})"
    return in_use if in_use == best else f"{in_use} (there is {best}, which is slower here)"


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
class Multiprocessor:
    """What blocks on one multiprocessor share.

    From "Technical Specifications per Compute Capability" of NVIDIA's CUDA C++ Programming Guide,
    and for the granularity of allocation from cuda_occupancy.h.
    """

    blocks: int
    warps: int
    shared_bytes: int

    def resident_blocks(self, threads: int, registers: int, shared_bytes: int) -> int:
        """Blocks that fit at once: a bound, as nothing else is known to be on the device."""
        warps = -(-threads // 32)
        # A warp's registers come in units of 256 from one of four files of 16,384.
        with_registers = 4 * ((64 << 10) // 4 // _rounded_up(32 * registers, 256))
        shared = _rounded_up(shared_bytes + _SYSTEM_SHARED, 128)
        return min(
            self.blocks,
            self.warps // warps,
            with_registers // warps,
            self.shared_bytes // shared,
        )


MULTIPROCESSORS = {
    80: Multiprocessor(blocks=32, warps=64, shared_bytes=164 << 10),
    90: Multiprocessor(blocks=32, warps=64, shared_bytes=228 << 10),
    100: Multiprocessor(blocks=32, warps=64, shared_bytes=228 << 10),
    120: Multiprocessor(blocks=24, warps=48, shared_bytes=100 << 10),
}


@dataclass(frozen=True)
class KernelReport:
    """What one kernel compiles to, read from its machine code without a GPU.

    Attributes:
        op: whose kernel it is.
        language: "Triton" or "CUDA C++".
        kernel: its name.
        capability: 90 for sm_90.
        constants: template arguments, or Triton's constants and options.
        threads: of a block.
        registers: of a thread.
        spilled_bytes: of a thread: stack and local memory.
        shared_bytes: of a block; in CUDA C++ without what a launch adds.
        tensor_columns: of tensor memory, where there is any.
        matrix_instructions: how many of each the code holds, by their names in machine code.
        matrix_waits: how often the code waits for those that run beside it (sm_90).
    """

    op: str
    language: str
    kernel: str
    capability: int
    constants: str
    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_columns: int
    matrix_instructions: dict[str, int]
    matrix_waits: int

    @property
    def blocks(self) -> int:
        """Bound of the blocks that a multiprocessor runs at once."""
        multiprocessor = MULTIPROCESSORS[self.capability]
        return multiprocessor.resident_blocks(self.threads, self.registers, self.shared_bytes)

    @property
    def occupancy(self) -> float:
        """Bound of the share of a multiprocessor's warps that are in use."""
        return self.blocks * -(-self.threads // 32) / MULTIPROCESSORS[self.capability].warps

    @property
    def faults(self) -> list[str]:
        """Why it spills or cannot launch, a line each; none for a kernel that is in order."""
        found = []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        limit = _SHARED_LIMIT[self.capability]
        if self.shared_bytes > limit:
            found.append(
                f"needs {self.shared_bytes:,} bytes of shared memory, a block has {limit:,}"
            )
        elif not self.blocks:
            found.append(
                f"needs {self.threads} threads of {self.registers} registers, "
                "a multiprocessor has 65,536 registers"
            )
        if self.tensor_columns > _TENSOR_COLUMNS:
            found.append(
                f"needs {self.tensor_columns} columns of tensor memory, there are {_TENSOR_COLUMNS}"
            )
        return found


@dataclass(frozen=True)
class Launch:
    """What Triton compiles for a launch.

    Attributes:
        kernel: the function.
        types: of its arguments, by name.
        constants: values by place: of constants, None, and numbers that are 1.
        attributes: by place: what is known of numbers and addresses.
        options: of the compiler.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def named_constants(self) -> dict[str, Any]:
        """`constants` by name."""
        names = self.kernel.arg_names
        return {names[place[0]]: value for place, value in self.constants.items()}


@dataclass(frozen=True)
class Configuration:
    """One thing that Triton compiles: the `index`-th of `triton_launches`."""

    op: str
    capability: int
    main: bool
    index: int


class _Recorder:
    """Triton's driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)
        self.launches: dict[str, Launch] = {}

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> Any:
        return self._target

    def get_current_stream(self, device: Any) -> int:
        return 0

    def record(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's `jit_cache_hook`; that it returns true leaves the kernel uncompiled."""
        options = json.loads(compile["specialization_data"])["options"]
        # What was a tuple there is the backend's own, and the same for every launch.
        options = {name: value for name, value in options.items() if not isinstance(value, list)}
        launch = Launch(
            fn.jit_function,
            compile["signature"],
            compile["constants"],
            compile["configs"][0],
            options,
        )
        self.launches.setdefault(f"{fn.name} {compile['key']}", launch)
        return True


@functools.cache
def triton_launches(op: str, capability: int, main: bool) -> tuple[Launch, ...]:
    """What the `launch_examples` of an op's kernels compile, without compiling it.

    Meanwhile no other thread may launch a kernel of Triton's: it would be recorded and not run.

    Args:
        op: from `TRITON_OPS`.
        capability: from `CAPABILITIES`.
        main: only what decides the time of the op's main shape.

    Raises:
        RuntimeError: Triton is missing, or TRITON_INTERPRET=1, under which nothing compiles.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET: unset it, kernels cannot be compiled under it")
    module = kernels(op)
    from triton import knobs
    from triton.runtime import driver

    recorder, devices = _Recorder(capability), kernels("_device")
    device = devices.Device(capability, 132)  # an H200's number, which changes grids, not code
    previous = driver.active if torch.cuda.is_available() else None
    driver.set_active(recorder)
    try:
        with knobs.runtime.scope(), devices.assume(device):
            knobs.runtime.jit_cache_hook = recorder.record
            module.launch_examples(main)
    finally:
        driver.set_active(previous)
    return tuple(recorder.launches.values())


def triton_configurations(
    capabilities: Iterable[int] = CAPABILITIES,
    ops: Iterable[str] = TRITON_OPS,
    *,
    main: bool = False,
) -> list[Configuration]:
    """Everything that Triton compiles for the ops' examples.

    Args:
        capabilities: compute capabilities (90 for sm_90) from `CAPABILITIES`.
        ops: names from `TRITON_OPS`.
        main: only what decides the time of each op's main shape, in seconds instead of minutes.

    Raises:
        RuntimeError: as of `triton_launches`.
    """
    return [
        Configuration(op, capability, main, index)
        for op in ops
        for capability in capabilities
        for index in range(len(triton_launches(op, capability, main)))
    ]


def kernel_report(
    configurations: Sequence[Configuration], *, jobs: int = 1
) -> Iterator[KernelReport]:
    """Compile Triton configurations ahead of time and read their resources, in their order.

    Args:
        configurations: of `triton_configurations`.
        jobs: processes that compile; 1 compiles in this one.

    Raises:
        RuntimeError: one does not compile.
    """
    if jobs == 1 or len(configurations) < 2:
        yield from map(_compile, configurations)
        return
    context = multiprocessing.get_context("spawn")  # a forked child would share torch's threads
    with ProcessPoolExecutor(jobs, context) as pool:
        try:
            yield from pool.map(_compile, configurations)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def cuda_report(
    capabilities: Iterable[int] = CAPABILITIES, ops: Iterable[str] = OPS
) -> list[KernelReport]:
    """The resources of the CUDA C++ kernels inside the extension, for what it was built for.

    Args:
        capabilities: compute capabilities (90 for sm_90) from `CAPABILITIES`.
        ops: names from `OPS`.

    Raises:
        RuntimeError: there is no extension, it has no CUDA C++, or Triton, whose disassembler
            reads it, is missing.
    """
    require_backend("cuda", "cuda")
    require_backend("triton", "cuda")
    reports = []
    wanted = set(capabilities)
    with tempfile.TemporaryDirectory() as folder:
        _tool("cuobjdump", "--extract-elf", "all", extension().__file__, cwd=folder)
        for cubin in sorted(Path(folder).iterdir()):
            capability = int(cubin.name.split(".")[-2].removeprefix("sm_"))
            if capability not in wanted:
                continue
            for symbol, resources in _resources(cubin).items():
                kernel, constants = _demangled(symbol)
                op = next((op for op in ops if kernel.startswith(f"{op}_")), None)
                if op is not None:
                    if capability >= 90:  # from there on the system's are among them
                        resources["shared_bytes"] = max(
                            0, resources["shared_bytes"] - _SYSTEM_SHARED
                        )
                    report = KernelReport(
                        op, "CUDA C++", kernel, capability, constants, **resources, tensor_columns=0
                    )
                    reports.append(report)
    return sorted(reports, key=lambda report: (report.op, report.capability, report.kernel))


def _compile(configuration: Configuration) -> KernelReport:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    op, capability = configuration.op, configuration.capability
    launch = triton_launches(op, capability, configuration.main)[configuration.index]
    name, described = launch.kernel.__name__, _described(launch)
    source = ASTSource(launch.kernel, launch.types, launch.constants, launch.attributes)
    target = GPUTarget("cuda", capability, 32)
    try:
        compiled = triton.compile(source, target=target, options=launch.options)
    except Exception as error:  # of any kind, and not always one that a pool can send back
        message = f"{name} [{described}] for sm_{capability} does not compile: {error}"
        raise RuntimeError(message) from None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources = _resources(cubin)[name]
    resources["shared_bytes"] = compiled.metadata.shared  # all of it is the launch's to give
    columns = compiled.metadata.tmem_size or 0
    return KernelReport(
        op, "Triton", name, capability, described, **resources, tensor_columns=columns
    )


def _described(launch: Launch) -> str:
    """The types of the tensors, then constants and options, one space apart."""
    from triton.backends.nvidia.compiler import CUDAOptions

    kinds = [kind[1:] for kind in launch.types.values() if kind.startswith("*")]
    words = [f"{name}={value}" for name, value in launch.named_constants.items()]
    for name in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion"):
        value = launch.options[name]
        if name.startswith("num_") or value != getattr(CUDAOptions, name):
            words.append(f"{name}={value}")
    return " ".join(["/".join(dict.fromkeys(kinds)), *words])


def _resources(cubin: Path) -> dict[str, dict[str, Any]]:
    """Fields of `KernelReport` for each kernel in a file of machine code, by its symbol."""
    usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
    threads = dict(
        re.findall(
            r"\.nv\.info\.(\S+)\n(?:(?!\.nv\.info).*\n)*?"
            r"\s*Attribute:\s*EIATTR_(?:REQNTID|MAX_THREADS)\s*\n.*\n\s*Value:\s*0x(\w+)",
            _tool("cuobjdump", "--dump-elf", str(cubin)),
        )
    )
    code = dict(
        re.findall(
            r"^\s*\.section\s+\.text\.([^\s,]+),(.*?)(?=^\s*\.section\s|\Z)",
            _tool("nvdisasm", str(cubin)),
            flags=re.MULTILINE | re.DOTALL,
        )
    )
    found = {}
    for symbol, line in re.findall(r"Function (\S+):\s*(.*)", usage):
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        instructions = re.findall(r"\b(\w*[DHIQO]G?MMA)\b", code[symbol])
        found[symbol] = {
            "threads": int(threads.get(symbol, "400"), 16),  # 1,024 without launch bounds
            "registers": used["REG"],
            "spilled_bytes": used["STACK"] + used["LOCAL"],
            "shared_bytes": used["SHARED"],
            "matrix_instructions": dict(sorted(Counter(instructions).items())),
            "matrix_waits": code[symbol].count("WARPGROUP.DEPBAR"),
        }
    return found


def _demangled(symbol: str) -> tuple[str, str]:
    """The name and template arguments of a kernel's symbol, `<op>_..._kernel` in C++."""
    match = re.search(r"\d([a-z][a-z_]*_kernel)(?:I(.*?)EE?v)?", symbol)
    if match is None:
        return symbol, ""
    words, rest = [], match[2] or ""
    while rest:
        literal, length = re.match(r"L(\w)(\d+)E", rest), re.match(r"\d+", rest)
        if literal is not None:
            words.append(str(bool(int(literal[2]))) if literal[1] == "b" else literal[2])
            rest = rest[literal.end() :]
        elif length is not None:
            end = length.end() + int(length[0])
            words.append(rest[length.end() : end].lstrip("_"))
            rest = rest[end:]
        else:
            words.append({"f": "float", "d": "double", "i": "int"}.get(rest[0], rest[0]))
            rest = rest[1:]
    return match[1], " ".join(words)


def _tool(name: str, *arguments: str, cwd: str | None = None) -> str:
    """The output of one of the CUDA tools inside Triton."""
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [tool, *arguments], check=True, capture_output=True, text=True, cwd=cwd
    ).stdout


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
