"""Index back-propagation in float64 and plain autograd, materialising the N x K scores."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from titok_fast.reference.nearest_code import nearest_code

EPS = 1e-5


def mean_over_ranks(
    mean: Tensor, rows: int, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | float]:
    """From the `mean` [K] over the `rows` of each rank, that over the rows of all ranks of a group.

    Also returns what the gradient of this rank's mean is to be multiplied by, so that the mean of
    the ranks' gradients is that of all rows; 1 where each has as many.
    """
    if process_group is None:
        return mean, 1.0
    sums = torch.cat([mean * rows, mean.new_full((1,), rows)])
    dist.all_reduce(sums, group=process_group)
    total = sums[-1].clamp_min(1)
    return sums[:-1] / total, dist.get_world_size(process_group) * rows / total


def index_propagation(
    z: Tensor,
    codebook: Tensor,
    temperature: float,
    entropy: bool,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The official arithmetic for `z` [N, D] and `codebook` [K, D] of any floating dtype.

    Returns quantized [N, D] in the inputs' dtype, indices [N] int64, the mean entropy of the rows
    [], the entropy of their mean [] (both 0 without `entropy`) and the largest probability of each
    row [N]; the last three float32, or float64 for float64 inputs.
    """
    n, k = z.shape[0], codebook.shape[0]
    loss_dtype = torch.float64 if z.dtype is torch.float64 else torch.float32
    rows, codes = z.double(), codebook.double()
    logits = rows @ codes.T  # [N, K]
    indices, _ = nearest_code(z.detach(), codebook.detach(), "dot")
    soft = logits.softmax(1)
    hard = F.one_hot(indices, k).double()
    quantized = (hard - soft.detach() + soft) @ codes

    sample_entropy = batch_entropy = rows.new_zeros(())
    if entropy:
        sharp, log_sharp = (logits / temperature).softmax(1), (logits / temperature).log_softmax(1)
        sample_entropy = -(sharp * log_sharp).sum() / max(n, 1)
        local = sharp.sum(0) / max(n, 1)  # [K]
        # The value of all ranks, the gradient of this one: DDP takes the mean of the gradients.
        mean, share = mean_over_ranks(local.detach(), n, process_group)
        probability = mean + share * (local - local.detach())
        batch_entropy = -(probability * (probability + EPS).log()).sum()
    return (
        quantized.to(z.dtype),
        indices,
        sample_entropy.to(loss_dtype),
        batch_entropy.to(loss_dtype),
        soft.detach().amax(1).to(loss_dtype),
    )
