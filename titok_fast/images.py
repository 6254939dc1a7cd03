"""Image files to tensors, as the official evaluation prepares them, and back."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from titok_fast._files import replacing


def read_image(path: str | os.PathLike[str], size: int) -> Tensor:
    """Read an image file: shorter edge to `size` (bicubic, antialiased), centre crop.

    EXIF rotation is applied, transparency is laid over white, 16-bit grey keeps its range.

    Args:
        path: of a file that Pillow reads.
        size: side of the result in pixels.

    Returns:
        [3, size, size] float32 in [0, 1].

    Raises:
        OSError: the file is missing or is not a readable image; the message names it.

    Source: the evaluation of TiTok (arXiv 2406.07550, section 4.1).
    """
    try:
        with Image.open(path) as file:
            image = _to_rgb(ImageOps.exif_transpose(file))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"{os.fspath(path)}: not a readable image ({error})") from error
    width, height = image.size
    scale = size / min(width, height)
    # The official resize truncates the longer edge.
    wide = (size, int(height * scale)) if width <= height else (int(width * scale), size)
    image = image.resize(wide, Image.Resampling.BICUBIC)
    left, top = round((wide[0] - size) / 2), round((wide[1] - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return to_tensor(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":  # Pillow would clip it to 8 bits
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as [3, H, W] float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1], clamped and rounded to 8 bits."""
    values = pixels.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


def write_png(path: str | os.PathLike[str], pixels: Tensor) -> None:
    """Write [3, H, W] in [0, 1]; the file appears whole or not at all."""
    with replacing(Path(path)) as temporary:
        to_image(pixels).save(temporary, format="PNG")


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
    canvas = torch.ones(3, len(table) * (h + gap) - gap, columns * (w + gap) - gap)
    for i, row in enumerate(table):
        for j, image in enumerate(row):
            large = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            canvas[:, i * (h + gap) : i * (h + gap) + h, j * (w + gap) : j * (w + gap) + w] = large
    return canvas
