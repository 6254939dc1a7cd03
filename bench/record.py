"""The record of a run: a line of JSON for whatever happens, so that no crash loses a row.

`conftest.py` writes it and `run.py` makes the results of it, or of one for each visit. Its lines:

    {"machine": {...}, "selected": [NAME, ...]}           a process is about to begin
    {"start": NAME}                                       a row, by its name
    {"end": NAME, "gate": WORDS, "benchmark": {...}}      null where it was not timed
"""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.harness import LATE

CRASHED = "failed: the process ended, or was stopped, during it"


def add(path: Path, **line: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines so far; one that a crash cut off is none."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def started(lines: list[dict[str, Any]]) -> set[str]:
    return {line["start"] for line in lines if "start" in line}


def _gates(lines: list[dict[str, Any]]) -> dict[str, str]:
    gates = dict.fromkeys((line["start"] for line in lines if "start" in line), CRASHED)
    return gates | {line["end"]: line["gate"] for line in lines if "end" in line}


def middle(visits: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a row's visits the one with the median time, the lower of two; all times beside it."""
    if len(visits) == 1:
        return visits[0]
    times = [visit["stats"]["median"] for visit in visits]
    found = visits[times.index(sorted(times)[(len(times) - 1) // 2])]
    found["extra_info"]["visits_ms"] = [1e3 * seconds for seconds in times]
    return found


def results(lines: list[dict[str, Any]], *again: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What a results file holds, or None where no row was begun.

    Args:
        lines: the record of a run.
        *again: those of further visits to some of its rows.
    """
    heads = [line for line in lines if "machine" in line]
    if not heads:
        return None
    gates = _gates(lines)
    visits = {line["end"]: [line["benchmark"]] for line in lines if line.get("benchmark")}
    for more in again:
        for line in more:
            if line.get("benchmark") and line["end"] in visits:
                visits[line["end"]].append(line["benchmark"])
        failed = {name: gate for name, gate in _gates(more).items() if gate.startswith("failed")}
        gates |= failed
        visits = {name: found for name, found in visits.items() if name not in failed}
    machine = {
        **heads[0]["machine"],
        "left_out": [name for name in heads[0]["selected"] if gates.get(name, LATE) == LATE],
        "failed": {name: gate for name, gate in gates.items() if gate.startswith("failed")},
    }
    return {
        "machine_info": machine,
        "benchmarks": [middle(found) for found in visits.values()],
        "datetime": datetime.now(timezone.utc).isoformat(),
    }
