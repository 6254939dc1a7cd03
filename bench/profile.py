"""`python -m bench.profile [--into DIR] [options of titok-fast profile]`: it, as a result.

The file is profiles/<host kind>-<model>-<date>.json in bench/results/ or DIR: what the command
writes, and the machine and commit that it ran on.
"""

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import harness
from titok_fast._files import write_json

COMMAND = (sys.executable, "-c", "from titok_fast.cli import main; main()", "profile")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.profile", allow_abbrev=False, description=__doc__)
    parser.add_argument("--into", type=Path, default=harness.ROOT / "bench" / "results")
    parser.add_argument("--bench-commit", help="of a copy without git")
    own, options = parser.parse_known_args(arguments)
    with TemporaryDirectory() as folder:
        done = subprocess.run([*COMMAND, *options, "--output", folder])
        if done.returncode:
            return done.returncode
        found = json.loads((Path(folder) / "profile.json").read_text())
    found["machine_info"] = harness.machine(own.bench_commit)
    target = own.into / "profiles" / f"{harness.host_kind()}-{found['model']}-{date.today()}.json"
    write_json(target, found)
    print(f"saved {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
