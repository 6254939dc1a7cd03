"""decode_linear against float64: to the bit on small integers, else as near as the reference."""

import functools
import itertools
import math

import pytest
import torch

from tests.gradients import assert_refused
from tests.kernels import assert_kernels_compile
from titok_fast import decode_linear
from titok_fast.ops import inspect
from titok_fast.ops.decode_linear import BACKENDS, MAX_ROWS
from titok_fast.testing import relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PARTS = ("norm", "scale", "shift", "up_weight", "residual", "residual_scale")
LINEAR = ("scale", "shift", "residual", "residual_scale")
COMBINATIONS = [
    parts for count in range(7) for parts in itertools.combinations(PARTS, count)
]  # of what may be left out
SIZES = list(itertools.product((0, 1, 2, 3, 8, 9, 16), (1, 7, 63, 257, 2816), (1, 2, 3, 33, 130)))
FEW_SIZES = [(0, 7, 3), (1, 1, 1), (2, 63, 2), (3, 257, 33), (9, 7, 1), (16, 2816, 3), (2, 2816, 9)]
ROUNDING = 2 * torch.finfo(torch.float32).eps  # of sums in another order
# In float32 a lane adds hundreds of products, of which each rounds by half an eps at most.
FLOAT32 = 1e-6


def inputs(batch, width, size, parts=PARTS, dtype=torch.float32, device="cpu", whole=False):
    """All arguments of `parts`, of size one or `whole` numbers from -3 to 3."""
    shapes = {
        "x": (batch, width),
        "weight": (size, width),
        "norm": (width,),
        "scale": (batch, width),
        "shift": (batch, width),
        "up_weight": (size, width),
        "residual": (batch, size),
        "residual_scale": (batch, size),
    }
    shapes = {name: shape for name, shape in shapes.items() if name in ("x", "weight", *parts)}
    if whole:
        tensors = {name: torch.randint(-3, 4, shape) for name, shape in shapes.items()}
    else:
        tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
        for name in tensors.keys() & {"weight", "up_weight"}:
            tensors[name] *= width**-0.5
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}


def run(tensors, **options):
    tensors = dict(tensors)
    return decode_linear(tensors.pop("x"), tensors.pop("weight"), **tensors, **options)


def double(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}


def assert_accurate(tensors, *, backend, **options):
    """As near to float64 as the reference is in the same dtype."""
    x = tensors["x"]
    actual = run(tensors, backend=backend, **options)
    plain = run(tensors, backend="reference", **options)
    truth = run(double(tensors), backend="reference", **options)
    assert actual.dtype == x.dtype and actual.shape == truth.shape and actual.is_contiguous()
    # Of an h that lies halfway between two values of 16 bits, the op may take the other one.
    allowed = (
        FLOAT32 if x.dtype == torch.float32 else 1.05 * relative_error(plain, truth) + ROUNDING
    )
    error = relative_error(actual, truth)
    assert error <= allowed, f"{[*tensors]}: {error:.3e}, allowed {allowed:.3e}"


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@functools.cache
def whole_numbers():
    """All arguments that are added or multiplied, of the largest size."""
    return double(inputs(16, 2816, 130, LINEAR, whole=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size_is_exact_on_whole_numbers(backend, device, dtype):
    for batch, width, size in FEW_SIZES if backend == "triton" else SIZES:
        extents = {(16, 2816): (batch, width), (130, 2816): (size, width), (16, 130): (batch, size)}
        tensors = {}
        for name, tensor in whole_numbers().items():
            rows, columns = extents[tuple(tensor.shape)]
            tensors[name] = tensor[:rows, :columns].contiguous()
        x, weight, scale, shift, residual, gate = tensors.values()
        expected = residual + gate * ((x * scale + shift) @ weight.T)
        tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
        actual = run(tensors, backend=backend)
        assert actual.dtype == dtype and actual.shape == (batch, size)
        assert torch.equal(actual, expected.to(device, dtype)), (batch, width, size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_combination_of_arguments(backend, device, dtype):
    every = slice(DTYPES.index(dtype), None, 3) if backend == "triton" else slice(None)
    for parts in COMBINATIONS[every]:
        assert_accurate(inputs(3, 37, 7, parts, dtype, device), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_a_transformer(backend, device, dtype):
    sizes = (
        [(2, 256, 33), (16, 257, 17)] if backend == "triton" else [(2, 2816, 1024), (16, 1024, 130)]
    )
    for batch, width, size in sizes:
        for parts in (("norm", "scale", "shift", "up_weight"), ("residual", "residual_scale")):
            assert_accurate(inputs(batch, width, size, parts, dtype, device), backend=backend)


def test_many_outputs(backend, device, monkeypatch):
    """From 4096 on the kernel takes wider blocks; the interpreter takes them for fewer."""
    size = 4099
    if backend == "triton" and device == "cpu":
        size, module = 35, inspect.kernels("decode_linear")
        options = module._options
        monkeypatch.setattr(module, "_options", lambda batch, _, *rest: options(batch, 4096, *rest))
    tensors = inputs(1, 5, size, (), torch.float16, device, whole=True)
    expected = double(tensors)["x"] @ double(tensors)["weight"].T
    assert torch.equal(run(tensors, backend=backend), expected.half())


def test_reference_is_its_formula():
    x, weight, norm, scale, shift, up, residual, gate = double(inputs(20, 11, 5)).values()
    h = shift + scale * norm * x / (x.square().mean(1, keepdim=True) + 0.3).sqrt()
    gated = h @ weight.T / (1 + (-h @ weight.T).exp()) * (h @ up.T)
    actual = decode_linear(
        x, weight, norm=norm, norm_eps=0.3, scale=scale, shift=shift, up_weight=up,
        residual=residual, residual_scale=gate, backend="reference",
    )  # fmt: skip
    assert relative_error(actual, residual + gate * gated) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_rounds_the_input_of_the_products(backend, device, dtype):
    """1 + eps / 4 is 1: shift and scale meet in float32, and the sum of both is rounded."""
    eps = torch.finfo(dtype).eps
    x = torch.tensor([[1.0, 1.0, 1.0]], device=device, dtype=dtype)
    scale, shift = x.clone(), torch.tensor([[0.25, 0.75, -0.125]], device=device, dtype=dtype) * eps
    weight = torch.eye(3, device=device, dtype=dtype)
    for choice in (backend, "reference"):
        h = decode_linear(x, weight, scale=scale, shift=shift, backend=choice)
        assert h.double().tolist() == [[1.0, 1 + eps, 1.0]]
        # What follows the products is not rounded in between.
        y = decode_linear(x, weight, residual=-x, residual_scale=x * (1 + eps), backend=choice)
        assert y.double().tolist() == [[eps] * 3]


@pytest.mark.parametrize("norm_eps", [0.0, 1e-5, 0.5, 100.0])
def test_epsilon(backend, device, norm_eps):
    assert_accurate(inputs(2, 63, 33, ("norm",), device=device), backend=backend, norm_eps=norm_eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_norm_of_large_and_small_rows(backend, device, scale, dtype):
    tensors = inputs(3, 63, 33, ("norm", "scale", "shift"), dtype, device)
    tensors["x"] *= scale
    assert bool(tensors["x"].isfinite().all())
    assert_accurate(tensors, backend=backend, norm_eps=1e-9)


def test_large_gates(backend, device):
    """SiLU of a large number is itself, of a small one nothing, and neither overflows."""
    x = torch.tensor([[1.0], [-1.0]], device=device)
    weight = torch.tensor([[0.0], [50.0], [89.0], [100.0], [1e4], [1e30]], device=device)
    out = decode_linear(x, weight, up_weight=torch.ones_like(weight), backend=backend)
    assert out[0].tolist() == weight[:, 0].tolist()
    assert bool((out[1].abs() <= 1e-20).all())
    gated = decode_linear(x, -weight, up_weight=1e30 * weight.sign(), backend=backend)
    assert bool((gated[0, 2:].abs() <= 1e-5).all())


def test_float16_overflows_to_infinity(backend, device):
    x = torch.tensor([[255.0, 255.0], [255.0, -255.0], [1.0, 2.0]], device=device).half()
    weight = torch.tensor([[255.0, 255.0], [-255.0, -255.0], [1.0, 0.0]], device=device).half()
    inf = torch.inf
    out = decode_linear(x, weight, backend=backend)
    assert out.tolist() == [[inf, -inf, 255.0], [0.0, 0.0, 255.0], [765.0, -765.0, 1.0]]
    out = decode_linear(x, weight, scale=torch.full_like(x, 300.0), backend=backend)
    nan = torch.nan  # of an input of the products that is infinite, times zero or its opposite
    expected = torch.tensor([[inf, -inf, nan], [nan, nan, nan], [inf, -inf, 300.0]]).to(out)
    assert_same(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [PARTS, LINEAR])
def test_nan_and_infinity_reach_only_what_depends_on_them(backend, device, parts, dtype):
    width, size = (5, 7) if backend == "triton" else (21, 19)
    clean = inputs(4, width, size, parts, dtype, device)
    expected = run(clean, backend=backend)
    for name in clean.keys() - {"norm"}:
        last = len(clean[name]) - 1
        for row, value in ((2, torch.nan), (2, torch.inf), (last, torch.nan), (last, -torch.inf)):
            tensors = clean | {name: clean[name].clone()}
            tensors[name][row, 3] = value
            reached = torch.zeros_like(expected, dtype=torch.bool)
            if "weight" in name:
                reached[:, row] = True
            elif "residual" in name:
                reached[row, 3] = True
            else:
                reached[row] = True
            actual = run(tensors, backend=backend)
            assert torch.equal(actual[~reached], expected[~reached]), (name, row, value)
            if value != value:
                assert bool(actual[reached].isnan().all()), (name, row)
                continue
            wanted = run(tensors, backend="reference")
            assert torch.equal(actual.isfinite(), wanted.isfinite()), (name, row, value)
            if parts == LINEAR:  # SiLU of -inf may be anything but finite
                assert torch.equal(actual.isinf(), wanted.isinf()), (name, row, value)


def strided(tensor, columns=5):
    """The same numbers in every other row of a wider tensor of NaN."""
    if tensor.ndim == 1:
        return strided(tensor[None], columns)[0]
    rows, width = tensor.shape
    wide = torch.full((2 * rows + 1, width + 2 * columns), torch.nan).to(tensor)
    part = wide[1::2, columns : columns + width]
    part.copy_(tensor)
    return part


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_tensors(backend, device, dtype):
    for width in (24, 31):
        tensors = inputs(3, width, 7, PARTS, dtype, device)
        expected = run(tensors, backend=backend)
        for name, tensor in tensors.items() if backend != "triton" else ():
            sparse = torch.stack([tensor, tensor * torch.nan], -1)[..., 0]  # rows are not dense
            for change in (strided(tensor), strided(tensor, 8), sparse):
                assert torch.equal(change, tensor)
                assert torch.equal(run(tensors | {name: change}, backend=backend), expected), name
        every = {name: strided(tensor) for name, tensor in tensors.items()}
        if device == "cuda":  # where the order of sums depends on strides
            rounding = FLOAT32 if dtype == torch.float32 else torch.finfo(dtype).eps
            assert relative_error(run(every, backend=backend), expected) < rounding
        else:
            assert torch.equal(run(every, backend=backend), expected)
        for name in ("x", "scale", "shift", "residual", "residual_scale"):
            row = tensors[name][:1].expand_as(tensors[name])  # with a stride of zero
            repeated = run(tensors | {name: row.contiguous()}, backend=backend)
            assert torch.equal(run(tensors | {name: row}, backend=backend), repeated)


def test_rows_beyond_2_to_the_31_elements(backend, device):
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 30 GB")
    tensors = inputs(2, 8, 2, PARTS, torch.bfloat16, device)
    expected = run(tensors, backend=backend)
    stride = 2**31 + 8
    storage = torch.Tensor.new_empty(tensors["x"], stride + 64)  # touched only where written
    far = dict(tensors)
    for i, name in enumerate(n for n, tensor in tensors.items() if tensor.ndim == 2):
        far[name] = storage[8 * i :].as_strided(tensors[name].shape, (stride, 1), 8 * i)
        far[name].copy_(tensors[name])
    assert torch.equal(run(far, backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_any_number_of_threads(backend, dtype, set_threads):
    if backend == "triton":
        pytest.skip("is one of C++")
    tensors = inputs(9, 257, 1031, PARTS, dtype)  # enough for four threads
    set_threads(1)
    expected = run(tensors, backend=backend)
    for count in (2, 3, 4, 16):
        set_threads(count)
        assert torch.equal(run(tensors, backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(backend, dtype):
    if backend == "triton":
        pytest.skip("is one of C++")
    tensors = inputs(MAX_ROWS, 257, 50, PARTS, dtype)
    expected = run(tensors, backend=backend)
    of_rows = ("x", "scale", "shift", "residual", "residual_scale")
    for batch in (1, 2, 3, 4, 5, 7, 8, 9, 15):
        for first in (0, MAX_ROWS - batch):
            rows = slice(first, first + batch)
            part = {name: t[rows] if name in of_rows else t for name, t in tensors.items()}
            assert torch.equal(run(part, backend=backend), expected[rows])


def test_same_bits_from_run_to_run(backend, device):
    tensors = inputs(9, 257, 33, device=device)
    assert torch.equal(run(tensors, backend=backend), run(tensors, backend=backend))


def test_more_rows_are_only_for_the_reference(backend, device):
    tensors = inputs(MAX_ROWS + 1, 7, 3, device=device)
    with pytest.raises(ValueError, match="x: B must be at most 16, got 17"):
        run(tensors, backend=backend)
    assert run(tensors, backend="reference").shape == (MAX_ROWS + 1, 3)


def test_auto_is_the_compiled_op_of_the_device(monkeypatch):
    tensors = inputs(2, 63, 33)
    assert torch.equal(run(tensors), run(tensors, backend="cpu"))
    choose = inspect.choose_or_reference
    assert choose("auto", "cpu", BACKENDS) == "cpu"
    monkeypatch.setattr(inspect, "why_not", lambda *_: None)
    assert choose("auto", "cuda", BACKENDS) == "triton"
    monkeypatch.setattr(inspect, "why_not", lambda *_: "triton is not installed")
    assert choose("auto", "cuda", BACKENDS) == "reference"
    assert choose("triton", "cuda", BACKENDS) == "triton"


def test_meta_tensors_give_shapes():
    tensors = {
        name: tensor.to("meta") for name, tensor in inputs(3, 8, 5, dtype=torch.half).items()
    }
    out = run(tensors)
    assert out.is_meta and out.shape == (3, 5) and out.dtype == torch.half


@pytest.mark.parametrize("parts", [(), PARTS])
def test_opcheck(parts):
    tensors = inputs(3, 9, 5, parts)
    names = ("x", "weight", "norm", None, *PARTS[1:])
    arguments = [1e-5 if name is None else tensors.get(name) for name in names]
    torch.library.opcheck(torch.ops.titok_fast.decode_linear.default, (*arguments, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def f(x, others):
        return run({"x": x * 2} | others) + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        others = inputs(batch, 9, 5)
        x = others.pop("x")
        assert torch.equal(compiled(x, others), f(x, others))


@pytest.mark.parametrize("name", ["x", "weight", *PARTS])
def test_a_gradient_is_refused(name):
    assert_refused(run, inputs(2, 5, 3), name)


def test_reference_has_gradients():
    tensors = double(inputs(2, 3, 2))

    def f(*values):
        return run(dict(zip(tensors, values, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(f, tuple(x.requires_grad_() for x in tensors.values()))


def like(*shape, **options):
    return torch.zeros(*shape, **options)


BAD = [
    ({"norm_eps": None}, TypeError, "norm_eps: expected a float, got NoneType"),
    ({"norm_eps": -1e-5}, ValueError, "norm_eps: -1e-05 is not in [0, inf)"),
    ({"norm_eps": math.nan}, ValueError, "norm_eps: nan is not in [0, inf)"),
    ({"x": [1.0]}, TypeError, "x: expected a Tensor, got list"),
    (
        {"weight": torch.zeros(3, 4).to_sparse()},
        TypeError,
        "weight: layout torch.sparse_coo is not",
    ),
    ({"weight": None}, TypeError, "weight: expected a Tensor, got NoneType"),
    (
        {"x": like(2, 4).double()},
        TypeError,
        "x: dtype torch.float64 is not float32, float16 or bfloat16",
    ),
    ({"x": like(4)}, ValueError, "x: expected [B, W] with W >= 1, got shape [4]"),
    ({"x": like(2, 0)}, ValueError, "x: expected [B, W] with W >= 1, got shape [2, 0]"),
    ({"x": like(17, 4)}, ValueError, "x: B must be at most 16, got 17"),
    ({"weight": like(4)}, ValueError, "weight: expected [N, W] with N >= 1, got shape [4]"),
    ({"weight": like(0, 4)}, ValueError, "weight: expected [N, W] with N >= 1, got shape [0, 4]"),
    ({"weight": like(3, 5)}, ValueError, "weight: expected shape [3, 4], got [3, 5]"),
    ({"weight": like(3, 4).half()}, TypeError, "weight: dtype torch.float16 is not float32"),
    ({"weight": like(3, 4, device="meta")}, ValueError, "weight: on meta, but x is on cpu"),
    ({"norm": like(3)}, ValueError, "norm: expected shape [4], got [3]"),
    ({"norm": like(1, 4)}, ValueError, "norm: expected shape [4], got [1, 4]"),
    ({"scale": like(4)}, ValueError, "scale: expected shape [2, 4], got [4]"),
    ({"shift": like(1, 4)}, ValueError, "shift: expected shape [2, 4], got [1, 4]"),
    ({"up_weight": like(2, 4)}, ValueError, "up_weight: expected shape [3, 4], got [2, 4]"),
    ({"residual": like(2, 4)}, ValueError, "residual: expected shape [2, 3], got [2, 4]"),
    ({"residual_scale": like(3)}, ValueError, "residual_scale: expected shape [2, 3], got [3]"),
    ({"backend": "cuda"}, ValueError, "backend: 'cuda' is not one of 'auto', 'cpu', 'triton', 're"),
    *[({name: 1.0}, TypeError, f"{name}: expected a Tensor, got float") for name in PARTS],
    *[
        (
            {name: tensor.bfloat16()},
            TypeError,
            f"{name}: dtype torch.bfloat16 is not float32",
        )
        for name, tensor in inputs(2, 4, 3).items()
        if name in PARTS
    ],
    *[
        ({name: tensor.to("meta")}, ValueError, f"{name}: on meta, but x is on cpu")
        for name, tensor in inputs(2, 4, 3).items()
        if name in PARTS
    ],
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input(change, error, words):
    with pytest.raises(error) as raised:
        run(inputs(2, 4, 3, ()) | change)
    assert str(raised.value).startswith(words)
    assert "\n" not in str(raised.value)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 4, 5, 16])
def test_gpu_graph_capture(batch):
    tensors = inputs(batch, 1024, 2816, dtype=torch.bfloat16, device="cuda")
    run(tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(tensors)
    for tensor in tensors.values():
        tensor.neg_()
    graph.replay()
    assert torch.equal(out, run(tensors))


def test_kernels_compile_for_every_architecture(monkeypatch):
    """Two rows are too few for the instructions that multiply from shared memory."""
    everywhere = dict.fromkeys(inspect.CAPABILITIES, "HMMA")
    monkeypatch.setattr("tests.kernels.MATRIX_INSTRUCTIONS", everywhere)
    assert_kernels_compile("decode_linear", {"decode_linear_kernel"})
