"""Attention of one query per sequence to a cache: schema, checks, backends, public function."""

import torch
from torch import Tensor

from titok_fast import _library, reference
from titok_fast.ops import inspect
from titok_fast.ops.arguments import (
    check_dtype,
    check_no_gradient,
    check_tensor,
    dense_rows,
    dtype_name,
    python_number,
)

BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "triton"),
    "cuda": ("triton",),
    "meta": ("cpu", "triton"),
}
MAX_HEAD_WIDTH = 256


def _check(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    rotation: Tensor,
    position: int | Tensor,
    backend: str,
) -> None:
    check_dtype("qkv", qkv, wide=backend == "reference")
    check_tensor("keys", keys, None, (qkv.dtype,), qkv, "qkv")
    if keys.ndim != 4 or 0 in keys.shape[1:]:
        raise ValueError(f"keys: expected [B, Hkv, S, Dh], got shape {list(keys.shape)}")
    batch, kv_heads, length, width = keys.shape
    if width % 2 or width > MAX_HEAD_WIDTH:
        raise ValueError(f"keys: Dh must be even and up to {MAX_HEAD_WIDTH}, got {width}")
    check_tensor("values", values, list(keys.shape), (qkv.dtype,), qkv, "qkv")
    for name, cache in (("keys", keys), ("values", values)):
        if not cache.is_contiguous():
            raise ValueError(f"{name}: not contiguous, its strides are {list(cache.stride())}")
    heads = (qkv.shape[-1] // width if qkv.ndim == 2 else 0) - 2 * kv_heads
    if heads < 1 or heads % kv_heads or list(qkv.shape) != [batch, (heads + 2 * kv_heads) * width]:
        raise ValueError(
            f"qkv: expected [{batch}, (H + {2 * kv_heads}) * {width}] with H a multiple of "
            f"{kv_heads}, got shape {list(qkv.shape)}"
        )
    check_tensor("rotation", rotation, [length, width // 2, 2], (torch.float32,), qkv, "qkv")
    if isinstance(position, Tensor):
        if position.dtype != torch.int64:
            raise TypeError(f"position: dtype {position.dtype} is not int64")
        if position.numel() != 1:
            raise ValueError(f"position: expected one int64, got shape {list(position.shape)}")
        if position.device != qkv.device:
            raise ValueError(f"position: on {position.device}, but qkv is on {qkv.device}")
    elif not isinstance(position, int):
        raise TypeError(f"position: expected an int or a Tensor, got {type(position).__name__}")
    elif not 0 <= position < length:
        raise ValueError(f"position: {position} is not in [0, {length})")


def _known(position: Tensor, length: int) -> int:
    """The position, checked; 0 on a device, for which nothing waits."""
    known = int(position) if position.device.type == "cpu" else 0
    if not 0 <= known < length:
        raise ValueError(f"position: {known} is not in [0, {length})")
    return known


def _fake(qkv: Tensor, keys: Tensor, *_: object) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3])


def _run(
    qkv: Tensor, keys: Tensor, values: Tensor, rotation: Tensor, position: Tensor, backend: str
) -> Tensor:
    inspect.require_backend(backend, qkv.device.type)
    batch, kv_heads, length, width = keys.shape
    heads = qkv.shape[1] // width - 2 * kv_heads
    qkv, rotation = dense_rows(qkv), rotation.contiguous()
    out = torch.empty((batch, heads * width), dtype=qkv.dtype, device=qkv.device)
    known = _known(position, length)
    if backend == "triton":
        launch = inspect.kernels("decode_attention").launch_decode_attention
        launch(qkv, keys, values, rotation, position, out)
        return out
    extension, threads = inspect.extension(), torch.get_num_threads()
    size = extension.decode_attention_cpu_workspace(length, width, threads)
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    extension.decode_attention_cpu(
        qkv=qkv.data_ptr(),
        qkv_stride=qkv.stride(0),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        rotation=rotation.data_ptr(),
        position=known,
        out=out.data_ptr(),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        length=length,
        width=width,
        dtype=dtype_name(qkv.dtype),
        workspace=workspace.data_ptr(),
        threads=threads,
    )
    return out


_op = _library.register(
    "decode_attention(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor rotation, "
    "Tensor position, str backend) -> Tensor",
    cpu=_run,
    cuda=_run,
    fake=_fake,
)


def decode_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    rotation: Tensor,
    position: int | Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Rotary embedding, cache update and attention of the one new token of each sequence.

        q, k = R_p q, R_p k
        keys[:, :, p], values[:, :, p] = k, v
        out = softmax(q keys[:, :, : p + 1]^T / sqrt(Dh)) values[:, :, : p + 1], for each head

    What the cache holds beyond the position is not read. The query keeps float32 after its
    rotation, as do scores, softmax and sums; the key is rounded to the cache's dtype. Grouped
    queries: consecutive H / Hkv query heads share a key and value head. The same bits for any
    number of threads and from run to run; a sequence does not depend on the others. Only
    "reference" is differentiable, until the next call writes to the same cache.

    Args:
        qkv: [B, (H + 2 Hkv) Dh], H query heads, then Hkv key heads, then Hkv value heads; float32,
            float16 or bfloat16 ("reference": also float64). B may be 0.
        keys: [B, Hkv, S, Dh], contiguous, in the dtype of `qkv`; written to at the position. Dh is
            even and up to 256.
        values: as `keys`.
        rotation: [S, Dh / 2, 2] float32, cosine and sine by which the position turns each pair of
            consecutive channels.
        position: p in [0, S), an int or one int64 on the device of `qkv`, which a captured CUDA
            graph can change between replays. Out of range a CPU tensor raises and a GPU's is
            clamped.
        backend: "cpu" (C++), "triton" (GPU, or CPU tensors in Triton's interpreter), "reference"
            or "auto": "cpu" or "triton" by the device, "reference" where it has neither.

    Returns:
        [B, H Dh] in the dtype of `qkv`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, layout or position, an unknown backend.
        RuntimeError: the backend is not available, the message says what is missing; or a gradient
            would be needed.

    Source: "Attention Is All You Need" (arXiv 1706.03762, section 3.2), rotary embedding
    (arXiv 2104.09864), grouped queries (arXiv 2305.13245).
    """
    position = python_number(position)
    _check(qkv, keys, values, rotation, position, backend)
    if not isinstance(position, Tensor):
        position = torch.full((), position, dtype=torch.int64, device=qkv.device)
    chosen = inspect.choose_or_reference(backend, qkv.device.type, BACKENDS)
    if chosen == "reference":
        if not torch.compiler.is_compiling():
            _known(position, keys.shape[2])
        position = position.reshape(1).clamp(0, keys.shape[2] - 1)
        return reference.decode_attention(qkv, keys, values, rotation, position)
    check_no_gradient({"qkv": qkv, "keys": keys, "values": values, "rotation": rotation})
    out: Tensor = _op(qkv, keys, values, rotation, position, chosen)
    return out
