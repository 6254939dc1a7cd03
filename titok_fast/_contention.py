"""Whether a machine was busy with something else while a time was taken."""

import os
import time
from collections.abc import Callable
from pathlib import Path

CONTENDED = 0.2  # CPUs busy with other work, from which a time says little


def other_cpus() -> Callable[[], float | None]:
    """Starts a watch that gives the mean number of CPUs busy with other processes since.

    With as many OpenMP threads as CPUs, one other busy process makes every barrier wait for the
    scheduler: a call of 0.2 ms can take 20 ms. Such times say nothing about the op. None where
    /proc/stat is missing; a hypervisor's steal time counts.
    """

    def usage() -> tuple[float, float]:
        ticks = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        busy = sum(map(int, ticks)) - int(ticks[3]) - int(ticks[4])  # but idle and iowait
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK") - time.process_time()

    try:
        start, before = usage()
    except OSError:
        return lambda: None

    def watch() -> float:
        end, after = usage()
        return max(0.0, after - before) / (end - start)

    return watch


def contention(others: float | None) -> str | None:
    """What to say beside a time during which so many CPUs were busy elsewhere; None if nothing."""
    if others is None or others <= CONTENDED:
        return None
    return f"contended: {others:.1f} CPUs busy elsewhere"
