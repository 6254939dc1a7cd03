"""Index back-propagation in float64 and plain autograd, materialising the N x K scores."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from titok_fast.reference.nearest_code import nearest_code

EPS = 1e-5


def mean_over_ranks(x: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """The mean of `x` over the ranks of a group; `x` itself, which is overwritten, with None."""
    if process_group is not None:
        dist.all_reduce(x, group=process_group)
        x /= dist.get_world_size(process_group)
    return x


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
        probability = local + (
            mean_over_ranks(local.detach().clone(), process_group) - local.detach()
        )
        batch_entropy = -(probability * (probability + EPS).log()).sum()
    return (
        quantized.to(z.dtype),
        indices,
        sample_entropy.to(loss_dtype),
        batch_entropy.to(loss_dtype),
        soft.detach().amax(1).to(loss_dtype),
    )
