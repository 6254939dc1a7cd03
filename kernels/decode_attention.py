"""Attention of one query per sequence to a cache on the GPU, with rotation and cache update.

A program owns a key and value head of a sequence, and the queries that share it. The softmax starts
from the new key, which is thus not read back; then each slot of a block of keys runs one of its
own, and they meet only after the last block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titok_fast.kernels._arithmetic import LOG2E, interpreted, rounded

_LOWEST = tl.constexpr(-3e38)
_ELEMENTS = 4096  # of a block of keys, for all queries of a group together

# Integers of which no value is compiled into the kernel.
_SIZES = ("kv_heads", "length", "qkv_stride")


@triton.jit
def _rotated(
    base,
    head,  # [HEADS, 1, 1]
    turn,  # of the position
    channel,  # [1, 1, DIM]
    D: tl.constexpr,
):
    # [HEADS, 1, DIM] float32; a channel turns with the other one of its pair.
    inside = channel < D
    pair = turn + (channel & -2)
    cosine, sine = tl.load(pair, inside, 0.0), tl.load(pair + 1, inside, 0.0)
    sine = tl.where(channel % 2 == 0, -sine, sine)
    x = tl.load(base + head * D + channel, inside, 0.0).to(tl.float32)
    other = tl.load(base + head * D + (channel ^ 1), inside, 0.0).to(tl.float32)
    return x * cosine + other * sine


@triton.jit(do_not_specialize=_SIZES)
def decode_attention_kernel(
    qkv,  # [B, (H + 2 Hkv) D]
    keys,  # [B, Hkv, S, D], contiguous
    values,  # likewise
    rotation,  # [S, D / 2, 2] float32, contiguous
    position,  # [] int64
    out,  # [B, H D], contiguous
    kv_heads,
    length,
    qkv_stride,
    scale,
    D: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,  # H / Hkv
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    batch, kv_head = item // kv_heads, item % kv_heads
    last = tl.minimum(tl.maximum(tl.load(position), 0), length - 1)
    dtype: tl.constexpr = keys.dtype.element_ty

    # Everything is [QUERIES, KEYS, DIM].
    group = tl.arange(0, QUERIES)[:, None, None]
    slot = tl.arange(0, KEYS)[None, :, None]
    channel = tl.arange(0, DIM)[None, None, :]
    inside = channel < D
    # Past the group comes its last query again: it is not stored.
    query_head = kv_head * GROUP + tl.minimum(group, GROUP - 1)
    key_head = kv_heads * GROUP + kv_head
    qkv += batch * qkv_stride
    turn = rotation + last * D
    q = _rotated(qkv, query_head, turn, channel, D)
    k = rounded(_rotated(qkv, key_head, turn, channel, D), dtype, PRECISION)
    v = tl.load(qkv + (key_head + kv_heads) * D + channel, inside, 0.0)
    keys += item * length * D
    values += item * length * D
    tl.store(keys + last * D + channel, k, inside)
    tl.store(values + last * D + channel, v, inside)

    # An infinite score must not be a slot's maximum: infinities have no difference.
    first_score = tl.sum(q * k, axis=2, keep_dims=True)
    top = tl.maximum(first_score, _LOWEST) + tl.zeros([QUERIES, KEYS, 1], tl.float32)
    total = tl.exp2((tl.where(slot == 0, first_score, float("-inf")) - top) * (scale * LOG2E))
    acc = tl.where(slot == 0, total * v.to(tl.float32), 0.0)
    end = last.to(tl.int32)
    for first in tl.range(0, end, KEYS, num_stages=STAGES):
        key = first + slot
        earlier = (key < end) & inside
        where = key.to(tl.int64) * D + channel
        old_k = tl.load(keys + where, earlier, 0.0)
        old_v = tl.load(values + where, earlier, 0.0)
        score = tl.sum(q * old_k.to(tl.float32), axis=2, keep_dims=True)
        score = tl.where(key < end, score, float("-inf"))
        new_top = tl.maximum(top, score)
        shrink = tl.exp2((top - new_top) * (scale * LOG2E))
        p = tl.exp2((score - new_top) * (scale * LOG2E))
        total = total * shrink + p
        acc = acc * shrink + p * old_v.to(tl.float32)
        top = new_top

    shrink = tl.exp2((top - tl.max(top, axis=1, keep_dims=True)) * (scale * LOG2E))
    total = tl.sum(total * shrink, axis=1, keep_dims=True)
    acc = tl.sum(acc * shrink, axis=1, keep_dims=True) / total
    out += batch * kv_heads * (GROUP * D)
    where = query_head * D + channel
    tl.store(out + where, rounded(acc, dtype, PRECISION), inside & (group < GROUP))


def _options(d: int, group: int, dtype: torch.dtype) -> dict[str, Any]:
    dim, queries = triton.next_power_of_2(d), triton.next_power_of_2(group)
    return {
        "D": d,
        "DIM": dim,
        "GROUP": group,
        "QUERIES": queries,
        "KEYS": max(1, min(128, _ELEMENTS // (queries * dim))),
        "STAGES": 2 if dtype == torch.float32 else 3,
        "PRECISION": "ieee",
        "num_warps": 8,
    }


def launch_decode_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    rotation: Tensor,
    position: Tensor,
    out: Tensor,
) -> None:
    """Writes the new key and value to the cache at the position, and fills `out`.

    Args:
        qkv: [B, (H + 2 Hkv) D], its last dimension dense; float32, float16 or bfloat16.
        keys: [B, Hkv, S, D], contiguous, in the dtype of `qkv`; D is even and up to 256.
        values: likewise.
        rotation: [S, D / 2, 2] float32, contiguous.
        position: one int64, clamped to [0, S).
        out: [B, H D], contiguous, in the dtype of `qkv`.
    """
    batch, kv_heads, length, d = keys.shape
    if batch == 0:
        return
    options = _options(d, out.shape[1] // (kv_heads * d), qkv.dtype)
    decode_attention_kernel[(batch * kv_heads,)](
        qkv, keys, values, rotation, position, out, kv_heads, length, qkv.stride(0), d**-0.5,
        **interpreted(qkv, options),
    )  # fmt: skip


def launch_examples(main: bool = False) -> None:
    """Launches, on the meta device, of each dtype and of grouped queries.

    Args:
        main: only heads of 64 channels with a query each, in bfloat16.
    """
    kinds = [(torch.bfloat16, 64, 1)]
    if not main:
        kinds += [(torch.float16, 64, 1), (torch.float32, 64, 1), (torch.bfloat16, 128, 4)]
    for dtype, d, group in kinds:
        keys = torch.empty(2, 8, 256, d, dtype=dtype, device="meta")
        qkv = keys.new_empty(2, (group + 2) * 8 * d)
        rotation = keys.new_empty(256, d // 2, 2, dtype=torch.float32)
        position = keys.new_empty(1, dtype=torch.int64)
        out = keys.new_empty(2, group * 8 * d)
        launch_decode_attention(qkv, keys, keys, rotation, position, out)
