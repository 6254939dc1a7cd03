"""Training runs: stopped and taken up, in parts, over processes; generators on token files."""

import copy
import dataclasses
import errno
import json
import math
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tests import training
from tests.processes import in_two_processes
from tests.training import (
    AR,
    IBQ,
    MASKGIT,
    NETWORK,
    Stopped,
    evaluations,
    generator,
    quiet,
    stopping,
    task_of,
    titok,
    token_file,
)
from titok_fast.images import read_image, read_pixels, to_uint8
from titok_fast.metrics import codebook_usage, psnr
from titok_fast.models import ARTransformer, IBQTokenizer, MaskGIT, MaskGITVQGAN, TiTok
from titok_fast.models.maskgit_vqgan import VQGAN_CONFIG
from titok_fast.models.titok import DiagonalGaussian
from titok_fast.training.data import key, mask_tokens, rows_of_step
from titok_fast.training.evaluation import EVALUATIONS_FILE, SAMPLES_FOLDER, Evaluator
from titok_fast.training.generator import (
    RECIPES,
    GeneratorTask,
    Losses,
    generator_config,
    masked_loss,
)
from titok_fast.training.loop import Optimization
from titok_fast.training.losses import masked_token_loss, next_token_loss, total
from titok_fast.training.run import LOG_FILE, MODELS_FOLDER, STATE_FILE, Options, Task, run
from titok_fast.training.tokenizer import Losses as TokenizerLosses
from titok_fast.training.tokenizer import TokenizerTask, second_stage, tokenizer_config

vqgan, pictures = training.vqgan, training.pictures


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
    task = task_of(kind, SpoiltInItsFourth)
    with pytest.raises(FloatingPointError, match="gradient: got a norm of nan at step 3"):
        run(task, optimization, options, tmp_path, log=quiet)
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    assert state["steps"] == 3 and all(t.isfinite().all() for t in state["model"].values())
    again = run(task_of(kind), optimization, options, tmp_path)
    assert all(parameter.isfinite().all() for parameter in again.parameters())


def test_a_run_that_was_stopped_gives_the_same_bits(kind, tmp_path):
    optimization, options = Optimization(6, 1e-2), Options(8, save_every=3)
    task = task_of(kind)
    whole = run(task, optimization, options, log=quiet).state_dict()
    with pytest.raises(Stopped):
        killed = task_of(kind, stopping(GeneratorTask, 5))
        run(killed, optimization, options, tmp_path, log=quiet)
    lines = []
    torch.rand(3)  # what is drawn around it does not matter
    task = task_of(kind)
    before = torch.get_rng_state()
    model = run(task, optimization, options, tmp_path, log=lines.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert lines[0] == "taken up after step 3 of 6" and not model.training
    for name, tensor in whole.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    stored = kind.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in whole.items())
    again = run(task_of(kind), optimization, options, tmp_path)
    assert torch.equal(next(again.parameters()), next(model.parameters()))


def held_out_of(kind):
    """Tokens of eleven images that `token_file` has not."""
    file = token_file(count=51)
    file = dataclasses.replace(
        file, tokens=file.tokens[40:], image_ids=file.image_ids[40:], labels=file.labels[40:]
    )
    return GeneratorTask(generator(kind), file)


def test_held_out_examples_change_no_bit(kind, tmp_path):
    """Of a run, and of one that was stopped; its evaluations are those of one that was not."""
    optimization = Optimization(6, 1e-2)
    options = Options(8, micro_batch_size=4, save_every=3, evaluate_every=2)
    plain = run(task_of(kind), optimization, options, log=quiet)
    whole, stopped, lines = tmp_path / "whole", tmp_path / "stopped", []
    held_out = held_out_of(kind)
    model = run(task_of(kind), optimization, options, whole, held_out=held_out, log=lines.append)
    with pytest.raises(Stopped):
        killed = task_of(kind, stopping(GeneratorTask, 10))
        run(killed, optimization, options, stopped, held_out=held_out_of(kind), log=quiet)
    assert [line["step"] for line in evaluations(stopped)] == [2, 4]  # of a state after 3
    with open(stopped / EVALUATIONS_FILE, "a") as file:
        file.write('{"step": 6, "lo')  # as a killed process leaves it
    held_out = held_out_of(kind)
    again = run(task_of(kind), optimization, options, stopped, held_out=held_out, log=quiet)
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
    task, options = task_of(kind), Options(8, micro_batch_size=4)
    model = run(task, Optimization(3, 1e-2), options, tmp_path, log=quiet)
    assert not (tmp_path / EVALUATIONS_FILE).exists()
    for _ in range(2):
        task = task_of(kind)
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
    run(task_of(MaskGIT), optimization, options, tmp_path)
    task = task_of(ARTransformer)
    with pytest.raises(ValueError, match=r"state\.pt: not the state of a run like this") as error:
        run(task, optimization, options, tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / STATE_FILE).write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not the state of a run like this"):
        run(task, optimization, options, tmp_path)


class Linear(nn.Linear):
    def save_pretrained(self, folder):
        folder.mkdir(parents=True, exist_ok=True)


class Line(Task):
    """Least squares of a line: a task without anything random."""

    def __init__(self, bias=True):
        torch.manual_seed(0)
        self.model, self.count = Linear(3, 1, bias=bias), 24
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


def logged(folder):
    """The lines of the file, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    return [{name: line[name] for name in line if name != "seconds"} for line in lines]


class TwoParts(Line):
    def loss(self, network, batch, generator):
        of_size = self.model.weight.abs().sum()  # by the name of the whole
        return {"line": super().loss(network, batch, generator), "loss": of_size}


def test_the_log_tells_the_parts_of_a_loss(tmp_path):
    lines, options = [], Options(8, micro_batch_size=4, log_every=2)
    run(TwoParts(), Optimization(5, 0.1), options, tmp_path, log=lines.append)
    single = Options(8, micro_batch_size=4, log_every=1)
    run(TwoParts(), Optimization(5, 0.1), single, tmp_path / "each", log=quiet)
    each = logged(tmp_path / "each")
    assert [line["step"] for line in logged(tmp_path)] == [2, 4, 5]
    for text, line, group in zip(
        lines, logged(tmp_path), (each[:2], each[2:4], each[4:]), strict=True
    ):
        assert line["loss/line"] + line["loss/loss"] == pytest.approx(line["loss"], rel=1e-6)
        for name in ("loss", "loss/line", "loss/loss"):
            mean = sum(other[name] for other in group) / len(group)
            assert line[name] == pytest.approx(mean, rel=1e-6)
            assert f"  {name.removeprefix('loss/')} {line[name]:.5f}" in text
        assert line["gradient"] == group[-1]["gradient"] and line["steps"] == 5
        assert line["learning_rate"] == Optimization(5, 0.1).rate(line["step"] - 1)


def test_a_run_that_is_taken_up_repeats_the_log(tmp_path):
    optimization, options = Optimization(6, 0.1), Options(8, save_every=3, log_every=1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(TwoParts(), optimization, options, whole, log=quiet)
    with pytest.raises(Stopped):
        run(stopping(TwoParts, 6)(), optimization, options, stopped, log=quiet)
    assert [line["step"] for line in logged(stopped)] == [1, 2, 3, 4, 5]  # of a state after 3
    run(TwoParts(), optimization, options, stopped, log=quiet)
    assert logged(stopped) == logged(whole)


def test_a_kept_model_that_was_not_written_is_made_again(tmp_path, monkeypatch):
    optimization, options = Optimization(4, 1e-2), Options(8, save_every=2, keep_every=4)
    kind = MaskGIT
    kept = tmp_path / MODELS_FOLDER / "step-00000004"
    with monkeypatch.context() as patch:
        write = kind.save_pretrained

        def killed(model, folder):
            if folder == kept:
                folder.mkdir(parents=True)
                (folder / ".model.safetensors.1-ab.tmp").touch()
                raise Stopped
            write(model, folder)

        patch.setattr(kind, "save_pretrained", killed)
        with pytest.raises(Stopped):
            run(task_of(kind), optimization, options, tmp_path, log=quiet)
    assert torch.load(tmp_path / STATE_FILE, weights_only=True)["steps"] == 2
    run(task_of(kind), optimization, options, tmp_path, log=quiet)
    assert sorted(path.name for path in kept.iterdir()) == ["config.json", "model.safetensors"]


def test_models_of_the_way_are_kept(kind, tmp_path):
    optimization = Optimization(5, 1e-2)
    last = run(task_of(kind), optimization, Options(8, keep_every=2), tmp_path, log=quiet)
    assert sorted(path.name for path in (tmp_path / MODELS_FOLDER).iterdir()) == [
        "step-00000002", "step-00000004",
    ]  # fmt: skip
    early, late = (
        kind.from_pretrained(tmp_path / MODELS_FOLDER / f"step-0000000{step}") for step in (2, 4)
    )
    with pytest.raises(Stopped):
        run(task_of(kind, stopping(GeneratorTask, 3)), optimization, Options(8, save_every=2),
            tmp_path / "two", log=quiet)  # fmt: skip
    two = kind.from_pretrained(tmp_path / "two")
    for mine, other, ends, expected in zip(
        early.parameters(), late.parameters(), last.parameters(), two.parameters(), strict=True
    ):
        assert torch.equal(mine, expected)
        assert not torch.equal(mine, other) and not torch.equal(other, ends)


def _rank(rank, folder):
    lines = []
    options = Options(8, micro_batch_size=2, save_every=2, log_every=1)
    shared = folder / "shared"
    model = run(TwoParts(), Optimization(5, 0.1), options, shared, log=lines.append)
    torch.save((model.weight, lines), folder / f"{rank}.pt")
    with pytest.raises(ValueError, match="batch_size: got 7, allowed is a multiple of 2"):
        run(Line(), Optimization(5, 0.1), Options(7))


def test_two_processes_are_one(tmp_path):
    in_two_processes(_rank, tmp_path)
    options = Options(8, log_every=1)
    alone = run(TwoParts(), Optimization(5, 0.1), options, tmp_path / "alone").weight
    for rank, count in enumerate((5, 0)):
        weight, lines = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(weight, alone)
        assert len(lines) == count
    for mine, other in zip(logged(tmp_path / "shared"), logged(tmp_path / "alone"), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)  # the means of both


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
    loss = total(task.loss(task.model, pixels, draws))
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
    torch.testing.assert_close(total(task.loss(task.model, pixels, draws)), expected)
    task = TokenizerTask(
        task.model, pictures[:8], perceptual=lambda made, given: (made - given).abs().mean()
    )
    seen = task.loss(task.model, pixels, draws)
    torch.testing.assert_close(seen["perceptual"], (output - images).abs().mean())
    torch.testing.assert_close(total(seen), expected + seen["perceptual"])

    vae = titok(is_legacy=False, quantize_mode="vae")
    losses = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        task = TokenizerTask(vae, pictures[:8], losses=TokenizerLosses(kl_weight=weight))
        losses.append(task.loss(vae, pixels, draws))
    posterior = DiagonalGaussian(vae.latents(images))
    torch.testing.assert_close(losses[1]["kl"], posterior.kl().sum() / 4)
    assert losses[0]["kl"] == 0 and losses[0]["reconstruction"] == losses[1]["reconstruction"]


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


def sheet(folder):
    """The images of a run's sheet after two steps, rows of [3, 16, 16] uint8."""
    picture = np.asarray(Image.open(folder / SAMPLES_FOLDER / "step-00000002.png"))
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
    above, below = sheet(tmp_path)
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
    shown = torch.cat(sheet(tmp_path))
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


def _evaluate(rank, folder, files):
    torch.manual_seed(0)
    task = TokenizerTask(IBQTokenizer.from_config(IBQ), files, augment=False)
    task.model.quantize.process_group = torch.distributed.group.WORLD
    Evaluator(task, Options(8, 2), 1, folder, 0, quiet)(task.model, 1)
    assert task.model.quantize.process_group is torch.distributed.group.WORLD


def test_an_evaluation_of_two_processes_is_that_of_one(pictures, tmp_path):
    """Of three batches, with an entropy that no other process waits for."""
    in_two_processes(_evaluate, tmp_path, pictures[:5])
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
    losses = task.loss(model, pixels, draws)
    assert [*losses] == ["reconstruction", "quantizer", "entropy"]
    torch.testing.assert_close(2 * total(losses), expected)
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
    total(task.loss(model.train(), pixels, draws)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Breaks(Evaluator):
    """Fails to write what it measured."""

    def __call__(self, model, steps):
        raise OSError("no space left")


def test_an_evaluation_that_fails_loses_no_step(monkeypatch, tmp_path):
    """The state is that of its step, and what takes it up measures first."""
    held_out, options = held_out_of(MaskGIT), Options(8, save_every=10, evaluate_every=2)

    def trained(folder):
        task = task_of(MaskGIT)
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
        other = task_of(ARTransformer)
        run(other, Optimization(3, 1e-3), options, folder / "no samples", log=quiet)
    task, torch.save = task_of(MaskGIT), _full
    with pytest.raises(OSError, match=r"state\.pt: not written \(unexpected pos 64"):
        run(task, Optimization(3, 1e-3), Options(8, save_every=1), folder / "full", log=quiet)


def test_an_evaluation_that_fails_in_one_process_ends_all(tmp_path):
    in_two_processes(_fails, tmp_path)


def test_a_full_disk_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "save", _full)
    with pytest.raises(OSError, match=r"state\.pt: not written \(unexpected pos 64"):
        task = task_of(MaskGIT)
        run(task, Optimization(1, 0.1), Options(8), tmp_path, log=quiet)
    assert not (tmp_path / STATE_FILE).exists()


def test_spoilt_weights_are_not_kept(tmp_path):
    """Those that a step spoilt whose loss and gradient were finite."""
    task, options = task_of(MaskGIT), Options(8, save_every=1)
    optimization = Optimization(3, 1e30, warmup_steps=0)
    with pytest.raises(FloatingPointError, match="held out: got a loss of nan at step 1"):
        run(task, optimization, options, tmp_path, held_out=held_out_of(MaskGIT), log=quiet)
    assert not list(tmp_path.iterdir())


def test_training_leaves_out_a_tenth_of_the_labels(monkeypatch):
    model, seen = generator(ARTransformer), []
    condition = model.condition
    monkeypatch.setattr(model, "condition", lambda labels: seen.append(labels) or condition(labels))
    tokens, labels = torch.zeros(2000, 0, dtype=torch.int64), torch.ones(2000, dtype=torch.int64)
    for mode in (True, False):
        model.train(mode)(tokens, labels)
    dropped, none = [(each == model.num_classes).float().mean().item() for each in seen]
    assert dropped == pytest.approx(0.1, abs=0.03) and none == 0
    assert bool((seen[0] == torch.where(seen[0] == model.num_classes, seen[0], labels)).all())


def test_a_model_is_put_into_training_mode(kind):
    task = GeneratorTask(generator(kind).eval(), token_file())
    assert all(module.training for module in task.model.modules())


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_state_runs_nothing(tmp_path):
    torch.save({"model": Touch(tmp_path / "touched")}, tmp_path / STATE_FILE)
    with pytest.raises(ValueError, match="not the state of a run like this"):
        run(Line(), Optimization(1, 1e-2), Options(8), tmp_path)
    assert not (tmp_path / "touched").exists()


def test_each_part_of_a_step_has_its_own_draws():
    seen = []

    class Seeds(Line):
        def loss(self, network, batch, generator):
            seen.extend([torch.initial_seed(), generator.initial_seed()])
            return super().loss(network, batch, generator)

    run(Seeds(), Optimization(3, 1e-2), Options(8, micro_batch_size=4), log=quiet)
    assert len(seen) == len(set(seen)) == 12


def test_each_weight_of_a_generators_loss_has_its_place():
    model, tokens = generator(MaskGIT).eval(), torch.arange(18).view(2, 9)
    labels = torch.tensor([0, 2])
    losses = Losses(label_dropout=0.0, label_smoothing=0.3, unmasked_weight=0.6)
    loss = masked_loss(model, model, tokens, labels, torch.Generator().manual_seed(1), losses)
    draws = torch.Generator().manual_seed(1)
    torch.rand(2, generator=draws)
    ids, masked = mask_tokens(tokens, model.mask_id, draws)
    expected = masked_token_loss(
        model(ids, labels), tokens, masked, label_smoothing=0.3, unmasked_weight=0.6
    )
    assert torch.equal(loss, expected)


def test_held_out_examples_that_cannot_be_read_are_told_before_a_step():
    class Broken(Line):
        def batch(self, rows, generator):
            raise OSError("broken.png")

    task = Line()
    before = copy.deepcopy(task.model.state_dict())
    with pytest.raises(OSError, match="broken"):
        run(task, Optimization(2, 1e-2), Options(8), held_out=Broken(), log=quiet)
    assert all(map(torch.equal, before.values(), task.model.state_dict().values()))
