"""Metrics, the digits data, the loop, the recipes of the digits models and their weights."""

import math
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from titok_fast.metrics import codebook_usage, perplexity, psnr
from titok_fast.models import MaskGIT, TiTok
from titok_fast.training import digits as recipe
from titok_fast.training import digits_generator as generator_recipe
from titok_fast.training.data import augment, digits, mask_tokens, shuffled
from titok_fast.training.loop import Optimization, fit
from titok_fast.training.losses import masked_token_loss, tokenizer_losses, total
from titok_fast.training.recipe import THREADS, initial_model


def quiet(line):
    pass


def test_psnr():
    a = torch.zeros(3, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.1), torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)])
    b[2, 0] = 1.0  # mean squared error 1/3
    result = psnr(a, b)
    assert result.dtype is torch.float64
    assert result[0].item() == pytest.approx(20.0, abs=1e-5)
    assert result[1].item() == math.inf
    assert result[2].item() == pytest.approx(10 * math.log10(3), abs=1e-12)
    assert torch.equal(psnr(b, a), result)
    assert psnr(a[:0], b[:0]).shape == (0,)
    assert psnr(a.half(), b.half())[2].item() == pytest.approx(10 * math.log10(3), abs=1e-12)


def test_codebook_usage_and_perplexity():
    tokens = torch.tensor([[0, 0, 3], [3, 1, 1]])
    assert codebook_usage(tokens, 4) == 0.75
    assert codebook_usage(tokens, 12) == 0.25
    assert perplexity(tokens, 4) == pytest.approx(3.0, rel=1e-12)
    assert perplexity(torch.arange(256), 256) == pytest.approx(256.0, rel=1e-12)
    assert perplexity(torch.zeros(5, dtype=torch.int32), 8) == 1.0
    assert codebook_usage(tokens.to(torch.uint16), 4) == 0.75  # as in a token file
    skewed = torch.tensor([0, 0, 0, 1])  # entropy 3/4 ln(4/3) + 1/4 ln 4
    assert perplexity(skewed, 2) == pytest.approx((4 / 3) ** 0.75 * 4**0.25, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: psnr(torch.zeros(2, 3), torch.zeros(2, 4)), ValueError, "b: got shape"),
        (lambda: psnr(torch.zeros(2), torch.zeros(2)), ValueError, "a: got shape"),
        (lambda: psnr(torch.zeros(2, 0), torch.zeros(2, 0)), ValueError, "a: got shape"),
        (lambda: psnr(torch.zeros(2, 3).byte(), torch.zeros(2, 3)), TypeError, "a: got dtype"),
        (lambda: codebook_usage(torch.tensor([4]), 4), ValueError, "tokens: got 4 to 4"),
        (lambda: perplexity(torch.tensor([-1, 2]), 4), ValueError, "tokens: got -1 to 2"),
        (lambda: perplexity(torch.tensor([]).long(), 4), ValueError, "at least one token"),
        (lambda: codebook_usage(torch.tensor([1.0]), 4), TypeError, "tokens: got dtype"),
    ],
)
def test_metrics_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_digits():
    (train, train_labels), (test, test_labels) = digits("train"), digits("test")
    assert train.shape == (1437, 3, 32, 32)
    assert test.shape == (360, 3, 32, 32)
    assert train_labels.dtype is torch.int64
    for images in (train, test):
        assert images.dtype is torch.float32
        assert (images.min(), images.max()) == (0, 1)
        assert torch.equal(images[:, :1].expand_as(images), images)
    assert torch.cat([train_labels, test_labels]).bincount().tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip
    assert torch.equal(digits("test")[0], test)
    with pytest.raises(ValueError, match="split: got 'all'"):
        digits("all")


def test_split_is_disjoint():
    """No test image is among the training images, not even as a duplicate."""
    (train, _), (test, _) = digits("train"), digits("test")
    distances = torch.cdist(test[:, 0].flatten(1).double(), train[:, 0].flatten(1).double())
    print(f"\nnearest training image of a test image: {distances.min():.3f} away")
    assert distances.min() > 0.1


def test_missing_scikit_learn():
    code = """
import sys
sys.modules["sklearn"] = sys.modules["sklearn.datasets"] = None
from titok_fast.training.digits import main
main(["-o", "nowhere"])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "error: the digits data set needs scikit-learn: pip install 'titok_fast[demo]'"
    )


def test_augment():
    images = digits("test")[0][:64]
    moved = augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert torch.equal(moved, augment(images, torch.Generator().manual_seed(0)))
    assert (moved != images).flatten(1).any(1).all()
    assert 10 < psnr(images, moved).mean() < 25  # light: closer than another digit
    assert psnr(images, images.roll(1, 0)).mean() < psnr(images, moved).mean() - 3


def test_shuffled():
    batches = shuffled(10, 3, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(batches) for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert len(epoch.unique()) == 9
    assert not torch.equal(*epochs)
    with pytest.raises(ValueError, match="count: got 2, allowed is at least batch_size 3"):
        next(shuffled(2, 3, torch.Generator()))


def test_losses():
    images = torch.rand(2, 3, 4, 4)
    reconstructions = images + 0.5
    quantizer = {"quantizer_loss": torch.tensor(2.0)}
    losses = tokenizer_losses((reconstructions, quantizer), images, quantizer_weight=0.1)
    assert {name: each.item() for name, each in losses.items()} == pytest.approx(
        {"reconstruction": 0.25, "quantizer": 0.2}
    )
    assert total(losses).item() == pytest.approx(0.45)
    losses = tokenizer_losses((reconstructions, quantizer), images, pixel_loss="l1")
    assert total(losses).item() == pytest.approx(2.5)
    quantizer["entropy_loss"] = torch.tensor(10.0)
    losses = tokenizer_losses((reconstructions, quantizer), images, entropy_weight=0.2)
    assert losses["entropy"].item() == 2 and total(losses).item() == pytest.approx(4.25)


def test_learning_rate():
    optimization = Optimization(100, 2.0, warmup_steps=10, final_fraction=0.1)
    assert optimization.rate(0) == pytest.approx(0.2)
    assert optimization.rate(50) == pytest.approx(2.0 * 0.55)
    assert optimization.rate(99) == pytest.approx(0.2, rel=0.01)
    assert Optimization(100, 2.0, warmup_steps=0).rate(0) == 2.0


def test_fit():
    target = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    weight = nn.Parameter(torch.zeros(2, 2))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    lines = []
    losses = fit(
        [weight, frozen],
        lambda step: (weight - target).square().sum() + 0 * frozen.sum(),
        Optimization(200, 0.1, weight_decay=0.0),
        log_every=150,
        log=lambda progress: lines.append(str(progress)),
    )
    assert len(losses) == 200
    assert losses[-1] < 1e-3 * losses[0]
    assert frozen.tolist() == [1, 1]
    assert [line.split()[1] for line in lines] == ["150/200", "200/200"]
    assert f"loss {sum(losses[150:]) / 50:.5f}" in lines[1]
    with pytest.raises(FloatingPointError, match="loss: got nan at step 0"):
        fit([weight], lambda step: weight.sum() * torch.nan, Optimization(3, 0.1))


def test_weight_decay_spares_vectors_and_what_is_named():
    matrix, vector, table = (nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,), (3, 2)))

    def loss_at(step):
        return 0.0 * (matrix.sum() + vector.sum() + table.sum())

    fit([matrix, vector, table], loss_at, Optimization(3, 0.1), undecayed=[table])
    assert bool((matrix < 1).all()) and bool((vector == 1).all()) and bool((table == 1).all())


@pytest.mark.parametrize("betas", [(0.9,), (), (0.9, 0.99, 0.5), 0.9, (0.9, 1.0)])
def test_betas_are_two(betas):
    with pytest.raises(ValueError, match=r"betas: got .*, allowed is two numbers from 0, below 1"):
        Optimization(3, 0.1, betas=betas)


def test_a_short_recipe_improves():
    images = digits("test")[0]
    untrained = initial_model(TiTok, recipe.NAME, 0).eval()
    before = psnr(images, untrained.decode(untrained.encode(images))).mean()
    lines = []
    model, losses = recipe.train(60, log=lines.append)
    after = psnr(images, model.decode(model.encode(images))).mean()
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    print(f"\n60 steps: loss {first:.3f} -> {last:.3f}, PSNR {before:.2f} -> {after:.2f} dB")
    assert any("codebook placed" in str(line) for line in lines)
    assert len(losses) == 60
    assert last < 0.7 * first
    assert after > before + 2
    assert not model.training


@pytest.fixture(params=[recipe, generator_recipe], ids=["tokenizer", "generator"])
def each(request, monkeypatch):
    monkeypatch.setattr(generator_recipe, "COPIES", 1)
    return request.param


def test_a_seed_decides_every_bit(each):
    states = []
    for other, seed in enumerate((0, 0, 1)):
        torch.manual_seed(other)
        around = torch.get_rng_state()
        states.append(each.train(4, seed, log=quiet)[0].state_dict())
        assert torch.equal(torch.get_rng_state(), around)
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert not all(torch.equal(states[0][name], tensor) for name, tensor in states[2].items())


def test_a_short_generator_recipe_improves(monkeypatch):
    monkeypatch.setattr(generator_recipe, "COPIES", 1)
    model, losses = generator_recipe.train(40, log=quiet)
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    print(f"\n40 steps: loss {first:.3f} -> {last:.3f}")
    assert last < math.log(model.codebook_size) < first  # better than a guess
    assert not model.training


def test_a_recipe_writes_a_model_and_its_card(each, tmp_path, capsys, set_threads):
    out = tmp_path / "out"
    each.main(["-o", str(out), "--steps", "2", "--seed", "3", "--threads", "1"])
    expected, _ = each.train(2, 3, log=quiet)
    printed = capsys.readouterr().out
    shown = ("PSNR", "codebook usage") if each is recipe else ("read as their label", "distinct")
    for word in (*shown, "parameters", "trained in"):
        assert word in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "model.safetensors"
    ]  # fmt: skip
    card, module = (out / "README.md").read_text(), each.__name__
    assert f"python -m {module} -o {each.NAME} --steps 2 --seed 3 --threads 1" in card
    assert "CC BY 4.0" in card
    assert "{" not in card
    kind = TiTok if each is recipe else MaskGIT
    model = kind.from_pretrained(out)
    assert model.config == expected.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])


@pytest.mark.parametrize("steps", ["0", "-3"])
def test_a_recipe_refuses_no_steps(each, steps, tmp_path, capsys):
    with pytest.raises(SystemExit):
        each.main(["-o", str(tmp_path), "--steps", steps])
    assert "--steps: got" in capsys.readouterr().err


def test_the_shipped_weights():
    folder = TiTok.releases["titok-digits"].folder
    model = TiTok.from_pretrained("titok-digits")
    result = recipe.evaluate(model)
    size = (folder / "model.safetensors").stat().st_size
    print(f"\ntitok-digits, {size / 1e6:.2f} MB, held-out: {result}")
    assert model.config == TiTok.from_config("titok-digits").config
    assert size <= 3e6
    assert result.psnr >= 20
    assert result.usage >= 0.5
    assert result.agreement >= 0.95
    card = (folder / "README.md").read_text()
    assert f"--steps {recipe.STEPS} --seed {recipe.SEED} --threads {THREADS}" in card
    stated = float(re.search(r"PSNR.*\| ([\d.]+) dB", card)[1])
    assert result.psnr == pytest.approx(stated, abs=0.05)  # CPUs differ in the last bits


def test_tokens_are_masked_by_the_arccos_schedule():
    tokens = torch.arange(16).expand(256, -1)
    ids, masked = mask_tokens(tokens, 99, torch.Generator().manual_seed(0))
    progress = torch.rand(256, 1, generator=torch.Generator().manual_seed(0))
    counts = (16 * progress.acos() / (math.pi / 2)).round().clamp(min=1)[:, 0].long()
    assert torch.equal(masked.sum(1), counts) and counts.min() == 1 and counts.max() == 16
    assert torch.equal(ids, torch.where(masked, 99, tokens))
    assert 0 < masked.double().mean(0).std() < 0.1  # any position


def test_masked_tokens_weigh_more_than_seen_ones():
    logits, tokens = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[0, 4, 2], [1, 1, 3]])
    masked = torch.tensor([[True, False, False], [True, True, False]])
    errors = -logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    expected = (errors[masked].sum() + 0.25 * errors[~masked].sum()) / (3 + 0.25 * 3)
    loss = masked_token_loss(logits, tokens, masked, label_smoothing=0.0, unmasked_weight=0.25)
    torch.testing.assert_close(loss, expected)
    smooth = -logits.log_softmax(-1).mean(-1)
    expected = (0.9 * errors + 0.1 * smooth)[masked].mean()
    torch.testing.assert_close(
        masked_token_loss(logits, tokens, masked, unmasked_weight=0.0), expected
    )
    none = masked_token_loss(logits, tokens, torch.zeros_like(masked), unmasked_weight=0.0)
    assert none == 0


def test_a_run_that_is_taken_up_logs_the_mean_of_its_own_steps():
    class From5:
        def start(self, optimizer):
            return 5

        def moved(self, steps):
            pass

        def done(self, steps, optimizer):
            pass

    weight, lines = nn.Parameter(torch.zeros(())), []
    optimization = Optimization(8, 1e-3)
    losses = fit(
        [weight],
        lambda step: weight * 0 + step,
        optimization,
        keeper=From5(),
        log_every=2,
        log=lambda progress: lines.append(progress.loss),
    )
    assert losses == [5, 6, 7]
    assert lines == [5, 6.5]
