"""The picture of `titok-fast profile`."""

import math

from PIL import Image, ImageDraw

from titok_fast.cli.drawing import FAINT, GRID, INK, font
from titok_fast.profiling import (
    DE_TOKENIZER,
    GRAPH,
    OTHER,
    STEP_OP,
    TRANSFORMER,
    Measurement,
    Profile,
)

WIDTH = 1040
MARGIN = 28
LABELS = 190  # width of what stands left of the bars
VALUES = 330  # and right of them
ROW = 34
BAR = 22
OURS, THEIRS = (52, 104, 172), (150, 154, 164)
COLORS = {
    TRANSFORMER: (52, 104, 172),
    GRAPH: (84, 140, 200),
    STEP_OP: (214, 132, 30),
    DE_TOKENIZER: (40, 140, 80),
    OTHER: (178, 182, 190),
}


def draw_profile(result: Profile, title: str) -> Image.Image:
    """Images per second above, on a logarithmic axis; below, the shares of each segment."""
    rows = len(result.measurements)
    height = 2 * MARGIN + 34 + 2 * (62 + rows * ROW) + 56
    canvas = Image.new("RGB", (WIDTH, height), (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN), title, INK, font(17))
    top = _speeds(pen, result, MARGIN + 44)
    top = _shares(pen, result, top + 36)
    if result.paper_speed_up is not None and result.baseline is not None:
        said = f"The paper (arXiv 2406.07550): {result.paper_speed_up}x over DiT-XL/2."
        pen.text((MARGIN, top + 8), said, FAINT, font(14))
    return canvas.crop((0, 0, WIDTH, top + 36 + MARGIN // 2))


def duration(seconds: float) -> str:
    """Three digits in the unit that fits."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def _speeds(pen: ImageDraw.ImageDraw, result: Profile, top: int) -> int:
    pen.text((MARGIN, top), "Images per second", INK, font(15))
    left, right = MARGIN + LABELS, WIDTH - MARGIN - VALUES
    speeds = [measurement.images_per_second for measurement in result.measurements]
    low = math.floor(math.log10(min(speeds)) - 0.3)
    high = max(low + 1, math.ceil(math.log10(max(speeds))))
    first, bottom = top + 30, top + 30 + ROW * len(speeds)
    for power in range(low, high + 1):
        across = left + (power - low) / (high - low) * (right - left)
        pen.line((across, first - 4, across, bottom), GRID)
        pen.text((across, bottom + 4), f"{10.0**power:g}", FAINT, font(12), anchor="mt")
    for i, (measurement, speed) in enumerate(zip(result.measurements, speeds, strict=True)):
        middle = first + i * ROW + ROW // 2
        pen.text((MARGIN, middle), _name(measurement), INK, font(14), anchor="lm")
        end = left + (math.log10(speed) - low) / (high - low) * (right - left)
        color = THEIRS if measurement.model == result.baseline else OURS
        pen.rectangle((left, middle - BAR // 2, end, middle + BAR // 2), color)
        words = [f"{speed:.3g} images/s", duration(measurement.latency)]
        speed_up = result.speed_up(measurement)
        if speed_up is not None:
            words.append(f"{speed_up:.3g}x faster")
        note = measurement.note
        height = middle - 6 if note else middle
        pen.text((right + 14, height), ", ".join(words), INK, font(14), anchor="lm")
        if note:
            pen.text((right + 14, middle + 9), note, FAINT, font(12), anchor="lm")
    return bottom + 20


def _shares(pen: ImageDraw.ImageDraw, result: Profile, top: int) -> int:
    pen.text((MARGIN, top), "Where the time goes", INK, font(15))
    left, right = MARGIN + LABELS, WIDTH - MARGIN
    used = [name for name in COLORS if any(name in m.measured for m in result.measurements)]
    across = float(left)
    for name in used:
        pen.rectangle((across, top + 3, across + 13, top + 16), COLORS[name])
        pen.text((across + 20, top + 1), name, FAINT, font(14))
        across += 20 + pen.textlength(name, font(14)) + 26
    for i, measurement in enumerate(result.measurements):
        middle = top + 30 + i * ROW + ROW // 2
        pen.text((MARGIN, middle), _name(measurement), INK, font(14), anchor="lm")
        breakdown, across = measurement.breakdown, float(left)
        for name in used:
            share = breakdown.get(name, 0.0) / measurement.latency
            end = across + share * (right - left)
            if end - across >= 1:
                pen.rectangle((across, middle - BAR // 2, end - 1, middle + BAR // 2), COLORS[name])
            text = f"{share:.0%}  {duration(breakdown.get(name, 0.0))}"
            if end - across > pen.textlength(text, font(13)) + 12:
                place = ((across + end) / 2, middle)
                pen.text(place, text, (255, 255, 255), font(13), anchor="mm")
            across = end
    return top + 30 + ROW * len(result.measurements)


def _name(measurement: Measurement) -> str:
    return f"{measurement.model}, {measurement.mode}"
