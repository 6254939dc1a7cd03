"""`python -m bench.report [--check] [FILE ...]`: results JSON to the tables of the documents.

Takes the newest file of each machine under bench/results/, or the FILEs, and rewrites what stands
between `<!-- begin generated: NAME -->` and `<!-- end generated -->`:

    README.md          performance   every op on every machine: time, memory, speed-up
    docs/ops/<op>.md   measured      every provider of the op and its ratio to each of ours
                       exactness     what bench.exactness counted
                       scaling       time and memory against the number of codes, as a picture

Refuses, in one line, numbers of a quick run, of a source tree with changes or of a machine that
the file does not describe. `--check` writes nothing and exits with 1 where a document would change.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from bench.harness import CONTENDED, ROOT
from bench.plot import INK, SERIES, Axis, Panel, font
from titok_fast._files import replacing

OURS = "titok_fast"
BASELINE = "official"
DESCRIPTION = ("cpu_name", "cpus", "threads", "versions", "git")
REGION = re.compile(r"(<!-- begin generated: (\S+) -->\n).*?(<!-- end generated -->)", re.DOTALL)
CONTENDED_NOTE = "† Other processes kept a CPU busy during this time; do not rely on it."


class RefusedError(Exception):
    """Results that no document may quote, or a document that asks for what there is not."""


@dataclass(frozen=True)
class Row:
    """One provider on one case."""

    op: str
    case: str
    device: str
    provider: str
    seconds: float  # on a GPU the device's, cold cache
    host_seconds: float
    info: dict[str, Any]

    @property
    def ours(self) -> bool:
        return self.provider.startswith(OURS)

    @property
    def mark(self) -> str:
        return "†" if (self.info.get("other_cpus") or 0.0) > CONTENDED else ""

    @property
    def memory(self) -> str:
        extra = self.info.get("peak_extra_bytes")
        if extra is None:
            return ""
        return f"{extra / 2**20:,.0f} MiB" if extra >= 2**20 else f"{extra / 2**10:,.0f} KiB"

    def ratio(self, other: "Row | None") -> str:
        """How many times the other's time this one takes."""
        if other is None:
            return ""
        value = self.seconds / other.seconds
        return f"{value:,.{decimals(value, 2)}f}{self.mark or other.mark}"


@dataclass(frozen=True)
class Result:
    """One results file whose numbers may be quoted."""

    path: Path
    data: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> "Result":
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise RefusedError(f"{path.name}: {error}") from error
        machine = data.get("machine_info") or {}
        missing = [name for name in DESCRIPTION if not machine.get(name)]
        if missing:
            raise RefusedError(f"{path.name}: does not describe its machine: no {missing[0]}")
        if machine.get("quick") is not False:
            raise RefusedError(f"{path.name}: a quick run, which gives no figures to keep")
        if machine["git"].get("dirty") is not False:
            raise RefusedError(f"{path.name}: the source tree was not a clean commit")
        return cls(path, data)

    @property
    def rows(self) -> list[Row]:
        found = []
        for entry in self.data.get("benchmarks", []):
            info, median = entry["extra_info"], entry["stats"]["median"]
            op, sizes, *options = entry["group"].split()
            sizes = re.sub(r"(\w+)=(\d+),?", lambda m: f"{m[1]} = {int(m[2]):,}, ", sizes)
            found.append(
                Row(
                    op=op,
                    case=sizes + ", ".join(word for word in options if word != info["device"]),
                    device=info["device"],
                    provider=info["provider"],
                    seconds=info["device_ms"] / 1e3 if "device_ms" in info else median,
                    host_seconds=median,
                    info=info,
                )
            )
        return found

    def heading(self, document: Path) -> str:
        """The machine, the day, the versions and the file."""
        machine = self.data["machine_info"]
        versions = machine["versions"]
        names = [machine[key] for key in ("gpu_name", "cpu_name", "isa") if machine.get(key)]
        facts = [
            f"{machine['cpus']} CPUs",
            f"{machine['threads']} threads",
            f"torch {versions.get('torch')}",
            *(f"{name} {versions[name]}" for name in ("triton",) if machine.get("gpu_name")),
            self.data["datetime"][:10],
            f"commit {machine['git']['commit'][:7]}",
        ]
        link = os.path.relpath(self.path, (ROOT / document).parent)
        return f"**{', '.join(names)}**: {', '.join(facts)}, [`{self.path.name}`]({link})"


def newest(paths: Iterable[Path]) -> list[Path]:
    """The last of each kind of file that is not of a quick run: its name but for the date."""
    full = [path for path in sorted(paths) if not path.stem.endswith("-quick")]
    return list({path.stem[: -len("-2030-01-02")]: path for path in full}.values())


def table(head: list[str], lines: Iterable[list[str]], *, texts: int = 1) -> list[str]:
    """Markdown; the columns after the first `texts` are aligned to the right."""
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * texts}{'---:|' * (len(head) - texts)}",
        *(f"| {' | '.join(line)} |" for line in lines),
        "",
    ]


def decimals(value: float, most: int) -> int:
    """How many decimals show three digits, at most `most`."""
    return next((d for d in range(most) if value >= 10 ** (2 - d)), most)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.{decimals(1e3 * seconds, 3)}f}"


def grouped(rows: list[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def notes(rows: list[Row]) -> list[str]:
    return [CONTENDED_NOTE, ""] if any(row.mark for row in rows) else []


def performance(results: list[Result], document: Path) -> list[str]:
    """A table for each machine, op and device: cases against providers."""
    lines = []
    for result in results:
        if not result.rows:
            continue
        lines += [result.heading(document), ""]
        quoted = [r for r in result.rows if "[" not in r.provider and r.provider != "reference"]
        for (op, device), rows in grouped(quoted, lambda r: (r.op, r.device)).items():
            if not any(row.ours for row in rows):
                continue
            providers = sorted(
                grouped(rows, lambda r: r.provider), key=lambda p: not p.startswith(OURS)
            )
            body = []
            for case, members in grouped(rows, lambda r: r.case).items():
                cells = {row.provider: row for row in members}
                fastest = min(row.seconds for row in members)
                line = [case]
                for provider in providers:
                    row = cells.get(provider)
                    text = "-" if row is None else f"{milliseconds(row.seconds)} ms{row.mark}"
                    line.append(f"**{text}**" if row and row.seconds == fastest else text)
                ours = min((r for r in members if r.ours), key=lambda r: r.seconds, default=None)
                base = cells.get(BASELINE)
                line.append(f"{base.ratio(ours)}x" if base and ours else "-")
                line.append(" / ".join(row.memory for row in (ours, base) if row) or "-")
                body.append(line)
            head = [
                f"`{op}`, {device}",
                *providers,
                f"speed-up over {BASELINE}",
                "extra memory, ours / its",
            ]
            lines += [*table(head, body), *notes(rows)]
    if not any(result.data["machine_info"].get("gpu_name") for result in results):
        lines += ["No GPU has been measured yet.", ""]
    return lines


def measured(results: list[Result], document: Path) -> list[str]:
    """A table for each machine and device: every case with every provider, fastest first."""
    lines = []
    for result in results:
        own = [row for row in result.rows if row.op == document.stem]
        if own:
            lines += [result.heading(document), ""]
        for device, rows in grouped(own, lambda r: r.device).items():
            gpu = device == "cuda"
            ours = list(grouped([row for row in rows if row.ours], lambda r: r.provider))
            body = []
            for case, members in grouped(rows, lambda r: r.case).items():
                cells = {row.provider: row for row in members}
                for i, row in enumerate(sorted(members, key=lambda r: r.seconds)):
                    info = row.info
                    body.append(
                        [
                            "" if i else case,
                            row.provider,
                            milliseconds(row.seconds) + row.mark,
                            *([milliseconds(row.host_seconds)] if gpu else []),
                            f"{info['gflops']:,.1f}",
                            f"{info['share_of_gemm_peak']:.1%}",
                            row.memory,
                            *(row.ratio(cells.get(provider)) for provider in ours),
                            f"{info['wrong_indices']} of {info['checked_rows']:,}"
                            if "wrong_indices" in info
                            else "",
                        ]
                    )
            head = ["case", "provider", "ms", *(["host ms"] if gpu else []), "GFLOP/s"]
            head += ["of GEMM peak", "extra memory", *(f"time / {name}" for name in ours), "wrong"]
            lines += [*table(head, body, texts=2), *notes(rows)]
            peaks = result.data["machine_info"].get("peaks", {})
            own_peaks = [f"{name} {peaks[name]:,.0f}" for name in peaks if device in name.split()]
            lines += [f"Peaks: {', '.join(own_peaks)}.", ""] if own_peaks else []
    return lines


def exactness(results: list[Result], document: Path) -> list[str]:
    """A table for each machine of what bench.exactness counted, and its picture."""
    lines = []
    for result in results:
        if "exactness" not in result.data or result.data["op"] != document.stem:
            continue
        shapes = result.data["exactness"]
        body = [
            [
                f"K = {s['K']:,}, D = {s['D']}, {s['metric']}, {s['dtype']}, {s['device']}",
                f"{s['queries']:,}",
                f"{s['wrong']:,}",
                f"{s['rescored_mean']:,.1f} ({s['rescored_mean'] / s['K']:.2%})",
                f"{s['rescored_max']:,}",
            ]
            for s in shapes
        ]
        head = ["shape", "queries", "wrong", "codes rescored, mean", "most"]
        lines += [result.heading(document), "", *table(head, body)]
    picture = f"{document.stem}_exactness.png"
    if lines:
        lines += [f"![Codes rescored per row, and gaps of the best two codes]({picture})", ""]
    return lines or ["No run is on record yet.", ""]


def over_codes(results: list[Result], op: str) -> dict[str, list[tuple[int, Row]]]:
    """Per provider its (K, row) in the first machine's cases that differ in K alone."""
    for result in results:
        rows = [row for row in result.rows if row.op == op and "[" not in row.provider]
        rows = [row for row in rows if "K" in row.info]
        families = grouped(rows, lambda r: re.sub(r"K = [\d,]+, ", "", r.case))
        members = max(families.values(), key=len, default=[])
        found: dict[str, list[tuple[int, Row]]] = {}
        for row in members:
            codes = int(re.search(r"K = ([\d,]+)", row.case)[1].replace(",", ""))
            found.setdefault(row.provider, []).append((codes, row))
        if found:
            return {name: sorted(pairs, key=lambda p: p[0]) for name, pairs in found.items()}
    return {}


def scaling(results: list[Result], document: Path) -> list[str]:
    if not over_codes(results, document.stem):
        return ["No run is on record yet.", ""]
    return [f"![Time and memory against the number of codes]({document.stem}_codes.png)", ""]


def draw_scaling(lines: dict[str, list[tuple[int, Row]]], op: str) -> Image.Image:
    """Seconds and extra memory of each provider against K, both axes logarithmic."""
    canvas = Image.new("RGB", (1080, 480), "white")
    pen = ImageDraw.Draw(canvas)
    rows = [row for pairs in lines.values() for _, row in pairs]
    sizes = [codes for pairs in lines.values() for codes, _ in pairs]
    about = re.sub(r"K = [\d,]+, ", "", rows[0].case)
    pen.text((24, 16), f"{op}: {about}, {rows[0].device}", INK, font(18))
    x = Axis(min(sizes) * 0.7, max(sizes) * 1.4, log=True)
    for i, (title, unit, value) in enumerate(
        (
            ("time", "seconds", lambda row: row.seconds),
            ("extra memory", "MiB", lambda row: row.info.get("peak_extra_bytes") or 0),
        )
    ):
        scale = 2**20 if i else 1
        values = [value(row) / scale for row in rows if value(row)]
        box = (24 + 528 * i, 56, 24 + 528 * i + 504, 460)
        y = Axis(min(values) * 0.7, max(values) * 2, log=True)
        panel = Panel(pen, box, x, y, title=title, x_label="codes K", y_label=unit)
        for color, (name, pairs) in zip(SERIES, lines.items(), strict=False):
            points = [(codes, value(row) / scale) for codes, row in pairs if value(row)]
            if points:
                panel.line(points, color, name)
    return canvas


REGIONS = {
    "performance": performance,
    "measured": measured,
    "exactness": exactness,
    "scaling": scaling,
}


def rewritten(text: str, results: list[Result], document: Path) -> str:
    """The document with every region generated anew; `document` is relative to the root."""

    def region(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in REGIONS:
            raise RefusedError(f"{document}: no region is called {name!r}: {', '.join(REGIONS)}")
        lines = REGIONS[name](results, document)
        return f"{begin}\n" + re.sub(r"\n{3,}", "\n\n", "\n".join(lines) + "\n") + end

    return REGION.sub(region, text)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file is stale")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    files = options.files or newest((ROOT / "bench" / "results").glob("*.json"))
    stale = []
    try:
        results = [Result.load(path) for path in files]
        for path in (ROOT / "README.md", *sorted((ROOT / "docs" / "ops").glob("*.md"))):
            document, text = path.relative_to(ROOT), path.read_text()
            new = rewritten(text, results, document)
            if new != text:
                stale.append(str(document))
                if not options.check:
                    with replacing(path) as part:
                        part.write_text(new)
            lines = over_codes(results, path.stem)
            if lines and "begin generated: scaling" in text and not options.check:
                with replacing(path.with_name(f"{path.stem}_codes.png")) as part:
                    draw_scaling(lines, path.stem).save(part, "PNG")
    except RefusedError as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    for name in stale:
        print(f"{name} {'is not up to date: make report' if options.check else 'rewritten'}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
