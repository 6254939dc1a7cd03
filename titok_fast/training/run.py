"""Training runs: in steps of large batches, over several processes, stopped and taken up again."""

from __future__ import annotations

import copy
import gc
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from titok_fast._distributed import gathered, rank_and_size, together
from titok_fast._files import flush_to_disk, remove_temporaries, replacing
from titok_fast.models.checks import COUNT, DECAY, WHOLE, check_fields, one_of, or_none
from titok_fast.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, PretrainedModel
from titok_fast.training import records
from titok_fast.training.data import Ahead, key, rows_of_step
from titok_fast.training.evaluation import Evaluator, forget
from titok_fast.training.loop import Optimization, Progress, fit
from titok_fast.training.losses import Loss, total

STATE_FILE = "state.pt"
LOG_FILE = "log.jsonl"
MODELS_FOLDER = "models"


class Helper(nn.Module, ABC):
    """What learns beside the model; its state_dict belongs to the state of a run."""

    @abstractmethod
    def step(self) -> Mapping[str, float]:
        """Called after each step of the model; returns its losses by name, for the log."""


class Task(ABC):
    """What is trained, and on what.

    Attributes:
        model: in float32 and training mode, on its device.
        count: number of examples.
        helper: what learns beside the model; None if nothing does.
        undecayed: parts of the names of parameters that weight decay leaves alone, beside vectors.
    """

    model: PretrainedModel
    count: int
    helper: Helper | None = None
    undecayed: Sequence[str] = ()

    @abstractmethod
    def batch(self, rows: Tensor, generator: torch.Generator) -> Any:
        """Some examples, made ready on the CPU, perhaps in another thread and ahead of their use.

        Args:
            rows: [B] int64 in [0, count).
            generator: source of what is random, on the CPU.
        """

    @abstractmethod
    def loss(self, network: nn.Module, batch: Any, generator: torch.Generator) -> Loss:
        """The mean loss of a batch.

        Args:
            network: called in place of the model.
            batch: what `batch` made.
            generator: source of what is random, on the model's device; dropout goes by torch's own.

        Returns:
            A scalar, or by name scalars whose sum is minimised, of which the log shows each.
        """

    def evaluate(
        self, network: nn.Module, batch: Any, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """What is measured of a batch of held-out examples, without gradients: by default the loss.

        Args:
            network: called in place of the model, in evaluation mode.
            batch: what `batch` made.
            generator: as for `loss`, with a seed that is that batch's in every evaluation.

        Returns:
            By name scalars, means over the batch, of which the mean over all examples is given; or
            bool tensors, of which the share that is true of any batch is given.
        """
        return {"loss": total(self.loss(network, batch, generator))}

    def samples(self, network: nn.Module) -> Sequence[Iterable[Tensor]]:
        """Rows of pictures [3, H, W] in [0, 1] to look at after an evaluation: by default none.

        Args:
            network: called in place of the model, in evaluation mode, by one process alone.
        """
        return ()


@dataclass(frozen=True)
class Options:
    """How a run goes through its examples.

    Attributes:
        batch_size: examples of a step, over all processes.
        micro_batch_size: how many a process takes at a time; None takes all that are its.
        average_decay: of the average of the weights, which is what a run gives; 0 gives the last.
            It is smaller in the first steps: (1 + n) / (10 + n) after n.
        dtype: torch.bfloat16 computes in it where autocast does; None in float32. Weights stay
            float32.
        seed: of the order of the examples and of all that is random.
        save_every: steps between two states on disk.
        keep_every: steps between two models that are kept, each in a folder of `models/`; None
            keeps none beside the last.
        evaluate_every: steps between two evaluations of held-out examples; None takes `save_every`.
        log_every: steps between two lines, 0 for none.

    Raises:
        ValueError: for a number out of range, or another dtype.
    """

    batch_size: int
    micro_batch_size: int | None = None
    average_decay: float = 0.999
    dtype: torch.dtype | None = None
    seed: int = 0
    save_every: int = 1000
    keep_every: int | None = None
    evaluate_every: int | None = None
    log_every: int = 50

    def __post_init__(self) -> None:
        check_fields(
            self, batch_size=COUNT, micro_batch_size=or_none(COUNT), average_decay=DECAY,
            dtype=one_of(None, torch.bfloat16), seed=WHOLE, save_every=COUNT,
            keep_every=or_none(COUNT), evaluate_every=or_none(COUNT), log_every=WHOLE,
        )  # fmt: skip

    def part_size(self, processes: int) -> int:
        """How many examples each of the processes takes at a time.

        Raises:
            ValueError: when a step's examples cannot be shared so.
        """
        share, rest = divmod(self.batch_size, processes)
        if rest:
            raise ValueError(
                f"batch_size: got {self.batch_size}, allowed is a multiple of {processes} processes"
            )
        size = min(share, self.micro_batch_size or share)
        if share % size:
            raise ValueError(
                f"micro_batch_size: got {size}, allowed is a divisor of the {share} examples that "
                "a process takes in a step"
            )
        return size


def run(
    task: Task,
    optimization: Optimization,
    options: Options,
    folder: str | os.PathLike[str] | None = None,
    *,
    held_out: Task | None = None,
    workers: int = 0,
    log: Callable[[str], None] = print,
) -> PretrainedModel:
    """Trains a model, or goes on where the run that left its state in the folder stopped.

    With the same options a run that was stopped and taken up gives the same bits as one that was
    not, where the device's arithmetic is the same from run to run; of more than two processes the
    sums of gradients may then have another order. Of the processes of a
    `torch.distributed` group each takes its share of every step; the first logs and saves.

    Args:
        task: model, data and loss.
        optimization: how its parameters move.
        options: of the run.
        folder: of the state and of the model as `save_pretrained` writes it, both anew with every
            state, and of `log.jsonl`, a line of JSON for each line of the log; of several
            processes, one that all see. None writes nothing.
        held_out: the same model and loss on examples that are not trained on, of which `evaluate`
            measures the average of the weights: a line of the log, and in the folder a line of
            `evaluations.jsonl` and a sheet of its `samples`, if it has any. The run has the same
            bits with it and without. None measures nothing.
        workers: threads that make batches ready ahead of their use; 0 for none.
        log: takes each line.

    Returns:
        The average of the weights, or the last ones, in evaluation mode, on the model's device.

    Raises:
        ValueError: for a batch that the processes cannot share, a state of another model, or a
            folder that not all processes see.
        FloatingPointError: when a loss or a gradient is not finite, or what is measured of held-out
            examples; the state stays as it was kept.
        OSError: when a held-out example cannot be read, or what is measured cannot be written; the
            state is that of the step.
    """
    folder = None if folder is None else Path(folder)
    rank, processes = rank_and_size()
    part_size = options.part_size(processes)
    count = options.batch_size // (processes * part_size)
    model, device = task.model, next(task.model.parameters()).device
    network: Any = model
    if processes > 1:
        network = DistributedDataParallel(
            model, device_ids=None if device.type == "cpu" else [device]
        )
        if task.helper is not None:  # as DDP does with the model
            for tensor in (*task.helper.parameters(), *task.helper.buffers()):
                dist.broadcast(tensor.detach(), 0)
    generator = torch.Generator(device)

    def batch(number: int) -> Any:
        """That of a part of a step, of all parts of all steps."""
        step, part = divmod(number, count)
        rows = rows_of_step(task.count, options.batch_size, step, options.seed)
        draws = torch.Generator().manual_seed(key(options.seed, "batch", step, rank, part))
        return task.batch(rows.view(processes, count, part_size)[rank, part], draws)

    def loss_at(step: int) -> Tensor:
        before: Tensor | float = 0.0
        for part in range(count):
            examples = batches[step * count + part]
            torch.manual_seed(key(options.seed, "dropout", step, rank, part))
            generator.manual_seed(key(options.seed, "draws", step, rank, part))
            last = part + 1 == count
            with nullcontext() if last or processes == 1 else network.no_sync():
                with torch.autocast(device.type, options.dtype, enabled=options.dtype is not None):
                    found = task.loss(network, examples, generator)
                    loss = total(found) / count
                teller.add(found, 1 / count)
                if not last:
                    loss.backward()
                    before = before + loss.detach()
        return loss + before

    state = None if folder is None else folder / STATE_FILE
    evaluator = None
    if held_out is not None:
        held_out.batch(torch.arange(1), torch.Generator())  # what cannot be read is told at once
        evaluator = Evaluator(held_out, options, optimization.steps, folder, workers, log)
    keeper = _Keeper(task, state, options, optimization.steps, evaluator, writes=rank == 0, log=log)
    teller = _Teller(folder, log)
    devices = [device] if device.type == "cuda" else []
    ahead = Ahead(batch, optimization.steps * count, workers)
    try:
        with ahead as batches, torch.random.fork_rng(devices=devices):
            fit(
                model.parameters(),
                loss_at,
                optimization,
                undecayed=[
                    parameter
                    for name, parameter in model.named_parameters()
                    if any(part in name for part in task.undecayed)
                ],
                keeper=keeper,
                log_every=options.log_every,
                log=lambda progress: teller(progress, keeper.beside),
            )
    finally:
        if processes > 1:
            del network
            gc.collect()  # at the interpreter's exit it can abort the process
    return keeper.average.eval()


class _Teller:
    """Tells how far a run is: a line of the log and of `log.jsonl`, of the means of all processes.

    Args:
        folder: of the file; None writes none.
        log: takes a line.
    """

    def __init__(self, folder: Path | None, log: Callable[[str], None]) -> None:
        self._folder, self._log = folder, log
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0

    def add(self, loss: Loss, weight: float) -> None:
        """Takes the loss of a part of a step."""
        self._weight += weight
        for name, value in {} if isinstance(loss, Tensor) else loss.items():
            value = weight * value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def __call__(self, progress: Progress, beside: Mapping[str, float]) -> None:
        """Tells the means since it was called last; all processes have to call it.

        Args:
            progress: of `fit`.
            beside: losses that are no part of the model's, by name.
        """
        mine = {name: value.item() / self._weight for name, value in self._sums.items()}
        self._sums, self._weight = {}, 0.0
        of_all = gathered((progress.loss, mine))
        progress = replace(progress, loss=_mean([loss for loss, _ in of_all]))
        names = dict.fromkeys(name for _, parts in of_all for name in parts)
        parts = {name: _mean([each.get(name, 0.0) for _, each in of_all]) for name in names}
        rank, _ = rank_and_size()
        with together():
            if rank == 0:
                shown = {**(parts if len(parts) > 1 else {}), **beside}
                texts = [f"  {name} {value:.5f}" for name, value in shown.items()]
                self._log(f"{progress}{''.join(texts)}")
                if self._folder is not None:
                    all_parts = {
                        f"loss/{name}": value for name, value in {**parts, **beside}.items()
                    }
                    records.append(self._folder / LOG_FILE, {**asdict(progress), **all_parts})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class _Keeper:
    """Averages the weights, and writes the state of a run every so many steps and at its end.

    Args:
        task: that is trained.
        path: of the state; None writes none.
        options: of the run.
        steps: of the whole run.
        evaluator: takes the average every so many steps and at the end; None for none.
        writes: whether this process is the one that writes.
        log: takes a line.

    Attributes:
        average: of the weights; the model itself where none is taken.
        beside: losses of the task's helper.
    """

    def __init__(
        self,
        task: Task,
        path: Path | None,
        options: Options,
        steps: int,
        evaluator: Evaluator | None,
        *,
        writes: bool,
        log: Callable[[str], None],
    ) -> None:
        self._task, self._path, self._options = task, path, options
        self._steps, self._writes, self._log = steps, writes, log
        self._evaluator = evaluator
        self.beside: Mapping[str, float] = {}
        self.average = task.model
        if options.average_decay:
            self.average = copy.deepcopy(task.model).requires_grad_(False)

    def start(self, optimizer: torch.optim.Optimizer) -> int:
        steps, measured = 0, False
        with together():
            if self._path is not None:
                steps = self._load(self._path, optimizer)
                if self._writes:
                    measured = forget(self._path.parent, steps)
                    records.forget(self._path.parent / LOG_FILE, steps)
        of_all = gathered((steps, measured))
        if len({each for each, _ in of_all}) > 1:
            raise ValueError(f"folder: {self._path} is not one that all processes see")
        _, measured = of_all[0]
        # An evaluation that failed, or a finished run that had no held-out examples.
        if self._evaluator is not None and steps and self._due(steps) and not measured:
            self._evaluator(self.average, steps)
        return steps

    def _due(self, steps: int) -> bool:
        """Whether an evaluation follows so many steps."""
        every = self._options.evaluate_every or self._options.save_every
        return steps % every == 0 or steps == self._steps

    def _load(self, path: Path, optimizer: torch.optim.Optimizer) -> int:
        """Brings all to where the file says; the steps done by then."""
        if self._writes:
            for name in (path.name, WEIGHTS_FILE, CONFIG_FILE):
                remove_temporaries(path.parent, name)
        if not path.exists():
            return 0
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self._task.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            if self._task.helper is not None:
                self._task.helper.load_state_dict(state["helper"])
            elif "helper" in state:
                raise ValueError("of one with a helper")
            optimizer.load_state_dict(state["optimizer"])
            steps = int(state["steps"])
        except Exception as error:  # a damaged file raises whatever it runs into
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path}: not the state of a run like this ({reason})") from None
        if self._writes:
            self._log(f"taken up after step {steps} of {self._steps}")
        return steps

    def moved(self, steps: int) -> None:
        if self._task.helper is not None:
            self.beside = self._task.helper.step()
        model, average = self._task.model, self.average
        if average is not model:
            decay = min(self._options.average_decay, (1 + steps) / (10 + steps))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(average.parameters()), list(model.parameters()), 1 - decay
                )
                for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
                    kept.copy_(buffer)

    def done(self, steps: int, optimizer: torch.optim.Optimizer) -> None:
        failure: Exception | None = None
        if self._evaluator is not None and self._due(steps):
            try:
                self._evaluator(self.average, steps)
            except FloatingPointError:  # of spoilt weights
                raise
            except Exception as error:
                failure = error
        keep, save = self._options.keep_every, self._options.save_every
        kept = keep is not None and steps % keep == 0
        saved = failure is not None or steps % save == 0 or steps == self._steps
        if kept or saved:
            with together():
                if self._path is not None and self._writes:
                    if kept:
                        folder = self._path.parent / MODELS_FOLDER / f"step-{steps:08d}"
                        remove_temporaries(folder, "*")
                        self.average.save_pretrained(folder)
                        for path in folder.iterdir():
                            flush_to_disk(path)
                    if saved:  # last: a run that goes on from an earlier one does all of this again
                        self._save(self._path, steps, optimizer)
        if failure:
            raise failure

    def _save(self, path: Path, steps: int, optimizer: torch.optim.Optimizer) -> None:
        state = {
            "steps": steps,
            "model": self._task.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        if self._task.helper is not None:
            state["helper"] = self._task.helper.state_dict()
        self.average.save_pretrained(path.parent)
        with replacing(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # of a full disk, without the file's name
                raise OSError(f"{path}: not written ({error})") from error
            flush_to_disk(temporary)
