"""What the recipes of the small digits models share: the command line, and the model's card."""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from titok_fast._files import replacing
from titok_fast.models import PretrainedModel
from titok_fast.training.data import digits

THREADS = 2

Model = TypeVar("Model", bound=PretrainedModel)


def initial_model(kind: type[Model], name: str, seed: int) -> Model:
    """An untrained model of a release, its matrices drawn by Glorot's rule, in training mode.

    The official standard deviation of 0.02 suits a width of 512 and more; at that of the digits
    models it leaves training on the mean image for hundreds of steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.from_config(name)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
    return model


def run(
    name: str,
    recipe: str,
    train: Callable[[int, int], tuple[PretrainedModel, list[float]]],
    evaluate: Callable[[Any], object],
    card: str,
    arguments: Sequence[str] | None,
    *,
    steps: int,
    seed: int,
    **fields: object,
) -> None:
    """Trains and evaluates a model, and writes it with its card, as a command line says.

    Args:
        name: of the model.
        recipe: the module that holds it.
        train: from a number of steps and a seed to the model and its losses.
        evaluate: from the model to its `result` on the card.
        card: a format string of `fields` and of what the run gives.
        arguments: of the command line; None takes those of the process.
        steps: their default number.
        seed: the default one.
        **fields: of the card.
    """
    command = f"python -m titok_fast.training.{recipe}"
    parser = argparse.ArgumentParser(prog=command, description=f"Train {name}.")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--steps", type=_positive, default=steps, metavar="N")
    parser.add_argument("--seed", type=int, default=seed, metavar="S")
    parser.add_argument("--threads", type=_positive, default=THREADS, metavar="N")
    options = parser.parse_args(arguments)
    try:
        train_images, test_images = digits("train")[0], digits("test")[0]
    except ImportError as error:
        parser.exit(1, f"error: {error}\n")

    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    model, _ = train(options.steps, options.seed)
    seconds = time.perf_counter() - start
    result = evaluate(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(result)
    print(f"{parameters:,} parameters, trained in {seconds:.0f} s")

    model.save_pretrained(options.output)
    text = card.format(
        **fields,
        train=f"{len(train_images):,}",
        test=len(test_images),
        command=f"{command} -o {name} --steps {options.steps} --seed {options.seed} "
        f"--threads {options.threads}",
        steps=options.steps,
        seconds=seconds,
        threads=options.threads,
        torch=torch.__version__,
        result=result,
        parameters=parameters,
        megabytes=4e-6 * parameters,
        date=datetime.date.today().isoformat(),
    )
    with replacing(options.output / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"wrote {options.output}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, allowed is a positive number")
    return number
