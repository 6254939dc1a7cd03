"""Transformer blocks; one class per layout of the official parameters, over shared functions."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from titok_fast.ops.attention import attention


def attend(qkv: Tensor, num_heads: int, dropout: float = 0.0) -> Tensor:
    """`attention` of packed projections: [B, L, 3 W] to [B, L, W]."""
    qkv = rearrange(qkv, "b l (n h d) -> b l n h d", n=3, h=num_heads)  # [B, L, 3, H, Dh]
    return attention(qkv, dropout_p=dropout).flatten(2)


def mlp(width: int, hidden_width: int) -> nn.Sequential:
    """Linear, GELU, linear, under the names c_fc and c_proj."""
    return nn.Sequential(
        OrderedDict(
            c_fc=nn.Linear(width, hidden_width),
            gelu=nn.GELU(),
            c_proj=nn.Linear(hidden_width, width),
        )
    )


class PackedSelfAttention(nn.Module):
    """Self-attention with the parameters of `torch.nn.MultiheadAttention`, batch first.

    Args:
        width: number of channels, divisible by num_heads.
        num_heads: number of heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, L, W] to [B, L, W]."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # [B, L, 3 W]
        out: Tensor = self.out_proj(attend(qkv, self.num_heads))  # [B, L, W]
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
        self.mlp = mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, L, W] to [B, L, W]."""
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


_PARTS = ("query", "key", "value")


class SeparateSelfAttention(nn.Module):
    """Self-attention whose state_dict holds query, key and value apart, as BERT's does.

    Here they are one matrix, so that one product makes the packed input of `attention`.

    Args:
        width: number of channels, divisible by num_heads.
        num_heads: number of heads.
        dropout: probability that an attention weight is dropped in training.
    """

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(0.02 * torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.register_state_dict_post_hook(self._split)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(self._join)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, L, W] to [B, L, W], before the output projection."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # [B, L, 3 W]
        return attend(qkv, self.num_heads, self.dropout if self.training else 0.0)

    @staticmethod
    def _split(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        for kind in ("weight", "bias"):
            whole = state.pop(f"{prefix}in_proj_{kind}")
            for name, part in zip(_PARTS, whole.chunk(3), strict=True):
                state[f"{prefix}{name}.{kind}"] = part

    @staticmethod
    def _join(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for kind in ("weight", "bias"):
            names = [f"{prefix}{name}.{kind}" for name in _PARTS]
            if all(name in state for name in names):
                state[f"{prefix}in_proj_{kind}"] = torch.cat([state.pop(name) for name in names])


class _DenseAndNorm(nn.Module):
    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, width)
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
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden_width)})
        self.output = _DenseAndNorm(hidden_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, L, W] to [B, L, W]."""
        attention: Any = self.attention
        x = self._residual(attention["output"], attention["self"](x), x)
        return self._residual(self.output, F.gelu(self.intermediate["dense"](x)), x)

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
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

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
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(width, hidden_width),
                gelu=nn.GELU(),
                fc2=nn.Linear(hidden_width, width),
            )
        )
        if skip:
            self.skip_linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Maps [B, L, W], and another with `skip`, to [B, L, W]."""
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x
