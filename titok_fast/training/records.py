"""Files of JSON lines, one for a step, that follow a run when it goes back to an earlier state."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from titok_fast._files import remove_temporaries, replacing


def append(path: Path, line: Mapping[str, float]) -> None:
    """Adds a line, of a step by that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def forget(path: Path, steps: int) -> bool:
    """Removes the lines after so many steps, which a run that goes on from there writes anew.

    Returns:
        Whether there is one of that step.
    """
    remove_temporaries(path.parent, path.name)
    if not path.exists():
        return False
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _step(line) <= steps]
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
    return any(_step(line) == steps for line in kept)


def _step(line: str) -> float:
    """The step of a line; of one that was cut off as it was written, infinite."""
    try:
        return int(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError):
        return math.inf
