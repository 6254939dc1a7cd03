"""index_propagation against its float64 reference: values, gradients and what surrounds them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.kernels import assert_kernels_compile, launched
from tests.processes import in_two_processes
from titok_fast import index_propagation, nearest_code
from titok_fast.ops import inspect
from titok_fast.ops.index_propagation import propagate
from titok_fast.testing import (
    cpu_isa,
    relative_error,
    rows_and_codes,
    supported_isas,
)

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
LOSSES = ("value", "entropy", "codes")


@pytest.fixture
def backend(ibq_backend):
    return ibq_backend


@pytest.fixture
def device(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def small(backend, device):
    """Whether Triton's interpreter is at work, which runs one program at a time."""
    return backend == "triton" and device == "cpu"


def gradients(result, z, codebook, probe):
    """Gradients [z, codebook] of the quantized value, of the entropies and of the codes."""
    losses = {
        "value": (result.quantized * probe).sum(),
        "entropy": 1.5 * result.sample_entropy - result.batch_entropy,
        "codes": (result.codes * probe).sum(),
    }
    return {
        name: torch.autograd.grad(
            losses[name], [z, codebook], retain_graph=True, materialize_grads=True
        )
        for name in LOSSES
    }


def run(z, codebook, backend, **options):
    """The result of `propagate` and its gradients, for one probe in every dtype."""
    z, codebook = (x.detach().requires_grad_() for x in (z, codebook))
    generator = torch.Generator().manual_seed(5)
    probe = torch.randn(z.shape, generator=generator).to(z.device, z.dtype)
    result = propagate(z, codebook, backend=backend, **options)
    return result, gradients(result, z, codebook, probe)


def truth(z, codebook, **options):
    return run(z.double().cpu(), codebook.double().cpu(), "reference", **options)


def cancelled(z, codebook, temperature):
    """The size of what cancels in each gradient: rounding is relative to it, too."""
    n, d = z.shape
    row, code = (x.detach().double().norm(dim=1).amax().item() for x in (z, codebook))
    value = math.sqrt(n * d) * code
    entropy = 1 / (temperature * math.sqrt(n))
    return {
        "value": (value * code, value * row),
        "entropy": (entropy * code, entropy * row),
        "codes": (0.0, 0.0),
    }


def assert_right(z, codebook, backend, *, temperature=0.01, slack=0.0):
    """float32 results to 1e-5, gradients to 1e-4, and to `slack` of the terms that cancel."""
    result, grads = run(z, codebook, backend, temperature=temperature)
    expected, expected_grads = truth(z, codebook, temperature=temperature)
    exact = nearest_code(z, codebook, metric="dot")
    assert torch.equal(result.indices, exact)
    assert torch.equal(result.quantized, codebook[exact])
    assert torch.equal(result.codes, codebook[exact])
    largest = (z.double() @ codebook.double().T).abs().max().item()
    for name, rtol in (
        ("sample_entropy", 1e-5),
        ("batch_entropy", 1e-5),
        ("max_probability", 1e-5 + 2**-22 * largest),  # of a float32 logit
    ):
        actual = getattr(result, name)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(
            actual.double().cpu(), getattr(expected, name), rtol=rtol, atol=1e-7, msg=name
        )
    scales = cancelled(z, codebook, temperature)
    for name in LOSSES:
        for what, actual, right, scale in zip(
            ("z", "codebook"), grads[name], expected_grads[name], scales[name], strict=True
        ):
            assert actual.dtype == z.dtype
            error = (actual.double().cpu() - right).norm()
            assert error <= 1e-4 * right.norm() + slack * scale, (
                f"gradient of {name} for {what}: {error:.2e}, norm {right.norm():.2e}"
            )
    return result, grads


@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(1, 1, 8), (1, 300, 8), (33, 257, 8), (20, 130, 48), (18, 515, 256), (5, 200, 512)],
)
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_equals_float64(backend, device, small, n, k, d, scale):
    if small and d == 512 and scale < 1:
        pytest.skip("20 s in the interpreter, for tiles that D = 512 at scale 1 has shown")
    n, k = (min(n, 17), min(k, 130)) if small else (n, k)
    z, codebook = rows_and_codes(n, k, d, device=device)
    assert_right(z * scale, codebook, backend, slack=1e-7)


@pytest.mark.parametrize(
    ("n", "k", "d"), [(300, 5000, 16), (70, 20_000, 64), (129, 3001, 96), (2100, 3300, 8)]
)
def test_equals_float64_over_many_tiles(backend, device, small, n, k, d):
    if small:
        n, k = 20, 700
    z, codebook = rows_and_codes(n, k, d, device=device)
    assert_right(z / math.sqrt(d), codebook, backend, slack=1e-7)


@pytest.mark.skipif(inspect.why_not("triton", "cpu") is not None, reason="needs triton")
def test_sums_of_float32_on_tensor_cores_are_short(monkeypatch):
    """They truncate each partial sum; what short ones leave to add stays within bounds."""
    module = inspect.kernels("index_propagation")
    sizes = (1024, 2**18, 256), (2**14, 2**18, 256), (2**16, 2**20, 64), (2**12, 2**17, 512)
    for n, k, d in sizes:
        layout = module._layout_of(d, 2, False)
        config = module._choose(module.CONFIGS[90], layout)
        for tile, table in ((config.fwd, True), (config.bwd_z, False)):
            plan = module._plan(n, k, d, layout, tile, 132, table)
            assert plan.steps <= 256
            assert 4 * d * plan.slots * max(plan.chunk, tile.rows) <= 2**26
    monkeypatch.setattr(module, "_LONGEST_SUM", 2)
    z, codebook = rows_and_codes(40, 1000, 24)
    assert_right(z / math.sqrt(24), codebook, "triton", slack=1e-7)


@pytest.mark.skipif(inspect.why_not("triton", "cpu") is not None, reason="needs triton")
def test_logits_of_the_backward_may_round_otherwise(monkeypatch):
    """1 / T makes their last bit a hundred times larger; the gradients of a row's s sum to zero."""
    module = inspect.kernels("index_propagation")
    whole, sliced = module.Tile(32, 128, 4, 1), module.Tile(32, 128, 4, 1, 16, 64)
    config = module.Config(whole, sliced, sliced)  # as CONFIGS has it for some widths
    monkeypatch.setattr(module, "_INTERPRETER", {(64, 2): config})
    codebook = F.normalize(torch.randn(300, 48))
    z = 3 * codebook[torch.randint(300, (40,))]  # nearly one-hot, and within reach of float32
    assert module._SHARP_ERROR.value >= 3 * 2**-24 * 100
    assert_right(z, codebook, "triton", slack=1e-7)


def _collapsed(n, k, d):
    return torch.randn(n, d), torch.randn(1, d).expand(k, d).contiguous()


def _duplicated(n, k, d):
    return torch.randn(n, d), torch.randn(1 + k // 9, d)[torch.randint(1 + k // 9, (k,))]


def _near_one_hot(n, k, d):
    codes = torch.randn(k, d)
    return 2 * codes[torch.randint(k, (n,))], codes


def _near_uniform(n, k, d):
    return 1e-3 * torch.randn(n, d), torch.randn(k, d)


def _two_of_a_kind(n, k, d):
    """Pairs of codes whose logits differ by about the temperature."""
    codes = torch.randn(k, d)
    codes[1::2] = codes[: k - k % 2 : 2] + 1e-3 * torch.randn(k // 2, d)
    return torch.randn(n, d), codes


def _large_logits(n, k, d):
    return 1e4 / d * torch.randn(n, d).sign(), torch.randn(k, d).sign()


def _far_from_zero(n, k, d):
    return 5 + torch.randn(n, d), 5 + 0.3 * torch.randn(k, d)


HARD = {
    f.__name__[1:]: f
    for f in (
        _collapsed,
        _duplicated,
        _near_one_hot,
        _near_uniform,
        _two_of_a_kind,
        _large_logits,
        _far_from_zero,
    )
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_hard_data(backend, device, small, kind, temperature):
    n, k, d = (9, 131, 13) if small else (37, 1031, 24)
    z, codebook = HARD[kind](n, k, d)
    assert_right(z.to(device), codebook.to(device), backend, temperature=temperature, slack=1e-6)


def test_logits_far_below_zero(backend, device):
    """Softmax with columns past the last code, whose score 0 overflows float32 beside these."""
    z = torch.linspace(0.8, 2.7, 400, device=device)[:, None]
    assert_right(z, -torch.ones(1, 1, device=device), backend, temperature=0.01)


def test_one_row_of_large_logits(backend, device):
    z, codebook = rows_and_codes(9, 130, 12, device=device)
    z[4, 3] = 1e6
    assert_right(z, codebook, backend, slack=1e-6)


@pytest.mark.parametrize("entry", [1e8, 1e12])
def test_entropies_with_one_row_of_huge_logits(backend, device, entry):
    """Of which float32 drops more than exp((s - max) / T) can hold."""
    z, codebook = rows_and_codes(9, 130, 12, device=device)
    z[4, 3] = entry
    result, grads = run(z, codebook, backend)
    right = truth(z, codebook)[0]
    assert torch.equal(result.indices.cpu(), right.indices)
    for name in ("sample_entropy", "batch_entropy"):
        value = getattr(result, name).double().cpu()
        torch.testing.assert_close(value, getattr(right, name), rtol=1e-5, atol=0)
    assert all(bool(grad.isfinite().all()) for pair in grads.values() for grad in pair)


def test_one_row_beyond_half_precision(backend, device):
    """The mean weight of a code is that of all rows."""
    z, codebook = (0.1 * x for x in rows_and_codes(9, 130, 12, device=device))
    z[4, 3] = 1e20
    batch_entropy = run(z, codebook, backend)[0].batch_entropy
    right = truth(z, codebook)[0].batch_entropy
    torch.testing.assert_close(batch_entropy.double().cpu(), right, rtol=1e-5, atol=0)


def official(z, codebook, temperature):
    """Upstream's arithmetic in the dtype of the inputs."""
    logits = z @ codebook.T
    soft = logits.softmax(1)
    hard = F.one_hot(soft.argmax(1), codebook.shape[0]).to(z.dtype)
    quantized = (hard - soft.detach() + soft) @ codebook
    sharp = (logits / temperature).softmax(1)
    log_sharp = (logits / temperature + 1e-5).log_softmax(1)
    mean = sharp.mean(0)
    sample_entropy = -(sharp * log_sharp).sum(1).mean()
    return quantized, sample_entropy, -(mean * (mean + 1e-5).log()).sum()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_inputs_err_no_more_than_eager(backend, device, small, dtype):
    n, k, d = (9, 131, 16) if small else (64, 2000, 64)
    z, codebook = rows_and_codes(n, k, d, dtype=dtype, device=device)
    z = z / 4
    result, grads = run(z, codebook, backend)
    expected, expected_grads = truth(z, codebook)
    assert torch.equal(result.indices.cpu(), expected.indices)
    assert result.quantized.dtype == dtype and result.batch_entropy.dtype == torch.float32
    for name in ("sample_entropy", "batch_entropy"):
        torch.testing.assert_close(
            getattr(result, name).double().cpu(), getattr(expected, name), rtol=1e-5, atol=1e-7
        )
    a, b = (x.detach().requires_grad_() for x in (z, codebook))
    quantized, sample_entropy, batch_entropy = official(a, b, 0.01)
    generator = torch.Generator().manual_seed(5)
    probe = torch.randn(z.shape, generator=generator).to(device, dtype)
    losses = {"value": (quantized * probe).sum(), "entropy": 1.5 * sample_entropy - batch_entropy}
    for name, loss in losses.items():
        eager = torch.autograd.grad(loss, [a, b], retain_graph=True)
        for ours, theirs, right in zip(grads[name], eager, expected_grads[name], strict=True):
            # So few codes leave eager hardly more than the rounding of its result.
            epsilon = torch.finfo(dtype).eps / 4 if small else 0.0
            assert (
                relative_error(ours.cpu(), right) <= relative_error(theirs.cpu(), right) + epsilon
            )


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_of_one_code_are_added_in_float32(backend, device, small, dtype):
    n = 300 if small else 4000
    z, codebook = rows_and_codes(n, 2, 16, dtype=dtype, device=device)
    codebook.requires_grad_()
    probe = 1 + torch.randn(n, 16, dtype=torch.float32).to(device, dtype)
    result = propagate(z, codebook, backend=backend)
    (result.codes * probe).sum().backward()
    right = torch.zeros(2, 16, dtype=torch.float64, device=device)
    right.index_add_(0, result.indices, probe.double())
    assert relative_error(codebook.grad, right) < 3 * torch.finfo(dtype).eps


def test_reference_is_the_official_arithmetic():
    z, codebook = (x.double().requires_grad_() for x in rows_and_codes(12, 90, 7))
    probe = torch.randn(12, 7, dtype=torch.float64)
    ours = index_propagation(z / 2, codebook, temperature=0.05, backend="reference")
    theirs = official(z / 2, codebook, 0.05)
    for actual, expected in zip((ours[0], ours[2], ours[3]), theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        weight = probe if actual.ndim else 1.0
        for a, b in zip(
            torch.autograd.grad((actual * weight).sum(), [z, codebook], retain_graph=True),
            torch.autograd.grad((expected * weight).sum(), [z, codebook], retain_graph=True),
            strict=True,
        ):
            assert relative_error(a, b) < 1e-10


def test_reference_equals_finite_differences():
    z, codebook = (x.double().requires_grad_() for x in rows_and_codes(5, 11, 4))
    fixed = codebook.detach().clone()
    indices = nearest_code(z.float(), codebook.float(), metric="dot")
    probe = torch.randn(5, 4, dtype=torch.float64)

    def stand_in(z, codebook):
        """Smooth, with the straight-through gradient: the hard choice and the outer E are fixed."""
        soft = (z @ codebook.T).softmax(1)
        return ((soft @ fixed + codebook[indices]) * probe).sum()

    def entropies(z, codebook):
        return index_propagation(z, codebook, temperature=0.3, backend="reference")[2:]

    assert torch.autograd.gradcheck(stand_in, (z, codebook))
    quantized, *_ = index_propagation(z, codebook, backend="reference")
    for a, b in zip(
        torch.autograd.grad((quantized * probe).sum(), [z, codebook]),
        torch.autograd.grad(stand_in(z, codebook), [z, codebook]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(entropies, (z, codebook))
    assert torch.autograd.gradgradcheck(entropies, (z, codebook))


def test_without_entropy(backend, device):
    z, codebook = rows_and_codes(9, 130, 12, device=device)
    result, grads = run(z, codebook, backend, entropy=False)
    assert result.sample_entropy == 0 and result.batch_entropy == 0
    assert not grads["entropy"][0].any() and not grads["entropy"][1].any()
    _, expected = truth(z, codebook)
    for name in ("value", "codes"):
        for actual, right in zip(grads[name], expected[name], strict=True):
            assert (actual.double().cpu() - right).norm() <= 1e-5 * right.norm()


def test_gradients_add_up(backend, device):
    """One loss over all outputs, as in training, has the sum of the gradients of its parts."""
    z, codebook = (x.requires_grad_() for x in rows_and_codes(9, 130, 12, device=device))
    probe = torch.randn(9, 12).to(device)
    result = propagate(z, codebook, backend=backend)
    parts = gradients(result, z, codebook, probe)
    loss = ((result.quantized + result.codes) * probe).sum()
    loss = loss + 1.5 * result.sample_entropy - result.batch_entropy
    together = torch.autograd.grad(loss, [z, codebook])
    for i in range(2):
        assert relative_error(together[i], sum(parts[name][i] for name in LOSSES)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(backend, device, dtype):
    z, codebook = rows_and_codes(0, 130, 12, dtype=dtype, device=device)
    result, grads = run(z, codebook, backend)
    assert result.quantized.shape == (0, 12) and result.indices.shape == (0,)
    assert result.sample_entropy == 0 and result.batch_entropy == 0
    for grad_z, grad_codebook in grads.values():
        assert grad_z.shape == (0, 12)
        assert grad_codebook.shape == (130, 12) and not grad_codebook.any()


def test_strided_inputs(backend, device):
    z, codebook = rows_and_codes(10, 200, 24, device=device)
    wide = torch.full((10, 100), torch.nan, device=device)
    wide[:, 7:31] = z
    result, grads = run(z, codebook, backend)
    strided, strided_grads = run(wide[:, 7:31], codebook.T.contiguous().T, backend)
    assert torch.equal(result.indices, strided.indices)
    torch.testing.assert_close(strided.sample_entropy, result.sample_entropy, rtol=1e-5, atol=1e-8)
    for name in LOSSES:
        for a, b in zip(grads[name], strided_grads[name], strict=True):
            assert relative_error(b, a) < 1e-6
    z, codebook = (x.requires_grad_() for x in (z, codebook))
    quantized, *_ = index_propagation(z, codebook, backend=backend)
    quantized.sum().backward()  # its gradient has stride 0
    a, b = (x.detach().double().cpu().requires_grad_() for x in (z, codebook))
    index_propagation(a, b, backend="reference")[0].sum().backward()
    assert relative_error(z.grad.cpu(), a.grad) < 1e-5
    assert relative_error(codebook.grad.cpu(), b.grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_a_row(backend, device, dtype):
    z, codebook = rows_and_codes(9, 130, 12, dtype=dtype, device=device)
    z[4, 3] = torch.nan
    result, grads = run(z, codebook, backend)
    assert bool(((result.indices >= 0) & (result.indices < 130)).all())
    assert bool(result.sample_entropy.isnan()) and bool(result.batch_entropy.isnan())
    others = [i for i in range(9) if i != 4]
    right = truth(z[others], codebook)[0]
    assert torch.equal(result.indices[others].cpu(), right.indices)
    torch.testing.assert_close(
        result.max_probability[others].double().cpu(), right.max_probability, rtol=1e-5, atol=0
    )
    assert bool(grads["value"][0][4].isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_the_codebook(backend, device, dtype):
    z, codebook = rows_and_codes(9, 130, 12, dtype=dtype, device=device)
    codebook[7, 2] = torch.nan
    result, _ = run(z, codebook, backend)
    assert bool(((result.indices >= 0) & (result.indices < 130)).all())
    assert bool(result.sample_entropy.isnan())


def test_same_bits_from_run_to_run(backend, device, small):
    if small:
        pytest.skip("the interpreter has one order")
    torch.manual_seed(1)
    codes = torch.randn(20, 16, device=device)
    z = codes[torch.randint(20, (40,), device=device)]  # many rows to a code
    codebook = torch.cat([codes, torch.randn(110, 16, device=device)])
    first, first_grads = run(z, codebook, backend)
    again, again_grads = run(z, codebook, backend)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    for name in LOSSES:
        for a, b in zip(first_grads[name], again_grads[name], strict=True):
            assert torch.equal(a, b)


def test_indices_depend_on_neither_threads_nor_instruction_set(set_threads):
    z, codebook = _duplicated(301, 2003, 20)
    expected = nearest_code(z, codebook, metric="dot")
    for isa in supported_isas():
        with cpu_isa(isa):
            for count in (1, 2, 3):
                set_threads(count)
                indices = index_propagation(z, codebook)[1]
                assert torch.equal(indices, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(301, 2003), (2100, 3300)])
def test_gradients_depend_on_no_threads(n, k, dtype, set_threads):
    """The same bits for every number of threads, with many rows to a code and codes to a row."""
    z, codebook = rows_and_codes(n, k, 20, dtype=dtype)
    codebook[100:400] = codebook[7]
    z[: n // 2 : 3] = codebook[7]
    set_threads(1)
    _, expected = run(z, codebook, "cpu")
    for count in (2, 3, 5):
        set_threads(count)
        _, actual = run(z, codebook, "cpu")
        for name in LOSSES:
            for a, b in zip(actual[name], expected[name], strict=True):
                assert torch.equal(a, b), (count, name)


def test_more_than_2_to_the_31_scores():
    """Rows whose gradient is zero add nothing, so a few rows are the truth for all."""
    rows = torch.tensor([0, 1, 30_000, 65_535, 65_536, 69_999])
    z, codebook = (x.requires_grad_() for x in rows_and_codes(70_000, 32_768, 3))
    probe = torch.zeros(70_000, 3)
    probe[rows] = torch.randn(6, 3)
    quantized, indices, *_ = index_propagation(z, codebook, entropy=False)
    (quantized * probe).sum().backward()
    a, b = z.detach()[rows].double().requires_grad_(), codebook.detach().double().requires_grad_()
    expected, expected_indices, *_ = index_propagation(a, b, entropy=False, backend="reference")
    (expected * probe[rows]).sum().backward()
    assert torch.equal(indices[rows], expected_indices)
    assert relative_error(z.grad[rows], a.grad) < 1e-4
    assert relative_error(codebook.grad, b.grad) < 1e-4


@pytest.mark.parametrize("backend", ["streaming", "cpu"])
def test_never_holds_the_scores(backend, peak, set_threads):
    z, codebook = (x.requires_grad_() for x in rows_and_codes(2048, 16_384, 8))

    def step():
        quantized, _, sample_entropy, batch_entropy = index_propagation(
            z, codebook, backend=backend
        )
        (quantized.square().mean() + sample_entropy - batch_entropy).backward()

    set_threads(1)  # a busy machine makes the many small steps of streaming wait
    step()
    extra = peak(step)
    assert extra <= 32 << 20, f"{extra / 2**20:.1f} MiB, where one N x K matrix is 128 MiB"


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_the_gradient_of_a_few_codes_at_a_time(dtype, peak):
    z, codebook = (x.requires_grad_() for x in rows_and_codes(64, 32_768, 128, dtype=dtype))

    def step():
        quantized, _, sample_entropy, batch_entropy = index_propagation(z, codebook, backend="cpu")
        loss = quantized.float().square().mean() + sample_entropy - batch_entropy
        return torch.autograd.grad(loss, codebook)[0]

    step()
    extra = peak(step)
    assert extra <= 8 << 20, f"{extra / 2**20:.1f} MiB, where its float32 gradient is 16 MiB"


@pytest.mark.parametrize("dtype", HALVES)
def test_rounds_gradients_as_pytorch_does(dtype):
    """Of one code that is zero, the codebook's gradient is that of the quantized value."""
    exponents = torch.arange(-30.0, 17.0).exp2()
    mantissas = torch.arange(1.0, 2.0, torch.finfo(dtype).eps / 4)
    mantissas = torch.cat([mantissas[:64], mantissas[-64:]])
    grad = (exponents[:, None] * mantissas).flatten()
    grad = torch.cat([torch.zeros(1), grad, -grad]).unsqueeze(0)
    z, codebook = torch.zeros(2, *grad.shape, dtype=dtype)
    for isa in supported_isas():
        with cpu_isa(isa):
            ops = torch.ops.titok_fast
            saved = ops.index_propagation_fwd(z, codebook, 1.0, False, True, "cpu")
            indices, mean_code, statistics, weight, *support = saved
            grad_z, grad_codebook = ops.index_propagation_bwd(
                grad, z, codebook, indices, mean_code, statistics, *support,
                torch.tensor(0.0), weight, 1.0, False, "cpu",
            )  # fmt: skip
            assert torch.equal(grad_codebook, grad.to(dtype)), isa
            assert not grad_z.any(), isa


def test_opcheck():
    z, codebook = rows_and_codes(9, 33, 7)
    ops = torch.ops.titok_fast
    for entropy in (True, False):
        alone = (z, codebook, 0.01, entropy, False, "cpu")
        torch.library.opcheck(ops.index_propagation_fwd.default, alone)
        arguments = (z, codebook, 0.01, entropy, True, "cpu")
        torch.library.opcheck(ops.index_propagation_fwd.default, arguments)
        indices, mean_code, statistics, _, *support = ops.index_propagation_fwd(*arguments)
        torch.library.opcheck(
            ops.index_propagation_bwd.default,
            (
                torch.randn(9, 7), z, codebook, indices, mean_code, statistics, *support,
                torch.tensor(0.3), torch.randn(33).double(), 0.01, entropy, "cpu",
            ),
        )  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("choice", ["auto", "streaming", "reference"])
def test_compiles_whole(choice, dynamic):

    def loss(z, codebook):
        quantized, indices, sample_entropy, batch_entropy = index_propagation(
            z * 2, codebook, backend=choice
        )
        return (quantized.square() * indices[:, None]).sum() + sample_entropy - batch_entropy

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (17, 40):
        inputs = [x.requires_grad_() for x in rows_and_codes(n, 90, 6)]
        expected, actual = loss(*inputs), compiled(*inputs)
        torch.testing.assert_close(actual, expected)
        for a, b in zip(
            torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            assert relative_error(a, b) < 1e-6


def test_double_backward_is_refused(backend, device):
    z, codebook = (x.requires_grad_() for x in rows_and_codes(4, 20, 8, device=device))
    _, _, sample_entropy, _ = index_propagation(z, codebook, backend=backend)
    (grad,) = torch.autograd.grad(sample_entropy, z, create_graph=True)
    with pytest.raises(RuntimeError, match="index_propagation: has no double backward"):
        grad.sum().backward()


def test_activation_checkpointing(backend, device):
    z, codebook = (x.requires_grad_() for x in rows_and_codes(9, 130, 8, device=device))

    def loss(z, codebook):
        quantized, _, sample_entropy, batch_entropy = index_propagation(
            z * 2, codebook, backend=backend
        )
        return quantized.square().sum() + sample_entropy - batch_entropy

    expected = torch.autograd.grad(loss(z, codebook), [z, codebook])
    again = torch.utils.checkpoint.checkpoint(loss, z, codebook, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again, [z, codebook]), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_casts_as_a_matrix_product_does(backend, device, dtype):
    z, codebook = rows_and_codes(9, 130, 16, device=device)
    expected, expected_grads = run(z.to(dtype), codebook.to(dtype), backend)
    a, b = z.requires_grad_(), codebook.requires_grad_()
    with torch.autocast(device, dtype):
        result = propagate(a, b, backend=backend)
    assert result.quantized.dtype == dtype and result.sample_entropy.dtype == torch.float32
    for actual, right in zip(result, expected, strict=True):
        assert torch.equal(actual, right)
    generator = torch.Generator().manual_seed(5)
    probe = torch.randn(z.shape, generator=generator).to(device, dtype)
    for name, pair in gradients(result, a, b, probe).items():
        for actual, right in zip(pair, expected_grads[name], strict=True):
            assert actual.dtype == torch.float32
            assert torch.equal(actual, right.float())


def test_gradient_scaling(backend, device):
    codebook = nn.Parameter(rows_and_codes(1, 130, 16, device=device)[1])
    z = rows_and_codes(9, 1, 16, device=device)[0]
    optimizer = torch.optim.SGD([codebook], lr=0.1)

    def loss():
        with torch.autocast(device, torch.float16):
            quantized, _, sample_entropy, batch_entropy = index_propagation(
                z, codebook, backend=backend
            )
        return (quantized.float() - z).square().mean() + sample_entropy - batch_entropy

    loss().backward()
    expected = codebook.grad.clone()
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    assert relative_error(codebook.grad, expected) < 1e-3
    before = codebook.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(codebook, before)
    optimizer.zero_grad()
    scaler.scale(loss() * 1e30).backward()  # overflows float16: the step is skipped
    before = codebook.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(codebook, before) and scaler.get_scale() < 1024


def test_gradient_for_one_input_alone(backend, device):
    z, codebook = rows_and_codes(9, 130, 8, device=device)
    both = run(z, codebook, backend)[1]["value"]
    generator = torch.Generator().manual_seed(5)
    probe = torch.randn(9, 8, generator=generator).to(device)
    for i in range(2):
        inputs = [z, codebook]
        inputs[i] = inputs[i].detach().requires_grad_()
        quantized, *_ = index_propagation(*inputs, backend=backend)
        (grad,) = torch.autograd.grad((quantized * probe).sum(), inputs[i])
        assert torch.equal(grad, both[i])


def test_meta_tensors_give_shapes():
    z, codebook = torch.empty(3, 8, device="meta"), torch.empty(9, 8, device="meta")
    quantized, indices, sample_entropy, batch_entropy = index_propagation(z, codebook)
    assert quantized.is_meta and quantized.shape == (3, 8)
    assert indices.shape == (3,) and indices.dtype == torch.int64
    assert sample_entropy.shape == batch_entropy.shape == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("exponent", [7, 10, 15])
def test_equal_logits_of_any_size(ibq_backend, device, dtype, exponent):
    """Three codes share each row, and the fourth is far away."""

    def gradient(dtype, backend):
        large = 2.0**exponent
        z, codes, slope = torch.zeros(4, 16), torch.zeros(4, 16), torch.zeros(4, 16)
        z[:, 0], codes[:3, 0], codes[3, 0] = large, large, -large
        codes[0, 1] = codes[1, 2] = codes[2, 3] = 1
        slope[:, 1], slope[:, 2] = 1, -0.5
        z, codes, slope = (x.to(device, dtype) for x in (z, codes, slope))
        codes.requires_grad_()
        quantized = index_propagation(z, codes, temperature=1.0, backend=backend)[0]
        return torch.autograd.grad((quantized * slope).sum(), codes)[0].double().cpu()

    truth = gradient(torch.float64, "reference")
    error = relative_error(gradient(dtype, ibq_backend), truth)
    assert error < torch.finfo(dtype).eps


def test_one_code_may_have_all_of_many_rows():
    """2^23 weights of 1 fill a counter of 40 bits behind the point."""
    with torch.no_grad():
        z, codebook = torch.full((2**23 + 5, 1), 2.0), torch.full((1, 1), 2.0)
        *_, sample_entropy, batch_entropy = index_propagation(z, codebook, backend="cpu")
    assert float(sample_entropy) == 0 and float(batch_entropy) == pytest.approx(-1e-5, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"z": [[1.0]]}, TypeError, "z: expected a Tensor, got list"),
        ({"z": torch.zeros(3, 4, dtype=torch.float64)}, TypeError, "z: dtype torch.float64 is not"),
        ({"z": torch.zeros(3, 5)}, ValueError, "z: expected [..., D] with the codebook's D = 4"),
        ({"z": torch.zeros(2, 3, 4)}, ValueError, "z: expected [N, D], got shape [2, 3, 4]"),
        ({"z": torch.zeros(4)}, ValueError, "z: expected [N, D], got shape [4]"),
        ({"codebook": torch.zeros(8, 4).half()}, TypeError, "codebook: dtype torch.float16 diff"),
        ({"codebook": torch.zeros(4)}, ValueError, "codebook: expected [K, D], got shape [4]"),
        ({"codebook": torch.zeros(0, 4)}, ValueError, "codebook: K and D must be >= 1"),
        ({"codebook": torch.zeros(8, 4, device="meta")}, ValueError, "codebook: on meta, but z is"),
        ({"temperature": 0.0}, ValueError, "temperature: 0.0 is not a positive normal"),
        ({"temperature": -1}, ValueError, "temperature: -1 is not a positive normal"),
        ({"temperature": math.nan}, ValueError, "temperature: nan is not a positive normal"),
        ({"temperature": "1"}, TypeError, "temperature: expected a float, got str"),
        ({"backend": "numpy"}, ValueError, "backend: 'numpy' is not one of 'auto', 'cpu', 'stre"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"z": torch.zeros(3, 4), "codebook": torch.zeros(8, 4)} | change
    with pytest.raises(error) as raised:
        index_propagation(arguments.pop("z"), arguments.pop("codebook"), **arguments)
    assert str(raised.value).startswith(words)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_same_comes_from_less_work(backend, device, entropy, dtype):
    z, codebook = rows_and_codes(37, 450, 24, dtype=dtype, device=device)
    options = {"temperature": 0.1, "entropy": entropy, "backend": backend}
    expected = propagate(z.requires_grad_(), codebook, **options)
    assert expected.quantized.requires_grad
    with torch.no_grad():
        actual, plain = propagate(z, codebook, **options), index_propagation(z, codebook, **options)
    for name, value in actual._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name).detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(plain[0], actual.quantized) and torch.equal(plain[1], actual.indices)
    assert torch.equal(plain[2], actual.sample_entropy)
    assert torch.equal(plain[3], actual.batch_entropy)


def test_rows_of_many_codes_without_gradients(backend, device):
    """More than the support, which only a backward needs, would hold."""
    z = 1e3 * torch.randn(3, 8, device=device)
    codebook = torch.randn(8, device=device) + 1e-6 * torch.randn(600, 8, device=device)
    with torch.no_grad():
        _, _, *entropies = index_propagation(z, codebook, temperature=1.0, backend=backend)
        _, _, *expected = index_propagation(z, codebook, temperature=1.0, backend="reference")
    torch.testing.assert_close(entropies, expected, rtol=1e-5, atol=0)


def test_of_the_codes_alone_a_gradient_is_no_softmax(backend, device):
    z, codebook = (x.requires_grad_() for x in rows_and_codes(20, 30, 8, device=device))
    result = propagate(z, codebook, backend=backend)
    weight = torch.randn(20, 8, device=device)
    (result.codes * weight).sum().backward()
    expected = torch.zeros_like(codebook).index_add_(0, result.indices, weight)
    torch.testing.assert_close(codebook.grad, expected)
    assert not z.grad.any()


class Tokenizer(nn.Module):
    def __init__(self, backend, equal, process_group=None):
        super().__init__()
        self.encoder, self.codebook = nn.Linear(5, 8), nn.Parameter(torch.randn(50, 8))
        self.backend, self.equal, self.process_group = backend, equal, process_group

    def forward(self, x):
        z = self.encoder(x)
        quantized, _, sample_entropy, batch_entropy = index_propagation(
            z, self.codebook, temperature=0.1, process_group=self.process_group,
            backend=self.backend,
        )  # fmt: skip
        loss = -2 * batch_entropy
        if self.equal:  # DDP's mean of means is not that over all rows where ranks have unlike ones
            loss = loss + (quantized - z).square().mean() + sample_entropy
        return loss, batch_entropy


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("first", [12, 6, 24])
def test_two_ranks_equal_one_process_with_the_whole_batch(tmp_path, choice, first):
    model, x = Tokenizer(choice, first == 12), torch.randn(24, 5)
    torch.save((model.state_dict(), x.split([first, 24 - first])), tmp_path / "in.pt")
    in_two_processes(_rank, tmp_path, choice)
    loss, batch_entropy = model(x)
    loss.backward()
    ranks = [torch.load(tmp_path / f"out{rank}.pt") for rank in range(2)]
    for entropy, _, grads in ranks:
        torch.testing.assert_close(entropy, batch_entropy.detach(), rtol=1e-5, atol=0)
        for name, parameter in model.named_parameters():
            assert relative_error(grads[name], parameter.grad) < 1e-5, name
    torch.testing.assert_close((ranks[0][1] + ranks[1][1]) / 2, loss.detach(), rtol=1e-5, atol=0)


def _rank(rank, folder, choice):
    state, parts = torch.load(folder / "in.pt")
    model = Tokenizer(choice, len(parts[0]) == len(parts[1]), torch.distributed.group.WORLD)
    model.load_state_dict(state)
    parallel = nn.parallel.DistributedDataParallel(model)
    loss, entropy = parallel(parts[rank])
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save((entropy.detach(), loss.detach(), grads), folder / f"out{rank}.pt")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "d"), [(1024, 16_384, 256), (2000, 8192, 64)])
@pytest.mark.parametrize("backend", ["triton", "streaming"])
def test_gpu_equals_streaming_on_cpu(backend, dtype, n, k, d):
    z, codebook = rows_and_codes(n, k, d, dtype=dtype)
    expected, expected_grads = run(z / 4, codebook, "streaming")
    result, grads = run(z.cuda() / 4, codebook.cuda(), backend)
    assert torch.equal(result.indices.cpu(), expected.indices)
    for name in ("sample_entropy", "batch_entropy"):
        torch.testing.assert_close(
            getattr(result, name).cpu(), getattr(expected, name), rtol=1e-5, atol=1e-7
        )
    for name in LOSSES:
        for actual, right in zip(grads[name], expected_grads[name], strict=True):
            assert relative_error(actual.cpu(), right) < (1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
def test_gpu_graph_capture():
    z, codebook = (x.requires_grad_() for x in rows_and_codes(256, 4096, 32, device="cuda"))

    def step():
        quantized, _, sample_entropy, batch_entropy = index_propagation(z, codebook)
        loss = quantized.square().sum() + sample_entropy - batch_entropy
        return loss, *torch.autograd.grad(loss, [z, codebook])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        z.copy_(torch.randn(256, 32))
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("n", "megabytes"), [(1024, 45), (16384, 107)])
def test_memory_on_a_gpu(n, megabytes):
    """Of a training step over 262,144 codes in bfloat16, beyond inputs and gradients."""
    _, most = launched("index_propagation", 90, f"""
z = torch.empty({n}, 256, dtype=torch.bfloat16, device="meta")
codebook = torch.empty(262144, 256, dtype=torch.bfloat16, device="meta")
indices, mean_code, statistics, probability, *_ = launch_index_propagation_fwd(
    z, codebook, 0.01, True, True
)
gradients = launch_index_propagation_bwd(
    z, z, codebook, indices, mean_code, statistics, statistics.new_empty([]), probability, 0.01,
    True,
)
""")  # fmt: skip
    assert most - 2 * 2 * 256 * (n + 262144) < megabytes * 1e6


def test_kernels_compile_for_every_architecture():
    names = ("fwd", "bwd_z", "bwd_codebook")
    assert_kernels_compile(
        "index_propagation", {f"index_propagation_{name}_kernel" for name in names}
    )
