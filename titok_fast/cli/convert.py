"""Checkpoints to folders that the package loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from titok_fast.cli.common import check_place, flags, say
from titok_fast.models.auto import MODELS, model_class, releases
from titok_fast.models.convert import EMA_PREFIX
from titok_fast.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, load_weights, locate


def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="File (.ckpt, .pt, .bin), folder, model's name or hub id.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the model.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The model whose configuration it has, if neither the file's name nor a "
            "config.json beside it says so.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Turn a checkpoint into config.json and model.safetensors; nothing in it is run."""
    names = releases(MODELS)
    if model is not None and model not in names:
        raise ValueError(f"--model: {model!r} is not one of {', '.join(names)}")
    check_place("--output", output / CONFIG_FILE)
    with flags(path_or_hub_id="CHECKPOINT"):
        path, config = locate(checkpoint, names, config=model)
        converted, sources = load_weights(model_class(config, MODELS), path, config)
    _check_output(output, converted.config)
    converted.save_pretrained(output)
    averages = sum(source.startswith(EMA_PREFIX) for source in sources.values())
    size = (output / WEIGHTS_FILE).stat().st_size / 1e6
    say(
        f"{path} to {output}: {type(converted).__name__}, {len(sources)} tensors, "
        f"{averages or 'none'} of them EMA, {size:,.1f} MB"
    )


def _check_output(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError if the folder holds another model."""
    old = folder / CONFIG_FILE
    if not old.exists() and not (folder / WEIGHTS_FILE).exists():
        return
    try:
        same = json.loads(old.read_text(encoding="utf-8")) == config
    except (OSError, ValueError):
        same = False
    if not same:
        raise ValueError(f"--output: {folder} holds another model, allowed is one of this "
                         "configuration or a folder without a model")  # fmt: skip
