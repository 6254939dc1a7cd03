"""Which of how many processes this is."""

import torch.distributed as dist


def rank_and_size() -> tuple[int, int]:
    """The number of this process in its `torch.distributed` group, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()
