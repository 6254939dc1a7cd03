"""nearest_code against its float64 reference, to the bit."""

import time

import pytest
import torch

from tests.kernels import assert_kernels_compile, launched
from titok_fast import nearest_code
from titok_fast.ops import inspect
from titok_fast.ops.nearest_code import rescored_codes
from titok_fast.testing import cpu_isa, rows_and_codes, supported_isas

METRICS = ("l2", "cosine", "dot")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_exact(z, codebook, metric, backend):
    """Same indices and the same distance bits as the reference."""
    indices, distances = nearest_code(
        z, codebook, metric=metric, return_distance=True, backend=backend
    )
    expected, expected_distances = nearest_code(
        z, codebook, metric=metric, return_distance=True, backend="reference"
    )
    assert indices.dtype == torch.int64 and distances.dtype == torch.float32
    assert indices.shape == z.shape[:-1] == distances.shape
    assert torch.equal(indices, expected)
    same = (distances == expected_distances) | (distances.isnan() & expected_distances.isnan())
    assert bool(same.all())
    if backend == "cpu":  # which may settle a row without its score where nobody asks for that
        assert torch.equal(nearest_code(z, codebook, metric=metric, backend=backend), expected)
    return indices, distances


def test_reference_is_the_float64_optimum():
    z, codebook = rows_and_codes(200, 300, 24, mean=3.0)
    a, b = z.double(), codebook.double()
    unit = b / b.norm(dim=1, keepdim=True)
    squared = torch.stack([(a - e).square().sum(1) for e in b], 1)
    expected = {
        "l2": squared.argmin(1),
        "cosine": (a @ unit.T).argmax(1),
        "dot": (a @ b.T).argmax(1),
    }
    for metric in METRICS:
        indices, distances = nearest_code(
            z, codebook, metric=metric, return_distance=True, backend="reference"
        )
        assert torch.equal(indices, expected[metric])
        row = torch.arange(200)
        chosen = {
            "l2": squared[row, indices],
            "cosine": (a / a.norm(dim=1, keepdim=True) - unit[indices]).square().sum(1),
            "dot": (a @ b.T)[row, indices],
        }
        torch.testing.assert_close(distances.double(), chosen[metric], rtol=1e-6, atol=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "d"), [(1, 1, 1), (7, 3, 5), (12, 300, 12), (9, 290, 64), (5, 150, 200)]
)
def test_equals_reference(backend, device, metric, dtype, n, k, d):
    z, codebook = rows_and_codes(n, k, d, dtype=dtype, device=device)
    assert_exact(z, codebook, metric, backend)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("n", "k", "d"), [(300, 5000, 16), (70, 3000, 64), (20, 2100, 256), (6, 900, 512)]
)
def test_equals_reference_over_many_blocks(metric, n, k, d, backend, device):
    if backend == "triton" and device == "cpu":
        n, k = 4, k // 2  # the interpreter runs one program at a time
    z, codebook = rows_and_codes(n, k, d, device=device)
    assert_exact(z, codebook, metric, backend)


def _clustered(n, k, d):
    centers = 10 * torch.randn(5, d)
    rows, codes = (centers[torch.randint(5, (m,))] + 1e-3 * torch.randn(m, d) for m in (n, k))
    return rows, codes


def _duplicated(n, k, d):
    return torch.randn(n, d), torch.randn(1 + k // 9, d)[torch.randint(1 + k // 9, (k,))]


def _near_duplicates(n, k, d):
    """Codes one float32 step from each other in one entry."""
    codes = torch.randn(1 + k // 7, d)[torch.randint(1 + k // 7, (k,))]
    entry, side = torch.randint(d, (k, 1)), torch.randn(k, 1).sign() * torch.inf
    return torch.randn(n, d), codes.scatter(1, entry, codes.gather(1, entry).nextafter(side))


def _midpoints(n, k, d):
    """Rows between two codes, up to float32 rounding."""
    codes = torch.randn(k, d)
    return (codes[torch.randint(k, (n,))] + codes[torch.randint(k, (n,))]) / 2, codes


def _small_spread(n, k, d):
    return 1000 + 1e-2 * torch.randn(n, d), 1000 + 1e-2 * torch.randn(k, d)


def _scales(n, k, d):
    """Every row and code at its own scale from 1e-30 to 1e30."""
    rows, codes = (torch.randn(m, d) * 10 ** (60 * torch.rand(m, 1) - 30) for m in (n, k))
    return rows, codes


def _denormals(n, k, d):
    rows, codes = (torch.randint(-9, 10, (m, d)) * 2.0**-149 for m in (n, k))
    return rows, codes


def _heavy_tailed(n, k, d):
    """A few entries so large that a common scale leaves the others nothing."""
    rows, codes = (torch.randn(m, d) / torch.rand(m, d).square() for m in (n, k))
    return rows, codes


def _constant_rows(n, k, d):
    rows, codes = (torch.randint(-20, 21, (m, 1)).float().expand(m, d) for m in (n, k))
    return rows, codes


def _not_finite(n, k, d):
    special = torch.tensor([torch.nan, torch.inf, -torch.inf])
    rows, codes = (
        torch.where(
            torch.rand(m, d) < 0.3 / d, special[torch.randint(3, (m, d))], torch.randn(m, d)
        )
        for m in (n, k)
    )
    return rows, codes


HARD = {
    f.__name__[1:]: f
    for f in (
        _clustered,
        _duplicated,
        _near_duplicates,
        _midpoints,
        _small_spread,
        _scales,
        _denormals,
        _heavy_tailed,
        _constant_rows,
        _not_finite,
    )
}
ODD_SHAPES = (
    (1, 1, 1), (37, 1, 7), (61, 997, 1), (67, 2111, 13), (13, 523, 67), (7, 1409, 131),
    (2, 1000, 33), (1, 1, 64), (4, 643, 131),  # few rows, for which no code is packed
)  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", HARD)
def test_hard_data(backend, device, kind, metric):
    interpreted = backend == "triton" and device == "cpu"
    large = ((70, 20011, 13), (67, 3001, 131)) if device == "cuda" else ()  # past the direct kernel
    for shape in ((3, 131, 13), (3, 1100, 24)) if interpreted else (*ODD_SHAPES, *large):
        dtypes = (torch.float32, *DTYPES)
        if interpreted:  # slowly: several spans of codes in half precision alone
            dtypes = DTYPES[:1] if shape[2] < 16 else DTYPES[1:2]
        for seed, dtype in enumerate(dtypes):
            torch.manual_seed(seed)
            z, codebook = HARD[kind](*shape)
            assert_exact(z.to(device, dtype), codebook.to(device, dtype), metric, backend)


@pytest.mark.parametrize("metric", METRICS)
def test_triton_rows_go_in_chunks(metric, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels = inspect.kernels("nearest_code")
    monkeypatch.setattr(kernels, "_TABLE_BYTES", 1)
    launches = []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return coarse[grid]

    coarse = kernels.nearest_code_coarse_kernel
    monkeypatch.setattr(kernels, "nearest_code_coarse_kernel", Counted())
    z, codebook = rows_and_codes(150, 40_000 if device == "cuda" else 600, 24, device=device)
    assert_exact(z, codebook, metric, "triton")
    assert len(launches) > 1


@pytest.mark.parametrize("capability", inspect.CAPABILITIES)
def test_triton_compiles_little_for_new_sizes(capability):
    found, _ = launched("nearest_code", capability, """
_TABLE_BYTES = 1 << 20  # so that there are several chunks of rows
for d in (12, 64, 256):
    for k in (4096, 5001):
        codes = torch.empty(k, d, dtype=torch.float32, device="meta")
        for n in (1, 2, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 5000, 16384, 70000):
            launch_nearest_code(codes.new_empty(n, d), codes, "l2")
""")  # fmt: skip
    assert found.pop("nearest_code_direct_kernel") == 1  # only D = 12 is small enough
    assert found.pop("nearest_code_prepare_kernel") == 3
    assert found.pop("nearest_code_coarse_kernel") <= 1 + 2 + 3  # of 64, 128 and 256 rows
    assert found.pop("nearest_code_rescore_kernel") <= 3 * 2  # of few rows, and of many
    assert not found


@pytest.mark.parametrize("metric", METRICS)
def test_few_codes_are_rescored(backend, device, metric):
    n, k, d = (6, 2000, 12) if backend == "triton" and device == "cpu" else (500, 8192, 12)
    z, codebook = rows_and_codes(n, k, d, device=device)
    rescored = rescored_codes(z, codebook, metric=metric, backend=backend)
    assert rescored.dtype == torch.int64 and rescored.shape == (n,)
    assert int(rescored.min()) >= 1 and float(rescored.double().mean()) < k / 10


@pytest.mark.parametrize("metric", METRICS)
def test_collapsed_codebook_is_rescored_whole(backend, device, metric):
    """Codes too close for the coarse pass, the nearest of them last."""
    k = 300 if backend == "triton" and device == "cpu" else 6007
    z, codebook = torch.ones(5, 24), torch.full((k, 24), 0.5)
    if metric == "l2":  # a sphere of codes around the row
        z, codebook = torch.zeros(5, 24), torch.randn(k, 24).sign()
        codebook[-1, 3] *= 1 - 2**-24
    elif metric == "cosine":
        codebook[:-1, 3] = 0.5001
    else:
        codebook[-1, 3] *= 1 + 2**-23
    z, codebook = z.to(device), codebook.to(device)
    indices, _ = assert_exact(z, codebook, metric, backend)
    assert bool((indices == k - 1).all())
    assert bool((rescored_codes(z, codebook, metric=metric, backend=backend) == k).all())


def test_large_mean(backend, device):
    z, codebook = rows_and_codes(16, 1000, 32, mean=1000.0, device=device)
    indices, _ = assert_exact(z, codebook, "l2", backend)
    float32 = (
        z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T
    ).argmin(1)
    assert bool((float32 != indices).any()), "the case is not hard enough to tell the two apart"


def test_inputs_next_to_codes(backend, device):
    _, codebook = rows_and_codes(1, 1500, 48, device=device)
    z = codebook[::150] + 1e-6
    indices, _ = assert_exact(z, codebook, "l2", backend)
    assert torch.equal(indices, torch.arange(0, 1500, 150, device=device))


@pytest.mark.parametrize("metric", METRICS)
def test_ties_take_the_lowest_index(backend, device, metric):
    z, codes = rows_and_codes(12, 40, 20, device=device)
    codebook = codes.repeat(9, 1)[torch.randperm(360)]
    indices, _ = assert_exact(z, codebook, metric, backend)
    same = (codebook[indices][:, None] == codebook[None]).all(2)  # [N, K]
    assert torch.equal(indices, same.to(torch.uint8).argmax(1))


@pytest.mark.parametrize("metric", METRICS)
def test_collapsed_codebook(backend, device, metric):
    z, codes = rows_and_codes(5, 1, 24, device=device)
    indices, _ = assert_exact(z, codes.expand(600, 24), metric, backend)
    assert not bool(indices.any())


def test_symmetric_codes_tie_in_exact_arithmetic(backend, device):
    z = torch.zeros(3, 16, device=device)
    codebook = torch.randn(200, 16).to(device).sign()
    indices, distances = assert_exact(z, codebook, "l2", backend)
    assert not bool(indices.any()) and bool((distances == 16).all())


@pytest.mark.parametrize("metric", METRICS)
def test_nan(backend, device, metric):
    z, codebook = rows_and_codes(6, 300, 12, device=device)
    z[2, 3] = torch.nan
    codebook[::2, 5] = torch.nan
    indices, distances = assert_exact(z, codebook, metric, backend)
    assert indices[2] == 0 and bool(distances[2].isnan())
    others = torch.tensor([0, 1, 3, 4, 5], device=device)
    assert bool((indices[others] % 2 == 1).all())
    assert not bool(distances[others].isnan().any())
    indices, distances = assert_exact(z, torch.full_like(codebook, torch.nan), metric, backend)
    assert not bool(indices.any()) and bool(distances.isnan().all())


@pytest.mark.parametrize("metric", METRICS)
def test_infinite(backend, device, metric):
    z, codebook = rows_and_codes(8, 260, 12, device=device)
    z[1, 0], z[2, 0] = torch.inf, -torch.inf
    codebook[7, 1], codebook[11] = torch.inf, -torch.inf
    assert_exact(z, codebook, metric, backend)
    codebook[:] = torch.inf
    codebook[0] = torch.nan
    assert_exact(z, codebook, metric, backend)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e30, 1e-20, 1e-30, 1e-42])
def test_extreme_scale(backend, device, metric, scale):
    z, codebook = rows_and_codes(6, 300, 12, device=device)
    _, distances = assert_exact(z * scale, codebook * scale, metric, backend)
    if scale == 1e30 and metric != "cosine":
        assert bool(distances.isinf().all())
    assert_exact(z * scale, codebook, metric, backend)
    assert_exact(z, codebook * scale, metric, backend)


def test_scores_at_the_end_of_float32():
    """Cosines that float32 rounds to infinity decide between codes all the same."""
    for seed in range(20):
        torch.manual_seed(seed)
        codes = -(1 + torch.rand(1)) * torch.full((32, 8192), 2.0**-12)
        codes[16:, 5] *= 1 + (0.008192 * (1 + seed % 4)) ** 0.5
        least = (codes.double().sum(1) / codes.double().norm(dim=1)).min()
        z = torch.full((1, 8192), float((1 - 4e-7) * torch.finfo(torch.float32).max / -least))
        for isa in supported_isas():
            with cpu_isa(isa):
                assert_exact(z, codes, "cosine", "cpu")


@pytest.mark.parametrize("metric", METRICS)
def test_outlier_codes(backend, device, metric):
    z, codebook = rows_and_codes(8, 700, 16, device=device)
    codebook[3] *= 1e6
    codebook[350] *= 1e25
    codebook[9] = 0
    z[4] = 0
    assert_exact(z, codebook, metric, backend)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_blocks_of_very_different_scale(backend, device, metric):
    z = torch.tensor([[1.0, 0.0]], device=device)
    codebook = torch.zeros(256, 2)
    codebook[:128, 0] = 1e-33
    codebook[128:] = torch.tensor([1e-34, 1e-31])
    assert_exact(z, codebook.to(device), metric, backend)
    codebook = torch.zeros(64, 2)
    codebook[:32, 0] = 7 * 2.0**-149
    codebook[32:] = torch.tensor([3 * 2.0**-149, 0])
    codebook[63] = torch.tensor([0, 9 * 2.0**-149])
    assert_exact(z, codebook.to(device), metric, backend)


def test_zero_has_one_sign(backend, device):
    z, codebook = -torch.ones(1, 8, device=device), torch.zeros(1, 8, device=device)
    for choice in (backend, "reference"):
        _, distance = nearest_code(z, codebook, metric="dot", return_distance=True, backend=choice)
        assert not bool(distance.signbit())


def test_meta_tensors_give_shapes():
    z, codebook = torch.empty(2, 3, 8, device="meta"), torch.empty(9, 8, device="meta")
    indices, distances = nearest_code(z, codebook, return_distance=True)
    assert indices.is_meta and indices.shape == (2, 3) and indices.dtype == torch.int64
    assert distances.is_meta and distances.shape == (2, 3) and distances.dtype == torch.float32


def test_strided_inputs(backend, device):
    z, codebook = rows_and_codes(10, 400, 24, device=device)
    expected = nearest_code(z, codebook, backend=backend)
    wide = torch.full((10, 100), torch.nan, device=device)
    wide[:, 7:31] = z
    tall = torch.full((24, 400), torch.nan, device=device)
    tall[:] = codebook.T
    assert torch.equal(nearest_code(wide[:, 7:31], tall.T, backend=backend), expected)
    reverse = nearest_code(z.flip(0)[::3], codebook, backend=backend)
    assert torch.equal(reverse, expected.flip(0)[::3])
    same = nearest_code(z[:1].expand(5, 24), codebook, backend=backend)
    assert torch.equal(same, expected[:1].expand(5))


def test_rows_beyond_2_to_the_31_elements(backend, device):
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 20 << 30:
        pytest.skip("needs 10 GB")
    storage = torch.Tensor.new_empty(  # touched only where written
        torch.empty(0, dtype=torch.bfloat16, device=device), 2 * (2**31 + 8) + 8
    )

    def far(rows, stride):
        spread = storage.as_strided(rows.shape, (stride, 1))
        return spread.copy_(rows)

    z, codebook = rows_and_codes(3, 3, 8, dtype=torch.bfloat16, device=device)
    expected = nearest_code(z, codebook, backend="reference")
    assert torch.equal(nearest_code(z, far(codebook, 2**31 + 8), backend=backend), expected)
    # Of a stride that tensor cores could read in place, past a GPU's kernel for few codes.
    z, codebook = rows_and_codes(2, 5000, 16, dtype=torch.bfloat16, device=device)
    expected = nearest_code(z, codebook, backend="reference")
    assert torch.equal(nearest_code(far(z, 2**31), codebook, backend=backend), expected)


def test_more_than_2_to_the_31_scores():
    z, codebook = rows_and_codes(70_000, 32_768, 3)
    indices = nearest_code(z, codebook)
    rows = torch.tensor([0, 1, 30_000, 65_535, 65_536, 69_999])
    assert torch.equal(indices[rows], nearest_code(z[rows], codebook, backend="reference"))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3), (0,), (3, 0)])
def test_leading_shapes(backend, device, shape):
    z = torch.randn(*shape, 6).to(device)
    codebook = torch.randn(50, 6).to(device)
    indices, distances = nearest_code(z, codebook, return_distance=True, backend=backend)
    assert indices.shape == distances.shape == shape
    expected = nearest_code(z.reshape(-1, 6), codebook, backend="reference")
    assert torch.equal(indices.flatten(), expected)


def test_flushed_subnormals(flushed_subnormals):
    """What the rounding of a row loses has squares below float32's smallest normal number."""
    z, codebook = torch.full((1, 256), 1e-19), torch.zeros(32, 256)
    z[0, 0], codebook[0], codebook[0, 0], codebook[1, 0] = 2.7e-17, 1.0, 0.5, 1.0
    for isa in supported_isas():
        with cpu_isa(isa):
            assert int(nearest_code(z, codebook, metric="dot")) == 0


@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounding_of_factors_at_its_worst(metric, dtype):
    """To bfloat16, by nearly 2^-8 of each: half of the row up, half of it down."""
    z = torch.tensor([[257 / 256] * 65 + [259 / 256] * 64])
    down, up = z.clone(), z.clone()
    down[:, 65:], up[:, :65] = 0, 0
    codebook = torch.cat([up.expand(13, -1), -100 * z, down]).to(dtype)
    z = z.to(dtype)
    expected = nearest_code(z, codebook, metric=metric, backend="reference")
    assert int(expected) == 14
    for isa in supported_isas():
        with cpu_isa(isa):
            assert torch.equal(nearest_code(z, codebook, metric=metric), expected)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_one_long_code_and_rows_halfway_to_it(d):
    z, codebook = torch.randn(3200, d), torch.randn(64, d)
    codebook[-1] *= 1000
    z = z + codebook[-1] / 2
    expected = nearest_code(z, codebook, backend="reference")
    for isa in supported_isas():
        with cpu_isa(isa):
            assert torch.equal(nearest_code(z, codebook), expected)


def test_subnormal_codes(flushed_subnormals):
    z, bits = torch.ones(5000, 1), torch.full((40, 1), 700_000, dtype=torch.int32)
    bits[17] = 1_400_000
    codebook = bits.view(torch.float32)  # about 1e-39 and 2e-39
    for isa in supported_isas():
        with cpu_isa(isa):
            assert (nearest_code(z, codebook, metric="dot") == 17).all()
    few = torch.full((2, 40), 700_000, dtype=torch.int32).view(torch.float32)
    large = torch.full((300, 40), 1e15)
    large[217] *= 1.001
    for isa in supported_isas():
        with cpu_isa(isa):
            assert (nearest_code(few, large, metric="dot") == 217).all()


@pytest.mark.parametrize("metric", METRICS)
def test_same_bits_however_it_is_run(metric, set_threads):
    """Batch split, stride, thread count and instruction set, on data full of ties."""
    z, codebook = _duplicated(701, 3001, 20)
    z[::3] = codebook[torch.randint(3001, (234,))]

    def search(z=z, codebook=codebook):
        return torch.stack(nearest_code(z, codebook, metric=metric, return_distance=True))

    expected = search()
    for size in (1, 7, 350, 700):
        parts = (z if size > 1 else z[:40]).split(size)
        again = torch.cat([search(part) for part in parts], 1)
        assert torch.equal(again, expected[:, : again.shape[1]])
    wide = torch.full((701, 33), torch.nan)
    wide[:, 5:25] = z
    assert torch.equal(search(wide[:, 5:25], codebook.T.contiguous().T), expected)
    assert torch.equal(search(z.flip(0)[::2]), expected.flip(1)[:, ::2])
    for isa in supported_isas():
        with cpu_isa(isa):
            for count in (1, 2, 3, 8):
                set_threads(count)
                assert torch.equal(search(), expected)


@pytest.mark.parametrize(
    ("n", "k", "d"), [(1024, 262144, 256), (8192, 4096, 12), (65536, 1024, 512), (3, 1, 1)]
)
@pytest.mark.parametrize("metric", METRICS)
def test_workspace_stays_small(n, k, d, metric):
    for threads in (1, 2, 16, 64):
        size = inspect.extension().nearest_code_cpu_workspace(n, k, d, metric, threads)
        tiles = 256 * d * max(0, threads - 2)
        assert size <= min(n * k // 128 * 4, 256 << 20) + (16 << 20) + tiles


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "d"), [(2048, 32_768, 16), (20_000, 4096, 12), (64, 131_072, 64), (3000, 3000, 300)]
)
def test_never_holds_the_scores(n, k, d, dtype, metric, peak):
    z, codebook = rows_and_codes(n, k, d, dtype=dtype)
    nearest_code(z[:1], codebook, metric=metric)
    extra = peak(lambda: nearest_code(z, codebook, metric=metric))
    assert extra <= min(n * k // 128 * 4, 256 << 20) + (16 << 20), f"{extra / 2**20:.1f} MiB"


def test_time_grows_linearly_with_the_codebook(set_threads):
    """At most 3 times the linear growth, on one thread; a busy machine gets five tries."""
    z, codebook = rows_and_codes(48, 2**20, 8)

    def seconds(k):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            nearest_code(z, codebook[:k])
            times.append(time.perf_counter() - start)
        return min(times)

    set_threads(1)
    for _ in range(5):
        small, middle, large = (seconds(2**i) for i in (10, 15, 20))
        if middle <= 3 * 32 * small and large <= 3 * 32 * middle:
            return
    pytest.fail(f"{small:.2e} s at 2^10 codes, {middle:.2e} s at 2^15, {large:.2e} s at 2^20")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("distance", [False, True])
def test_opcheck(metric, distance):
    op, inputs = torch.ops.titok_fast.nearest_code.default, rows_and_codes(9, 33, 7)
    torch.library.opcheck(op, (*inputs, metric, distance, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def f(z, codebook):
        indices, distances = nearest_code(z * 2, codebook, return_distance=True)
        return codebook[indices] + distances[:, None]

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (17, 40):
        z, codebook = rows_and_codes(n, 90, 6)
        assert torch.equal(compiled(z, codebook), f(z, codebook))


def test_gives_no_gradient():
    z, codebook = rows_and_codes(4, 9, 5)
    _, distances = nearest_code(z.requires_grad_(), codebook.requires_grad_(), return_distance=True)
    assert not distances.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"z": [[1.0]]}, TypeError, "z: expected a Tensor, got list"),
        ({"z": torch.zeros(3, 4, dtype=torch.float64)}, TypeError, "z: dtype torch.float64 is not"),
        ({"z": torch.zeros(3, 5)}, ValueError, "z: expected [..., D] with the codebook's D = 4"),
        ({"z": torch.zeros(())}, ValueError, "z: expected [..., D]"),
        (
            {"codebook": torch.zeros(8, 4).half()},
            TypeError,
            "codebook: dtype torch.float16 differs",
        ),
        ({"codebook": torch.zeros(4)}, ValueError, "codebook: expected [K, D], got shape [4]"),
        ({"codebook": torch.zeros(0, 4)}, ValueError, "codebook: K and D must be >= 1"),
        ({"codebook": torch.zeros(8, 4, device="meta")}, ValueError, "codebook: on meta, but z is"),
        ({"codebook": torch.zeros(8, 4).long()}, TypeError, "codebook: dtype torch.int64 is not"),
        ({"z": torch.zeros(3, 4).to_sparse()}, TypeError, "z: layout torch.sparse_coo is not"),
        ({"codebook": torch.zeros(8, 4).to_mkldnn()}, TypeError, "codebook: layout torch._mkldnn"),
        ({"metric": "l1"}, ValueError, "metric: 'l1' is not one of 'l2', 'cosine', 'dot'"),
        ({"backend": "numpy"}, ValueError, "backend: 'numpy' is not one of 'auto', 'cpu'"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"z": torch.zeros(3, 4), "codebook": torch.zeros(8, 4)} | change
    with pytest.raises(error) as raised:
        nearest_code(arguments.pop("z"), arguments.pop("codebook"), **arguments)
    assert str(raised.value).startswith(words)
    assert "\n" not in str(raised.value)


def test_under_autocast_the_wider_dtype_counts():
    z, codebook = torch.randn(9, 4).bfloat16(), torch.randn(20, 4)
    expected = nearest_code(z.float(), codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(z, codebook), expected)
        assert torch.equal(nearest_code(codebook, z), nearest_code(codebook, z.float()))
    with pytest.raises(TypeError, match="differs from z's"):
        nearest_code(z, codebook)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "d"), [(1024, 65536, 256), (8192, 4096, 12), (2048, 8192, 64)])
def test_gpu_equals_cpu(metric, dtype, n, k, d):
    z, codebook = rows_and_codes(n, k, d, dtype=dtype)
    expected = nearest_code(z, codebook, metric=metric, return_distance=True)
    actual = nearest_code(z.cuda(), codebook.cuda(), metric=metric, return_distance=True)
    assert torch.equal(actual[0].cpu(), expected[0]) and torch.equal(actual[1].cpu(), expected[1])


@pytest.mark.gpu
def test_gpu_graph_capture():
    z, codebook = rows_and_codes(256, 4096, 12, device="cuda")
    nearest_code(z, codebook)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = nearest_code(z, codebook)
    z.copy_(torch.randn(256, 12))
    graph.replay()
    assert torch.equal(indices, nearest_code(z, codebook))


def test_kernels_compile_for_every_architecture():
    assert_kernels_compile("nearest_code", {"nearest_code_coarse_kernel"})
