"""What the tests of Triton kernels share: compiling ahead of time, without a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from titok_fast.ops import inspect

MATRIX_INSTRUCTIONS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
_REPORT = """
import dataclasses, json, sys
from titok_fast.ops.inspect import kernel_report, kernels, triton_configurations

op, capabilities, wanted = json.loads(sys.argv[1])
found = triton_configurations(capabilities, [op], main=not wanted)
if wanted:
    tables = {c: [row[2].items() for row in kernels(op).specializations(c)] for c in capabilities}
    found = [f for f in found if any(w.items() <= tables[f.capability][f.index] for w in wanted)]
print(json.dumps([dataclasses.asdict(r) | {"faults": r.faults} for r in kernel_report(found)]))
"""


def assert_kernels_compile(
    op: str,
    multiplying: set[str],
    capabilities: Sequence[int] = inspect.CAPABILITIES,
    wanted: Sequence[dict[str, object]] = (),
) -> None:
    """No spills, shared memory within limits, and matrix instructions in `multiplying` kernels.

    Only of the op's main shape, or of the configurations that have all constants of one of
    `wanted`; `titok-fast kernels` compiles all.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", _REPORT, json.dumps([op, capabilities, wanted])],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    reports = json.loads(run.stdout)
    assert {report["capability"] for report in reports} == set(capabilities)
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
