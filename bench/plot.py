"""Charts drawn with pillow: panels with axes, bars and lines."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import ImageDraw

from titok_fast.cli.drawing import FAINT, GRID, INK, font

BAR = (52, 104, 172)
MARK = (190, 48, 48)
SERIES = (
    BAR,
    MARK,
    (40, 140, 80),
    (214, 132, 30),
    (124, 82, 170),
    (96, 100, 110),
    (20, 150, 170),
    (150, 105, 70),
    (200, 90, 160),
    (130, 150, 30),
)


@dataclass(frozen=True)
class Axis:
    """Maps `low`..`high` to 0..1, by its logarithm where `log`."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self) -> list[float]:
        """Some six round values, powers of ten where `log` and these are enough."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            if last - first < 2:
                steps = [m * 10.0**i for i in range(first - 1, last + 1) for m in (1, 2, 5)]
                return [step for step in steps if self.low <= step <= self.high]
            return [10.0**i for i in range(first, last + 1, 1 + (last - first) // 6)]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
        while (self.high - self.low) / step > 5:
            step *= 2 if f"{step:e}"[0] != "2" else 2.5
        first = math.ceil(self.low / step)
        return [step * i for i in range(first, math.floor(self.high / step) + 1)]


def label(value: float) -> str:
    """A tick's text: 1e6 for a million, 100,000 below it."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:,.10g}"


class Panel:
    """A titled chart inside `box` = (left, top, right, bottom) pixels."""

    def __init__(
        self,
        pen: ImageDraw.ImageDraw,
        box: tuple[int, int, int, int],
        x: Axis,
        y: Axis,
        *,
        title: str,
        x_label: str,
        y_label: str,
    ) -> None:
        self.pen, self.x, self.y = pen, x, y
        self.left, self.top, self.right, self.bottom = (
            box[0] + 56,
            box[1] + 44,
            box[2] - 12,
            box[3] - 46,
        )
        pen.text((box[0], box[1]), title, INK, font(15))
        pen.text((box[0], box[1] + 20), y_label, FAINT, font(12))
        pen.text(((self.left + self.right) // 2, box[3]), x_label, FAINT, font(12), anchor="ms")
        for value in y.ticks():
            height = self.point(x.low, value)[1]
            pen.line((self.left, height, self.right, height), GRID)
            pen.text((self.left - 6, height), label(value), FAINT, font(12), anchor="rm")
        for value in x.ticks():
            across = self.point(value, y.low)[0]
            pen.line((across, self.bottom, across, self.bottom + 4), FAINT)
            pen.text((across, self.bottom + 7), label(value), FAINT, font(12), anchor="mt")
        pen.line((self.left, self.bottom, self.right, self.bottom), FAINT)

    def point(self, x: float, y: float) -> tuple[float, float]:
        return (
            self.left + self.x.at(x) * (self.right - self.left),
            self.bottom - self.y.at(y) * (self.bottom - self.top),
        )

    def bars(self, edges: Sequence[float], heights: Iterable[float]) -> None:
        """A bar of `heights[i]` from `edges[i]` to `edges[i + 1]`; none where it is 0."""
        for (low, high), height in zip(pairwise(edges), heights, strict=True):
            if height > 0:
                (left, top), (right, _) = self.point(low, height), self.point(high, height)
                right = max(left + 2, right - 1)
                self.pen.rectangle((left, min(top, self.bottom - 2), right, self.bottom), BAR)

    def line(self, points: Sequence[tuple[float, float]], color: tuple[int, int, int]) -> None:
        """Points joined in order."""
        self.pen.line([self.point(*point) for point in points], color, 2)
        self.dots(points, color)

    def dots(self, points: Sequence[tuple[float, float]], color: tuple[int, int, int]) -> None:
        for across, height in (self.point(*point) for point in points):
            box = (across - 3.5, height - 3.5, across + 3.5, height + 3.5)
            self.pen.ellipse(box, color, "white")

    def roof(self, slope: float, levels: dict[str, float], name: str) -> None:
        """The line y = slope x, called `name`, and on it each of `levels` by name."""
        foot = max(self.x.low, self.y.low / slope)
        knees = {text: max(self.x.low, level / slope) for text, level in levels.items()}
        top = max(knees.values())
        self.pen.line([self.point(foot, slope * foot), self.point(top, slope * top)], FAINT, 1)
        knee = min(knees.values())
        across, height = self.point(knee, slope * knee)
        self.pen.text((across - 8, height - 3), name, FAINT, font(11), anchor="rs")
        for text, level in levels.items():
            ends = [self.point(knees[text], level), self.point(self.x.high, level)]
            self.pen.line(ends, FAINT, 1)
            left, height = ends[0]
            self.pen.text((left + 6, height + 4), text, FAINT, font(11))

    def mark(self, x: float, text: str) -> None:
        """A vertical line with a text on its right."""
        across = self.point(x, self.y.low)[0]
        self.pen.line((across, self.top, across, self.bottom), MARK)
        self.pen.text((across + 4, self.top), text, MARK, font(12))


def legend(
    pen: ImageDraw.ImageDraw,
    place: tuple[int, int],
    names: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    width: int,
) -> int:
    """Names beside their colours, in as many lines as `width` asks for; returns the bottom."""
    left, top = place
    across = left
    for name, color in zip(names, colors, strict=True):
        size = 34 + round(font(13).getlength(name))
        if across > left and across + size > left + width:
            across, top = left, top + 20
        pen.rectangle((across, top + 3, across + 10, top + 13), color)
        pen.text((across + 15, top), name, INK, font(13))
        across += size
    return top + 20
