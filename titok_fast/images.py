"""Image files to tensors, as the official evaluation prepares them, and back."""

import errno
import glob
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from titok_fast._files import replacing
from titok_fast.models.checks import COUNT, check_kind
from titok_fast.ops.arguments import python_number

_KINDS = "avif bmp gif jp2 jpeg jpg pgm png pnm ppm tif tiff webp"
Pixels = npt.NDArray[Any]
Crop = tuple[float, float] | None
IMAGE_SUFFIXES = frozenset(f".{kind}" for kind in _KINDS.split(" "))


class ImageFile(NamedTuple):
    """An image to read, and how it is called.

    Attributes:
        path: where it is.
        image_id: its path relative to the folder it was found in, with forward slashes; as it was
            given otherwise.
        class_name: the folder directly below the given one that holds it, as in torchvision's
            ImageFolder; None where there is none.
    """

    path: str
    image_id: str
    class_name: str | None = None


class ImageBatch(NamedTuple):
    """Images read together.

    Attributes:
        indices: positions in the list of paths, of those that could be read, ascending.
        pixels: [B, 3, S, S] uint8, those images.
        errors: one line for each image that could not be read.
    """

    indices: list[int]
    pixels: Tensor
    errors: list[str]


def find_images(arguments: Iterable[str]) -> list[ImageFile]:
    """The images that command-line arguments name, in their order.

    Args:
        arguments: each of them one of

            - a file, of any name;
            - a folder: the files below it whose suffix is in `IMAGE_SUFFIXES`, sorted by path,
              links followed but to folders that they are in, names that start with a dot left out;
            - a pattern such as `photos/**/*.jpg`: the files and folders that match, sorted;
            - `@list.txt`: a file or folder a line. Files of a list need not exist here; they
              are errors when read.

    Returns:
        At least one image for each argument.

    Raises:
        FileNotFoundError: for an argument that names nothing, or no image.
    """
    found: list[ImageFile] = []
    for argument in arguments:
        if os.path.lexists(argument):
            names = [argument]
        elif argument.startswith("@"):
            with open(argument[1:], encoding="utf-8-sig", errors="surrogateescape") as lines:
                names = [line.rstrip("\r\n") for line in lines if line.strip()]
        else:
            names = sorted(glob.glob(argument, recursive=True))
            if not names:
                raise FileNotFoundError(
                    f"PATHS: {argument!r} is not a file, a folder, a pattern with a match or @list"
                )
        before = len(found)
        for name in names:
            found += _below(name) if os.path.isdir(name) else [ImageFile(name, name)]
        if len(found) == before:
            raise FileNotFoundError(f"PATHS: {argument!r} holds no image")
    return found


def _below(folder: str) -> list[ImageFile]:
    files = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        inside = Path(parent).relative_to(folder)
        around = {os.path.realpath(Path(folder, path)) for path in (inside, *inside.parents)}
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            # A link to what it is in has no end.
            and os.path.realpath(os.path.join(parent, name)) not in around
        ]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                path = os.path.join(parent, name)
                parts = Path(path).relative_to(folder).parts
                class_name = parts[0] if len(parts) > 1 else None
                files.append(ImageFile(path, "/".join(parts), class_name))
    return sorted(files, key=lambda file: file.image_id.split("/"))


def load_images(
    paths: Sequence[str],
    size: int,
    *,
    batch_size: int,
    interpolation: str = "bicubic",
    crops: Sequence[Crop] | None = None,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[ImageBatch]:
    """Read images in batches, ahead of their use, in worker processes.

    An image that cannot be read is an error of its batch and takes no place in it. Order and
    pixels do not depend on the number of workers.

    Args:
        paths: of image files.
        size: side of the images in pixels.
        batch_size: files of a batch; the last may have fewer.
        interpolation: as for `read_image`.
        crops: one for each file, as for `read_pixels`; None takes the centres.
        workers: number of processes; 0 reads in this one.
        pin_memory: put the pixels in memory from which copies to a GPU are asynchronous.

    Yields:
        Batches in the order of the paths, one without images included.

    Raises:
        ValueError: for an unknown interpolation, a size or batch size below 1, or crops out of
            range or not as many as the paths.
        RuntimeError: when a worker process dies.
    """
    _check_interpolation(interpolation)
    size, batch_size = python_number(size), python_number(batch_size)
    check_kind("size", size, COUNT)
    check_kind("batch_size", batch_size, COUNT)
    if crops is not None:
        if len(crops) != len(paths):
            raise ValueError(
                f"crops: got {len(crops)}, allowed is one for each of {len(paths)} paths"
            )
        for crop in crops:
            _check_crop(crop)
    # The others start in seconds; a worker touches neither CUDA nor this process's threads.
    context = "fork" if workers and sys.platform == "linux" else None
    loader = DataLoader(
        _ImageFiles(paths, size, interpolation, crops),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        multiprocessing_context=context,
        worker_init_fn=_ignore_interrupt,
    )
    return (batch._replace(pixels=torch.as_tensor(batch.pixels)) for batch in loader)


class _ImageFiles(Dataset[tuple[int, Tensor | str]]):
    def __init__(
        self, paths: Sequence[str], size: int, interpolation: str, crops: Sequence[Crop] | None
    ) -> None:
        self.paths = paths
        self.size = size
        self.interpolation = interpolation
        self.crops = crops

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            crop = None if self.crops is None else self.crops[index]
            return index, read_pixels(
                self.paths[index], self.size, interpolation=self.interpolation, crop=crop
            )
        except OSError as error:
            return index, str(error)


def _collate(items: list[tuple[int, Tensor | str]]) -> ImageBatch:
    read = [(index, item) for index, item in items if isinstance(item, Tensor)]
    pixels: Any = torch.zeros(0, 3, 0, 0)
    if read:
        pixels = torch.stack([pixels for _, pixels in read])
        if get_worker_info() is not None:
            try:
                pixels.share_memory_()
            except RuntimeError:  # it is full: arrays go through a pipe
                pixels = pixels.numpy()
    return ImageBatch(
        [index for index, _ in read], pixels, [item for _, item in items if isinstance(item, str)]
    )


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C ends the parent, which ends its workers; they have nothing to say about it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read_image(
    path: str | os.PathLike[str], size: int, *, interpolation: str = "bicubic"
) -> Tensor:
    """Read an image file: shorter edge to `size`, centre crop.

    EXIF rotation is applied, transparency is laid over white, 16-bit grey keeps its range.

    Args:
        path: of a file that Pillow reads.
        size: side of the result in pixels.
        interpolation: "bicubic", antialiased, the evaluation of TiTok (arXiv 2406.07550, section
            4.1); or "bilinear", not antialiased, that of IBQ (arXiv 2412.02692, section 4.1): the
            pixels are those of albumentations with OpenCV, to the bit.

    Returns:
        [3, size, size] float32 in [0, 1].

    Raises:
        OSError: the file is missing or is not a readable image; the message names it.
        ValueError: for an unknown interpolation, or a size that is no positive int.
    """
    return to_float(read_pixels(path, size, interpolation=interpolation))


def read_pixels(
    path: str | os.PathLike[str],
    size: int,
    *,
    interpolation: str = "bicubic",
    crop: Crop = None,
) -> Tensor:
    """As `read_image`, but in 8 bits: [3, size, size] uint8.

    Args:
        path, size, interpolation: as for `read_image`.
        crop: where the crop lies across and down, each in [0, 1), from one edge to the other; None
            is the centre.

    Raises:
        OSError, ValueError: as `read_image`, and for a crop that is out of range.
    """
    _check_interpolation(interpolation)
    _check_crop(crop)
    size = python_number(size)
    check_kind("size", size, COUNT)
    try:
        with Image.open(path) as file:
            return _prepared(file, size, interpolation, crop)
    except Exception as error:  # on a corrupt file Pillow's decoders raise whatever they run into
        name = os.fspath(path) if isinstance(path, str | os.PathLike) else type(path).__name__
        unreadable = OSError(f"{name}: not a readable image ({_reason(error)})")
        code = getattr(error, "errno", None)
        unreadable.errno = errno.ENOMEM if isinstance(error, MemoryError) else code
        raise unreadable from error


def prepare_image(
    image: Image.Image | Pixels, size: int, *, interpolation: str = "bicubic"
) -> Tensor:
    """As `read_image`, of an image in memory.

    Args:
        image: of Pillow, or an array [H, W, 3] uint8.
        size, interpolation: as for `read_image`.

    Returns:
        [3, size, size] float32 in [0, 1].

    Raises:
        TypeError: for anything else.
        ValueError: for an unknown interpolation, a size that is no positive int, an image without
            pixels, damaged, or one whose white is unknown.
    """
    _check_interpolation(interpolation)
    size = python_number(size)
    check_kind("size", size, COUNT)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise TypeError(
                f"image: got {image.dtype} of shape {list(image.shape)}, allowed is uint8 [H, W, 3]"
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"image: got {type(image).__name__}, allowed is a Pillow image or an array [H, W, 3]"
        )
    if 0 in image.size:
        raise ValueError(f"image: got {image.width} x {image.height} pixels, allowed are some")
    try:
        return to_float(_prepared(image, size, interpolation, None))
    except Exception as error:  # as in `read_pixels`
        raise ValueError(f"image: cannot be prepared ({_reason(error)})") from error


def _prepared(image: Image.Image, size: int, interpolation: str, crop: Crop) -> Tensor:
    upright = _to_rgb(_upright(image), image.format)
    pixels = _INTERPOLATIONS[interpolation](upright, size, crop)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged header raises whatever its reader runs into
        turn = None
    return image if turn is None else image.transpose(turn)


def _check_interpolation(interpolation: str) -> None:
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(
            f"interpolation: got {interpolation!r}, allowed are "
            f"{', '.join(map(repr, _INTERPOLATIONS))}"
        )


def _check_crop(crop: Crop) -> None:
    if crop is not None and (len(crop) != 2 or not all(0 <= at < 1 for at in crop)):
        raise ValueError(f"crop: got {crop}, allowed are two numbers from 0, below 1, or None")


def _bicubic(image: Image.Image, size: int, crop: Crop) -> Pixels:
    width, height = image.size
    # As the official resize: the product first, then the quotient, truncated.
    if width <= height:
        wide = size, int(size * height / width)
    else:
        wide = int(size * width / height), size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and wide[0] * wide[1] > max(limit, width * height):
        raise ValueError(f"{width} x {height} would be resized to {wide[0]} x {wide[1]}")
    image = image.resize(wide, Image.Resampling.BICUBIC)
    if crop is None:
        left, top = round((wide[0] - size) / 2), round((wide[1] - size) / 2)
    else:
        left, top = (int(at * (edge - size + 1)) for at, edge in zip(crop, wide, strict=True))
    return np.array(image.crop((left, top, left + size, top + size)))


def _bilinear(image: Image.Image, size: int, crop: Crop) -> Pixels:
    # OpenCV's fixed-point arithmetic: weights of 11 bits, then 4, 16 and 2 bits are dropped.
    pixels = np.asarray(image)  # [H, W, 3]
    shorter = min(image.size)
    across_at, down_at = (None, None) if crop is None else crop
    (left, right), across = _neighbours(image.width, shorter, size, across_at)
    rows, down = _neighbours(image.height, shorter, size, down_at)
    total = np.full((size, size, 3), 2, np.int32)
    for row, weight in zip(rows, down, strict=True):
        near = pixels[np.ix_(row, left)] * across[0][:, None]
        near += pixels[np.ix_(row, right)] * across[1][:, None]  # [size, size, 3]
        total += (near >> 4) * weight[:, None, None] >> 16
    return (total >> 2).astype(np.uint8)


def _neighbours(edge: int, shorter: int, size: int, at: float | None) -> tuple[Pixels, Pixels]:
    """For each place of the crop the two pixels beside it, and 2,048 times their weights."""
    length = round(edge * (size / shorter))
    first_place = (length - size) // 2 if at is None else int(at * (length - size + 1))
    places = np.arange(size) + first_place + 0.5
    places = (places * (1 / (length / edge)) - 0.5).astype(np.float32)
    first = np.floor(places)
    weights = np.stack([1 - (places - first), places - first]) * np.float32(2048)
    pixels = np.stack([first, first + 1]).clip(0, edge - 1).astype(np.int64)
    return pixels, np.rint(weights).astype(np.int32)  # each [2, size]


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INTERPOLATIONS = {"bicubic": _bicubic, "bilinear": _bilinear}


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and file_format not in ("PNG", "PPM")):
        raise ValueError(f"mode {image.mode}, whose white is unknown; allowed are 8 and 16 bits")
    if image.mode.startswith("I;16") or image.mode == "I":  # Pillow would clip it to 8 bits
        grey = np.asarray(image).astype(np.float32)
        if "transparency" in image.info:
            grey[grey == image.info["transparency"]] = 65535
        grey = (grey / 257).clip(0, 255).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_float(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape as float32 in [0, 1], the same bits on every device."""
    # Division by a Python number is multiplication by its inverse on a GPU.
    return pixels.float() / torch.full((), 255.0, device=pixels.device)


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] of any shape, clamped and rounded to 8 bits."""
    return pixels.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W], either uint8 or in [0, 1] and then clamped and rounded to 8 bits."""
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"pixels: got shape {list(pixels.shape)}, allowed is [3, H, W]")
    values = pixels if pixels.dtype == torch.uint8 else to_uint8(pixels)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


def write_png(
    path: str | os.PathLike[str],
    pixels: Tensor | Image.Image,
    *,
    software: str | None = None,
) -> None:
    """Write an image as a PNG file, which appears whole or not at all.

    Args:
        path: of the file.
        pixels: [3, H, W], uint8 or in [0, 1], or an image.
        software: what the file says wrote it, see `png_software`.

    Raises:
        ValueError: for pixels of another shape.
        OSError: when the file cannot be written.
    """
    image = to_image(pixels) if isinstance(pixels, Tensor) else pixels
    info = PngInfo()
    if software is not None:
        info.add_text("Software", software)
    with replacing(Path(path)) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def png_software(path: str | os.PathLike[str]) -> str | None:
    """The `software` of a file from `write_png`; None for any other, or one without."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            software: str | None = image.info.get("Software")
            return software
    except Exception:  # as in `read_pixels`
        return None


def grid(rows: Iterable[Iterable[Tensor]], *, gap: int = 2, scale: int = 1) -> Tensor:
    """Images [3, H, W] of one size laid out in rows on white.

    Args:
        rows: the images of each row; shorter rows are filled with white.
        gap: pixels between images.
        scale: side of the square that each pixel becomes.

    Returns:
        [3, height, width] float32.
    """
    table = [[image.float().clamp(0, 1).cpu() for image in row] for row in rows]
    if not table or not table[0]:
        raise ValueError("rows: got no image, at least one is needed")
    _, h, w = table[0][0].shape
    h, w, columns = h * scale, w * scale, max(len(row) for row in table)
    height, width = len(table) * (h + gap) - gap, columns * (w + gap) - gap
    canvas = torch.ones(3, height, width, dtype=torch.float32)
    for i, row in enumerate(table):
        for j, image in enumerate(row):
            large = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            canvas[:, i * (h + gap) : i * (h + gap) + h, j * (w + gap) : j * (w + gap) + w] = large
    return canvas
