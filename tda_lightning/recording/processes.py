"""Recording in several processes: the first one writes, what all of them did is written.

Each process keeps the rows of its own batches. They come together only when rows go to disk, in
collectives that every process enters at the same optimizer step, so training itself is not
slowed. Whatever the first process does for all (looking at the folder, writing) ends in one of two
ways everywhere: it worked, or the same error is raised in every process.

Parameters that are spread over processes (FSDP) are the subject of ``sharded.py``.
"""

from __future__ import annotations

import pickle
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    XLAStrategy,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch import distributed as dist

from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Steps, Trajectory
from tda_lightning.store.kept_folder import KeptFolder
from tda_lightning.store.writer import TrajectoryWriter

T = TypeVar("T")


def require_recordable(trainer: Trainer) -> None:
    """Check that the strategy trains as one process with more accumulation would.

    Raises:
        UnsupportedTrainingError: it does not, or its processes cannot be asked.
    """
    strategy = trainer.strategy
    name, reason = type(strategy).__name__, None
    if isinstance(strategy, (DeepSpeedStrategy, XLAStrategy)):
        reason = "it keeps gradients and optimizer where a callback cannot read them"
    elif isinstance(strategy, ModelParallelStrategy):
        if strategy.device_mesh["tensor_parallel"].size() > 1:
            reason = "with tensor_parallel_size > 1 several processes share one batch"
    elif isinstance(strategy, DDPStrategy) and strategy._model_averaging_period is not None:
        reason = "with model_averaging_period its processes take steps of their own"
    elif trainer.world_size > 1 and not _running():
        reason = f"its {trainer.world_size} processes are not those of torch.distributed"
    if reason is not None:
        raise UnsupportedTrainingError(
            f"TrajectoryRecorder cannot record {name}: {reason}. Use Trainer(strategy='ddp'), "
            "strategy='fsdp' or one device."
        )


def require_scorable(trainer: Trainer) -> None:
    """Check that every process of ``trainer`` will hold the whole model, and that what the
    processes compute comes back.

    Raises:
        ValueError: not so.
    """
    strategy, reason = trainer.strategy, None
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        reason = "spreads the model over processes, expected the whole model in each of them"
    elif isinstance(strategy.launcher, _MultiProcessingLauncher):
        reason = "ends its processes with each pass, and what they computed with them"
    if reason is not None:
        raise ValueError(
            f"{type(strategy).__name__} {reason}: its scores would be wrong. Give attribute() a "
            "Trainer(strategy='ddp') in a script, or one with devices=1. The trajectory may have "
            "been recorded with any strategy."
        )


def written_by_first(trajectory: Trajectory) -> Trajectory:
    """``trajectory``, to whose folder only the first process adds curvature and features: the
    others keep what they have found to themselves."""
    curvature, features = trajectory.curvature, trajectory.features
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    if rank == 0 or not isinstance(curvature, KeptFolder):
        return trajectory
    return replace(trajectory, curvature=ChainMap({}, curvature), features=ChainMap({}, features))


def require_same_plan(passes: Sequence[tuple[str, int]]) -> None:
    """Check that every process is about to make the same passes: they add up what they find.

    Raises:
        RuntimeError: in every process, when one plans others.
    """
    if not _running():
        return
    plans = from_all(list(passes))
    for rank, plan in enumerate(plans):
        if plan != plans[0]:
            raise RuntimeError(
                f"Process {rank} plans {len(plan)} passes over the training set, process 0 "
                f"{len(plans[0])}; expected the same. Give every process the same arguments, "
                "weights and data, and the same trajectory folder with its curvature."
            )


@dataclass(frozen=True)
class Processes:
    """The processes that train together: how many, and which one this is."""

    count: int = 1
    rank: int = 0

    @staticmethod
    def of(trainer: Trainer) -> Processes:
        return Processes(trainer.world_size, trainer.global_rank)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def by_first(self, action: Callable[[], T]) -> T:
        """``action`` in the first process; its result, or its error, in every one.

        Every process must come here. Before the processes can talk the others get None.
        """
        if self.count == 1:
            return action()
        if not _running():
            return action() if self.is_first else cast(T, None)
        outcome: list[Any] = [None, None]
        caught: Exception | None = None
        if self.is_first:
            try:
                outcome[0] = action()
            except Exception as error:
                caught, outcome[1] = error, _portable(error)
        dist.broadcast_object_list(outcome, src=0)
        if caught is not None:
            raise caught
        if outcome[1] is not None:
            raise outcome[1]
        return cast(T, outcome[0])

    def writer(self, writer: TrajectoryWriter) -> TrajectoryWriter:
        """``writer`` for use in every process, of which only the first touches the folder."""
        if self.count == 1:
            return writer
        return cast(TrajectoryWriter, _SharedWriter(writer, self))

    def gathered(self, steps: Steps, *, sharded: bool = False) -> Steps:
        """In the first process the rows of all, in the others their own.

        Args:
            steps: rows of this process.
            sharded: gradient norms are those of this process's own pieces of the gradient.
        """
        if self.count == 1:
            return steps
        parts: list[Any] | None = [None] * self.count if self.is_first else None
        dist.gather_object(steps, parts, dst=0)
        joined = steps

        def join() -> None:
            nonlocal joined
            assert parts is not None
            joined = interleaved(parts, sharded=sharded)

        self.by_first(join)
        return joined


class _SharedWriter:
    """A writer whose every method is called in all processes and works in the first one."""

    def __init__(self, writer: TrajectoryWriter, processes: Processes) -> None:
        self._writer, self._processes = writer, processes
        self.num_steps = writer.num_steps  # looked at after every batch, so known everywhere

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._writer, name)

        def shared(*args: Any, **options: Any) -> Any:
            def act() -> tuple[Any, int]:
                return method(*args, **options), self._writer.num_steps

            result, self.num_steps = self._processes.by_first(act)
            return result

        return shared


def interleaved(parts: Sequence[Steps], *, sharded: bool = False) -> Steps:
    """The rows of the run whose processes recorded ``parts``, as one process would have them.

    The mean over W processes of gradients accumulated over k batches is accumulation over k W
    batches: a step's batches are batch 1 of every process in order of rank, then batch 2, and so
    on, each divided by ``accumulation`` x W.

    Raises:
        UnsupportedTrainingError: the processes did not take the same steps.
    """
    first = parts[0]
    _require_same_steps(parts)
    per_row = [
        [batch for turn in zip_longest(*(part.batches(row) for part in parts)) for batch in turn]
        for row in range(len(first))
    ]
    rows = [[batch for batch in row if batch is not None] for row in per_row]
    batches = [batch for row in rows for batch in row]
    norm, clipping = first.gradient_norm, first.clipping
    if sharded:
        shares = torch.stack([part.gradient_norm for part in parts])
        clipped = torch.stack([part.gradient_norm * part.clipping for part in parts])
        norm = shares.square().sum(0).sqrt()
        ratio = clipped.square().sum(0).sqrt() / norm
        clipping = torch.where(norm > 0, ratio, 1.0)
    return replace(
        first,
        loss=_mean_loss(parts),
        gradient_norm=norm,
        clipping=clipping,
        batch_offsets=_offsets([len(row) for row in rows]),
        example_offsets=_offsets([len(batch) for batch in batches]),
        examples=torch.cat([first.examples[:0], *batches]),
        accumulation=first.accumulation * len(parts),
    )


def _require_same_steps(parts: Sequence[Steps]) -> None:
    first = parts[0]
    for rank, part in enumerate(parts):
        if len(part) != len(first):
            raise UnsupportedTrainingError(
                f"Process {rank} took {len(part)} optimizer steps, process 0 {len(first)}; "
                "expected the same steps in all of them. Give every process as many batches."
            )
        if not torch.equal(part.learning_rate, first.learning_rate):
            row = int((part.learning_rate != first.learning_rate).any(1).nonzero()[0])
            raise UnsupportedTrainingError(
                f"Process {rank} applied the learning rates {part.learning_rate[row].tolist()} "
                f"where process 0 applied {first.learning_rate[row].tolist()}: their models drift "
                "apart. Log what the scheduler monitors with sync_dist=True."
            )
        if bool(len(part.examples)) != bool(len(first.examples)):
            raise UnsupportedTrainingError(
                f"Process {rank} and process 0 do not both have example indices; expected one "
                "kind of training loader in all of them."
            )


def _mean_loss(parts: Sequence[Steps]) -> Tensor:
    """Mean over the batches of all processes, float64 [steps]."""
    losses = torch.stack([part.loss for part in parts])
    counts = torch.stack([part.batch_offsets.diff() for part in parts])
    # A process without a batch in this step has no loss, which is recorded as NaN.
    totals = torch.where(counts > 0, losses * counts, 0.0).sum(0)
    return totals / counts.sum(0)


def summed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the processes, in every process; the tensors themselves in a single one.

    Every process must come here, with the same names and shapes.

    Raises:
        ValueError: in every process, when names, shapes or types differ.
    """
    if not _running() or dist.get_world_size() == 1:
        return dict(tensors)
    kinds = from_all(sorted((name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()))
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            odd = sorted({entry[0] for entry in set(kind) ^ set(kinds[0])})
            raise ValueError(
                f"Processes 0 and {rank} hold tensors of other names, shapes or types: "
                f"{', '.join(odd)}. Expected the same in every process to sum them."
            )
    totals = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        total = tensor.detach().to(meeting_device(), copy=True).contiguous()
        dist.all_reduce(total)
        totals[name] = total.to(tensor.device)
    return {name: totals[name] for name in tensors}


def meeting_device() -> torch.device:
    """Where the default process group exchanges tensors."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def from_all(value: T) -> list[T]:
    """What every process has for ``value``, by rank."""
    if not _running():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def _portable(error: Exception) -> Exception:
    """The error as other processes can raise it."""
    try:
        return cast(Exception, pickle.loads(pickle.dumps(error)))
    except Exception:
        return RuntimeError(f"{type(error).__name__} in process 0: {error}")


def _offsets(sizes: Sequence[int]) -> Tensor:
    return torch.cumsum(torch.tensor([0, *sizes], dtype=torch.int64), 0)
