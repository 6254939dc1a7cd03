"""What every benchmark shares: cases, providers, the correctness gate and the measurements.

A benchmark file describes one op as a `Bench`; `select` says which of its cases run with which of
its providers, `conftest.py` takes these through `run`, and `run` times nothing whose answer it has
not checked.
"""

import functools
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from titok_fast._contention import contention, other_cpus
from titok_fast.models.widened import WIDENED
from titok_fast.ops import inspect
from titok_fast.ops.arguments import dtype_name
from titok_fast.testing import cpu_isa, peak_extra_bytes, supported_isas

ROOT = Path(__file__).resolve().parent.parent
PEERS = (
    "faiss-cpu",
    "vector-quantize-pytorch",
    "flash-kmeans",
    "cut-cross-entropy",
    "liger-kernel",
)
MEMORY_BUDGET = 16 * 2**30  # bytes that a provider may need beyond its inputs
MAX_ROUNDS = 1000
SLOW = ((30.0, 1), (10.0, 2), (2.0, 3))  # seconds a call, from which so many rounds are enough
LATE = "skipped: no time was left"

Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One point of a benchmark. A subclass adds its sizes (int) and options (str)."""

    device: str
    dtype: torch.dtype

    def info(self) -> dict[str, int | str]:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own["dtype"] = dtype_name(self.dtype)
        return {k.upper() if isinstance(v, int) else k: v for k, v in own.items()}

    def __str__(self) -> str:
        info = self.info()
        device, dtype = info.pop("device"), info.pop("dtype")
        sizes = ",".join(f"{k}={v}" for k, v in info.items() if isinstance(v, int))
        options = [v for v in info.values() if isinstance(v, str)]
        return " ".join([sizes, *options, str(dtype), str(device)])


@dataclass(frozen=True)
class Relative:
    """What a peer computes that has no such op, only something near to it.

    Attributes:
        name: what that is; tables show it beside the provider.
        work: as in `Bench`, of what it computes.
        check: as in `Bench`, of its own result.
    """

    name: str
    work: Callable[[Any], tuple[int, int]]
    check: Callable[[Any, Tensor], tuple[int, int]]


@dataclass(frozen=True)
class Provider:
    """One way to run an op.

    Attributes:
        name: the row of the table.
        prepare: `prepare(case, *inputs)` does what a user does once (compile, build an index) and
            returns the call to time.
        devices: the device types it runs on.
        ours: whether a wrong answer fails the benchmark; a peer's is only recorded.
        missing: why a peer cannot run here, or None. Ours has no such excuse: it raises.
        too_much: why a case is not worth its memory or time, or None.
        setting: entered around everything that runs, such as a forced instruction set.
        dtype: what it multiplies in where that is not the case's dtype; shares of the GEMM peak
            refer to it.
        relative: what it computes where that is not the op.
    """

    name: str
    prepare: Callable[..., Call]
    devices: tuple[str, ...] = ("cpu", "cuda")
    ours: bool = False
    missing: Callable[[], str | None] = lambda: None
    too_much: Callable[[Any], str | None] = lambda case: None
    setting: Callable[[], AbstractContextManager[None]] = nullcontext
    dtype: torch.dtype | None = None
    relative: Relative | None = None

    def absent(self, on: Sequence[str]) -> str | None:
        """Why no case can run on the device types `on`, or None."""
        if not set(self.devices) & set(on):
            return f"needs {' or '.join(self.devices)}"
        return self.missing()


def slower_isas() -> tuple[str, ...]:
    """The instruction sets below the one that this CPU uses unforced."""
    if inspect.why_not("cpu", "cpu") is not None:
        return ()
    # What AVX-512 VNNI adds, BF16 has too.
    return tuple(isa for isa in supported_isas()[:-1] if isa != "avx512vnni")


def own_providers(
    prepare: Callable[[str], Callable[..., Any]],
    *,
    gpu: str = "cuda",
    bf16: bool = False,
    too_much: Mapping[str, Callable[[Any], str | None]] | None = None,
) -> tuple[Provider, ...]:
    """Each backend of an op, the CPU's also with slower instruction sets.

    Args:
        prepare: of a backend.
        gpu: the backend of CUDA tensors.
        bf16: whether AVX-512 BF16 runs other code than AVX-512F.
        too_much: of providers by backend, "cpu[isa]" for all slower instruction sets.
    """
    isas = [isa for isa in slower_isas() if bf16 or isa != "avx512"]
    device = {"cpu": ("cpu",), gpu: ("cuda",)}

    def provider(backend: str, name: str, limits: str = "", **options: Any) -> Provider:
        if limit := (too_much or {}).get(limits or backend):
            options["too_much"] = limit
        devices = device.get(backend, ("cpu", "cuda"))
        return Provider(name, prepare(backend), devices=devices, ours=True, **options)

    return (
        provider("cpu", "titok_fast-cpu"),
        *(
            provider(
                "cpu",
                f"titok_fast-cpu[{isa}]",
                "cpu[isa]",
                setting=functools.partial(cpu_isa, isa),
            )
            for isa in isas
        ),
        provider(gpu, f"titok_fast-{gpu}"),
        provider("reference", "reference"),
    )


@dataclass(frozen=True)
class Bench:
    """One op: what to run, on what, and what the right answer is.

    Attributes:
        op: the op's name.
        cases: `cases(device type, quick)`.
        providers: the providers, ours and peers.
        inputs: the seeded inputs of a case.
        work: the (operations, bytes) that a case cannot do without: each input read once, each
            output written once.
        check: `check(case, output)` gives (wrong, checked) against float64.
        baseline: the provider that speed-ups refer to.
        slow: whether only `--bench-full` runs a case with a provider.
        figures: `figures(case, output)` gives further numbers of an answer to record.
    """

    op: str
    cases: Callable[[str, bool], list[Any]]
    providers: tuple[Provider, ...]
    inputs: Callable[[Any], tuple[Tensor, ...]]
    work: Callable[[Any], tuple[int, int]]
    check: Callable[[Any, Tensor], tuple[int, int]]
    baseline: str = "official"
    slow: Callable[[Any, Provider], bool] = lambda case, provider: provider.name == "reference"
    figures: Callable[[Any, Tensor], dict[str, float]] = lambda case, output: {}


@dataclass
class Row:
    """A line of the closing summary."""

    group: str
    provider: str
    baseline: str
    info: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    gate: str = "failed: interrupted"

    @property
    def name(self) -> str:
        return f"{self.group} {self.provider}"

    @property
    def contended(self) -> str | None:
        """That other processes took enough CPU during the timing to spoil it, in words."""
        return contention(self.info.get("other_cpus"))


def select(
    bench: Bench, on: Sequence[str], *, quick: bool = False, full: bool = False
) -> tuple[list[tuple[Any, Provider]], dict[str, str]]:
    """The cases and providers to run on the device types `on`, and why other providers are absent.

    A quick run leaves nothing out: its cases are small.
    """
    reasons = {provider.name: provider.absent(on) for provider in bench.providers}
    pairs = [
        (case, provider)
        for device in on
        for case in bench.cases(device, quick)
        for provider in bench.providers
        if device in provider.devices and reasons[provider.name] is None
        if quick or full or not bench.slow(case, provider)
    ]
    return pairs, {name: reason for name, reason in reasons.items() if reason is not None}


def run(
    bench: Bench,
    case: Any,
    provider: Provider,
    benchmark: Any,
    rows: list[Row],
    *,
    max_time: float,
    min_rounds: int,
    deadline: float = float("inf"),
) -> None:
    """Check, then time, one case with one provider, and leave a Row whatever happens.

    The first call compiles and is checked, the second gives the peak memory, the next few warm up
    and set the number of rounds, which the second does where it is slow. pytest-benchmark times
    the call up to the end of the device's work, with warm caches. Rates use the median: of these
    rounds on a CPU, of the colder `device_ms` on a GPU. After `deadline`, on the clock of
    `time.monotonic`, nothing is run.
    """
    row = Row(f"{bench.op} {case}", provider.name, bench.baseline)
    rows.append(row)

    def skip(gate: str) -> None:
        row.gate = gate
        pytest.skip(f"{provider.name}: {gate}")

    if time.monotonic() > deadline:
        row.gate = LATE
        pytest.skip(LATE)
    too_much = provider.too_much(case)
    if too_much is not None:
        skip(f"skipped: {too_much}")

    try:
        with provider.setting(), torch.no_grad():
            _measure(bench, case, provider, benchmark, row, max_time, min_rounds)
    except Exception as error:
        row.seconds = None
        row.gate = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if provider.ours:
            raise
        skip(row.gate)


def _measure(
    bench: Bench,
    case: Any,
    provider: Provider,
    benchmark: Any,
    row: Row,
    max_time: float,
    min_rounds: int,
) -> None:
    call = provider.prepare(case, *bench.inputs(case))
    output = call()
    synchronize(case.device)
    what = provider.relative or bench
    wrong, checked = what.check(case, output)
    row.gate = f"{wrong} wrong of {checked}" if wrong else f"exact ({checked})"
    if wrong and provider.ours:
        row.gate = f"failed: {row.gate}"
        pytest.fail(f"{row.name}: {row.gate}; not timed")

    figures = {} if provider.relative else bench.figures(case, output)
    del output
    started = time.perf_counter()
    extra_bytes = peak_extra_bytes(call, case.device)
    spent = time.perf_counter() - started
    target = timed(call, case.device)
    estimate = spent if spent > SLOW[-1][0] else _estimate(target)
    rounds = enough(estimate, max_time, min_rounds)
    benchmark.group, benchmark.name = row.group, provider.name
    others = other_cpus()
    benchmark.pedantic(target, rounds=rounds)
    if benchmark.disabled:
        return
    row.seconds = benchmark.stats.stats.median
    row.info = {
        "op": bench.op,
        "provider": provider.name,
        **case.info(),
        "wrong_indices": wrong,
        "checked_rows": checked,
        "threads": torch.get_num_threads(),
        "isa": isa(),
        "peak_extra_bytes": extra_bytes,
        "other_cpus": others(),
        **figures,
    }
    if provider.relative:
        row.info["relative"] = provider.relative.name
    device_seconds = row.seconds
    if case.device == "cuda":
        device_seconds = statistics.median(device_times(call, min(200, rounds)))
        row.info["device_ms"] = 1e3 * device_seconds
    flops, moved = what.work(case)
    dtype = provider.dtype or case.dtype
    row.info |= {
        "gemm_dtype": dtype_name(dtype),
        "gflops": flops / device_seconds / 1e9,
        "gbytes_per_s": moved / device_seconds / 1e9,
        "share_of_gemm_peak": flops / device_seconds / gemm_peak(case.device, dtype),
        "share_of_copy_peak": moved / device_seconds / copy_peak(case.device),
    }
    benchmark.extra_info.update(row.info)


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def is_lost(device: str) -> bool:
    """Whether an error of the device stays, so that this process can use it no more."""
    try:
        synchronize(device)
        return False
    except RuntimeError:
        return True


def timed(call: Call, device: str) -> Call:
    """`call` up to the end of the device's work."""
    if device != "cuda":
        return call

    def synchronized() -> Tensor:
        output = call()
        torch.cuda.synchronize()
        return output

    return synchronized


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _estimate(target: Call) -> float:
    """The least seconds of a few calls, which also warm up: 0.1 s of them, at most ten."""
    times = [seconds(target)]
    while sum(times) < 0.1 and len(times) < 10:
        times.append(seconds(target))
    return min(times)


def enough(estimate: float, max_time: float, least: int) -> int:
    """Rounds of a call that takes `estimate` seconds: for `max_time`, fewer of a slow one."""
    rounds = min(MAX_ROUNDS, max(least, int(max_time / estimate)))
    return next((min(rounds, few) for limit, few in SLOW if estimate > limit), rounds)


def device_times(call: Call, runs: int) -> list[float]:
    """Seconds between CUDA events around `call`, of so many runs.

    Before each run a buffer of twice the L2 cache is written, so that the inputs come from memory
    as they do in a model. The host queues the call while the device writes and then waits a
    millisecond: launch time does not count here, but where it is more than that. It does in
    pytest-benchmark's own figure, which is taken with a warm cache.
    """
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(runs):
        start, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        flush.zero_()
        torch.cuda._sleep(2_000_000)  # cycles
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


@functools.cache
def gemm_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square `torch.matmul` in `dtype`, the best of several runs.

    Of 16 bits that the CPU multiplies slower, float32's: widened, they are as fast.
    """
    if device == "cpu" and dtype in WIDENED:
        return gemm_peak(device, torch.float32)
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / _best_seconds(lambda: a @ b, device)


@functools.cache
def copy_peak(device: str) -> float:
    """Bytes/s, read and written, of a large `Tensor.copy_`, the best of several runs."""
    size = 2**30 if device == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(call: Call, device: str) -> float:
    target = timed(call, device)
    _estimate(target)  # a GPU's clocks rise
    return min(device_times(call, 8) if device == "cuda" else [seconds(target) for _ in range(8)])


def isa() -> str | None:
    """The instruction set that the compiled ops use now; None without them."""
    try:
        return str(inspect.extension().active_isa())
    except RuntimeError:
        return None


def over_budget(size: int) -> str | None:
    """Why `size` bytes beyond the inputs are too many, or None."""
    if size <= MEMORY_BUDGET:
        return None
    return f"needs {size / 2**30:.1f} GiB, over {MEMORY_BUDGET / 2**30:.0f} GiB"


def not_installed(distribution: str) -> str | None:
    try:
        version(distribution)
    except PackageNotFoundError:
        return f"{distribution} is not installed"
    return None


def machine(commit: str | None = None) -> dict[str, Any]:
    """What ran: processor, devices, versions and the state of the source tree.

    Args:
        commit: that of a source tree without git, as `git_state` takes it.
    """
    versions = inspect.versions()
    for name in ("pytest-benchmark", *PEERS):
        versions[name] = "not installed" if not_installed(name) else version(name)
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu_name": inspect.cpu_name(),
        "cpus": os.cpu_count(),
        "gpu_name": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_architecture": gpu_architecture(),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "isa": isa(),
        "load_average": os.getloadavg()[0],
        "versions": versions,
        "git": git_state(commit),
    }


def gpu_architecture() -> str | None:
    """Such as sm_90; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def peaks(cases: list[Case]) -> dict[str, float]:
    """The GEMM and copy rates of the devices of `cases`, measured in this process: what shares
    refer to, and the roofs of the roofline charts."""
    found = {}
    for device in dict.fromkeys(case.device for case in cases):
        own = [case.dtype for case in cases if case.device == device]
        for dtype in dict.fromkeys([torch.float32, torch.bfloat16, *own]):
            name = dtype_name(dtype)
            found[f"gemm_gflops {device} {name}"] = gemm_peak(device, dtype) / 1e9
        found[f"copy_gbytes_per_s {device}"] = copy_peak(device) / 1e9
    return found


def git_state(stated: str | None = None) -> dict[str, Any]:
    """Commit and whether anything but results differs from it.

    Args:
        stated: the commit of a copy that git knows nothing of; both are None without.
    """

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": stated, "dirty": None if stated is None else False}
    status = git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return {"commit": commit, "dirty": status != ""}


def host_kind() -> str:
    """The GPU's name, or the processor's and its instruction set, fit for a file name."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{inspect.cpu_name()} {isa() or ''}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def summary(rows: list[Row]) -> list[str]:
    """The closing table: per group the providers, fastest first."""
    lines: list[str] = []
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        members.sort(key=lambda row: row.seconds or float("inf"))
        base = next((row for row in members if row.provider == row.baseline), None)
        width = max(len(row.provider) for row in members)
        versus = f"x {members[0].baseline}"
        heads = f"{'median':>10}  {versus:>10}  {'GFLOP/s':>8}  {'of GEMM':>7}  {'extra':>10}"
        lines += ["", group, f"  {'':{width}}  {heads}  against float64"]
        for row in members:
            name = f"  {row.provider:{width}}"
            if row.seconds is None:
                lines.append(f"{name}  {row.gate}")
                continue
            ratio = "-"
            if base is not None and base.seconds is not None:
                unsure = "?" if row.contended or base.contended else ""
                ratio = f"{base.seconds / row.seconds:.2f}{unsure}"
            extra = row.info["peak_extra_bytes"]
            memory = "-" if extra is None else f"{extra / 2**20:.1f} MiB"
            lines.append(
                f"{name}  {1e3 * row.seconds:7.3f} ms  {ratio:>10}  {row.info['gflops']:8.1f}  "
                f"{row.info['share_of_gemm_peak']:7.1%}  {memory:>10}  {row.gate}"
            )
            if "device_ms" in row.info:
                lines[-1] += f", device {row.info['device_ms']:.3f} ms"
            if row.contended:
                lines[-1] += f", {row.contended}"
    return lines
