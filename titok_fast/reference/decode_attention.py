"""Attention of one query per sequence to a cache, in eager PyTorch."""

import torch
from torch import Tensor


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Channels of [..., Dh], in pairs as complex numbers, times [..., Dh / 2, 2]."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotation.unbind(-1)
    turned = (real * cosine - imaginary * sine, imaginary * cosine + real * sine)
    return torch.stack(turned, -1).flatten(-2)


def decode_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, rotation: Tensor, position: Tensor
) -> Tensor:
    """The public op, for float64 too; writes to `keys` and `values`.

    The query is not rounded; the key is, to the dtype of the cache. Scores, softmax and sums are
    in float32 (float64 for float64).
    """
    kv_heads, length, width = keys.shape[1:]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    parts = qkv.unflatten(-1, (-1, width)).to(wide)  # [B, H + 2 Hkv, Dh]
    query, key, value = parts.split([parts.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    turn = rotation.index_select(0, position).to(wide)  # [1, Dh / 2, 2]
    keys.index_copy_(2, position, rotate(key, turn)[:, :, None].to(keys.dtype))
    values.index_copy_(2, position, value[:, :, None].to(values.dtype))
    query = rotate(query, turn).unflatten(1, (kv_heads, -1))  # [B, Hkv, H / Hkv, Dh]
    scores = query @ keys.to(wide).mT * width**-0.5  # [B, Hkv, H / Hkv, S]
    later = torch.arange(length, device=position.device) > position
    probability = scores.masked_fill(later, -torch.inf).softmax(-1)
    # Beyond the position there may be anything, NaN too.
    read = values.to(wide).masked_fill(later[:, None], 0.0)
    out: Tensor = (probability @ read).flatten(1).to(qkv.dtype)
    return out
