"""The discriminator of the second stage, and its weight."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests import training
from tests.processes import in_two_processes
from tests.training import IBQ, Stopped, quiet, stopping, titok
from titok_fast.models import IBQTokenizer, MaskGITVQGAN
from titok_fast.training.adversary import (
    Adversary,
    AdversaryOptions,
    PatchDiscriminator,
    adaptive_weight,
)
from titok_fast.training.data import rows_of_step
from titok_fast.training.loop import Optimization
from titok_fast.training.losses import total
from titok_fast.training.run import Options, run
from titok_fast.training.tokenizer import TokenizerTask, last_layer, second_stage

vqgan, pictures = training.vqgan, training.pictures


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


def test_a_verdict_that_does_not_saturate():
    real, fake = torch.rand(2, 2, 3, 16, 16)
    judge = adversary(adversarial_loss="non-saturating")
    logits = judge.discriminator(fake).flatten(1).mean(1)
    torch.testing.assert_close(judge.loss(fake, real), 0.5 * torch.log1p((-logits).exp()).mean())
    with pytest.raises(ValueError, match="adversarial_loss: got 'wgan', allowed is 'hinge' or"):
        adversary(adversarial_loss="wgan")


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
    loss = total(task.loss(model, pixels, draws))
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
    torch.save(_adapted(files).state_dict(), folder / f"{rank}.pt")


def adaptive_task(files):
    judge = adversary(adversarial_adaptive=True, lecam_weight=0.0)
    return TokenizerTask(titok(is_legacy=False), files, adversary=judge, augment=False, log=quiet)


def _adapted(files):
    optimization = Optimization(3, 1e-3, warmup_steps=0)
    return run(adaptive_task(files), optimization, Options(4, average_decay=0.0), log=quiet)


def test_an_adaptive_weight_of_two_processes_is_that_of_one(pictures, tmp_path):
    in_two_processes(_adaptive, tmp_path, pictures[:8])
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
        losses.append(total(task.loss(task.model, task.batch(rows, draws), draws)).item())
    assert float(lines[0].split()[3]) == pytest.approx(sum(losses[:2]) / 2, abs=1e-5)
    assert abs(losses[2] - sum(losses[:2]) / 2) > 5e-5  # of the whole it is another


def test_parts_of_a_step_teach_a_discriminator_as_the_whole():
    torch.manual_seed(0)
    real, fake = torch.rand(2, 4, 3, 16, 16)
    judges = [adversary(lecam_weight=0.0) for _ in range(2)]
    assert judges[0].step() == {}  # it has seen nothing
    judges[0].loss(fake, real)
    real_logits, fake_logits = (judges[0].discriminator(images) for images in (real, fake))
    hinge = (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2
    for part in (slice(0, 2), slice(2, 4)):
        judges[1].loss(fake[part], real[part])
    for judge in judges:
        assert judge.step() == {"discriminator": pytest.approx(hinge.item(), rel=1e-5)}
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
        run(task(stopping(TokenizerTask, 4)), optimization, options, tmp_path, log=quiet)
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
    task, groups = TokenizerTask(IBQTokenizer.from_config(IBQ), ["a.png"]), []
    quantize = task.model.quantize
    quantize.register_forward_pre_hook(lambda layer, _: groups.append(layer.process_group))
    task.loss(task.model, torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.Generator())
    assert groups == [torch.distributed.group.WORLD] and quantize.process_group is None
    judge, images = adversary(lecam_weight=0.0), torch.load(folder / "images.pt")
    judge.loss(*images[:, rank::2])
    judge.step()
    torch.save(judge.state_dict(), folder / f"{rank}.pt")


def test_an_adversary_of_two_processes_is_one(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(2, 4, 3, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    in_two_processes(_judge, tmp_path)
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


def test_a_discriminator_computes_in_float32():
    real, fake = torch.rand(2, 2, 3, 16, 16)
    expected = adversary().loss(fake, real)
    with torch.autocast("cpu", torch.bfloat16):
        loss = adversary().loss(fake, real)
    assert loss.dtype is torch.float32 and torch.equal(loss, expected)
