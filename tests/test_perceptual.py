"""Distances to frozen networks, with stand-ins for the libraries that have those."""

import json
import re
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from titok_fast.models import IBQTokenizer
from titok_fast.training.perceptual import IMAGENET_MEAN, IMAGENET_STD, KINDS, Perceptual

IBQ = {
    "n_embed": 16, "embed_dim": 16,
    "ddconfig": {
        "double_z": False, "z_channels": 16, "resolution": 32, "in_channels": 3, "out_ch": 3,
        "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    },
}  # fmt: skip


class LPIPS(nn.Module):
    """A distance of each pair, [B, 1, 1, 1] as lpips gives it."""

    def __init__(self, net, verbose):
        super().__init__()
        assert net == "vgg" and not verbose
        self.layer = nn.Conv2d(3, 4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, a, b, normalize=False):
        assert normalize and a.dtype == b.dtype == torch.float32
        features = [self.dropout(self.layer(2 * images - 1)) for images in (a, b)]
        return (features[0] - features[1]).square().mean((1, 2, 3), keepdim=True)


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 14 * 14, 10)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        assert images.shape[2:] == (224, 224) and images.dtype == torch.float32
        return self.dropout(self.head(F.avg_pool2d(images, 16).flatten(1)))


def convnext_small(weights):
    assert weights == "IMAGENET1K_V1"
    return ConvNeXt()


@pytest.fixture
def libraries(monkeypatch):
    for name, contents in (
        ("lpips", {"LPIPS": LPIPS}),
        ("torchvision", {}),
        ("torchvision.models", {"convnext_small": convnext_small}),
    ):
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def pair():
    return torch.rand(2, 3, 40, 40, requires_grad=True), torch.rand(2, 3, 40, 40)


def test_lpips(libraries):
    distance, (made, images) = Perceptual({"lpips": 0.25}), pair()
    layer = distance._networks["lpips"].layer
    features = [layer(2 * each - 1) for each in (made, images)]
    expected = 0.25 * F.mse_loss(*features)
    value = distance(made, images)
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(each, made)[0] for each in (value, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_convnext_s(libraries):
    """By the logits of images at 224 px, normalised as ImageNet is."""
    distance, (made, images) = Perceptual({"convnext_s": 0.1}), pair()
    logits = []
    for each in (made, images):
        large = F.interpolate(each, (224, 224), mode="bilinear", antialias=True)
        channels = [
            (large[:, i] - mean) / std
            for i, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
        ]
        logits.append(distance._networks["convnext_s"](torch.stack(channels, 1)))
    value = distance(made, images)
    torch.testing.assert_close(value, 0.1 * (logits[0] - logits[1]).square().sum() / 20)
    value.backward()
    assert made.grad.isfinite().all() and made.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_stays_as_it_is(kind, libraries):
    """Without dropout and gradients, and in float32 whatever is around it."""
    distance, (made, images) = Perceptual({kind: 1.0}), pair()
    with torch.autocast("cpu", torch.bfloat16):
        value = distance(made.bfloat16(), images)
    assert value.dtype == torch.float32
    assert torch.equal(value, distance(made.bfloat16().float(), images))
    value.backward()
    assert all(p.grad is None and not p.requires_grad for p in distance.parameters())
    assert distance(images, images) == 0


@pytest.mark.parametrize(("kind", "library"), [("lpips", "lpips"), ("convnext_s", "torchvision")])
def test_a_missing_library_is_named(kind, library, libraries, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    message = (
        rf"perceptual: {kind} needs {library}[.\w]*, run pip install 'titok_fast\[perceptual\]'"
    )
    with pytest.raises(RuntimeError, match=message):
        Perceptual({kind: 1.0})


def test_weights_that_cannot_be_had_are_named(libraries, monkeypatch):
    def failing(weights):
        raise OSError("no network")

    monkeypatch.setattr(sys.modules["torchvision.models"], "convnext_small", failing)
    with pytest.raises(OSError, match=re.escape("weights of convnext_s (no network)")):
        Perceptual({"convnext_s": 1.0})


def test_both(libraries):
    torch.manual_seed(0)
    distance, (made, images) = Perceptual({"lpips": 1.0, "convnext_s": 0.1}), pair()
    torch.manual_seed(0)
    parts = Perceptual({"lpips": 1.0}), Perceptual({"convnext_s": 0.1})
    torch.testing.assert_close(distance(made, images), sum(part(made, images) for part in parts))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"vgg": 1.0}, "weights: 'vgg' is not one of lpips, convnext_s"),
        ({}, "weights: got none, allowed are lpips, convnext_s"),
        ({"lpips": -1.0}, "weights['lpips']: got -1.0, allowed is a finite number from 0"),
    ],
)
def test_bad_weights(libraries, weights, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Perceptual(weights)


def test_the_command(titok_fast, libraries, monkeypatch, tmp_path):
    """Each kind of model has its weight; it is a setting of the run, and in the held-out loss."""
    for name in ("image.png", "other.png"):
        Image.linear_gradient("L").convert("RGB").resize((32, 32)).save(tmp_path / name)
    IBQTokenizer.from_config(IBQ).save_pretrained(tmp_path / "ibq")
    train = ("train", tmp_path / "image.png", "--batch-size", 1, "--steps", 1, "--workers", 0)
    train += ("--held-out", tmp_path / "other.png")

    def loss(name, source, *options):
        result = titok_fast(*train, "--init", source, *options, "-o", tmp_path / name)
        assert result.returncode == 0, result.err
        settings = json.loads((tmp_path / name / "training.json").read_text())
        line = json.loads((tmp_path / name / "evaluations.jsonl").read_text())
        return settings["--perceptual"], line["loss"]

    ibq = tmp_path / "ibq"
    none, plain = loss("none", ibq)
    half, more = loss("lpips", ibq, "--perceptual", "lpips")
    given, most = loss("most", ibq, "--perceptual", "lpips", "--perceptual-weight", 50)
    assert (none, half, given) == (None, "lpips 0.5", "lpips 50.0") and plain < more < most
    both = ("--perceptual", "convnext_s", "--perceptual", "lpips")
    assert loss("titok", "titok-digits", *both)[0] == "convnext_s 0.1, lpips 1.0"
    weights = ("--perceptual-weight", 2, "--perceptual-weight", 3)
    assert loss("weights", "titok-digits", *both, *weights)[0] == "convnext_s 2.0, lpips 3.0"
    log = json.loads((tmp_path / "weights" / "log.jsonl").read_text())
    assert log["loss/perceptual"] > 0 and log["loss/reconstruction"] > 0
    other = titok_fast(*train, "--init", ibq, "-o", tmp_path / "lpips")
    assert other.returncode == 2 and "--perceptual lpips 0.5 now None" in other.err
    monkeypatch.setitem(sys.modules, "lpips", None)
    missing = ("--init", ibq, "--perceptual", "lpips", "-o", tmp_path / "missing")
    result = titok_fast(*train, *missing)
    assert result.returncode == 2 and "lpips needs lpips, run pip install" in result.err
    assert result.err.count("\n") == 1 and not (tmp_path / "missing").exists()
