"""Two processes of one process group."""

import gc

import torch


def in_two_processes(work, folder, *arguments):
    """`work(rank, folder, *arguments)`, of a module's top level, in each; `folder` joins them."""
    torch.multiprocessing.spawn(_joined, args=(work, folder, *arguments), nprocs=2)


def _joined(rank, work, folder, *arguments):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    work(rank, folder, *arguments)
    gc.collect()  # at the interpreter's exit DDP can abort it
    torch.distributed.barrier()  # gloo aborts where a peer leaves early
    torch.distributed.destroy_process_group()
