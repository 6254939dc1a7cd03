"""Models on a GPU that is not there: nothing mixes devices, and nothing waits for the GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from tests.fake_gpu import fake_gpu
from titok_fast.models import ARTransformer, IBQTokenizer, MaskGIT, MaskGITVQGAN, TiTok
from titok_fast.models.cuda_graphs import recording
from titok_fast.ops import inspect

missing = inspect.why_not("triton", "cuda")  # without it ops take their references
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


def made(kind, name, dtype):
    """A model in evaluation mode on the GPU."""
    with torch.device("cuda"):
        model = kind.from_config(name).eval()
    for module in model.modules():  # `to` cannot change the parameters of fakes
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = torch.nn.Parameter(parameter.detach().to(dtype))
    return model


def test_what_it_finds():
    with fake_gpu() as device:
        x = torch.ones(3, device=device)
        assert (x[1:] + 1).device == device
        with pytest.raises(RuntimeError, match="cpu"):
            x + torch.ones(3)
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            x.unique()


@pytest.mark.parametrize(
    ("kind", "name", "dtype"),
    [
        (TiTok, "titok-l-32", torch.bfloat16),
        (TiTok, "titok-b-128-512", torch.float32),
        (TiTok, "titok-bl-64-vae", torch.bfloat16),
        (TiTok, "titok-bl-64-vq8k", torch.float32),
        (IBQTokenizer, "ibq-262144", torch.float32),
        (IBQTokenizer, "ibq-262144", torch.bfloat16),
        (MaskGITVQGAN, "maskgit-vqgan-imagenet-f16-256", torch.float32),
    ],
)
def test_tokenizers(kind, name, dtype):
    with fake_gpu() as device, torch.no_grad():
        model = made(kind, name, dtype)
        size = 512 if name.endswith("-512") else 256
        images = torch.rand(2, 3, size, size, device=device)
        tokens = model.encode(images)
        assert tokens.device == device and len(tokens) == 2
        decoded = model.decode(tokens)
        assert decoded.device == device and decoded.shape == images.shape


@pytest.mark.parametrize("options", [{"steps": 4}, {"steps": 3, "rule": "maskgit"}])
@pytest.mark.parametrize("name", ["maskgit-vit-l-32", "maskgit-uvit-s-128"])
def test_maskgit_as_it_is_captured(name, options):
    with fake_gpu() as device, torch.no_grad():
        model = made(MaskGIT, name, torch.bfloat16)
        labels = torch.zeros(4, dtype=torch.int64, device=device)
        seed = torch.zeros([], dtype=torch.int64, device=device)
        with recording(device):
            tokens = model.generate(labels, seed=seed, image_ids=labels, **options)
        assert tokens.device == device and tokens.shape == (4, model.num_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [2, 20])  # decode_linear has up to 16 rows
def test_autoregressive(monkeypatch, batch, dtype):
    with fake_gpu() as device, torch.no_grad():
        config = ARTransformer.releases["ibq-ar-b"].config | {"block_size": 9, "n_layer": 2}
        model = made(ARTransformer, config, dtype)
        labels = torch.zeros(batch, dtype=torch.int64, device=device)

        waits = []

        def unique(x, return_inverse):  # of labels, before the first step: the one wait
            waits.append(x)
            return x, torch.arange(len(x), device=x.device)

        monkeypatch.setattr(torch.Tensor, "unique", unique)
        tokens = model.generate(labels, guidance_scale=2.0, top_k=100, top_p=0.9)
        assert tokens.device == device and tokens.shape == (batch, 9) and len(waits) == 1
        logits = model.logits(tokens[:, :4], labels)
        assert logits.device == device and logits.shape[1] == 5
