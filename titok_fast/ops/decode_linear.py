"""A linear layer of a decoding step, with its neighbours: schema, checks, public function."""

import torch
from torch import Tensor

from titok_fast import _library, reference
from titok_fast.ops import inspect
from titok_fast.ops.arguments import (
    address,
    check_dtype,
    check_no_gradient,
    check_norm_eps,
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
MAX_ROWS = 16  # beyond, a product of matrices is no longer bound by reading the weights


def _check(
    x: Tensor, weight: Tensor, norm_eps: float, others: dict[str, Tensor | None], backend: str
) -> None:
    check_dtype("x", x, wide=backend == "reference")
    check_dtype("weight", weight, (x.dtype,))
    if x.ndim != 2 or x.shape[1] < 1:
        raise ValueError(f"x: expected [B, W] with W >= 1, got shape {list(x.shape)}")
    batch, width = x.shape
    if batch > MAX_ROWS and backend != "reference":
        raise ValueError(f"x: B must be at most {MAX_ROWS}, got {batch}")
    if weight.ndim != 2 or weight.shape[0] < 1:
        raise ValueError(f"weight: expected [N, W] with N >= 1, got shape {list(weight.shape)}")
    size = weight.shape[0]
    shapes = {
        "norm": [width],
        "scale": [batch, width],
        "shift": [batch, width],
        "up_weight": [size, width],
        "residual": [batch, size],
        "residual_scale": [batch, size],
    }
    check_norm_eps(norm_eps)
    check_tensor("weight", weight, [size, width], (x.dtype,), x, "x")
    for name, other in others.items():
        if other is not None:
            check_tensor(name, other, shapes[name], (x.dtype,), x, "x")


def _fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _run(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    norm_eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    up_weight: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    backend: str,
) -> Tensor:
    inspect.require_backend(backend, x.device.type)
    (batch, width), size = x.shape, weight.shape[0]
    out = torch.empty((batch, size), dtype=x.dtype, device=x.device)
    x, weight = dense_rows(x), dense_rows(weight)
    norm = None if norm is None else norm.contiguous()
    optional = (scale, shift, up_weight, residual, residual_scale)
    others = [None if tensor is None else dense_rows(tensor) for tensor in optional]
    if backend == "triton":
        launch = inspect.kernels("decode_linear").launch_decode_linear
        launch(x, weight, norm, norm_eps, *others, out)
        return out
    extension, threads = inspect.extension(), torch.get_num_threads()
    space = extension.decode_linear_cpu_workspace(batch, width, size, threads)
    workspace = torch.empty(space, dtype=torch.uint8, device="cpu")
    absent = (0, 0)
    pairs = [absent if t is None else (t.data_ptr(), t.stride(0)) for t in others]
    extension.decode_linear_cpu(
        (x.data_ptr(), x.stride(0)),
        (weight.data_ptr(), weight.stride(0)),
        address(norm),
        norm_eps,
        *pairs,
        out=out.data_ptr(),
        batch=batch,
        width=width,
        size=size,
        dtype=dtype_name(x.dtype),
        workspace=workspace.data_ptr(),
        threads=threads,
    )
    return out


_op = _library.register(
    "decode_linear(Tensor x, Tensor weight, Tensor? norm, float norm_eps, Tensor? scale, "
    "Tensor? shift, Tensor? up_weight, Tensor? residual, Tensor? residual_scale, str backend) "
    "-> Tensor",
    cpu=_run,
    cuda=_run,
    fake=_fake,
)


def has_fast_backend(device_type: str) -> bool:
    """Whether "auto" is another backend than the reference for tensors of `device_type`."""
    return inspect.choose_or_reference("auto", device_type, BACKENDS) != "reference"


def decode_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    norm_eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    up_weight: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A linear layer for a few rows, with what stands before and after it in a transformer.

        h = shift + scale * norm * x / sqrt(mean(x^2) + norm_eps)
        y = h weight^T,  or SwiGLU's  silu(h weight^T) * (h up_weight^T)
        out = residual + residual_scale * y

    Each part is left out with its argument. The weights are read once, as they lie, and everything
    else stays on chip: a step that decodes one token per sequence is bound by that reading.

    h is rounded to the dtype of `x`; products and what follows are in float32, rounded once at the
    end. The same bits for any number of threads and from run to run, and on a CPU for a row
    whatever the others are; on a GPU the order of sums may depend on the number of rows and
    on strides. Only "reference" is differentiable.

    Args:
        x: [B, W], float32, float16 or bfloat16; B is 0 to 16 ("reference": any, also float64).
        weight: [N, W], as is everything here in the dtype and on the device of `x`.
        norm: [W], the weight of RMSNorm.
        norm_eps: of RMSNorm, 0 or more.
        scale: [B, W], AdaLN's factor of the normalised input.
        shift: [B, W], added to it.
        up_weight: [N, W], of SwiGLU.
        residual: [B, N].
        residual_scale: [B, N], AdaLN's gate.
        backend: "cpu" (C++), "triton" (GPU, or CPU tensors in Triton's interpreter), "reference"
            or "auto": "cpu" or "triton" by the device, "reference" where it has neither.

    Returns:
        [B, N] in the dtype of `x`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, more than 16 rows, a negative norm_eps, an unknown
            backend.
        RuntimeError: the backend is not available, the message says what is missing; or a gradient
            would be needed.

    Source: RMSNorm (arXiv 1910.07467), AdaLN (arXiv 2212.09748, section 3.2), SwiGLU
    (arXiv 2002.05202).
    """
    others = {
        "norm": norm,
        "scale": scale,
        "shift": shift,
        "up_weight": up_weight,
        "residual": residual,
        "residual_scale": residual_scale,
    }
    norm_eps = python_number(norm_eps)
    _check(x, weight, norm_eps, others, backend)
    chosen = inspect.choose_or_reference(backend, x.device.type, BACKENDS)
    if chosen == "reference":
        return reference.decode_linear(x, weight, norm_eps=norm_eps, **others)
    check_no_gradient({"x": x, "weight": weight, **others})
    out: Tensor = _op(
        x, weight, norm, norm_eps, scale, shift, up_weight, residual, residual_scale, chosen
    )
    return out
