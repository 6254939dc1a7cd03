"""attention against float64: no worse than the eager arithmetic of the same dtype."""

import importlib

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.bench_attention import longest_for_triton
from tests.kernels import assert_kernels_compile
from titok_fast import attention, decode_linear, index_propagation
from titok_fast.ops import inspect
from titok_fast.ops.attention import TRITON_UP_TO
from titok_fast.reference.attention import dropout_mask
from titok_fast.testing import cpu_isa, relative_error, supported_isas

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 2 * torch.finfo(torch.float32).eps  # of sums in another order
SEED = 0x1234567_89ABCDEF


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512bf16", "amx"])
def isa(request):
    """Each instruction set of the C++, in turn."""
    if request.param not in supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    with cpu_isa(request.param):
        yield request.param


def packed(b, length, h, d, dtype=torch.float32, scale=1.0):
    """qkv and a gradient of the output."""
    qkv = scale * torch.randn(b, length, 3, h, d)
    return qkv.to(DEVICE, dtype), torch.randn(b, length, h, d).to(DEVICE, dtype)


def on_cpu(b, length, h, d, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(b, length, 3, h, d)).to(dtype)


def assert_cpu_accurate(qkv):
    """As near to float64 as the reference in the inputs' dtype."""
    truth = attention(qkv.double(), backend="reference")
    actual, eager = (attention(qkv, backend=backend) for backend in ("cpu", "reference"))
    assert actual.dtype == qkv.dtype and actual.is_contiguous() and actual.shape == truth.shape
    error, allowed = relative_error(actual, truth), relative_error(eager, truth) + ROUNDING
    assert error <= allowed, f"{error:.3e}, allowed {allowed:.3e}"


def with_gradient(qkv, grad, **options):
    qkv = qkv.detach().requires_grad_()
    out = attention(qkv, **options)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]


def assert_accurate(qkv, grad, backend="triton", slack=0.0, **options):
    """Output and gradient as near to float64 as those of the reference in the inputs' dtype.

    `slack` is for what float32 loses elsewhere: in the gradient, and on a GPU, whose tensor cores
    truncate the sums of three TF32 products, in the output too.
    """
    actual = with_gradient(qkv, grad, backend=backend, **options)
    eager = with_gradient(qkv, grad, backend="reference", **options)
    truth = with_gradient(qkv.double(), grad.double(), backend="reference", **options)
    for name, ours, plain, exact in zip(("out", "grad"), actual, eager, truth, strict=True):
        assert ours.dtype == qkv.dtype and ours.shape == exact.shape
        error, allowed = relative_error(ours, exact), relative_error(plain, exact) + ROUNDING
        allowed += slack if name == "grad" or DEVICE == "cuda" else 0.0
        assert error <= allowed, f"{name}: {error:.3e}, allowed {allowed:.3e}"
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "d"),
    [(1, 8), (5, 128), (16, 48), (17, 24), (33, 48), (50, 64), (65, 64), (80, 40), (81, 64)],
)
def test_short_sequences(dtype, length, d):
    assert_accurate(*packed(2, length, 2, d, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "d"), [(128, 64), (129, 64), (145, 16), (192, 8), (210, 48)])
def test_long_sequences(dtype, length, d):
    assert_accurate(*packed(1, length, 1, d, dtype))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_other_backends(backend):
    ours = backend == "auto" or DEVICE == "cpu"  # PyTorch's multiplies in TF32 three times, too
    assert_accurate(*packed(2, 33, 3, 48), backend=backend, slack=0.0 if ours else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 24, 40, 48, 64, 120, 128])
@pytest.mark.parametrize("length", [1, 2, 7, 16, 23, 24, 25, 33, 64, 65, 129])
def test_cpp(isa, dtype, length, d):
    assert_cpu_accurate(on_cpu(2, length, 2, d, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "d"), [(289, 64), (1089, 64), (4096, 8)])
def test_cpp_long_sequences(isa, dtype, length, d):
    assert_cpu_accurate(on_cpu(1, length, 1, d, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 4.0, 20.0])
def test_cpp_flat_and_sharp_softmax(isa, dtype, scale):
    assert_cpu_accurate(on_cpu(1, 37, 2, 32, dtype, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_large_scores_do_not_overflow(isa, dtype):
    """Each query takes the value of the key with the largest score, as in float64."""
    qkv = on_cpu(1, 20, 1, 16, dtype, scale=1e8)
    expected = attention(qkv.double(), backend="reference")
    torch.testing.assert_close(attention(qkv, backend="cpu").double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_cpp_infinite_and_nan_inputs_are_those_of_the_reference(isa, dtype, part, number):
    qkv = on_cpu(2, 21, 2, 8, dtype)
    qkv[0, 20, ("query", "key", "value").index(part), 1, 3] = number
    expected = attention(qkv.double(), backend="reference")
    actual = attention(qkv, backend="cpu").double()
    assert not expected.isfinite().all() and expected[1].isfinite().all()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(expected))
    finite = expected.isfinite()
    torch.testing.assert_close(actual[finite], expected[finite], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("length", [33, 129, 289])
def test_triton_keys_of_infinite_scores_have_no_part(length):
    """Also the last key, which is a step of its own."""
    qkv = torch.randn(1, length, 3, 1, 16, device=DEVICE, dtype=torch.float16)
    qkv[:, :, 0, :, 0] = 1
    qkv[:, -1, 1, :, 0] = -torch.inf
    out = attention(qkv, backend="triton")
    expected = attention(qkv[:, :-1], backend="reference")
    torch.testing.assert_close(out[:, :-1], expected, rtol=0.01, atol=0.01)
    qkv[:, :, 1, :, 0] = -torch.inf
    assert attention(qkv, backend="triton").isnan().all()


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7F800001, 0xFFFFFFFF - 2**32])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_cpp_every_nan_stays(isa, part, bits):
    qkv = on_cpu(1, 5, 1, 8)
    qkv.view(torch.int32)[0, 2, part, 0, 3] = bits
    expected = attention(qkv, backend="reference").isnan()
    assert expected.any() and torch.equal(attention(qkv, backend="cpu").isnan(), expected)


def test_cpp_strided_input(isa):
    qkv = on_cpu(2, 33, 2, 16, torch.bfloat16)
    expected = attention(qkv, backend="cpu")
    wide = torch.full((2, 40, 4, 3, 35), torch.nan, dtype=qkv.dtype)
    wide[:, 4:37, :3, 1:, 9:25] = qkv
    views = (
        wide[:, 4:37, :3, 1:, 9:25],
        qkv.permute(3, 2, 0, 1, 4).contiguous().permute(2, 3, 1, 0, 4),
        qkv.transpose(3, 4).contiguous().transpose(3, 4),
    )
    for view in views:
        assert torch.equal(view, qkv) and not view.is_contiguous()
        assert torch.equal(attention(view, backend="cpu"), expected)


def test_cpp_rows_beyond_2_to_the_31_elements(isa):
    qkv = on_cpu(2, 3, 1, 8, torch.float16)
    stride = 2**31 + 8
    storage = torch.Tensor.new_empty(qkv, 2 * stride + 128)  # touched only where written
    for strides in ((stride, 24, 8, 8, 1), (96, stride, 8, 8, 1)):
        far = storage.as_strided(qkv.shape, strides)
        far.copy_(qkv)
        assert torch.equal(attention(far, backend="cpu"), attention(qkv, backend="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpp_same_bits_with_any_number_of_threads_and_in_any_batch(isa, dtype, set_threads):
    qkv = on_cpu(3, 150, 5, 32, dtype)
    expected = attention(qkv, backend="cpu")
    for threads in (1, 2, 3, 64):
        set_threads(threads)
        assert torch.equal(attention(qkv, backend="cpu"), expected)
        assert torch.equal(attention(qkv[1:2], backend="cpu"), expected[1:2])


def test_cpp_memory_is_that_of_one_head(peak, set_threads):
    """Of a thread: a head's keys and values, and the scores of a few queries."""
    set_threads(2)
    qkv = on_cpu(4, 1089, 8, 64)
    attention(qkv[:1, :33], backend="cpu")
    out = 4 * 1089 * 8 * 64 * 4
    assert peak(lambda: attention(qkv, backend="cpu")) - out < 2 * 1089 * (2 * 64 + 24) * 4 + 2**17


def test_cpp_opcheck():
    torch.library.opcheck(torch.ops.titok_fast.attention_cpu.default, (on_cpu(1, 9, 2, 8),))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_cpp_compiles_whole(dynamic, backend):
    def f(qkv):
        return attention(qkv * 2, backend=backend) + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        for b in (2, 3):
            qkv = on_cpu(b, 9, 2, 8)
            assert torch.equal(compiled(qkv), f(qkv))


def test_cpp_autocast():
    qkv = on_cpu(1, 9, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(qkv, backend="cpu")
    assert torch.equal(out, attention(qkv.bfloat16(), backend="cpu"))


def test_gradients_around_vmap():
    """A batched tensor does not say itself that a gradient is asked for."""
    qkv = on_cpu(3, 2 * 6, 2, 8).unflatten(1, (2, 6))
    whole = qkv.flatten(0, 1).requires_grad_()
    attention(whole).square().sum().backward()
    expected = whole.grad.view_as(qkv)
    over = torch.func.vmap(attention)
    actual = torch.func.grad(lambda x: over(x).square().sum())(qkv)
    torch.testing.assert_close(actual, expected)
    leaf = qkv.clone().requires_grad_()
    over(leaf).square().sum().backward()
    torch.testing.assert_close(leaf.grad, expected)
    compiled = torch.compile(over, backend="eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(leaf).square().sum(), leaf)[0]
    torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        torch.testing.assert_close(over(leaf), over(qkv))
    scale = torch.tensor(2.0)
    inner = torch.func.grad(lambda s, x: (s * attention(x)).square().sum())  # wraps x, too
    given = torch.autograd.grad(inner(scale, whole), whole)[0]
    torch.testing.assert_close(given, 4 * expected.flatten(0, 1))
    codes = torch.randn(5, 8)
    with pytest.raises(RuntimeError, match=r"autograd\.Function"):
        torch.func.vmap(lambda z: index_propagation(z, codes)[0])(leaf[:, 0, 0, 0]).sum().backward()
    x, weight = torch.randn(3, 2, 4, requires_grad=True), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="x: has no gradient here"):
        torch.func.vmap(lambda x: decode_linear(x, weight))(x)
    over = torch.compile(torch.func.vmap(lambda x: decode_linear(x, weight)), backend="eager")
    with pytest.raises(
        RuntimeError, match=r"x: has no gradient here; call it under torch\.no_grad"
    ):
        over(x.detach())  # which cannot be known
    with torch.no_grad():
        torch.testing.assert_close(over(x), x @ weight.T)


def test_cpp_has_neither_gradient_nor_dropout():
    qkv = on_cpu(1, 5, 1, 8)
    with pytest.raises(ValueError, match=r"^dropout_p: must be 0 with backend 'cpu', got 0.5$"):
        attention(qkv, dropout_p=0.5, backend="cpu")
    leaf = qkv.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="qkv: has no gradient here;"):
        attention(leaf, backend="cpu")
    with torch.no_grad():
        assert torch.equal(attention(leaf, backend="cpu"), attention(qkv, backend="cpu"))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(qkv, torch.ones_like(qkv))
        with pytest.raises(RuntimeError, match="qkv: has no gradient here;"):
            attention(dual, backend="cpu")
        with sdpa_kernel(SDPBackend.MATH):
            assert forward_ad.unpack_dual(attention(dual)).tangent.abs().max() > 0


def test_auto_on_a_cpu(monkeypatch):
    op = importlib.import_module("titok_fast.ops.attention")
    qkv = torch.randn(1, 65, 3, 2, 16, dtype=torch.bfloat16)
    cpp, plain = (attention(qkv, backend=backend) for backend in ("cpu", "torch"))
    assert not torch.equal(cpp, plain)
    monkeypatch.setattr(op, "_X86", True)
    assert torch.equal(attention(qkv), cpp)
    assert attention(qkv, dropout_p=0.5).shape == cpp.shape
    assert torch.equal(attention(qkv.clone().requires_grad_()), plain)
    monkeypatch.setattr(op, "_X86", False)
    assert torch.equal(attention(qkv), plain)


def test_reference_is_softmax_attention():
    qkv, _ = packed(2, 7, 3, 8)
    expected = torch.empty(2, 7, 3, 8, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            q, k, v = qkv[b, :, :, h].double().cpu().unbind(1)
            for i in range(7):
                weight = (k @ q[i] / 8**0.5).exp()
                expected[b, i, h] = weight @ v / weight.sum()
    assert relative_error(attention(qkv.double(), backend="reference").cpu(), expected) < 1e-14


@pytest.mark.parametrize("scale", [1e-3, 4.0, 20.0])
def test_flat_and_sharp_softmax(scale):
    """The backward takes its probabilities from a float32 logsumexp, rounded at its own size."""
    qkv, grad = packed(1, 37, 2, 32, scale=scale)
    query, key, _ = qkv.double().permute(2, 0, 3, 1, 4)
    lse = (query @ key.mT / 32**0.5).logsumexp(-1)
    slack = float(lse.abs().max()) * torch.finfo(torch.float32).eps if scale > 1 else 0.0
    out, _ = assert_accurate(qkv, grad, slack=slack)
    if scale < 1:
        mean = qkv[:, :, 2].mean(1, keepdim=True).expand_as(out)
        assert relative_error(out, mean) < 1e-5


def test_large_scores_do_not_overflow():
    qkv, grad = packed(1, 20, 1, 16, scale=1e4)
    for x in with_gradient(qkv, grad, backend="triton"):
        assert bool(x.isfinite().all())


def test_strided_input():
    qkv, grad = packed(2, 33, 2, 16)
    expected = with_gradient(qkv, grad, backend="triton")

    def same(view, view_grad=grad):
        assert torch.equal(view, qkv) and not view.is_contiguous()
        for a, b in zip(with_gradient(view, view_grad, backend="triton"), expected, strict=True):
            assert torch.equal(a, b)

    wide = torch.full((2, 40, 4, 3, 32), torch.nan, device=DEVICE)
    wide[:, 4:37, :3, 1:, 8:24] = qkv
    same(wide[:, 4:37, :3, 1:, 8:24])
    same(qkv.permute(3, 2, 0, 1, 4).contiguous().permute(2, 3, 1, 0, 4))
    same(qkv.transpose(3, 4).contiguous().transpose(3, 4))  # its rows are not dense: copied
    odd = torch.full((2, 33, 3, 2, 17), torch.nan, device=DEVICE)
    odd[..., 1:] = qkv
    same(odd[..., 1:], grad.transpose(1, 2).contiguous().transpose(1, 2))


def test_rows_beyond_2_to_the_31_elements():
    if DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory < 20 << 30:
        pytest.skip("needs 10 GB")
    qkv, _ = packed(2, 3, 1, 8, torch.float16)
    stride = 2**31 + 8
    storage = torch.Tensor.new_empty(qkv, stride + 128)  # touched only where written
    far = storage.as_strided(qkv.shape, (stride, 24, 8, 8, 1))
    far.copy_(qkv)
    assert torch.equal(attention(far, backend="triton"), attention(qkv, backend="triton"))
    storage = torch.Tensor.new_empty(qkv, 2 * stride + 128)
    far = storage.as_strided((1, *qkv.shape[1:]), (8, stride, 8, 8, 1))
    far.copy_(qkv[:1])
    assert torch.equal(attention(far, backend="triton"), attention(qkv[:1], backend="triton"))


@pytest.mark.parametrize(("length", "d"), [(6, 8), (33, 48), (150, 56)])
def test_dropout_mask_is_the_same_to_the_bit(length, d):
    """Equal scores and values that are rows of the identity show each probability alone."""
    b, h, p = (2, 2, 0.3) if length < 100 else (1, 1, 0.3)
    qkv = torch.zeros(b, length, 3, h, d, device=DEVICE, dtype=torch.float16)
    grad = torch.zeros(b, length, h, d, device=DEVICE, dtype=torch.float16)
    seed = torch.tensor(SEED, device=DEVICE)
    kept = dropout_mask(seed, p, (b, h, length))  # [B, H, L, L]
    for first in range(0, length, d):
        here = min(d, length - first)
        qkv[:, :, 2] = 0
        qkv[:, first : first + here, 2] = torch.eye(here, d, device=DEVICE)[:, None]
        out = attention(qkv, dropout_p=p, seed=seed, backend="triton")
        expected = kept[..., first : first + here].transpose(1, 2) / (length * (1 - p))
        torch.testing.assert_close(out[..., :here], expected.to(out), rtol=1e-3, atol=0)
        # The gradient of value j is the sum over i of kept(i, j) grad(i).
        grad.zero_()
        grad[:, first : first + here] = torch.eye(here, d, device=DEVICE)[:, None]
        _, gradient = with_gradient(qkv, grad, dropout_p=p, seed=seed, backend="triton")
        expected = kept[:, :, first : first + here].permute(0, 3, 1, 2) / (length * (1 - p))
        torch.testing.assert_close(gradient[:, :, 2, :, :here], expected.to(out), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "d"), [(33, 48), (65, 16), (150, 16)])
def test_dropout(dtype, length, d):
    assert_accurate(*packed(1, length, 2, d, dtype), dropout_p=0.1, seed=SEED)


@pytest.mark.parametrize(
    ("dtype", "length", "d", "p"),
    [
        (torch.float16, 33, 48, 0.1),
        (torch.float16, 65, 16, 0.1),
        (torch.bfloat16, 129, 16, 0.1),
        (torch.bfloat16, 129, 16, 0.0),
        (torch.float16, 150, 16, 0.1),
        (torch.float16, 35, 72, 0.1),
        (torch.float32, 17, 72, 0.0),
    ],
)
def test_tiles_of_sm_120(monkeypatch, dtype, length, d, p):
    monkeypatch.setattr(inspect.kernels("attention"), "_capability", lambda device: 120)
    options = {"dropout_p": p, "seed": SEED} if p else {}
    assert_accurate(*packed(1, length, 2, d, dtype), **options)


def test_dropout_statistics():
    b, h, length, p = 4, 3, 100, 0.2
    masks = [dropout_mask(torch.tensor(seed), p, (b, h, length)).double() for seed in (0, 1)]
    for mask in masks:
        n = mask.numel()
        assert abs(float(mask.mean()) - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5
        for dims in ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):  # no row, key, head, image apart
            means = mask.mean(dims)
            deviation = (p * (1 - p) * means.numel() / n) ** 0.5
            assert float((means - (1 - p)).abs().max()) < 5 * deviation
    # Other seeds, heads and neighbouring keys are independent.
    first, second = masks
    pairs = ((first, second), (first[:, 0], first[:, 1]), (first[..., :-1], first[..., 1:]))
    for x, y in pairs:
        covariance = float(((x - 1 + p) * (y - 1 + p)).mean()) / (p * (1 - p))
        assert abs(covariance) < 4 / x.numel() ** 0.5


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_seeds(backend):
    qkv, _ = packed(2, 9, 2, 16)

    def draw(seed):
        return attention(qkv, dropout_p=0.5, seed=seed, backend=backend)

    assert torch.equal(draw(5), draw(5))
    assert torch.equal(draw(5), draw(torch.tensor(5, device=DEVICE)))
    assert not torch.equal(draw(5), draw(6)) and not torch.equal(draw(5), draw(5 + 2**32))
    torch.manual_seed(1)
    a, b = draw(None), draw(None)
    torch.manual_seed(1)
    assert torch.equal(draw(None), a) and not torch.equal(a, b)


@pytest.mark.parametrize("length", [33, 150])
def test_same_bits_from_run_to_run_and_in_any_batch(length):
    qkv, grad = packed(3, length, 1, 16, torch.float16)
    expected = with_gradient(qkv, grad, backend="triton")
    for a, b in zip(with_gradient(qkv, grad, backend="triton"), expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(with_gradient(qkv[1:2], grad[1:2], backend="triton"), expected, strict=True):
        assert torch.equal(a, b[1:2])


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_empty_batch(backend):
    qkv, grad = packed(0, 5, 2, 16)
    out, gradient = with_gradient(qkv, grad, backend=backend)
    assert out.shape == (0, 5, 2, 16) and gradient.shape == (0, 5, 3, 2, 16)


def test_cpp_empty_batch(isa):
    assert attention(on_cpu(0, 5, 2, 16), backend="cpu").shape == (0, 5, 2, 16)


def test_meta_tensors_give_shapes():
    out = attention(torch.empty(2, 5, 3, 4, 16, device="meta"))
    assert out.is_meta and out.shape == (2, 5, 4, 16)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_opcheck(dropout_p):
    qkv, grad = packed(1, 9, 2, 8)
    seed = torch.tensor(3, device=DEVICE) if dropout_p else None
    ops = torch.ops.titok_fast
    torch.library.opcheck(ops.attention_fwd.default, (qkv, seed, dropout_p))
    out, lse = ops.attention_fwd(qkv, seed, dropout_p)
    arguments = (grad, qkv, out, lse, seed, dropout_p)
    torch.library.opcheck(ops.attention_bwd.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_compiles_whole(dynamic, dropout_p):
    def f(qkv):
        return attention(qkv * 2, dropout_p=dropout_p, seed=4, backend="triton") + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for b in (2, 3):
        qkv, grad = packed(b, 9, 2, 8)
        results = []
        for function in (compiled, f):
            x = qkv.detach().requires_grad_()
            out = function(x)
            results.append((out.detach(), torch.autograd.grad(out, x, grad)[0]))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_autocast():
    qkv, _ = packed(1, 9, 2, 16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = attention(qkv, backend="triton")
    assert torch.equal(out, attention(qkv.bfloat16(), backend="triton"))


def test_double_backward_is_refused():
    qkv, _ = packed(1, 5, 1, 8)
    qkv.requires_grad_()
    (gradient,) = torch.autograd.grad(
        attention(qkv, backend="triton").square().sum(), qkv, create_graph=True
    )
    with pytest.raises(RuntimeError, match="attention: has no double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"qkv": [1.0]}, TypeError, "qkv: expected a Tensor, got list"),
        (
            {"qkv": torch.zeros(1, 2, 3, 1, 8).double(), "backend": "cpu"},
            TypeError,
            "qkv: dtype torch.float64 is",
        ),
        ({"qkv": torch.zeros(1, 2, 3, 1, 8).int()}, TypeError, "qkv: dtype torch.int32 is not"),
        ({"qkv": torch.zeros(6, 8).to_sparse()}, TypeError, "qkv: layout torch.sparse_coo is not"),
        ({"qkv": torch.zeros(1, 2, 3, 8)}, ValueError, "qkv: expected [B, L, 3, H, Dh], got"),
        ({"qkv": torch.zeros(1, 2, 2, 1, 8)}, ValueError, "qkv: expected [B, L, 3, H, Dh], got"),
        ({"qkv": torch.zeros(1, 0, 3, 1, 8)}, ValueError, "qkv: L must be 1 to 4096, got 0"),
        ({"qkv": torch.zeros(1, 4097, 3, 1, 8)}, ValueError, "qkv: L must be 1 to 4096, got 4097"),
        ({"qkv": torch.zeros(1, 2, 3, 0, 8)}, ValueError, "qkv: H must be >= 1, got 0"),
        ({"qkv": torch.zeros(1, 2, 3, 1, 12)}, ValueError, "qkv: Dh must be a multiple of 8, 8 to"),
        ({"qkv": torch.zeros(1, 2, 3, 1, 136)}, ValueError, "qkv: Dh must be a multiple of 8"),
        ({"dropout_p": "0"}, TypeError, "dropout_p: expected a float, got str"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: 1.0 is not in [0, 1)"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: -0.1 is not in [0, 1)"),
        ({"seed": 0.5}, TypeError, "seed: expected an int, a Tensor or None, got float"),
        ({"seed": 2**63}, ValueError, "seed: 9223372036854775808 is not an int64"),
        ({"seed": torch.zeros(2).long()}, ValueError, "seed: expected one int64, got torch.int64"),
        ({"seed": torch.zeros(())}, ValueError, "seed: expected one int64, got torch.float32"),
        ({"seed": torch.zeros((), dtype=torch.int64, device="meta")}, ValueError, "seed: on meta"),
        ({"backend": "flash"}, ValueError, "backend: 'flash' is not one of 'auto', 'cpu', 'torch'"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"qkv": torch.zeros(1, 2, 3, 1, 8)} | change
    with pytest.raises(error) as raised:
        attention(arguments.pop("qkv"), **arguments)
    assert str(raised.value).startswith(words)
    assert "\n" not in str(raised.value)


def test_float64_goes_to_pytorch():
    qkv = torch.randn(2, 5, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    expected = attention(qkv, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        actual = attention(qkv)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(actual.square().sum(), qkv)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), qkv)[0])


def test_a_table_of_auto_from_results():
    def row(dtype, length, provider, milliseconds):
        info = {"op": "attention", "device": "cuda", "dtype": dtype, "D": 64, "L": length}
        info |= {"provider": provider, "direction": "forward", "device_ms": milliseconds}
        return {"extra_info": info}

    rows = [row("bfloat16", length, "sdpa", 1.0) for length in (33, 65, 129)]
    rows += [row("bfloat16", n, "titok_fast-triton", t) for n, t in ((33, 0.5), (65, 0.9))]
    rows += [row("bfloat16", 129, "titok_fast-triton", 1.1)]
    measured = longest_for_triton({"benchmarks": rows})
    assert measured == {(torch.float16, 64): 65, (torch.bfloat16, 64): 65}
    assert measured.keys() < TRITON_UP_TO.keys()


def test_the_table_of_auto_covers_every_input():
    for dtype in DTYPES:
        assert max(width for kind, width in TRITON_UP_TO if kind == dtype) == 128


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 33, 65, 129, 144, 289, 577, 1089, 4096])
def test_gpu_sequences(dtype, length):
    b = 1 if length > 2000 else 4
    assert_accurate(*packed(b, length, 4, 64, dtype))


@pytest.mark.gpu
def test_gpu_graph_capture_takes_another_seed():
    qkv, _ = packed(2, 33, 2, 64, torch.bfloat16)
    seed = torch.tensor(1, device="cuda")
    attention(qkv, dropout_p=0.5, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(qkv, dropout_p=0.5, seed=seed)
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(out, attention(qkv, dropout_p=0.5, seed=value))


def test_kernels_compile_for_every_architecture():
    assert_kernels_compile("attention", {"attention_fwd_kernel", "attention_bwd_kernel"})


def test_dropout_and_wide_heads_do_not_spill():
    """What has the most registers, on the architecture whose products take all from registers."""
    wanted = [
        {"QUERY": True, "TILE": 64, "TILE_TAIL": 32, "D": 64, "DROPOUT": True},
        {"QUERY": False, "TILE": 64, "D": 64, "DROPOUT": True},
        {"QUERY": False, "TILE": 64, "D": 128, "DROPOUT": True},
    ]
    assert_kernels_compile("attention", {"attention_bwd_kernel"}, [120], wanted)
