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


@dataclass(frozen=True)
class Progress:
    """How far `fit` is; as text a line of the log.

    Attributes:
        step: steps done.
        steps: of the whole run.
        loss: the mean since the last, or since this call began.
        gradient: norm of the last step's, before it was clipped.
        learning_rate: of the last step.
        seconds: since this call began.
    """

    step: int
    steps: int
    loss: float
    gradient: float
    learning_rate: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"step {self.step:5d}/{self.steps}  loss {self.loss:.5f}  "
            f"gradient {self.gradient:.3f}  rate {self.learning_rate:.1e}  {self.seconds:.0f} s"
        )


class Keeper(Protocol):
    """What keeps a run, so that another can take it up."""

    def start(self, optimizer: torch.optim.Optimizer) -> int:
        """Brings parameters and optimizer to where the run stopped; the steps done by then."""

    def moved(self, steps: int) -> None:
        """Called after each step, before its line of the log, with the number of steps done."""

    def done(self, steps: int, optimizer: torch.optim.Optimizer) -> None:
        """Called after that."""


def fit(
    parameters: Iterable[nn.Parameter],
    loss_at: Callable[[int], Tensor],
    optimization: Optimization,
    *,
    undecayed: Iterable[nn.Parameter] = (),
    keeper: Keeper | None = None,
    log_every: int = 0,
    log: Callable[[Progress], object] = print,
) -> list[float]:
    """Minimises a loss. Draws no random numbers: with a seeded loss, runs agree bit for bit.

    Args:
        parameters: what to move; those without gradient are left alone.
        loss_at: the loss of a step in [0, steps), a scalar; called once for each, in order. It may
            add gradients of its own, of which the loss it returns is then free.
        optimization: how to move them.
        undecayed: those that weight decay leaves alone, beside the vectors.
        keeper: None keeps nothing.
        log_every: steps between two calls of `log`, beside that after the last; 0 for none.
        log: takes how far it is.

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
            keeper.moved(done)
        if log_every and (done % log_every == 0 or done == optimization.steps):
            recent = losses[max(0, (step // log_every) * log_every - first) :]
            seconds = time.perf_counter() - start
            loss_mean, rate = sum(recent) / len(recent), optimization.rate(step)
            log(Progress(done, optimization.steps, loss_mean, norm, rate, seconds))
        if keeper is not None:
            keeper.done(done, optimizer)
    optimizer.zero_grad()
    return losses
