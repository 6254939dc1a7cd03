"""What the tests of Triton kernels share: compiling ahead of time, without a GPU."""

import json
import os
import subprocess
import sys

from titok_fast.ops import inspect

MATRIX_INSTRUCTIONS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
_REPORT = """
import dataclasses, json, sys
from titok_fast.ops.inspect import kernel_report, triton_configurations

reports = kernel_report(triton_configurations(ops=sys.argv[1:], main=True))
print(json.dumps([dataclasses.asdict(r) | {"faults": r.faults} for r in reports]))
"""


def assert_kernels_compile(op: str, multiplying: set[str]) -> None:
    """No spills, shared memory within limits, and matrix instructions in `multiplying` kernels.

    For every architecture, but only the op's main shape; `titok-fast kernels` compiles all.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", _REPORT, op],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    reports = json.loads(run.stdout)
    assert {report["capability"] for report in reports} == set(inspect.CAPABILITIES)
    assert {report["kernel"] for report in reports} >= multiplying
    for report in reports:
        print(
            f"sm_{report['capability']} {report['kernel']} [{report['constants']}]: "
            f"{report['registers']} registers, {report['spilled_bytes']} B spilled, "
            f"{report['shared_bytes']} B shared, {report['matrix_instructions']}"
        )
        assert not report["faults"], report
        assert 0 < report["registers"] <= 255
        if report["kernel"] in multiplying:
            wanted = MATRIX_INSTRUCTIONS[report["capability"]]
            assert wanted in report["matrix_instructions"], report
