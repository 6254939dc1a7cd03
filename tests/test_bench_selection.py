"""Which rows a run takes, on fake devices, and that every goal's rows are among them."""

import importlib
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import goals, harness, run
from bench.harness import Bench, Case, Provider
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
    assert not any("K=1048576" in case for _, case, _ in some if device == "cpu")
    assert any("K=1048576" in case for _, case, _ in all_of_them)
    assert not any(provider == "reference" for *_, provider in some)


@pytest.mark.parametrize("goal", [g for g in goals.GOALS if g.machine], ids=lambda goal: goal.op)
def test_a_full_run_has_the_rows_of_every_goal(goal, monkeypatch):
    if f"bench_{goal.op}" not in BENCHES:
        pytest.skip(f"{goal.op} has no benchmark yet")
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


def test_a_gpu_run_says_in_one_line_that_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(run, "devices", lambda: ["cpu"])
    monkeypatch.setattr(run.subprocess, "run", lambda *args, **kwargs: pytest.fail("started"))
    assert run.main(["--gpu"]) == 2
    assert capsys.readouterr().err == "bench.run: --gpu: torch finds no CUDA device here\n"


def test_a_gpu_run_takes_eight_minutes_of_cuda_rows(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(run, "devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()

    def fake(command, cwd):
        seen.extend(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(run.subprocess, "run", fake)
    assert run.main(["--gpu", "-k", "L33"]) == 1
    assert {"--bench-device=cuda", "--bench-minutes=8", "-k", "L33"} <= set(seen)
    assert "--gpu" not in seen


def test_make_bench_gpu_asks_for_the_gpu():
    done = subprocess.run(["make", "-n", "bench-gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "-m bench.run --gpu" in done.stdout


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
