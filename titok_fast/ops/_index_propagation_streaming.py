"""Index back-propagation in PyTorch on any device, a chunk of codes at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = {"cpu": 2**17}  # entries of a chunk's N x K scores; elsewhere 2^22 keep a GPU busy
_FLOOR = -60.0  # of exponents: no product with exp(x) becomes a denormal, which is slow


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def add_rows(target: Tensor, indices: Tensor, values: Tensor) -> None:
    """target[indices[n]] += values[n], in an order that never changes, also on a GPU.

    All rows of one index are first summed into the first of them, 16 bits in float32; the zeros
    that are left in the others may then arrive in any order.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    n = indices.shape[0]
    first = torch.full((target.shape[0],), n, dtype=torch.int64, device=indices.device)
    first.scatter_reduce_(0, indices, torch.arange(n, device=indices.device), "amin")
    sums = torch.ops.aten.embedding_dense_backward(values, first[indices], n, -1, False)
    target.index_add_(0, indices, sums.to(target.dtype))


def _logits(z: Tensor, codebook: Tensor, top: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each chunk its first code, its codes [C, D] and z.e - top [N, C], both float32.

    The difference is taken in the wide dtype: the sharp softmax multiplies its error by 1 / T.
    """
    rows = z.to(top.dtype)
    size = max(64, _CHUNK.get(z.device.type, 2**22) // max(1, z.shape[0]))
    for start in range(0, codebook.shape[0], size):
        codes = codebook[start : start + size]
        yield start, codes.float(), (rows @ codes.to(top.dtype).T).sub_(top).float()


def index_propagation_fwd(
    z: Tensor, codebook: Tensor, indices: Tensor, temperature: float, entropy: bool, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean code, statistics and code probability of the op `index_propagation_fwd`.

    Column 6 of the statistics is what the rounding of the maximum in column 0 lost, column 7 the
    mean of (s - maximum) / temperature under q.

    Args:
        z: [N, D].
        codebook: [K, D].
        indices: [N] int64, of the largest logit of each row, so that no maximum is searched.
        temperature: of the sharp softmax.
        entropy: whether to compute it.
        mean: whether to compute the mean code, which is otherwise empty.
    """
    n, k = z.shape[0], codebook.shape[0]
    wide = wide_dtype(z.device)
    top = (z.to(wide) * codebook[indices].to(wide)).sum(1, keepdim=True)  # [N, 1]
    total, sharp_total, energy = (torch.zeros_like(top) for _ in range(3))
    mean_code = torch.zeros(z.shape, dtype=torch.float32, device=z.device)[: n if mean else 0]
    for _, codes, logits in _logits(z, codebook, top):
        weights = logits.clamp_min(_FLOOR).exp_()  # [N, C]
        total += weights.sum(1, keepdim=True, dtype=wide)
        if mean:
            mean_code += weights @ codes
        if entropy:
            logits.div_(temperature).clamp_min_(_FLOOR)
            weights = logits.exp()
            sharp_total += weights.sum(1, keepdim=True, dtype=wide)
            energy += weights.mul_(logits).sum(1, keepdim=True, dtype=wide)

    zero = torch.zeros_like(top)
    code_probability = torch.zeros(k, dtype=wide, device=z.device)
    log_sharp, mean_energy = zero, zero
    if entropy:
        log_sharp, mean_energy = sharp_total.log(), energy / sharp_total
        for start, codes, logits in _logits(z, codebook, top):
            weights = logits.div_(temperature).sub_(log_sharp).clamp_min_(_FLOOR).exp_()
            code_probability[start : start + len(codes)] = weights.sum(0, dtype=wide) / max(1, n)
    rounded = top.float()
    columns = (
        rounded, total.log(), rounded, log_sharp, log_sharp - mean_energy, 1 / total,
        top - rounded, mean_energy,
    )  # fmt: skip
    statistics = torch.cat([column.float() for column in columns], 1)
    return mean_code / total[: len(mean_code)].float(), statistics, code_probability


def index_propagation_bwd(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    mean_code: Tensor,
    statistics: Tensor,
    sample_weight: Tensor,
    code_weight: Tensor,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """The op `index_propagation_bwd`.

    The gradient of a row's logits sums to zero, so the chosen code takes what the others leave:
    its own formula is a difference of nearly equal numbers where the softmax is nearly one-hot.
    """
    n = z.shape[0]
    rows, grad = z.float(), grad.float()
    top_high, log_total, _, log_sharp, _, _, top_low, mean_energy = statistics.split(1, dim=1)
    top = top_high.to(wide_dtype(z.device)) + top_low
    mean_score = (grad * mean_code).sum(1, keepdim=True)
    chosen_weight = code_weight[indices, None]  # [N, 1]
    mean_weight = torch.zeros_like(mean_score)  # beyond that of the chosen code
    if entropy:
        for start, codes, logits in _logits(z, codebook, top):
            sharp = logits.div_(temperature).sub_(log_sharp).clamp_min_(_FLOOR).exp_()
            weight = code_weight[start : start + len(codes)] - chosen_weight
            mean_weight += sharp.mul_(weight).sum(1, keepdim=True)

    grad_rows, grad_chosen = torch.zeros_like(rows), torch.zeros_like(mean_score)
    grad_codebook = codebook.new_empty(codebook.shape, dtype=torch.float32)
    for start, codes, logits in _logits(z, codebook, top):
        grad_logits = (grad @ codes.T).sub_(mean_score)
        grad_logits *= (logits - log_total).clamp_min_(_FLOOR).exp_()
        if entropy:
            energy = logits.div_(temperature)
            slope = (energy - mean_energy).mul_(-sample_weight)
            slope += (code_weight[start : start + len(codes)] - chosen_weight).sub_(mean_weight)
            sharp = energy.sub_(log_sharp).clamp_min_(_FLOOR).exp_()
            grad_logits += sharp.mul_(slope).div_(temperature * n)
        local = torch.arange(start, start + len(codes), device=z.device)
        grad_logits.masked_fill_(indices[:, None] == local, 0)
        grad_chosen -= grad_logits.sum(1, keepdim=True)
        grad_rows += grad_logits @ codes
        grad_codebook[start : start + len(codes)] = grad_logits.T @ rows
    grad_rows += grad_chosen * codebook[indices]
    add_rows(grad_codebook, indices, grad + grad_chosen * rows)
    return grad_rows.to(z.dtype), grad_codebook.to(codebook.dtype)
