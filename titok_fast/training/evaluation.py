"""What a run measures and shows of held-out examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from titok_fast._distributed import gathered, rank_and_size, together
from titok_fast._files import remove_temporaries
from titok_fast.images import grid, write_png
from titok_fast.models.pretrained import evaluating
from titok_fast.training import records
from titok_fast.training.data import Ahead, key

if TYPE_CHECKING:
    from titok_fast.training.run import Options, Task

EVALUATIONS_FILE = "evaluations.jsonl"
SAMPLES_FOLDER = "samples"
BATCH_SIZE = 32  # at most, and that of a step; not a process's, whose number changes nothing


class Evaluator:
    """Measures a model by held-out examples, of which each process takes its share of batches.

    Batches and what is random in them are the same each time, and the same for any number of
    processes.

    Args:
        task: of the held-out examples.
        options: of the run.
        steps: of the whole run.
        folder: of the file with a line for each evaluation, and of a folder of pictures; None
            writes none.
        workers: threads that make batches ready ahead of their use; 0 for none.
        log: takes a line for each evaluation.
    """

    def __init__(
        self,
        task: Task,
        options: Options,
        steps: int,
        folder: Path | None,
        workers: int,
        log: Callable[[str], None],
    ) -> None:
        self._task, self._options, self._steps = task, options, steps
        self._folder, self._workers, self._log = folder, workers, log

    def __call__(self, model: nn.Module, steps: int) -> None:
        """Measures a model after so many steps; all processes have to call it, and all raise."""
        rank, _ = rank_and_size()
        with evaluating(model), torch.no_grad():
            with together():
                sums = self._sums(model)
            measured = self._means(gathered(sums))
            for name, value in measured.items():
                if not math.isfinite(value):
                    raise FloatingPointError(f"held out: got a {name} of {value} at step {steps}")
            with together():
                if rank == 0:
                    self._tell(model, steps, measured)

    def _tell(self, model: nn.Module, steps: int, measured: Mapping[str, float]) -> None:
        """A line of the log, and in the folder a line and a sheet of samples."""
        texts = [f"{name} {value:.5g}" for name, value in measured.items()]
        self._log(f"step {steps:5d}/{self._steps}  held out: {', '.join(texts)}")
        if self._folder is None:
            return
        rows = self._task.samples(model)
        if rows:
            write_png(self._folder / SAMPLES_FOLDER / f"step-{steps:08d}.png", grid(rows))
        line = {"step": steps, "images": self._task.count, **measured}
        records.append(self._folder / EVALUATIONS_FILE, line)

    def _sums(self, model: nn.Module) -> dict[str, Tensor]:
        """What this process's batches add to each measure."""
        rank, processes = rank_and_size()
        device, dtype = next(model.parameters()).device, self._options.dtype
        size = min(BATCH_SIZE, self._options.batch_size)
        batches = torch.arange(self._task.count).split(size)
        mine = range(rank, len(batches), processes)
        generator = torch.Generator(device)

        def batch(number: int) -> Any:
            draws = torch.Generator().manual_seed(key("held out", "batch", mine[number]))
            return self._task.batch(batches[mine[number]], draws)

        sums: dict[str, Tensor] = {}
        with Ahead(batch, len(mine), self._workers) as ahead:
            for i, number in enumerate(mine):
                examples = ahead[i]
                torch.manual_seed(key("held out", "dropout", number))
                generator.manual_seed(key("held out", "draws", number))
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    measures = self._task.evaluate(model, examples, generator)
                _add(sums, measures, len(batches[number]))
        return sums

    def _means(self, of_all: list[dict[str, Tensor]]) -> dict[str, float]:
        totals: dict[str, Tensor] = {}
        for part in of_all:
            _add(totals, part)
        return {name: _result(total, self._task.count) for name, total in totals.items()}


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor], weight: int = 1) -> None:
    for name, value in values.items():
        flags = value.dtype is torch.bool
        value = value.cpu() if flags else weight * value.double().cpu()
        sums[name] = sums[name] + value if name in sums else value  # of flags the sum is "or"


def _result(total: Tensor, count: int) -> float:
    return float(total.double().mean()) if total.dtype is torch.bool else float(total) / count


def forget(folder: Path, steps: int) -> bool:
    """Removes the evaluations after so many steps, which a run that goes on from there repeats.

    Returns:
        Whether there is one at that step.
    """
    remove_temporaries(folder / SAMPLES_FOLDER, "*.png")
    return records.forget(folder / EVALUATIONS_FILE, steps)
