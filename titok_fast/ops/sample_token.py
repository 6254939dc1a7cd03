"""A token drawn from each row of logits: schema, checks, backends and the public function."""

from typing import Any

import torch
from torch import Tensor

from titok_fast import _library, reference
from titok_fast.ops import inspect
from titok_fast.ops.arguments import (
    Count,
    Number,
    address,
    as_tensors,
    by_address,
    check_counters,
    check_dtype,
    check_number,
    check_tensor,
    dense_rows,
    dtype_name,
    python_number,
)

BACKENDS: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda",), "meta": ("cpu",)}
COUNTS = ("top_k", "seed", "step")
FACTORS = ("guidance_scale", "temperature", "top_p")
MAX_VOCABULARY = 1 << 20  # sums of 40-bit weights stay below 2^60


def _check(
    logits: Tensor, uncond_logits: Tensor | None, image_ids: Tensor | None, numbers: dict[str, Any]
) -> None:
    check_dtype("logits", logits)
    if logits.ndim != 2 or not 1 <= logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(
            f"logits: expected [B, V] with 1 <= V <= {MAX_VOCABULARY}, got shape "
            f"{list(logits.shape)}"
        )
    batch, vocabulary = logits.shape
    if uncond_logits is not None:
        shape = [batch, vocabulary]
        check_tensor("uncond_logits", uncond_logits, shape, (logits.dtype,), logits, "logits")
    if image_ids is not None:
        check_tensor("image_ids", image_ids, [batch], (torch.int64,), logits, "logits")
    for name, value in numbers.items():
        check_number(name, value, name in COUNTS, ([],), logits, "logits")
    fixed = {name: x for name, x in numbers.items() if not isinstance(x, Tensor)}
    check_counters(fixed)
    if not 0 <= fixed.get("top_k", 0) < 2**63:
        raise ValueError(f"top_k: {fixed['top_k']} is not in [0, 2**63)")
    if not 0 <= fixed.get("top_p", 1.0) <= 1:
        raise ValueError(f"top_p: {fixed['top_p']} is not in [0, 1]")
    if fixed.get("temperature", 1.0) < 0:
        raise ValueError(f"temperature: {fixed['temperature']} is negative")
    if uncond_logits is None and fixed.get("guidance_scale") != 1:
        raise ValueError("uncond_logits: needed unless guidance_scale is 1")


def _fake(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def _run(
    logits: Tensor,
    uncond_logits: Tensor | None,
    image_ids: Tensor | None,
    counts: list[int],
    factors: list[float],
    tensors: list[Tensor | None],
    backend: str,
) -> Tensor:
    inspect.require_backend(backend, logits.device.type)
    extension = inspect.extension()
    # Whatever is made here must live until the call: its memory goes by address.
    cond = dense_rows(logits)
    uncond = None if uncond_logits is None else dense_rows(uncond_logits)
    image_ids = None if image_ids is None else image_ids.contiguous()
    values, _alive = by_address(COUNTS, FACTORS, counts, factors, tensors)
    batch, vocabulary = cond.shape
    threads = torch.get_num_threads()
    if backend == "cpu":
        size = extension.sample_token_cpu_workspace(batch, vocabulary, threads)
        run, stream = extension.sample_token_cpu, 0
    else:
        size = extension.sample_token_cuda_workspace(
            batch, vocabulary, top_k=values["top_k"], top_p=values["top_p"]
        )
        run, stream = extension.sample_token_cuda, torch.cuda.current_stream().cuda_stream
    workspace = torch.empty(size, dtype=torch.uint8, device=cond.device)
    tokens = torch.empty(batch, dtype=torch.int64, device=cond.device)
    run(
        cond=cond.data_ptr(),
        uncond=address(uncond),
        cond_stride=cond.stride(0),
        uncond_stride=0 if uncond is None else uncond.stride(0),
        batch=batch,
        vocabulary=vocabulary,
        dtype=dtype_name(cond.dtype),
        image_ids=address(image_ids),
        **values,
        tokens=tokens.data_ptr(),
        workspace=workspace.data_ptr(),
        threads=threads,
        stream=stream,
    )
    return tokens


_op = _library.register(
    "sample_token(Tensor logits, Tensor? uncond_logits, Tensor? image_ids, SymInt[] counts, "
    "float[] factors, Tensor?[] tensors, str backend) -> Tensor",
    cpu=_run,
    cuda=_run,
    fake=_fake,
)


def sample_token(
    logits: Tensor,
    *,
    uncond_logits: Tensor | None = None,
    guidance_scale: Number = 1.0,
    temperature: Number = 1.0,
    top_k: Count = 0,
    top_p: Number = 1.0,
    seed: Count,
    step: Count,
    image_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Draw a token for each row of logits, as an autoregressive transformer is sampled.

    The guided logits are z = uncond + s (cond - uncond). Of softmax(z / temperature), top-k keeps
    the tokens whose z is not below the k-th largest, equal ones included. Of what is left,
    normalized again, top-p keeps a token when all tokens of larger z together have a probability of
    at most `top_p`, so that the largest always stays and equal ones stay or go together. The token
    is drawn from the rest. Nothing is sorted.

    A token depends on the seed, the image's id, the step and its row alone: it has the same bits on
    every backend, in every batch and with any number of threads. Each number may be a tensor on the
    logits' device, which a captured CUDA graph reads at every replay; the values of such a tensor
    are not checked, but none leads to a token out of range.

    A NaN logit counts as -inf, and a token of logit -inf is never drawn, nor is one less probable
    than 2^-40 times the largest. A row that has only such logits gets token 0. Logits of +inf
    share all probability; they weigh as the largest float32 does.

    Args:
        logits: [B, V], float32, float16 or bfloat16, any strides; B may be 0, V at most 2**20. The
            arithmetic is float32, sums are exact.
        uncond_logits: [B, V], of the same dtype, or None for no guidance.
        guidance_scale: s above; 1 leaves `uncond_logits` unread.
        temperature: not negative; 0 takes the largest z, of equal ones the first.
        top_k: 0 or at least V keeps all.
        top_p: in [0, 1]; 1 keeps all.
        seed: in [0, 2**63), the key of Philox4x32-10.
        step: which token of the sequence this is; with the image's id it is Philox's counter, each
            modulo 2**32.
        image_ids: [B] int64, an id for each row, so that it gets the same tokens in any batch; None
            counts from 0.
        backend: "cpu" (C++), "cuda" (CUDA C++), "reference" (PyTorch, sorts), or "auto": "cpu" for
            CPU tensors, "cuda" for CUDA tensors, or "reference" where the build has none; tensors
            of any other device are copied to the CPU and back.

    Returns:
        Tokens [B] int64. No gradient flows through them.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, an unknown backend.
        RuntimeError: the backend is not available; the message says what is missing.

    Source: the sampling of IBQ (arXiv 2412.02692); top-p of Holtzman et al. (arXiv 1904.09751).
    """
    numbers: dict[str, Any] = {
        "top_k": top_k,
        "seed": seed,
        "step": step,
        "guidance_scale": guidance_scale,
        "temperature": temperature,
        "top_p": top_p,
    }
    numbers = {name: python_number(value) for name, value in numbers.items()}
    _check(logits, uncond_logits, image_ids, numbers)
    device = logits.device
    to_cpu = backend == "auto" and device.type not in BACKENDS

    def ready(x: Tensor) -> Tensor:
        x = x.detach() if x.requires_grad else x
        return x.cpu() if to_cpu else x

    cond = ready(logits)
    uncond = None if uncond_logits is None else ready(uncond_logits)
    image_ids = None if image_ids is None else ready(image_ids)
    given = [ready(x) if isinstance(x, Tensor) else None for x in numbers.values()]
    backend = inspect.choose_or_reference(backend, cond.device.type, BACKENDS)
    if backend == "reference":
        tokens = reference.sample_token(
            cond,
            uncond_logits=uncond,
            image_ids=image_ids,
            **as_tensors(COUNTS, numbers, given, cond.device),
        )
    else:
        plain = [0 if isinstance(x, Tensor) else x for x in numbers.values()]
        counts, factors = plain[: len(COUNTS)], [float(x) for x in plain[len(COUNTS) :]]
        tokens = _op(cond, uncond, image_ids, counts, factors, given, backend)
    return tokens.to(device) if to_cpu else tokens
