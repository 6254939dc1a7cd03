"""The recipe of maskgit-digits: `python -m titok_fast.training.digits_generator -o FOLDER`.

A MaskGIT for the tokens of titok-digits. It sees the tokens of each training image and of augmented
copies of it, of which a random part is masked, and in one case of ten no label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titok_fast.models import MaskGIT, TiTok
from titok_fast.training.data import augment, digits, shuffled
from titok_fast.training.digits import digit_classifier
from titok_fast.training.generator import masked_loss
from titok_fast.training.loop import Optimization, fit
from titok_fast.training.recipe import initial_model, run

NAME = "maskgit-digits"
STEPS = 8000
SEED = 0
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
COPIES = 16


@dataclass(frozen=True)
class Evaluation:
    """What a classifier of real digits makes of generated ones.

    Attributes:
        accuracy: fraction of the generated digits that it reads as their label.
        real_accuracy: the same for the held-out real ones.
        distinct: fraction of the generated token sequences that are unlike all others.
    """

    accuracy: float
    real_accuracy: float
    distinct: float

    def __str__(self) -> str:
        return (
            f"{self.accuracy:.1%} of the generated digits are read as their label "
            f"(real ones: {self.real_accuracy:.1%}), {self.distinct:.1%} are distinct"
        )


def train(
    steps: int = STEPS, seed: int = SEED, *, log: Callable[[object], None] = print
) -> tuple[MaskGIT, list[float]]:
    """Trains maskgit-digits on the training split of `titok_fast.training.data.digits`.

    Args:
        steps: number of optimizer steps.
        seed: of the initial weights, the order of the images, augmentation and masking. The result
            is the same bits on one machine with one number of threads.
        log: takes what prints as a line of the log.

    Returns:
        The model in evaluation mode, and the loss of each step.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = _token_sequences(generator)
    model = initial_model(MaskGIT, NAME, seed).train()
    batches = shuffled(len(tokens), BATCH_SIZE, generator)

    def loss_at(step: int) -> Tensor:
        chosen = next(batches)
        return masked_loss(model, model, tokens[chosen], labels[chosen], generator)

    losses = fit(
        model.parameters(), loss_at, Optimization(steps, LEARNING_RATE), log_every=500, log=log
    )
    return model.eval(), losses


def _token_sequences(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [N, L] and labels [N] of the training images and their augmented copies."""
    tokenizer = TiTok.from_pretrained("titok-digits")
    images, labels = digits("train")
    versions = [images, *(augment(images, generator) for _ in range(COPIES - 1))]
    tokens = torch.cat([tokenizer.encode(version) for version in versions])
    return tokens, labels.repeat(COPIES)


def evaluate(model: MaskGIT, count: int = 1000, seed: int = SEED) -> Evaluation:
    """Generates digits, as many of each, and lets a classifier of real ones read them.

    Args:
        model: a generator of titok-digits' tokens, in evaluation mode, on the CPU.
        count: number of digits to generate.
        seed: of the samples.

    Raises:
        ImportError: when scikit-learn is not installed.
    """
    classify = digit_classifier()
    test_images, test_labels = digits("test")
    labels = torch.arange(count) % model.num_classes
    tokens = model.generate(labels, seed=seed)
    read = classify(TiTok.from_pretrained("titok-digits").decode(tokens))
    return Evaluation(
        accuracy=(read == labels).double().mean().item(),
        real_accuracy=(classify(test_images) == test_labels).double().mean().item(),
        distinct=len(tokens.unique(dim=0)) / count,
    )


_CARD = """\
# maskgit-digits

A small MaskGIT (arXiv 2202.04200, in TiTok's form, arXiv 2406.07550) that generates handwritten
digits of a given class, as tokens of titok-digits. It exists to show and test titok_fast without a
download.

    from titok_fast import generate
    images = generate([0, 1, 2, 3], model="titok-digits")  # [4, 3, 32, 32] in [0, 1]

## Data

The tokens of the {train} training images of titok-digits and of {copies} augmented copies of each;
that model's card names the source and its licence, CC BY 4.0.

## Training

    pip install 'titok_fast[demo]'
    {command}

{steps:,} steps of {batch} images took {seconds:.0f} s with {threads} CPU threads (torch {torch}).

## 1,000 generated digits

| | |
|---|---|
| a classifier of real digits reads them as their label | {result.accuracy:.1%} |
| the same for held-out real digits | {result.real_accuracy:.1%} |
| distinct token sequences | {result.distinct:.1%} |
| parameters | {parameters:,} (float32, {megabytes:.2f} MB) |

The weights are under the licence of titok_fast, Apache-2.0. Trained {date}.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, evaluates and writes the model and its card.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    run(
        NAME, "digits_generator", train, evaluate, _CARD, arguments, steps=STEPS, seed=SEED,
        batch=BATCH_SIZE, copies=COPIES - 1,
    )  # fmt: skip


if __name__ == "__main__":
    main()
