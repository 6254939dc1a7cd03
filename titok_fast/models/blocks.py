"""Transformer blocks; one class per layout of the official parameters, over shared functions."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from titok_fast.ops.attention import attention


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
        qkv = rearrange(qkv, "b l (n h d) -> b l n h d", n=3, h=self.num_heads)  # [B, L, 3, H, Dh]
        out: Tensor = self.out_proj(attention(qkv).flatten(2))  # [B, L, W]
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
