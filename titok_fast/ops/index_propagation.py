"""Index back-propagation quantization: schemas, checks, backends, autograd, public function."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from titok_fast import _library, reference
from titok_fast.ops import _index_propagation_streaming as streaming
from titok_fast.ops import inspect
from titok_fast.ops._index_propagation_streaming import add_rows, wide_dtype
from titok_fast.ops.arguments import (
    as_autocast,
    dense_rows,
    differentiated,
    dtype_name,
    python_number,
    without_autocast,
)
from titok_fast.ops.nearest_code import check_rows_and_codes, nearest_code
from titok_fast.reference.index_propagation import EPS, mean_over_ranks

BACKENDS = {
    "cpu": ("cpu", "triton", "streaming"),
    "cuda": ("triton", "streaming"),
    "meta": ("cpu", "triton", "streaming"),
}
SUPPORT = 256  # codes of a row that are kept for the backward, of the CPU alone
ENTROPY, MAX_PROBABILITY = 4, 5  # columns of the statistics; the others are the backend's

Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def check_temperature(name: str, temperature: float) -> None:
    """TypeError or ValueError unless it is a positive, finite number."""
    if not isinstance(temperature, int | float):
        raise TypeError(f"{name}: expected a float, got {type(temperature).__name__}")
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= temperature <= limits.max:
        raise ValueError(f"{name}: {temperature} is not a positive normal number of float32")


def check_process_group(process_group: object) -> None:
    """TypeError unless it is a ProcessGroup or None."""
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: expected a ProcessGroup or None, got {type(process_group).__name__}"
        )


def _check(
    z: Tensor,
    codebook: Tensor,
    temperature: float,
    process_group: dist.ProcessGroup | None,
    backend: str,
) -> None:
    check_rows_and_codes(z, codebook, wide=backend == "reference")
    if z.ndim != 2:
        raise ValueError(f"z: expected [N, D], got shape {list(z.shape)}")
    check_temperature("temperature", temperature)
    check_process_group(process_group)


def _fake_fwd(
    z: Tensor, codebook: Tensor, temperature: float, entropy: bool, gradients: bool, backend: str
) -> Forward:
    (n, d), k = z.shape, codebook.shape[0]
    support = SUPPORT if entropy and gradients and backend == "cpu" else 0
    return (
        z.new_empty(n, dtype=torch.int64),
        z.new_empty(n if gradients else 0, d, dtype=torch.float32),
        z.new_empty(n, 8, dtype=torch.float32),
        z.new_empty(k, dtype=torch.float64),
        z.new_empty(n, support, dtype=torch.int32),
        z.new_empty(n, support, dtype=torch.float64),
    )


def _fake_bwd(grad: Tensor, z: Tensor, codebook: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), codebook.new_empty(codebook.shape)


def _cpu_fwd(
    z: Tensor, codebook: Tensor, temperature: float, entropy: bool, gradients: bool, backend: str
) -> Forward:
    if backend == "triton":
        return _triton_fwd(z, codebook, temperature, entropy, gradients, backend)
    inspect.require_backend(backend, "cpu")
    extension = inspect.extension()
    z, codebook = dense_rows(z), dense_rows(codebook)
    (n, d), k = z.shape, codebook.shape[0]
    support = SUPPORT if entropy and gradients else 0
    indices = torch.empty(n, dtype=torch.int64, device="cpu")
    mean_code = torch.empty(n if gradients else 0, d, dtype=torch.float32, device="cpu")
    statistics = torch.zeros(n, 8, dtype=torch.float32, device="cpu")
    code_probability = torch.zeros(k, dtype=torch.float64, device="cpu")
    support_codes = torch.full((n, support), -1, dtype=torch.int32, device="cpu")
    support_weights = torch.zeros(n, support, dtype=torch.float64, device="cpu")
    outputs = indices, mean_code, statistics, code_probability, support_codes, support_weights
    if n == 0:
        return outputs
    threads, dtype = torch.get_num_threads(), dtype_name(z.dtype)
    size = extension.index_propagation_cpu_workspace(
        n=n, k=k, d=d, dtype=dtype, threads=threads, backward=False
    )
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    extension.index_propagation_fwd_cpu(
        z=z.data_ptr(),
        z_stride=z.stride(0),
        codebook=codebook.data_ptr(),
        codebook_stride=codebook.stride(0),
        n=n,
        k=k,
        d=d,
        dtype=dtype,
        temperature=temperature,
        entropy=entropy,
        indices=indices.data_ptr(),
        mean_code=mean_code.data_ptr() if gradients else 0,
        statistics=statistics.data_ptr(),
        code_probability=code_probability.data_ptr(),
        support_codes=support_codes.data_ptr(),
        support_weights=support_weights.data_ptr(),
        support=support,
        workspace=workspace.data_ptr(),
        threads=threads,
    )
    return outputs


def _cpu_bwd(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    mean_code: Tensor,
    statistics: Tensor,
    support_codes: Tensor,
    support_weights: Tensor,
    sample_weight: Tensor,
    code_weight: Tensor,
    temperature: float,
    entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        return _triton_bwd(
            grad, z, codebook, indices, mean_code, statistics, support_codes, support_weights,
            sample_weight, code_weight, temperature, entropy, backend,
        )  # fmt: skip
    inspect.require_backend(backend, "cpu")
    extension = inspect.extension()
    grad, z, codebook = grad.float().contiguous(), dense_rows(z), dense_rows(codebook)
    indices, support_codes = indices.contiguous(), support_codes.contiguous()
    mean_code, statistics = mean_code.float().contiguous(), statistics.float().contiguous()
    support_weights, code_weight = (x.double().contiguous() for x in (support_weights, code_weight))
    (n, d), k = z.shape, codebook.shape[0]
    if n == 0:
        return torch.zeros_like(z), torch.zeros_like(codebook)
    grad_z, grad_codebook = z.new_empty(n, d), z.new_empty(k, d)
    threads, dtype = torch.get_num_threads(), dtype_name(z.dtype)
    size = extension.index_propagation_cpu_workspace(
        n=n, k=k, d=d, dtype=dtype, threads=threads, backward=True
    )
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    extension.index_propagation_bwd_cpu(
        grad=grad.data_ptr(),
        z=z.data_ptr(),
        z_stride=z.stride(0),
        codebook=codebook.data_ptr(),
        codebook_stride=codebook.stride(0),
        n=n,
        k=k,
        d=d,
        dtype=dtype,
        temperature=temperature,
        entropy=entropy,
        indices=indices.data_ptr(),
        mean_code=mean_code.data_ptr(),
        statistics=statistics.data_ptr(),
        support_codes=support_codes.data_ptr(),
        support_weights=support_weights.data_ptr(),
        support=support_codes.shape[1],
        sample_weight=float(sample_weight),
        code_weight=code_weight.data_ptr(),
        grad_z=grad_z.data_ptr(),
        grad_codebook=grad_codebook.data_ptr(),
        workspace=workspace.data_ptr(),
        threads=threads,
    )
    return grad_z, grad_codebook


def _triton_fwd(
    z: Tensor, codebook: Tensor, temperature: float, entropy: bool, gradients: bool, backend: str
) -> Forward:
    inspect.require_backend(backend, z.device.type)
    launch = inspect.kernels("index_propagation").launch_index_propagation_fwd
    indices, mean_code, statistics, probability, codes, weights = launch(
        dense_rows(z), dense_rows(codebook), temperature, entropy, gradients
    )
    return indices, mean_code, statistics, probability.double(), codes, weights.double()


def _triton_bwd(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    mean_code: Tensor,
    statistics: Tensor,
    support_codes: Tensor,
    support_weights: Tensor,
    sample_weight: Tensor,
    code_weight: Tensor,
    temperature: float,
    entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    inspect.require_backend(backend, z.device.type)
    launch = inspect.kernels("index_propagation").launch_index_propagation_bwd
    grad_z, grad_codebook = launch(
        dense_rows(grad), dense_rows(z), dense_rows(codebook), indices, mean_code, statistics,
        sample_weight, code_weight, temperature, entropy,
    )  # fmt: skip
    return grad_z, grad_codebook


_fwd_op = _library.register(
    "index_propagation_fwd(Tensor z, Tensor codebook, float temperature, bool entropy, "
    "bool gradients, str backend) -> (Tensor indices, Tensor mean_code, Tensor statistics, "
    "Tensor code_probability, Tensor support_codes, Tensor support_weights)",
    cpu=_cpu_fwd,
    cuda=_triton_fwd,
    fake=_fake_fwd,
)

_bwd_op = _library.register(
    "index_propagation_bwd(Tensor grad, Tensor z, Tensor codebook, Tensor indices, "
    "Tensor mean_code, Tensor statistics, Tensor support_codes, Tensor support_weights, "
    "Tensor sample_weight, Tensor code_weight, float temperature, bool entropy, "
    "str backend) -> (Tensor grad_z, Tensor grad_codebook)",
    cpu=_cpu_bwd,
    cuda=_triton_bwd,
    fake=_fake_bwd,
)


def _streaming_fwd(
    z: Tensor, codebook: Tensor, temperature: float, entropy: bool, gradients: bool, backend: str
) -> Forward:
    indices = nearest_code(z, codebook, metric="dot")
    with without_autocast(z):
        mean_code, statistics, code_probability = streaming.index_propagation_fwd(
            z, codebook, indices, temperature, entropy, gradients
        )
    empty = statistics[:, :0]
    return indices, mean_code, statistics, code_probability, empty.int(), empty


def _streaming_bwd(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    mean_code: Tensor,
    statistics: Tensor,
    support_codes: Tensor,
    support_weights: Tensor,
    sample_weight: Tensor,
    code_weight: Tensor,
    temperature: float,
    entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with without_autocast(z):
        return streaming.index_propagation_bwd(
            grad, z, codebook, indices, mean_code, statistics, sample_weight, code_weight.float(),
            temperature, entropy,
        )  # fmt: skip


class Propagation(NamedTuple):
    """What `propagate` returns.

    Attributes:
        quantized: [N, D], the chosen codes; its gradient passes through the softmax over all codes.
        codes: the same values, whose gradient goes to the chosen codes alone.
        indices: [N] int64.
        sample_entropy: [] float32, the mean entropy of the rows.
        batch_entropy: [] float32, the entropy of the mean over rows (and ranks).
        max_probability: [N] float32, the largest softmax probability of each row; no gradient.
            Empty where neither it nor a gradient or entropy was asked for.
    """

    quantized: Tensor
    codes: Tensor
    indices: Tensor
    sample_entropy: Tensor
    batch_entropy: Tensor
    max_probability: Tensor


class _IndexPropagation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        codebook: Tensor,
        temperature: float,
        entropy: bool,
        process_group: dist.ProcessGroup | None,
        gradients: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        run = _streaming_fwd if backend == "streaming" else _fwd_op
        indices, mean_code, statistics, code_probability, support_codes, support_weights = run(
            z, codebook, temperature, entropy, gradients, backend
        )
        sample_entropy = batch_entropy = statistics.new_zeros(())
        share: Tensor | float = 1.0
        if entropy:
            code_probability, share = mean_over_ranks(code_probability, z.shape[0], process_group)
            probability = code_probability.to(wide_dtype(z.device))
            total = statistics[:, ENTROPY].sum(dtype=probability.dtype)
            sample_entropy = (total / max(1, z.shape[0])).float()
            batch_entropy = -(probability * (probability + EPS).log()).sum().float()
        quantized, max_probability = codebook[indices], statistics[:, MAX_PROBABILITY].clone()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(indices, max_probability)
        ctx.save_for_backward(
            z, codebook, indices, mean_code, statistics, code_probability, support_codes,
            support_weights,
        )  # fmt: skip
        ctx.options = temperature, entropy, backend
        ctx.share = share
        return (
            quantized, quantized.clone(), indices, sample_entropy, batch_entropy.clone(),
            max_probability,
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Activation checkpointing lets a backward unpack what it saved only once.
        saved = ctx.saved_tensors
        with torch.no_grad():
            grad_z, grad_codebook = _IndexPropagation._gradients(ctx, saved, *grads)
        if torch.is_grad_enabled():
            grad_z, grad_codebook = _library.once(
                "index_propagation", (grad_z, grad_codebook), *saved[:2], *grads
            )
        return grad_z, grad_codebook, None, None, None, None, None

    @staticmethod
    def _gradients(
        ctx: Any,
        saved: tuple[Tensor, ...],
        grad: Tensor | None,
        grad_codes: Tensor | None,
        _indices: Tensor | None,
        grad_sample: Tensor | None,
        grad_batch: Tensor | None,
        _max_probability: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        z, codebook, indices, *_ = saved
        if grad is None and grad_sample is None and grad_batch is None:
            grad_z, grad_codebook = torch.zeros_like(z), torch.zeros_like(codebook)
        else:
            grad_z, grad_codebook = _IndexPropagation._through_softmax(
                ctx, saved, grad, grad_sample, grad_batch
            )
        if grad_codes is not None:
            add_rows(grad_codebook, indices, grad_codes)
        return grad_z, grad_codebook

    @staticmethod
    def _through_softmax(
        ctx: Any,
        saved: tuple[Tensor, ...],
        grad: Tensor | None,
        grad_sample: Tensor | None,
        grad_batch: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        z, codebook, indices, mean_code, statistics, code_probability, *support = saved
        support_codes, support_weights = support
        temperature, entropy, backend = ctx.options
        grad = torch.zeros_like(z) if grad is None else grad
        sample_weight = statistics.new_zeros(()) if grad_sample is None else grad_sample
        code_weight = torch.zeros_like(code_probability)
        if grad_batch is not None:
            # DDP takes the mean of the ranks' gradients, each through the mean of its own rows.
            probability = code_probability.to(wide_dtype(z.device))
            slope = -((probability + EPS).log() + probability / (probability + EPS))
            # The same for every code has no effect; small numbers keep more of what differs.
            code_weight = grad_batch * ctx.share * (slope - slope.amin())
        run = _streaming_bwd if backend == "streaming" else _bwd_op
        gradients: tuple[Tensor, Tensor] = run(
            grad, z, codebook, indices, mean_code, statistics, support_codes, support_weights,
            sample_weight, code_weight, temperature, entropy, backend,
        )  # fmt: skip
        return gradients


def propagate(
    z: Tensor,
    codebook: Tensor,
    *,
    temperature: float = 0.01,
    entropy: bool = True,
    process_group: dist.ProcessGroup | None = None,
    probability: bool = True,
    backend: str = "auto",
) -> Propagation:
    """`index_propagation` with what a quantizer layer needs besides; same arguments and errors.

    Args:
        probability: whether `max_probability` is needed. Without it, gradients and entropies the
            softmax is not computed.
    """
    z, codebook = as_autocast(z), as_autocast(codebook)
    temperature = python_number(temperature)
    _check(z, codebook, temperature, process_group, backend)
    device = z.device.type
    order = BACKENDS | {device: BACKENDS.get(device, ("streaming",))}
    backend = inspect.choose_backend(backend, device, order)
    if backend == "reference":
        quantized, *others = reference.index_propagation(
            z, codebook, temperature, entropy, process_group
        )
        return Propagation(quantized, codebook[others[0]], *others)
    gradients = differentiated(z) or differentiated(codebook)
    if not (gradients or entropy or probability):
        search = "auto" if backend == "streaming" else backend
        indices = nearest_code(z, codebook, metric="dot", backend=search)
        codes, zero = codebook[indices], z.new_zeros((), dtype=torch.float32)
        return Propagation(codes, codes, indices, zero, zero, zero[None][:0])
    outputs = _IndexPropagation.apply(  # type: ignore[no-untyped-call]
        z, codebook, float(temperature), entropy, process_group, gradients, backend
    )
    return Propagation(*outputs)


def index_propagation(
    z: Tensor,
    codebook: Tensor,
    *,
    temperature: float = 0.01,
    entropy: bool = True,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index back-propagation quantization (IBQ) and its entropies, without the N x K matrix.

    With logits s = z E^T, p = softmax(s) and q = softmax(s / temperature):

        quantized = E[argmax s], with the gradient of p E for z and s, and of E[argmax s] for E
        sample_entropy = mean over rows of -sum q log q
        batch_entropy = -sum q~ log(q~ + 1e-5), with q~ the mean of q over rows

    Every code gets a gradient from every row. The index is exact, as of `nearest_code` with metric
    "dot". Results and gradients are the same from run to run; there is no double backward, except
    with "reference". Under autocast `z` and `codebook` are cast to its dtype, as for a matrix
    product. A NaN in a row makes the entropies NaN and leaves its index in range.

    Args:
        z: [N, D], float32, float16 or bfloat16 ("reference": also float64), any strides; may be
            empty.
        codebook: E, [K, D] with K >= 1, same dtype and device as `z`.
        temperature: of the entropies, positive.
        entropy: False saves their time; both are then 0.
        process_group: take q~ over the rows of all its ranks, however many each has, which then all
            see the same batch_entropy. Its gradient is such that the mean over ranks, which
            DistributedDataParallel takes, is the gradient of one process with all rows. None: the
            rows of this process alone.
        backend: "cpu" (C++), "triton" (GPU, or CPU tensors in Triton's interpreter), "streaming"
            (PyTorch on any device, chunks of codes, float64 where the device has it), "reference"
            (float64, materialises N x K), or "auto": "cpu" for CPU tensors, "triton" for CUDA
            tensors, "streaming" for others.

    Returns:
        quantized [N, D] in the inputs' dtype, indices [N] int64 without gradient, sample_entropy []
        and batch_entropy [] in float32 and nats (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, a temperature that is not positive, an unknown backend.
        RuntimeError: the backend is not available, the message says what is missing; a second
            derivative is asked for; or a derivative by `torch.func`, which this op does not have.

    Source: IBQ (arXiv 2412.02692, sections 3.2 and 3.3).
    """
    result = propagate(
        z, codebook, temperature=temperature, entropy=entropy, process_group=process_group,
        probability=False, backend=backend,
    )  # fmt: skip
    return result.quantized, result.indices, result.sample_entropy, result.batch_entropy
