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
from titok_fast.ops.inspect import kernel_report, triton_configurations, triton_launches

op, capabilities, wanted = json.loads(sys.argv[1])
found = triton_configurations(capabilities, [op], main=not wanted)
if wanted:
    def constants(configuration):
        launch = triton_launches(op, configuration.capability, False)[configuration.index]
        return launch.named_constants.items()
    fitting = [[f for f in found if each.items() <= constants(f)] for each in wanted]
    assert all(fitting), fitting
    found = [f for f in found if any(f in each for each in fitting)]
print(json.dumps([dataclasses.asdict(r) | {"faults": r.faults} for r in kernel_report(found)]))
"""

_LAUNCHED = """
import collections, json, sys, weakref
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from titok_fast.ops import inspect

class Memory(TorchDispatchMode):
    held, most, storages = 0, 0, set()
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.held += storage.nbytes()
                self.most = max(self.most, self.held)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out
    def free(self, storage, size):
        self.storages.remove(storage)
        self.held -= size

def launch(main):
    with memory:
        exec(source, vars(module))

op, capability, source = json.loads(sys.argv[1])
memory, module = Memory(), inspect.kernels(op)
module.launch_examples = launch
launches = inspect.triton_launches(op, capability, False)
forms = collections.Counter(launch.kernel.__name__ for launch in launches)
print(json.dumps([forms, memory.most]))
"""


def launched(op: str, capability: int, source: str) -> tuple[dict[str, int], int]:
    """What launches need that are made on the meta device.

    Args:
        op: in whose module of kernels `source` is executed.
        capability: of the GPU that the meta device stands for.
        source: Python that makes them.

    Returns:
        How many things they compile, for each kernel; and the most bytes that tensors have at a
        time, those of `source` among them.
    """
    forms, most = json.loads(_without_interpreter(_LAUNCHED, op, capability, source))
    return forms, most


def _without_interpreter(code: str, *arguments: object) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def assert_kernels_compile(
    op: str,
    multiplying: set[str],
    capabilities: Sequence[int] = inspect.CAPABILITIES,
    wanted: Sequence[dict[str, object]] = (),
) -> None:
    """No spills, shared memory in its limits, matrix instructions that overlap in `multiplying`.

    Only of the op's main shape, or of the configurations that have all constants of one of
    `wanted`; `titok-fast kernels` compiles all.
    """
    reports = json.loads(_without_interpreter(_REPORT, op, capabilities, wanted))
    every = {name for name in vars(inspect.kernels(op)) if name.endswith("_kernel")}
    assert multiplying <= every
    for capability in capabilities:
        found = {report["kernel"] for report in reports if report["capability"] == capability}
        assert found >= multiplying if wanted else found == every
    # The tiles are chosen for triton 3.7; what 3.6 spills of a few kernels is in docs/ops.
    old = tuple(map(int, inspect.versions()["triton"].split(".")[:2])) < (3, 7)
    for report in reports:
        print(
            f"sm_{report['capability']} {report['kernel']} [{report['constants']}]: "
            f"{report['registers']} registers, {report['spilled_bytes']} B spilled, "
            f"{report['shared_bytes']} B shared, {report['matrix_instructions']}, "
            f"{report['matrix_waits']} waits"
        )
        few = f"spills {report['spilled_bytes']} bytes" if report["spilled_bytes"] <= 32 else ""
        assert not [fault for fault in report["faults"] if not (old and fault == few)], report
        assert 0 < report["registers"] <= 255
        if report["kernel"] in multiplying:
            instruction = MATRIX_INSTRUCTIONS[report["capability"]]
            assert instruction in report["matrix_instructions"], report
            if instruction == "HGMMA":  # with one wait for each, none would overlap another
                assert report["matrix_waits"] < report["matrix_instructions"]["HGMMA"], report
