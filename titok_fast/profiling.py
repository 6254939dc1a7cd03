"""Where a sampler's time goes, and how it compares with a diffusion model on the same device."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function

from titok_fast._contention import contention, other_cpus
from titok_fast._files import replacing
from titok_fast.models import MaskGIT, TiTok, compile
from titok_fast.models.checks import replaced
from titok_fast.models.cuda_graphs import capture
from titok_fast.models.generate import PAIRS, pack_pair
from titok_fast.models.packed import packable
from titok_fast.ops import inspect

TRANSFORMER, STEP_OP, DE_TOKENIZER, OTHER = "transformer", "step op", "de-tokenizer", "other"
GRAPH = "transformer and step op"  # one CUDA graph, not timed within
REPEATS_SECONDS = 15.0  # a call is repeated while all take less
BASELINE_SECONDS = 45.0  # of a baseline's steps where their number is not given
GUIDANCE_SCALE = 4.0


# The paper's speed-ups over DiT-XL/2 of 250 steps at the same image size (arXiv 2406.07550): 101.6
# and 89.8 images/s against 0.6 in table 1; the text names the other three.
SPEED_UPS: Mapping[str, int] = {
    "titok-l-32": 169,
    "titok-b-64": 150,
    "titok-s-128": 13,
    "titok-l-64-512": 410,
    "titok-b-128-512": 74,
}

MODELS = tuple(name for name in PAIRS if name in TiTok.releases)


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a latent diffusion transformer (arXiv 2212.09748) and of its VAE."""

    layers: int
    heads: int
    head_dim: int
    vae_channels: tuple[int, int, int, int]  # Stable Diffusion's: an eighth of the image's side


BASELINES: Mapping[str, DiTConfig] = {"dit-xl-2": DiTConfig(28, 16, 72, (128, 256, 512, 512))}


@dataclass(frozen=True)
class Measurement:
    """What a batch takes.

    Attributes:
        model: a name in `MODELS` or `BASELINES`.
        mode: "eager", "compiled" or "CUDA graph".
        batch_size: images of the batch.
        steps: sampling steps of an image.
        measured_steps: those that were run.
        measured: seconds of each segment of that run, which add up to the whole of it.
        other_cpus: CPUs that other processes kept busy meanwhile; None where that is not known.
    """

    model: str
    mode: str
    batch_size: int
    steps: int
    measured_steps: int
    measured: Mapping[str, float]
    other_cpus: float | None = None

    @property
    def breakdown(self) -> dict[str, float]:
        """Seconds of each segment for all steps: all but the de-tokenizer grow with them."""
        return {
            name: seconds * (1 if name == DE_TOKENIZER else self.steps / self.measured_steps)
            for name, seconds in self.measured.items()
        }

    @property
    def latency(self) -> float:
        """Seconds from labels to images."""
        return sum(self.breakdown.values())

    @property
    def images_per_second(self) -> float:
        """Images of the batch by its latency."""
        return self.batch_size / self.latency

    @property
    def extrapolation(self) -> str | None:
        """What to say of it where not all steps were run."""
        if self.measured_steps == self.steps:
            return None
        return f"extrapolated from {self.measured_steps} of {self.steps} steps"

    @property
    def contended(self) -> str | None:
        """What to say of it where other processes kept the machine busy."""
        return contention(self.other_cpus)

    @property
    def note(self) -> str:
        """What to say beside its numbers, if anything."""
        return ", ".join(filter(None, (self.extrapolation, self.contended)))


@dataclass(frozen=True)
class Profile:
    """A model's measurements, and a baseline's of the same run.

    Attributes:
        model: a name in `MODELS`.
        baseline: a name in `BASELINES`, or None.
        image_size: height and width in pixels.
        batch_size: images of a batch.
        dtype: of the networks.
        device: in words.
        versions: of what ran.
        measurements: the model's, then the baseline's.
    """

    model: str
    baseline: str | None
    image_size: int
    batch_size: int
    dtype: torch.dtype
    device: str
    versions: Mapping[str, str]
    measurements: tuple[Measurement, ...]

    @property
    def paper_speed_up(self) -> int | None:
        """What the paper says of the model and DiT-XL/2."""
        return SPEED_UPS.get(self.model)

    def speed_up(self, measurement: Measurement) -> float | None:
        """Of a measurement of the model over the baseline's in its mode, or else its last one."""
        others = [other for other in self.measurements if other.model == self.baseline]
        if measurement in others or not others:
            return None
        same = [other for other in others if other.mode == measurement.mode]
        return (same or others)[-1].latency / measurement.latency


class Stopwatch:
    """Times the segments of a call: with CUDA events on a GPU, on a CPU with the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._running = False
        self._spans: list[tuple[str, Any, Any]] = []

    def watch(self, owner: object, method: str, name: str) -> None:
        """Makes a method of an object a segment of whatever call is timed."""
        function = getattr(owner, method)

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.segment(name):
                return function(*arguments, **options)

        setattr(owner, method, timed)

    @contextmanager
    def segment(self, name: str) -> Iterator[None]:
        """A part of the call that is timed; nothing outside of one."""
        if not self._running:
            yield
            return
        with record_function(name):
            start = self._now()
            yield
            self._spans.append((name, start, self._now()))

    def time(self, call: Callable[[], object]) -> dict[str, float]:
        """Seconds of each segment and of the rest of a call, up to the end of the device's work."""
        self._spans.clear()
        self._synchronize()
        self._running = True
        try:
            start = time.perf_counter()
            call()
            self._synchronize()
            total = time.perf_counter() - start
        finally:
            self._running = False
        found: dict[str, float] = {}
        for name, begin, end in self._spans:
            seconds = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            found[name] = found.get(name, 0.0) + seconds
        return found | {OTHER: total - sum(found.values())}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)


class _Sampler(Protocol):
    """From labels to images, with the number of steps that it takes."""

    name: str
    steps: int
    watch: Stopwatch

    def __call__(self, steps: int) -> object: ...

    def compile(self) -> None: ...


class _TiTokSampler:
    """MaskGIT and the de-tokenizer."""

    def __init__(
        self,
        name: str,
        batch_size: int,
        steps: int | None,
        device: torch.device,
        dtype: torch.dtype,
        pretrained: bool,
    ) -> None:
        self.name = name
        self.tokenizer: TiTok = _built(TiTok, name, device, dtype, pretrained)
        self.generator: MaskGIT = _built(MaskGIT, PAIRS[name].generator, device, dtype, pretrained)
        pack_pair(self.tokenizer, self.generator)
        self.steps = replaced(self.generator.sampling, "MaskGIT", steps=steps).steps
        self.labels = torch.arange(batch_size, device=device) % self.generator.num_classes
        self.watch = Stopwatch(device)
        self.watch.watch(self.generator, "_branches", TRANSFORMER)
        self.watch.watch(self.generator, "_step", STEP_OP)
        self.watch.watch(self.tokenizer, "decode", DE_TOKENIZER)

    def __call__(self, steps: int) -> Tensor:
        return self.tokenizer.decode(self.generator.generate(self.labels, steps=steps))

    def compile(self) -> None:
        for model in (self.generator, self.tokenizer):
            for layer in packable(model):
                layer.unpack()
            compile(model)

    def captured(self) -> Callable[[int], Tensor]:
        """The same with all steps, as two CUDA graphs."""
        seed, numbers = self.labels.new_zeros(()), torch.arange(len(self.labels)).to(self.labels)
        generate = self.generator.capture(len(self.labels), steps=self.steps)
        decode = capture(self.tokenizer.decode, generate(self.labels, seed, numbers))

        def run(steps: int) -> Tensor:
            with self.watch.segment(GRAPH):
                tokens = generate(self.labels, seed, numbers)
            with self.watch.segment(DE_TOKENIZER):
                return decode(tokens)

        return run


class _DiTSampler:
    """diffusers' pipeline for DiT with guidance, and its VAE decoder; generated weights."""

    def __init__(
        self,
        name: str,
        batch_size: int,
        steps: int,
        image_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        diffusers = _diffusers(name)
        size = BASELINES[name]
        with device:
            transformer = diffusers.DiTTransformer2DModel(
                num_layers=size.layers,
                num_attention_heads=size.heads,
                attention_head_dim=size.head_dim,
                in_channels=4,
                out_channels=8,
                patch_size=2,
                sample_size=image_size // 8,
                attention_bias=True,
                num_embeds_ada_norm=1000,
                norm_type="ada_norm_zero",
            )
            vae = diffusers.AutoencoderKL(
                block_out_channels=size.vae_channels,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
                sample_size=image_size,
            )
        self.pipeline = diffusers.DiTPipeline(
            transformer=transformer.to(dtype).eval(),
            vae=vae.to(dtype).to(memory_format=torch.channels_last).eval(),
            scheduler=diffusers.DDPMScheduler(clip_sample=False),
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.name, self.steps = name, steps
        self.labels = [i % 1000 for i in range(batch_size)]
        self.watch = Stopwatch(device)
        self.watch.watch(self.pipeline.transformer, "forward", TRANSFORMER)
        self.watch.watch(self.pipeline.scheduler, "step", STEP_OP)
        self.watch.watch(self.pipeline.vae, "decode", DE_TOKENIZER)

    def __call__(self, steps: int) -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.compile, about functions of diffusers
            return self.pipeline(
                class_labels=self.labels,
                guidance_scale=GUIDANCE_SCALE,
                num_inference_steps=steps,
                output_type="pt",
            )

    def compile(self) -> None:
        for block in self.pipeline.transformer.transformer_blocks:
            block.compile()
        self.pipeline.vae.decoder.compile()


def profile(
    model: str,
    *,
    baseline: str | None = "dit-xl-2",
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    steps: int | None = None,
    baseline_steps: int = 250,
    measured_steps: int | None = None,
    compiled: bool = True,
    pretrained: bool = False,
    folder: Path | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Measures a sampler, and a diffusion model beside it, in one run on one device.

    Args:
        model: a name in `MODELS`.
        baseline: a name in `BASELINES`, which needs diffusers, or None.
        batch_size: images at a time.
        device: of both.
        dtype: of both; `TiTok` keeps its search for codes in float32.
        steps: of the model; None is its own.
        baseline_steps: of the baseline.
        measured_steps: those of the baseline's steps that are run, the others being extrapolated;
            None runs as many as take some 45 seconds.
        compiled: measure with `torch.compile` too.
        pretrained: load the released weights; time does not depend on them.
        folder: gets a Chrome trace of each eagerly run model, the baseline's of one step.
        notify: is told what comes next.

    Returns:
        The measurements. Each is the median of runs of a warm call.

    Raises:
        ValueError: an unknown name, or a number out of range.
        RuntimeError: diffusers is missing.
    """
    _check(model, baseline, batch_size, baseline_steps, measured_steps)
    device = torch.device(device)
    versions = inspect.versions()
    if baseline is not None:
        versions["diffusers"] = _diffusers(baseline).__version__
    setting = _Setting(batch_size, device, dtype, compiled, folder, notify)
    image_size, found = _measure_model(setting, model, steps, pretrained)
    if baseline is not None:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        notify(f"{baseline}: building")
        sampler = _DiTSampler(baseline, batch_size, baseline_steps, image_size, device, dtype)
        found += _measure_modes(setting, sampler, measured_steps)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{inspect.cpu_name()}, {torch.get_num_threads()} threads"
    return Profile(model, baseline, image_size, batch_size, dtype, name, versions, tuple(found))


@dataclass(frozen=True)
class _Setting:
    """Arguments of `profile` that hold for both models."""

    batch_size: int
    device: torch.device
    dtype: torch.dtype
    compiled: bool
    folder: Path | None
    notify: Callable[[str], None]


def _measure_model(
    setting: _Setting, model: str, steps: int | None, pretrained: bool
) -> tuple[int, list[Measurement]]:
    """The image size, and the measurements in every mode; the networks are gone afterwards."""
    setting.notify(f"{model}: building")
    sampler = _TiTokSampler(
        model, setting.batch_size, steps, setting.device, setting.dtype, pretrained
    )
    found = _measure_modes(setting, sampler, sampler.steps)
    if setting.device.type == "cuda":
        setting.notify(f"{model}: CUDA graph")
        graph = sampler.captured()
        graph(sampler.steps)
        found.append(_measure(setting, sampler, graph, "CUDA graph", sampler.steps))
    return sampler.tokenizer.image_size, found


def _measure_modes(setting: _Setting, sampler: _Sampler, count: int | None) -> list[Measurement]:
    """Eager, with its trace, and compiled; `count` steps of each, or None for what time allows."""
    setting.notify(f"{sampler.name}: eager")
    sampler(2)  # the first step may have fewer images than the others
    if count is None:
        one = sampler.watch.time(lambda: sampler(1))
        affordable = int(BASELINE_SECONDS / (one[TRANSFORMER] + one[STEP_OP]))
        count = min(sampler.steps, max(1, affordable))
    found = [_measure(setting, sampler, sampler, "eager", count)]
    if setting.folder is not None:
        setting.notify(f"{sampler.name}: trace")
        _trace(sampler, setting.folder / f"trace-{sampler.name}.json", count)
    if setting.compiled:
        setting.notify(f"{sampler.name}: compiled")
        sampler.compile()
        sampler(2)
        found.append(_measure(setting, sampler, sampler, "compiled", count))
    return found


def _measure(
    setting: _Setting, sampler: _Sampler, run: Callable[[int], object], mode: str, count: int
) -> Measurement:
    """The median of warm runs of `count` steps, by their whole time."""
    others = other_cpus()
    runs = [sampler.watch.time(lambda: run(count))]
    repeats = int(REPEATS_SECONDS / sum(runs[0].values())) - 1
    runs += [sampler.watch.time(lambda: run(count)) for _ in range(min(repeats, 20))]
    runs.sort(key=lambda measured: sum(measured.values()))
    middle = runs[len(runs) // 2]
    return Measurement(
        sampler.name, mode, setting.batch_size, sampler.steps, count, middle, others()
    )


def _trace(sampler: _Sampler, path: Path, count: int) -> None:
    """A Chrome trace of all steps, or of one where not all are run."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its own start on stderr
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        sampler.watch.time(lambda: sampler(count if count == sampler.steps else 1))
    with replacing(path) as temporary:
        recorded.export_chrome_trace(str(temporary))


def _built(kind: Any, name: str, device: torch.device, dtype: torch.dtype, pretrained: bool) -> Any:
    if pretrained:
        return kind.from_pretrained(name, dtype=dtype, device=device)
    with device:
        model = kind.from_config(name)
    return model.to(memory_format=torch.channels_last).cast(dtype).eval()


def _diffusers(baseline: str) -> Any:
    try:
        diffusers: Any = importlib.import_module("diffusers")
    except ImportError:
        raise RuntimeError(
            f"baseline: {baseline!r} needs diffusers, run pip install 'titok_fast[profile]'"
        ) from None
    diffusers.utils.logging.set_verbosity_error()  # it warns of casts that change nothing
    return diffusers


def _check(
    model: str,
    baseline: str | None,
    batch_size: int,
    baseline_steps: int,
    measured_steps: int | None,
) -> None:
    for name, given, known in (("model", model, MODELS), ("baseline", baseline, BASELINES)):
        if given not in known and (name, given) != ("baseline", None):
            raise ValueError(f"{name}: {given!r} is not one of {', '.join(map(repr, known))}")
    for name, value in (("batch_size", batch_size), ("baseline_steps", baseline_steps)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, allowed is a positive int")
    if measured_steps is not None and not 1 <= measured_steps <= baseline_steps:
        raise ValueError(
            f"measured_steps: got {measured_steps}, allowed is 1 to baseline_steps {baseline_steps}"
        )
