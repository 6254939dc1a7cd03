"""Transformer blocks; one class per layout of the official parameters, over shared functions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from titok_fast.models.packed import PackableLinear, PackableMatrix, gelu_of, ordinary, untouched
from titok_fast.models.widened import Linear
from titok_fast.ops.arguments import DTYPES
from titok_fast.ops.attention import attention
from titok_fast.ops.decode_attention import decode_attention
from titok_fast.ops.decode_linear import MAX_ROWS, decode_linear, has_fast_backend
from titok_fast.reference.decode_attention import rotate


def attend(qkv: Tensor, num_heads: int, dropout: float = 0.0) -> Tensor:
    """`attention` of packed projections: [B, L, 3 W] to [B, L, W]."""
    qkv = rearrange(qkv, "b l (n h d) -> b l n h d", n=3, h=num_heads)  # [B, L, 3, H, Dh]
    return attention(qkv, dropout_p=dropout).flatten(2)


class MLP(nn.Sequential):
    """Linear, GELU, linear.

    Args:
        width: number of channels.
        hidden_width: channels inside.
        names: of the two linear layers.
    """

    def __init__(self, width: int, hidden_width: int, names: tuple[str, str]) -> None:
        layers = PackableLinear(width, hidden_width), PackableLinear(hidden_width, width)
        super().__init__(OrderedDict(zip(names, layers, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., W] to [..., W]."""
        first, second = self
        out: Tensor = second(gelu_of(first, x))
        return out


class PackedSelfAttention(PackableMatrix):
    """Self-attention with the parameters of `torch.nn.MultiheadAttention`, batch first.

    Args:
        width: number of channels, divisible by num_heads.
        num_heads: number of heads.
    """

    _weight = "in_proj_weight"

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = PackableLinear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Maps [B, L, W] to these rows of [B, L, W]."""
        qkv = self.product(x, self.in_proj_bias)  # [B, L, 3 W]
        out: Tensor = self.out_proj(attend(qkv, self.num_heads)[:, rows].contiguous())
        return out


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block with packed in_proj parameters (TiTok's encoder and decoder).

    Args:
        width: number of channels, divisible by num_heads.
        num_heads: number of heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = PackedSelfAttention(width, num_heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width, ("c_fc", "c_proj"))

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Maps [B, L, W] to these rows of [B, L, W]."""
        x = x[:, rows] + self.attn(self.ln_1(x), rows)
        x = x + self.mlp(self.ln_2(x))
        return x


_PARTS = ("query", "key", "value")


class SeparateSelfAttention(PackableMatrix):
    """Self-attention whose state_dict holds query, key and value apart, as BERT's does.

    Here they are one matrix, so that one product makes the packed input of `attention`.

    Args:
        width: number of channels, divisible by num_heads.
        num_heads: number of heads.
        dropout: probability that an attention weight is dropped in training.
    """

    _weight = "in_proj_weight"

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(0.02 * torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.register_state_dict_post_hook(self._split)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(self._join)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        # For those who look the names of the state_dict up, as torch.distributed.checkpoint does.
        if name in _PARTS:
            whole = self.in_proj_weight.detach(), self.in_proj_bias.detach()
            weight, bias = (x.chunk(3)[_PARTS.index(name)] for x in whole)
            return SimpleNamespace(weight=weight, bias=bias)
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, L, W] to [B, L, W], before the output projection."""
        qkv = self.product(x, self.in_proj_bias)  # [B, L, 3 W]
        return attend(qkv, self.num_heads, self.dropout if self.training else 0.0)

    @staticmethod
    def _split(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        for kind in ("weight", "bias"):
            whole = state.pop(f"{prefix}in_proj_{kind}", None)
            if whole is None:  # parametrised, and stored as its original
                continue
            for name, part in zip(_PARTS, whole.chunk(3), strict=True):
                state[f"{prefix}{name}.{kind}"] = part

    @staticmethod
    def _join(
        module: nn.Module,
        state: dict[str, Tensor],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        *_: Any,
    ) -> None:
        for kind in ("weight", "bias"):
            names = [f"{prefix}{name}.{kind}" for name in _PARTS]
            found = [state[name] for name in names if name in state]
            if 0 < len(found) < 3:
                whole = getattr(module, f"in_proj_{kind}")
                own = dict(zip(names, whole.detach().chunk(3), strict=True))
                fits = ordinary(whole) and not whole.is_meta
                if not fits or any(x.shape != own[names[0]].shape for x in found):
                    continue
                absent = [name for name in names if name not in state]
                state |= {name: own[name].to(found[0].device) for name in absent}
                missing += absent
            if found:
                state[f"{prefix}in_proj_{kind}"] = torch.cat([state.pop(name) for name in names])


class _DenseAndNorm(nn.Module):
    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.dense = PackableLinear(in_width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)


class BertBlock(nn.Module):
    """Post-norm transformer block with BERT's parameter names (MaskGIT's ViT).

    Args:
        width: number of channels, divisible by num_heads.
        hidden_width: channels inside the MLP.
        num_heads: number of heads.
        dropout: probability that an output of either half is dropped in training.
        attention_dropout: the same for an attention weight.
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        num_heads: int,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {
                "self": SeparateSelfAttention(width, num_heads, attention_dropout),
                "output": _DenseAndNorm(width, width),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": PackableLinear(width, hidden_width)})
        self.output = _DenseAndNorm(hidden_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, L, W] to [B, L, W]."""
        attention: Any = self.attention
        x = self._residual(attention["output"], attention["self"](x), x)
        return self._residual(self.output, gelu_of(self.intermediate["dense"], x), x)

    def _residual(self, half: _DenseAndNorm, hidden: Tensor, x: Tensor) -> Tensor:
        out: Tensor = half.LayerNorm(x + self.dropout(half.dense(hidden)))
        return out


class FusedSelfAttention(nn.Module):
    """Self-attention with one qkv matrix without bias (UViT).

    Args:
        width: number of channels, divisible by num_heads.
        num_heads: number of heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = PackableLinear(width, 3 * width, bias=False)
        self.proj = PackableLinear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, L, W] to [B, L, W]."""
        out: Tensor = self.proj(attend(self.qkv(x), self.num_heads))
        return out


class UViTBlock(nn.Module):
    """Pre-norm transformer block that may take a skip connection (MaskGIT's UViT).

    Args:
        width: number of channels, divisible by num_heads.
        hidden_width: channels inside the MLP.
        num_heads: number of heads.
        skip: whether `forward` takes the output of an earlier block too.
    """

    def __init__(
        self, width: int, hidden_width: int, num_heads: int, *, skip: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = FusedSelfAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden_width, ("fc1", "fc2"))
        if skip:
            self.skip_linear = PackableLinear(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Maps [B, L, W], and another with `skip`, to [B, L, W]."""
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class KVCache:
    """Keys and values of the positions so far, in memory for all of them.

    Args:
        shape: [B, H, S, Dh], S the largest number of positions.
        like: gives device and dtype.
    """

    def __init__(self, shape: Sequence[int], like: Tensor) -> None:
        self.keys, self.values = (like.new_zeros(*shape) for _ in "kv")

    def begin(self, k: Tensor, v: Tensor) -> None:
        """Stores those of the first T positions, [B, H, T, Dh] each."""
        self.keys[:, :, : k.shape[2]] = k
        self.values[:, :, : v.shape[2]] = v


def decode_layer(
    x: Tensor,
    layer: PackableLinear,
    *,
    norm: tuple[nn.RMSNorm, Tensor, Tensor] | None = None,
    up: PackableLinear | None = None,
    residual: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`decode_linear` of layers without a bias; the same in parts where it cannot take them.

    That is for more rows, and for layers that are replaced or watched.

    Args:
        x: [B, W].
        layer: of `weight`.
        norm: before it, with scale and shift, [B, W] each.
        up: of `up_weight`.
        residual: what the output is added to, and the factor that it has then, [B, N] each.
    """
    layers = (layer,) if up is None else (layer, up)
    ours = all(untouched(each, PackableLinear) and ordinary(each.weight) for each in layers)
    if norm is not None:
        ours = ours and untouched(norm[0], nn.RMSNorm)
    fast = x.dtype in DTYPES and has_fast_backend(x.device.type)
    if ours and fast and x.shape[0] <= MAX_ROWS:
        options: dict[str, Any] = {}
        if norm is not None:
            module, scale, shift = norm
            options |= {"norm": module.weight, "norm_eps": module.eps}
            options |= {"scale": scale, "shift": shift}
        if up is not None:
            options["up_weight"] = up.weight
        if residual is not None:
            options["residual"], options["residual_scale"] = residual
        return decode_linear(x, layer.weight, **options)
    if norm is not None:
        module, scale, shift = norm
        x = torch.addcmul(shift, module(x), scale)
    out: Tensor = layer(x)
    if up is not None:
        out = F.silu(out) * up(x)
    return out if residual is None else torch.addcmul(residual[0], out, residual[1])


class CausalSelfAttention(nn.Module):
    """Self-attention to the positions before, with rotary embedding.

    Args:
        width: number of channels, divisible by num_heads.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads, a divisor of num_heads.
        dropout: of the attention weights, in training.
        out_dropout: of the result, in training.
    """

    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, dropout: float, out_dropout: float
    ) -> None:
        super().__init__()
        self.heads = (num_heads, num_kv_heads, num_kv_heads)
        self.head_dim = width // num_heads
        self.dropout = dropout
        self.wqkv = PackableLinear(width, sum(self.heads) * self.head_dim, bias=False)
        self.wo = PackableLinear(width, width, bias=False)
        self.resid_dropout = nn.Dropout(out_dropout)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Maps [B, T, W] to [B, T, W], the first T positions; a cache takes their keys and values.

        `rotation` is [T, Dh / 2, 2].
        """
        qkv = self.wqkv(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, T, Dh]
        queries, keys, values = self.heads
        qk, v = qkv.split([queries + keys, values], dim=1)
        wide = torch.promote_types(qk.dtype, torch.float32)
        q, k = rotate(qk.to(wide), rotation).to(v.dtype).split([queries, keys], dim=1)
        if cache is not None:
            cache.begin(k, v)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.heads[0] != self.heads[1],
        )
        out = self.wo(out.transpose(1, 2).flatten(2).to(x.dtype))  # [B, T, W]
        dropped: Tensor = self.resid_dropout(out)
        return dropped


class SwiGLU(nn.Module):
    """The gated feed-forward network w2(silu(w1 x) * w3 x).

    Args:
        width: number of channels.
        hidden_width: channels inside.
        dropout: of the result, in training.
    """

    def __init__(self, width: int, hidden_width: int, dropout: float) -> None:
        super().__init__()
        self.w1 = PackableLinear(width, hidden_width, bias=False)
        self.w3 = PackableLinear(width, hidden_width, bias=False)
        self.w2 = PackableLinear(hidden_width, width, bias=False)
        self.ffn_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., W] to [..., W]."""
        out: Tensor = self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))
        return out


class LlamaBlock(nn.Module):
    """Pre-norm block of RMSNorm, causal attention and SwiGLU, modulated by the class (AdaLN).

    Args:
        attention: of its first half.
        feed_forward: of its second half.
        width: number of channels.
        norm_eps: of RMSNorm.
        drop_path: probability that an image skips a half in training.
    """

    def __init__(
        self,
        attention: CausalSelfAttention,
        feed_forward: SwiGLU,
        width: int,
        norm_eps: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = nn.RMSNorm(width, eps=norm_eps)
        self.ffn_norm = nn.RMSNorm(width, eps=norm_eps)
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        self.drop_path = drop_path

    def modulation(self, condition: Tensor) -> Tensor:
        """What class embeddings [B, 1, W] make of the block, [6, B, 1, W].

        For each half a gate of its output, a factor of its normalised input, and a shift of it.
        """
        parts = self.ada_lin(condition).unflatten(-1, (6, -1)).movedim(-2, 0)  # [6, B, 1, W]
        return torch.cat([parts[:2], parts[2:4] + 1, parts[4:]])

    def forward(
        self, x: Tensor, condition: Tensor, rotation: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        """Maps [B, T, W] to [B, T, W]; rotation and cache as in `CausalSelfAttention`.

        `condition` is class embeddings [B, 1, W]. Their modulation is made here, where a block that
        is sharded is whole.
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulation(condition)
        h = torch.addcmul(shift1, self.attention_norm(x), scale1)
        x = torch.addcmul(x, self._kept(self.attention(h, rotation, cache)), gate1)
        h = torch.addcmul(shift2, self.ffn_norm(x), scale2)
        return torch.addcmul(x, self._kept(self.feed_forward(h)), gate2)

    def decodes(self) -> bool:
        """Whether `decode` does what `forward` does: no part is replaced or watched.

        Of linear and normalising layers `decode_layer` sees to it.
        """
        attention, ffn = self.attention, self.feed_forward
        return (
            untouched(self, LlamaBlock)
            and untouched(attention, CausalSelfAttention)
            and untouched(ffn, SwiGLU)
            and untouched(attention.resid_dropout, nn.Dropout)
            and untouched(ffn.ffn_dropout, nn.Dropout)
        )

    def decode(
        self,
        x: Tensor,
        modulation: Sequence[Tensor],
        rotation: Tensor,
        cache: KVCache,
        position: Tensor,
    ) -> Tensor:
        """`forward` in evaluation mode of one position [1] int64, whose x is [B, W].

        The cache holds the positions before it and takes its key and value; the parts of
        `modulation` are [B, W], `rotation` is of all positions, [S, Dh / 2, 2].
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation
        attention, ffn = self.attention, self.feed_forward
        qkv = decode_layer(x, attention.wqkv, norm=(self.attention_norm, scale1, shift1))
        backend = "auto" if qkv.dtype in DTYPES else "reference"
        out = decode_attention(qkv, cache.keys, cache.values, rotation, position, backend=backend)
        x = decode_layer(out, attention.wo, residual=(x, gate1))
        h = decode_layer(x, ffn.w1, up=ffn.w3, norm=(self.ffn_norm, scale2, shift2))
        return decode_layer(h, ffn.w2, residual=(x, gate2))

    def _kept(self, h: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return h
        kept = torch.rand(h.shape[0], 1, 1, device=h.device) >= self.drop_path
        return h * kept / (1 - self.drop_path)
