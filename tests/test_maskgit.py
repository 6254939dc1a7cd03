"""MaskGIT against the official implementation, and what its sampling promises."""

import json

import pytest
import torch

from tests.conformance import FOLDER, expected, manifest, uniform, weights
from titok_fast.models import MaskGIT
from titok_fast.testing import relative_error

MODEL_TYPES = {"maskgit_vit_tiny": "ViT", "maskgit_uvit_tiny": "UViT", "maskgit_vit_b64": "ViT"}
LABELS = torch.tensor([3, 7])


def official(case):
    described = manifest(case)
    described["config"]["model"]["generator"]["model_type"] = MODEL_TYPES[case]
    model = MaskGIT.from_config(described["config"]).eval()
    model.load_state_dict(weights(described["parameters"]), strict=True)
    return model


@pytest.fixture(scope="module", params=["maskgit_vit_tiny", "maskgit_uvit_tiny"])
def tiny(request):
    return request.param, official(request.param)


def some_ids(model):
    ids = torch.from_numpy(uniform("ids", [2, model.num_tokens]) * model.codebook_size).long()
    ids[:, ::3] = model.mask_id
    return ids


@pytest.mark.parametrize("case", MODEL_TYPES)
def test_logits_conform(case):
    model, wanted = official(case), expected(case)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == manifest(case)["parameters"]
    with torch.no_grad():
        for labels, name in ((LABELS, "logits_cond"), (None, "logits_uncond")):
            logits = model.logits(some_ids(model), labels)
            assert relative_error(logits[:, ::7, ::31], wanted[name]) < 2e-4


def test_trajectories_conform(tiny):
    case, model = tiny
    wanted = expected(case)
    described = json.loads((FOLDER / f"{case}.calls.json").read_text())
    assert described["labels"] == LABELS.tolist()
    for i, call in enumerate(described["calls"]):

        def noise(step, kind, shape, call=i):
            draw = 2 * step + ("token", "confidence").index(kind)
            return torch.from_numpy(uniform(f"noise.{draw}", shape, seed=described["seed"] + call))

        history = model.generate(
            LABELS,
            steps=call["num_sample_steps"],
            guidance_scale=call["guidance_scale"],
            guidance_decay=call["guidance_decay"],
            randomize_temperature=call["randomize_temperature"],
            softmax_temperature_annealing=call.get("softmax_temperature_annealing", False),
            noise=noise,
            return_steps=True,
        )
        assert torch.equal(history, wanted[f"generate{i}"].long()), i
