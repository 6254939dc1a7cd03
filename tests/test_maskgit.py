"""MaskGIT against the official implementation, and what its sampling promises."""

import copy
import itertools
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.utils import parametrize

import titok_fast
from tests.conformance import FOLDER, expected, manifest, uniform, weights
from titok_fast.models import MaskGIT, Sampling, TiTok, maskgit
from titok_fast.models.checks import as_labels
from titok_fast.models.cuda_graphs import recording
from titok_fast.models.generate import Sampler
from titok_fast.models.maskgit import SCHEDULES
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


@pytest.mark.parametrize(
    ("scale", "decay"), [(0.0, "constant"), (2.0, "constant"), (2.0, "linear")]
)
def test_one_step_takes_the_likeliest_tokens(tiny, scale, decay):
    """By the official schedules: its temperature is 0, and its linear guidance is none."""
    _, model = tiny
    ids = torch.full((2, model.num_tokens), model.mask_id)
    with torch.no_grad():
        cond, uncond = model.logits(ids, LABELS), model.logits(ids, None)
    guided = cond + (scale if decay == "constant" else 0.0) * (cond - uncond)
    tokens = model.generate(LABELS, steps=1, guidance_scale=scale, guidance_decay=decay)
    assert torch.equal(tokens, guided.argmax(-1))


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


def small(model_type="UViT", num_tokens=9, **sampling):
    generator = {
        "model_type": model_type,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_seq_len": num_tokens,
        "condition_num_classes": 5,
        **sampling,
    }
    torch.manual_seed(1)
    config = {"model": {"vq_model": {"codebook_size": 20}, "generator": generator}}
    model = MaskGIT.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_masks_as_many_as_the_schedule_says(schedule):
    for length, steps in ((9, 1), (9, 4), (9, 9), (9, 12), (32, 8)):
        sampling = Sampling(steps, 0.0, "constant", 1.0, schedule=schedule)
        counts = sampling.num_masked(length)
        assert len(counts) == steps
        assert counts[-1] == 0
        before = length
        for step, count in enumerate(counts[:-1], 1):
            share = SCHEDULES[schedule](step / steps)
            assert count == max(1, min(before - 1, math.floor(length * share)))
            before = count
    model = small()
    history = model.generate([0, 4], steps=5, schedule=schedule, return_steps=True)
    masked = (history == model.mask_id).sum(-1).tolist()
    counts = Sampling(5, 0.0, "constant", 1.0, schedule=schedule).num_masked(9)
    assert masked == [[count] * 2 for count in (9, *counts)]
    for before, after in itertools.pairwise(history):
        kept = before != model.mask_id
        assert torch.equal(after[kept], before[kept])


@pytest.mark.parametrize("model_type", ["ViT", "UViT"])
@pytest.mark.parametrize("decay", ["constant", "linear", "power-cosine"])
def test_an_image_does_not_depend_on_the_batch(model_type, decay):
    model = small(model_type)
    labels = torch.tensor([3, 0, 3, 5, 1])
    options = {"steps": 4, "guidance_scale": 2.0, "guidance_decay": decay, "seed": 11}
    whole = model.generate(labels, **options)
    assert whole.shape == (5, 9)
    assert whole.dtype == torch.int64
    assert 0 <= int(whole.min()) <= int(whole.max()) < model.codebook_size
    for i in range(5):
        alone = model.generate(labels[i : i + 1], image_ids=torch.tensor([i]), **options)
        assert torch.equal(alone[0], whole[i])
    assert not torch.equal(whole[0], whole[2])  # the same label, another image
    assert not torch.equal(model.generate(labels, **options | {"seed": 12}), whole)
    assert torch.equal(model.generate(labels.tolist(), **options), whole)


def test_the_rules_differ():
    model, labels = small(), [0, 1, 2, 3]
    titok = model.generate(labels, steps=3, rule="titok")
    maskgit = model.generate(labels, steps=3, rule="maskgit")
    assert not torch.equal(titok, maskgit)
    greedy = [
        model.generate(labels, steps=3, randomize_temperature=0.0, seed=seed) for seed in (1, 2)
    ]
    assert torch.equal(*greedy)


def test_backends_agree():
    model = small()
    options = {"steps": 6, "guidance_scale": 3.0, "guidance_decay": "linear"}
    assert torch.equal(
        model.generate([0, 1, 2], backend="reference", **options),
        model.generate([0, 1, 2], backend="cpu", **options),
    )


def test_given_tokens_stay():
    model = small()
    ids = torch.full((3, 9), model.mask_id)
    ids[0, 2:7] = torch.tensor([1, 2, 3, 4, 5])
    ids[2] = torch.arange(9)
    out = model.generate([1, 2, 3], ids=ids, steps=4)
    kept = ids != model.mask_id
    assert torch.equal(out[kept], ids[kept])
    assert int(out.max()) < model.codebook_size
    free = model.generate([1, 2, 3], steps=4, guidance_scale=0.0)
    assert torch.equal(
        model.generate(
            [1, 2, 3], ids=torch.full((3, 9), model.mask_id), steps=4, guidance_scale=0.0
        ),
        free,
    )
    with_steps = model.generate([1, 2, 3], ids=ids, steps=4, return_steps=True)
    assert torch.equal(with_steps[-1], out)


def test_no_image_is_no_work():
    model = small()
    assert model.generate(torch.empty(0, dtype=torch.int64)).shape == (0, 9)


def test_unconditional_pass_only_where_it_counts(monkeypatch):
    model, batches = small(), []
    hidden = model._hidden
    monkeypatch.setattr(
        model, "_hidden", lambda ids, labels: batches.append(len(ids)) or hidden(ids, labels)
    )
    model.generate([0, 1, 1, 0], steps=3, guidance_scale=2.0, guidance_decay="linear")
    assert batches == [2, 8, 8]  # two labels at first, then both branches of four images
    batches.clear()
    model.generate([0, 1, 1, 0], steps=2, guidance_scale=0.0, guidance_decay="constant")
    assert batches == [2, 4]
    batches.clear()
    model.generate([0, 1, 1, 0], steps=2, guidance_scale=2.0, guidance_decay="constant")
    assert batches == [3, 8]


def test_releases():
    models = {name: _on_meta(name) for name in MaskGIT.releases}
    shapes = {k: list(v.shape) for k, v in models["maskgit-vit-b-64"].state_dict().items()}
    assert shapes == manifest("maskgit_vit_b64")["parameters"]
    assert MaskGIT.releases.keys() >= {"maskgit-vit-l-32", "maskgit-uvit-s-128"}
    for name, wanted in (
        ("maskgit-vit-l-32", (8, 4.5, "linear", 9.5)),
        ("maskgit-vit-b-64", (8, 3.0, "linear", 11.0)),
        ("maskgit-uvit-s-128", (64, 6.9, "power-cosine", 2.8)),
    ):
        own = models[name].sampling
        sampling = own.steps, own.guidance_scale, own.guidance_decay, own.randomize_temperature
        assert sampling == wanted


def test_the_configuration_of_a_hub_repository():
    """The official one keeps OmegaConf's interpolations as they stand in the file."""
    config = copy.deepcopy(small().config)
    config["model"]["vq_model"]["num_latent_tokens"] = 9
    config["model"]["generator"]["image_seq_len"] = "${model.vq_model.num_latent_tokens}"
    model = MaskGIT.from_config(config | {"other": "${not.there}", "seed": np.int64(3)})
    assert model.num_tokens == 9 and model.config["model"]["generator"]["image_seq_len"] == 9
    assert model.config["other"] == "${not.there}" and type(model.config["seed"]) is int
    chain = {"a": "${b}", "b": "${c.d}", "c": {"d": ["${e}"]}, "e": 3}
    assert MaskGIT.from_config(config | chain).config["a"] == [3]
    with pytest.raises(ValueError, match=r"config: \$\{[ab]\} leads to itself"):
        MaskGIT.from_config(config | {"a": "${b}", "b": "${a}"})


def test_numbers_and_labels_of_numpy():
    model = small()
    expected = model.generate([0, 1], steps=3, guidance_scale=2.5, seed=7)
    options = {"steps": np.int32(3), "guidance_scale": np.float32(2.5), "seed": np.uint64(7)}
    big_endian, reverse = np.array([0, 1], ">i8"), np.array([1, 0], np.uint64)[::-1]
    for labels in (np.array([0, 1], np.int32), big_endian, reverse, [np.int64(0), np.int32(1)]):
        assert torch.equal(model.generate(labels, **options), expected)
    assert torch.equal(model.generate([torch.tensor(0), torch.tensor(1)], **options), expected)
    assert model.generate(np.zeros(0)).shape == (0, 9)
    with pytest.raises(TypeError, match=r"labels: got \[\[1\], \[2, 3\]\], allowed is integers"):
        model.generate([[1], [2, 3]])
    with pytest.raises(ValueError, match=r"labels: got shape \[\], allowed is \[B\]"):
        model.generate(np.array(1))
    with pytest.raises(ValueError, match="steps: got True, allowed is a positive int"):
        model.generate([0], steps=np.bool_(True))


def test_labels_are_checked_before_they_are_on_a_device():
    meta = torch.device("meta")
    assert as_labels([0, 10], 10, meta).device == meta
    for labels in ([-1], np.array([11]), torch.tensor([-1])):
        with pytest.raises(ValueError, match=r"labels: got labels in .*, allowed is \[0, 10\]"):
            as_labels(labels, 10, meta)


def _on_meta(name):
    with torch.device("meta"):
        return MaskGIT.from_config(name)


@pytest.mark.parametrize("model_type", ["ViT", "UViT"])
def test_saves_and_loads(model_type, tmp_path):
    model = small(model_type)
    model.save_pretrained(tmp_path)
    again = MaskGIT.from_pretrained(tmp_path)
    assert torch.equal(again.generate([0, 1]), model.generate([0, 1]))
    half = MaskGIT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.generate([0, 1]).shape == (2, 9)


@pytest.mark.parametrize("model_type", ["ViT", "UViT"])
def test_float64(model_type, tmp_path):
    model = small(model_type)
    model.save_pretrained(tmp_path)
    double = MaskGIT.from_pretrained(tmp_path, dtype=torch.float64)
    options = {"steps": 3, "guidance_scale": 2.0, "seed": 4}
    assert double.logits(some_ids(model), None).dtype == torch.float64
    assert torch.equal(double.generate([1, 0, 4], **options), model.generate([1, 0, 4], **options))


@pytest.mark.parametrize("model_type", ["ViT", "UViT"])
def test_training_mode_does_not_change_tokens(model_type):
    model = small(model_type, dropout=0.5, attn_drop=0.5)
    tokens = model.generate([1, 0, 4])
    model.train()
    model._head_layer.eval()
    assert torch.equal(model.generate([1, 0, 4]), tokens)
    assert model.training and not model._head_layer.training


def test_the_model_has_the_defaults():
    model = small(num_tokens=16)
    options = {
        "steps": 4,
        "guidance_scale": 2.0,
        "guidance_decay": "power-cosine",
        "guidance_scale_pow": 1.5,
        "randomize_temperature": 3.0,
        "softmax_temperature_annealing": False,
        "schedule": "square",
        "rule": "maskgit",
    }
    wanted = model.generate([1, 0, 4], **options)
    assert not torch.equal(model.generate([1, 0, 4]), wanted)
    model.sampling = Sampling(**options)
    assert torch.equal(model.generate([1, 0, 4]), wanted)


@pytest.mark.parametrize("model_type", ["ViT", "UViT"])
def test_trains(model_type):
    model = small(model_type, dropout=0.1, attn_drop=0.1).train()
    ids = torch.randint(0, 21, (4, 9))
    loss = model(ids, torch.tensor([0, 1, 4, 5])).logsumexp(-1).mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("model_type", ["ViT", "UViT"])
def test_distributed_checkpoints(model_type):
    """torch looks each name of the state_dict up among the attributes."""
    model, other = small(model_type), small(model_type)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    state = get_model_state_dict(model)
    assert list(state) == list(model.state_dict())
    set_model_state_dict(other, state)
    ids, labels = torch.zeros(2, 9).long(), torch.tensor([0, 1])
    assert torch.equal(other.logits(ids, labels), model.logits(ids, labels))


def test_a_parametrised_matrix_is_stored_as_its_original():
    model = small("ViT")
    layer = model.model["encoder"]["layer"][0].attention["self"]
    expected = layer.in_proj_weight.detach().clone()
    parametrize.register_parametrization(layer, "in_proj_weight", nn.Tanh())
    state = {k: v for k, v in model.state_dict().items() if "layer.0.attention.self" in k}
    names = {k.rsplit("self.")[1]: v for k, v in state.items()}
    assert torch.equal(names.pop("parametrizations.in_proj_weight.original"), expected)
    assert set(names) == {"query.bias", "key.bias", "value.bias"}


def test_some_of_query_key_and_value_are_loaded():
    model, other = small("ViT"), small("ViT")
    nn.init.normal_(model.model["encoder"]["layer"][0].attention["self"].in_proj_bias)
    state = model.state_dict()
    del state["model.encoder.layer.0.attention.self.key.bias"]
    found = other.load_state_dict(state, strict=False)
    assert [k.rsplit("0.")[1] for k in found.missing_keys] == ["attention.self.key.bias"]
    assert found.unexpected_keys == []
    mine, theirs = (m.model["encoder"]["layer"][0].attention["self"] for m in (other, model))
    assert torch.equal(mine.query.bias, theirs.query.bias)
    assert torch.equal(mine.value.bias, theirs.value.bias) and not mine.key.bias.any()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*attention\.self\.key\.bias"):
        other.load_state_dict(state)
    nn.init.normal_(mine.in_proj_bias)
    before = mine.key.bias.clone()
    other.load_state_dict({name: x.bfloat16() for name, x in state.items()}, strict=False)
    assert torch.equal(mine.key.bias, before)
    assert torch.equal(mine.query.bias, theirs.query.bias.bfloat16().float())
    state["model.encoder.layer.0.attention.self.query.bias"] = torch.zeros(3)  # of another width
    assert (
        "model.encoder.layer.0.attention.self.value.bias"
        in other.load_state_dict(state, strict=False).unexpected_keys
    )


def test_generates_in_several_threads_while_training():
    """All in evaluation mode, which no thread ends for another."""
    model = small("ViT", dropout=0.5, attn_drop=0.5).train()
    expected = model.generate([1, 2], seed=3)
    with ThreadPoolExecutor(4) as pool:
        tokens = list(pool.map(lambda _: model.generate([1, 2], seed=3), range(24)))
    assert all(torch.equal(each, expected) for each in tokens)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate([5, 6]), ValueError, r"labels: got labels in \[5, 6\], allowed"),
        (lambda m: m.generate([0.5]), TypeError, "labels: got dtype torch.float32"),
        (lambda m: m.generate([0], steps=0), ValueError, "steps: got 0, allowed is a positive"),
        (lambda m: m.generate([0], schedule="sine"), ValueError, "schedule: got 'sine'"),
        (lambda m: m.generate([0], rule="x"), ValueError, "rule: got 'x', allowed is 'titok' or"),
        (lambda m: m.generate([0], guidance_decay="x"), ValueError, "guidance_decay: got 'x'"),
        (lambda m: m.generate([0], guidance_scale=-1), ValueError, "guidance_scale: got -1"),
        (
            lambda m: m.generate([0], ids=torch.zeros(1, 8).long()),
            ValueError,
            r"ids: got shape \[1, 8\], allowed is \[1, 9\]",
        ),
        (
            lambda m: m.generate([0], ids=torch.full((1, 9), 21)),
            ValueError,
            r"ids: got tokens in \[21, 21\], allowed is \[0, 20\]",
        ),
        (
            lambda m: m.logits(torch.zeros(2, 3).long(), None),
            ValueError,
            r"ids: got shape \[2, 3\], allowed is \[B, 9\]",
        ),
        (
            lambda m: MaskGIT.from_config({"model": {"vq_model": {"codebook_size": 4}}}),
            ValueError,
            "config: model.generator lacks hidden_size",
        ),
        (
            lambda m: MaskGIT.from_config({"model": 1}),
            ValueError,
            "config: model is 1, allowed is",
        ),
        (
            lambda m: MaskGIT.from_config(
                {"model": {"vq_model": {"codebook_size": 4}, "generator": "x"}}
            ),
            ValueError,
            r"config: model\.generator is 'x', allowed is a mapping",
        ),
        (
            lambda m: small(num_attention_heads=0),
            ValueError,
            r"config: model\.generator\.num_attention_heads is 0, allowed is a positive int",
        ),
        (lambda m: small(dropout=2), ValueError, r"dropout is 2, allowed is a number from 0 to 1"),
        (lambda m: small(num_steps=0), ValueError, r"generator\.num_steps is 0, allowed is a pos"),
        (
            lambda m: small(hidden_size=33),
            ValueError,
            "hidden_size is 33 with 2 num_att",
        ),
        (lambda m: small("BERT"), ValueError, "model_type is 'BERT', allowed is 'ViT' or"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call(small())
    assert "\n" not in str(raised.value)


def test_generates_digits_that_a_classifier_of_real_ones_reads():
    pytest.importorskip("sklearn")
    from titok_fast.training.digits_generator import evaluate

    result = evaluate(MaskGIT.from_pretrained("maskgit-digits"))
    print(result)
    assert result.real_accuracy >= 0.97
    assert result.accuracy >= 0.9
    assert result.distinct >= 0.99


def test_from_labels_to_images():
    options = {"model": "titok-digits", "seed": 5, "device": "cpu"}
    images = titok_fast.generate([3, 1, 4], batch_size=2, **options)
    assert images.shape == (3, 3, 32, 32)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    one = titok_fast.generate([3, 1, 4], batch_size=3, **options)
    assert torch.allclose(images, one, atol=1e-5)
    with pytest.raises(ValueError, match="model: 'titok-x' is not one of 'titok-l-32'"):
        titok_fast.generate([1], model="titok-x")


def test_whole_batches_are_captured(monkeypatch):
    """No GPU here, so no graph: what a replay would run is called instead."""
    batches = []

    def replay_later(function, *examples):
        def replay(*arguments):
            shapes = [(x.shape, x.dtype) for x in arguments]
            assert shapes == [(x.shape, x.dtype) for x in examples]
            batches.append(len(arguments[0]))
            with recording(arguments[0].device):
                return function(*arguments)

        return replay

    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True)
    monkeypatch.setattr(maskgit, "capture", replay_later)
    monkeypatch.setattr(sys.modules[Sampler.__module__], "record", replay_later)
    labels = torch.arange(23) % 10
    options = {"model": "titok-digits", "seed": 5, "device": "cpu", "batch_size": 5}
    expected = titok_fast.generate(labels, steps=3, **options)
    assert batches == []  # for want of eight
    images = titok_fast.generate(labels, steps=3, capture=True, **options)
    assert batches == [5] * 9  # once more for an example of the decoder's input
    assert torch.allclose(images, expected, atol=1e-5)
    with pytest.raises(ValueError, match="capture: got True with ids, which no graph takes"):
        titok_fast.generate(labels, ids=torch.full((23, 16), 256), capture=True, **options)


def test_capture_by_itself(monkeypatch):
    tokenizer = TiTok.from_pretrained("titok-digits")
    generator = MaskGIT.from_pretrained("maskgit-digits")

    def captures(**options):
        defaults = {"count": 80, "batch_size": 10, "seed": 0}
        return Sampler(tokenizer, generator, **defaults | options).captures

    assert not captures()
    for seed, error in ((-1, ValueError), (2**63, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="seed: "):
            captures(seed=seed)
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True)
    assert captures() and captures(steps=3)
    for options in ({"count": 79}, {"given": ["ids"]}, {"backend": "cuda"}, {"capture": False}):
        assert not captures(**options)


def test_options_of_each_image():
    options = {"model": "titok-digits", "seed": 5, "device": "cpu"}
    images = titok_fast.generate([3, 1, 4, 1, 5], **options)
    numbers = torch.tensor([4, 2, 0])
    some = titok_fast.generate([5, 4, 3], image_ids=numbers, batch_size=2, **options)
    assert torch.allclose(some, images[numbers], atol=1e-5)
    ids = torch.full((5, 16), 256)
    ids[:, :4] = torch.arange(20).view(5, 4)
    kept = titok_fast.generate([3, 1, 4, 1, 5], ids=ids, batch_size=2, **options)
    whole = titok_fast.generate([3, 1, 4, 1, 5], ids=ids, batch_size=5, **options)
    assert torch.allclose(kept, whole, atol=1e-5) and not torch.allclose(kept, images, atol=0.1)
    assert titok_fast.generate([], **options).shape == (0, 3, 32, 32)
    for given, error, words in (
        ({"return_steps": True}, ValueError, "return_steps: got True, allowed is False"),
        ({"num_tokens": 4}, ValueError, "num_tokens: got 4, allowed is None"),
        (
            {"labels": [1, 2], "noise": lambda *_: None, "batch_size": 1},
            ValueError,
            "noise: allowed with one batch, got 2 labels in batches of 1",
        ),
        (
            {"image_ids": numbers},
            ValueError,
            r"image_ids: got shape \[3\], allowed is \[1, ",
        ),
        ({"ids": ids}, ValueError, r"ids: got shape \[5, 16\], allowed is \[1, "),
        ({"labels": [3.9]}, TypeError, r"labels: got dtype torch\.float32, allowed is an int64"),
        ({"labels": [[3]]}, ValueError, r"labels: got shape \[1, 1\]"),
        ({"batch_size": 1.5}, ValueError, "batch_size: got 1.5, allowed is a positive int"),
    ):
        with pytest.raises(error, match=words) as raised:
            titok_fast.generate(**({"labels": [1]} | options | given))
        assert "\n" not in str(raised.value)


def test_capture_needs_a_gpu():
    with pytest.raises(RuntimeError, match="capture: the model is on cpu, allowed is a CUDA"):
        small().capture(2)
    with pytest.raises(RuntimeError, match="capture: the model is on cpu, allowed is a CUDA"):
        titok_fast.generate([1], model="titok-digits", device="cpu", batch_size=1, capture=True)


@pytest.mark.gpu
def test_captured_images():
    options = {"model": "titok-digits", "seed": 5, "device": "cuda", "batch_size": 8}
    labels = torch.arange(67) % 10
    images = titok_fast.generate(labels, **options)
    expected = titok_fast.generate(labels, capture=False, **options)
    assert torch.allclose(images, expected, atol=1e-4)


@pytest.mark.gpu
def test_captured_generation():
    model = small().cuda()
    options = {"steps": 4, "guidance_scale": 2.0, "guidance_decay": "linear"}
    run = model.capture(3, **options)
    labels, numbers = torch.tensor([1, 0, 4]).cuda(), torch.tensor([5, 6, 9]).cuda()
    for seed in (0, 7):
        wanted = model.generate(labels, seed=seed, image_ids=numbers, **options)
        assert torch.equal(run(labels, torch.tensor(seed).cuda(), numbers), wanted)
