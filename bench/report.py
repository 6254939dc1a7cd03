"""`python -m bench.report [--check] [FILE ...]`: results JSON to the documents' tables and charts.

Takes the newest file of each machine under bench/results/, or the FILEs, and rewrites what stands
between `<!-- begin generated: NAME -->` and `<!-- end generated -->`:

    README.md            summary      the goals' cases on the newest of each goal's machine: ours,
                                      official, next best
                         goals        every goal with its value on every such machine
    docs/performance.md  profiles     samplers beside a diffusion model, of bench/results/profiles/
                         rates        images per second of every model, as a picture
                         performance  every op on every machine: time, memory, speed-up
    docs/ops/<op>.md     measured     every provider of the op and its ratio to each of ours
                         exactness    what bench.exactness counted
                         scaling      time and memory against K and N, as a picture
                         roofline     rates below the measured roofs, as a picture

Refuses, in one line, numbers of a quick run, of a source tree with changes or of a machine that
the file does not describe. `--check` writes nothing and exits with 1 where a document or
picture would change.
"""

import argparse
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bench import figures, goals
from bench.harness import ROOT
from bench.rows import (
    BASELINE,
    OURS,
    RefusedError,
    Result,
    Row,
    decimals,
    grouped,
    newest,
    quotable,
)
from titok_fast._files import replacing
from titok_fast.cli.profile import headline
from titok_fast.cli.profile_chart import draw_profile, duration
from titok_fast.ops.inspect import CAPABILITIES
from titok_fast.profiling import Measurement, Profile

REGION = re.compile(r"(<!-- begin generated: (\S+) -->\n).*?(<!-- end generated -->)", re.DOTALL)
CONTENDED_NOTE = "† Other processes kept a CPU busy during this time; do not rely on it."
VERDICTS = {"met": "**{}**", "missed": "{}, missed", "not measured": "not measured"}
NO_RUN = ["No run is on record yet.", ""]
RATES = Path("docs/images_per_second.png")
PROFILE, DRAWN_MODEL = Path("docs/profile.png"), "titok-l-32"
DIGEST = "results"  # a text of the PNG files
PERFORMANCE = Path("docs/performance.md")


def heading(result: Result, document: Path) -> str:
    """The machine, the day, the versions and the file."""
    machine, versions = result.machine, result.machine["versions"]
    facts = [
        f"{machine['cpus']} CPUs",
        f"{machine['threads']} threads",
        f"torch {versions.get('torch')}",
        *(f"{name} {versions[name]}" for name in ("triton",) if machine.get("gpu_name")),
        result.data["datetime"][:10],
        f"commit {machine['git']['commit'][:7]}",
    ]
    return f"**{result.title}**: {', '.join(facts)}, {link(result.path, document)}"


def link(path: Path, document: Path) -> str:
    """A link to a results file; `document` is relative to the root."""
    return f"[`{path.name}`]({os.path.relpath(path, (ROOT / document).parent)})"


def table(head: list[str], lines: Iterable[list[str]], *, texts: int = 1) -> list[str]:
    """Markdown; the columns after the first `texts` are aligned to the right."""
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * texts}{'---:|' * (len(head) - texts)}",
        *(f"| {' | '.join(line)} |" for line in lines),
        "",
    ]


def picture(document: Path, path: Path, text: str) -> list[str]:
    return [f"![{text}]({os.path.relpath(path, document.parent)})", ""]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.{decimals(1e3 * seconds, 3)}f}"


def notes(marked: bool) -> list[str]:
    return [CONTENDED_NOTE, ""] if marked else []


def fastest(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=lambda row: row.seconds, default=None)


def speed_up(base: Row, ours: Row) -> str:
    mark = ours.mark or base.mark
    return f"{base.ratio(ours).removesuffix(mark)}x{mark}"


def architectures(results: list[Result]) -> list[str]:
    """Which GPU architectures have run, and which are only compiled for."""
    ran = {result.machine.get("gpu_architecture") for result in results} - {None}
    compiled = [f"sm_{c}" for c in CAPABILITIES if f"sm_{c}" not in ran]
    lines = [] if ran else ["No GPU has been measured yet."]
    if compiled:
        lines.append(f"Compiled for, and never run on: {', '.join(compiled)}.")
    return [" ".join(lines), ""]


def outcomes(
    machine: goals.Machine | None, results: list[Result]
) -> dict[str, list[goals.Outcome]]:
    """The goals of a machine on each that is one, by its title; unmeasured where none is."""
    own = [goal for goal in goals.GOALS if goal.machine is machine]
    found = {
        title: [goals.outcome(goal, of_one) for goal in own]
        for title, of_one in grouped(results, lambda result: result.title).items()
    }
    measured = {title: all_ for title, all_ in found.items() if any(o.result for o in all_)}
    return measured or {"nothing yet": [goals.Outcome(goal) for goal in own]}


def machine_name(machine: goals.Machine | None) -> str:
    return machine.name if machine else "any machine"


def summary(results: list[Result], document: Path) -> list[str]:
    """The cases that a goal compares with the official arithmetic."""
    lines = []
    for result in newest_of_goals(results):
        body, marked = [], False
        compared = [row for row in figures.quoted(result.rows) if not row.relative]
        groups = grouped(compared, lambda r: (r.op, r.device, r.case))
        for (op, device, case), rows in groups.items():
            ours = fastest(row for row in rows if row.ours)
            base = next((row for row in rows if row.provider == BASELINE), None)
            if not ours or not base or not compared_by_a_goal(ours):
                continue
            other = fastest(row for row in rows if not row.ours and row is not base)
            marked |= any(row.contended for row in (ours, base, other) if row)
            body.append(
                [
                    f"`{op}`, {device}" if result.machine.get("gpu_name") else f"`{op}`",
                    case,
                    f"{ours.provider.removeprefix(f'{OURS}-')} {milliseconds(ours.seconds)} ms"
                    f"{ours.mark}",
                    f"{milliseconds(base.seconds)} ms{base.mark}",
                    f"{other.provider} {milliseconds(other.seconds)} ms{other.mark}"
                    if other
                    else "",
                    speed_up(base, ours),
                    f"{ours.memory} / {base.memory}",
                ]
            )
        head = ["", "case", "ours", BASELINE, "next best", "speed-up", "extra memory, ours / its"]
        if body:
            lines += [heading(result, document), "", *table(head, body, texts=2), *notes(marked)]
    if figures.rate_rows(results):
        lines += picture(document, RATES, "Images per second, from class labels to pixels")
    return lines + architectures(results)


def newest_of_goals(results: list[Result]) -> list[Result]:
    """The newest result of each machine that goals were set for."""
    found: dict[str, Result] = {}
    for result in sorted(results, key=lambda result: str(result.data["datetime"])):
        for machine in machines():
            if machine is not None and result.rows and machine.matches(result.machine):
                found[machine.name] = result
    return list(found.values())


def machines() -> list[goals.Machine | None]:
    return list(dict.fromkeys(goal.machine for goal in goals.GOALS))


def compared_by_a_goal(row: Row) -> bool:
    return any(
        goal.op == row.op
        and isinstance(goal.quantity, goals.Over)
        and "[" not in goal.quantity.ours
        and any(goals.holds({**goal.case, **change}, row.info) for change in goal.quantity.each)
        for goal in goals.GOALS
    )


def every_goal(results: list[Result], document: Path) -> list[str]:
    """How many goals each machine meets, and a table of them with a column for each."""
    counts, tables = [], []
    for machine in machines():
        found = outcomes(machine, results)
        for title, column in found.items():
            verdicts = Counter(outcome.verdict for outcome in column)
            files = dict.fromkeys(o.result.path for o in column if o.result)
            links = ", ".join(link(path, document) for path in files)
            numbers = [str(verdicts[name]) for name in ("met", "missed", "not measured")]
            counts.append([machine_name(machine), title, *numbers, links])
        columns = list(found.values())
        body = []
        for row in zip(*columns, strict=True):
            goal = row[0].goal
            provider = f"`{goal.quantity.providers[0]}`" if goal.quantity.providers else ""
            about = [f"`{goal.op}`", goal.shape, provider, goal.quantity.name, goal.threshold]
            body.append([*about, *(VERDICTS[o.verdict].format(o.measured) for o in row)])
        tables += [f"On {machine_name(machine)}:", ""]
        tables += table(["", "case", "provider", "quantity", "goal", *found], body, texts=4)
        tables += notes(any(outcome.contended for column in columns for outcome in column))
    head = ["goals set for", "measured on", "met", "missed", "not measured", ""]
    total = f"All {len(goals.GOALS)} goals, each with its measured value: <b>met</b> or missed"
    return [
        *table(head, counts, texts=2),
        *("<details>", f"<summary>{total}</summary>", "", *tables, "</details>", ""),
    ]


def rates(results: list[Result], document: Path) -> list[str]:
    if not figures.rate_rows(results):
        return NO_RUN
    return picture(document, RATES, "Images per second, from class labels to pixels")


def performance(results: list[Result], document: Path) -> list[str]:
    """A table for each machine, op and device: cases against providers; and who was absent."""
    lines = []
    for result in results:
        if not result.rows:
            continue
        lines += [heading(result, document), ""]
        quoted = figures.quoted(result.rows)
        for (op, device), rows in grouped(quoted, lambda r: (r.op, r.device)).items():
            if not any(row.ours for row in rows):
                continue
            titles = figures.providers_of(rows)
            body = []
            for case, members in grouped(rows, lambda r: r.case).items():
                cells = {row.title: row for row in members}
                best = fastest(row for row in members if not row.relative)
                line = [case]
                for title in titles:
                    row = cells.get(title)
                    text = "-" if row is None else f"{milliseconds(row.seconds)} ms{row.mark}"
                    line.append(f"**{text}**" if row and row is best else text)
                ours = fastest(row for row in members if row.ours)
                base = cells.get(BASELINE)
                line.append(speed_up(base, ours) if base and ours else "-")
                line.append(" / ".join(row.memory for row in (ours, base) if row) or "-")
                body.append(line)
            head = [
                f"`{op}`, {device}",
                *titles,
                f"speed-up over {BASELINE}",
                "extra memory, ours / its",
            ]
            lines += [*table(head, body), *notes(any(row.contended for row in rows))]
        lines += absent(result)
    return lines + architectures(results)


def absent(result: Result) -> list[str]:
    """The peers that could not run, and the rows that failed or that no time was left for."""
    reasons = result.machine.get("absent", {}).items()
    peers = [f"{name} ({why})" for name, why in reasons if not name.startswith(OURS)]
    left_out, failed = (result.machine.get(key, []) for key in ("left_out", "failed"))
    lines = [f"Absent: {', '.join(peers)}."] if peers else []
    if left_out:
        lines.append(f"No time was left for {len(left_out)} rows: {', '.join(left_out)}.")
    if failed:
        lines.append(f"Failed, and not timed: {', '.join(failed)}.")
    return [" ".join(lines), ""] if lines else []


def measured(results: list[Result], document: Path) -> list[str]:
    """A table for each machine and device: every case with every provider, fastest first."""
    lines = []
    for result in results:
        own = [row for row in result.rows if row.op == document.stem]
        if own:
            lines += [heading(result, document), ""]
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
                            row.title,
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
            lines += [*table(head, body, texts=2), *notes(any(row.contended for row in rows))]
            peaks = result.peaks.items()
            own_peaks = [f"{name} {rate:,.0f}" for name, rate in peaks if device in name.split()]
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
        lines += [heading(result, document), "", *table(head, body)]
    path = document.with_name(f"{document.stem}_exactness.png")
    if lines:
        lines += picture(document, path, "Codes rescored per row, and gaps of the best two codes")
    return lines or NO_RUN


def profile_files() -> list[Path]:
    """Those of `bench.profile`, the newest of a machine and model."""
    return newest((ROOT / "bench" / "results" / "profiles").glob("*.json"))


def drawn_profile() -> Profile | None:
    """One that stands for all, as it was measured."""
    found = [data for path in profile_files() if (data := quotable(path))["model"] == DRAWN_MODEL]
    if not found:
        return None
    data = found[-1]
    measurements = tuple(
        Measurement(
            model=measured["model"],
            mode=measured["mode"],
            batch_size=data["batch_size"],
            steps=measured["steps"],
            measured_steps=measured["measured_steps"],
            measured=measured["measured_seconds"],
            other_cpus=measured["other_cpus"],
        )
        for measured in data["measurements"]
    )
    names = ("model", "baseline", "image_size", "batch_size", "device", "versions")
    options = {name: data[name] for name in names}
    return Profile(dtype=getattr(torch, data["dtype"]), measurements=measurements, **options)


def profiles(_results: list[Result], document: Path) -> list[str]:
    """A table for each file of `bench.profile`, and a picture of one."""
    lines = []
    head = ["model", "mode", "steps", "images/s", "latency", "speed-up", "the paper's"]
    head += ["transformer", "step op", "de-tokenizer", "other"]
    for path in profile_files():
        data = quotable(path)
        body = []
        for measured in data["measurements"]:
            faster, paper = measured["speed_up"], data["paper_speed_up"]
            note = measured["extrapolation"]
            seconds = measured["breakdown_seconds"]
            body.append(
                [
                    f"`{measured['model']}`",
                    measured["mode"],
                    f"{measured['steps']}{f', {note}' if note else ''}",
                    f"{measured['images_per_second']:.3g}",
                    duration(measured["latency_seconds"]),
                    f"{faster:.3g}x" if faster else "",
                    f"{paper}x" if faster and paper else "",
                    *(duration(seconds[name]) if name in seconds else "" for name in head[7:]),
                ]
            )
        title = f"{data['model']} and {data['baseline']}, {data['image_size']} px"
        facts = [f"batch of {data['batch_size']}", data["dtype"], data["device"]]
        facts += [f"torch {data['versions']['torch']}", path.stem[-len("2030-01-02") :]]
        lines += [f"**{title}**: {', '.join(facts)}, {link(path, document)}", ""]
        lines += table(head, body, texts=3)
    if (drawn := drawn_profile()) is not None:
        lines += picture(document, PROFILE, headline(drawn))
    return lines or NO_RUN


def scaling_path(document: Path) -> Path:
    return document.with_name(f"{document.stem}_scaling.png")


def roofline_path(document: Path) -> Path:
    return document.with_name(f"{document.stem}_roofline.png")


def scaling(results: list[Result], document: Path) -> list[str]:
    found = figures.best_scaling(results, document.stem)
    if found is None:
        return NO_RUN
    sizes = " and ".join(figures.SIZES[size] for size in found[1])
    return picture(
        document, scaling_path(document), f"Time and memory against the number of {sizes}"
    )


def roofline(results: list[Result], document: Path) -> list[str]:
    if not figures.roofline_rows(results, document.stem):
        return NO_RUN
    return picture(document, roofline_path(document), "Rates below the measured roofs")


REGIONS = {
    "summary": summary,
    "goals": every_goal,
    "profiles": profiles,
    "rates": rates,
    "performance": performance,
    "measured": measured,
    "exactness": exactness,
    "scaling": scaling,
    "roofline": roofline,
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


def pictures(text: str, results: list[Result], document: Path) -> dict[Path, Image.Image]:
    """What the regions of a document show, by path relative to the root."""
    drawn: dict[Path, Image.Image] = {}
    regions = {found[2] for found in REGION.finditer(text)}
    series = figures.best_scaling(results, document.stem)
    if "scaling" in regions and series is not None:
        drawn[scaling_path(document)] = figures.draw_scaling(series[0], document.stem, series[1])
    charts = figures.roofline_rows(results, document.stem)
    if "roofline" in regions and charts:
        drawn[roofline_path(document)] = figures.draw_roofline(charts, document.stem)
    models = figures.rate_rows(results)
    if "rates" in regions and models:
        drawn[RATES] = figures.draw_rates(models)
    if "profiles" in regions and (profile := drawn_profile()) is not None:
        drawn[PROFILE] = draw_profile(profile, headline(profile))
    return drawn


def digest(results: list[Result]) -> str:
    """Of the files that a picture is drawn from, which it keeps."""
    paths = [*(result.path for result in results), *profile_files()]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def drawn_from(path: Path) -> tuple[str | None, tuple[int, int]] | None:
    """The digest that a picture keeps, and its size."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get(DIGEST), image.size


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file is stale")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    files = options.files or newest((ROOT / "bench" / "results").glob("*.json"))
    documents = (ROOT / "README.md", ROOT / PERFORMANCE, *sorted((ROOT / "docs/ops").glob("*.md")))
    stale = []
    try:
        results = [Result.load(path) for path in files]
        sources = digest(results)
        for path in documents:
            document, text = path.relative_to(ROOT), path.read_text()
            new = rewritten(text, results, document)
            if new != text:
                stale.append(str(document))
            drawn = pictures(text, results, document)
            stale += [
                str(name)
                for name, image in drawn.items()
                if drawn_from(ROOT / name) != (sources, image.size)
            ]
            if options.check:
                continue
            if new != text:
                with replacing(path) as part:
                    part.write_text(new)
            for name, image in drawn.items():
                facts = PngInfo()
                facts.add_text(DIGEST, sources)
                with replacing(ROOT / name) as part:
                    image.save(part, "PNG", pnginfo=facts)
    except RefusedError as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    for name in dict.fromkeys(stale):
        print(f"{name} {'is not up to date: make report' if options.check else 'rewritten'}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
