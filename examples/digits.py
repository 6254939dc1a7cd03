"""Handwritten digits to 16 tokens each and back, and new ones: `make demo`.

Encodes held-out digits with the titok-digits model of this package, prints their tokens, writes
demo.png (originals over reconstructions, then generated digits, a row for each class) and compares
the fused search with its reference.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from titok_fast import TiTok, generate, nearest_code
from titok_fast.images import grid, write_png
from titok_fast.metrics import codebook_usage, psnr
from titok_fast.testing import peak_extra_bytes, rows_and_codes
from titok_fast.training.data import digits

SHOWN = 16
console = Console()


def measure(*runs: Callable[[], object]) -> list[tuple[float, int | None]]:
    """Of each, median seconds of several runs in turn with the others, and peak of extra memory."""
    for run in runs:
        run()
    rounds: list[list[float]] = []
    while len(rounds) < 3 or (sum(map(sum, rounds)) < 2 and len(rounds) < 50):
        rounds.append([])
        for run in runs:
            begin = time.perf_counter()
            run()
            rounds[-1].append(time.perf_counter() - begin)
    medians = map(statistics.median, zip(*rounds, strict=True))
    return [(median, peak_extra_bytes(run)) for median, run in zip(medians, runs, strict=True)]


def megabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:,.1f} MB"


def main() -> None:
    model = TiTok.from_pretrained("titok-digits")
    images, labels = digits("test")
    tokens = model.encode(images)
    decoded = model.decode(tokens)

    for label, row in zip(labels[:SHOWN].tolist(), tokens[:SHOWN].tolist(), strict=True):
        console.print(
            f"digit {label}: " + " ".join(f"{token:3d}" for token in row), highlight=False
        )
    classes = torch.arange(10).repeat_interleave(SHOWN)
    begin = time.perf_counter()
    generated = generate(classes, model="titok-digits", seed=0)
    seconds = time.perf_counter() - begin
    rows = [images[:SHOWN], decoded[:SHOWN], *generated.split(SHOWN)]
    write_png("demo.png", grid(rows, scale=2))
    console.print(
        f"\n{len(images)} held-out digits, {tokens.shape[1]} tokens each: "
        f"PSNR {psnr(decoded, images).mean():.2f} dB, "
        f"codebook usage {codebook_usage(tokens, model.codebook_size):.1%}; "
        f"{len(generated)} digits generated in {seconds:.1f} s; "
        f"wrote {Path('demo.png').resolve()}\n",
        highlight=False,
        soft_wrap=True,
    )

    table = Table("", "fused", "reference", "speed-up", "extra memory", "reference")
    for name, count, run in comparisons(model, images):
        (fused, fused_bytes), (reference, reference_bytes) = measure(
            partial(run, "auto"), partial(run, "reference")
        )
        table.add_row(
            name,
            f"{count / fused:,.0f}/s",
            f"{count / reference:,.0f}/s",
            f"{reference / fused:.1f}x",
            megabytes(fused_bytes),
            megabytes(reference_bytes),
        )
    console.print(table)


def comparisons(
    model: TiTok, images: torch.Tensor
) -> list[tuple[str, int, Callable[[str], object]]]:
    """(what, images or rows a run, the run with a backend of the search)."""

    def encode(backend: str) -> object:
        model.quantize.backend = backend
        return model.encode(images)

    latents = model.latents(images)
    codes = model.quantize.embedding.weight
    z, codebook = rows_and_codes(1024, 4096, 64)
    return [
        ("images encoded", len(images), encode),
        (
            "images, search alone",
            len(images),
            lambda backend: nearest_code(latents, codes, metric="cosine", backend=backend),
        ),
        (
            "rows, 4,096 codes of 64",
            len(z),
            lambda backend: nearest_code(z, codebook, backend=backend),
        ),
    ]


if __name__ == "__main__":
    main()
