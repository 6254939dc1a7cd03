"""titok-fast kernels, run as a user runs it: without Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest

from titok_fast.ops import inspect
from titok_fast.ops.inspect import MULTIPROCESSORS, KernelReport

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def run(*arguments, before=""):
    """The command in a process of its own, which executes `before` first."""
    code = f"import sys\n{before}\nfrom titok_fast.cli import main\nmain()\n"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=False, env=ENVIRONMENT,
    )  # fmt: skip


def test_lists_what_each_kernel_uses(tmp_path):
    file = tmp_path / "new" / "kernels.json"
    result = run("kernels", "--main", "--op", "attention", "--arch", "sm_90", "--json", file)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split()[:5] == ["kernel", "arch", "warps", "registers", "spills"]
    found = json.loads(file.read_text())
    assert [path.name for path in file.parent.iterdir()] == ["kernels.json"]
    assert found["versions"]["triton"] == inspect.versions()["triton"] and found["seconds"] > 0
    kernels = [item["kernel"] for item in found["kernels"]]
    assert kernels == [
        line.split()[0] for line in lines if line.startswith("attention_")
    ] and set(kernels) == {"attention_fwd_kernel", "attention_bwd_kernel"}  # fmt: skip
    for item in found["kernels"]:
        assert (
            item["capability"] == 90 and item["language"] == "Triton" and item["op"] == "attention"
        )
        assert item["threads"] in (128, 256) and 0 < item["registers"] <= 255
        assert item["spilled_bytes"] == 0 and item["faults"] == []
        assert sum(item["matrix_instructions"].values()) > 0
        warps = item["threads"] // 32
        assert 1 <= item["blocks"] <= 64 // warps
        assert item["occupancy"] == item["blocks"] * warps / 64
    assert f"{len(kernels)} kernels in " in lines[-1] and "no spills, all can launch" in lines[-1]


def test_reads_the_machine_code_of_cuda_kernels():
    reason = inspect.why_not("cuda", "cuda")
    built = "80" if reason else inspect.extension().cuda_architectures.split()[0]
    arch = f"sm_{built.removesuffix('-real')}"
    result = run("kernels", "--op", "maskgit_step", "--arch", arch)
    assert result.returncode == 0, result.stderr
    if reason is not None:
        assert f"CUDA C++: {reason}" in result.stdout and "0 kernels in" in result.stdout
        return
    rows = [line.split() for line in result.stdout.splitlines() if arch in line]
    configurations = {(row[0], *row[9:]) for row in rows}
    assert configurations >= {
        *(("maskgit_step_draw_kernel", t, k) for t in ("float", "half") for k in ("True", "False")),
        ("maskgit_step_mask_kernel",),
    }
    assert all(row[2] == "8" and row[4] == "0" for row in rows)


FAULTY = """
from titok_fast.ops import inspect
from dataclasses import replace
launches = inspect.triton_launches
def changed(op, capability, main):
    first = next(each for each in launches(op, capability, main) if each.options["num_stages"] > 1)
    return (replace(first, options=first.options | {options}),)
inspect.triton_launches = changed
"""


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"num_stages": 9}, "bytes of shared memory, a block has 101,376"),
        ({"maxnreg": 32}, "spills "),
    ],
)
def test_a_kernel_that_cannot_launch_or_spills_fails(tmp_path, options, fault):
    file = tmp_path / "kernels.json"
    result = run(
        "kernels", "--main", "--op", "attention", "--arch", "sm_80", "--json", file,
        before=FAULTY.format(options=options),
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "1 kernels in" in result.stdout and "1 spill or cannot launch" in result.stdout
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("attention_fwd_kernel [bf16") and fault in line
    (item,) = json.loads(file.read_text())["kernels"]
    assert len(item["faults"]) == 1 and item["faults"][0] in line


def report(**changes):
    fields = {
        "op": "attention", "language": "Triton", "kernel": "k", "capability": 90, "constants": "",
        "threads": 256, "registers": 128, "spilled_bytes": 0, "shared_bytes": 0,
        "tensor_columns": 0, "matrix_instructions": {}, "matrix_waits": 0,
    }  # fmt: skip
    return KernelReport(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "blocks", "occupancy"),
    [
        ({}, 2, 0.25),  # by registers: 65,536 / (256 * 128)
        ({"registers": 32}, 8, 1.0),  # by warps
        ({"registers": 33}, 6, 0.75),  # registers come in units of eight: 40
        ({"registers": 16, "threads": 32}, 32, 0.5),  # by blocks
        ({"registers": 16, "threads": 32, "capability": 120}, 24, 0.5),
        ({"registers": 32, "capability": 120}, 6, 1.0),
        ({"shared_bytes": 227 << 10, "registers": 32}, 1, 0.125),  # by shared memory
        ({"shared_bytes": 37 << 10, "registers": 32}, 6, 0.75),  # 38 KiB with the system's
        ({"shared_bytes": (37 << 10) + 1, "registers": 32}, 5, 0.625),
    ],
)
def test_occupancy(changes, blocks, occupancy):
    assert report(**changes).blocks == blocks
    assert report(**changes).occupancy == occupancy


def test_what_cannot_launch():
    assert report().faults == []
    assert report(spilled_bytes=8).faults == ["spills 8 bytes"]
    assert "512" in report(capability=100, tensor_columns=513).faults[0]
    assert "65,536 registers" in report(threads=512, registers=255).faults[0]
    assert "a block has 232,448" in report(shared_bytes=(227 << 10) + 1).faults[0]
    assert set(MULTIPROCESSORS) == set(inspect.CAPABILITIES)
    assert inspect.kernels("_device").CAPABILITIES == inspect.CAPABILITIES


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--arch", "sm_70"], "--arch: 'sm_70' is not one of sm_80, sm_90, sm_100, sm_120"),
        (["--op", "softmax"], "--op: 'softmax' is not one of attention, conv3x3, decode"),
    ],
)
def test_errors_are_one_line(titok_fast, options, words):
    result = titok_fast("kernels", *options)
    assert result.returncode == 2 and words in result.err
    assert len(result.err.strip().splitlines()) == 1 and not result.out


def test_what_is_missing_is_named(titok_fast, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = titok_fast("kernels", "--main")
    assert result.returncode == 2 and "TRITON_INTERPRET: unset it" in result.err
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(inspect, "_kernels", lambda: "triton is not installed; run 'pip ...'")
    result = titok_fast("kernels", "--op", "attention")
    assert result.returncode == 2 and "triton is not installed" in result.err


@pytest.mark.skipif(inspect.why_not("cuda", "cuda") is not None, reason="no CUDA C++ here")
def test_the_disassembler_is_missing(titok_fast, monkeypatch):
    monkeypatch.setattr(inspect, "_kernels", lambda: "triton is not installed; run 'pip ...'")
    result = titok_fast("kernels", "--op", "maskgit_step")
    assert result.returncode == 2 and "triton is not installed" in result.err
