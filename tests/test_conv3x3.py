"""conv3x3 against float64: to the bit on small integers, else as near as PyTorch's sequence."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests.gradients import assert_refused
from tests.kernels import assert_kernels_compile
from titok_fast import conv3x3, pack_conv3x3
from titok_fast.testing import cpu_isa, relative_error, supported_isas

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PARTS = ("bias", "norm", "residual", "upsample")
COMBINATIONS = [parts for n in range(5) for parts in itertools.combinations(PARTS, n)]
# Of a result rounded once; in bfloat16 also of products whose both factors are rounded, and of
# which an output adds up to nine.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}
# [B, C, O, H, W] on every side of a vector, a tile, a patch and a block.
SIZES = [
    (0, 3, 2, 4, 4),
    (1, 1, 1, 1, 1),
    (2, 4, 3, 2, 1),
    (1, 7, 65, 3, 8),
    (3, 16, 64, 5, 5),
    (1, 17, 63, 1, 33),
    (2, 33, 130, 18, 4),
    (1, 48, 32, 7, 19),
]
FEW_SIZES = [(0, 3, 2, 4, 4), (1, 1, 1, 1, 1), (2, 7, 5, 3, 8), (1, 16, 33, 9, 9)]


@pytest.fixture(autouse=True)
def _true_float32():
    """A GPU's convolutions multiply in float32, and in one order."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
        yield


def inputs(size, parts=PARTS, dtype=torch.float32, device="cpu", whole=False):
    """Arguments of `parts`, of size one or `whole` numbers from -3 to 3; in channels_last."""
    batch, channels, outputs, height, width = size
    factor = 2 if "upsample" in parts else 1
    shapes = {
        "x": (batch, channels, height, width),
        "weight": (outputs, channels, 3, 3),
        "bias": (outputs,),
        "norm": (channels,),
        "norm_bias": (channels,),
        "residual": (batch, outputs, factor * height, factor * width),
    }
    wanted = {"x", "weight", *parts} | ({"norm_bias"} if "norm" in parts else set())
    tensors = {}
    for name in shapes.keys() & wanted:
        shape = shapes[name]
        tensor = torch.randint(-3, 4, shape).float() if whole else torch.randn(shape)
        if name == "weight" and not whole:
            tensor *= (9 * channels) ** -0.5
        if len(shape) == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        tensors[name] = tensor.to(device, dtype)
    options = {"upsample": True} if "upsample" in parts else {}
    return tensors | options | ({"num_groups": 1} if "norm" in parts else {})


def run(arguments, **options):
    return conv3x3(**(arguments | options))


def double(arguments):
    return {k: v.double() if torch.is_tensor(v) else v for k, v in arguments.items()}


def assert_accurate(arguments, *, backend, **options):
    x = arguments["x"]
    actual = run(arguments, backend=backend, **options)
    truth = run(double(arguments), backend="reference", **options)
    assert actual.dtype == x.dtype and actual.shape == truth.shape
    assert actual.is_contiguous(memory_format=torch.channels_last)
    error = relative_error(actual, truth)
    assert error <= TOLERANCE[x.dtype], f"{[*arguments]}: {error:.3e}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size_is_exact_on_whole_numbers(backend, device, dtype):
    for size in FEW_SIZES if backend == "triton" else SIZES:
        for parts in ((), ("bias", "residual"), ("upsample",)):
            arguments = inputs(size, parts, dtype, device, whole=True)
            expected = run(double(arguments), backend="reference")
            actual = run(arguments, backend=backend)
            assert actual.dtype == dtype and torch.equal(actual, expected.to(dtype)), (size, parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_combination_of_arguments(backend, device, dtype):
    for parts in COMBINATIONS:
        assert_accurate(inputs((2, 24, 20, 5, 6), parts, dtype, device), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 64, 96, 34, 18), (2, 256, 64, 8, 8)])
def test_layers_of_a_decoder(backend, device, dtype, size):
    arguments = inputs(size, ("norm", "residual", "bias"), dtype, device) | {"num_groups": 32}
    assert_accurate(arguments, backend=backend)
    if backend == "cpu":
        # No worse than the four operations of PyTorch, each of which rounds.
        truth = run(double(arguments), backend="reference")
        x = F.silu(
            F.group_norm(arguments["x"], 32, arguments["norm"], arguments["norm_bias"], 1e-6)
        )
        plain = F.conv2d(x, arguments["weight"], arguments["bias"], padding=1)
        plain += arguments["residual"]
        error = relative_error(run(arguments, backend=backend), truth)
        assert error <= 1.05 * relative_error(plain, truth)


def test_reference_is_its_formula():
    arguments = double(inputs((2, 6, 5, 3, 4))) | {"num_groups": 3, "norm_eps": 0.3}
    x = arguments["x"].reshape(2, 3, 2 * 12)
    x = (x - x.mean(2, True)) / (x.var(2, unbiased=False, keepdim=True) + 0.3).sqrt()
    x = x.reshape(2, 6, 3, 4) * arguments["norm"].view(6, 1, 1)
    x = x + arguments["norm_bias"].view(6, 1, 1)
    h = F.pad((x / (1 + (-x).exp())).repeat_interleave(2, 2).repeat_interleave(2, 3), (1,) * 4)
    out = arguments["residual"] + arguments["bias"].view(5, 1, 1)
    for i, j in itertools.product(range(3), range(3)):
        out = out + torch.einsum(
            "bchw,oc->bohw", h[..., i : i + 6, j : j + 8], arguments["weight"][..., i, j]
        )
    assert relative_error(run(arguments, backend="reference"), out) < 1e-14


@pytest.mark.parametrize("num_groups", [1, 2, 3, 12, 24])
def test_groups(backend, device, num_groups):
    arguments = inputs((2, 24, 9, 5, 3), ("norm",), device=device) | {"num_groups": num_groups}
    arguments["x"] *= torch.arange(1, 25, device=device).view(24, 1, 1)
    assert_accurate(arguments, backend=backend)


@pytest.mark.parametrize("norm_eps", [0.0, 1e-6, 0.5, 100.0])
def test_epsilon(backend, device, norm_eps):
    arguments = inputs((1, 8, 9, 4, 5), ("norm",), device=device)
    assert_accurate(arguments, backend=backend, norm_eps=norm_eps)


def test_norm_of_data_with_a_large_mean(backend, device):
    """The spread is a thousandth of the mean; the chunks of pixels differ."""
    arguments = inputs((2, 16, 8, 12, 11), ("norm",), device=device) | {"num_groups": 4}
    slope = torch.linspace(0, 1, 11, device=device)
    arguments["x"] = 1000 + arguments["x"] + slope
    truth = run(double(arguments), backend="reference")
    assert relative_error(run(arguments, backend=backend), truth) <= 2e-4  # of x's own rounding


@pytest.mark.parametrize("value", [5.0, 1.9, 100.1])
@pytest.mark.parametrize("size", [(3, 3), (20, 31)])
def test_norm_of_a_constant_image(backend, device, value, size):
    """Nothing is left of it: the factor of 1,000 would show any rounding of the mean."""
    arguments = inputs((1, 8, 4, *size), ("norm",), device=device)
    arguments["x"].fill_(value)
    assert_accurate(arguments, backend=backend, norm_eps=1e-6)


def test_silu_of_large_numbers(backend, device):
    arguments = inputs((1, 4, 4, 4, 4), ("norm",), device=device)
    arguments["norm"] *= 1e4
    assert_accurate(arguments, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_reaches_only_its_patch_and_its_image(backend, device, dtype):
    arguments = inputs((2, 8, 6, 10, 10), ("bias", "residual"), dtype, device)
    clean = run(arguments, backend=backend)
    for value in (torch.nan, torch.inf):
        x = arguments["x"].clone()
        x[1, 3, 5, 4] = value
        actual = run(arguments | {"x": x}, backend=backend)
        near = torch.zeros_like(clean, dtype=torch.bool)
        near[1, :, 4:8, 2:6] = True  # the outputs of all patches that hold the pixel
        assert torch.equal(actual[~near], clean[~near])
        own = actual[1, :, 4:7, 3:6]
        assert not own.isfinite().any() and (value == torch.inf or own.isnan().all())
    weight = arguments["weight"].clone()
    weight[2, 1, 0, 0] = torch.nan
    actual = run(arguments | {"weight": weight}, backend=backend)
    other = torch.arange(6, device=device) != 2
    assert torch.equal(actual[:, other], clean[:, other])
    assert bool(actual[:, 2, 1:, 1:].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_tensors(backend, device, dtype):
    arguments = inputs((2, 12, 10, 5, 4), PARTS, dtype, device)
    expected = run(arguments, backend=backend)
    for name in ("x", "weight", "bias", "norm", "norm_bias", "residual"):
        tensor = arguments[name]
        sparse = torch.stack([tensor, tensor * torch.nan], -1)[..., 0]
        for change in (sparse, tensor.clone(memory_format=torch.contiguous_format)):
            assert torch.equal(run(arguments | {name: change}, backend=backend), expected), name
    shared = arguments["x"][:1].expand(2, -1, -1, -1)
    repeated = run(arguments | {"x": shared.contiguous()}, backend=backend)
    assert torch.equal(run(arguments | {"x": shared}, backend=backend), repeated)


# Enough work for sixteen threads, which share a block's outputs in the first; the last is for few.
@pytest.mark.parametrize("size", [(1, 272, 260, 20, 24), (3, 100, 130, 34, 18), (1, 33, 130, 7, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_any_number_of_threads(backend, dtype, size, set_threads):
    if backend == "triton":
        pytest.skip("is one of C++")
    arguments = inputs(size, ("norm", "bias"), dtype) | {"num_groups": 2 - size[1] % 2}
    set_threads(1)
    expected = run(arguments, backend=backend)
    for count in (2, 3, 4, 16):
        set_threads(count)
        assert torch.equal(run(arguments, backend=backend), expected)
    assert_accurate(arguments, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_does_not_depend_on_its_batch(backend, device, dtype):
    arguments = inputs((4, 20, 12, 9, 6), ("norm", "residual"), dtype, device)
    if backend == "triton":  # whose convolution is PyTorch's
        del arguments["residual"]
        arguments["weight"] = torch.zeros_like(arguments["weight"])
        arguments["weight"][..., 1, 1] = torch.eye(20)[:12].to(arguments["weight"])
    expected = run(arguments, backend=backend)
    for part in (slice(0, 1), slice(1, 4)):
        own = {k: v[part] for k, v in arguments.items() if k in ("x", "residual")}
        assert torch.equal(run(arguments | own, backend=backend), expected[part])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_weight_gives_the_same_bits(dtype):
    arguments = inputs((1, 20, 70, 6, 6), PARTS, dtype)
    expected = run(arguments)
    packed = pack_conv3x3(arguments["weight"])
    assert torch.equal(run(arguments, packed=packed), expected)
    spread = packed.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(arguments, packed=spread), expected)
    zero = run(arguments | {"weight": arguments["weight"] * 0})
    assert torch.equal(run(arguments, packed=packed * 0), zero)  # it is what multiplies


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: packed[:, :15],
        lambda packed: packed.flatten(),
        lambda packed: packed.bfloat16(),
    ],
)
def test_another_packed_weight_is_refused(change):
    arguments = inputs((1, 20, 70, 6, 6))
    with pytest.raises(ValueError, match=r"^packed: got b?float\d\d \[.*\], pack_conv3x3 makes of"):
        run(arguments, packed=change(pack_conv3x3(arguments["weight"])))


def test_a_weight_packed_for_another_instruction_set_is_refused():
    arguments = inputs((1, 20, 70, 6, 6))
    with cpu_isa("portable"):
        packed = pack_conv3x3(arguments["weight"])
    sets = [isa for isa in supported_isas() if isa != "portable"]
    if not sets:
        pytest.skip("this CPU has only one")
    with cpu_isa(sets[0]), pytest.raises(ValueError, match=r"^packed: got float32"):
        run(arguments, packed=packed)


def test_memory_is_that_of_a_few_patches(peak, set_threads):
    arguments = inputs((1, 128, 128, 128, 128), ("norm",)) | {"num_groups": 32}
    packed = pack_conv3x3(arguments["weight"])
    set_threads(2)
    assert peak(lambda: run(arguments, packed=packed)) <= 2 << 20  # a copy of x is 8 MiB


def test_meta_tensors_give_shapes():
    arguments = inputs((3, 8, 5, 4, 6), dtype=torch.half)
    arguments = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in arguments.items()}
    out = run(arguments)
    assert out.is_meta and out.shape == (3, 5, 8, 12) and out.dtype == torch.half
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("parts", [(), PARTS])
def test_opcheck(parts):
    arguments = inputs((2, 6, 5, 3, 4), parts)
    tensors = [arguments.get(k) for k in ("x", "weight", "bias", "norm", "norm_bias")]
    rest = (1, 1e-6, "upsample" in parts, arguments.get("residual"), None, "cpu")
    torch.library.opcheck(torch.ops.titok_fast.conv3x3.default, (*tensors, *rest))


def test_autocast_changes_nothing(backend, device):
    arguments = inputs((1, 8, 6, 4, 4), device=device)
    expected = run(arguments, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(run(arguments, backend=backend), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def f(x, others):
        return run({"x": x * 2} | others) + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        others = inputs((batch, 9, 5, 4, 4))
        x = others.pop("x")
        assert torch.equal(compiled(x, others), f(x, others))


@pytest.mark.parametrize("name", ["x", "weight", "bias", "norm", "norm_bias", "residual"])
def test_a_gradient_is_refused(name):
    assert_refused(run, inputs((1, 4, 3, 2, 2)), name)


def test_reference_has_gradients():
    arguments = double(inputs((1, 2, 2, 2, 2)))
    names = [k for k, v in arguments.items() if torch.is_tensor(v)]

    def f(*values):
        given = arguments | dict(zip(names, values, strict=True))
        return run(given, backend="reference", norm_eps=0.1)

    values = tuple(arguments[name].contiguous().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(f, values)


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


BAD = [
    ({"x": [1.0]}, TypeError, "x: expected a Tensor, got list"),
    ({"x": zeros(1, 4, 2, 2).double()}, TypeError, "x: dtype torch.float64 is not float32, fl"),
    ({"x": zeros(1, 4, 2, 2).to_sparse()}, TypeError, "x: layout torch.sparse_coo is not torch.st"),
    ({"x": zeros(4, 2, 2)}, ValueError, "x: expected [B, C, H, W] of 1 or more, got shape [4,"),
    ({"x": zeros(1, 4, 0, 2)}, ValueError, "x: expected [B, C, H, W] of 1 or more, got shape ["),
    ({"weight": None}, TypeError, "weight: expected a Tensor, got NoneType"),
    ({"weight": zeros(3, 4, 3)}, ValueError, "weight: expected [O, C, 3, 3] with O >= 1 and C >="),
    ({"weight": zeros(3, 4, 1, 1)}, ValueError, "weight: expected [O, C, 3, 3] with O >= 1 and "),
    ({"weight": zeros(0, 4, 3, 3)}, ValueError, "weight: expected [O, C, 3, 3] with O >= 1 and "),
    ({"weight": zeros(3, 5, 3, 3)}, ValueError, "weight: expected shape [3, 4, 3, 3], got [3, 5"),
    ({"weight": zeros(3, 4, 3, 3).half()}, TypeError, "weight: dtype torch.float16 is not float32"),
    ({"weight": zeros(3, 4, 3, 3, device="meta")}, ValueError, "weight: on meta, but x is on cpu"),
    ({"bias": zeros(4)}, ValueError, "bias: expected shape [3], got [4]"),
    ({"norm": zeros(3)}, ValueError, "norm: expected shape [4], got [3]"),
    ({"norm": zeros(4), "norm_bias": None}, ValueError, "norm_bias: needed where norm is given"),
    ({"norm": None, "norm_bias": zeros(4)}, ValueError, "norm: needed where norm_bias is given"),
    ({"residual": zeros(1, 3, 2, 2)}, ValueError, "residual: expected shape [1, 3, 4, 4], got [1"),
    ({"packed": 1.0}, TypeError, "packed: expected a Tensor, got float"),
    ({"packed": zeros(1).double()}, TypeError, "packed: dtype torch.float64 is not float32 or"),
    ({"packed": zeros(1, device="meta")}, ValueError, "packed: on meta, but x is on cpu"),
    ({"num_groups": 3}, ValueError, "num_groups: 3 does not divide 4 channels"),
    ({"num_groups": 0}, ValueError, "num_groups: 0 does not divide 4 channels"),
    ({"num_groups": 2.0}, TypeError, "num_groups: expected an int, got float"),
    ({"norm_eps": None}, TypeError, "norm_eps: expected a float, got NoneType"),
    ({"norm_eps": -1e-5}, ValueError, "norm_eps: -1e-05 is not in [0, inf)"),
    ({"norm_eps": math.nan}, ValueError, "norm_eps: nan is not in [0, inf)"),
    ({"backend": "cuda"}, ValueError, "backend: 'cuda' is not one of 'auto', 'cpu', 'triton', 're"),
    *[
        ({name: 1.0}, TypeError, f"{name}: expected a Tensor, got float")
        for name in ("bias", "norm", "norm_bias", "residual")
    ],
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input(change, error, words):
    with pytest.raises(error) as raised:
        run(inputs((1, 4, 3, 2, 2)) | change)
    assert str(raised.value).startswith(words)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (1.0, TypeError, "weight: expected a Tensor, got float"),
        (zeros(3, 4, 3, 3).double(), TypeError, "weight: dtype torch.float64 is not float32"),
        (zeros(3, 3), ValueError, r"weight: expected \[O, C, 3, 3\]"),
        (zeros(3, 4, 3, 3, device="meta"), ValueError, "weight: on meta, allowed is cpu"),
    ],
)
def test_packing_says_what_it_takes(weight, error, words):
    with pytest.raises(error, match=f"^{words}"):
        pack_conv3x3(weight)


@pytest.mark.gpu
def test_gpu_more_images_than_a_grid_is_deep():
    x = torch.randn(65_537, 32, 1, 1, device="cuda")
    weight, norm = torch.randn(32, 32, 3, 3, device="cuda"), torch.ones(32, device="cuda")
    with torch.no_grad():
        out, right = (
            conv3x3(x, weight, norm=norm, norm_bias=norm, backend=backend)
            for backend in ("triton", "reference")
        )
    assert relative_error(out, right) < 1e-3  # PyTorch may convolve in TF32


@pytest.mark.gpu
def test_gpu_graph_capture():
    arguments = inputs((2, 64, 32, 16, 16), dtype=torch.bfloat16, device="cuda")
    run(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(arguments)
    arguments["x"].neg_()
    graph.replay()
    assert relative_error(out, run(arguments)) < 1e-6


def test_kernels_compile_for_every_architecture():
    assert_kernels_compile("conv3x3", set())
