"""pytest-benchmark set up for this package: options, parametrization, JSON and the summary."""

from collections.abc import Callable
from typing import Any

import pytest

from bench import harness

ROWS = pytest.StashKey[list[harness.Row]]()
CASES = pytest.StashKey[list[harness.Case]]()
ABSENT = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-quick",
        action="store_true",
        help="smaller codebooks and fewer rounds: every path in under a minute, no figures to keep",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[CASES], config.stash[ABSENT] = [], [], {}
    given = [str(arg).partition("=")[0] for arg in config.invocation_params.args]
    defaults: dict[str, Any] = {
        "sort": "median",
        "columns": ["median", "iqr", "min", "max", "rounds"],
    }
    if config.getoption("bench_quick"):
        defaults |= {"max_time": 0.1, "min_rounds": 3}
    for name, value in defaults.items():
        if f"--benchmark-{name.replace('_', '-')}" not in given:
            setattr(config.option, f"benchmark_{name}", value)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not {"case", "provider"} <= set(metafunc.fixturenames):
        return
    bench: harness.Bench = metafunc.module.BENCH
    reasons = {provider.name: provider.absent() for provider in bench.providers}
    metafunc.config.stash[ABSENT].update({name: why for name, why in reasons.items() if why})
    pairs = [
        (case, provider)
        for device in harness.devices()
        for case in bench.cases(device, metafunc.config.getoption("bench_quick"))
        for provider in bench.providers
        if device in provider.devices and reasons[provider.name] is None
    ]
    words = str.maketrans({" ": "-", ",": "-", "=": None})  # so that -k can select them
    ids = [f"{case}-{provider.name}".translate(words) for case, provider in pairs]
    metafunc.parametrize(("case", "provider"), pairs, ids=ids)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`measure(BENCH, case, provider)`: the correctness gate, then the timing."""
    config = request.config

    def measure(bench: harness.Bench, case: harness.Case, provider: harness.Provider) -> None:
        harness.run(
            bench,
            case,
            provider,
            benchmark,
            config.stash[ROWS],
            max_time=float(config.getoption("benchmark_max_time")),
            min_rounds=int(config.getoption("benchmark_min_rounds")),
        )
        config.stash[CASES].append(case)

    return measure


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """In place of pytest-benchmark's own, which names the host."""
    return {
        **harness.machine(),
        "quick": config.getoption("bench_quick"),
        "peaks": harness.peaks(config.stash[CASES]),
        "absent": config.stash[ABSENT],
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
