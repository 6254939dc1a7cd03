"""Every op makes what it needs where its tensors are, whatever PyTorch's default device is."""

import pytest
import torch

import titok_fast
from titok_fast.ops import inspect


def attention():
    qkv = torch.randn(2, 5, 3, 2, 8)
    return lambda: titok_fast.attention(qkv)


def conv3x3():
    x, weight, bias = torch.randn(1, 8, 4, 4), torch.randn(6, 8, 3, 3), torch.randn(6)
    options = {"norm": torch.randn(8), "norm_bias": torch.randn(8), "num_groups": 2}
    options |= {"upsample": True, "residual": torch.randn(1, 6, 8, 8)}
    return lambda: titok_fast.conv3x3(x, weight, bias, **options)


def decode_attention():
    qkv, keys, values = torch.randn(2, 32), torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8)
    rotation = torch.randn(4, 4, 2)
    return lambda: titok_fast.decode_attention(qkv, keys, values, rotation, 1)


def decode_linear():
    x, weight = torch.randn(2, 8), torch.randn(5, 8)
    return lambda: titok_fast.decode_linear(x, weight)


def index_propagation():
    z, codebook = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)

    def call():
        quantized, _, *entropies = titok_fast.index_propagation(z, codebook)
        loss = quantized.sum() + sum(entropies)
        return (quantized, *entropies, *torch.autograd.grad(loss, (z, codebook)))

    return call


def maskgit_step():
    logits, ids = torch.randn(2, 4, 9), torch.full((2, 4), 9)
    options = {"mask_id": 9, "num_masked": 2, "seed": 3, "step": 0}
    return lambda: titok_fast.maskgit_step(logits, ids, **options)


def nearest_code():
    z, codebook = torch.randn(7, 8), torch.randn(9, 8)
    return lambda: titok_fast.nearest_code(z, codebook, return_distance=True)


def sample_token():
    logits = torch.randn(3, 9)
    return lambda: titok_fast.sample_token(logits, top_k=2, seed=3, step=0)


OPS = (
    attention, conv3x3, decode_attention, decode_linear, index_propagation, maskgit_step,
    nearest_code, sample_token,
)  # fmt: skip


def test_every_op_is_here():
    assert {make.__name__ for make in OPS} == set(inspect.OPS)


@pytest.mark.parametrize("make", OPS)
def test_the_default_device_changes_nothing(make):
    call = make()
    expected = call()
    with torch.device("meta"):
        actual = call()
    if isinstance(expected, torch.Tensor):
        expected, actual = (expected,), (actual,)
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        assert one.device == other.device and torch.equal(one, other)


def test_packing_stays_on_the_cpu():
    weight = torch.randn(6, 8, 3, 3)
    expected = titok_fast.pack_conv3x3(weight)
    with torch.device("meta"):
        assert torch.equal(titok_fast.pack_conv3x3(weight), expected)
