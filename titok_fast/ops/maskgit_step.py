"""One MaskGIT sampling step: schema, checks, backends and the public function."""

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
MAX_VOCABULARY = 1 << 30  # a GPU's indices have 32 bits
GUIDANCE_FORMS = ("cond", "uncond")
CONFIDENCES = ("logit", "log_probability")
COUNTS = ("num_masked", "seed", "step")
FACTORS = ("guidance_scale", "softmax_temperature", "token_temperature", "confidence_temperature")

Result = tuple[Tensor, Tensor, Tensor]


def _check(
    cond_logits: Tensor,
    ids: Tensor,
    uncond_logits: Tensor | None,
    image_ids: Tensor | None,
    positions: Tensor | None,
    noise: tuple[Tensor, Tensor] | None,
    mask_id: int,
    guidance_form: str,
    confidence: str,
    numbers: dict[str, Any],
) -> None:
    check_dtype("cond_logits", cond_logits)
    if cond_logits.ndim != 3 or not 1 <= cond_logits.shape[2] <= MAX_VOCABULARY:
        raise ValueError(
            f"cond_logits: expected [B, L, V] with 1 <= V <= {MAX_VOCABULARY}, got shape "
            f"{list(cond_logits.shape)}"
        )
    batch, length, vocabulary = cond_logits.shape
    check_tensor("ids", ids, [batch, length], (torch.int64,), cond_logits, "cond_logits")
    if uncond_logits is not None:
        shape = [batch, length, vocabulary]
        check_tensor(
            "uncond_logits", uncond_logits, shape, (cond_logits.dtype,), cond_logits, "cond_logits"
        )
    if image_ids is not None:
        check_tensor("image_ids", image_ids, [batch], (torch.int64,), cond_logits, "cond_logits")
    if positions is not None:
        check_tensor(
            "positions", positions, [batch, length], (torch.int64,), cond_logits, "cond_logits"
        )
    if noise is not None:
        if not isinstance(noise, tuple | list) or len(noise) != 2:
            raise TypeError(
                "noise: expected (token uniforms [B, L, V], confidence uniforms [B, L]), got "
                f"{type(noise).__name__}"
            )
        shape, float32 = [batch, length, vocabulary], (torch.float32,)
        check_tensor("noise[0]", noise[0], shape, float32, cond_logits, "cond_logits")
        check_tensor("noise[1]", noise[1], [batch, length], float32, cond_logits, "cond_logits")
    if not isinstance(mask_id, int | torch.SymInt) or isinstance(mask_id, bool):
        raise TypeError(f"mask_id: expected an int, got {type(mask_id).__name__}")
    if not -(2**63) <= mask_id < 2**63:
        raise ValueError(f"mask_id: {mask_id} is not an int64")
    if guidance_form not in GUIDANCE_FORMS:
        raise ValueError(f"guidance_form: {guidance_form!r} is not one of 'cond', 'uncond'")
    if confidence not in CONFIDENCES:
        raise ValueError(f"confidence: {confidence!r} is not one of 'logit', 'log_probability'")

    for name, value in numbers.items():
        shapes = ([], [batch]) if name == "num_masked" else ([],)
        check_number(name, value, name in COUNTS, shapes, cond_logits, "cond_logits")
    fixed = {name: x for name, x in numbers.items() if not isinstance(x, Tensor)}
    if not 0 <= fixed.get("num_masked", 0) <= length:
        raise ValueError(f"num_masked: {fixed['num_masked']} is not in [0, L = {length}]")
    check_counters(fixed)
    if not fixed.get("softmax_temperature", 1.0) >= 2**-149:  # of float32
        raise ValueError(f"softmax_temperature: {fixed['softmax_temperature']} is not positive")
    for name in ("token_temperature", "confidence_temperature"):
        if fixed.get(name, 0.0) < 0:
            raise ValueError(f"{name}: {fixed[name]} is negative")
    neutral = 0.0 if guidance_form == "cond" else 1.0
    if uncond_logits is None and fixed.get("guidance_scale") != neutral:
        raise ValueError(
            f"uncond_logits: needed for guidance_form {guidance_form!r} unless guidance_scale is "
            f"{neutral:g}"
        )


def _fake(cond_logits: Tensor, uncond_logits: Tensor | None, ids: Tensor, *_: object) -> Result:
    shape = ids.shape
    return ids.new_empty(shape), ids.new_empty(shape), ids.new_empty(shape, dtype=torch.float32)


def _run(
    cond_logits: Tensor,
    uncond_logits: Tensor | None,
    ids: Tensor,
    mask_id: int,
    image_ids: Tensor | None,
    positions: Tensor | None,
    token_noise: Tensor | None,
    confidence_noise: Tensor | None,
    guidance_form: str,
    confidence: str,
    counts: list[int],
    factors: list[float],
    tensors: list[Tensor | None],
    backend: str,
) -> Result:
    inspect.require_backend(backend, ids.device.type)
    extension = inspect.extension()
    cond = dense_rows(cond_logits)
    uncond = None if uncond_logits is None else dense_rows(uncond_logits)
    # Whatever is made here must live until the call: its memory goes by address.
    ids = ids.contiguous()
    image_ids, positions, token_noise, confidence_noise = (
        None if x is None else x.contiguous()
        for x in (image_ids, positions, token_noise, confidence_noise)
    )
    values, tensors = by_address(COUNTS, FACTORS, counts, factors, tensors)
    batch, length, vocabulary = cond.shape
    ids_next, tokens = (
        torch.empty(batch, length, dtype=torch.int64, device=ids.device) for _ in "ab"
    )
    scores = torch.empty(batch, length, dtype=torch.float32, device=ids.device)
    threads = torch.get_num_threads()
    workspace, stream = None, 0
    if backend == "cpu":
        size = extension.maskgit_step_cpu_workspace(length, vocabulary, threads)
        workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    else:
        stream = torch.cuda.current_stream(ids.device).cuda_stream
    run = extension.maskgit_step_cpu if backend == "cpu" else extension.maskgit_step_cuda
    run(
        cond=cond.data_ptr(),
        uncond=address(uncond),
        cond_strides=cond.stride()[:2],
        uncond_strides=(0, 0) if uncond is None else uncond.stride()[:2],
        batch=batch,
        length=length,
        vocabulary=vocabulary,
        dtype=dtype_name(cond.dtype),
        from_uncond=guidance_form == "uncond",
        kind=confidence,
        ids=ids.data_ptr(),
        mask_id=mask_id,
        image_ids=address(image_ids),
        positions=address(positions),
        token_noise=address(token_noise),
        confidence_noise=address(confidence_noise),
        **values,
        num_masked_stride=tensors[0].stride(0) if tensors[0] is not None and tensors[0].ndim else 0,
        ids_next=ids_next.data_ptr(),
        tokens=tokens.data_ptr(),
        confidence=scores.data_ptr(),
        workspace=address(workspace),
        threads=threads,
        stream=stream,
    )
    return ids_next, tokens, scores


_op = _library.register(
    "maskgit_step(Tensor cond_logits, Tensor? uncond_logits, Tensor ids, int mask_id, "
    "Tensor? image_ids, Tensor? positions, Tensor? token_noise, Tensor? confidence_noise, "
    "str guidance_form, str confidence, SymInt[] counts, float[] factors, Tensor?[] tensors, "
    "str backend) -> (Tensor ids_next, Tensor tokens, Tensor scores)",
    cpu=_run,
    cuda=_run,
    fake=_fake,
)


def maskgit_step(
    cond_logits: Tensor,
    ids: Tensor,
    *,
    mask_id: int,
    num_masked: Count,
    uncond_logits: Tensor | None = None,
    guidance_scale: Number = 0.0,
    guidance_form: str = "cond",
    softmax_temperature: Number = 1.0,
    token_temperature: Number = 1.0,
    confidence: str = "logit",
    confidence_temperature: Number = 0.0,
    seed: Count,
    step: Count,
    image_ids: Tensor | None = None,
    positions: Tensor | None = None,
    noise: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Result:
    """One sampling step of MaskGIT: draw the masked tokens, mask the least confident again.

    For each masked position: the combined logits are z = cond + s (cond - uncond), or
    uncond + s (cond - uncond); a token t is drawn from
    softmax(z / (softmax_temperature token_temperature)); its confidence is
    z_t / softmax_temperature, or log softmax(z / softmax_temperature)_t, plus
    confidence_temperature times Gumbel noise. In each image the `num_masked` least confident of the
    masked positions are masked again; of equal ones the lower position is.

    The tokens depend on the seed, the image's id, the step, the position and its own logits alone:
    they have the same bits on every backend, in every batch and with any number of threads. Each
    number may be a tensor on the logits' device, which a captured CUDA graph reads at every replay;
    the values of such a tensor are not checked, but none leads to a token out of range.

    A NaN logit counts as -inf, and a token of logit -inf is never drawn. A position that has only
    such logits gets token 0 with confidence -inf. Logits of +inf share all probability. Logits of
    unmasked positions are not read.

    Args:
        cond_logits: [B, L, V], float32, float16 or bfloat16, any strides; B and L may be 0. The
            arithmetic is float32.
        ids: [B, L] int64, the current tokens.
        mask_id: the id of a masked position.
        num_masked: how many positions of each image to mask again, [] or [B]; of an image that has
            fewer masked ones, all.
        uncond_logits: [B, L, V], of the same dtype, or None for no guidance.
        guidance_scale: s above. With form "cond" the number 0 leaves `uncond_logits` unread.
        guidance_form: "cond" (linear and constant decay) or "uncond" (power-cosine decay).
        softmax_temperature: positive.
        token_temperature: not negative; 0 takes the largest logit, of equal ones the first.
        confidence: "logit" (TiTok) or "log_probability" (MaskGIT).
        confidence_temperature: not negative.
        seed: in [0, 2**63), the key of Philox4x32-10.
        step: of the sampling loop; with the image's id and the position it is Philox's counter,
            each modulo 2**32.
        image_ids: [B] int64, an id for each image, so that it gets the same tokens in any batch;
            None counts from 0.
        positions: [B, L] int64, ascending, where the given columns stand in their images, when
            they are a part of them; None counts from 0.
        noise: float32 uniforms in [0, 1) in place of Philox: (token [B, L, V], confidence [B, L]).
            The token is then that of the largest z / softmax_temperature + token_temperature times
            Gumbel noise, as in the official code.
        backend: "cpu" (C++), "cuda" (CUDA C++), "reference" (PyTorch), or "auto": "cpu" for CPU
            tensors, "cuda" for CUDA tensors, or "reference" where the build has none; tensors of
            any other device are copied to the CPU and back.

    Returns:
        ids_next [B, L] int64: `tokens` with the least confident masked again; tokens [B, L] int64:
        `ids` with every masked position drawn; confidence [B, L] float32, +inf where not masked.
        No gradient flows through them.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, an unknown option or backend.
        RuntimeError: the backend is not available; the message says what is missing.

    Source: MaskGIT (arXiv 2202.04200, section 3.2) as sampled by TiTok (arXiv 2406.07550, section
    3.4); guidance of Muse (arXiv 2301.00704, section 2.7).
    """
    numbers: dict[str, Any] = {
        "num_masked": num_masked,
        "seed": seed,
        "step": step,
        "guidance_scale": guidance_scale,
        "softmax_temperature": softmax_temperature,
        "token_temperature": token_temperature,
        "confidence_temperature": confidence_temperature,
    }
    numbers = {name: python_number(value) for name, value in numbers.items()}
    mask_id = python_number(mask_id)
    _check(
        cond_logits, ids, uncond_logits, image_ids, positions, noise, mask_id, guidance_form,
        confidence, numbers,
    )  # fmt: skip
    if not isinstance(guidance_scale, Tensor) and guidance_scale == 0 and guidance_form == "cond":
        uncond_logits = None
    device = cond_logits.device
    to_cpu = backend == "auto" and device.type not in BACKENDS

    def ready(x: Tensor) -> Tensor:
        x = x.detach() if x.requires_grad else x
        return x.cpu() if to_cpu else x

    cond, ids = ready(cond_logits), ready(ids)
    uncond = None if uncond_logits is None else ready(uncond_logits)
    image_ids = None if image_ids is None else ready(image_ids)
    positions = None if positions is None else ready(positions)
    noise = None if noise is None else (ready(noise[0]), ready(noise[1]))
    given = [ready(x) if isinstance(x, Tensor) else None for x in numbers.values()]
    backend = inspect.choose_or_reference(backend, cond.device.type, BACKENDS)
    if backend == "reference":
        results = reference.maskgit_step(
            cond,
            ids,
            mask_id=mask_id,
            uncond_logits=uncond,
            guidance_form=guidance_form,
            confidence=confidence,
            image_ids=image_ids,
            positions=positions,
            noise=noise,
            **as_tensors(COUNTS, numbers, given, cond.device),
        )
    else:
        token_noise, confidence_noise = (None, None) if noise is None else noise
        plain = [0 if isinstance(x, Tensor) else x for x in numbers.values()]
        counts, factors = plain[: len(COUNTS)], [float(x) for x in plain[len(COUNTS) :]]
        results = _op(
            cond, uncond, ids, mask_id, image_ids, positions, token_noise, confidence_noise,
            guidance_form, confidence, counts, factors, given, backend,
        )  # fmt: skip
    ids_next, tokens, scores = results
    if to_cpu:
        ids_next, tokens, scores = ids_next.to(device), tokens.to(device), scores.to(device)
    return ids_next, tokens, scores
