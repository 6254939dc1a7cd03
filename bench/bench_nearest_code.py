"""nearest_code against the official formula and the libraries that have such a search."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.harness import Bench, Call, Provider, own_providers
from bench.ops import Mode, compiled, eager, matrices, too_much_for_reference
from titok_fast import nearest_code

SHAPES = (
    (1024, 262144, 256, "l2"),  # IBQ, four 256 px images
    (8192, 4096, 12, "cosine"),  # TiTok, 64 images of 128 tokens
    (2048, 8192, 64, "l2"),  # TiTok, the vq8k models
    (32, 4096, 12, "l2"),  # TiTok, one image
    (32, 4096, 12, "cosine"),
)
SMALL = ((16384, 512, 16, "l2"),)  # a small codebook, and many rows
OVER_CODES = tuple((1024, k, 256, "l2") for k in (1024, 4096, 16384, 65536, 1048576))
OVER_ROWS = tuple((n, 16384, 256, "l2") for n in (1, 64, 256, 4096))
LARGE = (  # where there is a GPU
    (65536, 4096, 12, "cosine"),
    (65536, 8192, 64, "l2"),
    (65536, 16384, 256, "l2"),
)


@dataclass(frozen=True)
class Case(harness.Case):
    n: int
    k: int
    d: int
    metric: str


def cases(device: str, quick: bool) -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    shapes = SHAPES if quick else (*SHAPES, *SMALL, *OVER_CODES, *OVER_ROWS)
    shapes += LARGE if device == "cuda" and not quick else ()
    return [
        Case(n=n, k=max(128, k // 64) if quick else k, d=d, metric=m, device=device, dtype=t)
        for t in dtypes
        for n, k, d, m in shapes
    ]


@lru_cache(maxsize=1)
def inputs(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(case.n, case.d, generator=generator)
    codebook = torch.randn(case.k, case.d, generator=generator)
    return z.to(case.device, case.dtype), codebook.to(case.device, case.dtype)


def work(case: Case) -> tuple[int, int]:
    moved = (case.n + case.k) * case.d * case.dtype.itemsize + 8 * case.n
    return 2 * case.n * case.k * case.d, moved


@lru_cache(maxsize=1)
def optimum(case: Case) -> tuple[Tensor, Tensor]:
    """A sample of rows and their best codes in float64: all rows, or 64 where that is too much."""
    z, codebook = inputs(case)
    count = max(64, 2**32 // (case.k * case.d))
    order = torch.randperm(case.n, generator=torch.Generator().manual_seed(1))
    rows = order[:count].to(case.device)
    codes = codebook.double()
    bias = codes.new_zeros(case.k)
    if case.metric == "l2":
        bias = -codes.square().sum(1) / 2
    elif case.metric == "cosine":
        codes = F.normalize(codes, dim=1)
    chunks = z[rows].double().split(max(1, 2**24 // case.k))
    return rows, torch.cat([torch.addmm(bias, chunk, codes.T).argmax(1) for chunk in chunks])


def score(z: Tensor, code: Tensor, metric: str) -> Tensor:
    z, code = z.double(), code.double()
    if metric == "l2":
        return -(z - code).square().sum(-1)
    dot = (z * code).sum(-1)
    return dot / code.norm(dim=-1).clamp_min(1e-12) if metric == "cosine" else dot


def check(case: Case, output: Tensor) -> tuple[int, int]:
    """Rows whose code has a worse float64 score than the optimum, and rows looked at."""
    z, codebook = inputs(case)
    rows, best = optimum(case)
    chosen = output.reshape(case.n)[rows].long()
    inside = (chosen >= 0) & (chosen < case.k)
    chosen = chosen.where(inside, best)
    worse = score(z[rows], codebook[chosen], case.metric) < score(
        z[rows], codebook[best], case.metric
    )
    return int((worse | ~inside).sum()), len(rows)


def as_l2(z: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    if metric == "cosine":
        return F.normalize(z, dim=1), F.normalize(codebook, dim=1)
    return z, codebook


def official_formula(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """1d-tokenizer's quantizer: the distances [N, K] in the inputs' dtype, then argmin."""
    z, codebook = as_l2(z, codebook, metric)
    norms = z.square().sum(1, keepdim=True) + codebook.square().sum(1)
    return (norms - 2 * z @ codebook.T).argmin(1)


def prepare_ours(backend: str) -> Callable[[Case, Tensor, Tensor], Call]:
    def prepare(case: Case, z: Tensor, codebook: Tensor) -> Call:
        return lambda: nearest_code(z, codebook, metric=case.metric, backend=backend)

    return prepare


def prepare_official(case: Case, z: Tensor, codebook: Tensor, mode: Mode = eager) -> Call:
    run = mode(official_formula)
    return lambda: run(z, codebook, case.metric)


def prepare_cdist(case: Case, z: Tensor, codebook: Tensor) -> Call:
    return lambda: torch.cdist(*as_l2(z, codebook, case.metric)).argmin(1)


def prepare_faiss(case: Case, z: Tensor, codebook: Tensor) -> Call:
    """The index is built beforehand, the normalised codebook with it."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = (faiss.IndexFlatIP if case.metric == "cosine" else faiss.IndexFlatL2)(case.d)
    index.add(as_l2(z, codebook, case.metric)[1].numpy())
    return lambda: torch.from_numpy(index.search(z.numpy(), 1)[1])


def prepare_vector_quantize(case: Case, z: Tensor, codebook: Tensor) -> Call:
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(
        dim=case.d, codebook_size=case.k, use_cosine_sim=case.metric == "cosine"
    ).to(case.device)
    layer.eval()
    layer.codebook = as_l2(z, codebook, case.metric)[1]
    return lambda: layer(z[None])[1]


def prepare_flash_kmeans(case: Case, z: Tensor, codebook: Tensor) -> Call:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    def call() -> Tensor:
        rows, codes = as_l2(z, codebook, case.metric)
        return euclid_assign_triton(rows[None], codes[None], rows.float().square().sum(1)[None])

    return call


def slow(case: Case, provider: Provider) -> bool:
    """The largest codebook but for the series; and what the series over K and N can do without."""
    series = (case.n, case.k, case.d, case.metric) in (*OVER_CODES, *OVER_ROWS)
    extra = series and provider.name in ("compiled", "vector-quantize-pytorch")
    if provider.name == "reference" or extra:
        return True
    if case.device == "cuda":
        return series and (case.dtype == torch.float32 or provider.name == "cdist")
    return (
        (case.k == 1048576 and provider.name != "titok_fast-cpu")
        or (series and "[" in provider.name)
        or (case.k == 262144 and "portable" in provider.name)
    )


BENCH = Bench(
    op="nearest_code",
    cases=cases,
    providers=(
        *own_providers(
            prepare_ours,
            gpu="triton",
            bf16=True,
            too_much={"reference": too_much_for_reference(12)},
        ),
        Provider("official", prepare_official, too_much=matrices(3)),
        Provider("compiled", partial(prepare_official, mode=compiled), too_much=matrices(3)),
        Provider("cdist", prepare_cdist, too_much=matrices(2)),
        Provider(
            "faiss",
            prepare_faiss,
            devices=("cpu",),
            missing=lambda: harness.not_installed("faiss-cpu"),
        ),
        Provider(
            "vector-quantize-pytorch",
            prepare_vector_quantize,
            missing=lambda: harness.not_installed("vector-quantize-pytorch"),
            too_much=matrices(6, itemsize=4),
        ),
        Provider(
            "flash-kmeans",
            prepare_flash_kmeans,
            devices=("cuda",),
            missing=lambda: harness.not_installed("flash-kmeans"),
        ),
    ),
    inputs=inputs,
    work=work,
    check=check,
    slow=slow,
)


def test_nearest_code(measure: Callable[..., None], case: Case, provider: Provider) -> None:
    measure(BENCH, case, provider)
