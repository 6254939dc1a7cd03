"""What the GPU kernels compile to, on a machine without a GPU."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from titok_fast._files import write_json
from titok_fast.cli.common import check_place, errors, processors, say, say_table
from titok_fast.ops import inspect
from titok_fast.ops.inspect import KernelReport

FAULTY = 1  # exit code when a kernel spills or cannot launch
ARCHITECTURES = {f"sm_{capability}": capability for capability in inspect.CAPABILITIES}


def kernels(
    arch: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(ARCHITECTURES)}; repeat for several.", show_default="all"),
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(inspect.OPS)}; repeat for several.", show_default="all"),
    ] = None,
    main: Annotated[
        bool,
        typer.Option(
            "--main/--all", help="Only what decides each op's main shape, in seconds, or all."
        ),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for the same as JSON.", show_default=False)
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that compile.", show_default="processors, at most 8"),
    ] = None,
) -> None:
    """Compile the GPU kernels ahead of time: registers, spills, shared memory, occupancy."""
    capabilities = [ARCHITECTURES[name] for name in _known("--arch", arch, list(ARCHITECTURES))]
    ops = _known("--op", op, inspect.OPS)
    if json_file is not None:
        check_place("--json", json_file)
    start = time.perf_counter()
    configurations = inspect.triton_configurations(
        capabilities, [name for name in ops if name in inspect.TRITON_OPS], main=main
    )
    missing = inspect.why_not("cuda", "cuda")
    reports = [] if missing else inspect.cuda_report(capabilities, ops)
    compiled = inspect.kernel_report(configurations, jobs=jobs or min(8, processors()))
    reports += track(compiled, "compile", len(configurations), console=errors, transient=True)
    seconds = time.perf_counter() - start
    head = (
        "kernel", "arch", "warps", "registers", "spills", "shared", "blocks", "occupancy",
        "matrix instructions", "configuration",
    )  # fmt: skip
    say_table([head, *map(_cells, reports)], texts=(0, 1, 8, 9))
    if missing:
        say(f"CUDA C++: {missing}")
    faulty = [report for report in reports if report.faults]
    verdict = f"{len(faulty)} spill or cannot launch" if faulty else "no spills, all can launch"
    say(f"{len(reports)} kernels in {seconds:.1f} s: {verdict}")
    if json_file is not None:
        write_json(json_file, _json(reports, seconds))
    for report in faulty:
        name = f"{report.kernel} [{report.constants}] on sm_{report.capability}"
        say(f"{name} {' and '.join(report.faults)}", errors, style="red")
    if faulty:
        raise typer.Exit(FAULTY)


def _known(option: str, given: list[str] | None, allowed: Sequence[str]) -> Sequence[str]:
    for name in given or ():
        if name not in allowed:
            raise ValueError(f"{option}: {name!r} is not one of {', '.join(allowed)}")
    return list(dict.fromkeys(given or allowed))


def _cells(report: KernelReport) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for name, count in report.matrix_instructions.items():
        family = _family(name)
        counts[family] = counts.get(family, 0) + count
    waits = f", {report.matrix_waits} waits" if report.matrix_waits else ""
    return (
        report.kernel,
        f"sm_{report.capability}",
        str(-(-report.threads // 32)),
        str(report.registers),
        str(report.spilled_bytes),
        f"{report.shared_bytes:,}",
        str(report.blocks),
        f"{report.occupancy:.0%}",
        ", ".join(f"{count} {family}" for family, count in counts.items()) + waits or "-",
        report.constants,
    )


def _family(name: str) -> str:
    """The PTX instruction that machine code of this name comes from."""
    if name.startswith("UTC"):
        return "tcgen05.mma"
    return "wgmma" if name.endswith("GMMA") else "mma"


def _json(reports: Sequence[KernelReport], seconds: float) -> dict[str, object]:
    return {
        "versions": inspect.versions(),
        "seconds": seconds,
        "kernels": [
            {
                **asdict(report),
                "blocks": report.blocks,
                "occupancy": report.occupancy,
                "faults": report.faults,
            }
            for report in reports
        ],
    }
