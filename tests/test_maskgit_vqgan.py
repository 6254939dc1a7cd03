"""MaskGITVQGAN against the official implementation, its files and its errors."""

import re

import pytest
import torch

from tests.conformance import expected, image, manifest, weights
from titok_fast.models import MaskGITVQGAN, pack_weights
from titok_fast.testing import relative_error

CASE = "maskgit_vqgan"
TINY = {
    "channel_mult": [1, 2],
    "hidden_channels": 32,
    "num_channels": 3,
    "num_res_blocks": 1,
    "z_channels": 8,
}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "packed"])
def vqgan(request):
    """The full model with the weights of the conformance case."""
    with torch.device("meta"):
        model = MaskGITVQGAN.from_config(manifest(CASE)["config"])
    model.load_state_dict(weights(manifest(CASE)["parameters"]), strict=True, assign=True)
    return pack_weights(model.eval()) if request.param else model.eval()


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = MaskGITVQGAN.from_config(TINY).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def test_names_and_shapes_are_official():
    with torch.device("meta"):
        model = MaskGITVQGAN.from_config("maskgit-vqgan-imagenet-f16-256")
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == manifest(CASE)["parameters"]


def test_encode_conforms(vqgan):
    official = expected(CASE)
    images = image(256)[None]
    with torch.no_grad():
        hidden = vqgan.encoder(images)
    assert relative_error(hidden[:, ::8], official["hidden"]) < 2e-4
    tokens = vqgan.encode(images)
    assert tokens.dtype == torch.int64
    differs = (tokens != official["tokens"]).flatten()
    assert not (differs & (official["gap"] >= 1e-5)).any()


def test_decode_conforms(vqgan):
    official = expected(CASE)
    images = vqgan.decode(official["tokens"])
    assert images.shape == (1, 3, 256, 256)
    assert images.min() >= 0 and images.max() <= 1
    assert relative_error(images[:, :, ::8, ::8], official["reconstruction"]) < 2e-4


def test_other_sizes_and_batches(tiny):
    images = torch.stack([image(32, phase) for phase in (0.0, 1.0, 2.0)])
    tokens = tiny.encode(images)
    assert tokens.shape == (3, 256)
    assert len(tokens.unique()) > 1
    assert torch.equal(torch.cat([tiny.encode(one[None]) for one in images]), tokens)
    decoded = tiny.decode(tokens)
    assert decoded.shape == images.shape
    assert not decoded.requires_grad
    torch.testing.assert_close(tiny.decode(tokens[1:2]), decoded[1:2])


def test_save_and_load_give_the_same_model(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    loaded = MaskGITVQGAN.from_pretrained(tmp_path)
    assert loaded.config == TINY
    tokens = torch.arange(16)[None]
    assert torch.equal(loaded.decode(tokens), tiny.decode(tokens))


def test_official_file_needs_no_config(vqgan, tmp_path):
    path = tmp_path / "maskgit-vqgan-imagenet-f16-256.bin"
    torch.save(vqgan.state_dict(), path)
    loaded = MaskGITVQGAN.from_pretrained(path)
    for name, tensor in vqgan.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 1, 32, 32), ValueError, r"images: got shape \[1, 1, 32, 32\]"),
        (torch.zeros(1, 3, 32, 16), ValueError, "images: .* S a multiple of 2"),
        (torch.zeros(1, 3, 33, 33), ValueError, "images: .* S a multiple of 2"),
        (torch.zeros(3, 32, 32), ValueError, "images: got shape"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "images: got dtype torch.uint8"),
    ],
)
def test_bad_images(tiny, images, error, message):
    with pytest.raises(error, match=message):
        tiny.encode(images)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(1, 12, dtype=torch.int64), ValueError, r"tokens: .* \[B, h \* h\]"),
        (torch.zeros(1, 4, 4, dtype=torch.int64), ValueError, "tokens: got shape"),
        (torch.full((1, 16), 1024), ValueError, r"tokens: got tokens in \[1024, 1024\]"),
        (torch.zeros(1, 16), TypeError, "tokens: got dtype torch.float32"),
    ],
)
def test_bad_tokens(tiny, tokens, error, message):
    with pytest.raises(error, match=message):
        tiny.decode(tokens)


def test_bad_config():
    with pytest.raises(ValueError, match="config: MaskGITVQGAN lacks z_channels"):
        MaskGITVQGAN.from_config({key: TINY[key] for key in TINY if key != "z_channels"})
    for key, value in (("channel_mult", []), ("hidden_channels", 0), ("num_res_blocks", "2")):
        with pytest.raises(ValueError, match=rf"^config: {key} is {re.escape(repr(value))}, "):
            MaskGITVQGAN.from_config(dict(TINY) | {key: value})
