"""A discriminator that learns to tell reconstructions from images while a tokenizer is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast._distributed import rank_and_size
from titok_fast.models.checks import FLAG, NUMBER, POSITIVE, WHOLE, check_fields, one_of
from titok_fast.ops.arguments import without_autocast
from titok_fast.training.run import Helper

LECAM_DECAY = 0.999
CLIP_NORM = 1.0
LARGEST_ADAPTIVE = 1e4


class PatchDiscriminator(nn.Module):
    """Images to a map of logits, positive for what looks real.

    Args:
        width: channels of the first layer, a multiple of 32.
        stages: how often height and width are halved.

    Source: the discriminator of 1d-tokenizer, a PatchGAN (arXiv 1611.07004) with blurred strides.
    """

    def __init__(self, width: int = 128, stages: int = 3) -> None:
        super().__init__()
        channels = [width, *(width * 2**i for i in range(stages))]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 5, padding=2), nn.LeakyReLU(0.1)]
        for inner, outer in pairwise(channels):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), _Halve()]
            layers += [nn.GroupNorm(32, outer), nn.LeakyReLU(0.1)]
        last = channels[-1]
        layers += [nn.AdaptiveMaxPool2d(16), nn.Conv2d(last, last, 1), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(last, 1, 5, padding=2))

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B, 3, H, W] to [B, 1, 16, 16]."""
        out: Tensor = self.layers(images)
        return out


class _Halve(nn.Module):
    """Half the height and width, after a blur."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(row, row).view(1, 1, 4, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


@dataclass(frozen=True)
class AdversaryOptions:
    """How an `Adversary` learns.

    Attributes:
        adversarial_weight: of its verdict in the loss of the tokenizer.
        adversarial_loss: what of its logits the tokenizer minimises: "hinge", minus their mean, or
            "non-saturating", log(1 + exp(-mean)) of each image, as IBQ does.
        adversarial_adaptive: whether that weight is multiplied by `adaptive_weight`.
        adversarial_start: step at which it begins.
        lecam_weight: of LeCam's regularisation (arXiv 2104.03310), which keeps it from being sure.
        discriminator_learning_rate: of its AdamW, constant.

    Raises:
        ValueError: for a number out of range.
    """

    adversarial_weight: float = 0.01
    adversarial_loss: str = "hinge"
    adversarial_adaptive: bool = False
    adversarial_start: int = 20_000
    lecam_weight: float = 0.001
    discriminator_learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        check_fields(
            self, adversarial_weight=NUMBER, adversarial_loss=one_of("hinge", "non-saturating"),
            adversarial_adaptive=FLAG, adversarial_start=WHOLE, lecam_weight=NUMBER,
            discriminator_learning_rate=POSITIVE,
        )  # fmt: skip


def adaptive_weight(loss: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """How much larger the gradient of one loss is than that of another, where images are made.

    Args:
        loss: scalar, of reconstructions; what else is in it has no gradient there.
        adversarial: scalar, of the same reconstructions.
        last_layer: the decoder's last weight.

    Returns:
        A scalar in [0, 1e4] without a gradient, the quotient of the norms of both gradients, each
        the mean over all processes.

    Source: arXiv 2012.09841, equation 7, with 1e-4 and the limit of its code.
    """
    both = torch.stack(
        [
            torch.autograd.grad(each, last_layer, retain_graph=True)[0].flatten().float()
            for each in (loss, adversarial)
        ]
    )
    _, processes = rank_and_size()
    if processes > 1:
        dist.all_reduce(both)
    norms = torch.linalg.vector_norm(both / processes, dim=1)
    quotient: Tensor = norms[0] / (norms[1] + 1e-4)
    return quotient.clamp(0, LARGEST_ADAPTIVE)


class Adversary(Helper):
    """A discriminator with its optimizer; its state_dict holds both.

    Args:
        options: how it learns.
        discriminator: images [B, 3, H, W] to logits; what needs no gradient stays as it is.

    Source: the second stage of TiTok in 1d-tokenizer: hinge loss and LeCam's regularisation.
    """

    means: Tensor

    def __init__(
        self, options: AdversaryOptions | None = None, discriminator: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.options = options or AdversaryOptions()
        self.discriminator = discriminator or PatchDiscriminator()
        self.register_buffer("means", torch.zeros(2))  # of logits of images and reconstructions
        self._done = 0
        self._seen: list[Tensor] = []  # of batches since the last step: mean logits, and its loss
        self._moved = [p for p in self.discriminator.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._moved if p.ndim > 1]},
            {"params": [p for p in self._moved if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups,
            self.options.discriminator_learning_rate,
            betas=(0.9, 0.999),
            weight_decay=1e-4,
        )

    def loss(
        self,
        reconstructions: Tensor,
        images: Tensor,
        *,
        other: Tensor | None = None,
        last_layer: Tensor | None = None,
    ) -> Tensor:
        """What the tokenizer minimises; adds what the discriminator learns to its gradients.

        Args:
            reconstructions: [B, 3, H, W], floating.
            images: the same of the images, in [0, 1].
            other: scalar, the tokenizer's loss without this one; with `adversarial_adaptive`.
            last_layer: the weight that gave the reconstructions; with `adversarial_adaptive`.

        Returns:
            A scalar, zero before the first step of the discriminator.

        Raises:
            ValueError: without `other` or `last_layer` where they are needed.
        """
        adaptive = self.options.adversarial_adaptive
        if adaptive and (other is None or last_layer is None):
            raise ValueError("other, last_layer: got None, which an adaptive weight needs")
        if self._done < self.options.adversarial_start:
            return reconstructions.new_zeros(())
        with without_autocast(images):
            made, given = reconstructions.float(), images.float()
            real = self.discriminator(given)
            fake = self.discriminator(made.detach())
            loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
            apart = F.relu(real.mean() - self.means[1]) ** 2
            apart = apart + F.relu(self.means[0] - fake.mean()) ** 2
            (loss + self.options.lecam_weight * apart).backward()
            seen = real.mean(), fake.mean(), loss
            self._seen.append(torch.stack(seen).detach())
            for parameter in self._moved:
                parameter.requires_grad_(False)
            logits: Tensor = self.discriminator(made)
            for parameter in self._moved:
                parameter.requires_grad_(True)
            if self.options.adversarial_loss == "hinge":
                verdict = -logits.mean()
            else:
                verdict = F.softplus(-logits.flatten(1).mean(1)).mean()
        loss = self.options.adversarial_weight * verdict
        if other is None or last_layer is None or not adaptive:
            return loss
        return adaptive_weight(other, verdict, last_layer) * loss

    def step(self) -> dict[str, float]:
        """Moves the discriminator by the mean gradient of the batches since the last step.

        Returns:
            Its mean hinge loss of them as `discriminator`, once it has begun.

        Raises:
            FloatingPointError: when that is not finite.
        """
        told: dict[str, float] = {}
        if self._seen:
            gradients = [p.grad for p in self._moved if p.grad is not None]
            means = torch.stack(self._seen).sum(0)
            parts = len(self._seen)
            _, processes = rank_and_size()
            if processes > 1:
                for tensor in (*gradients, means):
                    dist.all_reduce(tensor)
                parts *= processes
            for tensor in (*gradients, means):
                tensor.div_(parts)
            norm = nn.utils.clip_grad_norm_(self._moved, CLIP_NORM).item()
            if not math.isfinite(norm):
                raise FloatingPointError(f"discriminator: got a gradient of norm {norm}")
            self.means.lerp_(means[:2], 1 - LECAM_DECAY)
            told["discriminator"] = means[2].item()
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._seen = []
        self._done += 1
        return told

    def get_extra_state(self) -> dict[str, Any]:
        return {"steps": self._done, "optimizer": self._optimizer.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._done = state["steps"]
        self._optimizer.load_state_dict(state["optimizer"])
