"""TiTok against the official implementation, its configurations, files and errors."""

import copy
import functools
import gc
import json
import logging

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import titok_fast
from tests.conformance import expected, image, manifest, parameter, weights
from titok_fast.models import DiagonalGaussian, MaskGITVQGAN, TiTok, pretrained
from titok_fast.models.maskgit_vqgan import VQGAN_CONFIG, PixelDecoder
from titok_fast.models.packed import Packable
from titok_fast.testing import relative_error

MANIFESTS = {
    "titok-s-128": "titok_s128",
    "titok-b-64": "titok_b64",
    "titok-l-32": "titok_l32",
    "titok-bl-64-vq8k": "titok_bl64_vq8k",
    "titok-bl-128-vq8k": "titok_bl128_vq8k",
    "titok-sl-256-vq8k": "titok_sl256_vq8k",
    "titok-ll-32-vae": "titok_ll32_vae_c16",
    "titok-bl-64-vae": "titok_bl64_vae_c16",
    "titok-bl-128-vae": "titok_bl128_vae_c16",
}
SIZE = {"width": 64, "num_layers": 2, "num_heads": 2}


def variant(kind, crop_size=32, **changes):
    """A small configuration: "vq", "vae", "stage1" (proxy logits) or "stage2" (proxy to pixels)."""
    patch_size = 16 if kind.startswith("stage") else 8
    vq_model = {
        "codebook_size": 64,
        "token_size": 8,
        "use_l2_norm": True,
        "commitment_cost": 0.25,
        "vit_enc_model_size": SIZE,
        "vit_dec_model_size": SIZE,
        "vit_enc_patch_size": patch_size,
        "vit_dec_patch_size": patch_size,
        "num_latent_tokens": 6,
        "quantize_mode": "vae" if kind == "vae" else "vq",
        "finetune_decoder": kind == "stage2",
        "is_legacy": kind.startswith("stage"),
        **changes,
    }
    return {"model": {"vq_model": vq_model}, "dataset": {"preprocessing": {"crop_size": crop_size}}}


def small(kind):
    """A small model with weights under which tokens depend on the image."""
    model = TiTok.from_config(variant(kind)).eval()
    model.load_state_dict(small_weights(kind))
    return model


@functools.cache
def small_weights(kind):
    return weights(shapes(on_meta(variant(kind))))


def batch(size):
    return torch.stack([image(size, 0.0), image(size, 1.7)])


def on_meta(name_or_config):
    with torch.device("meta"):
        return TiTok.from_config(name_or_config)


def shapes(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def official_weights():
    """Weights of a case; tensors of the same name and shape are made once for all cases."""
    made = {}

    def build(case):
        wanted = manifest(case)["parameters"]
        for name, shape in wanted.items():
            if (name, *shape) not in made:
                made[(name, *shape)] = parameter(name, shape)
        return {name: made[(name, *shape)] for name, shape in wanted.items()}

    return build


@pytest.fixture(scope="module")
def official(official_weights):
    """Builds the model of a conformance case."""

    def build(case):
        model = on_meta(manifest(case)["config"])
        model.load_state_dict(official_weights(case), strict=True, assign=True)
        return model.eval()

    return build


def check_reconstruction(images, official):
    assert relative_error(images[:, :, ::8, ::8], official["reconstruction"]) < 2e-4
    assert relative_error(images.mean((2, 3)), official["reconstruction_mean"]) < 2e-4
    assert relative_error(images.std((2, 3)), official["reconstruction_std"]) < 2e-4


@pytest.mark.parametrize("case", ["titok_s128", "titok_bl64_vq8k"])
def test_vq_conforms(official, case):
    model, outputs, images = official(case), expected(case), batch(256)
    with torch.no_grad():
        latents = model.latents(images)  # [B, L, C]
        z = latents.transpose(1, 2).unsqueeze(2)  # [B, C, 1, L]
        assert relative_error(z, outputs["latents"]) < 2e-4
        quantized, losses = model.quantize(z)
    tokens = model.encode(images)
    assert tokens.dtype == torch.int64
    differs = (tokens != outputs["tokens"]).flatten()
    assert not (differs & (outputs["gap"] >= 1e-5)).any()
    if not differs.any():
        assert relative_error(quantized, outputs["quantized"]) < 2e-4
        for name in ("commitment_loss", "codebook_loss"):
            assert relative_error(losses[name], outputs[name]) < 1e-5
    check_reconstruction(model.decode(outputs["tokens"], clamp=False), outputs)
    if "proxy_logits" in outputs:
        with torch.no_grad():
            logits = model.proxy_logits(outputs["tokens"])
        assert relative_error(logits[:, ::64, ::4, ::4], outputs["proxy_logits"]) < 2e-4


def test_vae_conforms(official):
    case = "titok_bl64_vae_c16"
    model, outputs, images = official(case), expected(case), batch(256)
    with torch.no_grad():
        latents = model.latents(images)  # [B, L, 2 C]
    posterior = DiagonalGaussian(latents)
    for name, value in (("latents", latents), ("mean", posterior.mean), ("std", posterior.std)):
        assert relative_error(value.transpose(1, 2).unsqueeze(2), outputs[name]) < 2e-4
    check_reconstruction(model.decode(posterior.mean, clamp=False), outputs)


@pytest.mark.parametrize("name", MANIFESTS)
def test_released_variants_have_official_names_and_shapes(name):
    case = manifest(MANIFESTS[name])
    registered = TiTok.releases[name].config
    assert registered["model"]["vq_model"] == case["config"]["model"]["vq_model"]
    assert registered["dataset"] == case["config"]["dataset"]
    assert shapes(on_meta(name)) == case["parameters"]
    assert shapes(on_meta(case["config"])) == case["parameters"]
    assert TiTok.releases[name].checkpoint == case["config"]["experiment"]["tokenizer_checkpoint"]


@pytest.mark.parametrize(
    ("name", "base", "num_latent_tokens"),
    [("titok-l-64-512", "titok_l32", 64), ("titok-b-128-512", "titok_b64", 128)],
)
def test_512_px_variants_differ_in_positions_only(name, base, num_latent_tokens):
    parameters = manifest(base)["parameters"]
    width = parameters["latent_tokens"][1]
    parameters["latent_tokens"] = [num_latent_tokens, width]
    for part in ("encoder", "decoder"):
        parameters[f"{part}.positional_embedding"] = [1 + 32 * 32, width]
        parameters[f"{part}.latent_token_positional_embedding"] = [num_latent_tokens, width]
    model = on_meta(name)
    assert shapes(model) == parameters
    assert model.image_size == 512


def test_512_px_runs():
    config = copy.deepcopy(dict(TiTok.releases["titok-b-128-512"].config))
    for part in ("enc", "dec"):
        config["model"]["vq_model"][f"vit_{part}_model_size"] = SIZE
    torch.manual_seed(0)
    model = TiTok.from_config(config).eval()
    narrow = {**VQGAN_CONFIG, "hidden_channels": 32, "num_res_blocks": 1}
    model.pixel_decoder = PixelDecoder(narrow).eval()
    tokens = model.encode(image(512)[None])
    assert tokens.shape == (1, 128)
    assert model.proxy_logits(tokens).shape == (1, 1024, 32, 32)
    images = model.decode(tokens)
    assert images.shape == (1, 3, 512, 512)
    assert images.isfinite().all()


def test_digits_is_small():
    model = on_meta("titok-digits")
    assert 4 * sum(parameter.numel() for parameter in model.parameters()) < 3e6
    assert (model.image_size, model.num_latent_tokens, model.codebook_size) == (32, 16, 256)


def test_attributes():
    model = on_meta("titok-bl-64-vae")
    assert (model.image_size, model.num_latent_tokens, model.token_size) == (256, 64, 16)
    assert model.codebook_size is None
    assert model.quantize_mode == "vae"
    assert not any(name.startswith("quantize") for name in model.state_dict())


def test_official_config_with_other_sections():
    config = manifest("titok_l32")["config"]
    config["losses"] = {"quantizer_weight": 1.0}
    model = on_meta(config)
    assert model.config == config
    config["model"]["vq_model"]["token_size"] = 1
    assert model.config["model"]["vq_model"]["token_size"] == 12


def test_initial_weights():
    torch.manual_seed(0)
    model = TiTok.from_config("titok-digits")
    assert model.decoder.ffn[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.encoder.transformer[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.encoder.transformer[0].attn.out_proj.bias.abs().max() == 0
    xavier = (2 / (80 + 3 * 80)) ** 0.5
    assert model.encoder.transformer[0].attn.in_proj_weight.std().item() == pytest.approx(
        xavier, rel=0.05
    )
    assert model.latent_tokens.std().item() == pytest.approx(80**-0.5, rel=0.1)


@pytest.mark.parametrize("kind", ["vq", "vae", "stage2"])
def test_encode_and_decode(kind):
    model, images = small(kind), batch(32)
    encoded = model.encode(images)
    decoded = model.decode(encoded)
    assert not decoded.requires_grad
    assert decoded.min() >= 0 and decoded.max() <= 1
    unclamped = model.decode(encoded, clamp=False)
    assert torch.equal(unclamped.clamp(0, 1), decoded)
    assert unclamped.min() < 0 or unclamped.max() > 1
    assert decoded.shape == (2, 3, 32, 32)
    if kind == "vae":
        assert encoded.shape == (2, 6, 8)
        assert encoded.dtype == torch.float32
    else:
        assert encoded.shape == (2, 6)
        assert encoded.dtype == torch.int64
        assert len(encoded.unique()) > 1


@pytest.mark.parametrize("kind", ["vq", "vae", "stage2"])
def test_results_do_not_depend_on_the_batch(kind):
    model, images = small(kind), batch(32)
    encoded = model.encode(images)
    alone = torch.cat([model.encode(one[None]) for one in images])
    torch.testing.assert_close(alone, encoded)
    assert not torch.equal(encoded[0], encoded[1])
    assert relative_error(model.decode(encoded[1:]), model.decode(encoded)[1:]) < 2e-4


@pytest.mark.parametrize("kind", ["vq", "vae", "stage2"])
def test_the_last_block_makes_what_is_used(kind):
    """Latent tokens in the encoder and patches in the decoder; all of it for who watches."""
    model, images = small(kind), batch(32)
    patches = 4 if kind == "stage2" else 16
    encoded = model.encode(images)
    decoded = model.decode(encoded)
    lengths = {}
    for part in ("encoder", "decoder"):
        for name in ("0", "1", "1.mlp"):

            def record(module, inputs, out, key=(part, name)):
                lengths[key] = out.shape[1]

            hook = model.get_submodule(f"{part}.transformer.{name}").register_forward_hook(record)
            torch.testing.assert_close(model.encode(images), encoded)
            assert relative_error(model.decode(encoded), decoded) < 2e-4
            hook.remove()
    every = 1 + patches + 6
    assert lengths == {
        **{(part, name): every for part in ("encoder", "decoder") for name in "01"},
        ("encoder", "1.mlp"): 6,
        ("decoder", "1.mlp"): patches,
    }


def test_empty_batch():
    model = small("vq")
    tokens = model.encode(torch.zeros(0, 3, 32, 32))
    assert tokens.shape == (0, 6)
    assert model.decode(tokens).shape == (0, 3, 32, 32)


def test_bfloat16():
    model, images = small("vq"), batch(32)
    reference = model.decode(model.encode(images), clamp=False)
    tokens = model.encode(images)
    model = model.to(torch.bfloat16)
    assert (model.encode(images) == tokens).float().mean() > 0.5
    decoded = model.decode(tokens, clamp=False)
    assert decoded.dtype == torch.bfloat16
    assert relative_error(decoded, reference) < 0.05


def test_vae_samples_the_posterior():
    model, images = small("vae"), batch(32)
    with torch.no_grad():
        posterior = DiagonalGaussian(model.latents(images))
    mean, std = posterior.mean, posterior.std
    assert torch.equal(model.encode(images), mean)

    def draw(seed):
        return model.encode(images, sample=True, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    many = model.encode(images.repeat(50, 1, 1, 1), sample=True).unflatten(0, (50, 2))
    noise = (many - mean) / std  # [50, B, L, C]
    assert abs(noise.mean().item()) < 0.05
    assert noise.std().item() == pytest.approx(1.0, abs=0.05)


def test_gaussian():
    parameters = torch.randn(2, 3, 10, dtype=torch.float64, generator=torch.manual_seed(0))
    posterior = DiagonalGaussian(parameters)
    normal = torch.distributions.Normal(parameters[..., :5], (parameters[..., 5:] / 2).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(normal, standard).sum(-1)
    torch.testing.assert_close(posterior.kl(), kl.float())
    extreme = DiagonalGaussian(torch.tensor([0.0, 0.0, -1e4, 1e4]))
    assert extreme.logvar.tolist() == [-30.0, 20.0]


def test_first_stage_trains_on_proxy_logits():
    model, images = small("stage1").train(), batch(32)
    logits, result = model(images)
    assert logits.shape == (2, 1024, 2, 2)
    target = torch.zeros(2, 2, 2, dtype=torch.int64)
    loss = torch.nn.functional.cross_entropy(logits, target) + result["quantizer_loss"]
    loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name
    tokens = result["min_encoding_indices"].squeeze(1)
    torch.testing.assert_close(model.proxy_logits(tokens), logits, rtol=1e-3, atol=1e-4)


def test_first_stage_makes_images_through_the_vqgan():
    model = small("stage1")
    tokens = model.encode(batch(32))
    with pytest.raises(ValueError, match="first-stage model has no pixel decoder"):
        model.decode(tokens)
    vqgan = MaskGITVQGAN.from_config("maskgit-vqgan-imagenet-f16-256").eval()
    images = vqgan.decode(model.proxy_logits(tokens).argmax(1).flatten(1))
    assert images.shape == (2, 3, 32, 32)


def test_second_stage_trains_the_decoders_only():
    model, images = small("stage2").train(), batch(32)
    decoded, result = model(images)
    tokens = result["min_encoding_indices"].squeeze(1)
    assert relative_error(decoded.detach(), model.decode(tokens, clamp=False)) < 2e-4
    assert result["quantizer_loss"] == 0 and result["commitment_loss"] == 0
    decoded.square().mean().backward()
    for name, weight in model.named_parameters():
        frozen = name.startswith(("encoder.", "quantize.", "latent_tokens"))
        assert weight.requires_grad != frozen
        assert (weight.grad is None) == frozen, name


@pytest.mark.parametrize("kind", ["vq", "vae"])
def test_pixel_models_train_end_to_end(kind):
    model, images = small(kind).train(), batch(32)
    decoded, result = model(images)
    loss = (decoded - images).square().mean()
    loss = loss + (result["posterior"].kl().mean() if kind == "vae" else result["quantizer_loss"])
    loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("form", ["folder", "pytorch_model.bin", "other.bin", "file"])
def test_save_and_load_give_the_same_model(form, tmp_path):
    model, images = small("stage2").train(), batch(32)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    source = tmp_path
    if form.endswith(".bin"):
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / form)
        (tmp_path / "model.safetensors").unlink()
    elif form == "file":
        source = tmp_path / "model.safetensors"
    loaded = TiTok.from_pretrained(source)
    assert not loaded.training
    assert loaded.config == model.config
    assert {name for name, weight in loaded.named_parameters() if weight.requires_grad} == {
        name for name, weight in model.named_parameters() if weight.requires_grad
    }
    tokens = model.encode(images)
    assert torch.equal(loaded.encode(images), tokens)
    assert torch.equal(loaded.decode(tokens), model.decode(tokens))


def test_load_converts_dtype_and_device(tmp_path):
    small("vq").save_pretrained(tmp_path)
    loaded = TiTok.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    kept = [name for name, x in loaded.named_parameters() if x.dtype != torch.bfloat16]
    assert kept == ["encoder.conv_out.weight", "encoder.conv_out.bias", "quantize.embedding.weight"]
    whole = TiTok.from_pretrained(tmp_path)
    for name in kept:  # as stored, not rounded on the way
        assert loaded.get_parameter(name).dtype == torch.float32
        assert torch.equal(loaded.get_parameter(name), whole.get_parameter(name))


def test_failed_save_keeps_the_old_files(tmp_path, monkeypatch):
    model = small("vq")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pretrained, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_official_single_file_needs_no_config(tmp_path):
    path = tmp_path / "tokenizer_titok_s128.bin"
    state = {
        name: torch.full(shape, 0.01)
        for name, shape in manifest("titok_s128")["parameters"].items()
    }
    torch.save(state, path)
    loaded = TiTok.from_pretrained(path)
    assert loaded.config["model"]["vq_model"]["num_latent_tokens"] == 128
    assert loaded.latent_tokens[0, 0] == state["latent_tokens"][0, 0]


@pytest.mark.parametrize("by_name", [True, False])
def test_hub(by_name, tmp_path, monkeypatch):
    """A named release, and an id whose repository holds the older weight file."""
    model = small("vq")
    model.save_pretrained(tmp_path)
    asked = []

    def download(repo_id, filename, *, revision):
        asked.append((repo_id, filename, revision))
        if not (tmp_path / filename).exists():
            raise LocalEntryNotFoundError(f"no {filename}")
        return str(tmp_path / filename)

    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    if by_name:
        release = pretrained.Release(model.config, hub_id="owner/released")
        monkeypatch.setattr(TiTok, "releases", {"released": release})
        loaded = TiTok.from_pretrained("released", revision="v1")
        assert asked == [("owner/released", "model.safetensors", "v1")]
    else:
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
        loaded = TiTok.from_pretrained("owner/name")
        assert ("owner/name", "pytorch_model.bin", None) in asked
        (tmp_path / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"cannot get config\.json of owner/name from"):
            TiTok.from_pretrained("owner/name")
    assert torch.equal(loaded.latent_tokens, model.latent_tokens)


@pytest.mark.parametrize("level", [logging.DEBUG, logging.WARNING])
def test_attempts_to_download_are_not_told(monkeypatch, caplog, level):
    logger = logging.getLogger("huggingface_hub.utils._http")

    def download(*_, **__):
        logger.warning("Retrying in 1s [Retry 1/5].")
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    caplog.set_level(level, "huggingface_hub")
    with pytest.raises(FileNotFoundError, match="no connection"):
        TiTok.from_pretrained("owner/absent")
    assert len(caplog.records) == (1 if level == logging.DEBUG else 0)
    assert logger.getEffectiveLevel() == level


def test_hub_ids_are_the_released_repositories():
    stem = "yucornetto/tokenizer_"
    for name, case in MANIFESTS.items():
        assert TiTok.releases[name].hub_id == f"{stem}{case}_imagenet"
    with pytest.raises(ValueError, match="weights of titok-l-64-512 were never released"):
        TiTok.from_pretrained("titok-l-64-512")


def test_digits_comes_from_the_package(tmp_path, monkeypatch):
    release = TiTok.releases["titok-digits"]
    assert release.folder.parts[-4:] == ("titok_fast", "models", "data", "titok-digits")
    missing = pretrained.Release(release.config, folder=tmp_path / "gone")
    monkeypatch.setattr(TiTok, "releases", {"titok-digits": missing})
    with pytest.raises(FileNotFoundError, match="gone does not exist, this installation lacks"):
        TiTok.from_pretrained("titok-digits")


def test_strict_loading_names_every_fault(tmp_path):
    small("vq").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["extra"] = torch.zeros(1)
    del state["encoder.ln_pre.weight"]
    state["latent_tokens"] = state["latent_tokens"][:5].clone()
    save_file(state, path)
    with pytest.raises(ValueError) as caught:
        TiTok.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"path_or_hub_id: {path} does not fit TiTok: ")
    assert "missing encoder.ln_pre.weight" in message
    assert "unexpected extra" in message
    assert "latent_tokens is [5, 64] instead of [6, 64]" in message


def test_unreadable_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist, and it is not a Hub id"):
        TiTok.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="it is the name of another model, of"):
        TiTok.from_pretrained("ibq-1024")
    with pytest.raises(TypeError, match="config: expected a mapping, got str; a name is for from_"):
        TiTok("titok-digits")
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors"):
        TiTok.from_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(FileNotFoundError, match=r"no config\.json beside"):
        TiTok.from_pretrained(path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        TiTok.from_pretrained(path)
    (tmp_path / "config.json").write_text(json.dumps(variant("vq")))
    with pytest.raises(ValueError, match="does not hold a flat mapping"):
        TiTok.from_pretrained(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a readable weight file"):
        TiTok.from_pretrained(path)
    with pytest.raises(ValueError, match="revision: 'v1' applies to a Hub repository"):
        TiTok.from_pretrained(tmp_path, revision="v1")


def test_pickled_code_is_not_run(tmp_path):
    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "config.json").write_text(json.dumps(variant("vq")))
    torch.save({"latent_tokens": Touch()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a readable weight file"):
        TiTok.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, 64, 64), ValueError, r"images: got shape .*allowed is \[B, 3, 32, 32\]"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"images: got shape \[1, 1, 32, 32\]"),
        (torch.zeros(3, 32, 32), ValueError, "images: got shape"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "images: got dtype torch.uint8"),
        ([[0.0]], TypeError, "images: got list"),
    ],
)
def test_bad_images(images, error, message):
    model = small("vq")
    for method in (model.latents, model.encode, model):
        with pytest.raises(error, match=message):
            method(images)


@pytest.mark.parametrize(
    ("kind", "tokens", "error", "message"),
    [
        ("vq", torch.zeros(1, 5, dtype=torch.int64), ValueError, r"shape .*allowed is \[B, 6\]"),
        ("vq", torch.zeros(1, 1, 6, dtype=torch.int64), ValueError, "got shape"),
        ("vq", torch.full((1, 6), 64), ValueError, r"got tokens in \[64, 64\].*\[0, 63\]"),
        ("vq", torch.full((1, 6), -1), ValueError, r"got tokens in \[-1, -1\]"),
        ("vq", torch.zeros(1, 6, 8), TypeError, "got dtype torch.float32, allowed is an int64"),
        ("vae", torch.zeros(1, 6, dtype=torch.int64), TypeError, "got dtype torch.int64"),
        ("vae", torch.zeros(1, 6, 9), ValueError, r"allowed is \[B, 6, 8\]"),
    ],
)
def test_bad_tokens(kind, tokens, error, message):
    with pytest.raises(error, match=f"tokens_or_latents: .*{message}"):
        small(kind).decode(tokens)


def test_methods_of_other_variants_refuse():
    with pytest.raises(ValueError, match="sample: got True"):
        small("vq").encode(batch(32), sample=True)
    with pytest.raises(ValueError, match="proxy_logits: this model predicts pixels"):
        small("vq").proxy_logits(torch.zeros(1, 6, dtype=torch.int64))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("titok-xl", ValueError, "name_or_config: 'titok-xl' is not a TiTok configuration"),
        (7, TypeError, "name_or_config: got int"),
        ({}, ValueError, r"config: dataset\.preprocessing lacks crop_size"),
        (variant("vq", crop_size=33), ValueError, "vit_enc_patch_size is 8"),
        (variant("vq", quantize_mode="fsq"), ValueError, "quantize_mode is 'fsq'"),
        (variant("vq", vit_dec_model_size="huge"), ValueError, "vit_dec_model_size is 'huge'"),
        (variant("vq", vit_enc_model_size={"width": 8}), ValueError, "vit_enc_model_size"),
        (
            variant("vq", vit_enc_model_size=SIZE | {"num_layers": 0}),
            ValueError,
            "num_heads, positive",
        ),
        (variant("vq", finetune_decoder=True), ValueError, "finetune_decoder is true"),
        (variant("stage2", vit_dec_patch_size=8), ValueError, "patch_size is 8, allowed is 16"),
        ({"dataset": {"preprocessing": {"crop_size": 32}}}, ValueError, "lacks token_size"),
        (variant("vq") | {"model": []}, ValueError, r"config: model is \[\], allowed is a mapping"),
        (variant("vq") | {"model": {"vq_model": 3}}, ValueError, r"config: model\.vq_model is 3"),
        (variant("vq") | {"dataset": "x"}, ValueError, "config: dataset is 'x', allowed is a map"),
        (variant("vq") | {"dataset": {"preprocessing": 4}}, ValueError, r"\.preprocessing is 4"),
        (variant("vq", crop_size=0), ValueError, r"\.crop_size is 0, allowed is a positive int"),
        (variant("vq", vit_enc_patch_size=0), ValueError, r"vq_model\.vit_enc_patch_size is 0"),
        (variant("vq", vit_dec_model_size=7), ValueError, r"vq_model\.vit_dec_model_size is 7"),
        (variant("vq", vit_dec_model_size=SIZE | {"num_heads": 0}), ValueError, "model_size is"),
        (variant("vq", vit_dec_model_size=SIZE | {"width": "8"}), ValueError, "model_size is"),
        (
            variant("vq", codebook_size=0),
            ValueError,
            r"config: model\.vq_model\.codebook_size is 0",
        ),
        (variant("vq", use_l2_norm="no"), ValueError, "use_l2_norm is 'no', allowed is true or fa"),
    ],
)
def test_bad_config(config, error, message):
    with pytest.raises(error, match=message) as raised:
        TiTok.from_config(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_keep_the_tokens(dtype):
    pytest.importorskip("sklearn")
    from titok_fast.training.data import digits

    images, _ = digits("test")
    model = TiTok.from_pretrained("titok-digits")
    tokens, decoded = model.encode(images), model.decode(model.encode(images))
    half = TiTok.from_pretrained("titok-digits", dtype=dtype)
    assert half.latents(images).dtype == torch.float32
    equal = (half.encode(images) == tokens).double().mean().item()
    print(f"{dtype}: {equal:.2%} of the tokens are those of float32")
    assert equal >= 0.95
    assert half.decode(tokens).dtype == dtype
    assert relative_error(half.decode(tokens), decoded) < 0.02


@pytest.mark.parametrize("kind", ["vq", "vae", "stage2"])
def test_float64(kind, tmp_path):
    model, images = small(kind), batch(32)
    tokens = model.encode(images)
    model.save_pretrained(tmp_path)
    double = TiTok.from_pretrained(tmp_path, dtype=torch.float64)
    assert double.latents(images).dtype == torch.float64
    assert relative_error(double.encode(images).double(), tokens.double()) < 1e-5
    assert double.decode(tokens).dtype == torch.float64
    assert relative_error(double.decode(tokens), model.decode(tokens)) < 1e-5


class Method(torch.nn.Module):
    """A method of a model, as a model's forward pass."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x):
        return getattr(self.model, self.name)(x)


@pytest.mark.parametrize("kind", ["vq", "vae", "stage2"])
def test_exports_for_any_number_of_images(kind):
    model, images = small(kind), torch.rand(3, 3, 32, 32)
    x, dim = batch(32), torch.export.Dim("batch")
    for name in ("encode", "decode"):
        program = torch.export.export(Method(model, name), (x,), dynamic_shapes=({0: dim},))
        x = model.encode(batch(32))
        given = images if name == "encode" else model.encode(images)
        out, wanted = program.module()(given), getattr(model, name)(given)
        assert out.dtype == wanted.dtype and relative_error(out.double(), wanted.double()) < 1e-5


def test_cast_says_what_it_takes():
    for dtype in (torch.int8, torch.float8_e5m2, "float32"):
        with pytest.raises(TypeError, match=rf"dtype: got {dtype}, allowed is torch\.float32 or"):
            small("vq").cast(dtype)
    assert small("vae").cast(torch.bfloat16).encoder.conv_out.weight.dtype == torch.float32
    assert {p.dtype for p in small("vq").cast(torch.float64).parameters()} == {torch.float64}


def test_compiled_blocks_agree_with_eager_ones():
    model, images = small("stage2"), torch.rand(2, 3, 32, 32)
    latents, names = model.latents(images), list(model.state_dict())
    decoded = model.decode(model.encode(images))
    assert titok_fast.compile(model) is model
    assert list(model.state_dict()) == names
    assert relative_error(model.latents(images), latents) < 1e-5
    assert relative_error(model.decode(model.encode(images)), decoded) < 1e-4
    with pytest.raises(ValueError, match="model: Linear has no block"):
        titok_fast.compile(torch.nn.Linear(2, 2))


def test_blocks_of_packed_weights_are_compiled_only_to_learn():
    def compiled(model):
        model = titok_fast.compile(model)
        return [block for block in model.modules() if block._compiled_call_impl is not None]

    model = titok_fast.pack_weights(small("stage2"))
    assert any(isinstance(layer, Packable) and layer.is_packed() for layer in model.modules())
    assert not compiled(model)
    assert compiled(copy.deepcopy(model).train())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert compiled(model)  # the copies are stale


def test_capture_needs_a_gpu():
    with pytest.raises(RuntimeError, match="capture: the model is on cpu, allowed is a CUDA"):
        small("vq").capture(2)


@pytest.mark.gpu
def test_captured_encode_and_decode():
    model = small("stage2").cuda()
    encode, decode = model.capture(2)
    images = torch.rand(2, 3, 32, 32, device="cuda")
    tokens = model.encode(images)
    assert torch.equal(encode(images), tokens)
    assert relative_error(decode(tokens), model.decode(tokens)) < 1e-4
    with pytest.raises(ValueError, match=r"capture: argument 0 is torch\.float32"):
        encode(images[:1])


@pytest.mark.gpu
def test_a_captured_function_outlives_the_model():
    model = small("stage2").cuda()
    encode, decode = model.capture(2)
    images = torch.rand(2, 3, 32, 32, device="cuda")
    tokens = model.encode(images)
    decoded = decode(tokens)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    taken = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(64)]
    assert torch.equal(encode(images), tokens) and torch.equal(decode(tokens), decoded)
    assert all(tensor.isnan().all() for tensor in taken)
