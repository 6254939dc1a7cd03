"""Training runs: stopped and taken up, in parts, over processes; generators on token files."""

import copy
import dataclasses
import errno
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

from titok_fast.images import read_image, read_pixels, to_uint8
from titok_fast.metrics import codebook_usage, psnr
from titok_fast.models import ARTransformer, IBQTokenizer, MaskGIT, MaskGITVQGAN, TiTok
from titok_fast.models.maskgit_vqgan import VQGAN_CONFIG
from titok_fast.models.titok import DiagonalGaussian
from titok_fast.tokens import TokenFile, fingerprint
from titok_fast.training.adversary import (
    Adversary,
    AdversaryOptions,
    PatchDiscriminator,
    adaptive_weight,
)
from titok_fast.training.data import digits, key, rows_of_step
from titok_fast.training.evaluation import EVALUATIONS_FILE, SAMPLES_FOLDER, Evaluator
from titok_fast.training.generator import RECIPES, GeneratorTask, Losses, generator_config
from titok_fast.training.loop import Optimization
from titok_fast.training.losses import next_token_loss
from titok_fast.training.run import STATE_FILE, Options, Task, run
from titok_fast.training.tokenizer import Losses as TokenizerLosses
from titok_fast.training.tokenizer import TokenizerTask, last_layer, second_stage, tokenizer_config

AR = {
    "vocab_size": 24, "block_size": 9, "class_num": 3, "n_layer": 2, "n_head": 2, "n_embd": 32,
    "resid_dropout_p": 0.1, "ffn_dropout_p": 0.1, "token_drop": 0.1,
}  # fmt: skip
NETWORK = {
    "model_type": "ViT", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "dropout": 0.1, "attn_drop": 0.1, "image_seq_len": 9,
    "condition_num_classes": 3,
}  # fmt: skip
MASKGIT = {"model": {"vq_model": {"codebook_size": 24}, "generator": NETWORK}}


def quiet(line):
    pass


def token_file(count=40, length=9, codes=24, classes=3, **changes):
    generator = np.random.default_rng(0)
    fields = {
        "tokens": generator.integers(codes, size=(count, length)).astype(np.uint16),
        "image_ids": [f"{i}.png" for i in range(count)],
        "model": "some-tokenizer",
        "fingerprint": "0123456789abcdef",
        "image_size": 32,
        "codebook_size": codes,
        "labels": np.arange(count) % classes,
        "class_names": [str(i) for i in range(classes)],
    }
    return TokenFile(**(fields | changes))


def generator(kind):
    torch.manual_seed(0)
    return kind.from_config(AR if kind is ARTransformer else MASKGIT)


@pytest.fixture(params=[MaskGIT, ARTransformer])
def kind(request):
    return request.param


def test_rows_of_steps_are_every_example_once_an_epoch():
    rows = torch.cat([rows_of_step(10, 4, step, seed=1) for step in range(5)])
    first, second = rows[:10], rows[10:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()
    assert rows_of_step(10, 20, 0, seed=1).tolist() == rows.tolist()  # larger than an epoch
    assert rows_of_step(10, 10, 0, seed=2).tolist() != first.tolist()


def test_keys_differ():
    keys = {key(*parts) for parts in ((0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1), (0,))}
    assert len(keys) == 5 and all(0 <= each < 2**63 for each in keys)


class Stopped(Exception):
    pass


class Stops:
    """A task that is killed in one of its losses."""

    calls = 0

    def loss(self, network, batch, generator):
        self.calls += 1
        if self.calls == self.last:
            raise Stopped
        return super().loss(network, batch, generator)


class StopsInItsFifth(Stops, GeneratorTask):
    last = 5


class StopsInItsTenth(Stops, GeneratorTask):
    last = 10


class StopsInItsFourth(Stops, TokenizerTask):
    last = 4


class SpoiltInItsFourth(GeneratorTask):
    """A task of which one loss is finite and its gradient is not."""

    def loss(self, network, batch, generator):
        self.calls = getattr(self, "calls", 0) + 1
        loss = super().loss(network, batch, generator)
        if self.calls == 4:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss


def test_a_gradient_that_is_not_finite_spoils_nothing(kind, tmp_path):
    optimization, options = Optimization(6, 1e-3), Options(batch_size=4, save_every=3)
    task = SpoiltInItsFourth(generator(kind), token_file())
    with pytest.raises(FloatingPointError, match="gradient: got a norm of nan at step 3"):
        run(task, optimization, options, tmp_path, log=quiet)
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    assert state["steps"] == 3 and all(t.isfinite().all() for t in state["model"].values())
    again = run(GeneratorTask(generator(kind), token_file()), optimization, options, tmp_path)
    assert all(parameter.isfinite().all() for parameter in again.parameters())


def test_a_run_that_was_stopped_gives_the_same_bits(kind, tmp_path):
    optimization, options = Optimization(6, 1e-2), Options(8, save_every=3)
    task = GeneratorTask(generator(kind), token_file())
    whole = run(task, optimization, options, log=quiet).state_dict()
    with pytest.raises(Stopped):
        run(
            StopsInItsFifth(generator(kind), token_file()),
            optimization,
            options,
            tmp_path,
            log=quiet,
        )
    lines = []
    torch.rand(3)  # what is drawn around it does not matter
    task = GeneratorTask(generator(kind), token_file())
    before = torch.get_rng_state()
    model = run(task, optimization, options, tmp_path, log=lines.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert lines[0] == "taken up after step 3 of 6" and not model.training
    for name, tensor in whole.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    stored = kind.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in whole.items())
    again = run(GeneratorTask(generator(kind), token_file()), optimization, options, tmp_path)
    assert torch.equal(next(again.parameters()), next(model.parameters()))


def evaluations(folder):
    return [json.loads(line) for line in (folder / EVALUATIONS_FILE).read_text().splitlines()]


def held_out_of(kind, network=None):
    """Tokens of eleven images that `token_file` has not."""
    file = token_file(count=51)
    file = dataclasses.replace(
        file, tokens=file.tokens[40:], image_ids=file.image_ids[40:], labels=file.labels[40:]
    )
    return GeneratorTask(network or generator(kind), file)


def test_held_out_examples_change_no_bit(kind, tmp_path):
    """Of a run, and of one that was stopped; its evaluations are those of one that was not."""
    optimization = Optimization(6, 1e-2)
    options = Options(8, micro_batch_size=4, save_every=3, evaluate_every=2)
    plain = run(GeneratorTask(generator(kind), token_file()), optimization, options, log=quiet)
    whole, stopped, lines = tmp_path / "whole", tmp_path / "stopped", []
    model = run(
        *(GeneratorTask(generator(kind), token_file()), optimization, options, whole),
        held_out=held_out_of(kind),
        log=lines.append,
    )
    with pytest.raises(Stopped):
        run(
            *(StopsInItsTenth(generator(kind), token_file()), optimization, options, stopped),
            held_out=held_out_of(kind),
            log=quiet,
        )
    assert [line["step"] for line in evaluations(stopped)] == [2, 4]  # of a state after 3
    with open(stopped / EVALUATIONS_FILE, "a") as file:
        file.write('{"step": 6, "lo')  # as a killed process leaves it
    again = run(
        *(GeneratorTask(generator(kind), token_file()), optimization, options, stopped),
        held_out=held_out_of(kind),
        log=quiet,
    )
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert torch.equal(again.state_dict()[name], tensor), name
    assert [line["step"] for line in evaluations(whole)] == [2, 4, 6]
    assert evaluations(whole) == evaluations(stopped)
    assert [line.split(",")[0] for line in lines if "held out" in line] == [
        f"step {line['step']:5d}/6  held out: loss {line['loss']:.5g}"
        for line in evaluations(whole)
    ]


def test_the_held_out_loss_is_that_of_the_average(kind, tmp_path):
    """Without dropout, over all examples; of a finished run, too, whose weights stay."""
    held_out = held_out_of(kind)
    task, options = GeneratorTask(generator(kind), token_file()), Options(8, micro_batch_size=4)
    model = run(task, Optimization(3, 1e-2), options, tmp_path, log=quiet)
    assert not (tmp_path / EVALUATIONS_FILE).exists()
    for _ in range(2):
        task = GeneratorTask(generator(kind), token_file())
        again = run(task, Optimization(3, 1e-2), options, tmp_path, held_out=held_out, log=quiet)
        assert torch.equal(next(again.parameters()), next(model.parameters()))
    (line,) = evaluations(tmp_path)
    expected = 0.0
    for number, rows in enumerate(torch.arange(11).split(8)):
        draws = torch.Generator().manual_seed(key("held out", "draws", number))
        with torch.no_grad():
            loss = held_out.loss(model, held_out.batch(rows, draws), draws)
        expected += float(loss) * len(rows) / 11
    assert line["loss"] == pytest.approx(expected, rel=1e-6) and line["step"] == 3
    if kind is ARTransformer:
        tokens, labels = held_out.batch(torch.arange(11), draws)
        loss = next_token_loss(model.logits(tokens[:, :-1], labels), tokens)
        assert line["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_an_evaluation_leaves_the_modes_of_a_model_as_they_were(kind):
    task = held_out_of(kind)
    task.model.get_submodule(next(n for n, m in task.model.named_modules() if n)).eval()
    before = [module.training for module in task.model.modules()]
    seen = []

    class Watched(GeneratorTask):
        def evaluate(self, network, batch, generator):
            seen.extend(module.training for module in network.modules())
            return super().evaluate(network, batch, generator)

    task.__class__ = Watched
    Evaluator(task, Options(8), 1, None, 0, quiet)(task.model, 1)
    assert seen and not any(seen)
    assert [module.training for module in task.model.modules()] == before and True in before


def test_a_state_of_another_run_is_refused(tmp_path):
    optimization, options = Optimization(1, 1e-2), Options(8)
    run(GeneratorTask(generator(MaskGIT), token_file()), optimization, options, tmp_path)
    task = GeneratorTask(generator(ARTransformer), token_file())
    with pytest.raises(ValueError, match=r"state\.pt: not the state of a run like this") as error:
        run(task, optimization, options, tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / STATE_FILE).write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not the state of a run like this"):
        run(task, optimization, options, tmp_path)


class Line(Task):
    """Least squares of a line: a task without anything random."""

    def __init__(self, bias=True):
        torch.manual_seed(0)
        self.model, self.count = nn.Linear(3, 1, bias=bias), 24
        self.x = torch.randn(self.count, 3)
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5]])

    def batch(self, rows, generator):
        return self.x[rows], self.y[rows]

    def loss(self, network, batch, generator):
        return F.mse_loss(network(batch[0]), batch[1])


def test_parts_of_a_step_add_up():
    optimization = Optimization(5, 0.1)
    weights = [
        run(Line(), optimization, Options(8, micro_batch_size=part, average_decay=0.0)).weight
        for part in (None, 8, 2, 1)
    ]
    for weight in weights[1:]:
        torch.testing.assert_close(weight, weights[0])
    losses = [[], []]
    for part, lines in zip((None, 4), losses, strict=True):
        run(Line(), optimization, Options(8, part, log_every=1), log=lines.append)
    assert [line.split()[3] for line in losses[0]] == [line.split()[3] for line in losses[1]]
    with pytest.raises(ValueError, match="micro_batch_size: got 3, allowed is a divisor of the 8"):
        run(Line(), optimization, Options(8, micro_batch_size=3))


def test_the_average_follows_the_weights():
    seen = []

    class Watched(Line):
        def loss(self, network, batch, generator):
            seen.append(network.weight.detach().clone())
            return super().loss(network, batch, generator)

    task = Watched(bias=False)
    average = run(task, Optimization(20, 0.1), Options(24, average_decay=0.6)).weight
    expected = seen[0]
    for steps, weight in enumerate([*seen[1:], task.model.weight.detach()], 1):
        decay = min(0.6, (1 + steps) / (10 + steps))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average, expected)
    assert not average.requires_grad
    last = run(task, Optimization(1, 0.1), Options(24, average_decay=0.0))
    assert last is task.model


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    lines = []
    options = Options(8, micro_batch_size=2, save_every=2, log_every=1)
    model = run(Line(), Optimization(5, 0.1), options, log=lines.append)
    torch.save((model.weight, lines), folder / f"{rank}.pt")
    with pytest.raises(ValueError, match="batch_size: got 7, allowed is a multiple of 2"):
        run(Line(), Optimization(5, 0.1), Options(7))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(tmp_path,), nprocs=2)
    alone = run(Line(), Optimization(5, 0.1), Options(8)).weight
    for rank, count in enumerate((5, 0)):
        weight, lines = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(weight, alone)
        assert len(lines) == count


def test_bfloat16_learns_and_keeps_weights_in_float32(kind):
    file, lines = token_file(count=8), []
    options = Options(8, dtype=torch.bfloat16, average_decay=0.0, log_every=30)
    model = run(
        GeneratorTask(generator(kind), file), Optimization(60, 1e-2), options, log=lines.append
    )
    losses = [float(line.split()[3]) for line in lines]
    print(f"\n{kind.__name__}: loss {losses} (a guess: {math.log(24):.3f})")
    assert losses[1] < losses[0] and losses[1] < math.log(24)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_loss_of_the_next_token():
    model = generator(ARTransformer).eval()
    nn.init.normal_(model.head.weight)
    tokens, labels = torch.randint(24, (4, 9)), torch.tensor([0, 1, 2, 3])
    logits = model.logits(tokens[:, :-1], labels)
    expected = [-F.log_softmax(logits, -1)[b, t, tokens[b, t]] for b in range(4) for t in range(9)]
    torch.testing.assert_close(next_token_loss(logits, tokens), sum(expected) / 36)


def test_weight_decay_is_that_of_the_official_code(kind, tmp_path, monkeypatch):
    """1d-tokenizer decays no embedding, SEED-Voken all of its transformer."""
    spared = []
    monkeypatch.setattr(
        "titok_fast.training.run.fit", lambda *_, undecayed, **__: spared.extend(undecayed)
    )
    model = generator(kind)
    run(GeneratorTask(model, token_file()), Optimization(2, 1e-3), Options(batch_size=4), tmp_path)
    names = {name for name, p in model.named_parameters() if any(p is each for each in spared)}
    assert ("embeddings.weight" in names or "model.embeddings.word_embeddings.weight" in names) == (
        kind is MaskGIT
    )
    assert not any("mlp" in name and "weight" in name for name in names)
    assert bool(names) == (kind is MaskGIT)


def test_images_without_a_class_have_none(kind):
    file = token_file(labels=np.array([-1, 2] * 20))
    task, seen = GeneratorTask(generator(kind), file, Losses(label_dropout=0.0)), []

    def network(ids, labels):
        seen.append(labels)
        return task.model(ids, labels)

    draws, rows = torch.Generator().manual_seed(0), torch.arange(4)
    task.loss(network, task.batch(rows, draws), draws)
    assert seen[0].tolist() == [3, 2, 3, 2]
    task = GeneratorTask(generator(kind), token_file(labels=None, class_names=None))
    task.loss(network, task.batch(rows, draws), draws)
    assert seen[1].tolist() == [3, 3, 3, 3]


def test_images_without_any_class_are_of_one(kind):
    file = token_file(labels=None, class_names=None)
    name = "ibq-ar-b" if kind is ARTransformer else "maskgit-vit-l-32"
    config = generator_config(name, file)
    changes = {key: AR[key] for key in ("n_layer", "n_head", "n_embd")}
    if kind is ARTransformer:
        config |= changes | {"cond_dim": 32}
    else:
        config["model"]["generator"] |= {
            key: value for key, value in NETWORK.items() if key != "condition_num_classes"
        }
    task = GeneratorTask(kind.from_config(config), file)
    assert task.batch(torch.arange(3), torch.Generator())[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": 25}, "tokens: got 25 codes, allowed is 24"),
        ({"length": 8}, "tokens: got 8 tokens of an image, allowed is 9"),
        ({"classes": 4}, "tokens: got 4 classes, allowed is 3"),
        ({"count": 0}, "tokens: got no image"),
        (
            {"codebook_size": None, "tokens": np.zeros((40, 2, 3), np.float32)},
            "tokens: got latents",
        ),
    ],
)
def test_tokens_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GeneratorTask(generator(MaskGIT), token_file(**changes))


@pytest.mark.parametrize("name", ["maskgit-vit-l-32", "maskgit-uvit-s-128", "ibq-ar-b"])
def test_a_network_for_the_tokens(name):
    kind = ARTransformer if name in ARTransformer.releases else MaskGIT
    released = kind.releases[name].config
    before = copy.deepcopy(released)
    bare = token_file(labels=None, class_names=None)
    with torch.device("meta"):
        model = kind.from_config(generator_config(name, token_file()))
        none = kind.from_config(generator_config(name, bare))
    assert (model.codebook_size, model.num_tokens, model.num_classes) == (24, 9, 3)
    assert none.num_classes == 1
    assert released == before and kind in RECIPES


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optimization(0, 1.0), "steps: got 0, allowed is a positive int"),
        (lambda: Optimization(1, 1.0, betas=(0.9, 1.0)), "betas: got"),
        (lambda: Options(10, micro_batch_size=3).part_size(1), "micro_batch_size: got 3"),
        (lambda: Options(0), "batch_size: got 0"),
        (lambda: Options(1, average_decay=1.0), "average_decay: got 1.0, allowed is a number from"),
        (lambda: Options(1, dtype=torch.float16), "dtype: got torch.float16"),
        (lambda: Losses(label_dropout=2.0), "label_dropout: got 2.0"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


STAGE1 = {
    "model": {
        "vq_model": {
            "codebook_size": 32, "token_size": 8, "use_l2_norm": True, "commitment_cost": 0.25,
            "vit_enc_model_size": {"width": 32, "num_layers": 2, "num_heads": 2},
            "vit_dec_model_size": {"width": 32, "num_layers": 2, "num_heads": 2},
            "vit_enc_patch_size": 4, "vit_dec_patch_size": 4, "num_latent_tokens": 8,
            "finetune_decoder": False, "is_legacy": True,
        }
    },
    "dataset": {"preprocessing": {"crop_size": 16}},
}  # fmt: skip
PROXY = {
    "channel_mult": [1, 1, 2], "hidden_channels": 32, "num_channels": 3, "num_res_blocks": 1,
    "z_channels": 8,
}  # fmt: skip


def titok(**changes):
    torch.manual_seed(0)
    config = copy.deepcopy(STAGE1)
    config["model"]["vq_model"] |= changes
    return TiTok.from_config(config)


@pytest.fixture(scope="module")
def vqgan():
    torch.manual_seed(0)
    model = MaskGITVQGAN.from_config(PROXY).eval()
    nn.init.normal_(model.quantize.embedding.weight)
    return model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight pictures of 24 x 20 pixels, and a broken one."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(8):
        coarse = generator.integers(256, size=(3, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((24, 20)).save(folder / f"{i}.png")
    (folder / "8.png").write_bytes(b"broken")
    return sorted(map(str, folder.iterdir()))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_crop_lies_where_it_is_said(pictures, interpolation):
    for size in (16, 20, 30):
        wide = round(24 * size / 20)
        ends = [
            read_pixels(pictures[0], size, interpolation=interpolation, crop=(at, 0.5))
            for at in (0.0, 1 - 1e-9)
        ]
        overlap = 2 * size - wide
        assert ends[0].shape == (3, size, size)
        assert torch.equal(ends[0][:, :, size - overlap :], ends[1][:, :, :overlap])
        left = round((wide - size) / 2) if interpolation == "bicubic" else (wide - size) // 2
        centre = read_pixels(pictures[0], size, interpolation=interpolation)
        assert torch.equal(centre[:, :, : size - left], ends[0][:, :, left:])


def test_the_first_stage_learns_proxy_codes(vqgan, pictures):
    """From the pixels that it is given, by the cross-entropy of the codes of the same pixels."""
    task = TokenizerTask(titok(), pictures[:8], vqgan)
    draws = torch.Generator().manual_seed(0)
    pixels = task.batch(torch.arange(8), draws)
    assert pixels.shape == (8, 3, 16, 16) and pixels.dtype == torch.uint8
    images = pixels.float() / 255
    (logits, result), codes = task.model(images), vqgan.encode(images)
    expected = F.cross_entropy(logits.permute(0, 2, 3, 1).reshape(-1, 1024), codes.flatten())
    loss = task.loss(task.model, pixels, draws)
    torch.testing.assert_close(loss, expected + result["quantizer_loss"])
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.model.parameters())
    assert all(p.grad is None for p in vqgan.parameters())

    lines = []
    options = Options(8, average_decay=0.0, log_every=40, dtype=torch.bfloat16)
    run(task, Optimization(80, 3e-3), options, log=lines.append)
    losses = [float(line.split()[3]) for line in lines]
    print(f"\nfirst stage: loss {losses}")
    assert losses[1] < losses[0] < math.log(1024)


def test_models_of_pixels(pictures):
    task = TokenizerTask(titok(is_legacy=False), pictures[:8])
    draws = torch.Generator()
    pixels = task.batch(torch.arange(4), draws.manual_seed(0))
    images = pixels.float() / 255
    output, result = task.model(images)
    expected = F.mse_loss(output, images) + result["quantizer_loss"]
    torch.testing.assert_close(task.loss(task.model, pixels, draws), expected)
    task = TokenizerTask(
        task.model, pictures[:8], perceptual=lambda made, given: (made - given).abs().mean()
    )
    seen = task.loss(task.model, pixels, draws) - expected
    torch.testing.assert_close(seen, (output - images).abs().mean())

    vae = titok(is_legacy=False, quantize_mode="vae")
    losses = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        task = TokenizerTask(vae, pictures[:8], losses=TokenizerLosses(kl_weight=weight))
        losses.append(task.loss(vae, pixels, draws))
    posterior = DiagonalGaussian(vae.latents(images))
    torch.testing.assert_close(losses[1] - losses[0], posterior.kl().sum() / 4)


def test_crops_and_mirrors_are_random(pictures):
    task = TokenizerTask(titok(is_legacy=False), pictures[:1])
    rows = torch.zeros(200, dtype=torch.int64)
    views = {view.numpy().tobytes() for view in task.batch(rows, torch.Generator().manual_seed(0))}
    assert len(views) == 2 * 4  # the shorter edge is 16 of 19 x 16: four places, both ways
    task = TokenizerTask(IBQTokenizer.from_config(IBQ), pictures[:1])
    views = {view.numpy().tobytes() for view in task.batch(rows, torch.Generator().manual_seed(0))}
    assert len(views) == 4  # as officially, in one way


def test_a_broken_picture_is_named_once_and_replaced(pictures):
    lines = []
    task = TokenizerTask(titok(is_legacy=False), pictures[7:], log=lines.append)
    views = task.batch(torch.tensor([1, 1, 0]), torch.Generator().manual_seed(0))
    assert views.shape == (3, 3, 16, 16)
    assert len(lines) == 1 and "8.png: not a readable image" in lines[0]
    task = TokenizerTask(titok(is_legacy=False), pictures[8:], log=quiet)
    with pytest.raises(OSError, match=r"no image could be read in 100 attempts, .*8\.png first"):
        task.batch(torch.tensor([0]), torch.Generator())


def test_broken_pictures_are_not_all_replaced_by_their_neighbour(pictures, monkeypatch):
    files = [*["missing.png"] * 50, *pictures[:8]]
    task = TokenizerTask(titok(is_legacy=False), files, log=quiet)
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 0.5))  # one crop
    views = task.batch(torch.arange(50), torch.Generator())
    assert len({view.numpy().tobytes() for view in views}) == 8
    assert torch.equal(views, task.batch(torch.arange(50), torch.Generator()))


def test_an_error_of_the_system_replaces_no_picture(pictures, monkeypatch):
    task = TokenizerTask(titok(is_legacy=False), pictures[:8], log=quiet)
    for error, message in (
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (MemoryError(), "MemoryError"),
    ):
        monkeypatch.setattr(Image, "open", MagicMock(side_effect=error))
        with pytest.raises(OSError, match=rf"0\.png: not a readable image .*{message}"):
            task.batch(torch.tensor([0]), torch.Generator())


@pytest.mark.parametrize("stage", ["proxies", "pixels", "vae"])
def test_what_is_measured_of_held_out_images(stage, vqgan, pictures):
    """Of centre crops, some more at a time than others."""
    proxy = vqgan if stage == "proxies" else None
    model = titok(is_legacy=proxy is not None, quantize_mode="vae" if stage == "vae" else "vq")
    with torch.no_grad():
        model.decoder.ffn[-1 if proxy else 0].weight.mul_(30)  # not all proxies alike
    task = TokenizerTask(model, pictures[:8], proxy, augment=False)
    lines = []
    for size in (3, 8):
        Evaluator(task, Options(8, size), 1, None, 2, lines.append)(model, 1)
    values = [dict(part.split() for part in line.split(": ")[1].split(", ")) for line in lines]
    images = torch.stack([read_image(path, 16) for path in pictures[:8]])
    model.eval()
    with torch.no_grad():
        torch.manual_seed(key("held out", "dropout", 0))
        output, result = model(images)
        expected = {}
        if proxy is not None:
            codes = vqgan.encode(images)
            expected["loss"] = F.cross_entropy(output.flatten(2), codes) + result["quantizer_loss"]
            expected["accuracy"] = (output.argmax(1).flatten(1) == codes).double().mean()
        else:
            expected["loss"] = F.mse_loss(output, images)
            expected["loss"] += (
                1e-6 * result["posterior"].kl().sum(1).mean()
                if stage == "vae"
                else result["quantizer_loss"]
            )
            expected["psnr"] = psnr(output.clamp(0, 1), images).mean()
        if stage != "vae":
            expected["usage"] = codebook_usage(model.encode(images), 32)
    assert values[1].keys() == expected.keys()
    for name, value in expected.items():
        assert float(values[1][name]) == pytest.approx(float(value), rel=1e-4), name
        if stage != "vae":  # whose draws are those of a batch
            assert float(values[0][name]) == pytest.approx(float(value), rel=1e-4), name


def sheet(folder, steps):
    """The images of a sheet, rows of [3, 16, 16] uint8."""
    picture = np.asarray(Image.open(folder / SAMPLES_FOLDER / f"step-{steps:08d}.png"))
    assert picture.shape[2] == 3 and {edge % 18 for edge in picture.shape[:2]} == {16}
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)
    columns = range(0, pixels.shape[2], 18)
    rows = [pixels[:, y : y + 16] for y in range(0, pixels.shape[1], 18)]
    return [torch.stack([row[:, :, x : x + 16] for x in columns]) for row in rows]


@pytest.mark.parametrize("stage", ["proxies", "pixels", "vae", "ibq"])
def test_reconstructions_are_shown(stage, vqgan, pictures, tmp_path):
    """Eight of the images above what the average of the weights makes of their tokens."""
    torch.manual_seed(0)
    if stage == "ibq":
        model = IBQTokenizer.from_config(IBQ)
    else:
        mode = "vae" if stage == "vae" else "vq"
        model = titok(is_legacy=stage == "proxies", quantize_mode=mode)
    proxy = vqgan if stage == "proxies" else None
    files = [path for path in pictures[:8] for _ in range(2)]
    task = TokenizerTask(model, pictures[:8], proxy)
    average = run(
        *(task, Optimization(2, 1e-3), Options(4), tmp_path),
        held_out=TokenizerTask(model, files, proxy, augment=False),
        log=quiet,
    )
    images = torch.stack(
        [read_image(path, 16, interpolation=model.interpolation) for path in pictures[:8]]
    )
    tokens = average.encode(images)
    if proxy is None:
        expected = average.decode(tokens)
    else:
        expected = vqgan.decode(average.proxy_logits(tokens).argmax(1).flatten(1))
    above, below = sheet(tmp_path, 2)
    assert torch.equal(above, to_uint8(images))
    assert (below.int() - to_uint8(expected).int()).abs().max() <= 1
    assert below.float().std() > 0 and not torch.equal(above, below)


def test_what_a_generator_makes_is_shown(kind, tmp_path):
    """Sixteen images of classes in turn, decoded; tokens of another tokenizer are refused."""
    torch.manual_seed(0)
    ibq = kind is ARTransformer  # whose tokens are the rows of a square
    if ibq:
        tokenizer = IBQTokenizer.from_config(IBQ | {"n_embed": 24})
        network = ARTransformer.from_config(AR | {"block_size": 16})
    else:
        tokenizer, config = titok(is_legacy=False, codebook_size=24), copy.deepcopy(MASKGIT)
        config["model"]["generator"]["image_seq_len"] = 8
        network = MaskGIT.from_config(config)
    file = token_file(length=network.num_tokens)
    held_out = GeneratorTask(network, file, tokenizer=tokenizer.eval())
    task, options = GeneratorTask(network, file), Options(8, evaluate_every=1)
    average = run(task, Optimization(2, 1e-3), options, tmp_path, held_out=held_out, log=quiet)
    tokens = average.generate(torch.arange(16) % 3, seed=0)
    images = tokenizer.decode(tokens.view(16, 4, 4) if ibq else tokens)
    shown = torch.cat(sheet(tmp_path, 2))
    assert (shown.int() - to_uint8(images).int()).abs().max() <= 1
    assert (tmp_path / SAMPLES_FOLDER / "step-00000001.png").exists()
    with pytest.raises(ValueError, match="generator: got one of 9 tokens of 24 codes, allowed is"):
        GeneratorTask(generator(kind), token_file(), tokenizer=titok(is_legacy=False))


def test_a_blank_image_leaves_the_mean_finite(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    model = titok(is_legacy=False)
    nn.init.zeros_(model.decoder.conv_out.weight)
    nn.init.constant_(model.decoder.conv_out.bias, -1.0)
    task = TokenizerTask(model, [str(tmp_path / "black.png")], augment=False)
    images = task.batch(torch.tensor([0]), torch.Generator())
    assert task.evaluate(model.eval(), images, torch.Generator())["psnr"] == 100


def test_workers_change_nothing(vqgan, pictures):
    weights = [
        run(
            TokenizerTask(titok(), pictures, vqgan, log=quiet),
            Optimization(4, 1e-2),
            Options(4, micro_batch_size=2),
            workers=workers,
            log=quiet,
        ).state_dict()
        for workers in (0, 3)
    ]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_what_a_tokenizer_is_trained_on_must_fit(vqgan, pictures):
    for model, proxy, files, message in (
        (titok(), None, pictures, "vqgan: got None"),
        (titok(is_legacy=False), vqgan, pictures, "vqgan: allowed with a first-stage model"),
        (titok(), vqgan, [], "paths: got no file"),
        (titok(quantize_mode="vae"), vqgan, pictures, "model: got a legacy one with continuous"),
        (
            titok(vit_dec_patch_size=8, vit_enc_patch_size=8),
            vqgan,
            pictures,
            "vqgan: got a code for 4 x 4 pixels, allowed is 8 x 8",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            TokenizerTask(model, files, proxy)


def test_the_first_stage_of_a_release():
    with torch.device("meta"):
        model = TiTok.from_config(tokenizer_config("titok-l-32"))
    assert not hasattr(model, "pixel_decoder")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer_config("titok-digits") == TiTok.releases["titok-digits"].config
    assert TiTok.releases["titok-l-32"].config["model"]["vq_model"]["finetune_decoder"]
    assert tokenizer_config("ibq-262144")["use_entropy_loss"]
    assert "use_entropy_loss" not in IBQTokenizer.releases["ibq-262144"].config


def adversary(**options):
    torch.manual_seed(0)
    options = {"adversarial_start": 0, "adversarial_weight": 0.5} | options
    return Adversary(AdversaryOptions(**options), PatchDiscriminator(width=32, stages=1))


def test_a_discriminator_is_that_of_the_second_stage():
    """By its shapes, and a blur that keeps a constant."""
    with torch.device("meta"):
        model = PatchDiscriminator()
        assert model(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 16, 16)
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if p.ndim == 4]
    widths = [(128, 3, 5, 5), (128, 128, 3, 3), (256, 128, 3, 3), (512, 256, 3, 3)]
    assert shapes == [*widths, (512, 512, 1, 1), (1, 512, 5, 5)]
    halved = PatchDiscriminator(width=32, stages=1).layers[3](torch.ones(1, 32, 8, 6))
    assert halved.shape == (1, 32, 4, 3)
    torch.testing.assert_close(halved[:, :, 1:-1, 1:-1], torch.ones(1, 32, 2, 1))


def test_what_an_adversary_adds():
    real, fake = torch.rand(2, 2, 3, 16, 16)
    fake.requires_grad_()
    judge = adversary(lecam_weight=0.25)
    judge.means.copy_(torch.tensor([0.3, -0.2]))
    logits = [judge.discriminator(images) for images in (real, fake.detach())]
    hinge = (F.relu(1 - logits[0]).mean() + F.relu(1 + logits[1]).mean()) / 2
    apart = F.relu(logits[0].mean() + 0.2) ** 2 + F.relu(0.3 - logits[1].mean()) ** 2
    weights = list(judge.discriminator.parameters())
    expected = torch.autograd.grad(hinge + 0.25 * apart, weights)
    loss = judge.loss(fake, real)
    torch.testing.assert_close(loss, -0.5 * logits[1].mean())
    loss.backward()
    assert fake.grad.abs().sum() > 0
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    before, old = judge.means.clone(), weights[0].detach().clone()
    judge.step()
    assert not torch.equal(weights[0], old) and weights[0].grad is None
    means = torch.stack([logits[0].mean(), logits[1].mean()])
    torch.testing.assert_close(judge.means, 0.999 * before + 0.001 * means)
    late = adversary(adversarial_start=1)
    assert late.loss(fake, real).item() == 0
    late.step()
    assert late.loss(fake, real).item() != 0


@pytest.mark.parametrize("mode", ["eager", "compiled", "checkpoint", "reentrant checkpoint"])
def test_an_adaptive_weight_is_a_quotient_of_gradients(mode, pictures):
    """Of the weight of the last convolution, from its input and the gradients of its output."""
    model, judge = titok(is_legacy=False), adversary(adversarial_adaptive=True)
    for block in model.decoder.transformer:
        if mode == "compiled":
            block.compile(backend="aot_eager")
        elif mode != "eager":
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=mode == "reentrant checkpoint"
            )
    task = TokenizerTask(
        model,
        pictures[:8],
        adversary=judge,
        perceptual=lambda made, given: (made - given).abs().mean(),
    )
    draws, inputs = torch.Generator().manual_seed(0), []
    pixels = task.batch(torch.arange(4), draws)
    images = pixels.float() / 255
    hook = model.decoder.conv_out.register_forward_hook(lambda _, args, out: inputs.append(args[0]))
    made, result = model(images)
    hook.remove()
    leaf, weight = made.detach().requires_grad_(), model.decoder.conv_out.weight
    verdict = judge.discriminator(leaf).mean()
    (of_verdict,) = torch.autograd.grad(verdict, leaf)
    of_pixels = (2 * (leaf - images) + (leaf - images).sign()) / images.numel()
    norms = [
        nn.grad.conv2d_weight(inputs[0], weight.shape, gradient.detach(), padding=1).norm()
        for gradient in (of_pixels, of_verdict)
    ]
    factor = norms[0] / (norms[1] + 1e-4)
    plain = F.mse_loss(made, images) + (made - images).abs().mean() + result["quantizer_loss"]
    loss = task.loss(model, pixels, draws)
    torch.testing.assert_close(loss, plain - 0.5 * factor * verdict)
    loss.backward()
    direct = torch.autograd.grad(
        plain - 0.5 * factor.item() * judge.discriminator(made).mean(), weight
    )
    torch.testing.assert_close(weight.grad, direct[0])
    assert all(p.grad is not None for p in model.parameters())


def test_an_adaptive_weight_is_limited():
    weight = torch.ones(3, requires_grad=True)
    made = weight * torch.tensor([1.0, 2.0, 2.0])
    assert adaptive_weight(made.sum(), -2 * made.sum(), weight).item() == pytest.approx(
        3 / (6 + 1e-4), rel=1e-6
    )
    assert adaptive_weight(made.sum(), 0 * made.sum(), weight).item() == 1e4
    assert adaptive_weight(0 * made.sum(), made.sum(), weight).item() == 0
    with pytest.raises(ValueError, match="other, last_layer: got None"):
        adversary(adversarial_adaptive=True).loss(*torch.rand(2, 2, 3, 16, 16))


def test_the_last_layer_of_each_kind(vqgan):
    torch.manual_seed(0)
    first = titok(vit_dec_patch_size=16, vit_enc_patch_size=16, num_latent_tokens=4)
    proxy = MaskGITVQGAN.from_config("maskgit-vqgan-imagenet-f16-256")
    for model in (
        titok(is_legacy=False),
        second_stage(first, proxy),
        IBQTokenizer.from_config(IBQ),
    ):
        images = torch.rand(1, 3, 16, 16)
        before, _ = model(images)
        with torch.no_grad():
            last_layer(model).mul_(0)
        after, _ = model(images)
        assert before.std() > 0 and torch.allclose(after.std((2, 3)), torch.zeros(1, 3), atol=1e-5)


def test_an_adaptive_weight_needs_a_last_layer_that_moves(pictures):
    model = titok(is_legacy=False)
    model.decoder.conv_out.requires_grad_(False)
    with pytest.raises(ValueError, match="adversary: got an adaptive weight"):
        TokenizerTask(model, pictures, adversary=adversary(adversarial_adaptive=True))


def _adaptive(rank, folder, files):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.save(_adapted(files).state_dict(), folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def adaptive_task(files):
    judge = adversary(adversarial_adaptive=True, lecam_weight=0.0)
    return TokenizerTask(titok(is_legacy=False), files, adversary=judge, augment=False, log=quiet)


def _adapted(files):
    optimization = Optimization(3, 1e-3, warmup_steps=0)
    return run(adaptive_task(files), optimization, Options(4, average_decay=0.0), log=quiet)


def test_an_adaptive_weight_of_two_processes_is_that_of_one(pictures, tmp_path):
    torch.multiprocessing.spawn(_adaptive, args=(tmp_path, pictures[:8]), nprocs=2)
    alone = _adapted(pictures[:8]).state_dict()
    torch.manual_seed(0)
    start = titok(is_legacy=False).state_dict()
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    moved = max((alone[name] - start[name]).abs().max() for name in alone)
    for name, tensor in alone.items():
        assert torch.equal(states[0][name], states[1][name]), name
        assert (states[0][name] - tensor).abs().max() < 0.02 * moved, name


def test_each_part_of_a_step_has_its_adaptive_weight(pictures):
    lines, draws = [], torch.Generator()
    options = Options(4, micro_batch_size=2, average_decay=0.0, log_every=1)
    run(adaptive_task(pictures[:8]), Optimization(1, 1e-3), options, log=lines.append)
    task, losses = adaptive_task(pictures[:8]), []
    for rows in (*rows_of_step(8, 4, 0, 0).split(2), rows_of_step(8, 4, 0, 0)):
        losses.append(task.loss(task.model, task.batch(rows, draws), draws).item())
    assert float(lines[0].split()[3]) == pytest.approx(sum(losses[:2]) / 2, abs=1e-5)
    assert abs(losses[2] - sum(losses[:2]) / 2) > 1e-4  # of the whole it is another


def test_parts_of_a_step_teach_a_discriminator_as_the_whole():
    torch.manual_seed(0)
    real, fake = torch.rand(2, 4, 3, 16, 16)
    judges = [adversary(lecam_weight=0.0) for _ in range(2)]
    judges[0].loss(fake, real)
    for part in (slice(0, 2), slice(2, 4)):
        judges[1].loss(fake[part], real[part])
    for judge in judges:
        judge.step()
    torch.testing.assert_close(judges[1].means, judges[0].means)
    moments = [judge.state_dict()["_extra_state"]["optimizer"]["state"] for judge in judges]
    for i, moment in moments[0].items():
        torch.testing.assert_close(moments[1][i]["exp_avg"], moment["exp_avg"])


def test_what_a_discriminator_keeps_fixed_stays():
    fixed = PatchDiscriminator(width=32, stages=1)
    fixed.layers[0].requires_grad_(False)
    before = [parameter.clone() for parameter in fixed.parameters()]
    judge = Adversary(AdversaryOptions(adversarial_start=0), fixed)
    for _ in range(2):
        judge.loss(*torch.rand(2, 2, 3, 16, 16))
        judge.step()
    same = [torch.equal(*pair) for pair in zip(before, fixed.parameters(), strict=True)]
    assert same == [True, True] + [False] * (len(same) - 2)


def test_a_discriminator_learns_to_tell():
    judge, generator = adversary(discriminator_learning_rate=1e-3), torch.Generator().manual_seed(0)
    for _ in range(30):
        real = torch.rand(8, 3, 16, 16, generator=generator)
        judge.loss(real.mean((2, 3), keepdim=True).expand_as(real), real)
        judge.step()
    real = torch.rand(8, 3, 16, 16, generator=generator)
    flat = real.mean((2, 3), keepdim=True).expand_as(real)
    assert judge.discriminator(real).mean() > judge.discriminator(flat).mean() + 0.5


def test_a_run_with_an_adversary_is_taken_up_with_the_same_bits(pictures, tmp_path):
    def task(kind=TokenizerTask):
        judge = adversary(adversarial_start=1)
        return kind(titok(is_legacy=False), pictures[:8], adversary=judge, log=quiet)

    optimization, options = Optimization(5, 1e-3), Options(4, save_every=2)
    whole = task()
    expected = run(whole, optimization, options, log=quiet).state_dict()
    with pytest.raises(Stopped):
        run(task(StopsInItsFourth), optimization, options, tmp_path, log=quiet)
    again = task()
    model = run(again, optimization, options, tmp_path, log=quiet).state_dict()
    assert all(torch.equal(model[name], tensor) for name, tensor in expected.items())
    for mine, other in zip(again.helper.parameters(), whole.helper.parameters(), strict=True):
        assert torch.equal(mine, other)
    plain = TokenizerTask(titok(is_legacy=False), pictures[:8], log=quiet)
    with pytest.raises(ValueError, match=r"state\.pt: not the state of a run like this"):
        run(plain, optimization, options, tmp_path, log=quiet)
    plain = TokenizerTask(titok(is_legacy=False), pictures[:8], log=quiet)
    without = run(plain, optimization, options, log=quiet).state_dict()
    assert not all(torch.equal(without[name], tensor) for name, tensor in expected.items())


def _judge(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    task, groups = TokenizerTask(IBQTokenizer.from_config(IBQ), ["a.png"]), []
    quantize = task.model.quantize
    quantize.register_forward_pre_hook(lambda layer, _: groups.append(layer.process_group))
    task.loss(task.model, torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.Generator())
    assert groups == [torch.distributed.group.WORLD] and quantize.process_group is None
    judge, images = adversary(lecam_weight=0.0), torch.load(folder / "images.pt")
    judge.loss(*images[:, rank::2])
    judge.step()
    torch.save(judge.state_dict(), folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_an_adversary_of_two_processes_is_one(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(2, 4, 3, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    torch.multiprocessing.spawn(_judge, args=(tmp_path,), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    judge = adversary(lecam_weight=0.0)
    judge.loss(*images)
    judge.step()
    for name, _ in judge.named_parameters():
        assert torch.equal(states[0][name], states[1][name]), name
    torch.testing.assert_close(states[0]["means"], judge.means)
    both = (states[0], judge.state_dict())
    moments = [state["_extra_state"]["optimizer"]["state"] for state in both]
    for i, moment in moments[1].items():
        torch.testing.assert_close(moments[0][i]["exp_avg"], moment["exp_avg"])


def _evaluate(rank, folder, files):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    task = TokenizerTask(IBQTokenizer.from_config(IBQ), files, augment=False)
    task.model.quantize.process_group = torch.distributed.group.WORLD
    Evaluator(task, Options(8, 2), 1, folder, 0, quiet)(task.model, 1)
    assert task.model.quantize.process_group is torch.distributed.group.WORLD
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_an_evaluation_of_two_processes_is_that_of_one(pictures, tmp_path):
    """Of three batches, with an entropy that no other process waits for."""
    torch.multiprocessing.spawn(_evaluate, args=(tmp_path, pictures[:5]), nprocs=2)
    torch.manual_seed(0)
    task = TokenizerTask(IBQTokenizer.from_config(IBQ), pictures[:5], augment=False)
    Evaluator(task, Options(8, 2), 1, tmp_path, 0, quiet)(task.model, 1)
    shared, alone = evaluations(tmp_path)
    assert shared == pytest.approx(alone, rel=1e-5) and shared.keys() >= {"loss", "psnr", "usage"}
    assert shared["usage"] == alone["usage"]


def test_the_second_stage_begins_where_the_first_ended(vqgan, pictures):
    """Its pixels are the VQGAN's of the likeliest proxies where one is all but sure."""
    torch.manual_seed(0)
    first = titok(vit_dec_patch_size=16, vit_enc_patch_size=16, num_latent_tokens=4)
    proxy = MaskGITVQGAN.from_config("maskgit-vqgan-imagenet-f16-256").eval()
    nn.init.normal_(proxy.quantize.embedding.weight)
    second = second_stage(first, proxy)
    assert second.finetune_decoder
    moved = {name.split(".")[0] for name, p in second.named_parameters() if p.requires_grad}
    assert moved == {"decoder", "pixel_quantize", "pixel_decoder"}
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        tokens = first.encode(images)
        assert torch.equal(second.encode(images), tokens)
        for parameter in second.decoder.ffn[2].parameters():
            parameter.mul_(1e5)
    codes = first.proxy_logits(tokens).argmax(1).flatten(1)
    torch.testing.assert_close(second.decode(tokens), proxy.decode(codes), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="model: got one that predicts pixels"):
        second_stage(second, proxy)
    with pytest.raises(ValueError, match="vqgan: got a code for 4 x 4 pixels, allowed is 16 x 16"):
        second_stage(first, vqgan)
    with pytest.raises(ValueError, match="vqgan: its decoder has other shapes"):
        second_stage(first, MaskGITVQGAN.from_config({**VQGAN_CONFIG, "hidden_channels": 32}))


IBQ = {
    "n_embed": 64, "embed_dim": 16, "use_entropy_loss": True,
    "ddconfig": {
        "double_z": False, "z_channels": 16, "resolution": 16, "in_channels": 3, "out_ch": 3,
        "ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [4],
        "dropout": 0.0,
    },
}  # fmt: skip


def test_ibq_learns_pixels(pictures):
    """Its loss is half the official one, of pixels in [-1, 1] and with 0.05 of the entropies."""
    torch.manual_seed(0)
    model = IBQTokenizer.from_config(IBQ)
    task = TokenizerTask(model, pictures[:8])
    draws = torch.Generator().manual_seed(0)
    pixels = task.batch(torch.arange(8), draws)
    images = pixels.float() / 255
    made, result = model(images)
    _, (quant_loss, _, _, entropy_loss), _ = model.quantize(model.latents(images))
    torch.testing.assert_close(result["quantizer_loss"], quant_loss)
    torch.testing.assert_close(result["entropy_loss"], entropy_loss)
    expected = (2 * made - 2 * images).abs().mean() + quant_loss + 0.05 * entropy_loss
    torch.testing.assert_close(2 * task.loss(model, pixels, draws), expected)
    model.eval()
    tokens = model.encode(images)
    assert torch.equal(result["min_encoding_indices"], tokens)
    torch.testing.assert_close(model.decode(tokens, clamp=False), made.detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images)[1]["quantizer_loss"].dtype == torch.float32
    lines = []
    run(task, Optimization(60, 2e-3), Options(8, average_decay=0.0, log_every=30), log=lines.append)
    losses = [float(line.split()[3]) for line in lines]
    print(f"\nIBQ: loss {losses}")
    assert losses[1] < losses[0]
    assert all(p.grad is None for p in model.parameters())  # the run leaves none
    task.loss(model.train(), pixels, draws).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.fixture(scope="module")
def digit_tokens(tmp_path_factory):
    """Tokens of 64 digits and their labels."""
    images, labels = digits("test")
    tokenizer = TiTok.from_pretrained("titok-digits")
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    TokenFile(
        tokenizer.encode(images[:64]).numpy(),
        [f"{i}.png" for i in range(64)],
        "titok-digits",
        fingerprint(tokenizer),
        32,
        tokenizer.codebook_size,
        labels=labels[:64].numpy(),
        class_names=[str(i) for i in range(10)],
    ).save(path)
    return path


@pytest.fixture
def other_tokens(digit_tokens, tmp_path):
    """The same images in another order."""
    file, path = TokenFile.load(digit_tokens), tmp_path / "reversed.npz"
    dataclasses.replace(file, tokens=file.tokens[::-1].copy(), labels=file.labels[::-1]).save(path)
    return path


def test_the_command(titok_fast, digit_tokens, other_tokens, tmp_path):
    """A network is trained, taken up, gone on from, and generates."""
    out = tmp_path / "mine"
    train = ("train", digit_tokens, "--model", "maskgit-digits", "--batch-size", 16)
    first = titok_fast(*train, "--steps", 4, "--save-every", 2, "--log-every", 2, "-o", out)
    assert first.returncode == 0, first.err
    assert "MaskGIT, " in first.out and "64 images" in first.out and f"wrote {out}" in first.out
    assert "step     4/4  loss " in first.out
    names = ["config.json", "model.safetensors", STATE_FILE, "training.json"]
    assert sorted(p.name for p in out.iterdir()) == sorted(names)
    model = MaskGIT.from_pretrained(out)
    assert (model.num_tokens, model.num_classes) == (16, 10)

    held_out = ("--held-out", other_tokens, "--evaluate-every", 3)  # no setting of the run
    again = titok_fast(*train, "--steps", 4, *held_out, "--samples-with", "titok-digits", "-o", out)
    assert Image.open(out / "samples" / "step-00000004.png").size == (8 * 34 - 2, 2 * 34 - 2)
    assert again.returncode == 0 and "taken up after step 4 of 4" in again.out, again.err
    assert "64 images, 64 held out" in again.out
    (line,) = evaluations(out)
    assert (line["step"], line["images"]) == (
        4,
        64,
    ) and f"held out: loss {line['loss']:.5g}" in again.out
    other = titok_fast(*train, "--steps", 5, "-o", out)
    assert other.returncode == 2 and "(--steps 4 now 5)" in other.err
    assert other.err.count("\n") == 1

    more = tmp_path / "more"
    options = ("--steps", 2, "--batch-size", 8, "--dtype", "bfloat16", "--average-decay", 0)
    result = titok_fast("train", digit_tokens, "--init", out, *options, "-o", more)
    assert result.returncode == 0, result.err
    pictures = tmp_path / "pictures"
    result = titok_fast(
        "generate", "--model", "titok-digits", "--generator", more, "--count", 2, "-o", pictures
    )
    assert result.returncode == 0, result.err
    assert (pictures / "000001.png").exists()


def test_the_command_trains_tokenizers(titok_fast, vqgan, pictures, tmp_path):
    folder = str(Path(pictures[0]).parent)
    out, options = tmp_path / "pixels", ("--steps", 2, "--batch-size", 4, "--workers", 2)
    result = titok_fast("train", folder, "--model", "titok-digits", *options, "-o", out)
    assert result.returncode == 0, result.err
    assert "TiTok, " in result.out and "9 images" in result.out and "8.png: not a re" in result.out
    assert TiTok.from_pretrained(out).image_size == 32

    titok().save_pretrained(tmp_path / "init")
    vqgan.save_pretrained(tmp_path / "vqgan")
    source = ("--init", tmp_path / "init", "--proxy", tmp_path / "vqgan")
    others = tmp_path / "others"
    others.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        shutil.copy(pictures[0], others / name)
    held_out = ("--held-out", others / "a.png", "--held-out", others, "--evaluate-every", 1)
    result = titok_fast("train", folder, *source, *options, *held_out, "-o", tmp_path / "out")
    assert result.returncode == 0, result.err
    assert [line["step"] for line in evaluations(tmp_path / "out")] == [1, 2]
    assert result.out.count("held out: loss ") == 2 and ", accuracy " in result.out
    trained = TiTok.from_pretrained(tmp_path / "out")
    codes = trained.proxy_logits(trained.encode(torch.rand(1, 3, 16, 16))).argmax(1).flatten(1)
    assert vqgan.decode(codes).shape == (1, 3, 16, 16)


def test_the_command_trains_the_second_stage(titok_fast, pictures, tmp_path):
    folder, first, proxy = Path(pictures[0]).parent, tmp_path / "first", tmp_path / "proxy"
    titok(vit_dec_patch_size=16, vit_enc_patch_size=16, num_latent_tokens=4).save_pretrained(first)
    model = MaskGITVQGAN.from_config("maskgit-vqgan-imagenet-f16-256")
    model.save_pretrained(proxy)
    source = ("--init", first, "--proxy", proxy, "--second-stage", "--adversarial-weight", 0.1)
    options = ("--adversarial-start", 1, "--quantizer-weight", 0, "--batch-size", 2, "--steps", 2)
    result = titok_fast("train", folder, *source, *options, "-o", tmp_path / "second")
    assert result.returncode == 0, result.err
    trained, given = TiTok.from_pretrained(tmp_path / "second"), TiTok.from_pretrained(first)
    for name, tensor in given.state_dict().items():
        frozen = name.startswith(("encoder.", "quantize.", "latent_tokens"))
        assert torch.equal(trained.state_dict()[name], tensor) == frozen, name
    moved = trained.pixel_decoder.conv_out.weight - model.decoder.conv_out.weight
    assert moved.abs().max() > 0
    state = torch.load(tmp_path / "second" / STATE_FILE, weights_only=True)
    assert state["helper"]["_extra_state"]["optimizer"]["state"]  # the discriminator learned
    absent = (*source[:2], "--proxy", tmp_path / "absent")
    refused = titok_fast("train", folder, *absent, "-o", tmp_path / "other")
    assert refused.returncode == 2 and "error: --proxy: " in refused.err
    without = titok_fast("train", folder, *source[:-2], *options[2:], "-o", tmp_path / "second")
    assert without.returncode == 2 and "--adversarial-weight 0.1 now None" in without.err
    other = titok_fast("train", folder, *source, "--kl-weight", 3, "-o", tmp_path / "other")
    assert other.returncode == 2 and "--kl-weight: got 3.0, but this TiTok has no" in other.err


def test_the_command_takes_weights_of_ibq(titok_fast, pictures, tmp_path):
    IBQTokenizer.from_config(IBQ).save_pretrained(tmp_path / "ibq")
    options = ("--adversarial-weight", 0.1, "--adversarial-start", 0, "--steps", 1)
    weights = set()
    for given in ((), ("--adversarial-adaptive",), ("--entropy-weight", 1)):
        out = tmp_path / f"out{given}"
        source = ("--init", tmp_path / "ibq", "--batch-size", 2, *options, *given, "-o", out)
        result = titok_fast("train", pictures[0], *source)
        assert result.returncode == 0, result.err
        settings = json.loads((out / "training.json").read_text())
        assert settings["--adversarial-adaptive"] == ("--adversarial-adaptive" in given)
        assert settings["--entropy-weight"] == (1 if "--entropy-weight" in given else 0.025)
        weights.add((out / "model.safetensors").read_bytes())
    assert len(weights) == 3
    titok(is_legacy=False).save_pretrained(tmp_path / "titok")
    source = ("--init", tmp_path / "titok", "--entropy-weight", 1, "-o", tmp_path / "other")
    result = titok_fast("train", pictures[0], *source)
    assert (
        result.returncode == 2 and "--entropy-weight: got 1.0, but this TiTok has no" in result.err
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--model: allowed is either it or --init"),
        (("--model", "maskgit-digits", "--init", "x"), "--model: allowed is either it or --init"),
        (("--model", "titok-9"), "--model: 'titok-9' is not one of maskgit-vit-l-32"),
        (("--model", "maskgit-digits", "--steps", 0), "--steps: got 0, allowed is a positive int"),
        (("--model", "maskgit-digits", "--dtype", "float16"), "--dtype: 'float16' is not one of"),
        (
            ("--model", "ibq-ar-b", "--label-smoothing", 0.2),
            "--label-smoothing: got 0.2, but this ARTransformer has no use for it",
        ),
        (
            ("--model", "maskgit-digits", "--kl-weight", 0.2),
            "--kl-weight: got 0.2, but this MaskGIT has no use for it",
        ),
        (("digits.npz", "--model", "maskgit-digits"), "digits.npz: no such file"),
        (("--init", "maskgit-digits", "--batch-size", -1), "--batch-size: got -1"),
        (
            ("--init", "maskgit-digits", "--seed", 2**64),
            "--seed: got 18446744073709551616, allowed",
        ),
        (
            ("--init", "maskgit-digits", "--batch-size", 10, "--micro-batch-size", 3),
            "--micro-batch-size: got 3, allowed is a divisor of the 10 examples",
        ),
        (("--init", "maskgit-digits", "--beta2", 1.5), "--beta2: got 1.5, allowed is a number"),
        (
            ("--init", "titok-digits", "--second-stage"),
            "--second-stage: allowed with --init of a",
        ),
        (
            ("--init", "maskgit-digits", "--perceptual", "lpips"),
            "--perceptual: allowed for a tokenizer that predicts pixels",
        ),
        (
            ("--model", "titok-l-32", "--perceptual", "lpips"),
            "--perceptual: allowed for a tokenizer that predicts pixels",
        ),
        (
            ("--model", "titok-digits", "--perceptual", "vgg"),
            "--perceptual: 'vgg' is not one of lpips, convnext_s",
        ),
        (
            ("--model", "titok-digits", "--perceptual", "lpips", "--perceptual-weight", -1),
            "--perceptual-weight: got -1.0, allowed is a finite number from 0",
        ),
        (
            ("--model", "titok-digits", "--perceptual-weight", 2),
            "--perceptual-weight: got 2.0, allowed with --perceptual",
        ),
        (
            ("--init", "maskgit-digits", "--adversarial-weight", 0.1),
            "--adversarial-weight: allowed for a tokenizer that predicts pixels",
        ),
        (
            ("--model", "titok-digits", "--adversarial-adaptive"),
            "--adversarial-adaptive: got True, allowed with --adversarial-weight",
        ),
        (
            ("--model", "titok-digits", "--lecam-weight", 0.1),
            "--lecam-weight: got 0.1, allowed with --adversarial-weight",
        ),
        (
            ("--model", "titok-digits", "--steps", 9, "--adversarial-weight", 0.1),
            "--adversarial-start: got 20000, allowed is less than the 9 --steps",
        ),
        (
            ("--model", "titok-l-32", "--pixel-loss", "l1"),
            "--pixel-loss: got l1, but this TiTok has no use for it",
        ),
        (("--model", "titok-ll-32-vae", "--quantizer-weight", 2), "--quantizer-weight: got 2.0"),
        (("--model", "ibq-1024", "--kl-weight", 2), "--kl-weight: got 2.0, but this IBQTokenizer"),
        (("--init", "maskgit-digits", "--proxy", "x"), "--proxy: got 'x', which only a TiTok"),
        (
            ("--init", "maskgit-digits", "--evaluate-every", 5),
            "--evaluate-every: got 5, allowed with --held-out",
        ),
        (
            ("--init", "maskgit-digits", "--samples-with", "titok-digits"),
            "--samples-with: got titok-digits, allowed with --held-out",
        ),
        (
            ("--init", "titok-digits", "--held-out", "pyproject.toml", "--samples-with", "x"),
            "--samples-with: got 'x', allowed for a generator",
        ),
        (
            ("--init", "titok-digits", "--held-out", "nowhere"),
            "--held-out: 'nowhere' is not a file, a folder",
        ),
        (
            ("--init", "maskgit-digits", "--held-out", "a.npz", "--held-out", "b.npz"),
            "--held-out: a.npz: no such file",
        ),
    ],
)
def test_the_command_refuses(titok_fast, digit_tokens, tmp_path, options, message):
    result = titok_fast("train", digit_tokens, *options, "-o", tmp_path / "out")
    assert result.returncode == 2 and message in result.err, result.err
    assert result.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_command_after_a_run_that_never_saved(titok_fast, digit_tokens, tmp_path):
    """One line says what was not finite, and other settings are free until there is a state."""
    train = ("train", digit_tokens, "--model", "maskgit-digits", "--steps", 3, "-o", tmp_path)
    result = titok_fast(*train, "--learning-rate", 1e30, "--batch-size", 8, "--average-decay", 0)
    assert result.returncode == 2 and "loss: got nan at step" in result.err, result.err
    assert result.err.count("\n") == 1 and not (tmp_path / STATE_FILE).exists()
    (tmp_path / f".{STATE_FILE}.123.tmp").write_bytes(b"left by a killed save")
    result = titok_fast(*train, "--batch-size", 8)
    assert result.returncode == 0, result.err
    assert not list(tmp_path.glob(".*.tmp"))


def test_other_labels_are_another_run(titok_fast, digit_tokens, tmp_path):
    train = ("--model", "maskgit-digits", "--steps", 1, "--batch-size", 8, "-o", tmp_path / "out")
    assert titok_fast("train", digit_tokens, *train).returncode == 0
    file = TokenFile.load(digit_tokens)
    dataclasses.replace(file, labels=file.labels[::-1]).save(tmp_path / "other.npz")
    result = titok_fast("train", tmp_path / "other.npz", *train)
    assert result.returncode == 2 and "left by a run with other settings (data " in result.err


def test_held_out_images_are_not_those_of_the_training(titok_fast, pictures, tmp_path):
    train = ("train", *pictures[:3], "--model", "titok-digits", "-o", tmp_path / "out")
    result = titok_fast(*train, "--held-out", pictures[2], "--held-out", pictures[3])
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert "--held-out: got 1 images that are trained on, such as " in result.err
    (tmp_path / "broken.png").write_text("no image")
    result = titok_fast(*train, "--held-out", tmp_path / "broken.png")
    assert result.returncode == 2 and "broken.png" in result.err and "step" not in result.out


class Breaks(Evaluator):
    """Fails to write what it measured."""

    def __call__(self, model, steps):
        raise OSError("no space left")


def test_an_evaluation_that_fails_loses_no_step(monkeypatch, tmp_path):
    """The state is that of its step, and what takes it up measures first."""
    held_out, options = held_out_of(MaskGIT), Options(8, save_every=10, evaluate_every=2)

    def trained(folder):
        task = GeneratorTask(generator(MaskGIT), token_file())
        optimization = Optimization(3, 1e-3)
        return run(task, optimization, options, folder, held_out=held_out, log=quiet)

    with monkeypatch.context() as patched:
        patched.setattr("titok_fast.training.run.Evaluator", Breaks)
        for _ in range(2):
            with pytest.raises(OSError, match="no space left"):
                trained(tmp_path / "broken")
            state = torch.load(tmp_path / "broken" / STATE_FILE, weights_only=True)
            assert state["steps"] == 2
    again, whole = trained(tmp_path / "broken"), trained(tmp_path / "whole")
    assert evaluations(tmp_path / "broken") == evaluations(tmp_path / "whole")
    assert [line["step"] for line in evaluations(tmp_path / "whole")] == [2, 3]
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class FailsInTheSecond(GeneratorTask):
    """Cannot measure in the second process."""

    def evaluate(self, network, batch, generator):
        if torch.distributed.get_rank() == 1:
            raise OSError("1.png: not a readable image")
        return super().evaluate(network, batch, generator)


class FailsInTheFirst(GeneratorTask):
    """Cannot show anything."""

    def samples(self, network):
        raise ValueError("no samples")


def _full(*_):
    raise RuntimeError("unexpected pos 64 vs 0")


def _fails(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    options = Options(8, save_every=10, evaluate_every=2)
    for held_out, kind, message in (
        (FailsInTheSecond, OSError, "1.png: not a readable image"),
        (FailsInTheFirst, ValueError, "no samples"),
    ):
        model = generator(MaskGIT)
        task, other = GeneratorTask(model, token_file()), held_out(model, token_file())
        with pytest.raises(kind, match=message):
            run(task, Optimization(3, 1e-3), options, folder / message, held_out=other, log=quiet)
        state = torch.load(folder / message / STATE_FILE, weights_only=True)
        assert state["steps"] == 2
    with pytest.raises(ValueError, match=r"state\.pt: not the state of a run like this"):
        other = GeneratorTask(generator(ARTransformer), token_file())
        run(other, Optimization(3, 1e-3), options, folder / "no samples", log=quiet)
    task, torch.save = GeneratorTask(generator(MaskGIT), token_file()), _full
    with pytest.raises(OSError, match=r"state\.pt: not written \(unexpected pos 64"):
        run(task, Optimization(3, 1e-3), Options(8, save_every=1), folder / "full", log=quiet)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_an_evaluation_that_fails_in_one_process_ends_all(tmp_path):
    torch.multiprocessing.spawn(_fails, args=(tmp_path,), nprocs=2)


def test_a_full_disk_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "save", _full)
    with pytest.raises(OSError, match=r"state\.pt: not written \(unexpected pos 64"):
        task = GeneratorTask(generator(MaskGIT), token_file())
        run(task, Optimization(1, 0.1), Options(8), tmp_path, log=quiet)
    assert not (tmp_path / STATE_FILE).exists()


def test_spoilt_weights_are_not_kept(tmp_path):
    """Those that a step spoilt whose loss and gradient were finite."""
    task, options = GeneratorTask(generator(MaskGIT), token_file()), Options(8, save_every=1)
    optimization = Optimization(3, 1e30, warmup_steps=0)
    with pytest.raises(FloatingPointError, match="held out: got a loss of nan at step 1"):
        run(task, optimization, options, tmp_path, held_out=held_out_of(MaskGIT), log=quiet)
    assert not list(tmp_path.iterdir())


def test_held_out_tokens_of_another_kind_are_refused(
    titok_fast, digit_tokens, other_tokens, tmp_path
):
    titok(is_legacy=False).save_pretrained(tmp_path / "titok")
    train = ("train", digit_tokens, "--model", "maskgit-digits", "-o", tmp_path / "out")
    file, path = TokenFile.load(digit_tokens), tmp_path / "other.npz"
    for name, value in (
        ("fingerprint", "1" * 16),
        ("class_names", [str(i) for i in range(11)]),
        ("tokens", file.tokens[:, :4]),
    ):
        dataclasses.replace(file, **{name: value}).save(path)
        result = titok_fast(*train, "--held-out", path)
        words = "has images of [4] tokens, " if name == "tokens" else f"has another {name} than"
        assert result.returncode == 2 and f"--held-out: {path} {words}" in result.err, result.err
    for name, tokens in (("empty", file.tokens[:0]), ("same", file.tokens)):
        rows = slice(len(tokens))
        labels, image_ids = file.labels[rows], file.image_ids[rows]
        dataclasses.replace(file, tokens=tokens, labels=labels, image_ids=image_ids).save(path)
        result = titok_fast(*train, "--held-out", path)
        reason = f"{path} has no image" if name == "empty" else "got 64 images that are trained on"
        assert result.returncode == 2 and f"--held-out: {reason}" in result.err
    result = titok_fast("train", path, other_tokens, *train[2:], "--held-out", path)
    assert result.returncode == 2 and "such as '0.png'" in result.err
    result = titok_fast(*train, "--held-out", other_tokens, "--samples-with", tmp_path / "titok")
    assert result.returncode == 2 and "allowed is titok-digits (weights " in result.err
    titok().save_pretrained(tmp_path / "first")
    result = titok_fast(*train, "--held-out", other_tokens, "--samples-with", tmp_path / "first")
    assert result.returncode == 2 and "a first-stage model, which makes no pixels" in result.err
    assert not (tmp_path / "out").exists()


def test_the_command_takes_several_token_files(titok_fast, digit_tokens, tmp_path):
    file, paths = TokenFile.load(digit_tokens), [tmp_path / "a.npz", tmp_path / "b.npz"]
    for path, rows in zip(paths, (slice(40), slice(40, None)), strict=True):
        part = {name: getattr(file, name)[rows] for name in ("tokens", "labels", "image_ids")}
        dataclasses.replace(file, **part).save(path)
    options = ("--model", "maskgit-digits", "--steps", 1, "--batch-size", 8, "-o", tmp_path / "out")
    assert titok_fast("train", *paths, *options).returncode == 0
    again = titok_fast("train", digit_tokens, *options)  # the same images in the same order
    assert again.returncode == 0 and "taken up after step 1 of 1" in again.out, again.err
    for change, message in (
        ({"fingerprint": "1" * 16}, "has another fingerprint than "),
        ({"class_names": [f"class {i}" for i in range(10)]}, "has another class_names than "),
        ({"tokens": file.tokens[:, :4]}, "has images of [4] tokens, "),
    ):
        dataclasses.replace(file, **change).save(paths[1])
        result = titok_fast("train", *paths, *options)
        assert result.returncode == 2 and result.err.count("\n") == 1
        assert f"PATHS: {paths[1]} {message}{paths[0]}" in result.err


def test_a_second_run_into_a_folder_is_refused(titok_fast, digit_tokens, tmp_path):
    code = """if True:
        import sys
        from pathlib import Path
        from titok_fast.cli.runs import locked
        lock = locked(Path(sys.argv[1]))
        print("locked", flush=True)
        sys.stdin.read()"""
    command = [sys.executable, "-c", code, str(tmp_path / "out" / ".lock")]
    train = ("--model", "maskgit-digits", "--steps", 1, "--batch-size", 8, "-o", tmp_path / "out")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        result = titok_fast("train", digit_tokens, *train)
        other.stdin.close()
    assert result.returncode == 2 and "out: another run is writing to it" in result.err
    assert titok_fast("train", digit_tokens, *train).returncode == 0
    assert not (tmp_path / "out" / ".lock").exists()


def test_the_command_never_replaces_a_model(titok_fast, digit_tokens, tmp_path):
    generator(MaskGIT).save_pretrained(tmp_path)
    result = titok_fast("train", digit_tokens, "--model", "maskgit-digits", "-o", tmp_path)
    assert result.returncode == 2 and "holds a model, allowed is a folder without one" in result.err


def test_the_command_keeps_a_model_whose_state_was_deleted(titok_fast, digit_tokens, tmp_path):
    train = ("train", digit_tokens, "--model", "maskgit-digits", "--batch-size", 8, "-o", tmp_path)
    assert titok_fast(*train, "--steps", 2).returncode == 0
    (tmp_path / STATE_FILE).unlink()
    before = (tmp_path / "model.safetensors").read_bytes()
    result = titok_fast(*train, "--steps", 2, "--seed", 5)
    assert (
        result.returncode == 2 and "left by a run with other settings (--seed 0 now 5" in result.err
    )
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert titok_fast(*train, "--steps", 2).returncode == 0
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_command_under_torchrun(digit_tokens, other_tokens, tmp_path):
    """Two processes, one log, one model."""
    code = "from titok_fast.cli import main; main()"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--no-python", sys.executable, "-c", code, "train", str(digit_tokens)),
        *("--model", "maskgit-digits", "--steps", "2", "--batch-size", "8"),
        *("--held-out", str(other_tokens), "-o"),
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path.cwd()
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("wrote ") == 1 and result.stdout.count("step     2/2  loss ") == 1
    assert result.stdout.count("held out: loss ") == len(evaluations(tmp_path / "out")) == 1
    assert MaskGIT.from_pretrained(tmp_path / "out").num_tokens == 16
