"""Which rows a run takes, on fake devices, and that every goal's rows are among them."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import goals, harness, record, run
from bench.harness import Bench, Case, Provider
from bench.rows import DESCRIPTION
from titok_fast.testing import relative_error

ROOT = Path(__file__).resolve().parent.parent
# Imported here: several of these modules find out what the CPU has.
BENCHES = {
    path.stem: importlib.import_module(f"bench.{path.stem}").BENCH
    for path in sorted((ROOT / "bench").glob("bench_*.py"))
}


def selected(on, full=False):
    return [
        (bench, case, provider)
        for bench in BENCHES.values()
        for case, provider in harness.select(bench, on, full=full)[0]
    ]


@pytest.mark.parametrize("name", BENCHES)
def test_a_gpu_run_has_gpu_rows_alone(name):
    pairs, absent = harness.select(BENCHES[name], ["cuda"])
    assert pairs
    for case, provider in pairs:
        assert case.device == "cuda" and "cuda" in provider.devices and provider.name not in absent
    assert any(provider.ours for _, provider in pairs)
    for provider in BENCHES[name].providers:
        if "cuda" not in provider.devices:
            assert absent[provider.name] == "needs cpu"


def test_peers_of_the_gpu_run_where_installed(monkeypatch):
    monkeypatch.setattr(harness, "not_installed", lambda name: None)
    gpu = {provider.name for _, _, provider in selected(["cuda"])}
    peers = {"flash-kmeans", "liger", "cut-cross-entropy", "vector-quantize-pytorch"}
    assert peers | {f"sdpa-{name}" for name in ("flash", "efficient", "math", "cudnn")} <= gpu
    cpu = {provider.name for _, _, provider in selected(["cpu"])}
    assert {"faiss", "cut-cross-entropy", "sdpa-flash", "sdpa-math"} <= cpu
    assert not cpu & {"flash-kmeans", "liger", "sdpa-efficient", "sdpa-cudnn"}
    monkeypatch.setattr(harness, "not_installed", lambda name: f"{name} is not installed")
    gone = {}
    for bench in BENCHES.values():
        gone |= harness.select(bench, ["cuda"])[1]
    assert gone["flash-kmeans"] == "flash-kmeans is not installed"
    assert gone["liger"] == "liger-kernel is not installed"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_full_run_adds_the_slow_rows(device):
    def names(full):
        return {(b.op, str(case), p.name) for b, case, p in selected([device], full)}

    some, all_of_them = names(False), names(True)
    assert some < all_of_them
    if device == "cpu":
        assert {p for _, case, p in some if "K=1048576" in case} == {"titok_fast-cpu"}
    assert any("K=1048576" in case for _, case, _ in all_of_them)
    assert not any(provider == "reference" for *_, provider in some)


@pytest.mark.parametrize("goal", [g for g in goals.GOALS if g.machine], ids=lambda goal: goal.op)
def test_a_full_run_has_the_rows_of_every_goal(goal, monkeypatch):
    monkeypatch.setattr(harness, "not_installed", lambda name: None)
    rows = [
        ({"op": bench.op, **case.info()}, provider.name)
        for bench, case, provider in selected([goal.machine.device], full=True)
        if bench.op == goal.op
    ]
    for change in goal.quantity.each:
        for name in goal.quantity.providers:
            if "[" in name:  # an instruction set that this CPU may lack
                continue
            pattern = name.rstrip("*")
            assert any(
                goals.holds({**goal.fields, **change}, info) and provider.startswith(pattern)
                for info, provider in rows
            ), (goal, change, name)


def test_rows_of_a_goal_come_first():
    case = {"N": 1024, "K": 262144, "D": 256, "metric": "l2", "dtype": "bfloat16"}
    info = {"op": "nearest_code", "device": "cuda", **case}
    assert goals.asks_for(info, "titok_fast-triton")
    assert not goals.asks_for(info, "cdist")
    assert not goals.asks_for({**info, "K": 5}, "titok_fast-triton")
    assert not goals.asks_for({**info, "op": "attention"}, "titok_fast-triton")


def bench_of_one(calls):
    def prepare(case, x):
        return lambda: calls.append(1) or x

    return Bench(
        op="my_op",
        cases=lambda device, quick: [Case(device=device, dtype=torch.float32)],
        providers=(Provider("titok_fast-cpu", prepare, ours=True),),
        inputs=lambda case: (torch.zeros(1),),
        work=lambda case: (1, 1),
        check=lambda case, output: (0, 1),
    )


def test_nothing_starts_after_the_deadline():
    calls, rows = [], []
    bench = bench_of_one(calls)
    ((case, provider),) = harness.select(bench, ["cpu"])[0]
    with pytest.raises(pytest.skip.Exception):
        past = time.monotonic() - 1
        harness.run(bench, case, provider, None, rows, max_time=1, min_rounds=1, deadline=past)
    assert not calls and rows[0].gate == harness.LATE


def test_slow_calls_have_few_rounds(monkeypatch):
    calls = []
    bench = bench_of_one(calls)
    ((case, provider),) = harness.select(bench, ["cpu"])[0]
    monkeypatch.setattr(harness, "gemm_peak", lambda *args: 1.0)
    monkeypatch.setattr(harness, "copy_peak", lambda *args: 1.0)
    clock = iter(range(0, 1000, 11))  # every look at the clock is 11 s later
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    took = []
    benchmark = SimpleNamespace(
        pedantic=lambda target, rounds: took.append(rounds),
        disabled=False,
        stats=SimpleNamespace(stats=SimpleNamespace(median=11.0)),
        extra_info={},
    )
    harness.run(bench, case, provider, benchmark, [], max_time=1, min_rounds=5)
    assert took == [2] and len(calls) == 2  # the checked call and that for the memory


def test_a_failed_row_is_not_timed_and_a_peers_is_skipped(monkeypatch):
    def broken(case, x):
        raise RuntimeError("out of memory\nand more")

    for ours, outcome in ((True, RuntimeError), (False, pytest.skip.Exception)):
        bench = bench_of_one([])
        provider, rows = Provider("any", broken, ours=ours), []
        with pytest.raises(outcome):
            harness.run(bench, bench.cases("cpu", False)[0], provider, None, rows, max_time=1,
                        min_rounds=1)  # fmt: skip
        assert rows[0].gate == "failed: RuntimeError: out of memory" and rows[0].seconds is None


@pytest.mark.parametrize("option", ["--gpu", "--check"])
def test_a_gpu_run_says_in_one_line_that_there_is_none(monkeypatch, capsys, option):
    monkeypatch.setattr(run, "devices", lambda: ["cpu"])
    monkeypatch.setattr(run.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("started"))
    assert run.main(["--gpu", option]) == 2
    assert capsys.readouterr().err == "bench.run: --gpu: torch finds no CUDA device here\n"
    monkeypatch.setattr(run, "devices", lambda: ["cpu", "cuda"])
    assert run.main(["--gpu", "--check"]) == 0


def test_a_gpu_run_leaves_time_for_profiles_in_eight_minutes(monkeypatch, tmp_path):
    commands = []

    def watched(command, part, end, patience):
        commands.append(command)
        assert 389 < end - time.monotonic() <= 390 and patience == run.PATIENCE
        return 4

    monkeypatch.setattr(run, "devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(run, "watched", watched)
    assert run.main(["--gpu", "--into", str(tmp_path), "-k", "L33"]) == 4
    (command,) = commands
    assert {"--bench-device=cuda", "--bench-minutes=6.500", "-k", "L33"} <= set(command)
    assert not {"--gpu", "--into"} & set(command) and not list(tmp_path.iterdir())


def test_the_rows_after_a_crash_are_run_by_another_process(monkeypatch, tmp_path):
    """A row that fails, one that takes the process with it, and one that is stuck."""
    turns = iter(
        [
            [("a", "exact (1)"), ("b", "failed: wrong"), ("c", None)],  # and then nothing
            [("d", "skipped: too much"), ("e", None)],
            [("f", "exact (1)"), ("g", harness.LATE)],
        ]
    )

    def watched(command, part, end, patience):
        assert f"--bench-record={part}" in command
        turn = next(turns)
        record.add(part, machine={"cpu_name": "a CPU"}, selected=[*"abcdefgh"])
        for name, gate in turn:
            record.add(part, start=name)
            if gate is not None:
                timed = {"name": name} if gate.startswith("exact") else None
                record.add(part, end=name, gate=gate, benchmark=timed)
        if turn[-1][1] is None:
            with part.open("a") as file:
                file.write('{"cut o')
            return -9
        return 1

    monkeypatch.setattr(run, "watched", watched)
    monkeypatch.setattr(run, "host_kind", lambda: "a-cpu")
    assert run.main(["--into", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert [benchmark["name"] for benchmark in found["benchmarks"]] == ["a", "f"]
    machine = found["machine_info"]
    assert machine["cpu_name"] == "a CPU" and machine["left_out"] == ["g", "h"]
    assert machine["failed"] == {"b": "failed: wrong", "c": record.CRASHED, "e": record.CRASHED}


def test_the_median_visit_is_kept(monkeypatch, tmp_path):
    """Row "a" was slow once, "b" is no goal's, and "c" was wrong in its second visit."""
    visits = [{"a": 9.0, "b": 5.0, "c": 1.0, "d": 1.0}, {"a": 2.0, "c": None}]
    visits.append({"a": 3.0, "c": 1.5, "d": 1.5})
    turns, commands = iter(visits), []

    def watched(command, part, end, patience):
        commands.append(command)
        record.add(part, machine={}, selected=[*"abcd"])
        for name, seconds in next(turns).items():
            timed = {"name": name, "stats": {"median": seconds}, "extra_info": {}}
            record.add(part, start=name)
            record.add(part, end=name, gate="exact (1)" if seconds else "failed: wrong",
                       benchmark=timed if seconds else None)  # fmt: skip
        return 1 if None in visits[len(commands) - 1].values() else 0

    monkeypatch.setattr(run, "watched", watched)
    monkeypatch.setattr(run, "host_kind", lambda: "a-cpu")
    assert run.main(["--into", str(tmp_path), "--visits", "3", "-k", "K4096"]) == 1
    goals_alone = ["--bench-goals" in command for command in commands]
    assert goals_alone == [False, True, True] and all(c[-2:] == ["-k", "K4096"] for c in commands)
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert found["machine_info"]["failed"] == {"c": "failed: wrong"}
    a, b, d = found["benchmarks"]
    assert a["stats"]["median"] == 3.0 and a["extra_info"] == {"visits_ms": [9e3, 2e3, 3e3]}
    assert b["stats"]["median"] == 5.0 and b["extra_info"] == {}
    assert d["stats"]["median"] == 1.0  # of two, the lower


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--visits=0"], "1 or more, got 0"), (["--gpu", "--visits=2"], "1 with")],
)
def test_visits_that_cannot_be(capsys, options, words):
    assert run.main(options) == 2
    assert capsys.readouterr().err.startswith(f"bench.run: --visits: must be {words}")


def test_rows_of_a_goal_alone(tmp_path):
    """What the further visits collect."""
    command = [sys.executable, "-m", "pytest", "bench/bench_nearest_code.py", "--collect-only",
               "-q", "--bench-goals", "--bench-device=cpu"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if "::" in line]
    assert any("official" in row for row in rows) and any("titok_fast-cpu" in row for row in rows)
    assert not any("vector-quantize" in row for row in rows)


def test_a_process_that_is_stuck_is_killed(tmp_path):
    part, soon = tmp_path / "part", time.monotonic() + 60
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert run.watched(sleep, part, soon, patience=0.3) == -9
    assert run.watched(sleep, part, time.monotonic() + 0.3, patience=60) == -9
    assert run.watched([sys.executable, "-c", "raise SystemExit(3)"], part, soon, 60) == 3
    assert time.monotonic() < soon


def test_a_record_outlives_the_process(tmp_path):
    """The real thing: a provider of ours raises, and the official one takes the process along."""
    (tmp_path / "faults.py").write_text(
        "import os\n"
        "from bench import harness\n"
        "measure = harness._measure\n"
        "def faulty(bench, case, provider, *rest):\n"
        "    if provider.name == 'official':\n"
        "        os._exit(9)\n"
        "    if provider.name == 'reference':\n"
        "        raise RuntimeError('broken')\n"
        "    measure(bench, case, provider, *rest)\n"
        "harness._measure = faulty\n"
    )
    command = [sys.executable, "-m", "bench.run", "--into", tmp_path / "new", "--bench-quick",
               "--bench-device=cpu", "-k", "maskgit_step and not compiled", "-p", "faults",
               "--bench-commit=0123"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (path,) = (tmp_path / "new").iterdir()
    found = json.loads(path.read_text())
    machine, benchmarks = found["machine_info"], found["benchmarks"]
    gates = {name.split()[-1]: gate for name, gate in machine["failed"].items()}
    assert gates == {"official": record.CRASHED, "reference": "failed: RuntimeError: broken"}
    assert machine["quick"] and "copy_gbytes_per_s cpu" in machine["peaks"]
    assert benchmarks and not machine["left_out"] and path.stem.endswith("-quick")
    for benchmark in benchmarks:
        assert benchmark["stats"]["median"] > 0 and benchmark["extra_info"]["gflops"] > 0
    assert done.returncode == 1 and f"{len(benchmarks)} rows" in done.stdout


def test_a_copy_without_git_has_the_commit_that_is_stated(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert harness.git_state() == {"commit": None, "dirty": None}
    assert harness.git_state("0123") == {"commit": "0123", "dirty": False}


def test_make_bench_gpu_asks_for_the_gpu():
    done = subprocess.run(["make", "-n", "bench-gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    check, extra, run = (done.stdout.find(words) for words in ("--check", "[bench-gpu]", "--gpu\n"))
    assert 0 <= check < run and extra in range(check, run)


@pytest.mark.parametrize("task", ["encode", "decode"])
def test_the_official_ibq_stays_as_its_images_lie(task):
    """Its network has no memory format but the default, and the answer of ours."""
    bench = importlib.import_module("bench.bench_ibq")
    (case,) = (case for case in bench.cases("cpu", quick=True) if case.task == task)
    (x,) = bench.inputs(case)
    model, seen = bench.official_model(case, torch.float32), []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    run = bench.official_encode if task == "encode" else bench.official_decode
    with torch.no_grad():
        actual = run(model, x)
    assert len(seen) > 40 and all(tensor.is_contiguous() for tensor in seen)
    expected = getattr(bench.model_of(case.model, "cpu"), task)(x)
    assert relative_error(actual, expected) < 1e-5


def test_a_profile_is_kept_with_its_machine(tmp_path):
    options = ["--model", "titok-digits", "--baseline", "none", "--steps", "1", "--no-compile"]
    command = [sys.executable, "-m", "bench.profile", "--into", tmp_path, *options]
    done = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "profiles").iterdir()
    assert path.name == f"{harness.host_kind()}-titok-digits-{date.today()}.json"
    found = json.loads(path.read_text())
    assert found["model"] == "titok-digits" and found["measurements"][0]["latency_seconds"] > 0
    assert set(DESCRIPTION) <= found["machine_info"].keys()
    done = subprocess.run([*command, "--steps", "x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(list((tmp_path / "profiles").iterdir())) == 1


def test_a_wrong_answer_of_ours_is_not_timed():
    rows = []
    bench = dataclasses.replace(bench_of_one([]), check=lambda case, output: (1, 2))
    ((case, provider),) = harness.select(bench, ["cpu"])[0]
    with pytest.raises(pytest.fail.Exception, match="1 wrong of 2; not timed"):
        harness.run(bench, case, provider, None, rows, max_time=1, min_rounds=1)
    assert (rows[0].gate, rows[0].seconds) == ("failed: 1 wrong of 2", None)


def test_what_is_too_much_is_not_run():
    calls, rows = [], []
    bench = bench_of_one(calls)
    ((case, provider),) = harness.select(bench, ["cpu"])[0]
    provider = dataclasses.replace(provider, too_much=lambda case: "needs 20.0 GiB")
    with pytest.raises(pytest.skip.Exception):
        harness.run(bench, case, provider, None, rows, max_time=1, min_rounds=1)
    assert not calls and rows[0].gate == "skipped: needs 20.0 GiB"
