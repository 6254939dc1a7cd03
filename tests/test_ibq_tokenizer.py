"""IBQ's tokenizer against the official implementation."""

import copy
from functools import partialmethod
from inspect import signature

import pytest
import torch
from torch import nn

import titok_fast
from tests.conformance import expected, image, manifest, weights
from titok_fast.models import IBQTokenizer, TiTok, pack_weights
from titok_fast.models.auto import MODELS, model_class
from titok_fast.testing import relative_error


@pytest.fixture(scope="module")
def tiny():
    described = manifest("ibq_tokenizer_tiny")
    model = IBQTokenizer.from_config(described["config"]).eval()
    model.load_state_dict(weights(described["parameters"]), strict=True)
    return model


@pytest.mark.parametrize("packed", [False, True])
def test_conforms(tiny, packed):
    if packed:
        tiny = pack_weights(copy.deepcopy(tiny))
    wanted, images = expected("ibq_tokenizer_tiny"), image(64)[None]
    with torch.no_grad():
        hidden = tiny.latents(images)
    assert relative_error(hidden[:, ::4], wanted["hidden"]) < 2e-4
    tokens = tiny.encode(images)
    assert tokens.shape == (1, 16, 16)
    differs = tokens.flatten() != wanted["tokens"]
    assert not (differs & (wanted["gap"] >= 1e-5)).any()
    pixels = 2 * tiny.decode(wanted["tokens"].long().view(1, 16, 16), clamp=False) - 1
    assert relative_error(pixels[:, :, ::8, ::8], wanted["reconstruction"]) < 2e-4
    assert relative_error(pixels.mean((2, 3)), wanted["reconstruction_mean"]) < 2e-4
    assert relative_error(pixels.std((2, 3)), wanted["reconstruction_std"]) < 2e-4


def test_a_release_has_the_official_parameters():
    described = manifest("ibq_tokenizer_16384")
    with torch.device("meta"):
        model = IBQTokenizer.from_config("ibq-16384")
    assert model.config == described["config"]
    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    assert shapes == described["parameters"]


def test_the_official_training_file(tiny):
    """SEED-Voken's, whose constructor arguments are in a section."""
    model = {"class_path": "src.IBQ.models.ibqgan.IBQ", "init_args": tiny.config}
    for config in (tiny.config, {"trainer": {}, "model": model}):
        assert IBQTokenizer.from_config(config).config == tiny.config
        assert model_class(config, MODELS) is IBQTokenizer
    with pytest.raises(ValueError, match="config: IBQTokenizer lacks n_embed, embed_dim, ddcon"):
        IBQTokenizer.from_config({"model": {"init_args": {"n_embed": 4}}})


def test_any_size_that_fits(tiny):
    images = torch.rand(2, 3, 32, 48)
    tokens = tiny.encode(images)
    assert tokens.shape == (2, 8, 12)
    decoded = tiny.decode(tokens)
    assert decoded.shape == images.shape
    assert 0 <= float(decoded.min()) <= float(decoded.max()) <= 1


def test_saves_loads_and_runs_in_bfloat16(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    images = image(64)[None]
    again = IBQTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(images), tiny.encode(images))
    half = IBQTokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.latents(images).dtype == torch.float32
    assert relative_error(half.latents(images), tiny.latents(images)) < 0.05
    assert half.decode(half.encode(images)).dtype == torch.bfloat16


def test_compiled_blocks_agree_with_eager_ones(tiny):
    images = image(32)[None]
    latents = tiny.latents(images).detach()
    model = copy.deepcopy(tiny)
    assert titok_fast.compile(model) is model
    assert list(model.state_dict()) == list(tiny.state_dict())
    with torch.no_grad():
        assert relative_error(model.latents(images), latents) < 1e-5


@pytest.mark.skipif(
    "recompile_limit" not in signature(torch.compile).parameters, reason="torch has one limit"
)
def test_compiles_the_blocks_of_every_shape(monkeypatch):
    """A release has more of them than the 8 after which torch stops compiling."""
    config = copy.deepcopy(manifest("ibq_tokenizer_16384")["config"])
    config["ddconfig"]["ch"] = 32
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", partialmethod(whole, backend="eager"))
    model = titok_fast.compile(IBQTokenizer.from_config(config).eval())
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        tokens = model.encode(torch.rand(1, 3, 64, 64))
        assert model.decode(tokens).shape == (1, 3, 64, 64)


def test_one_graph(tiny):
    """For `encode`, and of `forward` for any number of images."""
    images = torch.rand(3, 3, 64, 64)
    tokens = torch.compile(tiny.encode, backend="eager", fullgraph=True)(images)
    assert torch.equal(tokens, tiny.encode(images))
    dim = torch.export.Dim("batch")
    program = torch.export.export(tiny, (images[:2],), dynamic_shapes=({0: dim},))
    made, found = program.module()(images)
    wanted, result = tiny(images)
    torch.testing.assert_close(made, wanted)
    assert torch.equal(found["min_encoding_indices"], result["min_encoding_indices"])


def test_encodes_and_decodes_without_dropout(tiny):
    config = copy.deepcopy(tiny.config)
    config["ddconfig"]["dropout"] = 0.5
    model = IBQTokenizer.from_config(config).train()
    images = torch.rand(1, 3, 32, 32)
    tokens = model.encode(images)
    assert torch.equal(model.encode(images), tokens)
    assert torch.equal(model.decode(tokens), model.decode(tokens))
    assert all(module.training for module in model.modules())


def test_loads_by_whichever_class_it_is(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    model = titok_fast.load_tokenizer(tmp_path, dtype=torch.bfloat16)
    assert isinstance(model, IBQTokenizer) and not model.training
    assert model.post_quant_conv.weight.dtype == torch.bfloat16
    assert model.config == tiny.config
    assert isinstance(titok_fast.load_tokenizer("titok-digits"), TiTok)
    (tmp_path / "config.json").write_text('{"n_embed": 4}')
    with pytest.raises(ValueError, match=r"config: got keys n_embed, allowed .* ddconfig \(IBQ"):
        titok_fast.load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"or one of titok-s-128, .*, ibq-1024, "):
        titok_fast.load_tokenizer("no-such-model")


def test_trains(tiny):
    images = image(64)[None]
    quantized, quant_loss, (_, _, indices) = tiny.quantize(tiny.latents(images))
    assert torch.equal(indices.flatten(), tiny.encode(images).flatten())
    pixels = tiny.decoder(tiny.post_quant_conv(quantized))
    ((pixels - (2 * images - 1)).square().mean() + quant_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tiny.parameters())
    tiny.zero_grad()


def test_float64(tiny, tmp_path):
    images = image(64)[None]
    tiny.save_pretrained(tmp_path)
    double = IBQTokenizer.from_pretrained(tmp_path, dtype=torch.float64)
    assert double.latents(images).dtype == torch.float64
    tokens = tiny.encode(images)
    assert torch.equal(double.encode(images), tokens)
    assert double.decode(tokens).dtype == torch.float64
    assert relative_error(double.decode(tokens), tiny.decode(tokens)) < 1e-5


def test_the_quantizer_takes_its_options(tiny):
    options = {
        "beta": 0.5,
        "use_entropy_loss": True,
        "cosine_similarity": True,
        "entropy_temperature": 0.02,
        "sample_minimization_weight": 2.0,
        "batch_maximization_weight": 3.0,
    }
    with torch.device("meta"):
        model = IBQTokenizer.from_config(tiny.config | options | {"remap": None})
    assert {name: getattr(model.quantize, name) for name in options} == options


def changed(tiny, **layers):
    return IBQTokenizer.from_config(tiny.config | {"ddconfig": tiny.config["ddconfig"] | layers})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.encode(torch.rand(1, 3, 30, 32)), ValueError, r"images: got shape \[1, 3, 30"),
        (lambda m: m.encode(torch.rand(3, 32, 32)), ValueError, "images: got shape"),
        (lambda m: m.capture(1), RuntimeError, "capture: the model is on cpu, allowed is a CUDA"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32).byte()), TypeError, "images: got dtype"),
        (lambda m: m.decode(torch.zeros(1, 4, 4)), TypeError, "tokens: got dtype torch"),
        (lambda m: m.decode(torch.zeros(1, 4).long()), ValueError, r"allowed is \[B, h, w\]"),
        (lambda m: m.decode(torch.full((1, 2, 2), 1024)), ValueError, r"\[1024, 1024\], allowed"),
        (lambda m: IBQTokenizer.from_config({"n_embed": 4}), ValueError, "lacks embed_dim, ddcon"),
        (lambda m: changed(m, out_ch=1), ValueError, "out_ch is 1, allowed is in_channels 3"),
        (lambda m: changed(m, attn_resolutions=["x"]), ValueError, r"attn_resolutions is \['x'\]"),
        (lambda m: changed(m, resamp_with_conv=False), ValueError, "resamp_with_conv is False"),
        (
            lambda m: changed(m, ch_mult=[]),
            ValueError,
            r"config: ddconfig\.ch_mult is \[\], ",
        ),
        (
            lambda m: changed(m, ch_mult=[1, 0]),
            ValueError,
            r"ddconfig\.ch_mult is \[1, 0\], allowed",
        ),
        (
            lambda m: changed(m, resolution=0),
            ValueError,
            r"ddconfig\.resolution is 0, allowed",
        ),
        (
            lambda m: changed(m, resolution=-1),
            ValueError,
            r"resolution is -1, allowed is a pos",
        ),
        (
            lambda m: changed(m, ch=48),
            ValueError,
            r"ddconfig\.ch is 48, allowed is a pos",
        ),
        (
            lambda m: IBQTokenizer.from_config(m.config | {"ddconfig": [1]}),
            ValueError,
            r"config: ddconfig is \[1\], allowed is a mapping",
        ),
        (
            lambda m: m.decode(torch.zeros(1, 0, 4).long()),
            ValueError,
            r"tokens: got shape \[1, 0, 4\], allowed are h, w from 1",
        ),
        (
            lambda m: IBQTokenizer.from_config(m.config | {"n_embed": 0}),
            ValueError,
            "config: n_embed is 0, allowed is a positive int",
        ),
        (
            lambda m: IBQTokenizer.from_config(m.config | {"remap": "used.npy"}),
            ValueError,
            r"config: remap is 'used\.npy', allowed is None",
        ),
    ],
)
def test_bad_input(tiny, call, error, message):
    with pytest.raises(error, match=message) as raised:
        call(tiny)
    assert "\n" not in str(raised.value)


@pytest.mark.gpu
def test_captured_encode_and_decode(tiny):
    model = copy.deepcopy(tiny).cuda()
    images = torch.rand(2, 3, 64, 64, device="cuda")
    encode, decode = model.capture(2, image_size=64)
    tokens = model.encode(images)
    assert torch.equal(encode(images), tokens)
    assert relative_error(decode(tokens), model.decode(tokens)) < 1e-4
