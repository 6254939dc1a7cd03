"""What the commands share: options, the model, progress, and how images flow through it."""

import os
import re
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor

from titok_fast.images import Crop, ImageBatch, load_images, png_software, to_float, write_png
from titok_fast.models import IBQTokenizer, Tokenizer, load_tokenizer
from titok_fast.models.auto import TOKENIZERS, releases
from titok_fast.models.checks import Options, replaced
from titok_fast.tokens import fingerprint

out = Console()
errors = Console(stderr=True)

_NAME_BYTES = 255  # of a file, at most
SKIPPED = 3  # exit code when some images could not be read

Paths = Annotated[
    list[str],
    typer.Argument(
        help="Image files, folders, quoted patterns, or @list.txt with a path a line.",
        show_default=False,
    ),
]
Folder = Annotated[Path, typer.Option("--output", "-o", help="Folder of the pictures.")]
Model = Annotated[str, typer.Option(help="A model's name, a local folder or file, or a hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU.")]
Dtype = Annotated[str, typer.Option(help="Of the network: float32, bfloat16 or float16.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
ImageSize = Annotated[
    int | None,
    typer.Option(help="Side in pixels; IBQ takes any multiple of 16.", show_default="the model's"),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Processes that read images, or threads that write them; 0 for none. By default "
        "all processors but one with a GPU, a quarter of them without.",
        show_default=False,
    ),
]

DEFAULT_MODEL = "titok-l-32"


def option(help: str, default: bool | str = True, **limits: Any) -> Any:
    """An option of a command; `default` is what the help calls its default value."""
    return typer.Option(help=help, show_default=default, **limits)


def flag(name: str) -> str:
    """The option of a command that a field of this name comes from."""
    return "--" + name.replace("_", "-")


@contextmanager
def flags(*fields: str, **names: str) -> Iterator[None]:
    """Within it, an error that begins with the name of a field begins with that of its option.

    Args:
        *fields: those whose option is `flag` of it; all others too where nothing is given.
        **names: the options of others.
    """
    known = {**{field: flag(field) for field in fields}, **names}
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        name, _, reason = str(error).partition(":")
        if known and name not in known:
            raise
        raise ValueError(f"{known.get(name) or flag(name)}:{reason}") from None


def with_options(default: Options, kind: str, **given: Any) -> Options:
    """A frozen dataclass with the options that are given; None keeps.

    Raises:
        ValueError: for a value that it does not take, or an option that `kind` lacks.
    """
    with flags():
        return replaced(default, kind, **given)


def say(text: str, console: Console = out, style: str | None = None) -> None:
    """Print a line as it is: not wrapped, not coloured by its contents.

    A byte of a file's name that is not UTF-8 is printed as a question mark.
    """
    text = text.encode("utf-8", "replace").decode()
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def say_table(rows: Sequence[Sequence[str]], texts: Container[int]) -> None:
    """Print rows of cells below each other: texts from the left, numbers to the right.

    A row may have one cell more than the first, of any length.

    Args:
        rows: of cells, the first a heading.
        texts: the columns that are no numbers.
    """
    columns = zip(*(row[: len(rows[0])] for row in rows), strict=True)
    widths = [max(map(len, column)) for column in columns]
    for row in rows:
        cells = [
            cell.ljust(width) if i in texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        say("  ".join([*cells, *row[len(widths) :]]).rstrip())


@dataclass(frozen=True)
class Network:
    """A loaded model and what identifies it.

    Attributes:
        model: in evaluation mode.
        name: a release, an absolute path or a Hub id.
        revision: as given.
        fingerprint: of the stored weights.
        image_size: side of the images in pixels.
        device: of the model.
        dtype: of the model.
    """

    model: Tokenizer
    name: str
    revision: str | None
    fingerprint: str
    image_size: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(
        cls,
        source: str,
        revision: str | None,
        device: str,
        dtype: str,
        image_size: int | None = None,
        option: str = "--model",
    ) -> "Network":
        """Load the model that the options name; `option` is that of the source."""
        place, kind = named_device(device), named_dtype(dtype)
        with flags("revision", path_or_hub_id=option):
            model = load_tokenizer(source, revision=revision)
        size = _image_size(model, image_size)
        name = resolved(source, releases(TOKENIZERS))
        mark = fingerprint(model)
        return cls(model.to(place).cast(kind), name, revision, mark, size, place, kind)

    def images(
        self,
        paths: Sequence[str],
        batch_size: int,
        workers: int,
        crops: Sequence[Crop] | None = None,
    ) -> Iterator[ImageBatch]:
        """Batches of the images, read ahead."""
        gpu = self.device.type == "cuda"
        return load_images(
            paths,
            self.image_size,
            batch_size=batch_size,
            interpolation=self.model.interpolation,
            crops=crops,
            workers=workers,
            pin_memory=gpu,
        )

    def to_device(self, pixels: Tensor) -> Tensor:
        """uint8 pixels as images on the device."""
        return to_float(pixels.to(self.device, non_blocking=True))

    def encode(self, images: Tensor, batch_size: int) -> Tensor:
        """Tokens of at most `batch_size` images, the same whatever images share the batch."""
        count = len(images)
        if self.device.type == "cuda" and count < batch_size:
            # GPU libraries choose their order of summation by the shape.
            padding = images.new_zeros(batch_size - count, *images.shape[1:])
            images = torch.cat([images, padding])
        return self.model.encode(images)[:count]


def resolved(source: str, names: Container[str]) -> str:
    """Where a model is, as files record it: its name, an absolute path or a Hub id.

    Args:
        source: as given.
        names: of releases.
    """
    path = Path(source).expanduser()
    return str(path.resolve()) if source not in names and path.exists() else source


def default_workers(workers: int | None, device: torch.device) -> int:
    """The number of workers: on the CPU the network needs most of it, on a GPU none."""
    if workers is not None:
        return workers
    count = processors()
    return min(16, max(1, count - 1 if device.type == "cuda" else count // 4))


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def png_names(image_ids: Iterable[str]) -> list[str]:
    """A distinct file name below a folder for each image: its id with suffix .png.

    An id that leads out of the folder is cut to its last part, as is one below a folder of the name
    of another's file; equal names get a number. Parts are cut to the length that a file's name may
    have.
    """
    taken: set[str] = set()
    folders: set[str] = set()
    names = []
    for image_id in image_ids:
        path = PurePosixPath(re.sub(r"[\\\0]", "_", image_id))
        if path.is_absolute() or ".." in path.parts or not path.name:
            path = PurePosixPath(path.name if path.name not in ("", "..") else "image")
        folder = PurePosixPath(*(_cut(part) for part in path.parent.parts))
        if any(str(parent) in taken for parent in (folder, *folder.parents)):
            folder = PurePosixPath()
        name, count = str(folder / _cut(path.stem, ".png")), 1
        while name in taken or name in folders:
            count += 1
            name = str(folder / _cut(path.stem, f"-{count}.png"))
        taken.add(name)
        folders.update(map(str, (folder, *folder.parents)))
        names.append(name)
    return names


def _cut(stem: str, suffix: str = "") -> str:
    """Both, of the stem as many characters as fit into a file's name."""
    length = _NAME_BYTES - len(suffix)
    if len(os.fsencode(stem)) > length:
        stem = os.fsencode(stem)[:length].decode("utf-8", "ignore")
    return stem + suffix


def check_place(flag: str, path: Path) -> None:
    """Raises ValueError where no file can be: in place of a folder, or below a file.

    Args:
        flag: that names the place.
        path: of the file.
    """
    if path.is_dir():
        raise ValueError(f"{flag}: {path} is a folder, allowed is a file")
    around = next((folder for folder in path.parents if os.path.lexists(folder)), Path())
    if not around.is_dir():
        raise ValueError(f"{flag}: {around} is not a folder, nothing can be below it")


def check_pictures(paths: Iterable[Path], software: str) -> None:
    """Raises ValueError if one of the files cannot be, or is there and not from `software`."""
    for path in paths:
        if os.path.lexists(path) and png_software(path) != software:
            raise ValueError(
                f"--output: {path} is there and not from {software}, allowed is another place"
            )
        check_place("--output", path)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} images/s")


class Counter:
    """A bar with images/s on stderr, and a count of what was skipped.

    Args:
        description: of the work.
        total: number of images.
        done: how many of them an earlier run did.
    """

    def __init__(self, description: str, total: int, done: int = 0) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed())
        # Refreshed by hand: a thread of its own could hold a lock while workers are forked.
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=errors, transient=True, auto_refresh=False
        )
        self._task = self._bar.add_task(description, total=total, completed=done)
        self._total = total
        self._start = time.perf_counter()
        self.counted = 0
        self.skipped = 0

    def __enter__(self) -> "Counter":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, count: int) -> None:
        """Count images as done."""
        self.counted += count
        self._bar.advance(self._task, count)
        self._bar.refresh()

    def skip(self, messages: Sequence[str]) -> None:
        """Name images that could not be read."""
        for message in messages:
            say(f"skipped {message}", errors, style="red")
        self.skipped += len(messages)
        self._bar.advance(self._task, len(messages))

    @property
    def speed(self) -> str:
        """Images/s since the start."""
        return f"{self.counted / (time.perf_counter() - self._start):.1f} images/s"

    def finish(self) -> None:
        """Says how many images were skipped; raises typer.Exit with code 3 if there are any."""
        if self.skipped:
            say(f"{self.skipped} of {self._total} images skipped", errors, style="red")
            raise typer.Exit(SKIPPED)


class PngWriter:
    """Writes PNG files in threads, at most a batch behind.

    Args:
        threads: their number, at least one.
        software: what the files say wrote them.
    """

    def __init__(self, threads: int, software: str | None = None) -> None:
        self._software = software
        self._pool = ThreadPoolExecutor(max(1, threads))
        self._pending: list[Future[None]] = []

    def __enter__(self) -> "PngWriter":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            self._wait()

    def write(self, paths: Iterable[Path], pictures: Iterable[Tensor]) -> None:
        """Write pictures [3, H, W], once those of the call before are written."""
        self._wait()
        self._pending = [
            self._pool.submit(write_png, path, picture, software=self._software)
            for path, picture in zip(paths, pictures, strict=True)
        ]

    def _wait(self) -> None:
        for future in self._pending:
            future.result()


def _image_size(model: Tokenizer, size: int | None) -> int:
    """The side of the images: what the option says, if the model takes it."""
    if size is None:
        return model.image_size
    stride = model.stride if isinstance(model, IBQTokenizer) else None
    if size < 1 or (size % stride if stride else size != model.image_size):
        allowed = f"a positive multiple of {stride}" if stride else f"{model.image_size}"
        raise ValueError(f"--image-size: got {size}, allowed is {allowed}")
    return size


def check_seed(seed: int, option: str = "--seed") -> None:
    """Raises ValueError unless a seed is one of `maskgit_step` and `sample_token`."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"{option}: got {seed}, allowed is 0 to 2**63 - 1")


def named_device(name: str) -> torch.device:
    """The device of --device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", name):
        raise ValueError(f"--device: {name!r} is not auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: {name!r} asked for, but torch finds no CUDA device")
    if (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise ValueError(f"--device: {name!r} is not one of {torch.cuda.device_count()} devices")
    return device


def named_dtype(name: str) -> torch.dtype:
    """The dtype of --dtype."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"--dtype: {name!r} is not one of {', '.join(dtypes)}")
    return dtypes[name]
