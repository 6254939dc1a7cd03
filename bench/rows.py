"""What a results file holds, as rows, and which files may be quoted."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from titok_fast._contention import contention

OURS = "titok_fast"
BASELINE = "official"
DESCRIPTION = ("cpu_name", "cpus", "threads", "versions", "git")


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
    def forced(self) -> bool:
        """Whether it ran with a slower instruction set than the machine has."""
        return "[" in self.provider

    @property
    def relative(self) -> str | None:
        """What it computed where that is not the op."""
        return self.info.get("relative")

    @property
    def title(self) -> str:
        return f"{self.provider} ({self.relative})" if self.relative else self.provider

    @property
    def contended(self) -> bool:
        return contention(self.info.get("other_cpus")) is not None

    @property
    def mark(self) -> str:
        return "†" if self.contended else ""

    @property
    def extra(self) -> int | None:
        """Bytes beyond inputs and outputs at the peak."""
        return self.info.get("peak_extra_bytes")

    @property
    def memory(self) -> str:
        if self.extra is None:
            return ""
        mib = self.extra / 2**20
        return f"{mib:,.0f} MiB" if mib >= 1 else f"{self.extra / 2**10:,.0f} KiB"

    def ratio(self, other: "Row | None") -> str:
        """How many times the other's time this one takes."""
        if other is None:
            return ""
        value = self.seconds / other.seconds
        return f"{value:,.{decimals(value, 2)}f}{self.mark or other.mark}"


def quotable(path: Path) -> dict[str, Any]:
    """What a file holds; RefusedError unless it tells its machine and a clean commit."""
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path.name}: {error}") from error
    machine = data.get("machine_info") or {}
    missing = [name for name in DESCRIPTION if not machine.get(name)]
    if missing:
        raise RefusedError(f"{path.name}: does not describe its machine: no {missing[0]}")
    if machine["git"].get("dirty") is not False:
        raise RefusedError(f"{path.name}: the source tree was not a clean commit")
    return data


@dataclass(frozen=True)
class Result:
    """One results file whose numbers may be quoted."""

    path: Path
    data: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> "Result":
        data = quotable(path)
        if data["machine_info"].get("quick") is not False:
            raise RefusedError(f"{path.name}: a quick run, which gives no figures to keep")
        return cls(path, data)

    @property
    def machine(self) -> dict[str, Any]:
        return self.data["machine_info"]

    @property
    def peaks(self) -> dict[str, float]:
        """GEMM and copy rates of the run that the rows come from."""
        return self.machine.get("peaks", {})

    @property
    def title(self) -> str:
        parts = (self.machine.get(key) for key in ("gpu_name", "cpu_name", "isa"))
        return ", ".join(part for part in parts if part)

    @cached_property
    def rows(self) -> list[Row]:
        found = []
        for entry in self.data.get("benchmarks", []):
            info, median = entry["extra_info"], entry["stats"]["median"]
            op, sizes, *options = words(entry["group"], info)
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


def words(group: str, info: dict[str, Any]) -> list[str]:
    """The words of a group's name; an option such as "top-p 0.9" is one."""
    for value in info.values():
        if isinstance(value, str) and " " in value:
            group = group.replace(f" {value} ", f" {value.replace(' ', chr(160))} ")
    return [word.replace(chr(160), " ") for word in group.split(" ")]


def newest(paths: Iterable[Path]) -> list[Path]:
    """The last of each kind of file that is not of a quick run: its name but for the date."""
    full = [path for path in sorted(paths) if not path.stem.endswith("-quick")]
    return list({path.stem[: -len("-2030-01-02")]: path for path in full}.values())


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def decimals(value: float, most: int) -> int:
    """How many decimals show three digits, at most `most`."""
    return next((d for d in range(most) if value >= 10 ** (2 - d)), most)
