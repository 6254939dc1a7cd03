"""bench.report: what the documents say, what it refuses, and that the committed tables are true."""

import copy
import json
import subprocess

import pytest
from PIL import Image

from bench import figures, goals, report
from bench.plot import Axis, label
from bench.rows import Result, newest, words

MACHINE = {
    "cpu_name": "Some CPU",
    "cpus": 4,
    "threads": 2,
    "isa": "avx2",
    "gpu_name": "Some GPU",
    "versions": {"torch": "2.99", "triton": "3.99"},
    "git": {"commit": "0123456789abcdef", "dirty": False},
    "quick": False,
    "peaks": {
        "gemm_gflops cuda float32": 50000.4,
        "gemm_gflops cpu float32": 150.0,
        "copy_gbytes_per_s cpu": 30.0,
    },
    "absent": {"titok_fast-cuda": "needs cuda", "flash-kmeans": "not installed"},
}


def entry(provider, device, median, **info):
    return {
        "group": f"my_op N=32,K=4096 soft float32 {device}",
        "extra_info": {
            "op": "my_op",
            "provider": provider,
            "device": device,
            "N": 32,
            "K": 4096,
            "gflops": 1234.56,
            "gbytes_per_s": 12.5,
            "share_of_gemm_peak": 0.5,
            "peak_extra_bytes": 3 << 20,
            "other_cpus": 0.0,
            **info,
        },
        "stats": {"median": median},
    }


RESULT = {
    "datetime": "2030-01-02T03:04:05+00:00",
    "machine_info": MACHINE,
    "benchmarks": [
        entry("titok_fast-cpu", "cpu", 0.002, wrong_indices=0, checked_rows=1024),
        entry("titok_fast-cpu[portable]", "cpu", 0.004, peak_extra_bytes=2048),
        entry("official", "cpu", 0.5, wrong_indices=3, checked_rows=1024),
        entry("faiss", "cpu", 0.001, other_cpus=0.9, peak_extra_bytes=None),
        entry("titok_fast-triton", "cuda", 0.3, device_ms=0.05),
    ],
}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree with one document of each kind and one results file; returns the file's writer."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "docs" / "ops").mkdir(parents=True)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    regions = {
        "README.md": ["summary", "goals"],
        "docs/performance.md": ["rates", "performance"],
        "docs/ops/my_op.md": ["measured", "exactness", "scaling", "roofline"],
    }
    for name, names in regions.items():
        marks = [f"<!-- begin generated: {n} -->\nold\n<!-- end generated -->\n" for n in names]
        (tmp_path / name).write_text("# Title\n\n" + "between\n".join(marks) + "after\n")

    def write(change=None, name="some-gpu-2030-01-02.json"):
        result = copy.deepcopy(RESULT)
        if change:
            change(result)
        (tmp_path / "bench" / "results" / name).write_text(json.dumps(result))
        return tmp_path

    return write


@pytest.fixture
def a_goal(monkeypatch):
    """One goal, which the results file meets."""
    case = {"N": 32, "K": 4096}
    machine = goals.Machine("four CPUs", "cpu", lambda info: info["cpus"] == 4)
    goal = goals.Goal("my_op", machine, case, goals.Over("titok_fast-cpu"), at_least=200)
    late = goals.Goal("my_op", machine, {"N": 64}, goals.Over("titok_fast-cpu"), at_least=2)
    monkeypatch.setattr(goals, "GOALS", (goal, late))


def test_tables(tree, a_goal):
    root = tree()
    assert report.main([]) == 0
    readme = (root / "README.md").read_text()
    assert readme.startswith("# Title\n\n<!-- begin generated: summary -->\n\n**Some GPU,")
    assert readme.endswith("<!-- end generated -->\nafter\n") and "old" not in readme
    machine = "**Some GPU, Some CPU, avx2**: 4 CPUs, 2 threads, torch 2.99, triton 3.99, "
    machine += "2030-01-02, commit 0123456, "
    for text in (
        machine + "[`some-gpu-2030-01-02.json`](bench/results/some-gpu-2030-01-02.json)",
        "| `my_op`, cpu | N = 32, K = 4,096, soft, float32 | cpu 2.00 ms | 500 ms | "
        "faiss 1.00 ms† | 250x | 3 MiB / 3 MiB |",
        report.CONTENDED_NOTE,
        "| four CPUs | Some GPU, Some CPU, avx2 | 1 | 0 | 1 | [`some-gpu-2030-01-02.json`](bench/",
        "All 2 goals, each with its measured value",
        "|  | case | provider | quantity | goal | Some GPU, Some CPU, avx2 |",
        "| `my_op` | N = 32, K = 4,096 | `titok_fast-cpu` | speed-up over official | ≥ 200x | "
        "**250x** |",
        "| `my_op` | N = 64 | `titok_fast-cpu` | speed-up over official | ≥ 2.00x | not measured |",
        "No GPU has been measured yet. Compiled for, and never run on: sm_80, sm_90, sm_100, ",
    ):
        assert text in readme, readme
    assert "portable" not in readme

    page = (root / "docs/performance.md").read_text()
    for text in (
        machine + "[`some-gpu-2030-01-02.json`](../bench/results/some-gpu-2030-01-02.json)",
        "| N = 32, K = 4,096, soft, float32 | 2.00 ms | 500 ms | **1.00 ms†** | 250x | "
        "3 MiB / 3 MiB |",
        "| N = 32, K = 4,096, soft, float32 | **0.050 ms** | - | 3 MiB |",
        "\nAbsent: flash-kmeans (not installed).\n",
        "No run is on record yet.",
    ):
        assert text in page, page

    page = (root / "docs/ops/my_op.md").read_text()
    for text in (
        "](../../bench/results/some-gpu-2030-01-02.json)",
        "| N = 32, K = 4,096, soft, float32 | faiss | 1.00† | 1,234.6 | 50.0% |  | 0.50† | 0.25† |",
        "|  | titok_fast-cpu[portable] | 4.00 | 1,234.6 | 50.0% | 2 KiB | 2.00 | 1.00 |  |",
        "|  | official | 500 | 1,234.6 | 50.0% | 3 MiB | 250 | 125 | 3 of 1,024 |",
        "soft, float32 | titok_fast-triton | 0.050 | 300 | 1,234.6 |",
        "Peaks: gemm_gflops cuda float32 50,000.",
        "between",
        "No run is on record yet.",
        "![Rates below the measured roofs](my_op_roofline.png)",
    ):
        assert text in page, page
    assert (root / "docs/ops/my_op_roofline.png").stat().st_size > 1000
    assert report.main(["--check"]) == 0


def test_a_column_of_goals_for_each_machine_that_is_theirs(tree, a_goal):
    def other(result):
        result["machine_info"].update(gpu_name=None, cpu_name="Another")
        result["benchmarks"][0]["stats"]["median"] = 1.0
        result["datetime"] = "2030-01-01"

    def foreign(result):
        result["machine_info"].update(gpu_name=None, cpu_name="Foreign", cpus=5)

    tree(other, "another-2030-01-01.json")
    tree(foreign, "foreign-2030-01-05.json")
    root = tree(lambda result: result["machine_info"].update(gpu_name=None))
    assert report.main([]) == 0
    readme = (root / "README.md").read_text()
    for text in (
        "| four CPUs | Another, avx2 | 0 | 1 | 1 | [`another-2030-01-01.json`](bench/results/",
        "| four CPUs | Some CPU, avx2 | 1 | 0 | 1 | [`some-gpu-2030-01-02.json`](bench/results/",
        "| provider | quantity | goal | Another, avx2 | Some CPU, avx2 |",
        "| ≥ 200x | 0.50x, missed | **250x** |",
        "| ≥ 2.00x | not measured | not measured |",
    ):
        assert text in readme, readme
    assert "**Some CPU, avx2**" in readme and "**Another" not in readme  # the newest alone
    assert "Foreign" not in readme
    assert "**Foreign, avx2**" in (root / "docs/performance.md").read_text()


def test_goals_without_a_run(tree, monkeypatch):
    machine = goals.Machine("a GPU", "cuda", lambda info: False)
    goal = goals.Goal("my_op", machine, {}, goals.milliseconds("titok_fast-triton"), at_most=2)
    monkeypatch.setattr(goals, "GOALS", (goal,))
    root = tree()
    assert report.main([]) == 0
    readme = (root / "README.md").read_text()
    assert "| a GPU | nothing yet | 0 | 0 | 1 |  |" in readme
    assert "| `my_op` |  | `titok_fast-triton` | time | ≤ 2.00 ms | not measured |" in readme


def test_what_is_near_to_the_op_is_named_and_never_the_fastest(tree, a_goal):
    def add(result):
        near = entry("liger", "cpu", 0.0001, relative="linear cross-entropy")
        result["benchmarks"].append(near)
        result["machine_info"]["left_out"] = ["my_op N=64 cpu official"]
        result["machine_info"]["failed"] = {"my_op N=64 cpu faiss": "failed: out of memory"}

    root = tree(add)
    assert report.main([]) == 0
    page = (root / "docs/performance.md").read_text()
    assert "| liger (linear cross-entropy) |" in page and "| 0.100 ms |" in page
    assert "**1.00 ms†**" in page and "No time was left for 1 rows: my_op N=64 cpu official" in page
    assert "Failed, and not timed: my_op N=64 cpu faiss." in page
    readme = (root / "README.md").read_text()
    assert "liger" not in readme and "faiss 1.00 ms†" in readme
    assert "liger (linear cross-entropy)" in (root / "docs/ops/my_op.md").read_text()


def test_a_measured_architecture_is_not_called_compiled_only(tree):
    root = tree(lambda result: result["machine_info"].update(gpu_architecture="sm_90"))
    assert report.main([]) == 0
    readme = (root / "README.md").read_text()
    assert "Compiled for, and never run on: sm_80, sm_100, sm_120." in readme
    assert "No GPU has been measured" not in readme


def series(sizes):
    """Rows that differ in K, and a family of N too short for a chart."""
    return [
        entry(provider, "cpu", factor * k, K=k, N=n, **info)
        | {"group": f"my_op N={n},K={k} float32 cpu"}
        for k, n in [*((k, 32) for k in sizes), (sizes[0], 64)]
        for provider, factor, info in (
            ("titok_fast-cpu", 1e-6, {}),
            ("titok_fast-cpu[avx2]", 9e-6, {}),
            ("official", 3e-6, {"peak_extra_bytes": 1000 * k}),
        )
    ]


def test_scaling_takes_the_longest_series(tree):
    def of(sizes, day):
        def change(result):
            result["benchmarks"], result["datetime"] = series(sizes), day

        return change

    tree(of((1024, 2048, 4096), "2030-01-05"), "some-gpu-2030-01-05.json")
    root = tree(of((1024, 2048, 4096, 8192), "2030-01-04"), "other-2030-01-04.json")
    files = sorted((root / "bench/results").glob("*.json"))
    result, lines = figures.best_scaling(map(Result.load, files), "my_op")
    assert result.path.name == "other-2030-01-04.json" and list(lines) == ["K"]
    assert {name: [at for at, _ in pairs] for name, pairs in lines["K"].items()} == {
        name: [1024, 2048, 4096, 8192] for name in ("titok_fast-cpu", "official")
    }
    assert report.main([]) == 0
    page = (root / "docs/ops/my_op.md").read_text()
    assert "![Time and memory against the number of codes](my_op_scaling.png)" in page
    assert (root / "docs/ops/my_op_scaling.png").stat().st_size > 1000


def test_of_series_as_long_scaling_takes_that_with_more_rows(tree):
    def change(result):
        result["benchmarks"], result["datetime"] = series((1024, 2048, 4096)), "2030-01-01"

    def ours_alone(result):
        change(result)
        result["datetime"] = "2030-01-09"
        rows = result["benchmarks"]
        result["benchmarks"] = [r for r in rows if r["extra_info"]["provider"] != "official"]

    tree(ours_alone, "newer-2030-01-09.json")
    root = tree(change, "other-2030-01-01.json")
    files = map(Result.load, sorted((root / "bench/results").glob("*.json")))
    assert figures.best_scaling(files, "my_op")[0].path.name == "other-2030-01-01.json"


def test_images_per_second(tree, capsys):
    def add(result):
        for batch, seconds in ((1, 0.5), (64, 8.0)):
            for provider, factor in (("titok_fast-bfloat16", 1), ("official", 4)):
                row = entry(provider, "cpu", factor * seconds, B=batch, model="titok-l-32")
                row["group"] = f"generate B={batch} titok-l-32 float32 cpu"
                result["benchmarks"].append(row)

    root = tree(add)
    (_, device, models), *others = figures.rate_rows(
        [Result.load(root / "bench/results/some-gpu-2030-01-02.json")]
    )
    assert device == "cpu" and not others
    rates = {row.provider: figures.images_per_second(row) for row in models["titok-l-32"]}
    assert rates == {"titok_fast-bfloat16": 8.0, "official": 2.0}
    assert report.main([]) == 0
    picture = root / "docs/images_per_second.png"
    assert picture.stat().st_size > 1000 and report.main(["--check"]) == 0
    with Image.open(picture) as image:
        image.save(picture)  # as one drawn from other files
    assert report.main(["--check"]) == 1 and "per_second.png is not up" in capsys.readouterr().out
    assert "(docs/images_per_second.png)" in (root / "README.md").read_text()
    assert "(images_per_second.png)" in (root / "docs/performance.md").read_text()


def test_check_changes_nothing(tree, capsys):
    root = tree()
    before = (root / "README.md").read_text()
    assert report.main(["--check"]) == 1
    assert (root / "README.md").read_text() == before
    assert "README.md is not up to date" in capsys.readouterr().out


def test_the_newest_file_of_each_machine(tree):
    tree(name="some-gpu-2029-12-31.json")
    tree(lambda result: result["machine_info"].update(quick=True), "some-gpu-2030-01-03-quick.json")
    root = tree()
    (root / "bench/results/some-gpu-2029-12-31.json").write_text("not even JSON")
    tree(lambda result: result["machine_info"].update(cpu_name="Another"), "z-2030-01-01.json")
    assert report.main([]) == 0
    page = (root / "docs/performance.md").read_text()
    assert page.index("some-gpu-2030-01-02.json") < page.index("z-2030-01-01.json")


def test_exactness(tree):
    def counts(result):
        del result["benchmarks"]
        shape = {"K": 4096, "D": 12, "metric": "l2", "dtype": "float32", "device": "cpu"}
        shape |= {"queries": 9480, "wrong": 0, "rescored_mean": 16.04, "rescored_max": 32}
        result |= {"op": "my_op", "exactness": [shape]}

    tree(counts, "exactness-some-gpu-2030-01-02.json")
    root = tree()
    assert report.main([]) == 0
    page = (root / "docs/ops/my_op.md").read_text()
    line = "| K = 4,096, D = 12, l2, float32, cpu | 9,480 | 0 | 16.0 (0.39%) | 32 |"
    assert line in page and "(my_op_exactness.png)" in page
    assert (root / "docs/performance.md").read_text().count("**Some GPU") == 1


def test_profiles(tree, capsys):
    root = tree()
    (root / "bench/results/profiles").mkdir()
    path = root / "docs/performance.md"
    path.write_text(path.read_text().replace("generated: rates", "generated: profiles"))
    assert report.main([]) == 0 and "No run is on record yet." in path.read_text()
    ours = {"model": "titok-l-32", "mode": "eager", "steps": 8, "extrapolation": None}
    ours |= {"images_per_second": 0.5, "latency_seconds": 2.0, "speed_up": 200.0}
    ours["breakdown_seconds"] = {"transformer": 1.5, "step op": 0.5}
    ours |= {"measured_steps": 8, "measured_seconds": {"transformer": 1.5, "step op": 0.5}}
    ours["other_cpus"] = 0.0
    theirs = ours | {"model": "dit-xl-2", "speed_up": None, "extrapolation": "23 of 250 steps"}
    data = {"model": "titok-l-32", "baseline": "dit-xl-2", "image_size": 256, "batch_size": 1}
    data |= {"dtype": "float32", "device": "some CPU", "versions": {"torch": "9"}}
    data |= {"paper_speed_up": 169, "measurements": [ours, theirs]}
    (result,) = (root / "bench/results").glob("some-gpu-*.json")
    data["machine_info"] = json.loads(result.read_text())["machine_info"]
    for day in ("01", "02"):
        name = f"bench/results/profiles/some-cpu-titok-l-32-2030-01-{day}.json"
        (root / name).write_text(json.dumps(data))
    assert report.main([]) == 0
    page = path.read_text()
    assert "| `titok-l-32` | eager | 8 | 0.5 | 2 s | 200x | 169x | 1.5 s | 500 ms |  |  |" in page
    assert "| `dit-xl-2` | eager | 8, 23 of 250 steps | 0.5 | 2 s |  |  | 1.5 s | 500 ms" in page
    assert page.count("dit-xl-2, 256 px**: batch of 1, float32, some CPU, torch 9, 2030-01-02") == 1
    assert "titok-l-32-2030-01-01" not in page
    assert "float32, some CPU](profile.png)" in page
    assert (root / "docs/profile.png").stat().st_size > 1000 and report.main(["--check"]) == 0
    before = path.read_text()
    for key, value, refusal in (
        ("git", {"commit": "01", "dirty": True}, "was not a clean commit"),
        ("threads", None, "does not describe its machine: no threads"),
    ):
        changed = data | {"machine_info": data["machine_info"] | {key: value}}
        (root / name).write_text(json.dumps(changed))
        capsys.readouterr()
        assert report.main([]) == 2
        error = capsys.readouterr().err
        assert error.startswith("bench.report: some-cpu-titok-l-32-2030-01-02") and refusal in error
        assert path.read_text() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"git": {"commit": "01", "dirty": True}}, "was not a clean commit"),
        ({"git": {"commit": None, "dirty": None}}, "was not a clean commit"),
        ({"git": None}, "does not describe its machine: no git"),
        ({"cpu_name": ""}, "does not describe its machine: no cpu_name"),
        ({"quick": True}, "a quick run"),
    ],
)
def test_refuses(tree, capsys, change, words):
    root = tree(lambda result: result["machine_info"].update(change))
    before = (root / "README.md").read_text()
    assert report.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.report: some-gpu-2030-01-02.json: ") and words in error
    assert error.count("\n") == 1 and (root / "README.md").read_text() == before


def test_refuses_what_it_cannot_read(tree, capsys):
    root = tree(lambda result: result.pop("machine_info"))
    assert report.main([]) == 2 and "no cpu_name" in capsys.readouterr().err
    (root / "bench/results/some-gpu-2030-01-02.json").write_text("{")
    assert report.main([]) == 2 and capsys.readouterr().err.count("\n") == 1
    tree()
    (root / "README.md").write_text("<!-- begin generated: weather -->\n<!-- end generated -->\n")
    assert report.main([]) == 2 and "'weather'" in capsys.readouterr().err


def test_committed_documents_say_what_the_committed_results_say(capsys):
    listed = subprocess.run(
        ["git", "ls-files", ":(glob)bench/results/*.json"],
        cwd=report.ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    committed = [report.ROOT / name for name in listed.stdout.split()]
    files = newest(committed)
    assert files and report.main(["--check", *map(str, files)]) == 0, capsys.readouterr()


def test_an_option_of_two_words_is_one():
    info = {"filter": "top-p 0.9", "guidance": "no guidance", "device": "cpu"}
    group = "sample_token B=1,V=512 top-p 0.9 no guidance float32 cpu"
    expected = ["sample_token", "B=1,V=512", "top-p 0.9", "no guidance", "float32", "cpu"]
    assert words(group, info) == expected


def test_axes():
    narrow = Axis(15, 300, log=True)
    assert [label(tick) for tick in narrow.ticks()] == ["20", "50", "100", "200"]
    log = Axis(1e-12, 10, log=True)
    assert log.at(1e-12) == 0 and log.at(0) == 0 and log.at(10) == 1 and 0.5 < log.at(1e-5) < 0.6
    assert [label(tick) for tick in log.ticks()] == ["1e-12", "1e-9", "1e-6", "0.001", "1"]
    assert Axis(0, 270).ticks() == [0, 100, 200] and Axis(0, 17).ticks() == [0, 5, 10, 15]
    assert [label(t) for t in Axis(0.5, 2e6, log=True).ticks()] == ["1", "100", "10,000", "1e6"]
