"""What the ops share in how they are registered."""

import warnings
from contextlib import contextmanager

import pytest
import torch

import titok_fast as ops
from titok_fast import _library
from titok_fast.ops import inspect

CALLS = {
    "nearest_code": lambda: (torch.randn(50, 16), torch.randn(300, 16)),
    "index_propagation": lambda: (torch.randn(50, 16), torch.randn(300, 16)),
    "attention": lambda: (torch.randn(2, 5, 3, 2, 8),),
    "conv3x3": lambda: (torch.randn(1, 64, 8, 8), torch.randn(64, 64, 3, 3)),
    "decode_linear": lambda: (torch.randn(2, 64), torch.randn(32, 64)),
    "decode_attention": lambda: (
        torch.randn(1, 24), torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8),
        torch.randn(4, 4, 2), 0,
    ),
    "maskgit_step": lambda: (torch.randn(2, 4, 32), torch.full((2, 4), 32)),
    "sample_token": lambda: (torch.randn(3, 64),),
}  # fmt: skip
OPTIONS = {
    "maskgit_step": {"mask_id": 32, "num_masked": 2, "seed": 1, "step": 0},
    "sample_token": {"seed": 1, "step": 0, "top_p": 0.5},
    "attention": {"backend": "cpu"},
}


@pytest.mark.parametrize("name", CALLS)
def test_no_compiler_looks_into_an_op(name):
    """After a graph break it would, and free memory whose address the op has taken."""
    op, arguments, options = getattr(ops, name), CALLS[name](), OPTIONS.get(name, {})
    called = torch._dynamo.disable(op, recursive=False)
    torch.compiler.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = torch.compile(lambda: called(*arguments, **options), backend="eager")()
    expected = op(*arguments, **options)
    for ours, theirs in zip(*map(_tensors, (result, expected)), strict=True):
        assert torch.equal(ours, theirs)
    assert not [each for each in caught if "titok_fast._C" in str(each.message)]


@pytest.mark.parametrize("name", inspect.TRITON_OPS)
def test_backend_asked_for_by_name_says_what_is_missing(name, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: it needs CUDA"):
        getattr(ops, name)(*CALLS[name](), backend="triton")


def test_a_cuda_implementation_runs_on_the_device_of_its_tensors(monkeypatch):
    current = []

    @contextmanager
    def device(where):
        current.append(where)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    run = _library.on_its_device(lambda *arguments: (current[:], arguments))
    tensor = torch.empty(0, device="meta")
    assert run(None, tensor, 1) == ([tensor.device], (None, tensor, 1))
    assert current == []


def _tensors(result):
    return result if isinstance(result, tuple) else (result,)
