"""pytest-benchmark set up for this package: options, parametrization, JSON and the summary."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import goals, harness, record

ROWS = pytest.StashKey[list[harness.Row]]()
ABSENT = pytest.StashKey[dict[str, str]]()
DEADLINE = pytest.StashKey[float]()
LAST_ROW = 40.0  # seconds that the last row to start may need
LOST = 70  # exit code of a process whose device is of no more use


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-quick",
        action="store_true",
        help="smaller codebooks and fewer rounds: every path in about a minute, no figures to keep",
    )
    parser.addoption(
        "--bench-full",
        action="store_true",
        help="the slow rows too: the largest sizes, forced instruction sets, the references",
    )
    parser.addoption("--bench-goals", action="store_true", help="the rows of a goal alone")
    parser.addoption("--bench-device", choices=["cpu", "cuda"], help="one device instead of all")
    parser.addoption(
        "--bench-minutes",
        type=float,
        metavar="M",
        help="rows of a goal first; leave out, and name, those that would start too late",
    )
    parser.addoption(
        "--bench-record",
        type=Path,
        metavar="FILE",
        help="add each row to FILE as it ends; leave out those that it has",
    )
    parser.addoption(
        "--bench-commit", metavar="C", help="what a source tree without git is a copy of"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[ABSENT] = [], {}
    minutes = config.getoption("bench_minutes")
    seconds = float("inf") if minutes is None else 60 * minutes - LAST_ROW
    config.stash[DEADLINE] = time.monotonic() + seconds
    given = [str(arg).partition("=")[0] for arg in config.invocation_params.args]
    defaults: dict[str, Any] = {
        "sort": "median",
        "columns": ["median", "iqr", "min", "max", "rounds"],
        "max_time": 0.5,
    }
    if config.getoption("bench_quick"):
        defaults |= {"max_time": 0.1, "min_rounds": 3}
    for name, value in defaults.items():
        if f"--benchmark-{name.replace('_', '-')}" not in given:
            setattr(config.option, f"benchmark_{name}", value)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not {"case", "provider"} <= set(metafunc.fixturenames):
        return
    config = metafunc.config
    only = config.getoption("bench_device")
    pairs, absent = harness.select(
        metafunc.module.BENCH,
        [device for device in harness.devices() if only in (None, device)],
        quick=config.getoption("bench_quick"),
        full=config.getoption("bench_full"),
    )
    config.stash[ABSENT].update(absent)
    words = str.maketrans({" ": "-", ",": "-", "=": None})  # so that -k can select them
    ids = [f"{case}-{provider.name}".translate(words) for case, provider in pairs]
    metafunc.parametrize(("case", "provider"), pairs, ids=ids)


def row_of(item: Any) -> harness.Row:
    bench, (case, provider) = item.module.BENCH, case_and_provider(item)
    return harness.Row(f"{bench.op} {case}", provider.name, bench.baseline)


def case_and_provider(item: Any) -> tuple[harness.Case, harness.Provider]:
    return item.callspec.params["case"], item.callspec.params["provider"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("bench_record")
    if path:
        done = record.started(record.read(path))
        items[:] = [item for item in items if row_of(item).name not in done]

    def of_no_goal(item: Any) -> bool:
        case, provider = case_and_provider(item)
        return not goals.asks_for({"op": item.module.BENCH.op, **case.info()}, provider.name)

    def compiles(item: Any) -> bool:
        return case_and_provider(item)[1].name == "compiled"  # for seconds

    if config.getoption("bench_goals"):
        items[:] = [item for item in items if not of_no_goal(item)]
    if config.getoption("bench_minutes") is not None:
        items.sort(key=lambda item: (of_no_goal(item), compiles(item)))


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`measure(BENCH, case, provider)`: the correctness gate, then the timing."""
    config, path = request.config, request.config.getoption("bench_record")
    rows, quick = config.stash[ROWS], config.getoption("bench_quick")

    def measure(bench: harness.Bench, case: harness.Case, provider: harness.Provider) -> None:
        name = row_of(request.node).name
        if path and not rows:
            record.add(path, **head(request.session))
        if path:
            record.add(path, start=name)
        try:
            harness.run(
                bench,
                case,
                provider,
                benchmark,
                rows,
                max_time=0.0 if quick else float(config.getoption("benchmark_max_time")),
                min_rounds=1 if quick else int(config.getoption("benchmark_min_rounds")),
                deadline=config.stash[DEADLINE],
            )
        finally:
            if path:
                record.add(path, end=name, gate=rows[-1].gate, benchmark=timed(rows[-1], benchmark))
            if rows[-1].gate.startswith("failed") and harness.is_lost(case.device):
                pytest.exit(f"{name}: the device is lost", returncode=LOST)

    return measure


def timed(row: harness.Row, benchmark: Any) -> dict[str, Any] | None:
    """What pytest-benchmark says of a row, without the case, which extra_info has as text."""
    if row.seconds is None:
        return None
    result: dict[str, Any] = benchmark.stats.as_dict(include_data=False)
    del result["params"]
    return result


def head(session: pytest.Session) -> dict[str, Any]:
    """The first line of a record: the machine, its rates, and the rows to come."""
    config = session.config
    machine = {
        **harness.machine(config.getoption("bench_commit")),
        "quick": config.getoption("bench_quick"),
        "full": config.getoption("bench_full"),
        "peaks": harness.peaks([case_and_provider(item)[0] for item in session.items]),
        "absent": config.stash[ABSENT],
    }
    return {"machine": machine, "selected": [row_of(item).name for item in session.items]}


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """In place of pytest-benchmark's own, which names the host."""
    return harness.machine()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not config.stash[ROWS]:
        return
    terminalreporter.section("benchmark summary (medians)")
    for line in harness.summary(config.stash[ROWS]):
        terminalreporter.write_line(line)
    terminalreporter.write_line("")
    for name, reason in config.stash[ABSENT].items():
        terminalreporter.write_line(f"absent: {name}: {reason}")
