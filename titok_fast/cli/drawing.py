"""The picture of `titok-fast inspect`."""

from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from titok_fast.analysis import TokenChanges
from titok_fast.images import to_image

PANEL = 256  # side of the large panels in pixels
THUMB = 128  # side of the pictures of a token
GAP = 12
MARGIN = 24
STRIP = 40  # height of a row of the strip of tokens
HEADER = 24  # height of a token's coloured header

INK = (28, 30, 36)
FAINT = (104, 108, 118)
GRID = (228, 230, 234)
HEAT = torch.tensor(  # from no change to the largest
    [[8, 8, 16], [72, 20, 112], [190, 48, 96], [246, 140, 40], [255, 250, 205]]
)


@dataclass(frozen=True)
class TokenLabels:
    """How the L tokens are shown.

    Attributes:
        colors: [L, 3] in [0, 1].
        names: L texts for the strip of tokens.
        legend: lines that explain names and colours.
        headers: L texts for the pictures of what they change.
        replacement: what each token is replaced by, in words.
    """

    colors: Tensor
    names: list[str]
    legend: list[str]
    headers: list[str]
    replacement: str


def draw(image: Tensor, changes: TokenChanges, labels: TokenLabels, title: str) -> Image.Image:
    """Image, reconstruction and tokens above; below, what each token changes.

    Args:
        image: [3, S, S] in [0, 1].
        changes: of its tokens.
        labels: of its tokens.
        title: the first line.

    Returns:
        An RGB image whose size depends on S and L alone.
    """
    count = len(labels.names)
    columns = 4 if count <= 32 else 8
    strip_columns = 4 if count <= 32 else 16
    cell = (2 * THUMB + 4, HEADER + THUMB + GAP)  # width and height
    width = columns * (cell[0] + GAP) - GAP + 2 * MARGIN
    strip_left = MARGIN + 3 * (PANEL + GAP)
    panels_top = MARGIN + 66
    strip_height = -(-count // strip_columns) * STRIP
    below = panels_top + max(PANEL, strip_height + 40) + 26
    cells_top = below + 84
    height = cells_top + -(-count // columns) * (cell[1] + GAP) + MARGIN - GAP
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)

    _text(pen, (MARGIN, MARGIN - 6), title, 22)
    difference = (image - changes.reconstruction).abs().mean(0)  # [S, S]
    peak = float(torch.cat([difference[None], changes.changes]).max())
    for i, (picture, caption) in enumerate(
        (
            (to_image(image), "image"),
            (to_image(changes.reconstruction), "reconstruction from the tokens"),
            (_heat(difference, peak), "difference of the two"),
        )
    ):
        left = MARGIN + i * (PANEL + GAP)
        _text(pen, (left, panels_top - 24), caption, 15)
        _paste(canvas, picture, (left, panels_top), PANEL)
    _text(pen, (strip_left, panels_top - 24), "tokens, in order", 15)
    strip_width = width - MARGIN - strip_left
    _strip(pen, (strip_left, panels_top), strip_width, strip_columns, labels)
    for i, line in enumerate(labels.legend):
        _text(pen, (strip_left, panels_top + strip_height + 4 + 20 * i), line, 14, FAINT)

    _text(pen, (MARGIN, below), "What each token changes", 18)
    _text(
        pen,
        (MARGIN, below + 26),
        f"One token is replaced by {labels.replacement} and the image decoded again. "
        "Left: the new reconstruction.",
        14,
        FAINT,
    )
    _text(
        pen,
        (MARGIN, below + 46),
        "Right: where it differs from the one above, all on one scale; the number is the mean.",
        14,
        FAINT,
    )
    _scale(canvas, pen, (width - MARGIN - 2 * THUMB - 4, below + 2), peak)
    for i in range(count):
        left = MARGIN + i % columns * (cell[0] + GAP)
        top = cells_top + i // columns * (cell[1] + GAP)
        color = _rgb(labels.colors[i])
        pen.rectangle((left, top, left + cell[0] - 1, top + HEADER - 1), fill=color)
        ink = _readable(color)
        _text(pen, (left + 6, top + 4), labels.headers[i], 14, ink)
        mean = f"{100 * float(changes.changes[i].mean()):.2f}%"
        pen.text((left + cell[0] - 6, top + 4), mean, ink, font(14), anchor="ra")
        _paste(canvas, to_image(changes.images[i]), (left, top + HEADER), THUMB)
        heat = _heat(changes.changes[i], peak)
        _paste(canvas, heat, (left + THUMB + 4, top + HEADER), THUMB)
    return canvas


def _strip(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    width: int,
    columns: int,
    labels: TokenLabels,
) -> None:
    """The tokens as coloured boxes with their names."""
    step = (width + 4) // columns
    for i, name in enumerate(labels.names):
        left, top = corner[0] + i % columns * step, corner[1] + i // columns * STRIP
        color = _rgb(labels.colors[i])
        pen.rectangle((left, top, left + step - 5, top + STRIP - 5), fill=color)
        center = (left + (step - 4) // 2, top + (STRIP - 4) // 2)
        pen.text(center, name, _readable(color), font(15), anchor="mm")


def _scale(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], peak: float
) -> None:
    """The colours of the heat maps."""
    width = 2 * THUMB + 4
    ramp = torch.linspace(0, 1, width).expand(14, width)
    canvas.paste(_heat(ramp, 1.0), (corner[0], corner[1] + 22))
    _text(pen, corner, "no change", 14, FAINT)
    right = (corner[0] + width - 1, corner[1])
    pen.text(right, f"{100 * peak:.0f}% of white", FAINT, font(14), anchor="ra")


def _heat(values: Tensor, peak: float) -> Image.Image:
    """[H, W] in [0, peak] as colours."""
    position = (values / max(peak, 1e-12)).clamp(0, 1) * (len(HEAT) - 1)  # [H, W]
    low = position.long().clamp(max=len(HEAT) - 2)
    mixed = torch.lerp(HEAT[low].float(), HEAT[low + 1].float(), (position - low)[..., None])
    return Image.fromarray(mixed.round().to(torch.uint8).numpy())


def _paste(canvas: Image.Image, picture: Image.Image, corner: tuple[int, int], side: int) -> None:
    # Pixels of a small image stay visible as squares.
    enlarged = picture.width <= side
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    canvas.paste(picture.resize((side, side), method), corner)


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own, of a height in pixels."""
    return ImageFont.load_default(size)


def _text(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    size: int,
    fill: tuple[int, int, int] = INK,
) -> None:
    pen.text(corner, text, fill, font(size))


def _rgb(color: Tensor) -> tuple[int, int, int]:
    red, green, blue = (color.clamp(0, 1) * 255).round().int().tolist()
    return red, green, blue


def _readable(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever stands out."""
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return (0, 0, 0) if luminance > 140 else (255, 255, 255)
