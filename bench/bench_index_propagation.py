"""index_propagation, forward and backward with both entropies, against the official arithmetic."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.harness import Bench, Call, Provider, Relative, own_providers
from bench.ops import compiled, matrices, too_much_for_reference
from titok_fast import index_propagation
from titok_fast.testing import relative_error

TEMPERATURE = 0.01
SHAPES = (
    (1024, 1048576, 256),
    (1024, 262144, 256),  # IBQ, four 256 px images
    (1024, 65536, 256),
    (1024, 16384, 256),
    (1024, 4096, 256),
    (1024, 1024, 256),
)
OVER_ROWS = tuple((n, 16384, 256) for n in (64, 256, 4096))
LARGE = ((16384, 262144, 256),)  # where there is a GPU
CHECKED = 64
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-3}  # bfloat16: that of the result's rounding

Quantize = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Case(harness.Case):
    n: int
    k: int
    d: int


def cases(device: str, quick: bool) -> list[Case]:
    shapes = SHAPES[1:3] if quick else (*SHAPES, *OVER_ROWS)
    shapes += LARGE if device == "cuda" and not quick else ()
    return [
        Case(n=n // 8 if quick else n, k=max(128, k // 64) if quick else k, d=d, device=device,
             dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for n, k, d in shapes
    ]  # fmt: skip


@lru_cache(maxsize=1)
def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and codes whose logits have a standard deviation of 1, and dL / d(quantized)."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(case.n, case.d, generator=generator) / case.d**0.5
    codebook = torch.randn(case.k, case.d, generator=generator)
    grad = torch.randn(case.n, case.d, generator=generator) / case.n
    z, codebook, grad = (x.to(case.device, case.dtype) for x in (z, codebook, grad))
    return z, codebook, grad


def work(case: Case) -> tuple[int, int]:
    """The eight N x K x D products of the official arithmetic; two arrays read, two written."""
    moved = 2 * (case.n + case.k) * case.d * case.dtype.itemsize
    return 16 * case.n * case.k * case.d, moved


@lru_cache(maxsize=1)
def truth(case: Case) -> tuple[Tensor, Tensor]:
    """Codes, chosen ones and any others, and their rows of the codebook's gradient in float64."""
    z, codebook, grad = (x.double() for x in inputs(case))
    blocks = [slice(i, i + max(1, 2**25 // case.k)) for i in range(0, case.n, 2**25 // case.k)]
    indices = torch.cat([(z[block] @ codebook.T).argmax(1) for block in blocks])
    others = torch.randperm(case.k, generator=torch.Generator().manual_seed(1))
    codes = torch.cat([indices[: CHECKED // 2], others[: CHECKED // 2].to(z.device)])
    mean = sum((z[block] @ codebook.T / TEMPERATURE).softmax(1).sum(0) for block in blocks) / case.n
    slope = -((mean + 1e-5).log() + mean / (mean + 1e-5))  # [K]
    gradient = torch.zeros(len(codes), case.d, dtype=torch.float64, device=z.device)
    for block in blocks:
        logits = z[block] @ codebook.T
        soft, sharp = logits.softmax(1), (logits / TEMPERATURE).softmax(1)
        log_sharp = (logits / TEMPERATURE).log_softmax(1)
        entropy = -(sharp * log_sharp).sum(1, keepdim=True)
        score = grad[block] @ codebook[codes].T  # [n, CHECKED]
        straight = soft[:, codes] * (score - (grad[block] * (soft @ codebook)).sum(1, keepdim=True))
        # The loss is the entropy of the rows less that of their mean.
        pull = log_sharp[:, codes] + entropy + slope[codes] - (sharp @ slope)[:, None]
        of_logits = straight - sharp[:, codes] * pull / (TEMPERATURE * case.n)
        gradient += of_logits.T @ z[block]
        gradient += (indices[block, None] == codes).double().T @ grad[block]
    return codes, gradient


def check(case: Case, output: Tensor) -> tuple[int, int]:
    """Rows of the codebook's gradient that are too far from float64, and rows looked at."""
    return wrong_rows(case, output, *truth(case))


def wrong_rows(case: Case, output: Tensor, codes: Tensor, expected: Tensor) -> tuple[int, int]:
    error = (output[codes].double() - expected).norm(dim=1)
    size = expected.norm(dim=1)
    allowed = TOLERANCE[case.dtype] * (size + 0.01 * size.square().mean().sqrt())
    return int((~(error <= allowed)).sum()), len(codes)


def figures(case: Case, output: Tensor) -> dict[str, float]:
    """The relative Frobenius error of the rows that `check` looks at."""
    codes, expected = truth(case)
    return {"relative_error": relative_error(output[codes], expected)}


def official(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SEED-Voken's quantizer, in the inputs' dtype: a dozen matrices [N, K]."""
    logits = z @ codebook.T
    soft = logits.softmax(1)
    hard = F.one_hot(soft.argmax(1), codebook.shape[0]).to(z.dtype)
    quantized = (hard - soft.detach() + soft) @ codebook
    sharp = (logits / TEMPERATURE).softmax(1)
    log_sharp = (logits / TEMPERATURE + 1e-5).log_softmax(1)
    mean = sharp.mean(0)
    return quantized, -(sharp * log_sharp).sum(1).mean(), -(mean * (mean + 1e-5).log()).sum()


def ours(backend: str) -> Quantize:
    def quantize(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, _, sample_entropy, batch_entropy = index_propagation(
            z, codebook, temperature=TEMPERATURE, backend=backend
        )
        return quantized, sample_entropy, batch_entropy

    return quantize


def prepare(make: Callable[[], Quantize]) -> Callable[[Case, Tensor, Tensor, Tensor], Call]:
    """The call is a training step: forward, backward, and the codebook's gradient as its result."""

    def prepare(case: Case, z: Tensor, codebook: Tensor, grad: Tensor) -> Call:
        quantize = make()
        z, codebook = z.detach().requires_grad_(), codebook.detach().requires_grad_()

        @torch.enable_grad()
        def call() -> Tensor:
            quantized, sample_entropy, batch_entropy = quantize(z, codebook)
            loss = (quantized * grad).sum() + sample_entropy - batch_entropy
            _, grad_codebook = torch.autograd.grad(loss, [z, codebook])
            return grad_codebook

        return call

    return prepare


def prepare_ours(backend: str) -> Callable[[Case, Tensor, Tensor, Tensor], Call]:
    return prepare(partial(ours, backend))


@lru_cache(maxsize=1)
def targets(case: Case) -> Tensor:
    """A code for each row, as the classes of a linear cross-entropy."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(case.k, (case.n,), generator=generator).to(case.device)


@lru_cache(maxsize=1)
def cross_entropy_truth(case: Case) -> tuple[Tensor, Tensor]:
    """Codes, half of them targets, and their rows of the cross-entropy's gradient in float64."""
    z, codebook = (x.double() for x in inputs(case)[:2])
    target = targets(case)
    others = torch.randperm(case.k, generator=torch.Generator().manual_seed(1))
    codes = torch.cat([target[: CHECKED // 2], others[: CHECKED // 2].to(z.device)])
    gradient = torch.zeros(len(codes), case.d, dtype=torch.float64, device=z.device)
    size = max(1, 2**25 // case.k)
    for rows, wanted in zip(z.split(size), target.split(size), strict=True):
        share = (rows @ codebook.T).softmax(1)[:, codes] - (wanted[:, None] == codes).double()
        gradient += share.T @ rows / case.n
    return codes, gradient


def check_cross_entropy(case: Case, output: Tensor) -> tuple[int, int]:
    return wrong_rows(case, output, *cross_entropy_truth(case))


def prepare_cut_cross_entropy(case: Case, z: Tensor, codebook: Tensor, grad: Tensor) -> Call:
    """On a GPU its kernels, which here may skip no gradient, on a CPU its compiled PyTorch."""
    from cut_cross_entropy import linear_cross_entropy

    torch.compiler.reset()
    gpu, compiled = {"impl": "cce", "filter_eps": None}, {"impl": "torch_compile"}
    loss = partial(linear_cross_entropy, **(gpu if case.device == "cuda" else compiled))
    return cross_entropy_step(case, z, codebook, loss)


def prepare_liger(case: Case, z: Tensor, codebook: Tensor, grad: Tensor) -> Call:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return cross_entropy_step(case, z, codebook, lambda z, codes, target: loss(codes, z, target))


def cross_entropy_step(
    case: Case, z: Tensor, codebook: Tensor, loss: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Call:
    z, codebook = z.detach().requires_grad_(), codebook.detach().requires_grad_()
    target = targets(case)

    @torch.enable_grad()
    def call() -> Tensor:
        return torch.autograd.grad(loss(z, codebook, target), [z, codebook])[1]

    return call


CROSS_ENTROPY = Relative(
    name="linear cross-entropy",
    work=lambda case: (6 * case.n * case.k * case.d, work(case)[1]),  # three products
    check=check_cross_entropy,
)


def too_slow_on_cpu(case: Case) -> str | None:
    """Minutes, for the slow ways of ours."""
    work = case.n * case.k * case.d
    if case.device == "cpu" and work > 2**36:
        return f"{work:.1e} multiply-adds, over {2**36:.1e}"
    return None


def slow(case: Case, provider: Provider) -> bool:
    """The largest codebook, slower instruction sets, and what the goals and charts leave out."""
    half, rows = case.dtype == torch.bfloat16, (case.n, case.k, case.d) in OVER_ROWS
    if provider.name == "reference":
        return True
    if case.device == "cuda":
        extra = provider.name in ("titok_fast-streaming", "compiled") and (rows or not half)
        return (not half and case.k != 262144) or extra
    return (
        (case.k == 1048576 and provider.name != "titok_fast-cpu")
        or (half and case.k != 65536)
        or "[" in provider.name
        or (provider.name in ("titok_fast-streaming", "compiled") and (half or rows))
        or (provider.relative is not None and (half or case.k != 65536))
    )


BENCH = Bench(
    op="index_propagation",
    cases=cases,
    providers=(
        *own_providers(
            prepare_ours,
            gpu="triton",
            bf16=True,
            too_much={"cpu[isa]": too_slow_on_cpu, "reference": too_much_for_reference(16)},
        ),
        Provider(
            "titok_fast-streaming",
            prepare_ours("streaming"),
            ours=True,
            too_much=too_slow_on_cpu,
        ),
        Provider("official", prepare(lambda: official), too_much=matrices(12)),
        Provider("compiled", prepare(lambda: compiled(official)), too_much=matrices(12)),
        Provider(
            "cut-cross-entropy",
            prepare_cut_cross_entropy,
            missing=lambda: harness.not_installed("cut-cross-entropy"),
            # It has no kernel for a CPU and makes the matrix there.
            too_much=lambda case: matrices(4)(case) if case.device == "cpu" else None,
            relative=CROSS_ENTROPY,
        ),
        Provider(
            "liger",
            prepare_liger,
            devices=("cuda",),
            missing=lambda: harness.not_installed("liger-kernel"),
            relative=CROSS_ENTROPY,
        ),
    ),
    inputs=inputs,
    work=work,
    check=check,
    slow=slow,
    figures=figures,
)


def test_index_propagation(measure: Callable[..., None], case: Case, provider: Provider) -> None:
    measure(BENCH, case, provider)
