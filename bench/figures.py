"""The pictures of the report: scaling with K and N, roofline, images per second."""

import re
from collections.abc import Callable, Iterable, Sequence

from PIL import Image, ImageDraw

from bench.plot import SERIES, Axis, Panel, legend
from bench.rows import BASELINE, Result, Row, decimals, grouped
from titok_fast.cli.drawing import FAINT, INK, font

WIDTH, MARGIN = 1080, 24
SIZES = {"K": "codes", "N": "rows"}
Series = dict[str, list[tuple[int, Row]]]


def quoted(rows: Iterable[Row]) -> list[Row]:
    """Without forced instruction sets and the float64 reference."""
    return [row for row in rows if not row.forced and row.provider != "reference"]


def providers_of(rows: Iterable[Row]) -> list[str]:
    """Titles, ours first, then the baseline."""
    titles = dict.fromkeys((not r.ours, r.provider != BASELINE, r.title) for r in rows)
    return [title for *_, title in sorted(titles, key=lambda key: key[:2])]


def scaling(result: Result, op: str, size: str) -> Series:
    """Per provider its (size, row) in the most cases that differ in `size` alone."""
    rows = [row for row in quoted(result.rows) if row.op == op and size in row.info]

    def family(row: Row) -> tuple[str, str]:
        return row.device, re.sub(rf"\b{size} = [\d,]+, ", "", row.case)

    families = grouped(rows, family).values()
    members = max(families, key=lambda rows: len({row.case for row in rows}), default=[])
    if len({row.case for row in members}) < 3:
        return {}
    return {
        title: sorted(
            ((row.info[size], row) for row in members if row.title == title), key=lambda p: p[0]
        )
        for title in providers_of(members)
    }


def best_scaling(results: Iterable[Result], op: str) -> tuple[Result, dict[str, Series]] | None:
    """The series over K and N of the file that has the longest; then most rows, then the newest."""
    found = []
    for result in results:
        series = {size: lines for size in SIZES if (lines := scaling(result, op, size))}
        points = [
            len({at for pairs in lines.values() for at, _ in pairs}) for lines in series.values()
        ]
        if series:
            rows = sum(len(pairs) for lines in series.values() for pairs in lines.values())
            found.append((sum(points), rows, str(result.data["datetime"]), result, series))
    if not found:
        return None
    *_, result, series = max(found, key=lambda entry: entry[:3])
    return result, series


def draw_scaling(result: Result, op: str, series: dict[str, Series]) -> Image.Image:
    """Seconds and extra memory of each provider against each size, all axes logarithmic."""
    rows = [row for lines in series.values() for pairs in lines.values() for _, row in pairs]
    names = providers_of(rows)
    colors = dict(zip(names, SERIES * 2, strict=False))
    canvas, pen, top = page(f"{op} on {result.title}", names, list(colors.values()), len(series))
    for size, lines in series.items():
        some = next(row for pairs in lines.values() for _, row in pairs)
        about = re.sub(rf"\b{size} = [\d,]+, ", "", some.case)
        sizes = [at for pairs in lines.values() for at, _ in pairs]
        measures: tuple[tuple[str, str, Callable[[Row], float]], ...] = (
            ("time", "seconds", lambda row: row.seconds),
            ("extra memory", "MiB", lambda row: (row.extra or 0) / 2**20),
        )
        for i, (title, unit, value) in enumerate(measures):
            values = [value(row) for pairs in lines.values() for _, row in pairs if value(row)]
            left = MARGIN + i * (WIDTH // 2 - MARGIN // 2)
            panel = Panel(
                pen,
                (left, top, left + WIDTH // 2 - 2 * MARGIN, top + 380),
                Axis(min(sizes) * 0.7, max(sizes) * 1.4, log=True),
                Axis(min(values) * 0.6, max(values) * 1.7, log=True),
                title=f"{title}: {about}",
                x_label=f"{SIZES[size]} {size}",
                y_label=unit,
            )
            for name, pairs in lines.items():
                points = [(at, value(row)) for at, row in pairs if value(row)]
                if points:
                    panel.line(points, colors[name])
        top += 410
    return canvas


def page(
    title: str,
    names: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    lines: int,
    width: int = WIDTH,
) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """A canvas for `lines` lines of panels with its title and legend, and where they start."""
    trial = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    top = legend(trial, (MARGIN, 46), names, colors, width - 2 * MARGIN) + 14
    canvas = Image.new("RGB", (width, top + 410 * lines), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, 14), title, INK, font(18))
    legend(pen, (MARGIN, 46), names, colors, width - 2 * MARGIN)
    return canvas, pen, top


def roofline_rows(results: Iterable[Result], op: str) -> list[tuple[Result, str, list[Row]]]:
    """Per file and device the rows of an op that have a rate, and whose roof was measured."""
    found = []
    for result in results:
        rows = [
            row
            for row in quoted(result.rows)
            if row.op == op and row.info.get("gflops") and not row.relative
        ]
        for device, own in grouped(rows, lambda row: row.device).items():
            if any(row.ours for row in own) and f"copy_gbytes_per_s {device}" in result.peaks:
                found.append((result, device, own))
    return found


def draw_roofline(charts: Sequence[tuple[Result, str, list[Row]]], op: str) -> Image.Image:
    """Rate against operations per byte that no method can avoid, below the measured roofs."""
    names = providers_of(row for *_, rows in charts for row in rows)
    colors = dict(zip(names, SERIES * 2, strict=False))
    count = (len(charts) + 1) // 2
    width = WIDTH if len(charts) > 1 else WIDTH // 2
    canvas, pen, top = page(f"{op}: roofline", names, list(colors.values()), count, width)
    for i, (result, device, rows) in enumerate(charts):
        points = [
            (row.info["gflops"] / row.info["gbytes_per_s"], row.info["gflops"], row) for row in rows
        ]
        gemm = {
            name.split()[-1]: rate
            for name, rate in sorted(result.peaks.items(), key=lambda peak: peak[1])
            if name.startswith(f"gemm_gflops {device}")
        }
        bandwidth = result.peaks[f"copy_gbytes_per_s {device}"]
        knees = [rate / bandwidth for rate in gemm.values()]
        rates = [rate for _, rate, _ in points]
        across = [*(intensity for intensity, *_ in points), *knees]
        left = MARGIN + i % 2 * (WIDTH // 2 - MARGIN // 2)
        y = top + i // 2 * 410
        panel = Panel(
            pen,
            (left, y, left + WIDTH // 2 - 2 * MARGIN, y + 380),
            Axis(min(across) * 0.2, max(max(across) * 2, max(knees) * 8), log=True),
            Axis(min(rates) * 0.4, max([*rates, *gemm.values()]) * 2, log=True),
            title=f"{result.title}, {device}",
            x_label="operations per byte",
            y_label="GFLOP/s",
        )
        levels = {  # one roof for dtypes that the device multiplies in the same way
            f"GEMM in {' and '.join(d for d in gemm if gemm[d] == rate)}, {rate:,.0f}": rate
            for rate in gemm.values()
        }
        panel.roof(bandwidth, levels, f"copy, {bandwidth:,.0f} GB/s")
        for intensity, rate, row in sorted(points, key=lambda p: p[2].ours):
            panel.dots([(intensity, rate)], colors[row.title])
    return canvas


def rate_rows(results: Iterable[Result]) -> list[tuple[Result, str, dict[str, list[Row]]]]:
    """Per file and device the models of bench_generate with each provider's best batch."""
    found = []
    for result in results:
        rows = [row for row in result.rows if row.op == "generate"]
        for device, own in grouped(rows, lambda row: row.device).items():
            models = {}
            for model, members in grouped(own, lambda row: row.info["model"]).items():
                best = [
                    max(batches, key=images_per_second)
                    for batches in grouped(members, lambda row: row.provider).values()
                ]
                models[model] = sorted(best, key=images_per_second)
            models = {name: best for name, best in models.items() if any(r.ours for r in best)}
            if models:
                found.append((result, device, models))
    return found


def images_per_second(row: Row) -> float:
    return row.info["B"] / row.seconds


def draw_rates(charts: Sequence[tuple[Result, str, dict[str, list[Row]]]]) -> Image.Image:
    """Bars of images per second for each model and provider, on a logarithmic axis."""
    bar, gap, heading, left = 20, 14, 40, 190
    names = providers_of(row for *_, models in charts for rows in models.values() for row in rows)
    colors = dict(zip(names, SERIES * 2, strict=False))
    heights = [
        heading + sum(bar * len(rows) + gap for rows in models.values()) for *_, models in charts
    ]
    canvas = Image.new("RGB", (WIDTH, 86 + sum(heights) + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text(
        (MARGIN, 14),
        "Images per second, from class labels to pixels (logarithmic bars)",
        INK,
        font(18),
    )
    top = legend(pen, (MARGIN, 46), names, list(colors.values()), WIDTH - 2 * MARGIN) + 14
    for result, device, models in charts:
        pen.text((MARGIN, top), f"{result.title}, {device}", INK, font(15))
        top += heading - 8
        rates = [images_per_second(row) for rows in models.values() for row in rows]
        axis = Axis(min(rates) * 0.5, max(rates) * 1.5, log=True)
        for model, rows in models.items():
            middle = top + bar * len(rows) / 2
            pen.text((left - 12, middle), model, INK, font(14), anchor="rm")
            for row in sorted(rows, key=lambda row: names.index(row.title)):
                rate = images_per_second(row)
                right = left + axis.at(rate) * (WIDTH - left - 220)
                pen.rectangle((left, top + 2, right, top + bar - 3), colors[row.title])
                text = f"{rate:,.{decimals(rate, 3)}f}, batch {row.info['B']}"
                pen.text((right + 6, top + bar / 2 - 1), text, FAINT, font(12), anchor="lm")
                top += bar
            top += gap
        top += 8
    return canvas
