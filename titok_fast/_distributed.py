"""Which of how many processes this is, and what becomes of an error in one of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


def rank_and_size() -> tuple[int, int]:
    """The number of this process in its `torch.distributed` group, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gathered(value: Any) -> list[Any]:
    """What each process gives, by rank; all have to call it."""
    _, processes = rank_and_size()
    if processes == 1:
        return [value]
    values: list[Any] = [None] * processes
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """What all processes do; the error of the first that has one is raised in all of them."""
    error: Exception | None = None
    try:
        yield
    except Exception as own:
        error = own
    rank, _ = rank_and_size()
    # An error of any class need not survive pickling.
    kinds = (kind for kind in (FloatingPointError, OSError, ValueError) if isinstance(error, kind))
    kind: type[Exception] = next(kinds, RuntimeError)
    found = gathered(None if error is None else (kind, str(error)))
    for number, first in enumerate(found):
        if first is not None:
            raise error if number == rank and error is not None else first[0](first[1])
