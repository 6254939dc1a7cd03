"""titok-fast profile and what it measures, on small models."""

import dataclasses
import json
import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from titok_fast import profiling
from titok_fast.cli.profile_chart import COLORS, OURS, draw_profile
from titok_fast.models import MaskGIT, TiTok
from titok_fast.models.generate import PAIRS, pack_pair
from titok_fast.profiling import (
    DE_TOKENIZER,
    GRAPH,
    MODELS,
    OTHER,
    SPEED_UPS,
    STEP_OP,
    TRANSFORMER,
    DiTConfig,
    Measurement,
    Profile,
    Stopwatch,
)

TINY = DiTConfig(layers=2, heads=2, head_dim=8, vae_channels=(32, 32, 32, 32))
CPU = torch.device("cpu")


@pytest.fixture
def small_baseline(monkeypatch):
    """A dit-xl-2 that takes milliseconds, where diffusers is installed."""
    pytest.importorskip("diffusers")
    monkeypatch.setitem(profiling.BASELINES, "dit-xl-2", TINY)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(profiling, "REPEATS_SECONDS", 0.0)
    monkeypatch.setattr(profiling, "other_cpus", lambda: lambda: 0.0)


def test_a_stopwatch_splits_the_whole_of_a_call(monkeypatch):
    class Work:
        clock = 0.0

        def wait(self, seconds):
            self.clock += seconds
            return seconds

        def other(self, seconds):
            return self.wait(seconds)

    work, watch = Work(), Stopwatch(CPU)
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: work.clock)
    watch.watch(work, "other", "timed")

    def call():
        assert work.other(2.0) == 2.0
        work.wait(16.0)
        work.other(4.0)
        with watch.segment("more"):
            work.wait(8.0)

    work.other(1.0)  # outside of a timed call
    for _ in range(2):
        assert watch.time(call) == {"timed": 6.0, "more": 8.0, OTHER: 16.0}


def measurement(model="titok-l-32", mode="eager", steps=8, measured_steps=8, batch_size=4, **parts):
    seconds = {TRANSFORMER: 3.0, STEP_OP: 0.5, DE_TOKENIZER: 0.25, OTHER: 0.25} | parts
    return Measurement(model, mode, batch_size, steps, measured_steps, seconds)


def test_what_was_not_run_is_extrapolated_and_said():
    whole = measurement()
    assert whole.extrapolation is None and whole.breakdown == whole.measured
    assert whole.latency == 4.0 and whole.images_per_second == 1.0
    part = measurement("dit-xl-2", steps=250, measured_steps=5)
    assert part.extrapolation == "extrapolated from 5 of 250 steps"
    assert part.breakdown == {TRANSFORMER: 150.0, STEP_OP: 25.0, DE_TOKENIZER: 0.25, OTHER: 12.5}
    assert part.latency == 187.75 and part.images_per_second == 4 / 187.75


def profile_of(*measurements, baseline="dit-xl-2"):
    return Profile(
        "titok-l-32", baseline, 256, 4, torch.bfloat16, "a GPU", {"torch": "2"}, measurements
    )


def test_speed_up_is_over_the_same_mode():
    ours = [measurement(), measurement(mode="compiled", transformer=1.0)]
    graph = dataclasses.replace(ours[1], mode="CUDA graph")
    theirs = [
        measurement("dit-xl-2", steps=10, transformer=39.0),
        measurement("dit-xl-2", "compiled", 10, 10, transformer=19.0),
    ]
    result = profile_of(*ours, graph, *theirs)
    assert result.speed_up(ours[0]) == theirs[0].latency / 4.0
    assert result.speed_up(ours[1]) == result.speed_up(graph) == 10.0
    assert result.speed_up(theirs[0]) is None and result.paper_speed_up == 169
    assert profile_of(*ours, baseline=None).speed_up(ours[0]) is None


def test_a_busy_machine_is_said(titok_fast, monkeypatch, tmp_path):
    monkeypatch.setattr(profiling, "other_cpus", lambda: lambda: 1.26)
    command = ("profile", "--model", "titok-digits", "--device", "cpu", "--no-compile")
    result = titok_fast(*command, "--baseline", "none", "--steps", 1, "-o", tmp_path)
    assert result.returncode == 0, result.err
    assert result.out.splitlines()[2].endswith("contended: 1.3 CPUs busy elsewhere")
    found = json.loads((tmp_path / "profile.json").read_text())["measurements"]
    assert [item["other_cpus"] for item in found] == [1.26]
    both = dataclasses.replace(measurement(steps=9), other_cpus=0.3)
    assert both.note == "extrapolated from 8 of 9 steps, contended: 0.3 CPUs busy elsewhere"
    assert dataclasses.replace(both, other_cpus=None).contended is None


def test_models_and_their_generators_fit():
    for name in MODELS:
        tokenizer = TiTok.releases[name].config["model"]["vq_model"]
        generator = MaskGIT.releases[PAIRS[name].generator].config["model"]
        assert generator["generator"]["image_seq_len"] == tokenizer["num_latent_tokens"]
        assert generator["vq_model"]["codebook_size"] == tokenizer["codebook_size"]
    assert SPEED_UPS["titok-l-64-512"] == 410 and SPEED_UPS["titok-b-128-512"] == 74
    assert SPEED_UPS["titok-s-128"] == 13 and SPEED_UPS.keys() < set(MODELS)
    with pytest.raises(ValueError, match="weights of maskgit-vit-l-64-512 were never released"):
        MaskGIT.from_pretrained("maskgit-vit-l-64-512")


def test_the_timed_sampler_gives_the_images_of_the_plain_one():
    sampler = profiling._TiTokSampler("titok-digits", 3, None, CPU, torch.float32, True)
    tokenizer = TiTok.from_pretrained("titok-digits")
    generator = MaskGIT.from_pretrained("maskgit-digits")
    pack_pair(tokenizer, generator)
    expected = tokenizer.decode(generator.generate([0, 1, 2]))
    actual = []
    seconds = sampler.watch.time(lambda: actual.append(sampler(8)))
    assert torch.equal(actual[0], expected) and sampler.steps == 8
    assert list(seconds) == [TRANSFORMER, STEP_OP, DE_TOKENIZER, OTHER]
    assert all(value > 0 for value in seconds.values())


def annotations(path):
    events = json.loads(path.read_text())["traceEvents"]
    return Counter(e["name"] for e in events if e.get("cat") == "user_annotation")


@pytest.mark.parametrize("measured_steps", [3, 5])
def test_command(titok_fast, small_baseline, tmp_path, measured_steps):
    result = titok_fast(
        "profile", "--model", "titok-digits", "--batch-size", 2, "--steps", 4, "--device", "cpu",
        "--baseline-steps", 5, "--measured-steps", measured_steps, "--no-compile",
        "-o", tmp_path / "new",
    )  # fmt: skip
    assert result.returncode == 0, result.err
    names = {"profile.json", "profile.png", "trace-titok-digits.json", "trace-dit-xl-2.json"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    first, head, ours, theirs, _ = result.out.splitlines()
    assert first.startswith("titok-digits and dit-xl-2: 32 x 32 px, batch of 2, float32, ")
    assert head.split()[:7] == [
        "model",
        "mode",
        "steps",
        "images/s",
        "latency",
        "speed-up",
        "paper",
    ]
    assert ours.split()[:3] == ["titok-digits", "eager", "4"] and "extrapolated" not in ours
    words = f"extrapolated from {measured_steps} of 5 steps"
    assert theirs.endswith(words) == (measured_steps < 5) == ("extrapolated" in result.out)

    found = json.loads((tmp_path / "new" / "profile.json").read_text())
    assert found["device"] in first and found["versions"]["torch"] == torch.__version__
    assert found["versions"]["diffusers"][0].isdigit() and found["paper_speed_up"] is None
    mine, other = found["measurements"]
    assert (mine["model"], mine["measured_steps"], mine["extrapolation"]) == (
        "titok-digits",
        4,
        None,
    )
    assert (other["model"], other["steps"]) == ("dit-xl-2", 5)
    assert other["extrapolation"] == (words if measured_steps < 5 else None)
    for item in (mine, other):
        assert set(item["breakdown_seconds"]) == {TRANSFORMER, STEP_OP, DE_TOKENIZER, OTHER}
        assert all(value > 0 for value in item["measured_seconds"].values())
        assert math.isclose(sum(item["breakdown_seconds"].values()), item["latency_seconds"])
        assert math.isclose(2 / item["latency_seconds"], item["images_per_second"])
    assert math.isclose(mine["speed_up"], other["latency_seconds"] / mine["latency_seconds"])
    assert f"{mine['speed_up']:.3g}x" in ours.split()

    counts = annotations(tmp_path / "new" / "trace-titok-digits.json")
    assert (counts[TRANSFORMER], counts[STEP_OP], counts[DE_TOKENIZER]) == (4, 4, 1)
    counts = annotations(tmp_path / "new" / "trace-dit-xl-2.json")
    run = 5 if measured_steps == 5 else 1
    assert (counts[TRANSFORMER], counts[STEP_OP], counts[DE_TOKENIZER]) == (run, run, 1)
    with Image.open(tmp_path / "new" / "profile.png") as picture:
        assert picture.width == 1040
        colors = {color for _, color in picture.getcolors(1 << 20)}
    assert {OURS, COLORS[TRANSFORMER], COLORS[DE_TOKENIZER]} <= colors


def test_compiled_runs_compile_both_models(small_baseline, monkeypatch):
    compiled = Counter()
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **_: compiled.update([type(module).__name__])
    )
    result = profiling.profile("titok-digits", steps=2, baseline_steps=2, batch_size=1)
    assert [(m.model, m.mode) for m in result.measurements] == [
        ("titok-digits", "eager"), ("titok-digits", "compiled"),
        ("dit-xl-2", "eager"), ("dit-xl-2", "compiled"),
    ]  # fmt: skip
    assert compiled["UViTBlock"] == 7 and compiled["ResidualAttentionBlock"] == 6
    assert compiled["BasicTransformerBlock"] == TINY.layers and compiled["Decoder"] == 1
    assert all(m.measured_steps == m.steps == 2 for m in result.measurements)


def test_the_number_of_measured_steps_fits_the_time(small_baseline, monkeypatch):
    monkeypatch.setattr(profiling, "BASELINE_SECONDS", 0.0)
    options = {"steps": 1, "baseline_steps": 4, "compiled": False}
    result = profiling.profile("titok-digits", **options)
    assert result.measurements[1].extrapolation == "extrapolated from 1 of 4 steps"
    monkeypatch.setattr(profiling, "BASELINE_SECONDS", 1e6)
    assert profiling.profile("titok-digits", **options).measurements[1].extrapolation is None


def test_without_diffusers(titok_fast, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    command = ("profile", "--model", "titok-digits", "--device", "cpu", "--no-compile")
    result = titok_fast(*command)
    assert result.returncode == 2 and len(result.err.strip().splitlines()) == 1
    assert (
        "--baseline: 'dit-xl-2' needs diffusers, run pip install 'titok_fast[profile]'"
        in result.err
    )
    alone = titok_fast(*command, "--baseline", "none", "--steps", 2)
    assert alone.returncode == 0, alone.err
    row = alone.out.splitlines()[2].split()
    assert row[:3] == ["titok-digits", "eager", "2"] and row.count("-") == 2  # speed-up, paper


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "titok-xxl"], "--model: 'titok-xxl' is not one of 'titok-l-32', 'titok-b-64'"),
        (["--baseline", "sdxl"], "--baseline: 'sdxl' is not one of dit-xl-2, none"),
        (
            ["--baseline-steps", "4", "--measured-steps", "5"],
            "--measured-steps: got 5, allowed is 1 ",
        ),
        (["--baseline", "none", "--steps", "0"], "--steps: got 0, allowed is a positive int"),
        (["--dtype", "int8"], "--dtype: 'int8' is not one of float32"),
        (["--device", "tpu9"], "--device: 'tpu9' is not auto, cpu, cuda"),
    ],
)
def test_errors_are_one_line(titok_fast, options, words):
    result = titok_fast("profile", "--model", "titok-digits", *options)
    assert result.returncode == 2 and words in result.err and not result.out
    lines = [line for line in result.err.strip().splitlines() if not line.endswith("building")]
    assert len(lines) == 1


def test_the_bars_are_as_long_as_their_shares():
    parts = {TRANSFORMER: 6.0, STEP_OP: 1.0, DE_TOKENIZER: 2.0, OTHER: 1.0}
    graph = Measurement(
        "titok-l-32", "CUDA graph", 4, 8, 8, {GRAPH: 0.3, DE_TOKENIZER: 0.1, OTHER: 0}
    )
    slow = measurement("dit-xl-2", steps=250, measured_steps=5)
    result = profile_of(measurement(**parts), graph, slow)
    pixels = np.asarray(draw_profile(result, "a title"))
    lengths = {
        name: (pixels == COLORS[name]).all(-1).sum(1) for name in (STEP_OP, DE_TOKENIZER, GRAPH)
    }
    bar = 1040 - 2 * 28 - 190  # of the whole
    for name, length in lengths.items():
        shares = [m.breakdown.get(name, 0.0) / m.latency for m in result.measurements]
        assert abs(length.max() - max(shares) * bar) <= 2, name


@pytest.mark.gpu
def test_gpu_measures_a_cuda_graph():
    result = profiling.profile("titok-digits", baseline=None, device="cuda", compiled=False)
    eager, graph = result.measurements
    assert eager.mode == "eager" and set(graph.measured) == {GRAPH, DE_TOKENIZER, OTHER}
    assert all(value > 0 for value in eager.measured.values())
    assert graph.measured[GRAPH] > 0 and graph.latency < eager.latency
