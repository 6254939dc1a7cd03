"""MaskGIT-VQGAN: the CNN tokenizer whose codes are TiTok's proxy codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from titok_fast.layers import VectorQuantizer
from titok_fast.models.checks import (
    COUNT,
    COUNTS,
    WIDTH,
    check_floating,
    check_section,
    check_tokens,
)
from titok_fast.models.convolutions import (
    PackableConv,
    PointwiseConv,
    activated,
    added,
    convolve,
    group_norm,
    image_by_image,
)
from titok_fast.models.pretrained import PretrainedModel, Release
from titok_fast.models.widened import Conv

VQGAN_CODEBOOK_SIZE = 1024

VQGAN_CONFIG: Mapping[str, Any] = {
    "channel_mult": [1, 1, 2, 2, 4],
    "num_resolutions": 5,
    "dropout": 0.0,
    "hidden_channels": 128,
    "num_channels": 3,
    "num_res_blocks": 2,
    "resolution": 256,
    "z_channels": 256,
}
_KINDS = {
    "channel_mult": COUNTS,
    "hidden_channels": WIDTH,
    "num_channels": COUNT,
    "num_res_blocks": COUNT,
    "z_channels": COUNT,
}


class ResnetBlock(nn.Module):
    """Two normalised convolutions and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = PackableConv(in_channels, out_channels, bias=False)
        self.norm2 = group_norm(out_channels)
        self.conv2 = PackableConv(out_channels, out_channels, bias=False)
        if in_channels != out_channels:
            self.nin_shortcut = Conv(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, in_channels, H, W] to [B, out_channels, H, W]."""
        h = convolve(self.conv1, x, norm=self.norm1)  # [B, out, H, W]
        if not hasattr(self, "nin_shortcut"):
            return convolve(self.conv2, h, norm=self.norm2, residual=x)
        # The released weights expect the shortcut of the block's output, not of its input.
        h = convolve(self.conv2, h, norm=self.norm2)
        return added(self.conv2, h, self.nin_shortcut(h))


class Level(nn.Module):
    """The residual blocks of one resolution; a decoder level may upsample after them."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, *, upsample: bool = False
    ) -> None:
        super().__init__()
        self.block = _blocks(in_channels, out_channels, num_blocks)
        if upsample:
            self.upsample_conv = PackableConv(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, in_channels, H, W] to [B, out_channels, H, W], or to twice the H and W."""
        x = self.block(x)
        if hasattr(self, "upsample_conv"):
            x = convolve(self.upsample_conv, x, upsample=True)
        return x


def _blocks(in_channels: int, out_channels: int, count: int) -> nn.Sequential:
    inputs = [in_channels] + [out_channels] * (count - 1)
    return nn.Sequential(*(ResnetBlock(channels, out_channels) for channels in inputs))


class PixelEncoder(nn.Module):
    """Images to codebook vectors, without attention.

    Args:
        config: `VQGAN_CONFIG` or a mapping like it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        channels = [config["hidden_channels"] * mult for mult in config["channel_mult"]]
        inputs = [config["hidden_channels"], *channels[:-1]]
        num_blocks = config["num_res_blocks"]
        self.conv_in = PackableConv(config["num_channels"], config["hidden_channels"], bias=False)
        self.down = nn.ModuleList(
            Level(inputs[i], channels[i], num_blocks) for i in range(len(channels))
        )
        self.mid = _blocks(channels[-1], channels[-1], num_blocks)
        self.norm_out = group_norm(channels[-1])
        self.conv_out = PointwiseConv(channels[-1], config["z_channels"])

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B, 3, H, W] to [B, D, H / 16, W / 16] (for five levels)."""
        x = convolve(self.conv_in, images.contiguous(memory_format=torch.channels_last))
        for i, level in enumerate(self.down):
            x = level(x if i == 0 else F.avg_pool2d(x, 2))
        x = activated(self.norm_out, self.mid(x))
        out: Tensor = self.conv_out(x.to(self.conv_out.weight.dtype))  # [B, D, h, w]
        return out


class PixelDecoder(nn.Module):
    """Codebook vectors to images; its `up` list is ordered from the finest level.

    Args:
        config: `VQGAN_CONFIG` or a mapping like it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        channels = [config["hidden_channels"] * mult for mult in config["channel_mult"]]
        inputs = [*channels[1:], channels[-1]]
        num_blocks = config["num_res_blocks"]
        self.conv_in = PackableConv(config["z_channels"], channels[-1])
        self.mid = _blocks(channels[-1], channels[-1], num_blocks)
        self.up = nn.ModuleList(
            Level(inputs[i], channels[i], num_blocks, upsample=i > 0) for i in range(len(channels))
        )
        self.norm_out = group_norm(channels[0])
        self.conv_out = PackableConv(channels[0], config["num_channels"])

    def forward(self, z: Tensor) -> Tensor:
        """Maps [B, D, h, w] to [B, 3, 16 h, 16 w] (for five levels), not clamped."""
        x = self.mid(convolve(self.conv_in, z.contiguous(memory_format=torch.channels_last)))
        for level in reversed(self.up):
            x = level(x)
        return convolve(self.conv_out, x, norm=self.norm_out)  # [B, 3, H, W]


class MaskGITVQGAN(PretrainedModel):
    """The VQGAN of MaskGIT (arXiv 2202.04200, section 4.1), 16 x 16 codes for a 256 px image.

    TiTok's first training stage predicts its tokens, the second starts from its decoder
    (arXiv 2406.07550, section 3.3). It is used frozen: encode and decode build no graph.

    Args:
        config: `VQGAN_CONFIG` or a mapping with its keys; `num_resolutions`, `dropout` and
            `resolution` follow from the rest or do not matter here, and are not read.

    Raises:
        ValueError: when a key is missing or its value is not allowed.
    """

    releases: ClassVar[Mapping[str, Release]] = {
        "maskgit-vqgan-imagenet-f16-256": Release(
            VQGAN_CONFIG,
            hub_id="fun-research/TiTok",
            hub_file="maskgit-vqgan-imagenet-f16-256.bin",
            checkpoint="maskgit-vqgan-imagenet-f16-256.bin",
        )
    }

    full_precision = ("encoder.conv_out", "quantize")
    config_key = "channel_mult"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        config = check_section(self.config, "", _KINDS, model="MaskGITVQGAN")
        self.encoder = PixelEncoder(config)
        self.decoder = PixelDecoder(config)
        self.quantize = VectorQuantizer(VQGAN_CODEBOOK_SIZE, config["z_channels"])
        self.stride = 2 ** (len(config["channel_mult"]) - 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokens of square images, in raster order.

        Args:
            images: [B, 3, S, S] in [0, 1], floating; S is a multiple of 16.

        Returns:
            [B, (S / 16)^2] int64 in [0, 1024).

        Raises:
            TypeError: when images is not a floating tensor.
            ValueError: for another shape.
        """
        check_floating("images", images)
        channels = self.encoder.conv_in.in_channels
        if (
            images.ndim != 4
            or images.shape[1] != channels
            or images.shape[2] != images.shape[3]
            or images.shape[2] % self.stride
            or images.shape[2] == 0
        ):
            raise ValueError(
                f"images: got shape {list(images.shape)}, allowed is [B, {channels}, S, S] "
                f"with S a multiple of {self.stride}"
            )
        hidden = image_by_image(
            self.encoder, images.to(self.encoder.conv_in.weight.dtype)
        )  # [B, D, h, w]
        tokens: Tensor = self.quantize(hidden)[1]["min_encoding_indices"]  # [B, h, w]
        return tokens.flatten(1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images of tokens.

        Args:
            tokens: [B, h^2] int64 in [0, 1024), raster order. Out-of-range tokens are an error
                here on the CPU, and a device-side assertion on a GPU.

        Returns:
            [B, 3, 16 h, 16 h] in [0, 1], in the dtype of the decoder.

        Raises:
            TypeError: when tokens is not an integer tensor.
            ValueError: for another shape or a token out of range.
        """
        check_tokens("tokens", tokens, VQGAN_CODEBOOK_SIZE)
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1] or side == 0:
            raise ValueError(
                f"tokens: got shape {list(tokens.shape)}, allowed is [B, h * h] with h > 0"
            )
        codes = self.quantize.embedding(tokens)  # [B, h h, D]
        z = rearrange(codes, "b (h w) d -> b d h w", h=side)  # [B, D, h, h]
        z = z.to(self.decoder.conv_in.weight.dtype)
        return image_by_image(self.decoder, z).clamp(0, 1)  # [B, 3, H, W]
