"""`python -m bench.run [--gpu] [pytest options]`: every benchmark, saved under bench/results/.

The file is <host kind>-<date>.json. It appears whole or not at all, and not when any benchmark
fails: no speed is reported beside a wrong answer. `--gpu` runs the GPU's rows alone, those of a
goal first, and stops after eight minutes; it needs a CUDA device.
"""

import subprocess
import sys
from datetime import date

from bench.harness import ROOT, devices, host_kind

GPU = ("--bench-device=cuda", "--bench-minutes=8", "--benchmark-max-time=0.3")


def main(options: list[str]) -> int:
    if "--gpu" in options:
        if "cuda" not in devices():
            print("bench.run: --gpu: torch finds no CUDA device here", file=sys.stderr)
            return 2
        options = [*GPU, *(option for option in options if option != "--gpu")]
    quick = "-quick" if "--bench-quick" in options else ""
    target = ROOT / "bench" / "results" / f"{host_kind()}-{date.today()}{quick}.json"
    target.parent.mkdir(exist_ok=True)
    part = target.with_suffix(".part")
    command = ["pytest", "bench/", "--benchmark-only", f"--benchmark-json={part}", *options]
    try:
        status = subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode
        if status == 0 and part.exists():
            part.replace(target)
            print(f"saved {target.relative_to(ROOT)}")
    finally:
        part.unlink(missing_ok=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
