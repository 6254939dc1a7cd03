"""A 3x3 convolution of a pixel network, with its neighbours: schema, checks, public function."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from titok_fast import _library, reference
from titok_fast.ops import inspect
from titok_fast.ops.arguments import (
    address,
    check_dtype,
    check_no_gradient,
    check_norm_eps,
    check_tensor,
    dtype_name,
    python_number,
    without_autocast,
)

BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "triton"),
    "cuda": ("triton",),
    "meta": ("cpu", "triton"),
}
# Winograd's G of F(2x2, 3x3): a 3x3 filter g becomes the 4x4 matrix G g G^T.
_FILTER = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
_PACKED = (torch.float32, torch.bfloat16)


def _check_weight(weight: Tensor, *, wide: bool = False) -> None:
    check_dtype("weight", weight, wide=wide)
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or 0 in weight.shape:
        raise ValueError(
            f"weight: expected [O, C, 3, 3] with O >= 1 and C >= 1, got shape {list(weight.shape)}"
        )


def _layout(shape: torch.Size, dtype: torch.dtype) -> tuple[list[int], torch.dtype]:
    """Shape and dtype of the packed weight.

    [panel, position, channel / terms, column, term], or, of the nine positions of the direct
    method, [panel, group of channels and position, channel of the group / terms, column, term].
    """
    columns, positions, channels, terms = inspect.extension().conv3x3_cpu_layout(dtype_name(dtype))
    words = -(-shape[1] // channels) * channels // terms
    kind = torch.bfloat16 if terms == 2 else torch.float32
    groups = words * terms // channels if positions == 9 else 1
    panels = -(-shape[0] // columns)
    return [panels, groups * positions, words // groups, columns, terms], kind


def _check(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    others: dict[str, Tensor | None],
    num_groups: int,
    norm_eps: float,
    upsample: bool,
    backend: str,
) -> None:
    check_dtype("x", x, wide=backend == "reference")
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: expected [B, C, H, W] of 1 or more, got shape {list(x.shape)}")
    batch, channels, height, width = x.shape
    _check_weight(weight, wide=backend == "reference")
    outputs = weight.shape[0]
    check_tensor("weight", weight, [outputs, channels, 3, 3], (x.dtype,), x, "x")
    factor = 2 if upsample else 1
    shapes = {
        "bias": [outputs],
        "norm": [channels],
        "norm_bias": [channels],
        "residual": [batch, outputs, factor * height, factor * width],
    }
    for name, other in others.items():
        if other is not None:
            check_tensor(name, other, shapes[name], (x.dtype,), x, "x")
    for absent, given in (("norm", "norm_bias"), ("norm_bias", "norm")):
        if others[absent] is None and others[given] is not None:
            raise ValueError(f"{absent}: needed where {given} is given")
    if packed is not None:  # its shape depends on the machine
        check_tensor("packed", packed, None, _PACKED, x, "x")
    if not isinstance(num_groups, int):
        raise TypeError(f"num_groups: expected an int, got {type(num_groups).__name__}")
    if others["norm"] is not None and (num_groups < 1 or channels % num_groups):
        raise ValueError(f"num_groups: {num_groups} does not divide {channels} channels")
    check_norm_eps(norm_eps)


def pack_conv3x3(weight: Tensor) -> Tensor:
    """The weight as the C++ of `conv3x3` multiplies by it, for its argument `packed`.

    It takes 16 / 9 times the memory of the weight (bfloat16 with AMX: as much), in float32 where
    this CPU does not multiply the weight's dtype. Its layout is that of this CPU; do not store it.

    Args:
        weight: [O, C, 3, 3], float32, float16 or bfloat16, on the CPU.

    Returns:
        A tensor of five dimensions.

    Raises:
        TypeError: no tensor, or another dtype.
        ValueError: a wrong shape or device.
        RuntimeError: the extension is not built.
    """
    _check_weight(weight)
    if weight.device.type != "cpu":
        raise ValueError(f"weight: on {weight.device}, allowed is cpu")
    layout, kind = _layout(weight.shape, weight.dtype)
    rows, words, columns, terms = layout[1:]
    filters = torch.tensor(_FILTER, dtype=torch.float64, device="cpu")
    both = torch.kron(filters, filters)  # [16, 9]
    direct = rows != len(both)
    split = (rows // 9 if direct else 1, words, terms)  # of the channels
    packed = torch.zeros(layout, dtype=kind, device="cpu")
    for panel, part in zip(packed, weight.detach().split(columns), strict=True):
        transformed = part.flatten(2)  # [columns, C, positions]
        if not direct:
            transformed = transformed.double() @ both.T
        transformed = F.pad(transformed, (0, 0, 0, math.prod(split) - weight.shape[1]))
        own = transformed.unflatten(1, split).permute(1, 4, 2, 0, 3)
        panel[:, :, : len(part)] = own.flatten(0, 1)
    return packed


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    norm_bias: Tensor | None,
    num_groups: int,
    norm_eps: float,
    upsample: bool,
    residual: Tensor | None,
    packed: Tensor | None,
    backend: str,
) -> Tensor:
    batch, _, height, width = x.shape
    factor = 2 if upsample else 1
    shape = (batch, factor * height, factor * width, weight.shape[0])
    return x.new_empty(shape).permute(0, 3, 1, 2)


def _pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H, W, C] without gaps; no copy of a channels-last tensor."""
    return x.permute(0, 2, 3, 1).contiguous()


def _normalised(
    x: Tensor, norm: Tensor, norm_bias: Tensor, num_groups: int, norm_eps: float
) -> Tensor:
    """SiLU(GroupNorm(x)) by Triton, in channels_last."""
    pixels = _pixels(x)
    out = torch.empty_like(pixels)
    launch = inspect.kernels("conv3x3").launch_norm_silu
    launch(pixels, norm.contiguous(), norm_bias.contiguous(), num_groups, norm_eps, out)
    return out.permute(0, 3, 1, 2)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    norm_bias: Tensor | None,
    num_groups: int,
    norm_eps: float,
    upsample: bool,
    residual: Tensor | None,
    packed: Tensor | None,
    backend: str,
) -> Tensor:
    inspect.require_backend(backend, x.device.type)
    if backend == "triton":
        if norm is not None and norm_bias is not None:
            x = _normalised(x, norm, norm_bias, num_groups, norm_eps)
        x = x.contiguous(memory_format=torch.channels_last)
        if upsample:
            x = F.interpolate(x, scale_factor=2.0)
        with without_autocast(x):
            result = F.conv2d(x, weight, bias, padding=1)
        result = result if residual is None else result.add_(residual)
        return _pixels(result).permute(0, 3, 1, 2)
    extension, threads, dtype = inspect.extension(), torch.get_num_threads(), dtype_name(x.dtype)
    (batch, channels, height, width), outputs = x.shape, weight.shape[0]
    if packed is None:
        packed = pack_conv3x3(weight)
    layout, kind = _layout(weight.shape, weight.dtype)
    if list(packed.shape) != layout or packed.dtype != kind:
        raise ValueError(
            f"packed: got {dtype_name(packed.dtype)} {list(packed.shape)}, pack_conv3x3 makes of "
            f"this weight here {dtype_name(kind)} {layout}"
        )
    packed = packed.contiguous()
    factor = 2 if upsample else 1
    out = torch.empty(
        (batch, factor * height, factor * width, outputs), dtype=x.dtype, device="cpu"
    )
    x = _pixels(x)
    residual = None if residual is None else _pixels(residual)
    bias, norm, norm_bias = (t if t is None else t.contiguous() for t in (bias, norm, norm_bias))
    sizes = {
        "shape": (batch, height, width, channels, outputs),
        "groups": 0 if norm is None else num_groups,
        "upsample": upsample,
        "dtype": dtype,
        "threads": threads,
    }
    space = extension.conv3x3_cpu_workspace(**sizes)
    workspace = torch.empty(space, dtype=torch.uint8, device="cpu")
    extension.conv3x3_cpu(
        x.data_ptr(),
        packed.data_ptr(),
        address(bias),
        address(norm),
        address(norm_bias),
        norm_eps,
        address(residual),
        out.data_ptr(),
        workspace=workspace.data_ptr(),
        **sizes,
    )
    return out.permute(0, 3, 1, 2)


_op = _library.register(
    "conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? norm, Tensor? norm_bias, "
    "int num_groups, float norm_eps, bool upsample, Tensor? residual, Tensor? packed, "
    "str backend) -> Tensor",
    cpu=_run,
    cuda=_run,
    fake=_fake,
)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    norm_bias: Tensor | None = None,
    num_groups: int = 32,
    norm_eps: float = 1e-6,
    upsample: bool = False,
    residual: Tensor | None = None,
    packed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A 3x3 convolution of a feature map, with what stands around it in a pixel network.

        h = SiLU(GroupNorm(x))
        out = residual + bias + conv(h)

    Each part is left out with its argument; padding is 1, and `upsample` doubles h before the
    convolution, nearest neighbours.

    "cpu" multiplies by Winograd's F(2x2, 3x3), 4 products for 9. Everything is in float32 and
    rounded once, but in bfloat16, where the CPU multiplies it, the transformed inputs and weights
    are rounded to it: with GroupNorm the error is that of PyTorch's sequence of operations, of a
    bare convolution some twice as large. An input next to an output's own nine has a share
    in its rounding error, and if infinite or NaN may make it NaN. bfloat16 on a CPU with AMX is
    multiplied as it stands, by the nine weights.
    The same bits for any number of threads, from run to run, and for an image whatever the others
    are. "triton" does GroupNorm and SiLU, rounds, and leaves the convolution to PyTorch, whose
    float32 on a GPU is TF32 unless told otherwise. Only "reference" is differentiable.

    Args:
        x: [B, C, H, W], float32, float16 or bfloat16 ("reference": also float64); copied unless it
            is dense in torch.channels_last.
        weight: [O, C, 3, 3], as is everything here in the dtype and on the device of `x`.
        bias: [O].
        norm: [C], the weight of GroupNorm, which SiLU follows.
        norm_bias: [C], its bias, given if `norm` is.
        num_groups: of GroupNorm, a divisor of C.
        norm_eps: of GroupNorm, 0 or more.
        upsample: double height and width first.
        residual: [B, O, H, W], with `upsample` [B, O, 2 H, 2 W].
        packed: `pack_conv3x3(weight)`, for "cpu"; made by the call if it is left out. It is what
            multiplies: keep it up to date with `weight`.
        backend: "cpu" (C++), "triton" (GPU, or CPU tensors in Triton's interpreter), "reference"
            or "auto": "cpu" or "triton" by the device, "reference" where it has neither.

    Returns:
        [B, O, H, W] or [B, O, 2 H, 2 W] in the dtype of `x`, in torch.channels_last.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, groups that do not divide the channels, a negative
            norm_eps, an unknown backend.
        RuntimeError: the backend is not available, the message says what is missing; or a gradient
            would be needed.

    Source: Winograd's minimal filtering (arXiv 1509.09308), GroupNorm (arXiv 1803.08494).
    """
    others = {"bias": bias, "norm": norm, "norm_bias": norm_bias, "residual": residual}
    num_groups, norm_eps = python_number(num_groups), python_number(norm_eps)
    _check(x, weight, packed, others, num_groups, norm_eps, upsample, backend)
    chosen = inspect.choose_or_reference(backend, x.device.type, BACKENDS)
    if chosen == "reference":
        return reference.conv3x3(
            x, weight, num_groups=num_groups, norm_eps=norm_eps, upsample=upsample, **others
        )
    check_no_gradient({"x": x, "weight": weight, **others})
    out: Tensor = _op(
        x, weight, bias, norm, norm_bias, num_groups, norm_eps, upsample, residual, packed, chosen
    )
    return out
