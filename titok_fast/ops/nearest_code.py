"""Exact nearest-code search: schema, checks, backends and the public function."""

from typing import Literal, overload

import torch
from torch import Tensor

from titok_fast import _library, reference
from titok_fast.ops import inspect
from titok_fast.ops.arguments import autocast_dtype, check_dtype, dense_rows, dtype_name

METRICS = ("l2", "cosine", "dot")
BACKENDS = {"cpu": ("cpu", "triton"), "cuda": ("triton",), "meta": ("cpu", "triton")}


def check_rows_and_codes(z: Tensor, codebook: Tensor, *, wide: bool = False) -> None:
    """TypeError or ValueError unless `z` is [..., D] and `codebook` [K, D] of the same kind."""
    check_dtype("z", z, wide=wide)
    check_dtype("codebook", codebook, wide=wide)
    if codebook.ndim != 2:
        raise ValueError(f"codebook: expected [K, D], got shape {list(codebook.shape)}")
    if codebook.shape[0] == 0 or codebook.shape[1] == 0:
        raise ValueError(f"codebook: K and D must be >= 1, got shape {list(codebook.shape)}")
    if z.ndim < 1 or z.shape[-1] != codebook.shape[1]:
        raise ValueError(
            f"z: expected [..., D] with the codebook's D = {codebook.shape[1]}, "
            f"got shape {list(z.shape)}"
        )
    if z.dtype != codebook.dtype:
        raise TypeError(f"codebook: dtype {codebook.dtype} differs from z's {z.dtype}; cast one")
    if z.device != codebook.device:
        raise ValueError(f"codebook: on {codebook.device}, but z is on {z.device}")


def _check(z: Tensor, codebook: Tensor, metric: str) -> None:
    check_rows_and_codes(z, codebook)
    if metric not in METRICS:
        raise ValueError(f"metric: {metric!r} is not one of 'l2', 'cosine', 'dot'")


def _autocast(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast the two in the wider of their dtypes."""
    if autocast_dtype(z) is None or autocast_dtype(codebook) is None:
        return z, codebook
    wider = torch.promote_types(z.dtype, codebook.dtype)
    return z.to(wider), codebook.to(wider)


def _fake(
    z: Tensor, codebook: Tensor, metric: str, distance: bool, backend: str
) -> tuple[Tensor, Tensor]:
    n = z.shape[0]
    distances = z.new_empty(n if distance else 0, dtype=torch.float32)
    return z.new_empty(n, dtype=torch.int64), distances


def _cpu(
    z: Tensor,
    codebook: Tensor,
    metric: str,
    distance: bool,
    backend: str,
    rescored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        return _triton(z, codebook, metric, distance, backend, rescored)
    inspect.require_backend(backend, "cpu")
    extension = inspect.extension()
    z, codebook = dense_rows(z), dense_rows(codebook)
    (n, d), k = z.shape, codebook.shape[0]
    indices = torch.empty(n, dtype=torch.int64, device="cpu")
    distances = torch.empty(n if distance else 0, dtype=torch.float32, device="cpu")
    threads = torch.get_num_threads()
    size = extension.nearest_code_cpu_workspace(n, k, d, metric, threads)
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    extension.nearest_code_cpu(
        z=z.data_ptr(),
        z_stride=z.stride(0),
        codebook=codebook.data_ptr(),
        codebook_stride=codebook.stride(0),
        n=n,
        k=k,
        d=d,
        dtype=dtype_name(z.dtype),
        metric=metric,
        indices=indices.data_ptr(),
        distances=distances.data_ptr() if distance else 0,
        rescored=0 if rescored is None else rescored.data_ptr(),
        workspace=workspace.data_ptr(),
        threads=threads,
    )
    return indices, distances


def _triton(
    z: Tensor,
    codebook: Tensor,
    metric: str,
    distance: bool,
    backend: str,
    rescored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    inspect.require_backend(backend, z.device.type)
    launch = inspect.kernels("nearest_code").launch_nearest_code
    indices, distances = launch(dense_rows(z), dense_rows(codebook), metric, distance, rescored)
    return indices, distances


_op = _library.register(
    "nearest_code(Tensor z, Tensor codebook, str metric, bool distance, str backend)"
    " -> (Tensor, Tensor)",
    cpu=_cpu,
    cuda=_triton,
    fake=_fake,
)


@overload
def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    return_distance: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    return_distance: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    return_distance: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Index of the code nearest to each row of `z`, exact, without the N x K matrix.

    The index is the optimum in float64 of the given inputs and the lowest index among float64
    ties, the same on every backend, thread count and batch. A row with a NaN gives index 0 and
    distance NaN; a code with a NaN is chosen only when every code has one.

    Args:
        z: [..., D], float32, float16 or bfloat16, any strides; may be empty.
        codebook: [K, D] with K >= 1, same dtype and device as `z`; under autocast the two are taken
            in the wider of their dtypes.
        metric: "l2": argmin ||z - e||^2; "cosine": argmax z.e / max(||e||, 1e-12);
            "dot": argmax z.e.
        return_distance: also return the distance of the chosen code.
        backend: "cpu" (C++), "triton" (GPU, or CPU tensors in Triton's interpreter),
            "reference" (float64, materialises N x K), or "auto": "cpu" for CPU tensors, "triton"
            for CUDA tensors; tensors of any other device are copied to the CPU and back.

    Returns:
        Indices [...], int64; with `return_distance` also float32 [...]: the squared distance
        ("cosine": of the normalised rows; "dot": the logit). No gradient flows through either.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, an unknown metric or backend.
        RuntimeError: the backend is not available; the message says what is missing.

    Source: the quantizer of TiTok (arXiv 2406.07550, section 3.1) and, with "dot", of IBQ
    (arXiv 2412.02692, section 3.2).
    """
    z, codebook = _autocast(z, codebook)
    _check(z, codebook, metric)
    rows = z.detach() if z.requires_grad else z
    rows = rows if z.ndim == 2 else rows.reshape(-1, z.shape[-1])
    codes = codebook.detach() if codebook.requires_grad else codebook
    if backend == "auto" and z.device.type not in BACKENDS:
        rows, codes = rows.cpu(), codes.cpu()
    backend = inspect.choose_backend(backend, rows.device.type, BACKENDS)
    if backend == "reference":
        indices, distances = reference.nearest_code(rows, codes, metric)
    else:
        indices, distances = _op(rows, codes, metric, return_distance, backend)
    indices = indices.to(z.device).view(z.shape[:-1])
    if not return_distance:
        return indices
    return indices, distances.to(z.device).view(z.shape[:-1])


def rescored_codes(
    z: Tensor, codebook: Tensor, *, metric: str = "l2", backend: str = "auto"
) -> Tensor:
    """How many codes of each row `nearest_code` leaves to float64: what exactness costs.

    Args:
        z: as for `nearest_code`, on a CPU or CUDA device.
        codebook: as for `nearest_code`.
        metric: as for `nearest_code`.
        backend: "cpu", "triton" or "auto".

    Returns:
        [...], int64: K where the row needed every code, 0 for a row with a NaN.
    """
    z, codebook = _autocast(z, codebook)
    _check(z, codebook, metric)
    backend = inspect.choose_backend(backend, z.device.type, BACKENDS)
    if backend == "reference":
        raise ValueError("backend: 'reference' has no coarse pass; allowed: 'cpu', 'triton'")
    rescored = torch.zeros(z.shape[:-1], dtype=torch.int64, device=z.device)
    rows = z.detach().reshape(-1, z.shape[-1])
    run = _cpu if z.device.type == "cpu" else _library.on_its_device(_triton)
    _library.untraced(run)(rows, codebook.detach(), metric, False, backend, rescored.view(-1))
    return rescored
