"""A small training loop: AdamW, warm-up and cosine, clipped gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from titok_fast.models.checks import (
    COUNT,
    DECAY,
    NUMBER,
    POSITIVE,
    SHARE,
    WHOLE,
    Kind,
    check_fields,
)

_BETAS = Kind(
    "two numbers from 0, below 1",
    lambda betas: isinstance(betas, Sequence) and [*map(DECAY.fits, betas)] == [True, True],
)
# Parts of names: of these 1d-tokenizer decays no parameter.
UNDECAYED = ("bias", "embed", "latent_tokens", "ln", "mask_token", "norm")


@dataclass(frozen=True)
class Optimization:
    """How `fit` moves the parameters.

    Attributes:
        steps: number of optimizer steps.
        learning_rate: of which a step takes the share that warm-up and cosine leave, both from the
            first step; all of it only where the warm-up is short.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        final_fraction: part of it at which the cosine ends.
        betas: decay of AdamW's two averages.
        weight_decay: decay of the matrices; vectors, such as biases and norms, are not decayed.
        clip_norm: largest norm of the gradient of all parameters together.

    Raises:
        ValueError: for a number out of range.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 50
    final_fraction: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        check_fields(
            self, steps=COUNT, learning_rate=POSITIVE, warmup_steps=WHOLE, final_fraction=SHARE,
            betas=_BETAS, weight_decay=NUMBER, clip_norm=POSITIVE,
        )  # fmt: skip

    def rate(self, step: int) -> float:
        """The learning rate of a step in [0, steps)."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * warmup * (cosine + self.final_fraction * (1 - cosine))


class Keeper(Protocol):
    """What keeps a run, so that another can take it up."""

    def start(self, optimizer: torch.optim.Optimizer) -> int:
        """Brings parameters and optimizer to where the run stopped; the steps done by then."""

    def done(self, steps: int, optimizer: torch.optim.Optimizer) -> None:
        """Called after each step with the number of steps done."""


def fit(
    parameters: Iterable[nn.Parameter],
    loss_at: Callable[[int], Tensor],
    optimization: Optimization,
    *,
    undecayed: Iterable[nn.Parameter] = (),
    keeper: Keeper | None = None,
    log_every: int = 0,
    log: Callable[[str], None] = print,
) -> list[float]:
    """Minimises a loss. Draws no random numbers: with a seeded loss, runs agree bit for bit.

    Args:
        parameters: what to move; those without gradient are left alone.
        loss_at: the loss of a step in [0, steps), a scalar; called once for each, in order. It may
            add gradients of its own, of which the loss it returns is then free.
        optimization: how to move them.
        undecayed: those that weight decay leaves alone, beside the vectors.
        keeper: None keeps nothing.
        log_every: steps between two log lines, each with the mean loss since the last; 0 for none.
        log: takes each line.

    Returns:
        The loss of each step, from the first that this call makes.

    Raises:
        FloatingPointError: when a loss or a gradient is not finite.
    """
    moved = [parameter for parameter in parameters if parameter.requires_grad]
    spared = {*undecayed, *(p for p in moved if p.ndim <= 1)}
    groups = [
        {
            "params": [p for p in moved if p not in spared],
            "weight_decay": optimization.weight_decay,
        },
        {"params": [p for p in moved if p in spared], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=optimization.betas, fused=True)
    losses: list[float] = []
    first = 0 if keeper is None else keeper.start(optimizer)
    start = time.perf_counter()
    for step in range(first, optimization.steps):
        for group in optimizer.param_groups:
            group["lr"] = optimization.rate(step)
        optimizer.zero_grad()
        loss = loss_at(step)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"loss: got {losses[-1]} at step {step}")
        loss.backward()
        norm = nn.utils.clip_grad_norm_(moved, optimization.clip_norm).item()
        if not math.isfinite(norm):  # nothing is moved by it, or kept
            raise FloatingPointError(f"gradient: got a norm of {norm} at step {step}")
        optimizer.step()
        done = step + 1
        if keeper is not None:
            keeper.done(done, optimizer)
        if log_every and (done % log_every == 0 or done == optimization.steps):
            recent = losses[max(0, (step // log_every) * log_every - first) :]
            log(
                f"step {done:5d}/{optimization.steps}  loss {sum(recent) / len(recent):.5f}  "
                f"gradient {norm:.3f}  rate {optimization.rate(step):.1e}  "
                f"{time.perf_counter() - start:.0f} s"
            )
    optimizer.zero_grad()
    return losses
