"""The Llama-style transformer that generates IBQ's tokens one after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from titok_fast.models.blocks import (
    CausalSelfAttention,
    KVCache,
    LlamaBlock,
    SwiGLU,
    decode_layer,
)
from titok_fast.models.checks import (
    COUNT,
    DECAY,
    NUMBER,
    POSITIVE,
    SHARE,
    WHOLE,
    as_labels,
    check_fields,
    check_labels,
    check_section,
    check_tokens,
    one_of,
    or_none,
    replaced,
)
from titok_fast.models.cuda_graphs import capture, is_recording, recording
from titok_fast.models.packed import PackableLinear, packed, untouched
from titok_fast.models.pretrained import PretrainedModel, Release, evaluating
from titok_fast.models.widened import Linear
from titok_fast.ops import sample_token
from titok_fast.ops.arguments import python_number, without_autocast
from titok_fast.ops.decode_attention import MAX_HEAD_WIDTH
from titok_fast.ops.decode_linear import MAX_ROWS

CLASS_DROPOUT = 0.1  # share of labels that training replaces by no class, for guidance


def _release(size: str, depth: int, alng: float, guidance: float, temperature: float) -> Release:
    return Release(
        {
            "vocab_size": 16384,
            "block_size": 256,
            "n_layer": depth,
            "n_head": depth,
            "n_embd": 64 * depth,
            "cond_dim": 64 * depth,
            "class_num": 1000,
            "alng": alng,
            "resid_dropout_p": 0.1,
            "ffn_dropout_p": 0.1,
            "token_drop": 0.1,
            "drop_path_rate": 0.0,
            "guidance_scale": guidance,
            "temperature": temperature,
        },
        hub_id=f"TencentARC/IBQ-AR-{size}",
        hub_file=f"AR_256_{size}.ckpt",
        checkpoint=f"AR_256_{size}.ckpt",
    )


@dataclass(frozen=True)
class ARSampling:
    """How `ARTransformer.generate` draws a token.

    Attributes:
        guidance_scale: s of classifier-free guidance, uncond + s (cond - uncond); 1 uses none.
        temperature: divides the logits; 0 takes the largest.
        top_k: number of tokens to draw from at most; 0 is all.
        top_p: share of the probability to draw from, the most probable tokens first.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, guidance_scale=NUMBER, temperature=NUMBER, top_k=WHOLE, top_p=SHARE)


class _HeadNorm(nn.Module):
    """RMSNorm modulated by the class, before the logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rmsnorm = nn.RMSNorm(width, eps=1e-5)
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def modulation(self, condition: Tensor) -> Tensor:
        scale, shift = self.ada_lin(condition).chunk(2, dim=-1)
        return torch.stack([scale + 1, shift])  # [2, B, 1, W]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)
        return torch.addcmul(shift, self.rmsnorm(x), scale)


class ARTransformer(PretrainedModel):
    """The autoregressive transformer that generates IBQ's tokens (arXiv 2412.02692, section 3.3).

    It predicts each token of an image, row by row, from those before it and a class label, which is
    the start of the sequence and modulates every block.

    Args:
        config: the arguments of the official network as a mapping, or the training file that has
            them in model.init_args.transformer_config.params: vocab_size, block_size, n_layer,
            n_head, n_embd, and where they differ from the official defaults cond_dim, class_num,
            n_kv_head, multiple_of, ffn_dim_multiplier, rope_base, norm_eps, alng, token_drop,
            attn_dropout_p, resid_dropout_p, ffn_dropout_p and drop_path_rate; guidance_scale and
            temperature, where present, are the defaults of `generate`.

    Attributes:
        codebook_size: number of the tokenizer's codes, V.
        num_tokens: tokens of an image, L, a square number.
        num_classes: class labels are below it.

    Raises:
        ValueError: when a key is missing or its value is not allowed.
    """

    config_key = "n_embd"
    config_within = "model.init_args.transformer_config.params"
    checkpoint_prefixes = ("", "transformer.")
    checkpoint_ignored = ("*.kv_cache.*", "freqs_cis", "causal_mask")

    releases: ClassVar[Mapping[str, Release]] = {
        "ibq-ar-b": _release("B", 16, 1e-3, 2.25, 1.10),
        "ibq-ar-l": _release("L", 20, 1e-3, 2.0, 1.0),
        "ibq-ar-xl": _release("XL", 24, 1e-4, 2.35, 1.15),
        "ibq-ar-xxl": _release("XXL", 30, 1e-5, 2.85, 1.20),
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        given = {**_DEFAULTS, **self.config}
        _check_config(given)
        width, heads, depth = given["n_embd"], given["n_head"], given["n_layer"]
        kv_heads = given["n_kv_head"] or heads
        self.codebook_size: int = given["vocab_size"]
        self.num_tokens: int = given["block_size"]
        self.num_classes: int = given["class_num"]
        self.sampling = ARSampling(given["guidance_scale"], given["temperature"])
        self.kv_shape = (kv_heads, 1 + self.num_tokens, width // heads)
        hidden = int(8 * width / 3)
        if given["ffn_dim_multiplier"] is not None:
            hidden = int(given["ffn_dim_multiplier"] * hidden)
        hidden = math.ceil(hidden / given["multiple_of"]) * given["multiple_of"]

        self.tok_emb = nn.Embedding(self.codebook_size, width)
        self.class_emb = nn.ModuleDict(
            {"embedding_table": nn.Embedding(self.num_classes + 1, width)}
        )
        self.token_drop = nn.Dropout(given["token_drop"])
        self.blocks = nn.ModuleList(
            LlamaBlock(
                CausalSelfAttention(
                    width, heads, kv_heads, given["attn_dropout_p"], given["resid_dropout_p"]
                ),
                SwiGLU(width, hidden, given["ffn_dropout_p"]),
                width,
                given["norm_eps"],
                given["drop_path_rate"] * i / max(1, depth - 1),
            )
            for i in range(depth)
        )
        self.head_nm = _HeadNorm(width)
        self.head = PackableLinear(width, self.codebook_size, bias=False)
        self._rotary = math.isqrt(self.num_tokens), width // heads, given["rope_base"]
        self._init_weights(given["initalizer_range"], given["alng"])

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The same as `logits`."""
        return self.logits(tokens, labels)

    def logits(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Logits of each token given those before it; differentiable.

        Training mode replaces a tenth of the labels by no class. The loss is the cross-entropy
        of `logits(tokens[:, :-1], labels)` and `tokens`.

        Args:
            tokens: [B, T] int64 in [0, V), the first T of an image, T from 0 to L.
            labels: [B] int64 in [0, num_classes]; num_classes itself is no class.

        Returns:
            [B, T + 1, V] in the dtype of the parameters; entry t is of token t.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape, or on the CPU a token or label out of range.
        """
        check_tokens("tokens", tokens, self.codebook_size)
        batch, length = tokens.shape
        if length > self.num_tokens:
            raise ValueError(
                f"tokens: got shape {list(tokens.shape)}, allowed is [B, T] with T up to "
                f"{self.num_tokens}"
            )
        check_labels(labels, batch, self.num_classes)
        if self.training:
            dropped = torch.rand(batch, device=labels.device) < CLASS_DROPOUT
            labels = labels.masked_fill(dropped, self.num_classes)
        condition = self.condition(labels)
        x = self.token_drop(torch.cat([condition, self.tok_emb(tokens)], dim=1))
        rotation = self.rotation()[: length + 1]
        return self._whole(x, condition, rotation)

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor | Sequence[int],
        *,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_tokens: int | None = None,
        prefix: Tensor | None = None,
        seed: int | Tensor = 0,
        image_ids: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Samples the tokens of one image for each label.

        An image depends on the seed, its id, its label and the model alone, not on the images
        around it (up to rounding in the network's matrix products, which may depend on the batch).
        The network runs in evaluation mode and in the dtype of its parameters, whatever the mode of
        the model and autocast. With a hook on a block or a part of one, or another module in its
        place, every step runs over all positions so far, which takes far longer.

        Args:
            labels: [B] int64 in [0, num_classes], or a sequence of them; num_classes is no class.
            guidance_scale: here and below see `ARSampling`; None is the release's default.
            temperature: divides the logits.
            top_k: number of tokens to draw from at most.
            top_p: share of the probability to draw from.
            num_tokens: how many tokens to end with, `prefix` included; None is a whole image, L.
            prefix: [B, P] int64, the first tokens of each image, to go on from.
            seed: in [0, 2**63).
            image_ids: [B] int64, the number of each image in the whole run; None counts from 0.
            backend: of `sample_token`; the network's ops take their "auto".

        Returns:
            [B, num_tokens] int64 in [0, V), row by row, on the model's device.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape or a number out of range.
        """
        device = self.head.weight.device
        labels = as_labels(labels, self.num_classes, device)
        count = self.num_tokens if num_tokens is None else python_number(num_tokens)
        prefix = labels.new_zeros(len(labels), 0) if prefix is None else prefix
        check_tokens("prefix", prefix, self.codebook_size, "B, P")
        if len(prefix) != len(labels) or prefix.shape[1] > self.num_tokens:
            raise ValueError(
                f"prefix: got shape {list(prefix.shape)}, allowed is [{len(labels)}, P] with P up "
                f"to {self.num_tokens}"
            )
        if not isinstance(count, int) or not prefix.shape[1] <= count <= self.num_tokens:
            raise ValueError(
                f"num_tokens: got {count!r}, allowed is an int from {prefix.shape[1]} to "
                f"{self.num_tokens}"
            )
        sampling = replaced(
            self.sampling,
            "ARTransformer",
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        if prefix.shape[1] == count:
            return prefix.to(device, copy=True)
        decoding = Decoding(self, len(labels), sampling, backend)
        positions = torch.arange(prefix.shape[1], count, device=device)
        packing = packed(self) if decoding.rows > MAX_ROWS else nullcontext()
        with packing, torch.autocast(device.type, enabled=False):
            decoding.start(labels, prefix.to(device), seed, image_ids)
            for position in positions.split(1):
                decoding.step(position)
        return decoding.tokens[:, 1 : count + 1]

    def capture(self, batch_size: int, **options: Any) -> Callable[..., Tensor]:
        """`generate` for one batch size, the step from a token to the next as a CUDA graph.

        Args:
            batch_size: labels a call, B.
            **options: of `ARSampling`.

        Returns:
            `function(labels [B], seed [], image_ids [B])` to tokens [B, L], all of them int64 on
            its device. It sees later changes of the parameters only if made in place.

        Raises:
            RuntimeError: the model is not on a CUDA device.
            ValueError: an unknown option or a number out of range.
        """
        sampling = replaced(self.sampling, "ARTransformer", **options)
        device = self.head.weight.device
        with recording(device):
            decoding = Decoding(self, batch_size, sampling, "auto")
            labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
            nothing = labels.new_zeros(batch_size, 0)
            positions = torch.arange(self.num_tokens, device=device)
            decoding.start(labels, nothing, labels.new_zeros(()), None)
        step = capture(decoding.step, positions[:1])

        @torch.no_grad()
        def run(labels: Tensor, seed: Tensor, image_ids: Tensor) -> Tensor:
            check_labels(labels, batch_size, self.num_classes)
            with without_autocast(labels):
                decoding.start(labels, nothing, seed, image_ids)
            for position in positions.split(1):
                tokens = step(position)
            return tokens[:, 1:]

        return run

    def condition(self, labels: Tensor) -> Tensor:
        """Class embeddings [B, 1, W]."""
        table: Any = self.class_emb["embedding_table"]
        condition: Tensor = table(labels)[:, None]
        return condition

    def rotation(self) -> Tensor:
        """Rotary embedding of every position, [1 + L, Dh / 2, 2] float32 on the model's device."""
        return _rotation(*self._rotary).to(self.head.weight.device)

    def modulations(self, condition: Tensor) -> list[Tensor]:
        """Of each block and of the head."""
        layers: list[Any] = [*self.blocks, self.head_nm]
        return [layer.modulation(condition) for layer in layers]

    def network(
        self,
        x: Tensor,
        condition: Tensor,
        rotation: Tensor,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """Embeddings [B, T, W] of the first T positions through the blocks, which fill caches."""
        for i, block in enumerate(self.blocks):
            x = block(x, condition, rotation, None if caches is None else caches[i])
        return x

    def _whole(self, x: Tensor, condition: Tensor, rotation: Tensor) -> Tensor:
        """Embeddings [B, T, W] of the first T positions to logits [B, T, V]."""
        x = self.network(x, condition, rotation)
        logits: Tensor = self.head(self.head_nm(x, condition))
        return logits

    def decodes(self) -> bool:
        """Whether `decode` does what `logits` does: no block or part is replaced or watched."""
        blocks: Any = self.blocks
        ordinary = untouched(self.head_nm, _HeadNorm) and untouched(self.token_drop, nn.Dropout)
        return ordinary and all(
            isinstance(block, LlamaBlock) and block.decodes() for block in blocks
        )

    def decode(
        self,
        x: Tensor,
        modulations: Sequence[Sequence[Tensor]],
        rotation: Tensor,
        caches: Sequence[KVCache],
        position: Tensor,
    ) -> Tensor:
        """Embeddings [B, W] of one position [1] int64 to its logits [B, V], by the caches."""
        for i, block in enumerate(self.blocks):
            layer: Any = block
            x = layer.decode(x, modulations[i], rotation, caches[i], position)
        scale, shift = modulations[-1]
        return decode_layer(x, self.head, norm=(self.head_nm.rmsnorm, scale, shift))

    def _init_weights(self, std: float, gate: float) -> None:
        """The official initialisation: gates almost closed, all logits zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for block in self.blocks:
                layer: Any = block.ada_lin
                gates, rest = layer[1].weight.split(
                    [2 * layer[1].in_features, 4 * layer[1].in_features]
                )
                gates.mul_(gate)
                rest.mul_(0.5)
            last: Any = self.head_nm.ada_lin
            last[1].weight.mul_(0.5)
        nn.init.zeros_(self.head.weight)


class Decoding:
    """A batch that is being generated; where its tensors are does not change.

    Args:
        model: that generates.
        batch: number of images, B.
        sampling: how tokens are drawn.
        backend: of `sample_token`.

    Attributes:
        tokens: [B, 1 + L] int64, the first column standing for the class.
        rows: of the network's batch, B, or with guidance 2 B.
    """

    def __init__(
        self, model: ARTransformer, batch: int, sampling: ARSampling, backend: str
    ) -> None:
        weight = model.tok_emb.weight
        self._model, self._options = model, {**asdict(sampling), "backend": backend}
        self._guided = sampling.guidance_scale != 1
        self.rows = 2 * batch if self._guided else batch
        self._caches = [KVCache((self.rows, *model.kv_shape), weight) for _ in model.blocks]
        length = model.kv_shape[1]
        self.tokens = torch.zeros(batch, length, dtype=torch.int64, device=weight.device)
        self._rotation = model.rotation()
        self._state: list[Tensor] = []
        self._by_cache = model.decodes()
        if not self._by_cache and is_recording(weight):
            raise RuntimeError("capture: the model has a hook or a replaced part, allowed is none")

    def start(
        self, labels: Tensor, prefix: Tensor, seed: int | Tensor, image_ids: Tensor | None
    ) -> None:
        """Sets the labels [B] and the first tokens [B, P] of other images."""
        model = self._model
        if image_ids is None:
            image_ids = torch.arange(len(labels), device=labels.device)
        if self._guided:
            labels = torch.cat([labels, torch.full_like(labels, model.num_classes)])
        distinct, rows = labels.unique(return_inverse=True)
        condition = model.condition(distinct)
        modulations = [of_label[:, rows] for of_label in model.modulations(condition)]
        state = [image_ids, condition[rows], *modulations]
        if isinstance(seed, Tensor):
            state.append(seed)
        if self._state:
            for old, new in zip(self._state, state, strict=True):
                old.copy_(new)
        else:
            self._state = state
        self._seed = self._state[-1] if isinstance(seed, Tensor) else seed
        self._image_ids, self._condition, *modulations = self._state[: 2 + len(modulations)]
        self._parts = [of_layer[:, :, 0].unbind() for of_layer in modulations]
        count = prefix.shape[1]
        self.tokens[:, 1 : count + 1] = prefix
        if count and self._by_cache:
            x = torch.cat([self._condition, self._embedded(prefix[:, :-1])], dim=1)
            with evaluating(model):
                model.network(x, self._condition, self._rotation[:count], self._caches)

    def step(self, position: Tensor) -> Tensor:
        """Draws the token at a position [1] int64; returns `tokens`."""
        logits = self._logits(position)
        if logits.dtype == torch.float64:  # which no sampling op takes
            logits = logits.float()
        cond, uncond = logits.chunk(2) if self._guided else (logits, None)
        drawn = sample_token(
            cond,
            uncond_logits=uncond,
            seed=self._seed,
            step=position.view(()),
            image_ids=self._image_ids,
            **self._options,
        )
        self.tokens.index_copy_(1, position + 1, drawn[:, None])
        return self.tokens

    def _logits(self, position: Tensor) -> Tensor:
        """Of the token at a position, [rows, V]."""
        model = self._model
        if not self._by_cache:  # hooks and other modules expect whole sequences
            count = int(position)
            x = torch.cat([self._condition, self._embedded(self.tokens[:, 1 : count + 1])], dim=1)
            with evaluating(model):
                rotation = self._rotation[: count + 1]
                return model._whole(model.token_drop(x), self._condition, rotation)[:, -1]
        last = self._embedded(self.tokens.index_select(1, position))
        x = torch.where(position == 0, self._condition, last)[:, 0]  # [rows, W]
        return model.decode(x, self._parts, self._rotation, self._caches, position)

    def _embedded(self, tokens: Tensor) -> Tensor:
        """Of tokens [B, T], for both branches of guidance."""
        x: Tensor = self._model.tok_emb(tokens)
        return torch.cat([x, x]) if self._guided else x


_DEFAULTS: Mapping[str, Any] = {
    "class_num": 1000,
    "n_kv_head": None,
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "rope_base": 10000,
    "norm_eps": 1e-5,
    "alng": 1e-3,
    "initalizer_range": 0.02,
    "token_drop": 0.1,
    "attn_dropout_p": 0.0,
    "resid_dropout_p": 0.0,
    "ffn_dropout_p": 0.1,
    "drop_path_rate": 0.0,
    "guidance_scale": 1.0,
    "temperature": 1.0,
}


_KINDS = {
    "vocab_size": COUNT,
    "block_size": COUNT,
    "n_layer": COUNT,
    "n_head": COUNT,
    "n_embd": COUNT,
    "class_num": COUNT,
    "n_kv_head": or_none(COUNT),
    "multiple_of": COUNT,
    "ffn_dim_multiplier": or_none(POSITIVE),
    "rope_base": POSITIVE,
    "norm_eps": NUMBER,
    "alng": NUMBER,
    "initalizer_range": NUMBER,
    "token_drop": SHARE,
    "attn_dropout_p": SHARE,
    "resid_dropout_p": SHARE,
    "ffn_dropout_p": SHARE,
    "drop_path_rate": DECAY,
    "guidance_scale": NUMBER,
    "temperature": NUMBER,
}
# As all releases have it.
_FIXED = {
    "cls_token_num": one_of(1),
    "shared_aln": one_of(False),
    "use_pretrained_codebook": one_of(False),
}


def _check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless ARTransformer can be built from the configuration."""
    check_section(config, "", _KINDS, _FIXED, model="ARTransformer")
    width, heads = config["n_embd"], config["n_head"]
    kv_heads = config["n_kv_head"] or heads
    for key, allowed, right in (
        ("block_size", "a square number", math.isqrt(config["block_size"]) ** 2),
        ("cond_dim", f"n_embd {width}", width),
    ):
        if config.get(key, right) != right:
            raise ValueError(f"config: {key} is {config[key]!r}, allowed is {allowed}")
    if width % (4 * heads):
        raise ValueError(f"config: n_embd is {width}, allowed is a multiple of 4 n_head {heads}")
    if width // heads > MAX_HEAD_WIDTH:
        raise ValueError(
            f"config: n_embd / n_head is {width // heads}, allowed is up to {MAX_HEAD_WIDTH}"
        )
    if heads % kv_heads:
        raise ValueError(f"config: n_kv_head is {kv_heads}, allowed is a divisor of n_head {heads}")


def _rotation(side: int, head_dim: int, base: float) -> Tensor:
    """Rotations [1 + side^2, Dh / 2, 2] as cosine and sine, a half by row and a half by column.

    That of the class, which stands first, is zero: it erases its query and key, as trained.
    """
    half = head_dim // 2
    frequencies = base ** -(torch.arange(0, half, 2).float() / half)
    angles = torch.arange(side).float()[:, None] * frequencies  # [side, Dh / 4]
    grid = torch.cat(
        [angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)], dim=-1
    ).flatten(0, 1)  # [side^2, Dh / 2]
    rotations = torch.stack([grid.cos(), grid.sin()], dim=-1)
    return torch.cat([torch.zeros_like(rotations[:1]), rotations])
