"""The titok-fast command."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Image tokenizers on fused kernels: images to tokens and back.",
)
out = Console()
errors = Console(stderr=True)

SKIPPED = 3  # exit code when some images could not be read


def main() -> None:
    """Run the command; what the user can mend is one line on stderr, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        errors.print(f"error: {error}", style="bold red", markup=False, highlight=False)
        sys.exit(2)


@app.command()
def info() -> None:
    """Print versions, instruction sets, and what is available or why not."""
    from titok_fast.ops import inspect

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (inspect.versions() | inspect.availability()).items():
        table.add_row(f"[bold]{name}[/bold]", value)
    out.print(table)


@app.command()
def reconstruct(
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pictures.")],
    model: Annotated[
        str, typer.Option(help="A model's name, a local folder or file, or a hub id.")
    ] = "titok-l-32",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
) -> None:
    """Encode and decode images: a picture of each beside its reconstruction, and its PSNR."""
    import torch

    from titok_fast.images import grid, read_image, write_png
    from titok_fast.metrics import psnr
    from titok_fast.models import TiTok

    names = _distinct_names(images)
    tokenizer = TiTok.from_pretrained(
        model, revision=revision, device=_device(device), dtype=_dtype(dtype)
    )
    skipped, quality, seconds = 0, [], 0.0
    with _progress() as progress:
        task = progress.add_task("reconstruct", total=len(images))
        for start in range(0, len(images), batch_size):
            batch, kept = [], []
            for path in images[start : start + batch_size]:
                try:
                    batch.append(read_image(path, tokenizer.image_size))
                    kept.append(path)
                except OSError as error:
                    skipped += 1
                    errors.print(f"skipped {error}", style="red", markup=False, highlight=False)
            progress.advance(task, len(images[start : start + batch_size]))
            if not batch:
                continue
            originals = torch.stack(batch).to(tokenizer.latent_tokens.device)
            begin = time.perf_counter()
            decoded = tokenizer.decode(tokenizer.encode(originals)).float()
            values = psnr(decoded, originals).tolist()
            seconds += time.perf_counter() - begin
            for path, original, reconstruction, value in zip(
                kept, originals, decoded, values, strict=True
            ):
                write_png(output / names[path], grid([[original, reconstruction]]))
                quality.append(value)
                out.print(f"{path}  {value:.2f} dB", markup=False, highlight=False)
    if quality:
        mean, rate = sum(quality) / len(quality), len(quality) / seconds
        out.print(
            f"{len(quality)} images to {output}: mean PSNR {mean:.2f} dB, {rate:.1f} images/s",
            markup=False,
            highlight=False,
        )
    if skipped:
        errors.print(f"{skipped} of {len(images)} images skipped", style="red", highlight=False)
        raise typer.Exit(SKIPPED)


def _distinct_names(paths: list[Path]) -> dict[Path, str]:
    """A PNG name for each path; equal stems are told apart by a number."""
    taken: dict[str, int] = {}
    names = {}
    for path in paths:
        count = taken[path.stem] = taken.get(path.stem, 0) + 1
        names[path] = f"{path.stem}.png" if count == 1 else f"{path.stem}-{count}.png"
    return names


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=errors, transient=True)


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: {name!r} is not auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: {name!r} asked for, but torch finds no CUDA device")
    return device


def _dtype(name: str) -> "torch.dtype":
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"--dtype: {name!r} is not one of {', '.join(dtypes)}")
    return dtypes[name]


if __name__ == "__main__":
    main()
