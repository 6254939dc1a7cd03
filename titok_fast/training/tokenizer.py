"""Trains tokenizers on image files: TiTok's first stage on proxy codes, and models of pixels."""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titok_fast._distributed import rank_and_size
from titok_fast.images import Crop, read_pixels, to_float
from titok_fast.metrics import psnr
from titok_fast.models import IBQTokenizer, MaskGITVQGAN, TiTok, Tokenizer
from titok_fast.models.checks import NUMBER, check_fields, found_at, one_of
from titok_fast.ops.arguments import without_autocast
from titok_fast.training.adversary import Adversary
from titok_fast.training.data import key
from titok_fast.training.loop import UNDECAYED, Optimization
from titok_fast.training.losses import PIXEL_LOSSES, proxy_code_losses, tokenizer_losses, total
from titok_fast.training.run import Options, Task

# TiTok: configs/training/TiTok/stage1/titok_b64.yaml of 1d-tokenizer, whose 32 images of a GPU are
# 256 of eight. IBQ: configs/IBQ/gpu/imagenet_ibqgan_16384.yaml of SEED-Voken, 330 epochs of
# ImageNet; its rate begins without a warm-up and falls to a tenth twice.
RECIPES: Mapping[type[Tokenizer], tuple[Optimization, Options]] = {
    TiTok: (
        Optimization(
            steps=1_000_000, learning_rate=1e-4, warmup_steps=10_000, final_fraction=0.1,
            betas=(0.9, 0.99), weight_decay=1e-4,
        ),
        Options(batch_size=256),
    ),
    IBQTokenizer: (
        Optimization(
            steps=1_650_000, learning_rate=1e-4, warmup_steps=10_000, final_fraction=0.01,
            betas=(0.5, 0.9), weight_decay=0.0,
        ),
        Options(batch_size=256),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Losses:
    """What `TokenizerTask` minimises.

    Attributes:
        pixel_loss: "l1" or "l2", the mean absolute or squared error of pixels in [0, 1].
        quantizer_weight: of the quantizer's loss.
        entropy_weight: of the loss of entropies that IBQ's quantizer has beside it.
        kl_weight: of the divergence of a VAE variant's latents from the normal distribution.

    Raises:
        ValueError: for a number out of range.
    """

    pixel_loss: str = "l2"
    quantizer_weight: float = 1.0
    entropy_weight: float = 0.05
    kl_weight: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(
            self, pixel_loss=one_of(*PIXEL_LOSSES), quantizer_weight=NUMBER, entropy_weight=NUMBER,
            kl_weight=NUMBER,
        )  # fmt: skip


SHOWN = 8  # images of a sheet
LARGEST_PSNR = 100.0  # of an image, in dB, so that a blank one leaves the mean finite

ATTEMPTS = 100  # to read an image
# Errors that are not the file's: to go on without it would train on something else each time.
OF_THE_SYSTEM = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)

# IBQ's, doubled, are the official ones: the absolute error of pixels in its range [-1, 1], the
# quantizer's loss, and 0.05 of that of entropies.
LOSSES: Mapping[type[Tokenizer], Losses] = {
    TiTok: Losses(),
    IBQTokenizer: Losses(pixel_loss="l1", quantizer_weight=0.5, entropy_weight=0.025),
}


# As in the official recipes; IBQ's half, as its other losses.
PERCEPTUAL_WEIGHTS: Mapping[type[Tokenizer], Mapping[str, float]] = {
    TiTok: {"lpips": 1.0, "convnext_s": 0.1},
    IBQTokenizer: {"lpips": 0.5, "convnext_s": 0.05},
}


class TokenizerTask(Task):
    """Image files for `titok_fast.training.run.run`.

    Held out, it measures beside the loss, without an adversary's part in it: of a first-stage TiTok
    the `accuracy` of proxy codes, of another model `psnr` in dB, the mean over images, each at most
    100; and of one with a codebook `usage`, the share of its codes that these images take. Its
    samples are eight images, spread over all, above their reconstructions, in the first stage by
    `vqgan`.

    Args:
        model: put into training mode. Of a first-stage TiTok (`finetune_decoder` false) the loss is
            the proxy codes' cross-entropy, of any other model its pixels' error.
        paths: of the files; one that cannot be read is named, and another takes its place where
            they are augmented.
        vqgan: gives the proxy codes, on the model's device; with a first-stage model and only then.
        losses: what is minimised; None takes those of `LOSSES`.
        adversary: that joins in a loss of pixels; on the model's device.
        perceptual: of reconstructions and images [B, 3, S, S] in [0, 1] a scalar that is added to a
            loss of pixels, weighted already, such as a `Perceptual` on the model's device.
        augment: whether crops are random, TiTok's half of them mirrored; otherwise they are the
            centre.
        log: takes the name of a file that cannot be read.

    Attributes:
        model: the same.
        count: number of files.

    Raises:
        ValueError: without files, with a `vqgan` or an `adversary` that the model has no use for or
            lacks, or with an adaptive `adversary` and a frozen last layer.
    """

    model: Tokenizer

    def __init__(
        self,
        model: Tokenizer,
        paths: Sequence[str],
        vqgan: MaskGITVQGAN | None = None,
        *,
        losses: Losses | None = None,
        adversary: Adversary | None = None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        augment: bool = True,
        log: Callable[[str], None] = print,
    ) -> None:
        of_proxies = predicts_proxies(model.config)
        if of_proxies and vqgan is None:
            raise ValueError("vqgan: got None, which a first-stage model needs for proxy codes")
        if not of_proxies and vqgan is not None:
            raise ValueError("vqgan: allowed with a first-stage model, this one predicts pixels")
        for name, given in (("adversary", adversary), ("perceptual", perceptual)):
            if of_proxies and given is not None:
                raise ValueError(f"{name}: allowed with a model that predicts pixels")
        adaptive = adversary is not None and adversary.options.adversarial_adaptive
        if adaptive and not last_layer(model).requires_grad:
            raise ValueError("adversary: got an adaptive weight, allowed is a fixed one where the "
                             "decoder's last layer is frozen")  # fmt: skip
        if of_proxies and isinstance(model, TiTok) and model.quantize_mode == "vae":
            raise ValueError("model: got a legacy one with continuous latents, allowed are codes")
        if vqgan is not None:
            _check_stride(vqgan, model.config)
        if not paths:
            raise ValueError("paths: got no file")
        self.model, self.count = model.train(), len(paths)
        self.undecayed = UNDECAYED if isinstance(model, TiTok) else ()
        self._paths, self._perceptual = list(paths), perceptual
        self.helper = self._adversary = adversary
        self._losses = losses or LOSSES[type(model)]
        self._vqgan = None if vqgan is None else vqgan.eval().requires_grad_(False)
        self._augment, self._log, self._unreadable = augment, log, set[int]()

    def batch(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """[B, 3, S, S] uint8."""
        if not self._augment:
            return torch.stack([self._read(int(row), None) for row in rows])
        share = 0.5 if isinstance(self.model, TiTok) else 0.0  # mirrored, as officially
        images = []
        draws = torch.rand(len(rows), 3, generator=generator).tolist()
        for row, (across, down, mirrored) in zip(rows, draws, strict=True):
            image = self._read(int(row), (across, down))
            images.append(image.flip(2) if mirrored < share else image)
        return torch.stack(images)

    def _read(self, row: int, crop: Crop) -> Tensor:
        place = row
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return read_pixels(
                    self._paths[place],
                    self.model.image_size,
                    interpolation=self.model.interpolation,
                    crop=crop,
                )
            except OSError as error:
                if not self._augment or error.errno in OF_THE_SYSTEM:
                    raise
                if place not in self._unreadable:
                    self._unreadable.add(place)
                    self._log(f"skipped {error}")
            place = key("instead", row, attempt) % self.count  # not a neighbour, of its class
        raise OSError(f"no image could be read in {ATTEMPTS} attempts, {self._paths[row]} first")

    def loss(
        self, network: nn.Module, batch: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        images = to_float(batch.to(generator.device, non_blocking=True))
        with _entropy_over(self.model, dist.group.WORLD if rank_and_size()[1] > 1 else None):
            output = network(images)
        losses = self._without_adversary(output, self._target(images))
        if self._adversary is not None:
            losses["adversarial"] = self._adversary.loss(
                output[0], images, other=total(losses), last_layer=last_layer(self.model)
            )
        return losses

    def evaluate(
        self, network: nn.Module, batch: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        images = to_float(batch.to(generator.device, non_blocking=True))
        with _entropy_over(network, None):  # other processes may have no such batch
            output = network(images)
        target = self._target(images)
        measures = {"loss": total(self._without_adversary(output, target))}
        if self._vqgan is None:
            quality = psnr(output[0].float().clamp(0, 1), images)
            measures["psnr"] = quality.clamp(max=LARGEST_PSNR).mean()
        else:
            measures["accuracy"] = (output[0].argmax(1).flatten(1) == target).double().mean()
        if self.model.codebook_size is not None:
            used = torch.zeros(self.model.codebook_size, dtype=torch.bool, device=images.device)
            used[output[1]["min_encoding_indices"].flatten()] = True
            measures["usage"] = used
        return measures

    def samples(self, network: nn.Module) -> list[Tensor]:
        model: Any = network
        rows = torch.linspace(0, self.count - 1, min(SHOWN, self.count)).long()
        pixels = self.batch(rows, torch.Generator())
        images = to_float(pixels.to(next(model.parameters()).device))
        tokens = model.encode(images)
        if self._vqgan is None:
            return [images, model.decode(tokens)]
        proxies = model.proxy_logits(tokens).argmax(1).flatten(1)
        return [images, self._vqgan.decode(proxies)]

    def _target(self, images: Tensor) -> Tensor:
        """What the model is to give: proxy codes [B, G G], or the images."""
        if self._vqgan is None:
            return images
        with without_autocast(images):
            return self._vqgan.encode(images)

    def _without_adversary(
        self, output: tuple[Tensor, dict[str, Any]], target: Tensor
    ) -> dict[str, Tensor]:
        result, weights = output[1], self._losses
        if self._vqgan is not None:
            return proxy_code_losses(output, target, quantizer_weight=weights.quantizer_weight)
        if "posterior" in result:
            losses = {
                "reconstruction": PIXEL_LOSSES[weights.pixel_loss](output[0], target),
                "kl": weights.kl_weight * result["posterior"].kl().sum(1).mean(),
            }
        else:
            losses = tokenizer_losses(
                output,
                target,
                pixel_loss=weights.pixel_loss,
                quantizer_weight=weights.quantizer_weight,
                entropy_weight=weights.entropy_weight,
            )
        if self._perceptual is not None:
            losses["perceptual"] = self._perceptual(output[0], target)
        return losses


@contextmanager
def _entropy_over(network: nn.Module, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Within it IBQ's entropy is that of the batches of a group; None is this process's."""
    if not isinstance(network, IBQTokenizer):
        yield
        return
    before = network.quantize.process_group
    network.quantize.process_group = group
    try:
        yield
    finally:
        network.quantize.process_group = before


def last_layer(model: Tokenizer) -> Tensor:
    """The weight that gives the pixels, of a model that predicts them."""
    decoder: Any = model.decoder
    if isinstance(model, TiTok) and model.finetune_decoder:
        decoder = model.pixel_decoder
    weight: Tensor = decoder.conv_out.weight
    return weight


def _check_stride(vqgan: MaskGITVQGAN, config: Mapping[str, Any]) -> None:
    """Raises ValueError unless the VQGAN has a code for each patch of a TiTok's decoder."""
    patch, code = config["model"]["vq_model"]["vit_dec_patch_size"], vqgan.stride
    if code != patch:
        raise ValueError(f"vqgan: got a code for {code} x {code} pixels, allowed is "
                         f"{patch} x {patch}, the decoder's patch")  # fmt: skip


PIXEL_OPTIONS = ("pixel_loss", "quantizer_weight")  # of a tokenizer with a codebook


def _vq_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """That section of a configuration, which may be damaged."""
    section = found_at(config, "model.vq_model")
    return section if isinstance(section, Mapping) else {}


def predicts_proxies(config: Mapping[str, Any]) -> bool:
    """Whether a tokenizer's configuration is of TiTok's first stage, without pixels."""
    vq = _vq_model(config)
    return bool(vq.get("is_legacy", True)) and not vq.get("finetune_decoder", True)


def loss_options(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of `Losses` that a tokenizer's loss has."""
    if predicts_proxies(config):
        return ("quantizer_weight",)
    if _vq_model(config).get("quantize_mode") == "vae":
        return "pixel_loss", "kl_weight"
    return (*PIXEL_OPTIONS, "entropy_weight") if config.get("use_entropy_loss") else PIXEL_OPTIONS


def tokenizer_config(name: str) -> dict[str, Any]:
    """A release's configuration as it is trained from the start.

    That is a legacy TiTok's first stage, which predicts proxy codes, and IBQ's with entropies.

    Args:
        name: of a `TiTok` or `IBQTokenizer`, in its releases.
    """
    kind = IBQTokenizer if name in IBQTokenizer.releases else TiTok
    config: dict[str, Any] = copy.deepcopy(dict(kind.releases[name].config))
    if kind is IBQTokenizer:
        config["use_entropy_loss"] = True
    elif config["model"]["vq_model"].get("is_legacy", True):
        config["model"]["vq_model"]["finetune_decoder"] = False
    return config


def second_stage(model: TiTok, vqgan: MaskGITVQGAN) -> TiTok:
    """A first-stage model as the second stage begins: its decoder's proxies become pixels.

    Args:
        model: of the first stage.
        vqgan: that gave its proxy codes; its codebook and decoder are copied.

    Returns:
        A new model, whose encoder and codebook are frozen.

    Raises:
        ValueError: for a model of another kind, or a VQGAN whose decoder is not MaskGIT's.
    """
    if not predicts_proxies(model.config):
        raise ValueError("model: got one that predicts pixels, allowed is one of the first stage")
    config = copy.deepcopy(model.config)
    _check_stride(vqgan, config)
    config["model"]["vq_model"]["finetune_decoder"] = True
    made = TiTok.from_config(config)
    state = model.state_dict() | {
        f"pixel_{name}": tensor
        for name, tensor in vqgan.state_dict().items()
        if name.startswith(("decoder.", "quantize."))
    }
    try:
        made.load_state_dict(state)
    except RuntimeError:
        raise ValueError("vqgan: its decoder has other shapes than MaskGIT's") from None
    return made
