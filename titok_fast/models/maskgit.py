"""MaskGIT: the masked generative transformer that samples a tokenizer's tokens in a few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from titok_fast.models.blocks import BertBlock, UViTBlock
from titok_fast.models.checks import (
    COUNT,
    DECAY,
    FLAG,
    HEAD_WIDTHS,
    NUMBER,
    SHARE,
    as_labels,
    check_fields,
    check_labels,
    check_section,
    check_tokens,
    fits_heads,
    one_of,
    replaced,
)
from titok_fast.models.cuda_graphs import capture, is_recording
from titok_fast.models.packed import PackableLinear
from titok_fast.models.pretrained import PretrainedModel, Release, evaluating
from titok_fast.ops import maskgit_step
from titok_fast.ops.attention import MAX_LENGTH

GUIDANCE_DECAYS = ("constant", "linear", "power-cosine")
RULES = ("titok", "maskgit")
# The share of positions that stay masked when a share r of the steps is done.
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "arccos": lambda r: math.acos(r) / (math.pi / 2),
    "cosine": lambda r: math.cos(r * math.pi / 2),
    "linear": lambda r: 1.0 - r,
    "root": lambda r: 1.0 - math.sqrt(r),
    "square": lambda r: 1.0 - r * r,
}

Noise = Callable[[int, str, tuple[int, ...]], Tensor]


# By number of tokens; the generators of 512 px were never released and take those of 256 px.
_SAMPLING: Mapping[int, Mapping[str, Any]] = {
    32: {
        "num_steps": 8,
        "randomize_temperature": 9.5,
        "guidance_scale": 4.5,
        "guidance_decay": "linear",
    },
    64: {
        "num_steps": 8,
        "randomize_temperature": 11.0,
        "guidance_scale": 3.0,
        "guidance_decay": "linear",
    },
    128: {
        "num_steps": 64,
        "randomize_temperature": 2.8,
        "guidance_scale": 6.9,
        "guidance_decay": "power-cosine",
    },
}


def _config(num_tokens: int, network: Mapping[str, Any]) -> Mapping[str, Any]:
    generator = {
        **network,
        "dropout": 0.1,
        "attn_drop": 0.1,
        "class_label_dropout": 0.1,
        "image_seq_len": num_tokens,
        "condition_num_classes": 1000,
        **_SAMPLING[num_tokens],
    }
    return {"model": {"vq_model": {"codebook_size": 4096}, "generator": generator}}


_VIT = {
    "model_type": "ViT",
    "hidden_size": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 3072,
}
_UVIT = {
    "model_type": "UViT",
    "hidden_size": 1024,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_DIGITS = {
    "model": {
        "vq_model": {"codebook_size": 256},
        "generator": {
            "model_type": "UViT",
            "hidden_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 2,
            "intermediate_size": 192,
            "image_seq_len": 16,
            "condition_num_classes": 10,
            "num_steps": 8,
            "randomize_temperature": 2.0,
            "guidance_scale": 1.5,
            "guidance_decay": "linear",
        },
    }
}


@dataclass(frozen=True)
class Sampling:
    """How `MaskGIT.generate` samples; the numbers of one step follow from these.

    Attributes:
        steps: number of sampling steps.
        guidance_scale: of classifier-free guidance; 0 uses none (with power-cosine decay, 1).
        guidance_decay: "constant"; "linear", growing from 0 over the steps; or "power-cosine",
            growing from 1, with which the scale weighs the unconditional logits.
        guidance_scale_pow: exponent of the power-cosine decay.
        randomize_temperature: of the noise; a step takes it times the share of the steps that are
            left after it, so that the last has none.
        softmax_temperature_annealing: divide the logits by 0.5 + 0.8 times that share: by 1.2 in
            the first of 8 steps, by 0.5 in the last.
        schedule: how many positions stay masked after each step, a key of `SCHEDULES`.
        rule: "titok" adds noise of one temperature to the draw of a token and to its confidence,
            the token's logit; "maskgit" draws tokens at temperature 1, adds noise to the confidence
            only, and takes the log-probability for it. That paper has the schedule "cosine" and no
            annealing.
    """

    steps: int
    guidance_scale: float
    guidance_decay: str
    randomize_temperature: float
    guidance_scale_pow: float = 3.0
    softmax_temperature_annealing: bool = True
    schedule: str = "arccos"
    rule: str = "titok"

    def __post_init__(self) -> None:
        check_fields(
            self,
            steps=COUNT,
            guidance_scale=NUMBER,
            guidance_decay=one_of(*GUIDANCE_DECAYS),
            randomize_temperature=NUMBER,
            guidance_scale_pow=NUMBER,
            softmax_temperature_annealing=FLAG,
            schedule=one_of(*SCHEDULES),
            rule=one_of(*RULES),
        )

    def num_masked(self, start: int) -> list[int]:
        """Positions that are masked after each step, of `start` at first."""
        counts: list[int] = []
        for step in range(1, self.steps):
            ratio = SCHEDULES[self.schedule](step / self.steps)
            left = (counts[-1] if counts else start) - 1
            counts.append(min(start, max(1, min(left, math.floor(start * ratio)))))
        return [*counts, 0]

    def guidance(self, step: int) -> float | None:
        """The guidance scale of a step; None where the unconditional logits do not matter."""
        if self.guidance_decay == "power-cosine":
            progress = (step / self.steps) ** self.guidance_scale_pow
            scale = 1.0 + (self.guidance_scale - 1.0) * (1.0 - math.cos(math.pi * progress)) / 2.0
            return None if scale == 1.0 else scale
        scale = self.guidance_scale
        if self.guidance_decay == "linear":
            scale = step / self.steps * self.guidance_scale
        return None if scale == 0.0 else scale

    def options(self, step: int) -> dict[str, Any]:
        """Arguments of `maskgit_step` that do not depend on the images."""
        left = 1.0 - (step + 1) / self.steps
        noise = self.randomize_temperature * left
        from_uncond = self.guidance_decay == "power-cosine"
        scale = self.guidance(step)
        return {
            "guidance_form": "uncond" if from_uncond else "cond",
            "guidance_scale": scale if scale is not None else float(from_uncond),
            "softmax_temperature": 0.5 + 0.8 * left if self.softmax_temperature_annealing else 1.0,
            "token_temperature": noise if self.rule == "titok" else 1.0,
            "confidence": "logit" if self.rule == "titok" else "log_probability",
            "confidence_temperature": noise,
        }


class MaskGIT(PretrainedModel):
    """The bidirectional transformer that generates TiTok's tokens (arXiv 2406.07550, section 3.4).

    It predicts every token of an image from those that are not masked and a class label, and is
    sampled as in MaskGIT (arXiv 2202.04200). There are two networks, with the official parameters
    of each: "ViT" is a BERT encoder, "UViT" has skip connections between its halves.

    Args:
        config: the official configuration as a mapping. `model.generator.model_type` is "ViT" (the
            default) or "UViT"; `num_steps`, `guidance_scale`, `guidance_decay` and
            `randomize_temperature`, where present, are the defaults of `generate`.

    Attributes:
        model_type: "ViT" or "UViT".
        codebook_size: number of the tokenizer's codes, V.
        num_tokens: tokens of an image, L.
        num_classes: class labels are below it.
        mask_id: the id of a masked position, V.
        sampling: the defaults of `generate`.

    Raises:
        ValueError: when a key is missing or its value is not allowed.
    """

    releases: ClassVar[Mapping[str, Release]] = {
        "maskgit-vit-l-32": Release(
            _config(32, _VIT),
            hub_id="yucornetto/generator_titok_l32_imagenet",
            checkpoint="generator_titok_l32.bin",
        ),
        "maskgit-vit-b-64": Release(
            _config(64, _VIT),
            hub_id="yucornetto/generator_titok_b64_imagenet",
            checkpoint="generator_titok_b64.bin",
        ),
        "maskgit-uvit-s-128": Release(
            _config(128, _UVIT),
            hub_id="yucornetto/generator_titok_s128_imagenet",
            checkpoint="generator_titok_s128.bin",
        ),
        "maskgit-vit-l-64-512": Release(_config(64, _VIT)),
        "maskgit-vit-b-128-512": Release(_config(128, _VIT)),
        "maskgit-digits": Release(
            _DIGITS, folder=Path(__file__).parent / "data" / "maskgit-digits"
        ),
    }
    config_key = "model.generator"

    _step = staticmethod(maskgit_step)  # an attribute, which a profile can time

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        _check_config(self.config)
        generator = self.config["model"]["generator"]
        self.model_type: str = generator.get("model_type", "ViT")
        self.codebook_size: int = self.config["model"]["vq_model"]["codebook_size"]
        self.num_tokens: int = generator["image_seq_len"]
        self.num_classes: int = generator["condition_num_classes"]
        self.mask_id = self.codebook_size
        width, depth = generator["hidden_size"], generator["num_hidden_layers"]
        vocabulary = self.codebook_size + self.num_classes + 2  # codes, mask, classes, no class
        self.sampling = Sampling(
            steps=generator.get("num_steps", 8),
            guidance_scale=generator.get("guidance_scale", 3.0),
            guidance_decay=generator.get("guidance_decay", "constant"),
            randomize_temperature=generator.get("randomize_temperature", 4.5),
        )
        sizes = (width, generator["intermediate_size"], generator["num_attention_heads"])
        head = PackableLinear(width, self.codebook_size)
        if self.model_type == "ViT":
            dropout = generator.get("dropout", 0.0), generator.get("attn_drop", 0.0)
            blocks = (BertBlock(*sizes, *dropout) for _ in range(depth))
            self.model = nn.ModuleDict(
                {
                    "embeddings": _BertEmbeddings(
                        vocabulary, self.num_tokens + 1, width, dropout[0]
                    ),
                    "encoder": nn.ModuleDict({"layer": nn.ModuleList(blocks)}),
                    "lm_head": head,
                }
            )
        else:
            self.embeddings = nn.Embedding(vocabulary, width)
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.num_tokens + 1, width))
            self.in_blocks = nn.ModuleList(UViTBlock(*sizes) for _ in range(depth // 2))
            self.mid_block = UViTBlock(*sizes)
            self.out_blocks = nn.ModuleList(UViTBlock(*sizes, skip=True) for _ in range(depth // 2))
            self.norm = nn.LayerNorm(width)
            self.lm_head = head
        self.apply(_init_weights)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """The same as `logits`."""
        return self.logits(ids, labels)

    def logits(self, ids: Tensor, labels: Tensor | None) -> Tensor:
        """Logits of the codes at every position; differentiable.

        Args:
            ids: [B, L] int64, codes in [0, V) or the mask id V.
            labels: [B] int64 in [0, num_classes]; num_classes itself, or None for the whole batch,
                is the prediction without a class.

        Returns:
            [B, L, V] in the dtype of the parameters.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape, or on the CPU an id or label out of range.
        """
        check_tokens("ids", ids, self.codebook_size + 1)
        if ids.shape[1] != self.num_tokens:
            raise ValueError(f"ids: got shape {list(ids.shape)}, allowed is [B, {self.num_tokens}]")
        if labels is None:
            labels = ids.new_full((ids.shape[0],), self.num_classes)
        check_labels(labels, ids.shape[0], self.num_classes)
        return self._head(self._hidden(ids, labels))

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor | Sequence[int],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_decay: str | None = None,
        guidance_scale_pow: float | None = None,
        randomize_temperature: float | None = None,
        softmax_temperature_annealing: bool | None = None,
        schedule: str | None = None,
        rule: str | None = None,
        seed: int | Tensor = 0,
        image_ids: Tensor | None = None,
        ids: Tensor | None = None,
        noise: Noise | None = None,
        return_steps: bool = False,
        backend: str = "auto",
    ) -> Tensor:
        """Samples the tokens of one image for each label.

        An image depends on the seed, its id, its label and the model alone, not on the images
        around it (up to rounding in the network's matrix products, which may depend on the batch).
        The network runs in evaluation mode, whatever the mode of the model.

        Args:
            labels: [B] int64 in [0, num_classes], or a sequence of them; num_classes is no class.
            steps: number of sampling steps; None here and below is the value in `sampling`.
            guidance_scale: of classifier-free guidance, see `Sampling`.
            guidance_decay: "constant", "linear" or "power-cosine".
            guidance_scale_pow: exponent of the power-cosine decay.
            randomize_temperature: of the noise, see `Sampling`.
            softmax_temperature_annealing: see `Sampling`.
            schedule: "arccos", "cosine", "linear", "root" or "square".
            rule: "titok" or "maskgit", see `Sampling`.
            seed: in [0, 2**63).
            image_ids: [B] int64, the number of each image in the whole run; None counts from 0.
            ids: [B, L] int64 to keep, with the mask id V where tokens are to be generated; None
                generates all. This is editing and inpainting among tokens.
            noise: `noise(step, kind, shape)` gives float32 uniforms in [0, 1) in place of the
                seed's: "token" of shape [B, L, V], then "confidence" [B, L], as the official code
                draws them.
            return_steps: return the ids before the first step and after each.
            backend: of `maskgit_step`.

        Returns:
            [B, L] int64 in [0, V), on the model's device; with return_steps [steps + 1, B, L], in
            which V is a masked position.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape, an unknown option or a number out of range.
        """
        device = self._head_layer.weight.device
        labels = as_labels(labels, self.num_classes, device)
        sampling = replaced(
            self.sampling,
            "MaskGIT",
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_decay=guidance_decay,
            guidance_scale_pow=guidance_scale_pow,
            randomize_temperature=randomize_temperature,
            softmax_temperature_annealing=softmax_temperature_annealing,
            schedule=schedule,
            rule=rule,
        )
        batch, length = labels.shape[0], self.num_tokens
        fresh = ids is None
        if ids is None:
            ids = torch.full((batch, length), self.mask_id, device=device)
            starts = [length] * batch
        else:
            check_tokens("ids", ids, self.codebook_size + 1)
            if ids.shape != (batch, length):
                raise ValueError(
                    f"ids: got shape {list(ids.shape)}, allowed is [{batch}, {length}]"
                )
            ids = ids.to(device)
            starts = (ids == self.mask_id).sum(1).tolist()
        if image_ids is None:
            image_ids = torch.arange(batch, device=device)
        counts = [sampling.num_masked(start) for start in starts]  # [B][steps]
        # As many positions are masked in every image, or the head takes them all.
        together = len(set(starts)) == 1
        masked = starts[0] if together else length

        history = [ids]
        with evaluating(self):
            for step in range(sampling.steps):
                positions = None
                if masked < length:
                    order = (ids != self.mask_id).to(torch.uint8).argsort(dim=1, stable=True)
                    positions = order[:, :masked]  # [B, masked], ascending
                cond, uncond = self._branches(
                    ids,
                    labels,
                    positions,
                    guided=sampling.guidance(step) is not None,
                    alike=fresh and step == 0,
                )
                uniforms = None
                if noise is not None:
                    of_tokens = noise(step, "token", (batch, length, self.codebook_size)).to(device)
                    of_confidence = noise(step, "confidence", (batch, length)).to(device)
                    uniforms = _gather(of_tokens, positions), _gather(of_confidence, positions)
                left = [row[step] for row in counts]
                drawn, _, _ = self._step(
                    cond,
                    _gather(ids, positions),
                    mask_id=self.mask_id,
                    num_masked=left[0]
                    if together
                    else torch.tensor(left, dtype=torch.int64, device=device),
                    uncond_logits=uncond,
                    seed=seed,
                    step=step,
                    image_ids=image_ids,
                    positions=positions,
                    noise=uniforms,
                    backend=backend,
                    **sampling.options(step),
                )
                ids = drawn if positions is None else ids.scatter(1, positions, drawn)
                masked = left[0] if together else length
                history = [*history, ids] if return_steps else []
        return torch.stack(history) if return_steps else ids

    def capture(self, batch_size: int, **options: Any) -> Callable[..., Tensor]:
        """`generate` for one batch size, all its steps recorded as one CUDA graph.

        Args:
            batch_size: labels a call, B.
            **options: of `generate`, but for labels, seed, image_ids, ids, noise and return_steps.

        Returns:
            `function(labels [B], seed [], image_ids [B])` to tokens [B, L], all of them int64 on
            its device. It sees later changes of the parameters only if made in place.

        Raises:
            RuntimeError: the model is not on a CUDA device.
        """
        labels = torch.zeros(batch_size, dtype=torch.int64, device=self._head_layer.weight.device)

        def run(labels: Tensor, seed: Tensor, image_ids: Tensor) -> Tensor:
            return self.generate(labels, seed=seed, image_ids=image_ids, **options)

        return capture(run, labels, labels.new_zeros(()), torch.arange(batch_size).to(labels))

    def _branches(
        self, ids: Tensor, labels: Tensor, positions: Tensor | None, *, guided: bool, alike: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Logits at `positions` with the labels and, if guided, without, from one pass.

        Images that are `alike` but for their label are done once for each label.
        """
        batch, index = ids.shape[0], None
        nothing = torch.full_like(labels, self.num_classes)
        if alike and batch and not torch.compiler.is_compiling() and not is_recording(ids):
            labels, index = labels.unique(return_inverse=True)
            ids, nothing = ids[:1].expand(labels.shape[0], -1), nothing[:1]
        if guided:
            ids, labels = torch.cat([ids, ids[: nothing.shape[0]]]), torch.cat([labels, nothing])
            positions = None if positions is None else torch.cat([positions, positions])
        logits = self._head(_gather(self._hidden(ids, labels), positions))
        if logits.dtype == torch.float64:  # which no sampling op takes
            logits = logits.float()
        if not guided:
            return (logits if index is None else logits[index]), None
        split = logits.shape[0] - nothing.shape[0]
        cond, uncond = logits[:split], logits[split:]
        if index is not None:
            return cond[index], uncond.expand(batch, -1, -1)
        return cond, uncond

    @property
    def _head_layer(self) -> nn.Linear:
        network: Any = self.model if self.model_type == "ViT" else self
        head: nn.Linear = network.lm_head
        return head

    def _head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head_layer(hidden)  # [B, L, V]
        return logits

    def _hidden(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Ids [B, L] and labels [B] to what the head takes, [B, L, W]."""
        tokens = torch.cat([labels[:, None] + self.codebook_size + 1, ids], dim=1)  # [B, 1 + L]
        if self.model_type == "ViT":
            network: Any = self.model
            x: Tensor = network.embeddings(tokens)  # [B, 1 + L, W]
            for block in network.encoder.layer:
                x = block(x)
            return x[:, 1:]
        x = self.embeddings(tokens) + self.pos_embed  # [B, 1 + L, W]
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.norm(x[:, 1:])
        return x


class _BertEmbeddings(nn.Module):
    """Sum of a token's, its position's and the only segment's vector, normalised."""

    def __init__(self, vocabulary: int, length: int, width: int, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(length, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word_embeddings(tokens) + self.token_type_embeddings.weight[0]
        x = self.LayerNorm(x + self.position_embeddings.weight)
        out: Tensor = self.dropout(x)
        return out


def _gather(values: Tensor, positions: Tensor | None) -> Tensor:
    """Rows [B, L, ...] at positions [B, M]; all without."""
    if positions is None:
        return values
    return torch.take_along_dim(
        values, positions.reshape(*positions.shape, *[1] * (values.ndim - 2)), dim=1
    )


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


_KINDS = {
    "hidden_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "intermediate_size": COUNT,
    "image_seq_len": COUNT,
    "condition_num_classes": COUNT,
}
_OPTIONAL = {
    "model_type": one_of("ViT", "UViT"),
    "dropout": SHARE,
    "attn_drop": DECAY,
    "num_steps": COUNT,
    "guidance_scale": NUMBER,
    "guidance_decay": one_of(*GUIDANCE_DECAYS),
    "randomize_temperature": NUMBER,
}


def _check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless MaskGIT can be built from the configuration."""
    check_section(config, "model.vq_model", {"codebook_size": COUNT}, model="MaskGIT")
    generator = check_section(config, "model.generator", _KINDS, _OPTIONAL, model="MaskGIT")
    width, heads = generator["hidden_size"], generator["num_attention_heads"]
    if not fits_heads(width, heads):
        raise ValueError(
            f"config: model.generator.hidden_size is {width} with {heads} num_attention_heads, "
            f"allowed is a width of {HEAD_WIDTHS} for each"
        )
    if generator["image_seq_len"] >= MAX_LENGTH:
        raise ValueError(
            f"config: model.generator.image_seq_len is {generator['image_seq_len']}, allowed is "
            f"below {MAX_LENGTH}"
        )
