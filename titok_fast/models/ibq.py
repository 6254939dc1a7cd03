"""IBQ's tokenizer: a convolutional encoder and decoder around a codebook of up to 262,144 codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast.layers import IndexPropagationQuantize
from titok_fast.models.checks import (
    COUNT,
    COUNTS,
    FLAG,
    MAPPING,
    NUMBER,
    POSITIVE,
    SHARE,
    WIDTH,
    Kind,
    check_floating,
    check_section,
    check_tokens,
    one_of,
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
from titok_fast.models.cuda_graphs import capture
from titok_fast.models.pretrained import PretrainedModel, Release, evaluating
from titok_fast.models.widened import Conv
from titok_fast.ops import nearest_code
from titok_fast.ops.arguments import without_autocast

_DDCONFIG = {
    "double_z": False,
    "z_channels": 256,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.0,
}
_KINDS = {"n_embed": COUNT, "embed_dim": COUNT, "ddconfig": MAPPING}
_KINDS_OF_LAYERS = {
    "double_z": one_of(False),
    "z_channels": COUNT,
    "resolution": COUNT,
    "in_channels": COUNT,
    "out_ch": COUNT,
    "ch": WIDTH,
    "ch_mult": COUNTS,
    "num_res_blocks": COUNT,
    "attn_resolutions": Kind(
        "a list of ints",
        lambda value: isinstance(value, list) and all(map(COUNT.fits, value)),
    ),
    "dropout": SHARE,
}
_FIXED_LAYERS = {"resamp_with_conv": one_of(True), "give_pre_end": one_of(False)}
_KINDS_OF_QUANTIZER = {
    "beta": NUMBER,
    "use_entropy_loss": FLAG,
    "cosine_similarity": FLAG,
    "entropy_temperature": POSITIVE,
    "sample_minimization_weight": NUMBER,
    "batch_maximization_weight": NUMBER,
}


def _release(num_codes: int, *, pretrain: bool = False) -> Release:
    name = f"IBQ_pretrain_{num_codes}.ckpt" if pretrain else f"imagenet256_{num_codes}.ckpt"
    return Release(
        {"n_embed": num_codes, "embed_dim": 256, "ddconfig": _DDCONFIG},
        hub_id=f"TencentARC/IBQ-Tokenizer-{num_codes}{'-Pretrain' if pretrain else ''}",
        hub_file=name,
        checkpoint=name,
    )


class ResidualBlock(nn.Module):
    """Two normalised convolutions and a shortcut of the input."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = PackableConv(in_channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = PackableConv(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = Conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, in_channels, H, W] to [B, out_channels, H, W]."""
        h = convolve(self.conv1, x, norm=self.norm1)
        x = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        if self.dropout.training and self.dropout.p > 0:
            return convolve(self.conv2, self.dropout(activated(self.norm2, h)), residual=x)
        return convolve(self.conv2, h, norm=self.norm2, residual=x)


class SpatialAttention(nn.Module):
    """Self-attention with one head over the positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (Conv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to the same shape."""
        hidden = self.norm(x)
        rows = (part(hidden).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(*rows).transpose(1, 2).reshape(x.shape)
        projected: Tensor = self.proj_out(out)
        return added(self.proj_out, projected, x)


class Resample(nn.Module):
    """Halves or doubles height and width, with a convolution after or before."""

    def __init__(self, channels: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = (
            Conv(channels, channels, 3, stride=2) if down else PackableConv(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C, H / 2, W / 2] or [B, C, 2 H, 2 W]."""
        if self.down:
            out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
            return out
        return convolve(self.conv, x, upsample=True)


class Level(nn.Module):
    """The blocks of one resolution, each with attention or without, and the way to the next."""

    def __init__(
        self,
        channels: tuple[int, int],
        num_blocks: int,
        dropout: float,
        *,
        attention: bool,
        resample: str | None,
    ) -> None:
        super().__init__()
        first, rest = channels
        self.block = nn.ModuleList(
            ResidualBlock(rest if i else first, rest, dropout) for i in range(num_blocks)
        )
        self.attn = nn.ModuleList(SpatialAttention(rest) for _ in range(num_blocks * attention))
        self.resample = resample
        if resample is not None:
            self.add_module(resample, Resample(rest, down=resample == "downsample"))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, first, H, W] to [B, rest, H, W], or to half or twice the height and width."""
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x if self.resample is None else self.get_submodule(self.resample)(x)


def _middle(channels: int, dropout: float) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "block_1": ResidualBlock(channels, channels, dropout),
            "attn_1": SpatialAttention(channels),
            "block_2": ResidualBlock(channels, channels, dropout),
        }
    )


class IBQEncoder(nn.Module):
    """Images to latents.

    Args:
        config: the official `ddconfig`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths = [config["ch"] * mult for mult in config["ch_mult"]]
        inputs = [config["ch"], *widths[:-1]]
        last = len(widths) - 1
        self.conv_in = PackableConv(config["in_channels"], config["ch"])
        self.down = nn.ModuleList(
            Level(
                (inputs[i], widths[i]),
                config["num_res_blocks"],
                config["dropout"],
                attention=config["resolution"] // 2**i in config["attn_resolutions"],
                resample="downsample" if i < last else None,
            )
            for i in range(len(widths))
        )
        self.mid = _middle(widths[-1], config["dropout"])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = PackableConv(widths[-1], config["z_channels"])

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B, 3, H, W] in [-1, 1] to [B, C, H / f, W / f]."""
        x = convolve(self.conv_in, images.contiguous(memory_format=torch.channels_last))
        for level in self.down:
            x = level(x)
        for block in self.mid.values():
            x = block(x)
        return convolve(self.conv_out, x, norm=self.norm_out)


class IBQDecoder(nn.Module):
    """Latents to images; its `up` list is ordered from the finest level.

    Args:
        config: the official `ddconfig`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths = [config["ch"] * mult for mult in config["ch_mult"]]
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = PackableConv(config["z_channels"], widths[-1])
        self.mid = _middle(widths[-1], config["dropout"])
        self.up = nn.ModuleList(
            Level(
                (inputs[i], widths[i]),
                config["num_res_blocks"] + 1,
                config["dropout"],
                attention=config["resolution"] // 2**i in config["attn_resolutions"],
                resample="upsample" if i > 0 else None,
            )
            for i in range(len(widths))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = PackableConv(widths[0], config["out_ch"])

    def forward(self, z: Tensor) -> Tensor:
        """Maps [B, C, h, w] to [B, 3, f h, f w], in the scale of [-1, 1], not clamped."""
        x = convolve(self.conv_in, z.contiguous(memory_format=torch.channels_last))
        for block in self.mid.values():
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return convolve(self.conv_out, x, norm=self.norm_out)


class IBQTokenizer(PretrainedModel):
    """IBQ's tokenizer (arXiv 2412.02692, section 3): 16 x 16 tokens for a 256 px image.

    Args:
        config: the official configuration as a mapping, or the training file that has it in
            model.init_args, of n_embed, embed_dim and ddconfig; beta,
            use_entropy_loss, cosine_similarity, entropy_temperature, sample_minimization_weight and
            batch_maximization_weight, where present, go to the quantizer. The releases' lack
            use_entropy_loss; `titok_fast.training.tokenizer.tokenizer_config` has it, to train with
            entropies. There is no remap: a token is a position in the whole codebook.

    Attributes:
        image_size: height and width in pixels of the images it was trained on.
        stride: pixels of a token's side.
        codebook_size: number of codes.
        interpolation: how the official evaluation resizes images, see `titok_fast.images`.

    Raises:
        ValueError: when a key is missing or its value is not allowed.
    """

    full_precision = ("quant_conv", "quantize")

    releases: ClassVar[Mapping[str, Release]] = {
        "ibq-1024": _release(1024),
        "ibq-8192": _release(8192),
        "ibq-16384": _release(16384),
        "ibq-262144": _release(262144),
        "ibq-16384-pretrain": _release(16384, pretrain=True),
        "ibq-262144-pretrain": _release(262144, pretrain=True),
    }
    config_key = "ddconfig"
    config_within = "model.init_args"
    # A file of the autoregressive model holds its tokenizer as well.
    checkpoint_prefixes = ("", "first_stage_model.")
    checkpoint_ignored = ("loss.*",)
    interpolation = "bilinear"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        optional = {**_KINDS_OF_QUANTIZER, "remap": one_of(None)}
        config = check_section(self.config, "", _KINDS, optional, model="IBQTokenizer")
        layers = check_section(
            config, "ddconfig", _KINDS_OF_LAYERS, _FIXED_LAYERS, model="IBQTokenizer"
        )
        if layers["out_ch"] != layers["in_channels"]:
            raise ValueError(
                f"config: ddconfig.out_ch is {layers['out_ch']}, allowed is in_channels "
                f"{layers['in_channels']}"
            )
        width = config["embed_dim"]
        self.encoder = IBQEncoder(layers)
        self.decoder = IBQDecoder(layers)
        options = {key: config[key] for key in _KINDS_OF_QUANTIZER if key in config}
        self.quantize = IndexPropagationQuantize(config["n_embed"], width, **options)
        self.quant_conv = PointwiseConv(layers["z_channels"], width)
        self.post_quant_conv = Conv(width, layers["z_channels"], 1)
        self.image_size: int = layers["resolution"]
        self.stride: int = 2 ** (len(layers["ch_mult"]) - 1)
        self.codebook_size: int = config["n_embed"]

    def latents(self, images: Tensor) -> Tensor:
        """The encoder's output before quantization; differentiable.

        Args:
            images: [B, 3, H, W] in [0, 1], floating; H and W are multiples of `stride`.

        Returns:
            [B, D, H / stride, W / stride] in the dtype of `quant_conv`, which `from_pretrained` and
            `cast` keep float32 in a 16-bit network.

        Raises:
            TypeError: when images is not a floating tensor.
            ValueError: for another shape.
        """
        check_floating("images", images)
        channels, stride = self.encoder.conv_in.in_channels, self.stride
        sizes = images.shape[2:]
        if (
            images.ndim != 4
            or images.shape[1] != channels
            or any(s % stride or not s for s in sizes)
        ):
            raise ValueError(
                f"images: got shape {list(images.shape)}, allowed is [B, {channels}, H, W] with H "
                f"and W multiples of {stride}"
            )
        pixels = 2 * images.to(self.encoder.conv_in.weight.dtype) - 1
        hidden = image_by_image(self.encoder, pixels)
        out: Tensor = self.quant_conv(hidden.to(self.quant_conv.weight.dtype))
        return out

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """One training pass, differentiable. Codes are searched in float32, under autocast too.

        Args:
            images: as for `latents`.

        Returns:
            Pixels [B, 3, H, W], not clamped; and a dictionary with the scalar `quantizer_loss`,
            with `use_entropy_loss` also `entropy_loss`, and `min_encoding_indices`
            [B, H / stride, W / stride] int64.

        Raises:
            TypeError, ValueError: as `latents`.
        """
        z = self.latents(images)
        with without_autocast(z):
            quantized, losses, (_, _, indices) = self.quantize(z.to(self.quant_conv.weight.dtype))
        z = self.post_quant_conv(quantized.to(self.post_quant_conv.weight.dtype))
        pixels = (image_by_image(self.decoder, z) + 1) / 2
        grid = indices.view(images.shape[0], *quantized.shape[2:])
        result = {"quantizer_loss": losses, "min_encoding_indices": grid}
        if isinstance(losses, tuple):  # with the entropies of rows and of the batch
            result["quantizer_loss"], _, _, result["entropy_loss"] = losses
        return pixels, result

    def capture(
        self, batch_size: int, *, image_size: int | None = None
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """`encode` and `decode` of square images, each recorded as a CUDA graph.

        Args:
            batch_size: images a call, B.
            image_size: their side S in pixels, a multiple of `stride`; None is the model's.

        Returns:
            Functions from images [B, 3, S, S] in the dtype of the encoder to tokens, and back. They
            see later changes of the parameters only if made in place.

        Raises:
            RuntimeError: the model is not on a CUDA device.
            ValueError: for another size.
        """
        size, like = self.image_size if image_size is None else image_size, self.encoder.conv_in
        images = like.weight.new_zeros(batch_size, like.in_channels, size, size)
        encode = capture(self.encode, images)
        return encode, capture(self.decode, encode(images))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokens of images, for inference: without dropout, builds no graph.

        Args:
            images: as for `latents`.

        Returns:
            [B, H / stride, W / stride] int64 in [0, codebook_size).

        Raises:
            TypeError: when images is not a floating tensor.
            ValueError: for another shape.
        """
        with evaluating(self):
            z = self.latents(images)
        codebook = self.quantize.embedding.weight.float()
        return nearest_code(z.float().permute(0, 2, 3, 1), codebook, metric="dot")

    @torch.no_grad()
    def decode(self, tokens: Tensor, *, clamp: bool = True) -> Tensor:
        """Images of tokens, for inference: without dropout, builds no graph.

        Args:
            tokens: [B, h, w] int64 in [0, codebook_size). A token out of range is an error here on
                the CPU, and a device-side assertion on a GPU.
            clamp: limit the pixels to [0, 1].

        Returns:
            [B, 3, stride h, stride w] in the dtype of the decoder.

        Raises:
            TypeError: when tokens is not an int64 tensor.
            ValueError: for another shape or a token out of range.
        """
        check_tokens("tokens", tokens, self.codebook_size, "B, h, w")
        if 0 in tokens.shape[1:]:
            raise ValueError(f"tokens: got shape {list(tokens.shape)}, allowed are h, w from 1")
        z = self.quantize.embedding.weight[tokens].permute(0, 3, 1, 2)  # [B, D, h, w]
        with evaluating(self):
            z = self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype))
            images = (image_by_image(self.decoder, z) + 1) / 2
        return images.clamp(0, 1) if clamp else images
