"""A sampler's speed beside a diffusion model's."""

from pathlib import Path
from typing import Annotated

import typer

from titok_fast._files import write_json
from titok_fast.cli.common import (
    DEFAULT_MODEL,
    Device,
    Dtype,
    check_place,
    errors,
    flags,
    named_device,
    named_dtype,
    option,
    say,
    say_table,
)
from titok_fast.cli.profile_chart import draw_profile, duration
from titok_fast.images import write_png
from titok_fast.ops.arguments import dtype_name
from titok_fast.profiling import BASELINES, MODELS, Measurement, Profile
from titok_fast.profiling import profile as measure


def profile(
    model: Annotated[str, option(", ".join(MODELS))] = DEFAULT_MODEL,
    baseline: Annotated[str, option(f"{', '.join(BASELINES)}, or none.")] = "dit-xl-2",
    batch_size: Annotated[int, option("Images at a time.", min=1)] = 1,
    device: Device = "auto",
    dtype: Dtype = "float32",
    steps: Annotated[int | None, option("Sampling steps of the model.", "the model's")] = None,
    baseline_steps: Annotated[int, option("Sampling steps of the baseline.", min=1)] = 250,
    measured_steps: Annotated[
        int | None,
        option("Baseline steps that are run.", "as many as take some 45 s", min=1),
    ] = None,
    compile: Annotated[bool, option("Measure with torch.compile too.")] = True,
    pretrained: Annotated[
        bool, option("Load the released weights; time does not depend on them.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder of profile.json, profile.png and Chrome traces.",
            show_default=False,
        ),
    ] = None,
) -> None:  # fmt: skip
    """Measure a sampler, and a diffusion model beside it, on the same device."""
    if output is not None:
        check_place("--output", output / "profile.json")
    if baseline not in (*BASELINES, "none"):
        raise ValueError(f"--baseline: {baseline!r} is not one of {', '.join(BASELINES)}, none")
    with flags("model", "baseline", "steps", "measured_steps", path_or_hub_id="--model"):
        result = measure(
            model,
            baseline=None if baseline == "none" else baseline,
            batch_size=batch_size,
            device=named_device(device),
            dtype=named_dtype(dtype),
            steps=steps,
            baseline_steps=baseline_steps,
            measured_steps=measured_steps,
            compiled=compile,
            pretrained=pretrained,
            folder=output,
            notify=lambda text: say(text, errors),
        )
    say(headline(result))
    segments = list(dict.fromkeys(name for m in result.measurements for name in m.measured))
    head = ["model", "mode", "steps", "images/s", "latency", "speed-up", "paper", *segments]
    rows = [_cells(result, measurement, segments) for measurement in result.measurements]
    say_table([head, *rows], texts=(0, 1))
    if output is not None:
        write_json(output / "profile.json", _json(result))
        write_png(output / "profile.png", draw_profile(result, headline(result)))
        say(f"profile.json, profile.png and traces to {output}")


def headline(result: Profile) -> str:
    """What was measured, where."""
    against = "" if result.baseline is None else f" and {result.baseline}"
    return (
        f"{result.model}{against}: {result.image_size} x {result.image_size} px, batch of "
        f"{result.batch_size}, {dtype_name(result.dtype)}, {result.device}"
    )


def _cells(result: Profile, measurement: Measurement, segments: list[str]) -> list[str]:
    """A row of the table; what is said of a measurement stands behind its numbers."""
    speed_up, paper = result.speed_up(measurement), result.paper_speed_up
    breakdown = measurement.breakdown
    return [
        measurement.model,
        measurement.mode,
        str(measurement.steps),
        f"{measurement.images_per_second:.3g}",
        duration(measurement.latency),
        "-" if speed_up is None else f"{speed_up:.3g}x",
        "-" if speed_up is None or paper is None else f"{paper}x",
        *(duration(breakdown[name]) if name in breakdown else "-" for name in segments),
        measurement.note,
    ]


def _json(result: Profile) -> dict[str, object]:
    return {
        "model": result.model,
        "baseline": result.baseline,
        "image_size": result.image_size,
        "batch_size": result.batch_size,
        "dtype": dtype_name(result.dtype),
        "device": result.device,
        "versions": dict(result.versions),
        "paper_speed_up": result.paper_speed_up,
        "measurements": [
            {
                "model": measurement.model,
                "mode": measurement.mode,
                "steps": measurement.steps,
                "measured_steps": measurement.measured_steps,
                "extrapolation": measurement.extrapolation,
                "other_cpus": measurement.other_cpus,
                "measured_seconds": dict(measurement.measured),
                "breakdown_seconds": measurement.breakdown,
                "latency_seconds": measurement.latency,
                "images_per_second": measurement.images_per_second,
                "speed_up": result.speed_up(measurement),
            }
            for measurement in result.measurements
        ],
    }
