"""TiTok: images to one-dimensional tokens and back (arXiv 2406.07550)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from titok_fast.layers import VectorQuantizer
from titok_fast.models.blocks import ResidualAttentionBlock
from titok_fast.models.checks import (
    COUNT,
    FLAG,
    HEAD_WIDTHS,
    NUMBER,
    Kind,
    check_floating,
    check_section,
    check_tokens,
    fits_heads,
    one_of,
)
from titok_fast.models.convolutions import PointwiseConv, image_by_image
from titok_fast.models.cuda_graphs import capture
from titok_fast.models.maskgit_vqgan import (
    VQGAN_CODEBOOK_SIZE,
    VQGAN_CONFIG,
    PixelDecoder,
)
from titok_fast.models.packed import untouched
from titok_fast.models.pretrained import PretrainedModel, Release
from titok_fast.models.widened import Conv, Linear
from titok_fast.ops.attention import MAX_LENGTH

_SIZES: Mapping[str, Mapping[str, int]] = {
    "small": {"width": 512, "num_layers": 8, "num_heads": 8},
    "base": {"width": 768, "num_layers": 12, "num_heads": 12},
    "large": {"width": 1024, "num_layers": 24, "num_heads": 16},
}

_LEGACY = {
    "codebook_size": 4096,
    "token_size": 12,
    "use_l2_norm": True,
    "commitment_cost": 0.25,
    "finetune_decoder": True,
}
_VQ8K = {
    "codebook_size": 8192,
    "token_size": 64,
    "use_l2_norm": False,
    "commitment_cost": 0.25,
    "finetune_decoder": False,
    "is_legacy": False,
}
_VAE = {"quantize_mode": "vae", "token_size": 16, "finetune_decoder": False, "is_legacy": False}
_DIGITS = {
    "codebook_size": 256,
    "token_size": 12,
    "use_l2_norm": True,
    "commitment_cost": 0.25,
    "finetune_decoder": False,
    "is_legacy": False,
}
_DIGITS_SIZE = {"width": 80, "num_layers": 3, "num_heads": 2}


def _config(
    family: Mapping[str, Any],
    num_latent_tokens: int,
    encoder: str | Mapping[str, int],
    decoder: str | Mapping[str, int],
    crop_size: int = 256,
    patch_size: int = 16,
) -> Mapping[str, Any]:
    vq_model = {
        **family,
        "vit_enc_model_size": encoder,
        "vit_dec_model_size": decoder,
        "vit_enc_patch_size": patch_size,
        "vit_dec_patch_size": patch_size,
        "num_latent_tokens": num_latent_tokens,
    }
    return {
        "model": {"vq_model": vq_model},
        "dataset": {"preprocessing": {"crop_size": crop_size}},
    }


def _release(name: str, config: Mapping[str, Any]) -> Release:
    """One of bytedance's, whose checkpoints of codes have another prefix than those of latents."""
    prefix = "" if name.endswith("_vae_c16") else "tokenizer_"
    return Release(
        config,
        hub_id=f"yucornetto/tokenizer_{name}_imagenet",
        checkpoint=f"{prefix}{name}.bin",
    )


class DiagonalGaussian:
    """The posterior of the VAE variants: a normal distribution of each latent channel.

    Args:
        parameters: [..., 2 C], mean and log-variance; the latter is clamped to [-30, 20].

    Attributes:
        mean, logvar, std: [..., C] float32.
    """

    def __init__(self, parameters: Tensor) -> None:
        self.mean, logvar = parameters.float().chunk(2, dim=-1)  # [..., C]
        self.logvar = logvar.clamp(-30.0, 20.0)  # [..., C]
        self.std = torch.exp(0.5 * self.logvar)  # [..., C]

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws mean + std * noise, [..., C] float32, differentiable in the parameters."""
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal in nats, summed over channels: [...] float32."""
        return 0.5 * (self.mean**2 + self.std**2 - 1.0 - self.logvar).sum(-1)


class _ViT(nn.Module):
    """What TiTok's encoder and decoder share: one transformer over patches and latent tokens."""

    def __init__(
        self, size: str | Mapping[str, int], grid_size: int, num_latent_tokens: int
    ) -> None:
        super().__init__()
        size = _SIZES[size] if isinstance(size, str) else size
        self.width = size["width"]
        self.grid_size = grid_size
        scale = self.width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(1, self.width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(grid_size**2 + 1, self.width))
        self.latent_token_positional_embedding = nn.Parameter(
            scale * torch.randn(num_latent_tokens, self.width)
        )
        self.ln_pre = nn.LayerNorm(self.width)
        self.transformer = nn.ModuleList(
            ResidualAttentionBlock(self.width, size["num_heads"]) for _ in range(size["num_layers"])
        )
        self.ln_post = nn.LayerNorm(self.width)

    def transform(self, patches: Tensor, latents: Tensor, rows: slice) -> Tensor:
        """Maps patches [B, P, W] and latent tokens [B, L, W] to these rows of [B, 1 + P + L, W]."""
        start = self.class_embedding.expand(patches.shape[0], 1, self.width)  # [B, 1, W]
        patches = torch.cat([start, patches], dim=1) + self.positional_embedding  # [B, 1 + P, W]
        latents = latents + self.latent_token_positional_embedding  # [B, L, W]
        x: Tensor = self.ln_pre(torch.cat([patches, latents], dim=1))  # [B, 1 + P + L, W]
        *blocks, last = self.transformer
        for block in blocks:
            x = block(x)
        x = last(x, rows) if untouched(last, ResidualAttentionBlock) else last(x)[:, rows]
        return x


class TiTokEncoder(_ViT):
    """Images and latent tokens to latents (arXiv 2406.07550, equation 3)."""

    def __init__(
        self,
        size: str | Mapping[str, int],
        image_size: int,
        patch_size: int,
        num_latent_tokens: int,
        out_channels: int,
        *,
        is_legacy: bool,
    ) -> None:
        super().__init__(size, image_size // patch_size, num_latent_tokens)
        self.is_legacy = is_legacy
        self.patch_embed = Conv(3, self.width, patch_size, stride=patch_size)
        self.conv_out = PointwiseConv(self.width, out_channels)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """Maps [B, 3, S, S] and [L, W] to [B, C, 1, L]."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B, P, W]
        latents = latent_tokens.expand(images.shape[0], -1, -1)  # [B, L, W]
        x = self.ln_post(self.transform(patches, latents, slice(1 + patches.shape[1], None)))
        if self.is_legacy:
            # The legacy weights were trained on this reinterpretation of memory, not a transpose.
            x = x.reshape(x.shape[0], self.width, 1, x.shape[1])  # [B, W, 1, L]
        else:
            x = x.transpose(1, 2).unsqueeze(2)  # [B, W, 1, L]
        out: Tensor = self.conv_out(x.to(self.conv_out.weight.dtype))  # [B, C, 1, L]
        return out


class TiTokDecoder(_ViT):
    """Quantized latents to proxy logits or pixels (arXiv 2406.07550, equation 4)."""

    def __init__(
        self,
        size: str | Mapping[str, int],
        image_size: int,
        patch_size: int,
        num_latent_tokens: int,
        token_size: int,
        *,
        is_legacy: bool,
    ) -> None:
        super().__init__(size, image_size // patch_size, num_latent_tokens)
        self.decoder_embed = Linear(token_size, self.width)
        self.mask_token = nn.Parameter(self.width**-0.5 * torch.randn(1, 1, self.width))
        self.ffn: nn.Module
        self.conv_out: nn.Module
        if is_legacy:
            self.ffn = nn.Sequential(
                Conv(self.width, 2 * self.width, 1),
                nn.Tanh(),
                Conv(2 * self.width, VQGAN_CODEBOOK_SIZE, 1),
            )
            self.conv_out = nn.Identity()
        else:
            self.ffn = nn.Sequential(
                Conv(self.width, 3 * patch_size**2, 1),
                Rearrange("b (p q c) h w -> b c (h p) (w q)", p=patch_size, q=patch_size),
            )
            self.conv_out = Conv(3, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Maps [B, C, 1, L] to proxy logits [B, 1024, G, G] (legacy) or pixels [B, 3, S, S]."""
        latents = self.decoder_embed(z.squeeze(2).transpose(1, 2))  # [B, L, W]
        num_patches = self.grid_size**2
        patches = self.mask_token.expand(z.shape[0], num_patches, -1)  # [B, P, W]
        x = self.ln_post(self.transform(patches, latents, slice(1, 1 + num_patches)))
        x = rearrange(x, "b (g h) w -> b w g h", g=self.grid_size)  # [B, W, G, G]
        out: Tensor = self.conv_out(self.ffn(x))
        return out


class TiTok(PretrainedModel):
    """The transformer-based one-dimensional tokenizer, all released variants and the 512 px ones.

    Three kinds of configuration, told apart by keys under `model.vq_model`:

    - legacy (`is_legacy` true or absent): the decoder predicts logits of the 1,024 proxy codes of
      `MaskGITVQGAN` for each patch. With `finetune_decoder` (the second training stage and every
      release; default true) their softmax weighs the proxy codebook into the pixel decoder, and
      encoder, quantizer and latent tokens are frozen. Without it (the first stage) there are no
      pixels in this model: `decode` refuses, and a `MaskGITVQGAN` makes the images, as
      `vqgan.decode(model.proxy_logits(tokens).argmax(1).flatten(1))`.
    - not legacy, `quantize_mode` "vq": the decoder predicts pixels.
    - not legacy, `quantize_mode` "vae": the same with continuous latents instead of tokens.

    Args:
        config: the official configuration as a mapping. `vit_enc_model_size` and
            `vit_dec_model_size` may also be a mapping of width, num_layers and num_heads.

    Attributes:
        image_size: height and width of the images in pixels.
        num_latent_tokens: tokens of an image, L.
        token_size: channels of a quantized latent, C.
        codebook_size: number of codes; None for a VAE variant.
        quantize_mode: "vq" or "vae".
        is_legacy: whether the decoder predicts proxy logits.
        finetune_decoder: whether the model holds the proxy codebook and the pixel decoder.
        interpolation: how the official evaluation resizes images, see `titok_fast.images`.

    Raises:
        ValueError: when a key is missing or its value is not allowed.
    """

    releases: ClassVar[Mapping[str, Release]] = {
        "titok-s-128": _release("titok_s128", _config(_LEGACY, 128, "small", "small")),
        "titok-b-64": _release("titok_b64", _config(_LEGACY, 64, "base", "base")),
        "titok-l-32": _release("titok_l32", _config(_LEGACY, 32, "large", "large")),
        "titok-bl-64-vq8k": _release("titok_bl64_vq8k", _config(_VQ8K, 64, "base", "large")),
        "titok-bl-128-vq8k": _release("titok_bl128_vq8k", _config(_VQ8K, 128, "base", "large")),
        "titok-sl-256-vq8k": _release("titok_sl256_vq8k", _config(_VQ8K, 256, "small", "large")),
        "titok-ll-32-vae": _release("titok_ll32_vae_c16", _config(_VAE, 32, "large", "large")),
        "titok-bl-64-vae": _release("titok_bl64_vae_c16", _config(_VAE, 64, "base", "large")),
        "titok-bl-128-vae": _release("titok_bl128_vae_c16", _config(_VAE, 128, "base", "large")),
        "titok-l-64-512": Release(_config(_LEGACY, 64, "large", "large", crop_size=512)),
        "titok-b-128-512": Release(_config(_LEGACY, 128, "base", "base", crop_size=512)),
        "titok-digits": Release(
            _config(_DIGITS, 16, _DIGITS_SIZE, _DIGITS_SIZE, crop_size=32, patch_size=8),
            folder=Path(__file__).parent / "data" / "titok-digits",
        ),
    }

    full_precision = ("encoder.conv_out", "quantize")
    config_key = "model.vq_model"
    interpolation = "bicubic"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        _check_config(self.config)
        vq = self.config["model"]["vq_model"]
        self.image_size: int = self.config["dataset"]["preprocessing"]["crop_size"]
        self.num_latent_tokens: int = vq["num_latent_tokens"]
        self.token_size: int = vq["token_size"]
        self.quantize_mode: str = vq.get("quantize_mode", "vq")
        self.codebook_size: int | None = vq["codebook_size"] if self.quantize_mode == "vq" else None
        self.is_legacy: bool = vq.get("is_legacy", True)
        self.finetune_decoder: bool = vq.get("finetune_decoder", True)

        self.encoder = TiTokEncoder(
            vq["vit_enc_model_size"],
            self.image_size,
            vq["vit_enc_patch_size"],
            self.num_latent_tokens,
            self.token_size * (2 if self.quantize_mode == "vae" else 1),
            is_legacy=self.is_legacy,
        )
        self.decoder = TiTokDecoder(
            vq["vit_dec_model_size"],
            self.image_size,
            vq["vit_dec_patch_size"],
            self.num_latent_tokens,
            self.token_size,
            is_legacy=self.is_legacy,
        )
        width = self.encoder.width
        self.latent_tokens = nn.Parameter(width**-0.5 * torch.randn(self.num_latent_tokens, width))
        self.apply(_init_weights)
        if self.quantize_mode == "vq":
            self.quantize = VectorQuantizer(
                vq["codebook_size"], self.token_size, vq["commitment_cost"], vq["use_l2_norm"]
            )
        if self.finetune_decoder:
            self.latent_tokens.requires_grad_(False)
            self.encoder.requires_grad_(False)
            self.quantize.requires_grad_(False)
            self.pixel_quantize = VectorQuantizer(VQGAN_CODEBOOK_SIZE, VQGAN_CONFIG["z_channels"])
            self.pixel_decoder = PixelDecoder(VQGAN_CONFIG)

    def latents(self, images: Tensor) -> Tensor:
        """The encoder's output before quantization; differentiable.

        Args:
            images: [B, 3, S, S] in [0, 1], floating, S = image_size.

        Returns:
            [B, L, C] in the dtype of `encoder.conv_out`, which `from_pretrained` and `cast` keep
            float32 in a 16-bit network; for a VAE variant mean and log-variance, [B, L, 2 C].

        Raises:
            TypeError: when images is not a floating tensor.
            ValueError: for another shape.
        """
        return self._latents(images).squeeze(2).transpose(1, 2)

    @torch.no_grad()
    def encode(
        self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Tokens of images, for inference: builds no graph.

        Args:
            images: [B, 3, S, S] in [0, 1], floating, S = image_size.
            sample: draw from the posterior of a VAE variant instead of taking its mean.
            generator: source of the draw, on the device of the images.

        Returns:
            [B, L] int64 in [0, codebook_size); for a VAE variant latents [B, L, C] float32.

        Raises:
            TypeError: when images is not a floating tensor.
            ValueError: for another shape, or `sample` on a model with a codebook.
        """
        if self.quantize_mode == "vae":
            posterior = DiagonalGaussian(self.latents(images))
            return posterior.sample(generator) if sample else posterior.mean
        if sample:
            raise ValueError("sample: got True, allowed is False for a model with a codebook")
        tokens: Tensor = self.quantize(self._latents(images))[1]["min_encoding_indices"]
        return tokens.squeeze(1)

    @torch.no_grad()
    def decode(self, tokens_or_latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Images of tokens, for inference: builds no graph.

        Args:
            tokens_or_latents: [B, L] int64 in [0, codebook_size); for a VAE variant latents
                [B, L, C], floating. A token out of range is an error here on the CPU, and a
                device-side assertion on a GPU.
            clamp: limit the pixels to [0, 1].

        Returns:
            [B, 3, S, S] in the dtype of the parameters.

        Raises:
            TypeError: for a dtype that the model does not decode.
            ValueError: for another shape, a token out of range, or a first-stage model, which has
                no pixel decoder.
        """
        if self.is_legacy and not self.finetune_decoder:
            raise ValueError(
                "tokens_or_latents: a first-stage model has no pixel decoder, use "
                "vqgan.decode(model.proxy_logits(tokens).argmax(1).flatten(1)) of a MaskGITVQGAN"
            )
        images = self._to_pixels(self.decoder(self._embed(tokens_or_latents)))
        return images.clamp(0, 1) if clamp else images

    def capture(
        self, batch_size: int
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """`encode` and `decode` of one batch size, each recorded as a CUDA graph.

        Args:
            batch_size: images a call, B.

        Returns:
            Functions from images [B, 3, S, S] in the dtype of the parameters to tokens or latents,
            and back. They see later changes of the parameters only if made in place.

        Raises:
            RuntimeError: the model is not on a CUDA device.
        """
        size, like = self.image_size, self.latent_tokens
        images = torch.zeros(batch_size, 3, size, size, dtype=like.dtype, device=like.device)
        encode = capture(self.encode, images)
        return encode, capture(self.decode, encode(images))

    def proxy_logits(self, tokens_or_latents: Tensor) -> Tensor:
        """The legacy decoder's logits of the proxy codes; differentiable in the decoder.

        Args:
            tokens_or_latents: as for `decode`.

        Returns:
            [B, 1024, G, G] in the dtype of the parameters, G = image_size / patch size.

        Raises:
            TypeError: for a dtype that the model does not decode.
            ValueError: for another shape, a token out of range, or a model that predicts pixels.
        """
        if not self.is_legacy:
            raise ValueError("proxy_logits: this model predicts pixels, is_legacy is false")
        logits: Tensor = self.decoder(self._embed(tokens_or_latents))
        return logits

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """One training pass, differentiable in all but frozen parameters.

        Args:
            images: [B, 3, S, S] in [0, 1], floating, S = image_size.

        Returns:
            What the training stage compares with its target, and the quantizer's results.

            The former is the proxy logits [B, 1024, G, G] of a first-stage legacy model, otherwise
            pixels [B, 3, S, S], not clamped. The latter is the dictionary of `VectorQuantizer`,
            with losses of zero where the quantizer is frozen, or {"posterior": DiagonalGaussian}
            for a VAE variant, whose latents are drawn.

        Raises:
            TypeError: when images is not a floating tensor.
            ValueError: for another shape.
        """
        result: dict[str, Any]
        if self.quantize_mode == "vae":
            posterior = DiagonalGaussian(self.latents(images))
            z = posterior.sample().transpose(1, 2).unsqueeze(2)  # [B, C, 1, L]
            result = {"posterior": posterior}
        elif self.finetune_decoder:
            with torch.no_grad():
                z, result = self.quantize(self._latents(images))  # [B, C, 1, L]
            for name in ("quantizer_loss", "commitment_loss", "codebook_loss"):
                result[name] = torch.zeros_like(result[name])
        else:
            z, result = self.quantize(self._latents(images))  # [B, C, 1, L]
        return self._to_pixels(self.decoder(z.to(self.latent_tokens.dtype))), result

    def _latents(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] to [B, C, 1, L]."""
        check_floating("images", images)
        size = self.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images: got shape {list(images.shape)}, allowed is [B, 3, {size}, {size}]"
            )
        out: Tensor = self.encoder(images.to(self.latent_tokens.dtype), self.latent_tokens)
        return out

    def _embed(self, tokens_or_latents: Tensor) -> Tensor:
        """Tokens [B, L] or latents [B, L, C] to the decoder's input [B, C, 1, L]."""
        shape: tuple[int, ...] = (self.num_latent_tokens,)
        if self.codebook_size is None:
            check_floating("tokens_or_latents", tokens_or_latents)
            shape = (self.num_latent_tokens, self.token_size)
        else:
            check_tokens("tokens_or_latents", tokens_or_latents, self.codebook_size)
        if tokens_or_latents.shape[1:] != shape:
            raise ValueError(
                f"tokens_or_latents: got shape {list(tokens_or_latents.shape)}, "
                f"allowed is [B, {', '.join(map(str, shape))}]"
            )
        z = tokens_or_latents
        if self.quantize_mode == "vq":
            z = self.quantize.get_codebook_entry(z.flatten())  # [B L, C]
            z = z.view(*tokens_or_latents.shape, self.token_size)  # [B, L, C]
        return z.to(self.latent_tokens.dtype).transpose(1, 2).unsqueeze(2)  # [B, C, 1, L]

    def _to_pixels(self, decoded: Tensor) -> Tensor:
        """The decoder's output to what `forward` returns."""
        if not self.finetune_decoder:
            return decoded
        codes = self.pixel_quantize.embedding.weight  # [1024, D]
        weights = decoded.permute(0, 2, 3, 1).softmax(-1)  # [B, G, G, 1024]
        z = (weights @ codes).permute(0, 3, 1, 2)  # [B, D, G, G], channels last
        return image_by_image(self.pixel_decoder, z)  # [B, 3, 16 G, 16 G]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _is_size(size: Any) -> bool:
    if isinstance(size, str):
        return size in _SIZES
    counted = isinstance(size, Mapping) and all(COUNT.fits(size.get(k)) for k in _SIZES["base"])
    return counted and fits_heads(size["width"], size["num_heads"])


_SIZE = Kind(
    f"{', '.join(_SIZES)} or a mapping of width, num_layers and num_heads, positive ints with "
    f"width / num_heads {HEAD_WIDTHS}",
    _is_size,
)
_KINDS = {
    "token_size": COUNT,
    "num_latent_tokens": COUNT,
    "vit_enc_model_size": _SIZE,
    "vit_enc_patch_size": COUNT,
    "vit_dec_model_size": _SIZE,
    "vit_dec_patch_size": COUNT,
}
_KINDS_OF_VQ = {"codebook_size": COUNT, "commitment_cost": NUMBER, "use_l2_norm": FLAG}
_OPTIONAL = {"quantize_mode": one_of("vq", "vae"), "is_legacy": FLAG, "finetune_decoder": FLAG}


def _check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless TiTok can be built from the configuration."""
    images = check_section(config, "dataset.preprocessing", {"crop_size": COUNT}, model="TiTok")
    vq = check_section(config, "model.vq_model", _KINDS, _OPTIONAL, model="TiTok")
    mode = vq.get("quantize_mode", "vq")
    if mode == "vq":
        check_section(config, "model.vq_model", _KINDS_OF_VQ, model="TiTok")
    for key in ("vit_enc_patch_size", "vit_dec_patch_size"):
        if images["crop_size"] % vq[key]:
            raise ValueError(
                f"config: model.vq_model.{key} is {vq[key]}, allowed is a divisor of crop_size "
                f"{images['crop_size']}"
            )
        length = 1 + (images["crop_size"] // vq[key]) ** 2 + vq["num_latent_tokens"]
        if length > MAX_LENGTH:
            raise ValueError(
                f"config: crop_size, model.vq_model.{key} and num_latent_tokens make a sequence of "
                f"{length}, allowed is up to {MAX_LENGTH}"
            )
    if vq.get("finetune_decoder", True) and (mode == "vae" or not vq.get("is_legacy", True)):
        raise ValueError(
            "config: model.vq_model.finetune_decoder is true (its default), allowed is false "
            "unless the model is_legacy with quantize_mode 'vq'"
        )
    if vq.get("finetune_decoder", True) and vq["vit_dec_patch_size"] != 16:
        raise ValueError(
            f"config: model.vq_model.vit_dec_patch_size is {vq['vit_dec_patch_size']}, allowed is "
            "16, by which the pixel decoder enlarges, with finetune_decoder"
        )
