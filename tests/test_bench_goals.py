"""Goals: values from one file's rows, and met, missed and not measured told apart."""

from pathlib import Path

import pytest

from bench import goals
from bench.goals import CPU, H200, LINEAR, Goal, Over
from bench.rows import Result

INFO = {
    "share_of_gemm_peak": 0.5,
    "share_of_copy_peak": 0.25,
    "gbytes_per_s": 2.0,
    "peak_extra_bytes": 3 << 20,
    "other_cpus": 0.0,
    "wrong_indices": 0,
}


def entry(provider, seconds, **info):
    info = {"op": "my_op", "provider": provider, "device": "cpu", "N": 32, **INFO, **info}
    return {
        "group": f"my_op N={info['N']} {info['device']}",
        "extra_info": info,
        "stats": {"median": seconds},
    }


def result(*entries, day=1, **machine):
    machine = {"isa": "avx512bf16", "threads": 2, "gpu_name": None, **machine}
    data = {"datetime": f"2030-01-0{day}", "machine_info": machine, "benchmarks": list(entries)}
    return Result(Path(f"{day}.json"), data)


OURS = entry("titok_fast-cpu", 0.25, relative_error=3e-5, B=8)
OFFICIAL = entry("official", 1.0, peak_extra_bytes=60 << 20, relative_error=6e-5)


def outcome(quantity, results, machine=CPU, case=None, **limit):
    return goals.outcome(Goal("my_op", machine, case or {"N": 32}, quantity, **limit), results)


def test_verdicts():
    one = [result(OURS, OFFICIAL)]
    speed_up = Over("titok_fast-cpu")
    met, missed = (outcome(speed_up, one, at_least=limit) for limit in (4, 4.5))
    assert (met.verdict, met.measured, met.value) == ("met", "4.00x", 4.0)
    assert (missed.verdict, missed.goal.threshold) == ("missed", "≥ 4.50x")
    for results in ([], [result(OURS)], [result(OFFICIAL)], [result(OURS, OFFICIAL, threads=16)]):
        nothing = outcome(speed_up, results, at_least=4)
        assert (nothing.verdict, nothing.value, nothing.measured) == ("not measured", None, "")
    other = outcome(speed_up, one, case={"N": 64}, at_least=4)
    assert other.verdict == "not measured" and other.goal.shape == "N = 64"
    assert outcome(speed_up, one, machine=H200, at_least=1).verdict == "not measured"
    assert outcome(goals.milliseconds("titok_fast-cpu"), one, at_most=250).verdict == "met"
    assert outcome(goals.milliseconds("titok_fast-cpu"), one, at_most=249).verdict == "missed"


@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        (goals.milliseconds("titok_fast-cpu"), 250.0),
        (goals.host_milliseconds("titok_fast-cpu"), 250.0),
        (goals.images_per_second("titok_fast-cpu"), 32.0),
        (goals.extra_memory("titok_fast-cpu"), 3.0),
        (goals.all_memory("titok_fast-cpu"), 3.0 + 0.5e9 / 2**20),
        (goals.share_of_gemm("titok_fast-cpu"), 0.5),
        (goals.share_of_copy("titok_fast-cpu"), 0.25),
        (goals.wrong("official"), 0.0),
        (goals.figure("titok_fast-cpu", "relative_error", "error"), 3e-5),
        (goals.figure("titok_fast-cpu", "tokens_equal", "tokens"), None),
        (Over("titok_fast-cpu", of=lambda row: row.extra), 20.0),
        (Over("titok_fast-cpu", of=lambda row: row.info.get("relative_error")), 2.0),
        (Over("titok_fast-cpu", of=lambda row: row.info.get("nothing")), None),
    ],
)
def test_quantities(quantity, value):
    assert outcome(quantity, [result(OURS, OFFICIAL)], at_most=1).value == pytest.approx(value)


def test_gpu_rows_count_device_time():
    ours = entry("titok_fast-triton", 0.5, device="cuda", device_ms=20.0)
    flash, best = (
        entry(f"sdpa-{name}", 0.1, device="cuda", device_ms=ms)
        for name, ms in (("flash", 90.0), ("cudnn", 30.0))
    )
    files = [result(ours, flash, best, gpu_name="NVIDIA H200")]
    fastest = outcome(Over("titok_fast-triton", "sdpa*"), files, H200, at_least=1.5)
    assert (fastest.verdict, fastest.measured) == ("met", "1.50x")
    assert fastest.goal.quantity.name == "speed-up over sdpa, the fastest"
    host = outcome(goals.host_milliseconds("titok_fast-triton"), files, H200, at_most=499)
    assert (host.verdict, host.measured) == ("missed", "500 ms")


def test_forced_instruction_sets_are_not_patterns():
    forced = entry("titok_fast-cpu[avx2]", 0.5)
    over = outcome(Over("titok_fast-cpu[avx2]"), [result(OURS, forced, OFFICIAL)], at_least=2)
    assert (over.verdict, over.value) == ("met", 2.0)


def test_growth_is_the_worst_step():
    def growth(*seconds):
        rows = [
            entry("titok_fast-cpu", t, N=n) for n, t in zip((10, 20, 40), seconds, strict=False)
        ]
        quantity = goals.Growth("titok_fast-cpu", "N", (10, 20, 40))
        return outcome(quantity, [result(*rows)], case={"device": "cpu"}, at_most=LINEAR)

    assert growth(1.0, 1.5, 3.0).verdict == "met" and growth(1.0, 1.5, 3.0).value == 1.0
    worst = growth(1.0, 3.0, 5.0)
    assert worst.verdict == "missed" and worst.value == pytest.approx(1.5)
    assert growth(1.0, 1.5).verdict == "not measured"


def test_sums_take_all_their_rows():
    tasks = [
        entry(name, seconds, task=task)
        for name, seconds, task in (
            ("titok_fast-cpu", 1.0, "encode"),
            ("titok_fast-cpu", 3.0, "decode"),
            ("official", 2.0, "encode"),
            ("official", 10.0, "decode"),
        )
    ]
    both = Over("titok_fast-cpu", each=({"task": "encode"}, {"task": "decode"}))
    assert outcome(both, [result(*tasks)], at_least=3).value == 3.0
    assert outcome(both, [result(*tasks[:3])], at_least=3).verdict == "not measured"


def test_the_newest_file_that_measured_it():
    slow = entry("titok_fast-cpu", 0.5)
    old, new = result(OURS, OFFICIAL, day=1), result(slow, OFFICIAL, day=2)
    found = outcome(Over("titok_fast-cpu"), [old, new], at_least=3)
    assert (found.value, found.result, found.verdict) == (2.0, new, "missed")
    assert outcome(Over("titok_fast-cpu"), [old, result(OURS, day=3)], at_least=3).result is old


def test_a_contended_row_is_marked():
    busy = entry("official", 1.0, other_cpus=0.9)
    found = outcome(Over("titok_fast-cpu"), [result(OURS, busy)], at_least=3)
    assert found.measured == "4.00x†" and found.verdict == "met"


def test_counted_asks_for_enough_queries():
    def counted(*shapes):
        file = result(isa="avx2")
        file.data.update(op="my_op", exactness=[{"queries": q, "wrong": w} for q, w in shapes])
        return outcome(goals.Counted(100), [file], machine=None, at_most=0).verdict

    assert counted((60, 0), (40, 0)) == "met"
    assert counted((60, 0), (40, 1)) == "missed"
    assert counted((60, 0), (39, 0)) == "not measured"


def test_the_list():
    keys = [
        (g.op, g.machine, repr(g.fields), g.quantity.providers, g.quantity.name)
        for g in goals.GOALS
    ]
    assert len(set(keys)) == len(keys) > 50
    for goal in goals.GOALS:
        assert (goal.at_least is None) != (goal.at_most is None), goal
        assert goal.shape and goal.quantity.name, goal
    ops = {goal.op for goal in goals.GOALS}
    assert {"nearest_code", "index_propagation", "attention", "maskgit_step"} <= ops
    assert {"sample_token", "titok", "maskgit", "generate", "ibq", "autoregressive"} <= ops
