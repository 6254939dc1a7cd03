"""The simulator finds faults; the CUDA C++ ops have the same bits whatever the order of threads."""

import pytest
import torch

from tests import simulation
from titok_fast import maskgit_step, sample_token
from titok_fast.ops import inspect

ORDERS = range(8)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("half a barrier", "threads wait for others that do not come"),
        ("two barriers", "threads of a block wait at different barriers"),
        ("lane left", "threads wait for others that do not come"),
    ],
)
def test_finds_threads_that_part(fault, words):
    for order in ORDERS:
        simulation.cuda_simulator().set_order(order)
        with pytest.raises(RuntimeError, match=words):
            simulation.cuda_simulator().run_fault(fault)


@pytest.mark.parametrize("fault", ["missing barrier", "reused too early", "lost update"])
def test_races_differ_between_orders(fault):
    results = set()
    for order in ORDERS:
        simulation.cuda_simulator().set_order(order)
        results.add(tuple(simulation.cuda_simulator().run_fault(fault)))
    assert len(results) > 1


@pytest.mark.parametrize("op", [maskgit_step, sample_token])
def test_no_order_changes_a_bit(op, monkeypatch):
    cond, uncond = 3 * torch.randn(2, 2, 5, 3001)
    ids = torch.full((2, 5), -1)
    options = {"seed": 3, "step": 1, "guidance_scale": 2.0}
    if op is maskgit_step:
        options |= {"uncond_logits": uncond, "confidence": "log_probability"}
        options |= {"mask_id": -1, "num_masked": 2, "confidence_temperature": 1.0}
    results = []
    for order in ORDERS:
        ops = simulation.as_cpu_ops(order)
        monkeypatch.setattr(inspect, "extension", lambda ops=ops: ops)
        if op is maskgit_step:
            results.append(maskgit_step(cond, ids, **options))
            continue
        results.append(())
        for filters in ({}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 500, "top_p": 0.5}):
            tokens = sample_token(cond[0], uncond_logits=uncond[0], **options | filters)
            results[-1] += (tokens,)
    for result in results[1:]:
        assert all(torch.equal(a, e) for a, e in zip(result, results[0], strict=True))


def test_a_draw_without_a_filter_keeps_no_lists():
    size = simulation.cuda_simulator().sample_token_cuda_workspace
    off, tensor = (0, 0), (0, 1)  # of a number in a tensor only the device knows
    for top_k, top_p in (((5, 0), (1.0, 0)), (off, (0.9, 0)), (tensor, (1.0, 0)), (off, (1.0, 1))):
        assert size(64, 2**18, top_k, top_p) > 64 * 2**18 * 16
    for top_k, top_p in ((off, (1.0, 0)), ((2**18, 0), (1.0, 0)), (off, (1 - 1e-9, 0))):
        assert size(64, 2**18, top_k, top_p) < 64 * 2**15
