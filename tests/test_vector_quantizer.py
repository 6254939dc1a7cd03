"""The drop-in VectorQuantizer against the official arithmetic, written out here in PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.processes import in_two_processes
from titok_fast import VectorQuantizer
from titok_fast.testing import relative_error


def official(layer, z):
    """Distances, indices, straight-through output and losses of the upstream layer."""
    rows = z.float().permute(0, 2, 3, 1)  # [B, H, W, D]
    codebook = layer.embedding.weight
    if layer.use_l2_norm:
        rows, codebook = F.normalize(rows, dim=-1), F.normalize(codebook, dim=-1)
    flat = rows.reshape(-1, rows.shape[-1])
    distances = (
        flat.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * flat @ codebook.T
    )
    indices = distances.argmin(1)
    quantized = codebook[indices].view(rows.shape)
    commitment = layer.commitment_cost * (quantized.detach() - rows).square().mean()
    codes = (quantized - rows.detach()).square().mean()
    output = (rows + (quantized - rows).detach()).permute(0, 3, 1, 2)
    return distances, indices.view(rows.shape[:3]), output, commitment, codes


def make(use_l2_norm=False, clustering_vq=False):
    layer = VectorQuantizer(64, 12, 0.25, use_l2_norm, clustering_vq)
    torch.nn.init.normal_(layer.embedding.weight)
    return layer


@pytest.mark.parametrize("use_l2_norm", [False, True])
def test_values_and_gradients_equal_the_official_arithmetic(use_l2_norm):
    layer = make(use_l2_norm)
    z = torch.randn(2, 12, 1, 32, requires_grad=True)
    probe = torch.randn(2, 12, 1, 32)

    def gradients(output, loss):
        return torch.autograd.grad((output * probe).sum() + 3 * loss, [z, layer.embedding.weight])

    output, result = layer(z)
    assert set(result) == {
        "quantizer_loss", "commitment_loss", "codebook_loss", "min_encoding_indices",
    }  # fmt: skip
    _, indices, expected, commitment, codes = official(layer, z)
    assert torch.equal(result["min_encoding_indices"], indices)
    assert relative_error(output, expected) < 1e-6
    assert output.is_contiguous() and output.dtype == torch.float32
    for name, value in (("commitment_loss", commitment), ("codebook_loss", codes)):
        torch.testing.assert_close(result[name], value, rtol=1e-6, atol=0)
    torch.testing.assert_close(result["quantizer_loss"], commitment + codes, rtol=1e-6, atol=0)
    for ours, theirs in zip(
        gradients(output, result["quantizer_loss"]),
        gradients(expected, commitment + codes),
        strict=True,
    ):
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("use_l2_norm", [False, True])
def test_clustering_moves_unused_codes_as_the_official_layer(use_l2_norm):
    layer = make(use_l2_norm, clustering_vq=True).train()
    far = not use_l2_norm  # directions are never far from every input
    with torch.no_grad():
        layer.embedding.weight[10:] += 50 * far
    weight, usage = layer.embedding.weight.detach().clone(), torch.zeros(64)
    for _ in range(3):
        z = torch.randn(4, 12, 1, 16)
        distances, indices, *_ = official(layer, z)
        counts = F.one_hot(indices.flatten(), 64).float().mean(0)
        usage = usage * 0.99 + counts * (1 - 0.99)
        nearest = z.permute(0, 2, 3, 1).reshape(-1, 12)[distances.argmin(0)]
        pull = torch.exp(-(usage * 64 * 10) / (1 - 0.99) - 1e-3)[:, None]
        weight = weight * (1 - pull) + nearest * pull
        layer(z)
        torch.testing.assert_close(layer.embed_prob, usage)
        torch.testing.assert_close(layer.embedding.weight.detach(), weight)
    if far:
        assert bool((layer.embedding.weight[10:].norm(dim=1) < 20).all())
    before = layer.embedding.weight.detach().clone()
    layer.eval()(z)
    assert torch.equal(layer.embedding.weight, before)


def test_clustering_keeps_graphs_over_the_old_weight():
    layer = make(clustering_vq=True).train()
    weights = torch.rand(5, 64).requires_grad_()
    mixed = layer.get_codebook_entry(weights)
    _, result = layer(torch.randn(2, 12, 1, 8))
    (mixed.sum() + result["quantizer_loss"]).backward()
    assert weights.grad is not None and bool(weights.grad.isfinite().all())


def test_meta_device_gives_shapes():
    output, result = make().to("meta")(torch.empty(2, 12, 1, 8, device="meta"))
    assert output.shape == (2, 12, 1, 8) and result["min_encoding_indices"].shape == (2, 1, 8)


def test_state_dict_has_the_official_names():
    assert set(make().state_dict()) == {"embedding.weight"}
    assert set(make(clustering_vq=True).state_dict()) == {"embedding.weight", "embed_prob"}
    weight = VectorQuantizer(50, 3).embedding.weight
    assert float(weight.detach().abs().max()) <= 1 / 50


@pytest.mark.parametrize("use_l2_norm", [False, True])
def test_codebook_entries(use_l2_norm):
    layer = make(use_l2_norm)
    codes = layer.embedding.weight
    codes = F.normalize(codes, dim=-1) if use_l2_norm else codes
    assert torch.equal(layer.get_codebook_entry(torch.tensor([5, 0, 5])), codes[[5, 0, 5]])
    weights = torch.eye(64)[[9, 2]]
    torch.testing.assert_close(layer.get_codebook_entry(weights), codes[[9, 2]])
    with pytest.raises(
        ValueError, match=r"indices: expected \[N\] or \[N, K\], got shape \[1, 1, 1\]"
    ):
        layer.get_codebook_entry(torch.zeros(1, 1, 1, dtype=torch.int64))


def test_autocast_and_half_inputs_quantize_in_float32():
    layer = make()
    z = torch.randn(2, 12, 1, 8).bfloat16()
    expected, _ = layer(z.float())
    with torch.autocast("cpu", torch.bfloat16):
        output, result = layer(z)
    assert output.dtype == torch.float32 and torch.equal(output, expected)
    assert result["quantizer_loss"].dtype == torch.float32


def test_compiles_whole():
    layer = make(use_l2_norm=True)
    z = torch.randn(2, 12, 1, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    output, result = compiled(z)
    expected, expected_result = layer(z)
    assert torch.equal(output, expected)
    assert torch.equal(result["min_encoding_indices"], expected_result["min_encoding_indices"])


@pytest.mark.parametrize("shape", [(2, 11, 1, 8), (2, 12, 8), (12,)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match=r"z: expected \[B, 12, H, W\], got shape"):
        make()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("z", "error", "words"),
    [
        ([1.0], TypeError, "z: expected a Tensor, got list"),
        (torch.zeros(2, 12, 1, 8).int(), TypeError, "z: dtype torch.int32 is not a floating"),
        (torch.zeros(2, 12, 1, 8, dtype=torch.complex64), TypeError, "z: dtype torch.complex64"),
    ],
)
def test_bad_latents(z, error, words):
    with pytest.raises(error, match=words):
        make()(z)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "numpy"}, "backend: 'numpy' is not one of"),
        ({"codebook_size": 0}, "codebook_size: got 0, allowed is a positive int"),
        ({"token_size": 1.5}, "token_size: got 1.5, allowed is a positive int"),
        ({"commitment_cost": math.nan}, "commitment_cost: got nan, allowed is a finite number"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        VectorQuantizer(**options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("clustering_vq", [True, False])
def test_a_layer_of_another_dtype_quantizes_in_float32(dtype, clustering_vq):
    layer = make(clustering_vq=clustering_vq).train().to(dtype)
    z = torch.randn(2, 12, 1, 8, dtype=dtype, requires_grad=True)
    output, result = layer(z)
    assert output.dtype == result["quantizer_loss"].dtype == torch.float32
    (output.sum() + result["quantizer_loss"]).backward()
    assert layer.embedding.weight.grad.dtype == z.grad.dtype == dtype
    assert bool(z.grad.isfinite().all() and layer.embedding.weight.isfinite().all())


@pytest.mark.parametrize("clustering_vq", [True, False])
def test_an_empty_batch_has_no_loss(clustering_vq):
    layer = make(clustering_vq=clustering_vq).train()
    z = torch.zeros(0, 12, 1, 8, requires_grad=True)
    output, result = layer(z)
    assert output.shape == z.shape and result["min_encoding_indices"].shape == (0, 1, 8)
    assert result["quantizer_loss"] == result["commitment_loss"] == result["codebook_loss"] == 0
    result["quantizer_loss"].backward()
    assert not layer.embedding.weight.grad.any()


def test_clustering_over_two_ranks_equals_one_process(tmp_path):
    layer = make(clustering_vq=True).train()
    z = torch.randn(4, 12, 1, 16)
    torch.save((layer.state_dict(), z), tmp_path / "in.pt")
    in_two_processes(_rank, tmp_path)
    layer(z)
    for rank in range(2):
        state = torch.load(tmp_path / f"out{rank}.pt")
        for name, value in layer.state_dict().items():
            torch.testing.assert_close(state[name], value)


def _rank(rank, folder):
    state, z = torch.load(folder / "in.pt")
    layer = VectorQuantizer(64, 12, 0.25, False, True).train()
    layer.load_state_dict(state)
    layer(z[2 * rank : 2 * rank + 2])
    torch.save(layer.state_dict(), folder / f"out{rank}.pt")
