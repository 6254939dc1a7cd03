"""What the benchmarks call official computes the same as our models."""

import copy

import pytest
import torch

from bench import models
from titok_fast import MaskGIT
from titok_fast.testing import relative_error

VIT = {
    "model": {
        "vq_model": {"codebook_size": 40},
        "generator": {
            "model_type": "ViT",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_seq_len": 6,
            "condition_num_classes": 5,
        },
    }
}


@pytest.mark.parametrize("config", [VIT, "maskgit-digits"])
def test_official_generator_has_the_same_logits(monkeypatch, config):
    own = MaskGIT.from_config(config).eval()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = copy.deepcopy(own.state_dict())
    monkeypatch.setattr(models, "generator", lambda name, device: own)
    official = models.official_generator("any", "cpu", torch.float32)
    ids = torch.randint(own.codebook_size + 1, (3, own.num_tokens))
    labels = torch.tensor([0, 4, own.num_classes])
    with torch.no_grad():
        assert relative_error(official.logits(ids, labels), own.logits(ids, labels)) < 1e-5
    kinds = {type(module) for module in official.modules()}
    assert models.OfficialAttention in kinds
    assert not kinds & {models.SeparateSelfAttention, models.FusedSelfAttention}
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, before[name])
