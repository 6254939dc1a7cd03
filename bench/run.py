"""`python -m bench.run [--gpu] [--check] [--visits N] [--into DIR] [pytest options]`: all, saved.

The file is <host kind>-<date>.json in bench/results/ or DIR, and names the rows that failed or were
left out; no time is in it for a wrong answer. The rows are kept as they come: where a process dies,
loses the GPU or is stuck, another does the rows that are left. With `--visits 3` a CPU's rows of a
goal are run again twice, after all others, and the median visit is kept. `--gpu` runs the GPU's
rows alone, those of a goal first, and stops after 6.5 minutes; it needs a CUDA device, and
`--check` only says whether there is one.
"""

import argparse
import math
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from bench import record
from bench.harness import ROOT, devices, host_kind
from titok_fast._files import write_json

GPU_MINUTES = 6.5  # of the eight that `make bench-gpu` may take with its profiles
GPU = ("--bench-device=cuda", "--benchmark-max-time=0.3")
PATIENCE = 150.0  # seconds that a row of a GPU may take
ENDED = (0, 1, 2, 4, 5)  # pytest's exit codes, after which there is nothing more to do
NO_ROWS = 5


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.run", allow_abbrev=False)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--into", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--visits", type=int, default=1)
    own, options = parser.parse_known_args(arguments)
    if own.visits < 1 or (own.gpu and own.visits > 1):
        allowed = "1 with --gpu" if own.gpu else "1 or more"
        print(f"bench.run: --visits: must be {allowed}, got {own.visits}", file=sys.stderr)
        return 2
    if own.gpu and "cuda" not in devices():
        print("bench.run: --gpu: torch finds no CUDA device here", file=sys.stderr)
        return 2
    if own.check:
        return 0
    quick = "-quick" if "--bench-quick" in options else ""
    target = own.into / f"{host_kind()}-{date.today()}{quick}.json"
    own.into.mkdir(parents=True, exist_ok=True)
    parts = [target.with_suffix(f".part{visit}") for visit in range(own.visits)]
    for part in parts:
        part.unlink(missing_ok=True)
    try:
        status = rows(parts[0], [*(GPU if own.gpu else ()), *options], own.gpu)
        for part in parts[1:]:
            again = rows(part, ["--bench-device=cpu", "--bench-goals", *options])
            status = status or (again if again != NO_ROWS else 0)
    finally:
        found = record.results(*map(record.read, parts))
        if found is not None:
            write_json(target, found)
            print(f"saved {target}: {len(found['benchmarks'])} rows")
            for name, gate in found["machine_info"]["failed"].items():
                print(f"{name}: {gate}")
        for part in parts:
            part.unlink(missing_ok=True)
    return status


def rows(part: Path, options: list[str], gpu: bool = False) -> int:
    """Runs what is not in the record, in as many processes as it takes; pytest's exit code."""
    end, patience = math.inf, math.inf
    if gpu:
        end, patience = time.monotonic() + 60 * GPU_MINUTES, PATIENCE
    lost = False
    while True:
        before = len(record.read(part))
        command = ["pytest", "bench/", "--benchmark-only", f"--bench-record={part}", *options]
        if gpu:
            command.append(f"--bench-minutes={(end - time.monotonic()) / 60:.3f}")
        status = watched([sys.executable, "-m", *command], part, end, patience)
        lost |= status not in ENDED
        if status in ENDED or time.monotonic() >= end or len(record.read(part)) == before:
            return 1 if lost else status


def watched(command: list[str], part: Path, end: float, patience: float) -> int:
    """Runs a command, and kills it at the end or when the record has not grown for too long."""
    process, heard, size = subprocess.Popen(command, cwd=ROOT), time.monotonic(), 0
    try:
        while process.poll() is None:
            time.sleep(0.2)
            now, grown = time.monotonic(), part.stat().st_size if part.exists() else 0
            if grown != size:
                size, heard = grown, now
            if now >= end or now - heard > patience:
                break
    except KeyboardInterrupt:  # the process has it too, and ends in order
        process.wait()
        raise
    finally:
        if process.poll() is None:
            process.kill()
    return process.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
