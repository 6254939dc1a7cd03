"""A generator of token files' tokens, or a tokenizer of images."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
import torch.distributed as dist
import typer

from titok_fast._distributed import rank_and_size
from titok_fast._files import write_json
from titok_fast.cli.common import (
    Device,
    check_place,
    check_seed,
    default_workers,
    flag,
    flags,
    named_device,
    option,
    say,
    with_options,
)
from titok_fast.cli.runs import Setting, check_settings, locked
from titok_fast.images import ImageFile, find_images
from titok_fast.models import ARTransformer, IBQTokenizer, MaskGIT, MaskGITVQGAN, TiTok, compile
from titok_fast.models.auto import (
    TOKENIZERS,
    Tokenizer,
    load_tokenizer,
    model_class,
    releases,
)
from titok_fast.models.checks import DECAY, NUMBER, check_kind, found_at
from titok_fast.models.generate import Generator
from titok_fast.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, locate
from titok_fast.tokens import (
    SUFFIXES,
    TokenFile,
    concatenated,
    difference,
    fingerprint,
    raw_bytes,
)
from titok_fast.training import generator, tokenizer
from titok_fast.training.adversary import Adversary, AdversaryOptions
from titok_fast.training.generator import GeneratorTask, generator_config
from titok_fast.training.loop import Optimization
from titok_fast.training.perceptual import KINDS as PERCEPTUAL_KINDS
from titok_fast.training.perceptual import Perceptual
from titok_fast.training.run import MODELS_FOLDER, STATE_FILE, Options, Task, run
from titok_fast.training.tokenizer import (
    TokenizerTask,
    loss_options,
    predicts_proxies,
    tokenizer_config,
)

Trained: TypeAlias = Generator | Tokenizer
Data: TypeAlias = TokenFile | list[ImageFile]
KINDS: tuple[type[Trained], ...] = (MaskGIT, ARTransformer, TiTok, IBQTokenizer)
RECIPES: dict[Any, tuple[Optimization, Options]] = {**generator.RECIPES, **tokenizer.RECIPES}
LOSSES: dict[Any, Any] = {MaskGIT: generator.Losses(), **tokenizer.LOSSES}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
SETTINGS_FILE = "training.json"
LOCK_FILE = ".lock"
NO_SETTINGS = ("betas", "save_every", "keep_every", "evaluate_every", "log_every")
THE_MODELS = "the model's"
VQGAN = next(iter(MaskGITVQGAN.releases))


def train(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="For a generator token files; for a tokenizer images, folders, quoted patterns, "
            "or @list.txt with a path a line.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the model.")],
    model: Annotated[
        str | None,
        option("A new network, such as maskgit-vit-l-32, ibq-ar-b or titok-l-32.", False),
    ] = None,
    init: Annotated[
        str | None, option("Go on from a model: its name, folder, file or hub id.", False)
    ] = None,
    steps: Annotated[int | None, option("Steps of the optimizer.", THE_MODELS)] = None,
    batch_size: Annotated[
        int | None, option("Images of a step, over all processes.", THE_MODELS)
    ] = None,
    micro_batch_size: Annotated[
        int | None,
        option("Gradient accumulation: images that a process takes at a time.", "all of its share"),
    ] = None,
    learning_rate: Annotated[
        float | None, option("What warm-up and cosine take a share of.", THE_MODELS)
    ] = None,
    warmup_steps: Annotated[
        int | None,
        option(
            "Steps over which the learning rate rises.", "the model's, at most a tenth of --steps"
        ),
    ] = None,
    final_fraction: Annotated[
        float | None, option("Part of the learning rate at which the cosine ends.", THE_MODELS)
    ] = None,
    beta1: Annotated[float | None, option("AdamW's.", THE_MODELS)] = None,
    beta2: Annotated[float | None, option("AdamW's.", THE_MODELS)] = None,
    weight_decay: Annotated[float | None, option("AdamW's, of matrices.", THE_MODELS)] = None,
    clip_norm: Annotated[float | None, option("Largest norm of the gradient.", "1")] = None,
    average_decay: Annotated[
        float | None, option("Decay of the weights' moving average (EMA); 0 for none.", THE_MODELS)
    ] = None,
    label_dropout: Annotated[
        float | None,
        option("Labels left out, for guidance (MaskGIT).", "the model's, 0.1"),
    ] = None,
    label_smoothing: Annotated[
        float | None, option("Probability spread over all tokens (MaskGIT).", "0.1")
    ] = None,
    unmasked_weight: Annotated[
        float | None, option("Weight of tokens that the model can see (MaskGIT).", "0.1")
    ] = None,
    pixel_loss: Annotated[str | None, option("l1 or l2 (tokenizers).", "l2, of IBQ l1")] = None,
    quantizer_weight: Annotated[
        float | None, option("Weight of the quantizer's loss (tokenizers).", "1, of IBQ 0.5")
    ] = None,
    entropy_weight: Annotated[
        float | None, option("Weight of the loss of entropies (IBQ).", "0.025")
    ] = None,
    kl_weight: Annotated[
        float | None, option("Weight of a VAE's divergence (TiTok).", "1e-6")
    ] = None,
    perceptual: Annotated[
        list[str] | None,
        option("Added to the error of pixels: lpips, convnext_s, or each once.", "none"),
    ] = None,
    perceptual_weight: Annotated[
        list[float] | None,
        option("Weight of each --perceptual.", "lpips 1, convnext_s 0.1, of IBQ half"),
    ] = None,
    proxy: Annotated[
        str | None, option("Of TiTok's first stage: the VQGAN, as --init takes it.", VQGAN)
    ] = None,
    second_stage: Annotated[
        bool, typer.Option("--second-stage", help="Of a first-stage TiTok of --init: pixels.")
    ] = False,
    adversarial_weight: Annotated[
        float | None,
        option("Weight of a discriminator's verdict on pixels (tokenizers).", "no discriminator"),
    ] = None,
    adversarial_loss: Annotated[
        str | None, option("What is made of the verdict: hinge or non-saturating.", "hinge")
    ] = None,
    adversarial_adaptive: Annotated[
        bool | None,
        typer.Option(
            "--adversarial-adaptive/--no-adversarial-adaptive",
            help="Multiply it by the quotient of gradients at the last layer, as VQGANs do.",
            show_default="off",
        ),
    ] = None,
    adversarial_start: Annotated[
        int | None, option("Step at which the discriminator begins.", "20,000")
    ] = None,
    lecam_weight: Annotated[
        float | None, option("Weight of the discriminator's regularisation.", "0.001")
    ] = None,
    discriminator_learning_rate: Annotated[
        float | None, option("The discriminator's.", "1e-4")
    ] = None,
    seed: Annotated[int, option("Of weights, order, masks, crops and dropout.")] = 0,
    dtype: Annotated[
        str, option("float32, or bfloat16 for mixed precision: weights stay float32.")
    ] = "float32",
    device: Device = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Threads that make batches ready; 0 for none.",
            show_default="for images by processors, for tokens 0",
        ),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile its blocks.")] = False,
    held_out: Annotated[
        list[str] | None,
        option("Validation data: PATHS not trained on.", "none"),
    ] = None,
    evaluate_every: Annotated[
        int | None, option("Steps between two evaluations of --held-out.", "as --save-every")
    ] = None,
    samples_with: Annotated[
        str | None,
        option("Decodes what a generator makes at an evaluation: as --init.", "none"),
    ] = None,
    save_every: Annotated[
        int, option("Steps between two checkpoints, each in place of the last.")
    ] = 1000,
    keep_every: Annotated[
        int | None, option("Steps between two models that stay, in DIR/models.", "none")
    ] = None,
    log_every: Annotated[int, option("Steps between two lines of the log.")] = 50,
) -> None:
    """Train a generator or a tokenizer; the same command takes up what was interrupted.

    With torchrun each process takes its share of every step.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    check_seed(seed)
    check_place("--output", output / SETTINGS_FILE)
    kind, weights, config = _source(model, init, paths)
    name = kind.__name__
    optimization = _optimization(
        kind,
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        final_fraction=final_fraction,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
    )
    options = with_options(
        RECIPES[kind][1],
        name,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        average_decay=average_decay,
        dtype=DTYPES[dtype],
        seed=seed,
        save_every=save_every,
        keep_every=keep_every,
        evaluate_every=evaluate_every,
        log_every=log_every,
    )
    adversary = _adversary(
        adversarial_adaptive=adversarial_adaptive,
        adversarial_weight=adversarial_weight,
        adversarial_loss=adversarial_loss,
        adversarial_start=adversarial_start,
        lecam_weight=lecam_weight,
        discriminator_learning_rate=discriminator_learning_rate,
    )
    data: Any = _data(kind, paths)
    other: Any = _held_out(
        kind, held_out, data, evaluate_every=evaluate_every, samples_with=samples_with
    )
    decoder = _decoder(samples_with, data)
    config = _config(kind, model, config, data)
    _check_stage(
        kind,
        config,
        proxy=proxy,
        second_stage=second_stage,
        init=init,
        adversary=adversary,
        perceptual=perceptual,
        steps=optimization.steps,
    )
    distances = _distances(kind, perceptual or [], perceptual_weight or [])
    allowed = None
    if kind in TOKENIZERS:
        allowed = tokenizer.PIXEL_OPTIONS if second_stage else loss_options(config)
    losses = _losses(
        kind,
        allowed,
        label_dropout=(
            found_at(config, "model.generator.class_label_dropout")
            if label_dropout is None and kind is MaskGIT
            else label_dropout
        ),
        label_smoothing=label_smoothing,
        unmasked_weight=unmasked_weight,
        pixel_loss=pixel_loss,
        quantizer_weight=quantizer_weight,
        entropy_weight=entropy_weight,
        kl_weight=kl_weight,
    )
    place = _place(device)
    rank, processes = rank_and_size()
    with flags():
        options.part_size(processes)
    settings = _settings(
        data,
        processes,
        (optimization, options, losses, adversary),
        unused=[] if allowed is None else [each for each in asdict(losses) if each not in allowed],
        model=model,
        init=init,
        proxy=proxy,
        second_stage=second_stage,
        perceptual=", ".join(f"{name} {weight}" for name, weight in distances.items()) or None,
        beta1=optimization.betas[0],
        beta2=optimization.betas[1],
        dtype=dtype,
    )
    _check_output(output, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights is None:
            network = kind.from_config(config)
        else:
            with flags(path_or_hub_id="--init"):
                network = kind.from_pretrained(weights, config=config, dtype=torch.float32)
        helper = None if adversary is None else Adversary(adversary).to(place)
    task: Task
    evaluated: Task | None = None
    if isinstance(network, MaskGIT | ARTransformer):
        of_tokens = partial(GeneratorTask, network.to(place), losses=losses or generator.Losses())
        task = of_tokens(data)
        if other is not None:
            evaluated = of_tokens(other, tokenizer=decoder and decoder.to(place))
    else:
        network, vqgan = _staged(network, proxy or VQGAN, second_stage)
        of_images = partial(
            TokenizerTask,
            network.to(place),
            vqgan=vqgan and vqgan.to(place),
            losses=losses,
            perceptual=Perceptual(distances).to(place) if distances else None,
            log=say,
        )
        task = of_images(paths=[file.path for file in data], adversary=helper)
        if other is not None:
            evaluated = of_images(paths=[file.path for file in other], augment=False)
        workers = default_workers(workers, place)
    if compiled:
        compile(task.model)
    if rank == 0:
        lock = locked(output / LOCK_FILE)
        _check_output(output, settings)  # another run may have begun since
        write_json(output / SETTINGS_FILE, settings)
        size = sum(parameter.numel() for parameter in task.model.parameters()) / 1e6
        apart = "" if evaluated is None else f", {evaluated.count:,} held out"
        say(f"{name}, {size:,.1f} million parameters, {task.count:,} images{apart}")
    run(task, optimization, options, output, held_out=evaluated, workers=workers or 0, log=say)
    if processes > 1:
        dist.destroy_process_group()
    if rank == 0:
        (output / LOCK_FILE).unlink(missing_ok=True)
        lock.close()
        say(f"wrote {output}")


def _source(
    model: str | None, init: str | None, paths: Sequence[str]
) -> tuple[type[Trained], Path | None, Any]:
    """The class of the model, and with --init its weights and their configuration, else None."""
    names = releases(KINDS)
    if model is None and init is None:
        raise ValueError("--model: needed, or --init")
    if model is not None and init is not None:
        raise ValueError("--init: not allowed with --model")
    if init is not None:
        with flags(path_or_hub_id="--init"):
            weights, config = locate(init, names)
        # A whole configuration of 1d-tokenizer may be of a generator or of its tokenizer.
        of_images = "dataset" in config and not _are_token_files(paths)
        return model_class(config, (*TOKENIZERS, *KINDS) if of_images else KINDS), weights, config
    if model not in names:
        raise ValueError(
            f"--model: {model!r} is not one of {', '.join(names)}; --init takes one with weights"
        )
    return next(kind for kind in KINDS if model in kind.releases), None, None


def _config(kind: type[Trained], model: str | None, config: Any, data: Any) -> Any:
    """The configuration of a new model by name, or of the weights, as it is trained."""
    if config is None and model is not None:
        of_tokens = isinstance(data, TokenFile)
        return generator_config(model, data) if of_tokens else tokenizer_config(model)
    config = kind.narrowed(config)
    return {"use_entropy_loss": True, **config} if kind is IBQTokenizer else config


def _check_stage(
    kind: type[Trained],
    config: Any,
    *,
    proxy: str | None,
    second_stage: bool,
    init: str | None,
    adversary: AdversaryOptions | None,
    perceptual: Sequence[str] | None,
    steps: int,
) -> None:
    """ValueError for options that the stage of the model has no use for."""
    of_proxies = kind in TOKENIZERS and predicts_proxies(config)
    if proxy is not None and not of_proxies:
        raise ValueError(f"--proxy: got {proxy!r}, which only a TiTok's first stage has a use for")
    if second_stage and not (init and of_proxies):
        raise ValueError("--second-stage: allowed with --init of a first-stage TiTok")
    if adversary and adversary.adversarial_start >= steps:
        raise ValueError(f"--adversarial-start: got {adversary.adversarial_start}, allowed is less "
                         f"than the {steps} --steps")  # fmt: skip
    of_pixels = kind in TOKENIZERS and (second_stage or not of_proxies)
    for field, asked in (("adversarial_weight", adversary), ("perceptual", perceptual)):
        if asked and not of_pixels:
            raise ValueError(f"{flag(field)}: allowed for a tokenizer that predicts pixels")


def _optimization(
    kind: type[Trained], beta1: float | None, beta2: float | None, **given: float | None
) -> Optimization:
    """How the model's parameters move: its recipe with the options that are given."""
    recipe = RECIPES[kind][0]
    betas = []
    for i, beta in enumerate((beta1, beta2)):
        betas.append(recipe.betas[i] if beta is None else beta)
        if not DECAY.fits(betas[i]):
            raise ValueError(f"--beta{i + 1}: got {beta}, allowed is {DECAY.allowed}")
    optimization = with_options(recipe, kind.__name__, betas=tuple(betas), **given)
    if given["warmup_steps"] is not None:
        return optimization
    warmup = min(optimization.warmup_steps, optimization.steps // 10)
    return replace(optimization, warmup_steps=warmup)


def _losses(kind: type[Trained], allowed: Sequence[str] | None, **given: float | str | None) -> Any:
    """The weights of the model's losses; None where it has none.

    Args:
        kind: of the model.
        allowed: the options that its loss has; None for all of `kind`.
        **given: by name; None where it is not.

    Raises:
        ValueError: for an option that it has no use for.
    """
    default = LOSSES.get(kind)
    if allowed is None:
        allowed = () if default is None else tuple(asdict(default))
    for name, value in given.items():
        if value is not None and name not in allowed:
            raise ValueError(
                f"{flag(name)}: got {value}, but this {kind.__name__} has no use for it"
            )
    return None if default is None else with_options(default, kind.__name__, **given)


def _adversary(**given: float | str | None) -> AdversaryOptions | None:
    """How a discriminator learns; None where --adversarial-weight is not given."""
    if given["adversarial_weight"] is not None:
        return with_options(AdversaryOptions(), "a discriminator", **given)
    _refuse("--adversarial-weight", **given)
    return None


def _distances(kind: Any, names: Sequence[str], given: Sequence[float]) -> dict[str, float]:
    """The weight of each --perceptual, by default its own for the model."""
    for name in names:
        if name not in PERCEPTUAL_KINDS:
            raise ValueError(f"--perceptual: {name!r} is not one of {', '.join(PERCEPTUAL_KINDS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"--perceptual: got {' and '.join(names)}, allowed is each once")
    if not names:
        _refuse("--perceptual", perceptual_weight=given[0] if given else None)
    if given and len(given) != len(names):
        raise ValueError(f"--perceptual-weight: got {len(given)}, allowed is one for each of "
                         f"{len(names)} --perceptual")  # fmt: skip
    for weight in given:
        with flags():
            check_kind("perceptual_weight", weight, NUMBER)
    defaults = [tokenizer.PERCEPTUAL_WEIGHTS[kind][name] for name in names]
    return dict(zip(names, given or defaults, strict=True))


def _refuse(without: str, **given: float | str | None) -> None:
    """Raises ValueError for an option that is given, by name, and has no use without another."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{flag(name)}: got {value}, allowed with {without}")


def _are_token_files(paths: Sequence[str]) -> bool:
    return all(Path(path).suffix in SUFFIXES for path in paths)


def _data(kind: type[Trained], paths: Sequence[str]) -> Data:
    """What paths name: token files for a generator, images for a tokenizer."""
    learns = "images" if kind in TOKENIZERS else f"token files ({', '.join(SUFFIXES)})"
    for path in paths:
        if _are_token_files([path]) == (kind in TOKENIZERS):
            raise ValueError(f"PATHS: got {path}, but a {kind.__name__} learns from {learns}")
    if kind in TOKENIZERS:
        return find_images(paths)
    files = [TokenFile.load(path) for path in paths]
    try:
        return concatenated(files)
    except ValueError as error:
        reason = re.sub(r"files\[(\d+)\]", lambda match: paths[int(match[1])], str(error))
        raise ValueError(f"PATHS: {reason}") from error


def _held_out(
    kind: type[Trained], paths: Sequence[str] | None, data: Any, **given: int | str | None
) -> Data | None:
    """The held-out examples; raises ValueError for tokens of another kind than those of `data`.

    Args:
        kind: of the model.
        paths: of --held-out.
        data: what is trained on.
        **given: options that have no use without them, by name; None where they are not given.
    """
    if not paths:
        _refuse("--held-out", **given)
        return None
    try:
        other = _data(kind, paths)
    except (OSError, ValueError) as error:
        raise ValueError(f"--held-out: {str(error).removeprefix('PATHS: ')}") from error
    if isinstance(other, TokenFile):
        if not len(other.tokens):
            raise ValueError(f"--held-out: {paths[0]} has no image")
        if reason := difference(other, data, "what is trained on"):
            raise ValueError(f"--held-out: {paths[0]} {reason}")
        known = set(_rows(other))
        shared = {name for name, tokens in _rows(data) if (name, tokens) in known}
    else:
        shared = _real_paths(data) & _real_paths(other)
    if shared:
        raise ValueError(
            f"--held-out: got {len(shared):,} images that are trained on, such as {min(shared)!r}"
        )
    return other


def _rows(file: TokenFile) -> Iterator[tuple[str, bytes]]:
    """Id and tokens of each image."""
    for name, tokens in zip(file.image_ids, file.tokens, strict=True):
        yield name, tokens.tobytes()


def _real_paths(images: Sequence[ImageFile]) -> set[str]:
    return {os.path.realpath(image.path) for image in images}


def _decoder(name: str | None, data: Data) -> Tokenizer | None:
    """The tokenizer of --samples-with, by which the tokens have to be."""
    if name is None:
        return None
    if not isinstance(data, TokenFile):
        raise ValueError(f"--samples-with: got {name!r}, allowed for a generator")
    with flags(path_or_hub_id="--samples-with"):
        model = load_tokenizer(name)
    if predicts_proxies(model.config):
        raise ValueError(f"--samples-with: got {name}, a first-stage model, which makes no pixels")
    mark = fingerprint(model)
    if mark != data.fingerprint:
        raise ValueError(
            f"--samples-with: got {name} (weights {mark}), allowed is {data.model} (weights "
            f"{data.fingerprint}), of the tokens"
        )
    return model


def _staged(
    network: Tokenizer, proxy: str, second_stage: bool
) -> tuple[Tokenizer, MaskGITVQGAN | None]:
    """The tokenizer as its stage begins, and the VQGAN that gives the first one's proxy codes."""
    if not (isinstance(network, TiTok) and predicts_proxies(network.config)):
        return network, None
    with flags(path_or_hub_id="--proxy"):
        vqgan = MaskGITVQGAN.from_pretrained(proxy)
    return (tokenizer.second_stage(network, vqgan), None) if second_stage else (network, vqgan)


def _settings(
    data: Data, processes: int, parts: Sequence[Any], unused: Sequence[str], **others: Setting
) -> dict[str, Setting]:
    """All that the weights depend on, of which a run that is taken up may change nothing.

    Args:
        data: what is trained on.
        processes: their number.
        parts: dataclasses of options; None where the model has none.
        unused: their options that nothing depends on.
        **others: options by name.
    """
    # None without a discriminator, so that a run with one is another.
    fields: dict[str, Any] = dict.fromkeys(asdict(AdversaryOptions()))
    for part in parts:
        fields |= {} if part is None else asdict(part)
    for name in (*NO_SETTINGS, *unused):
        fields.pop(name, None)
    fields |= others
    flagged = {flag(name): value for name, value in fields.items()}
    return {"data": _mark(data), **flagged, "processes": processes}


def _mark(data: Data) -> str:
    """A name for what is trained on."""
    if not isinstance(data, TokenFile):
        texts = [file.path for file in data]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
    labels = None if data.labels is None else data.labels.tolist()
    digest = hashlib.sha256(json.dumps([labels, data.class_names]).encode())
    digest.update(raw_bytes(torch.from_numpy(data.tokens)))
    return digest.hexdigest()[:16]


def _place(name: str) -> torch.device:
    """The device of this process, which joins those that torchrun started with it."""
    place = named_device(name)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return place
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("WORLD_SIZE: allowed where torchrun sets it, with LOCAL_RANK")
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return place


def _check_output(folder: Path, settings: dict[str, Setting]) -> None:
    """Raises ValueError if the folder holds another model or the state of another run."""
    record = folder / SETTINGS_FILE
    if not record.exists():
        if (folder / CONFIG_FILE).exists() or (folder / WEIGHTS_FILE).exists():
            raise ValueError(f"--output: {folder} holds a model, allowed is a folder without one")
        return
    if any((folder / name).exists() for name in (STATE_FILE, WEIGHTS_FILE, MODELS_FOLDER)):
        check_settings(record, settings)
