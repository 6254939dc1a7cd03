"""How far apart images are to a frozen network, as a part of a tokenizer's loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast.models.checks import NUMBER, check_kind
from titok_fast.ops.arguments import without_autocast

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_SIZE = 224


def _lpips() -> Any:
    from lpips import LPIPS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about how lpips calls it
        return LPIPS(net="vgg", verbose=False)


def _lpips_distance(network: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    distances: Tensor = network(a, b, normalize=True)  # [B, 1, 1, 1]; it takes [0, 1] to [-1, 1]
    return distances.mean()


def _convnext_s() -> Any:
    from torchvision.models import convnext_small

    return convnext_small(weights="IMAGENET1K_V1")


def _logits_distance(network: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    mean, std = (a.new_tensor(row).view(3, 1, 1) for row in (IMAGENET_MEAN, IMAGENET_STD))

    def logits(images: Tensor) -> Tensor:
        images = F.interpolate(images, size=IMAGENET_SIZE, mode="bilinear", antialias=True)
        out: Tensor = network((images - mean) / std)  # [B, 1000]
        return out

    return F.mse_loss(logits(a), logits(b))


class _Kind(NamedTuple):
    load: Callable[[], Any]
    distance: Callable[[nn.Module, Tensor, Tensor], Tensor]


KINDS: Mapping[str, _Kind] = {
    "lpips": _Kind(_lpips, _lpips_distance),
    "convnext_s": _Kind(_convnext_s, _logits_distance),
}


class Perceptual(nn.Module):
    """Weighted distances of images to networks that stay as they are, in float32.

    Args:
        weights: of each distance by its kind: "lpips", of the features of a VGG, and "convnext_s",
            the mean squared error of the logits of a ConvNeXt-S, which is given images of
            224 x 224 pixels.

    Raises:
        OSError: when the weights of a network are missing and cannot be downloaded.
        RuntimeError: when lpips or torchvision is missing.
        ValueError: without a kind, for another one, or a weight that is no finite number from 0.

    Source: LPIPS (arXiv 1801.03924), as IBQ and VQGANs are trained with; ConvNeXt-S, as the second
    stage of TiTok in 1d-tokenizer; both, as its later tokenizers.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        if not weights:
            raise ValueError(f"weights: got none, allowed are {', '.join(KINDS)}")
        self._weights = dict(weights)
        self._networks = nn.ModuleDict()
        for kind, weight in weights.items():
            if kind not in KINDS:
                raise ValueError(f"weights: {kind!r} is not one of {', '.join(KINDS)}")
            check_kind(f"weights[{kind!r}]", weight, NUMBER)
        for kind in weights:
            self._networks[kind] = _frozen(kind)

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """The sum of the weighted distances, differentiable.

        Args:
            reconstructions: [B, 3, H, W], floating, not clamped.
            images: the same of the images, in [0, 1].

        Returns:
            A scalar, float32.
        """
        with without_autocast(images):
            made, given = reconstructions.float(), images.float()
            return reduce(
                torch.add,
                (
                    weight * KINDS[kind].distance(self._networks[kind], made, given)
                    for kind, weight in self._weights.items()
                ),
            )


def _frozen(kind: str) -> nn.Module:
    """The network of a kind."""
    try:
        network: nn.Module = KINDS[kind].load()
    except ImportError as error:
        raise RuntimeError(
            f"perceptual: {kind} needs {error.name}, run pip install 'titok_fast[perceptual]'"
        ) from None
    except (OSError, RuntimeError) as error:  # the latter of a file that is damaged
        raise OSError(f"perceptual: cannot get the weights of {kind} ({error})") from error
    return network.eval().requires_grad_(False)
