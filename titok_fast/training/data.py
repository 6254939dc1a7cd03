"""What to train on: scikit-learn's handwritten digits, light augmentation, masked tokens."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_SPLIT_SEED = 0
_TEST_SIZE = 360


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Handwritten digits of scikit-learn's `load_digits`, 8x8 grey, enlarged to 32x32.

    The 1,797 images are permuted by a fixed seed; the first 360 are the test split.

    Args:
        split: "train" (1,437 images) or "test" (360).

    Returns:
        Images [N, 3, 32, 32] float32 in [0, 1] with equal channels, and labels [N] int64 in 0-9.

    Raises:
        ImportError: when scikit-learn is not installed.
        ValueError: for another split.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine
    Learning Repository, 1998, doi:10.24432/C50P49, CC BY 4.0.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: got {split!r}, allowed are 'train' and 'test'")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits data set needs scikit-learn: pip install 'titok_fast[demo]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)  # [1797, 64] in 0-16, [1797]
    # The legacy generator's stream is frozen, so the split is the same with every NumPy.
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(labels))
    chosen = order[:_TEST_SIZE] if split == "test" else order[_TEST_SIZE:]
    small = torch.from_numpy(pixels[chosen]).float().view(-1, 1, 8, 8) / 16
    images = F.interpolate(small, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    return images, torch.from_numpy(labels[chosen]).long()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotates, scales, shears and moves each image a little, at random; new borders are black.

    Args:
        images: [B, C, S, S], floating.
        generator: source of the draws, on the device of the images.

    Returns:
        [B, C, S, S], same dtype, within the range of the input and zero.
    """
    batch = len(images)
    draws = torch.rand(6, batch, generator=generator, device=images.device) * 2 - 1
    angle = draws[0] * math.radians(10)
    scale = 1 + 0.1 * draws[1:3]  # [2, B]
    shear, shift = 0.1 * draws[3], 0.06 * draws[4:]
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos * scale[0], shear - sin, shift[0]], dim=1),  # [B, 3]
        torch.stack([sin, cos * scale[1], shift[1]], dim=1),
    ]
    grid = F.affine_grid(
        torch.stack(rows, dim=1).to(images.dtype), list(images.shape), align_corners=False
    )
    return F.grid_sample(images, grid, align_corners=False)


def mask_tokens(tokens: Tensor, mask_id: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks a random number of each image's tokens, by MaskGIT's arccos schedule.

    Args:
        tokens: [B, L] int64.
        mask_id: what takes the place of a masked token.
        generator: source of the draws, on the device of the tokens.

    Returns:
        [B, L] int64 with at least one token of each image masked, and [B, L] bool, where.
    """
    batch, length = tokens.shape
    progress = torch.rand(batch, 1, generator=generator, device=tokens.device)
    count = (length * progress.acos() / (math.pi / 2)).round().clamp(min=1)  # [B, 1]
    order = torch.rand(batch, length, generator=generator, device=tokens.device).argsort(dim=1)
    masked = order < count
    return torch.where(masked, mask_id, tokens), masked


def rows_of_step(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The examples of a step: all of them in a random order, then all in another, without end.

    It depends on nothing else, so that a run can be taken up at any step.

    Args:
        count: number of examples, positive.
        batch_size: examples of a step; may be more than there are.
        step: from 0.
        seed: of the orders.

    Returns:
        [batch_size] int64 in [0, count).
    """
    rows: list[Tensor] = []
    position, end = step * batch_size, (step + 1) * batch_size
    while position < end:
        epoch, first = divmod(position, count)
        taken = _order(count, seed, epoch)[first : first + end - position]
        rows.append(taken)
        position += len(taken)
    return torch.cat(rows)


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(key(seed, "epoch", epoch))
    return torch.randperm(count, generator=generator)


def key(*parts: int | str) -> int:
    """A seed in [0, 2**63) that differs for every other sequence of parts."""
    text = " ".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Ahead:
    """What a function gives for each number, in turn, computed ahead in threads.

    Args:
        function: of a number from 0.
        count: of the numbers.
        workers: number of threads; with 0 it computes when asked.
    """

    def __init__(self, function: Callable[[int], Any], count: int, workers: int) -> None:
        self._function, self._count, self._workers = function, count, workers
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._pending: dict[int, Future[Any]] = {}

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __getitem__(self, number: int) -> Any:
        if self._pool is None:
            return self._function(number)
        for later in range(number, min(self._count, number + 1 + 2 * self._workers)):
            if later not in self._pending:
                self._pending[later] = self._pool.submit(self._function, later)
        return self._pending.pop(number).result()


def shuffled(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of indices without end, each epoch in a new random order.

    Args:
        count: number of examples, at least batch_size.
        batch_size: indices of a batch; the rest of an epoch is dropped.
        generator: source of the order, on the CPU.

    Yields:
        [batch_size] int64.
    """
    if count < batch_size:
        raise ValueError(f"count: got {count}, allowed is at least batch_size {batch_size}")
    while True:
        yield from torch.randperm(count, generator=generator).split(batch_size)[
            : count // batch_size
        ]
