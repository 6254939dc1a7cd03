"""Bidirectional attention: schemas, checks, backends, autograd and the public function."""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titok_fast import _library, reference
from titok_fast.ops import inspect
from titok_fast.ops.arguments import (
    as_autocast,
    check_dtype,
    check_no_gradient,
    differentiated,
    dtype_name,
    python_number,
)

BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "torch", "triton"),
    "cuda": ("triton", "torch"),
    "meta": ("torch", "cpu", "triton"),
}
# Elsewhere the C++ has vectors of 16 bytes only, and PyTorch's own products may be faster.
_X86 = platform.machine().lower() in ("x86_64", "amd64")
MAX_LENGTH = 4096
MAX_HEAD_WIDTH = 128

# Longest L for which "auto" takes "triton" on a CUDA device, by dtype and the largest Dh that the
# entry serves. Predicted, not measured: `python -m bench.bench_attention FILE` prints the measured.
TRITON_UP_TO = {
    (torch.float32, 64): 289,
    (torch.float32, 128): 0,
    (torch.float16, 64): 289,
    (torch.float16, 128): 289,
    (torch.bfloat16, 64): 289,
    (torch.bfloat16, 128): 289,
}


def _check(qkv: Tensor, dropout_p: float, seed: int | Tensor | None, backend: str) -> None:
    fused = backend in ("cpu", "triton")
    check_dtype("qkv", qkv, wide=not fused)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: expected [B, L, 3, H, Dh], got shape {list(qkv.shape)}")
    _, length, _, heads, width = qkv.shape
    if not 1 <= length <= MAX_LENGTH:
        raise ValueError(f"qkv: L must be 1 to {MAX_LENGTH}, got {length}")
    if heads < 1:
        raise ValueError(f"qkv: H must be >= 1, got {heads}")
    if width < 8 or width > MAX_HEAD_WIDTH or width % 8:
        raise ValueError(f"qkv: Dh must be a multiple of 8, 8 to {MAX_HEAD_WIDTH}, got {width}")
    if not isinstance(dropout_p, int | float):
        raise TypeError(f"dropout_p: expected a float, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: {dropout_p} is not in [0, 1)")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed: expected one int64, got {seed.dtype} of shape {list(seed.shape)}"
            )
        if seed.device != qkv.device:
            raise ValueError(f"seed: on {seed.device}, but qkv is on {qkv.device}")
    elif seed is not None and not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, a Tensor or None, got {type(seed).__name__}")
    elif seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: {seed} is not an int64")


def _aligned(x: Tensor) -> Tensor:
    """`x` itself where its rows are dense and start at multiples of 8 elements, or a copy."""
    aligned = x.stride(-1) == 1 and not any(stride % 8 for stride in x.stride()[:-1])
    return x if aligned else x.contiguous()


def _fake_cpu(qkv: Tensor) -> Tensor:
    b, length, _, h, d = qkv.shape
    return qkv.new_empty(b, length, h, d)


def _fake_fwd(qkv: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    batch, length, heads = qkv.shape[0], qkv.shape[1], qkv.shape[3]
    return _fake_cpu(qkv), qkv.new_empty(batch, heads, length, dtype=torch.float32)


def _fake_bwd(grad: Tensor, qkv: Tensor, *_: object) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _triton_fwd(qkv: Tensor, seed: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    inspect.require_backend("triton", qkv.device.type)
    launch = inspect.kernels("attention").launch_attention_fwd
    out, lse = launch(_aligned(qkv), seed, dropout_p)
    return out, lse


def _triton_bwd(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> Tensor:
    inspect.require_backend("triton", qkv.device.type)
    launch = inspect.kernels("attention").launch_attention_bwd
    grad_qkv: Tensor = launch(
        _aligned(grad), _aligned(qkv), out.contiguous(), lse.contiguous(), seed, dropout_p
    )
    return grad_qkv


_fwd_op = _library.register(
    "attention_fwd(Tensor qkv, Tensor? seed, float dropout_p) -> (Tensor out, Tensor lse)",
    cpu=_triton_fwd,
    cuda=_triton_fwd,
    fake=_fake_fwd,
)

_bwd_op = _library.register(
    "attention_bwd(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor? seed, "
    "float dropout_p) -> Tensor",
    cpu=_triton_bwd,
    cuda=_triton_bwd,
    fake=_fake_bwd,
)


def _cpu(qkv: Tensor) -> Tensor:
    inspect.require_backend("cpu", qkv.device.type)
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    batch, length, _, heads, width = qkv.shape
    extension, threads = inspect.extension(), torch.get_num_threads()
    dtype = dtype_name(qkv.dtype)
    out = torch.empty((batch, length, heads, width), dtype=qkv.dtype, device="cpu")
    size = extension.attention_cpu_workspace(length, width, dtype, threads)
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    extension.attention_cpu(
        qkv=qkv.data_ptr(),
        batch_stride=qkv.stride(0),
        row_stride=qkv.stride(1),
        part_stride=qkv.stride(2),
        head_stride=qkv.stride(3),
        out=out.data_ptr(),
        batch=batch,
        length=length,
        heads=heads,
        width=width,
        dtype=dtype,
        workspace=workspace.data_ptr(),
        threads=threads,
    )
    return out


_cpu_op = _library.register(
    "attention_cpu(Tensor qkv) -> Tensor", cpu=_cpu, cuda=_cpu, fake=_fake_cpu
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
        out, lse = _fwd_op(qkv, seed, dropout_p)
        ctx.save_for_backward(qkv, out, lse, seed)
        ctx.dropout_p = dropout_p
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, seed = ctx.saved_tensors
        with torch.no_grad():
            grad_qkv = _bwd_op(grad, qkv, out, lse, seed, ctx.dropout_p)
        if torch.is_grad_enabled():
            (grad_qkv,) = _library.once("attention", (grad_qkv,), qkv, grad)
        return grad_qkv, None, None


def _automatic(qkv: Tensor, dropout_p: float) -> str:
    """The backend that "auto" stands for."""
    if qkv.dtype is torch.float64:
        return "torch"
    if qkv.device.type == "cpu":
        return "cpu" if _X86 and dropout_p == 0 and not differentiated(qkv) else "torch"
    if not qkv.is_cuda or inspect.why_not("triton", "cuda") is not None:
        return "torch"
    width = min(width for _, width in TRITON_UP_TO if qkv.shape[-1] <= width)
    short = qkv.shape[1] <= TRITON_UP_TO[qkv.dtype, width]
    return "triton" if short or dropout_p > 0 else "torch"


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed.reshape(())
    if seed is None:
        return torch.randint(2**63 - 1, (), device=device)
    return torch.full((), seed, dtype=torch.int64, device=device)


def attention(
    qkv: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Bidirectional softmax attention on packed queries, keys and values.

        out = dropout(softmax(Q K^T / sqrt(Dh))) V, for each head

    The packed tensor is read where it lies, without a permutation or a copy, if its last dimension
    is dense and, for "triton", its other strides are multiples of 8; other inputs are copied first.
    With "triton" and "cpu" the results and gradients are the same from run to run and for any
    number of threads, and those of an image do not depend on the batch around it, its dropout
    aside, which goes by its place in the batch.

    "cpu" computes in float32, and in bfloat16, where the CPU multiplies it, with probabilities
    rounded to it. It has neither gradient nor dropout.

    A probability is dropped by its own word of Philox4x32-10, with `seed` as the key and (image,
    head, query, key) as the counter: the same for a seed on every backend and device, forward and
    backward. "torch" with dropout takes the arithmetic of "reference", since the generator of
    `scaled_dot_product_attention` knows no such seed.

    Under autocast `qkv` is cast to its dtype, but for float64. Differentiable in `qkv`; the
    gradient is packed, in the dtype of `qkv`. A second derivative is "reference"'s alone.

    Args:
        qkv: [B, L, 3, H, Dh] with queries, keys and values along the third dimension; float32,
            float16 or bfloat16, or float64, which "torch" and "reference" take. L is 1 to 4096, Dh
            a multiple of 8 up to 128; B may be 0.
        dropout_p: probability in [0, 1) that a softmax probability is dropped; the others are
            divided by 1 - dropout_p.
        seed: of the dropout; an int, or [] int64 on the device of `qkv`, which a captured CUDA
            graph can change between replays. None draws one from PyTorch's generator. Ignored
            without dropout.
        backend: "triton" (GPU, or CPU tensors in Triton's interpreter), "cpu" (C++), "torch"
            (`scaled_dot_product_attention`), "reference" (every L x L matrix in memory), or "auto":
            on an x86-64 CPU "cpu", with a gradient or dropout "torch", as on other CPUs; on CUDA
            "triton" with dropout and up to the length in `TRITON_UP_TO`, "torch" beyond.

    Returns:
        [B, L, H, Dh], contiguous with "triton" and "cpu", in the dtype of `qkv`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, a probability or seed out of range, an unknown backend.
        RuntimeError: the backend is not available or has no gradient, the message says what is
            missing; or a second derivative is asked for.

    Source: "Attention Is All You Need" (arXiv 1706.03762, section 3.2), computed block by block
    as in FlashAttention-2 (arXiv 2307.08691).
    """
    dropout_p, seed = python_number(dropout_p), python_number(seed)
    _check(qkv, dropout_p, seed, backend)
    qkv, device = as_autocast(qkv), qkv.device.type
    order = BACKENDS | {device: BACKENDS.get(device, ("torch",))}
    chosen = inspect.choose_backend(backend, device, order)
    if backend == "auto":
        chosen = _automatic(qkv, dropout_p)
    key = _seed_tensor(seed, qkv.device) if dropout_p > 0 else None
    if chosen == "triton":
        out: Tensor = _Attention.apply(qkv, key, float(dropout_p))  # type: ignore[no-untyped-call]
        return out
    if chosen == "cpu":
        if dropout_p > 0:
            raise ValueError(f"dropout_p: must be 0 with backend 'cpu', got {dropout_p}")
        check_no_gradient({"qkv": qkv})
        result: Tensor = _cpu_op(qkv)
        return result
    if chosen == "reference" or dropout_p > 0:
        return reference.attention(qkv, dropout_p, key)
    query, keys, values = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, L, Dh]
    return F.scaled_dot_product_attention(query, keys, values).transpose(1, 2)
