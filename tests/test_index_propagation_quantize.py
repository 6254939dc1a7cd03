"""ibq_quantize and the drop-in layer against the official outputs and arithmetic."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conformance import FOLDER, expected, uniform
from titok_fast import IndexPropagationQuantize, VectorQuantizer, ibq_quantize
from titok_fast.layers import index_propagation_quantize as quantize_module
from titok_fast.testing import relative_error

CASES = ("ibq_quantizer", "ibq_quantizer_sharp")


def symmetric(name, shape):
    return torch.from_numpy(uniform(name, shape) * np.float32(2) - np.float32(1))


@pytest.mark.parametrize("choice", ["fused", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_conformance(ibq_backend, case, choice):
    backend = ibq_backend if choice == "fused" else "reference"
    if backend == "reference" and ibq_backend != "streaming":
        pytest.skip("once is enough")
    about = json.loads((FOLDER / f"{case}.case.json").read_text())
    right = expected(case)
    k, d, shape = about["codebook_size"], about["code_dim"], about["z_shape"]
    scale = float(about["z"].partition("(2u-1)*")[2].partition(",")[0])
    layer = IndexPropagationQuantize(
        k, d, about["beta"], True, entropy_temperature=about["entropy_temperature"],
        backend=backend,
    )  # fmt: skip
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    layer.embedding.weight.data = symmetric("codebook", (k, d))
    layer.to(device)
    z = (scale * symmetric("z", shape)).to(device).requires_grad_()
    grad = symmetric("grad", shape).to(device)

    quantized, losses, (_, _, indices) = layer(z)
    assert torch.equal(indices.cpu(), right["indices"])
    assert relative_error(quantized.cpu(), right["zq"]) < 1e-6
    names = ("quant_loss", "sample_entropy", "avg_entropy", "entropy_loss")
    for name, loss in zip(names, losses, strict=True):
        torch.testing.assert_close(
            loss.double().cpu(), right[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n} {m}"
        )
    rows = slice(None, None, max(1, k // 64))
    for name, loss in (
        ("zq", (quantized * grad).sum()), ("quant", losses[0]), ("entropy", losses[3]),
    ):  # fmt: skip
        grads = torch.autograd.grad(loss, [z, layer.embedding.weight], retain_graph=True)
        grad_z, grad_codebook = (x.cpu() for x in grads)
        assert relative_error(grad_z, right[f"dz_{name}"]) < 1e-4, name
        norm = right[f"dE_{name}_norm"]
        torch.testing.assert_close(grad_codebook.double().norm(), norm, rtol=1e-4, atol=0)
        # The rows of the sharp case hold 1e-19 of the gradient, below what float32 sums can keep.
        scale = right[f"dE_{name}"].norm() if backend == "reference" else norm
        assert (grad_codebook[rows] - right[f"dE_{name}"]).norm() <= 1e-4 * scale, name


def official(layer, z, codebook):
    """Upstream's arithmetic: quantized [B, D, H, W], the four losses, indices."""
    rows = z.permute(0, 2, 3, 1)
    logits = rows @ codebook.T
    soft = logits.softmax(-1)
    indices = soft.argmax(-1)
    hard = F.one_hot(indices, len(codebook)).to(z.dtype)
    quantized = (hard - soft.detach() + soft) @ codebook
    codes = hard @ codebook
    quant = (
        (quantized - rows).square().mean()
        + (codes.detach() - rows).square().mean()
        + layer.beta * (codes - rows.detach()).square().mean()
    )
    sharp = (logits / layer.entropy_temperature).flatten(0, 2)
    sample = -(sharp.softmax(1) * (sharp + 1e-5).log_softmax(1)).sum(1).mean()
    mean = sharp.softmax(1).mean(0)
    batch = -(mean * (mean + 1e-5).log()).sum()
    entropy = layer.sample_minimization_weight * sample - layer.batch_maximization_weight * batch
    return quantized.permute(0, 3, 1, 2), (quant, sample, batch, entropy), indices.flatten()


def make(**options):
    return IndexPropagationQuantize(40, 6, **options)


def assert_official(layer, z, codebook, used=None):
    used = slice(None) if used is None else used
    output, losses, (first, second, indices) = layer(z)
    assert first is None and second is None
    a = z.detach().double().requires_grad_()
    b = codebook.detach().double().requires_grad_()
    right, right_losses, right_indices = official(layer, a, b[used])
    assert output.shape == z.shape and output.is_contiguous()
    assert torch.equal(indices.flatten(), right_indices)
    assert relative_error(output, right) < 1e-6
    if layer.use_entropy_loss:
        assert isinstance(losses, tuple) and len(losses) == 4
    else:
        losses, right_losses = (losses,), right_losses[:1]
    probe = torch.randn(z.shape)
    for loss, truth in zip(
        (*losses, (output * probe).sum()), (*right_losses, (right * probe).sum()), strict=True
    ):
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(
            torch.autograd.grad(loss, [z, codebook], retain_graph=True),
            torch.autograd.grad(truth, [a, b], retain_graph=True),
            strict=True,
        ):
            assert relative_error(ours, theirs) < 1e-4
    return indices


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 2.0},
        {"cosine_similarity": True},
        {"use_entropy_loss": True},
        {
            "use_entropy_loss": True,
            "entropy_temperature": 0.3,
            "sample_minimization_weight": 0.5,
            "batch_maximization_weight": 3.0,
        },
    ],
)
def test_every_option_gives_the_official_result(options, training):
    layer = make(**options).train(training)
    z = torch.randn(2, 6, 3, 4, requires_grad=True)
    indices = assert_official(layer, z, layer.embedding.weight)
    assert indices.shape == (24,) and indices.dtype == torch.int64


@pytest.mark.parametrize("unknown", ["random", "extra", 2])
def test_remap(tmp_path, unknown):
    """Upstream's own remap stops with an error in the constructor; this is what it says it does."""
    used = torch.tensor([7, 3, 39, 0, 12, 20, 11])
    np.save(tmp_path / "used.npy", used.numpy())
    layer = make(
        remap=str(tmp_path / "used.npy"), unknown_index=unknown, use_entropy_loss=True,
        entropy_temperature=0.3,
    )  # fmt: skip
    assert set(layer.state_dict()) == {"embedding.weight", "used"}
    assert layer.re_embed == (8 if unknown == "extra" else 7)
    z = torch.randn(2, 6, 3, 4, requires_grad=True)
    indices = assert_official(layer, z, layer.embedding.weight, used)
    assert indices.shape == (24, 1)
    codes = layer.get_codebook_entry(indices, (2, 3, 4, 6))
    assert torch.equal(codes, layer(z)[0])

    inds = torch.tensor([[3, 5, 0], [12, 7, 6]])
    mapped = layer.remap_to_used(inds)
    known = torch.tensor([[True, False, True], [True, True, False]])
    assert torch.equal(mapped[known], torch.tensor([1, 3, 4, 0]))
    if unknown != "random":
        assert bool((mapped[~known] == (7 if unknown == "extra" else 2)).all())
    else:
        assert bool(((mapped[~known] >= 0) & (mapped[~known] < 7)).all())
        torch.manual_seed(3)
        mapped = layer.remap_to_used(inds)
        torch.manual_seed(3)
        assert torch.equal(mapped[~known], torch.randint(0, 7, (2,)))
    back = torch.tensor([[0, 7 if unknown == "extra" else 1]])
    before = back.clone()
    assert layer.unmap_to_all(back).tolist() == [[7, 7 if unknown == "extra" else 3]]
    assert torch.equal(back, before)


def test_function_takes_any_leading_shape():
    z, codebook = torch.randn(2, 5, 3, 8), torch.randn(20, 8)
    output = ibq_quantize(z, codebook)
    flat = ibq_quantize(z.reshape(30, 8), codebook)
    assert output.quantized.shape == z.shape and output.indices.shape == (2, 5, 3)
    assert torch.equal(output.quantized.reshape(30, 8), flat.quantized)
    for name in ("quant_loss", "sample_entropy", "batch_entropy", "entropy_loss"):
        assert torch.equal(getattr(output, name), getattr(flat, name))
    empty = ibq_quantize(z[:0], codebook)
    assert empty.indices.shape == (0, 5, 3) and empty.quant_loss == 0 and empty.entropy_loss == 0


def test_nan_makes_the_loss_nan():
    z, codebook = torch.randn(4, 8), torch.randn(20, 8)
    z[1, 2] = torch.nan
    for entropy in (True, False):
        output = ibq_quantize(z, codebook, entropy=entropy)
        assert bool(output.quant_loss.isnan())
        assert bool(output.entropy_loss.isnan()) == entropy
        assert bool(((output.indices >= 0) & (output.indices < 20)).all())


def test_state_dict_and_entries_are_the_official_ones():
    layer = make()
    assert set(layer.state_dict()) == {"embedding.weight"}
    assert 0.5 < float(layer.embedding.weight.detach().std()) < 1.5  # nn.Embedding's normal
    indices = torch.tensor([5, 0, 5, 1, 2, 3])
    codes = layer.embedding.weight[indices]
    assert torch.equal(layer.get_codebook_entry(indices, None), codes)
    image = layer.get_codebook_entry(indices, (1, 2, 3, 6))
    assert torch.equal(image, codes.view(1, 2, 3, 6).permute(0, 3, 1, 2))


def test_statistics():
    layer = make()
    with pytest.raises(RuntimeError, match="statistics: call the layer first"):
        layer.statistics()
    with torch.no_grad():
        layer.embedding.weight.copy_(100 * torch.eye(40, 6))
        layer.embedding.weight[6:] = -1000.0
    z = torch.eye(6)[[0, 0, 1, 1]].T.reshape(1, 6, 2, 2)
    layer(z)
    statistics = layer.statistics()
    assert statistics.usage == 2 / 40
    torch.testing.assert_close(statistics.perplexity, torch.tensor(2.0))
    assert statistics.max_probability == 1
    layer(torch.zeros(1, 6, 2, 2))
    torch.testing.assert_close(layer.statistics().max_probability, torch.tensor(1 / 40))


def test_autocast_keeps_losses_in_float32():
    layer = make(use_entropy_loss=True)
    z = torch.randn(2, 6, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output, losses, _ = layer(z)
    assert output.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in losses)
    sum(losses).backward()
    assert layer.embedding.weight.grad.dtype == torch.float32


def test_compiles_whole():
    layer = make(use_entropy_loss=True)
    z = torch.randn(2, 6, 3, 4, requires_grad=True)
    torch.compiler.reset()
    output, losses, (_, _, indices) = torch.compile(layer, fullgraph=True, backend="aot_eager")(z)
    expected_output, expected_losses, (_, _, expected_indices) = layer(z)
    assert torch.equal(output, expected_output) and torch.equal(indices, expected_indices)
    for actual, right in zip(losses, expected_losses, strict=True):
        torch.testing.assert_close(actual, right)
    (output.sum() + losses[0] + losses[3]).backward()
    assert bool(z.grad.isfinite().all())


@pytest.mark.parametrize("shape", [(2, 5, 1, 8), (2, 6, 8), (6,)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match=r"z: expected \[B, 6, H, W\], got shape"):
        make()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"entropy_temperature": 0.0}, ValueError, "entropy_temperature: 0.0 is not a positive"),
        ({"entropy_temperature": "1"}, TypeError, "entropy_temperature: expected a float"),
        ({"n_e": 0}, ValueError, "n_e: got 0, allowed is a positive int"),
        ({"e_dim": True}, ValueError, "e_dim: got True, allowed is a positive int"),
        ({"beta": "1"}, ValueError, "beta: got '1', allowed is a finite number"),
        ({"backend": "numpy"}, ValueError, "backend: 'numpy' is not one of"),
        ({"process_group": "x"}, TypeError, "process_group: expected a ProcessGroup or None, got"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        IndexPropagationQuantize(**{"n_e": 40, "e_dim": 6} | options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"entropy_temperature": 0}, ValueError, "entropy_temperature: 0 is not a positive"),
        ({"beta": math.nan}, ValueError, "beta: got nan, allowed is a finite number"),
        ({"sample_weight": "1"}, ValueError, "sample_weight: got '1', allowed is a finite"),
        ({"batch_weight": math.inf}, ValueError, "batch_weight: got inf, allowed is a finite"),
    ],
)
def test_bad_options_of_the_function(options, error, words):
    with pytest.raises(error, match=words):
        ibq_quantize(torch.zeros(2, 4), torch.zeros(3, 4), **options)


def test_bad_latents():
    with pytest.raises(TypeError, match="z: expected a Tensor, got list"):
        make()([1.0])
    with pytest.raises(TypeError, match="z: expected a Tensor, got list"):
        ibq_quantize([1.0], torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"z: expected \[..., D\], got shape \[\]"):
        ibq_quantize(torch.tensor(1.0), torch.zeros(3, 4))


def test_a_copy_shares_the_process_group_and_a_pickle_leaves_it_out(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        group = torch.distributed.group.WORLD
        layer = make(use_entropy_loss=True, process_group=group)
        z = torch.randn(2, 6, 1, 8)
        expected = layer(z)[1]
        twin = copy.deepcopy(layer)
        assert twin.process_group is group
        torch.testing.assert_close(twin(z)[1], expected)
        loaded = pickle.loads(pickle.dumps(layer))
        assert loaded.process_group is None and layer.process_group is group
        torch.testing.assert_close(loaded(z)[1], expected)
    finally:
        torch.distributed.destroy_process_group()


def train(quantizer, steps=300):
    """Usage of 128 codes after a toy autoencoder has learned a mixture of 256 Gaussians."""
    torch.manual_seed(0)
    centers = 3 * torch.randn(256, 8)
    encoder, decoder = nn.Linear(8, 8), nn.Linear(8, 8)
    parameters = [*encoder.parameters(), *decoder.parameters(), *quantizer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)

    def batch(n):
        return centers[torch.randint(256, (n,))] + 0.1 * torch.randn(n, 8)

    for _ in range(steps):
        x = batch(512)
        z, loss, _ = quantize(quantizer, encoder(x))
        loss = loss + (decoder(z) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        _, _, indices = quantize(quantizer, encoder(batch(8192)))
    return len(indices.unique()) / 128


def quantize(quantizer, z):
    z = z.T[None, :, None]  # [1, D, 1, N]
    if isinstance(quantizer, VectorQuantizer):
        output, result = quantizer(z)
        loss, indices = result["quantizer_loss"], result["min_encoding_indices"]
    else:
        output, losses, (_, _, indices) = quantizer(z)
        loss = losses[0] + 0.1 * losses[3]
    return output[0, :, 0].T, loss, indices


def test_ibq_uses_the_codebook_where_plain_vq_collapses(set_threads):
    torch.manual_seed(0)
    set_threads(1)  # the work is too small to share
    assert train(VectorQuantizer(128, 8)) < 0.5
    assert train(IndexPropagationQuantize(128, 8, use_entropy_loss=True)) > 0.9


def test_float64_is_quantized_in_float32():
    layer = IndexPropagationQuantize(16, 4, use_entropy_loss=True)
    z = torch.randn(2, 4, 3, 3)
    expected, losses, (_, _, indices) = layer(z)
    quantized, wide_losses, (_, _, found) = copy.deepcopy(layer).double()(z.double())
    assert quantized.dtype is torch.float64 and torch.equal(quantized, expected.double())
    assert torch.equal(found, indices) and all(map(torch.equal, wide_losses, losses))


def test_a_layer_passes_its_process_group_on(monkeypatch, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        group, seen = torch.distributed.group.WORLD, []

        propagate_rows = quantize_module.propagate

        def propagate(*arguments, **options):
            seen.append(options["process_group"])
            return propagate_rows(*arguments, **options)

        monkeypatch.setattr(quantize_module, "propagate", propagate)
        layer = IndexPropagationQuantize(16, 4, use_entropy_loss=True, process_group=group)
        layer(torch.randn(1, 4, 2, 2))
        assert seen == [group]
    finally:
        torch.distributed.destroy_process_group()
