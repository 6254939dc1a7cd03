"""pytest-benchmark set up for this package: options, parametrization, JSON and the summary."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from bench import goals, harness

ROWS = pytest.StashKey[list[harness.Row]]()
CASES = pytest.StashKey[list[harness.Case]]()
ABSENT = pytest.StashKey[dict[str, str]]()
DEADLINE = pytest.StashKey[float]()
LAST_ROW = 40.0  # seconds that the last row to start may need


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
    parser.addoption("--bench-device", choices=["cpu", "cuda"], help="one device instead of all")
    parser.addoption(
        "--bench-minutes",
        type=float,
        metavar="M",
        help="rows of a goal first; leave out, and name, those that would start too late",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[CASES], config.stash[ABSENT] = [], [], {}
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("bench_minutes") is None:
        return

    def of_no_goal(item: Any) -> bool:
        case, provider = (item.callspec.params[name] for name in ("case", "provider"))
        return not goals.asks_for({"op": item.module.BENCH.op, **case.info()}, provider.name)

    items.sort(key=of_no_goal)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`measure(BENCH, case, provider)`: the correctness gate, then the timing."""
    config = request.config

    def measure(bench: harness.Bench, case: harness.Case, provider: harness.Provider) -> None:
        config.stash[CASES].append(case)
        harness.run(
            bench,
            case,
            provider,
            benchmark,
            config.stash[ROWS],
            max_time=float(config.getoption("benchmark_max_time")),
            min_rounds=int(config.getoption("benchmark_min_rounds")),
            deadline=config.stash[DEADLINE],
        )

    return measure


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """In place of pytest-benchmark's own, which names the host."""
    return {
        **harness.machine(),
        "quick": config.getoption("bench_quick"),
        "full": config.getoption("bench_full"),
        "peaks": harness.peaks(config.stash[CASES]),
        "absent": config.stash[ABSENT],
        "left_out": [
            f"{row.group} {row.provider}" for row in config.stash[ROWS] if row.gate == harness.LATE
        ],
    }


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    state = harness.git_state()
    return {"id": state["commit"], "dirty": state["dirty"]}


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    for result in output_json["benchmarks"]:
        del result["params"]  # the fields of the case, in extra_info, as text
        result["stats"].pop("data", None)


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
