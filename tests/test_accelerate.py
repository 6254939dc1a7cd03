"""accelerate on stand-ins with the upstream names and the official arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import titok_fast
from titok_fast import accelerate
from titok_fast.testing import relative_error


def upstream(name="VectorQuantizer", **changes):
    """An upstream-like quantizer class: its name, its attributes, eager float32 arithmetic."""

    def init(self, use_l2_norm=False):
        nn.Module.__init__(self)
        attributes = {
            "codebook_size": 32, "token_size": 6, "commitment_cost": 0.25,
            "use_l2_norm": use_l2_norm, "clustering_vq": False,
        } | changes  # fmt: skip
        for key, value in attributes.items():
            if value is not None:
                setattr(self, key, value)
        self.embedding = nn.Embedding(32, 6)

    def forward(self, z):
        rows, codebook = z.permute(0, 2, 3, 1), self.embedding.weight
        if self.use_l2_norm:
            rows, codebook = F.normalize(rows, dim=-1), F.normalize(codebook, dim=-1)
        flat = rows.reshape(-1, 6)
        scores = (
            flat.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * flat @ codebook.T
        )
        indices = scores.argmin(1)
        codes = codebook[indices].view(rows.shape)
        loss = (
            0.25 * (codes.detach() - rows).square().mean() + (codes - rows.detach()).square().mean()
        )
        out = (rows + (codes - rows).detach()).permute(0, 3, 1, 2)
        return out, {"quantizer_loss": loss, "min_encoding_indices": indices.view(rows.shape[:3])}

    return type(
        name, (nn.Module,), {"__init__": init, "forward": forward, "__module__": "modeling"}
    )


class Model(nn.Module):
    def __init__(self, quantizer):
        super().__init__()
        self.encoder = nn.Conv2d(3, 6, 1)
        self.inner = nn.ModuleDict({"quantize": quantizer})
        self.shared = quantizer

    def forward(self, x):
        return self.inner["quantize"](self.encoder(x))


def why_left(model):
    """The reason that `accelerate` gives; checks that nothing was replaced."""
    log = []
    assert accelerate(model, log=log.append) is model
    assert len(set(line.partition(": ")[2] for line in log)) == 1
    assert all(line.startswith("left ") for line in log)
    return log[0]


@pytest.mark.parametrize("use_l2_norm", [False, True])
def test_outputs_and_training_go_on_as_before(use_l2_norm):
    model = Model(upstream()(use_l2_norm))
    x = torch.randn(2, 3, 1, 10)
    expected, expected_result = model(x)
    tensors = {name: (p, p.data_ptr()) for name, p in model.state_dict(keep_vars=True).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    log = []
    assert accelerate(model, log=log.append) is model
    assert isinstance(model.shared, titok_fast.VectorQuantizer)
    assert model.shared is model.inner["quantize"]
    by = "modeling.VectorQuantizer by titok_fast.layers.vector_quantizer.VectorQuantizer"
    assert log == [f"replaced inner.quantize: {by}", f"replaced shared: {by}"]

    after = model.state_dict(keep_vars=True)
    assert set(after) == set(tensors)
    for name, (parameter, pointer) in tensors.items():
        assert after[name] is parameter and after[name].data_ptr() == pointer
    output, result = model(x)
    assert torch.equal(result["min_encoding_indices"], expected_result["min_encoding_indices"])
    assert relative_error(output, expected) < 1e-6
    before = model.shared.embedding.weight.detach().clone()
    result["quantizer_loss"].backward()
    optimizer.step()
    assert not torch.equal(model.shared.embedding.weight, before)


def test_hooks_and_mode_move_along():
    quantizer = upstream()().eval()
    quantizer.embedding.weight.requires_grad_(False)
    quantizer.decay = 0.9
    seen = []
    quantizer.register_forward_hook(lambda *_: seen.append("forward"))
    quantizer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer = accelerate(quantizer)
    layer(torch.randn(1, 6, 1, 4, requires_grad=True))[0].sum().backward()
    assert seen == ["forward", "backward"]
    assert not layer.training and layer.decay == 0.9
    assert not layer.embedding.weight.requires_grad
    assert isinstance(layer, titok_fast.VectorQuantizer)


def test_what_only_shares_the_name_is_left_alone():
    quantizer = upstream(token_size=None)()
    model = Model(quantizer)
    assert "has no token_size, so it is not 1d-tokenizer's" in why_left(model)
    assert model.shared is quantizer


def test_our_own_layers_and_other_models_are_left_alone():
    model = Model(titok_fast.VectorQuantizer(32, 6))
    quantizer = model.shared
    log = []
    accelerate(model, log=log.append)
    assert model.shared is quantizer and log == ["found no quantizer to replace"]


def seed_voken(name="IndexPropagationQuantize", **changes):
    """SEED-Voken's quantizers by name and attributes, the arithmetic that of the first."""

    def init(self, use_entropy_loss=False):
        nn.Module.__init__(self)
        attributes = {
            "n_e": 32, "e_dim": 6, "beta": 0.5, "use_entropy_loss": use_entropy_loss,
            "cosine_similarity": False, "entropy_temperature": 0.2,
            "sample_minimization_weight": 2.0, "batch_maximization_weight": 0.5,
            "remap": None, "re_embed": 32,
        } | changes  # fmt: skip
        for key, value in attributes.items():
            if value is not None or key == "remap":
                setattr(self, key, value)
        self.embedding = nn.Embedding(32, 6)

    def forward(self, z, temp=None, return_logits=False):
        rows, codebook = z.permute(0, 2, 3, 1), self.embedding.weight
        logits = rows @ codebook.T
        soft = logits.softmax(-1)
        indices = soft.argmax(-1)
        hard = F.one_hot(indices, 32).float()
        quantized, codes = (hard - soft.detach() + soft) @ codebook, hard @ codebook
        loss = (
            (quantized - rows).square().mean() + (codes.detach() - rows).square().mean()
            + self.beta * (codes - rows.detach()).square().mean()
        )  # fmt: skip
        if self.use_entropy_loss:
            sharp = (logits / self.entropy_temperature).flatten(0, 2)
            sample = -(sharp.softmax(1) * sharp.log_softmax(1)).sum(1).mean()
            mean = sharp.softmax(1).mean(0)
            batch = -(mean * (mean + 1e-5).log()).sum()
            weights = self.sample_minimization_weight, self.batch_maximization_weight
            loss = loss, sample, batch, weights[0] * sample - weights[1] * batch
        return quantized.permute(0, 3, 1, 2), loss, (None, None, indices.flatten())

    return type(
        name, (nn.Module,), {"__init__": init, "forward": forward, "__module__": "src.quantize"}
    )


@pytest.mark.parametrize("use_entropy_loss", [False, True])
def test_ibq_quantizers_train_on_as_before(use_entropy_loss):
    model = Model(seed_voken()(use_entropy_loss))
    x = torch.randn(2, 3, 1, 10)
    weight = model.shared.embedding.weight

    def step():
        output, losses, (_, _, indices) = model(x)
        losses = losses if use_entropy_loss else (losses,)
        grads = torch.autograd.grad(output.square().sum() + sum(losses), list(model.parameters()))
        return output, torch.stack(losses), indices, grads

    expected, expected_losses, expected_indices, expected_grads = step()
    accelerate(model)
    assert isinstance(model.shared, titok_fast.IndexPropagationQuantize)
    assert model.shared is model.inner["quantize"]
    assert model.shared.embedding.weight is weight
    output, losses, indices, grads = step()
    assert torch.equal(indices, expected_indices)
    assert relative_error(output, expected) < 1e-6
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert relative_error(ours, theirs) < 1e-4


def test_the_remap_of_an_ibq_quantizer_moves_along():
    quantizer = seed_voken(remap="used.npy", re_embed=4, unknown_index=3)()
    used = torch.tensor([4, 9, 30])
    quantizer.register_buffer("used", used)
    layer = accelerate(quantizer)
    assert layer.used is used and layer.re_embed == 4 and layer.unknown_index == 3
    _, _, (_, _, indices) = layer(torch.randn(1, 6, 2, 2))
    assert indices.shape == (4, 1) and int(indices.max()) <= 2


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("IndexPropagationQuantize", {"beta": None}, "has no beta, so it is not SEED-Voken's"),
        ("VectorQuantizer", {}, "is as SEED-Voken's and LlamaGen's, with returns of another form"),
        ("VectorQuantizer2", {}, "has other losses and returns than the layers here"),
    ],
)
def test_what_cannot_be_replaced_is_left_with_a_reason(name, changes, reason):
    why = why_left(seed_voken(name, **changes)())
    assert why == f"left the model: src.quantize.{name} {reason}"


@pytest.mark.parametrize("make", [upstream, seed_voken])
def test_an_option_that_the_layers_lack_is_left_alone(make):
    """A fork's `l2_normalize`, say, changes what is nearest."""
    quantizer = make(l2_normalize=True)()
    assert "has l2_normalize, which the layers here do not know" in why_left(quantizer)
    quantizer = make(l2_normalize=False)()
    quantizer.projection = nn.Linear(6, 6)
    assert "has projection, which" in why_left(quantizer)
    quantizer = make(l2_normalize=False)()
    assert accelerate(quantizer) is not quantizer


def test_the_pixel_quantizer_of_1d_tokenizer_is_left_alone():
    attributes = {"num_embeddings": 32, "embedding_dim": 6}
    quantizer = upstream(codebook_size=None, token_size=None, **attributes)()
    assert "is MaskGIT-VQGAN's, whose returns are" in why_left(quantizer)


@pytest.mark.parametrize("change", [accelerate, titok_fast.compile, titok_fast.pack_weights])
def test_a_name_is_no_model(change):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        change("titok-digits")
