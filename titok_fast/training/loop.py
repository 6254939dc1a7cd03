"""A small training loop: AdamW, warm-up and cosine, clipped gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Optimization:
    """How `fit` moves the parameters.

    Attributes:
        steps: number of optimizer steps.
        learning_rate: its peak, after the warm-up.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        final_fraction: part of the peak at which the cosine ends.
        betas: decay of AdamW's two averages.
        weight_decay: decay of the matrices; vectors, such as biases and norms, are not decayed.
        clip_norm: largest norm of the gradient of all parameters together.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 50
    final_fraction: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate of a step in [0, steps)."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * warmup * (cosine + self.final_fraction * (1 - cosine))


def fit(
    parameters: Iterable[nn.Parameter],
    loss_at: Callable[[int], Tensor],
    optimization: Optimization,
    *,
    log_every: int = 0,
    log: Callable[[str], None] = print,
) -> list[float]:
    """Minimises a loss. Draws no random numbers: with a seeded loss, runs agree bit for bit.

    Args:
        parameters: what to move; those without gradient are left alone.
        loss_at: the loss of a step in [0, steps), a scalar; called once for each, in order.
        optimization: how to move them.
        log_every: steps between two log lines, each with the mean loss since the last; 0 for none.
        log: takes each line.

    Returns:
        The loss of each step.

    Raises:
        FloatingPointError: when a loss is not finite.
    """
    moved = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in moved if p.ndim > 1], "weight_decay": optimization.weight_decay},
        {"params": [p for p in moved if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=optimization.betas, fused=True)
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(optimization.steps):
        for group in optimizer.param_groups:
            group["lr"] = optimization.rate(step)
        loss = loss_at(step)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"loss: got {losses[-1]} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(moved, optimization.clip_norm)
        optimizer.step()
        done = step + 1
        if log_every and (done % log_every == 0 or done == optimization.steps):
            recent = losses[(step // log_every) * log_every :]
            log(
                f"step {done:5d}/{optimization.steps}  loss {sum(recent) / len(recent):.5f}  "
                f"gradient {norm.item():.3f}  rate {optimization.rate(step):.1e}  "
                f"{time.perf_counter() - start:.0f} s"
            )
    return losses
