"""What the tests of the ops that draw tokens share."""

import importlib.util
import math
import re

import pytest
import torch

from tests import simulation
from titok_fast.ops import inspect
from titok_fast.testing import cpu_isa, supported_isas

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


HARDWARE = ("portable", "avx2", "avx512", "cuda")


many_draws = pytest.mark.parametrize("backend", HARDWARE, indirect=True)  # too many to simulate


@pytest.fixture(params=[*HARDWARE, "simulated"])
def backend(request, monkeypatch):
    """The C++ op once for each instruction set, the CUDA C++ op, and its simulation on a CPU."""
    if request.param == "simulated":
        ops = simulation.as_cpu_ops(order=1)
        monkeypatch.setattr(inspect, "extension", lambda: ops)
        yield "cpu"
        return
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        yield "cuda"
        return
    if request.param not in supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    with cpu_isa(request.param):
        yield "cpu"


@pytest.fixture
def device(backend):
    return backend


def chi_square(tokens, probability):
    """The statistic less its mean, in standard deviations."""
    expected = probability.double() * tokens.numel()
    assert float(expected.min()) > 5
    observed = torch.bincount(tokens.flatten().cpu(), minlength=len(expected))
    statistic = float(((observed - expected).square() / expected).sum())
    freedom = len(expected) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def assert_nothing_spilled(op, *, kernels, shared):
    """Read from the machine code inside the extension, without a GPU."""
    extension = inspect.extension()
    if not extension.cuda_architectures or importlib.util.find_spec("triton") is None:
        pytest.skip("needs a build with CUDA, and Triton for its cuobjdump")
    reports = inspect.cuda_report(ops=[op])
    assert len(reports) >= kernels * len(re.findall(r"\d+-real|\d+$", extension.cuda_architectures))
    for report in reports:
        assert not report.faults, report
        assert report.registers <= 64 and report.shared_bytes <= shared, report
