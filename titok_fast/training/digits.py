"""The recipe of titok-digits: `python -m titok_fast.training.digits -o FOLDER`.

A third of the steps trains encoder and decoder without a codebook, on latents of unit length;
then k-means places the codes on the latents, and all three are trained together. With a codebook
from the start, the commitment loss pulls the latents onto a handful of codes before the decoder
has learned to use them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titok_fast.metrics import codebook_usage, perplexity, psnr
from titok_fast.models import TiTok
from titok_fast.ops import nearest_code
from titok_fast.training.data import augment, digits, shuffled
from titok_fast.training.loop import Optimization, fit
from titok_fast.training.losses import tokenizer_losses, total
from titok_fast.training.recipe import initial_model, run

NAME = "titok-digits"
STEPS = 3000
SEED = 0
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
CONTINUOUS_FRACTION = 0.3
LATENT_NOISE = 0.03
AUGMENTED_FRACTION = 0.5
KMEANS_ROUNDS = 10


@dataclass(frozen=True)
class Evaluation:
    """What the tokens of a set of images keep.

    Attributes:
        psnr: mean over images of the PSNR of each, in dB.
        usage: fraction of the codes that occur.
        perplexity: number of codes in effective use.
        agreement: fraction of images whose reconstruction a classifier of real digits reads as the
            same digit as the original.
        accuracy: fraction of reconstructions that it reads as their label.
    """

    psnr: float
    usage: float
    perplexity: float
    agreement: float
    accuracy: float

    def __str__(self) -> str:
        return (
            f"PSNR {self.psnr:.2f} dB, codebook usage {self.usage:.1%} "
            f"(perplexity {self.perplexity:.0f}), classifier agreement {self.agreement:.1%}, "
            f"accuracy {self.accuracy:.1%}"
        )


def train(
    steps: int = STEPS, seed: int = SEED, *, log: Callable[[object], None] = print
) -> tuple[TiTok, list[float]]:
    """Trains titok-digits on the training split of `titok_fast.training.data.digits`.

    Args:
        steps: number of optimizer steps.
        seed: of the initial weights, the order of the images, augmentation and noise. The result
            is the same bits on one machine with one number of threads.
        log: takes each line of the log, or what prints as one.

    Returns:
        The model in evaluation mode, and the loss of each step.
    """
    images, _ = digits("train")  # [N, 3, 32, 32]
    model = initial_model(TiTok, NAME, seed).train()
    generator = torch.Generator().manual_seed(seed)
    batches = shuffled(len(images), BATCH_SIZE, generator)
    continuous_steps = round(CONTINUOUS_FRACTION * steps)

    def loss_at(step: int) -> Tensor:
        if step == continuous_steps:
            _place_codes(model, images, generator)
            log(f"step {step:5d}/{steps}  codebook placed")
        batch = images[next(batches)]  # [B, 3, 32, 32]
        chosen = torch.rand(len(batch), 1, 1, 1, generator=generator) < AUGMENTED_FRACTION
        batch = torch.where(chosen, augment(batch, generator), batch)
        if step >= continuous_steps:
            return total(tokenizer_losses(model(batch), batch))
        latents = F.normalize(model.latents(batch), dim=-1)  # [B, L, C]
        latents = latents + LATENT_NOISE * torch.randn(latents.shape, generator=generator)
        reconstructions = model.decoder(latents.transpose(1, 2).unsqueeze(2))  # [B, 3, 32, 32]
        return F.mse_loss(reconstructions, batch)

    optimization = Optimization(steps, LEARNING_RATE)
    losses = fit(model.parameters(), loss_at, optimization, log_every=250, log=log)
    return model.eval(), losses


@torch.no_grad()
def _place_codes(model: TiTok, images: Tensor, generator: torch.Generator) -> None:
    """Moves the codebook to the spherical k-means of the latents of `images`."""
    latents = F.normalize(model.latents(images), dim=-1).flatten(0, 1)  # [N L, C]
    weight = model.quantize.embedding.weight  # [K, C]
    chosen = torch.randperm(len(latents), generator=generator)[: len(weight)]
    codes = latents[chosen]  # [K, C]
    for _ in range(KMEANS_ROUNDS):
        nearest = nearest_code(latents, codes, metric="cosine")  # [N L]
        sums = torch.zeros_like(codes).index_add_(0, nearest, latents)
        used = torch.bincount(nearest, minlength=len(codes)) > 0  # [K]
        codes = torch.where(used[:, None], F.normalize(sums, dim=-1), codes)
    weight.copy_(codes)


def evaluate(model: TiTok) -> Evaluation:
    """Measures a model on the test split, of which training sees nothing.

    Args:
        model: a `TiTok` with a codebook for images of 32x32, in evaluation mode, on the CPU.

    Raises:
        ImportError: when scikit-learn is not installed.
    """
    images, labels = digits("test")
    classify = digit_classifier()
    tokens = model.encode(images)
    reconstructions = model.decode(tokens)
    read, original = classify(reconstructions), classify(images)
    codes = model.quantize.codebook_size
    return Evaluation(
        psnr=psnr(images, reconstructions).mean().item(),
        usage=codebook_usage(tokens, codes),
        perplexity=perplexity(tokens, codes),
        agreement=(read == original).double().mean().item(),
        accuracy=(read == labels).double().mean().item(),
    )


def digit_classifier() -> Callable[[Tensor], Tensor]:
    """A support vector machine that learned the training split of `digits`.

    Returns:
        A function from images [N, 3, 32, 32] in [0, 1] to digits [N] int64.

    Raises:
        ImportError: when scikit-learn is not installed.
    """
    images, labels = digits("train")
    from sklearn.svm import SVC

    def features(images: Tensor) -> object:
        return F.avg_pool2d(images[:, :1].float(), 4).flatten(1).numpy()  # [N, 64]

    machine = SVC(gamma="scale", C=10.0).fit(features(images), labels.numpy())
    return lambda images: torch.from_numpy(machine.predict(features(images)))


_CARD = """\
# titok-digits

A small TiTok (arXiv 2406.07550) that turns a 32x32 image of a handwritten digit into {tokens}
tokens of a codebook of {codes}, and back. It exists to show and test titok_fast without a
download; it knows digits and nothing else.

    from titok_fast.models import TiTok
    model = TiTok.from_pretrained("titok-digits")
    tokens = model.encode(images)  # [B, 3, 32, 32] in [0, 1] -> [B, {tokens}]
    images = model.decode(tokens)

## Data

The {train} training images of a fixed split of scikit-learn's `load_digits` (1,797 images, 8x8
grey, enlarged to 32x32 by bilinear interpolation, three equal channels); {test} are held out.
They are from E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine
Learning Repository, 1998, doi:10.24432/C50P49, under CC BY 4.0.

## Training

    pip install 'titok_fast[demo]'
    {command}

{steps:,} steps of {batch} images took {seconds:.0f} s with {threads} CPU threads (torch {torch}).

## Held-out images

| | |
|---|---|
| PSNR, mean over images | {result.psnr:.2f} dB |
| codes in use | {result.usage:.1%} of {codes} |
| perplexity of the codes | {result.perplexity:.0f} |
| a classifier of real digits reads the reconstruction as the original | {result.agreement:.1%} |
| and as its label | {result.accuracy:.1%} |
| parameters | {parameters:,} (float32, {megabytes:.2f} MB) |

The weights are under the licence of titok_fast, Apache-2.0. Trained {date}.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, evaluates and writes the model and its card.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    model = TiTok.from_config(NAME)
    run(
        NAME, "digits", train, evaluate, _CARD, arguments, steps=STEPS, seed=SEED, batch=BATCH_SIZE,
        tokens=model.num_latent_tokens, codes=model.codebook_size,
    )  # fmt: skip


if __name__ == "__main__":
    main()
