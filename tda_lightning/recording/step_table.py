"""The rows of the steps table: applied rates and settings, losses, gradient norms, batches.

Lightning's own count of steps moves on when a gradient scaler skips one, so the optimizer itself is
asked, through torch.optim's hooks. Clipping comes between Lightning's last hook and the optimizer's
arithmetic, which may write into the gradients (``foreach`` SGD with Nesterov momentum does): the
one moment at which clipped gradients can be measured is right before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.optimizers import read_hyperparameters, read_rates
from tda_lightning.recording.example_indices import ExampleIndices, Indices
from tda_lightning.recording.facts import clipping_kind
from tda_lightning.recording.observer import Observer
from tda_lightning.recording.resume import RecorderState
from tda_lightning.recording.rng_log import RngLog
from tda_lightning.recording.several_processes import gathered, offsets
from tda_lightning.recording.trained_parameters import TrainedParameters
from tda_lightning.records.trajectory import Facts, Steps
from tda_lightning.runtime.processes import Processes
from tda_lightning.runtime.random_states import States
from tda_lightning.store.step_arrays import widened
from tda_lightning.store.steps_file import join_steps
from tda_lightning.store.writer import TrajectoryWriter

_UNFETCHED = 512  # rows whose scalars are still on their device
ROWS_IN_MEMORY = 10_000
_JUMPS_IN_MEMORY = 1_000  # of 15 kB each
_NO_INDICES = np.zeros(0, dtype=np.int64)


class _Batch(NamedTuple):
    indices: Indices
    random: States | None  # before it was fetched, where they had jumped


@dataclass
class _Row:
    epoch: int
    rates: list[float]
    hyperparameters: dict[str, list[float]]
    losses: list[Any]  # 0-d tensors on any device, numbers once fetched
    norm: Any  # of the gradient as the backward pass left it
    applied_norm: Any  # as the optimizer takes it, after clipping and hooks
    batches: list[_Batch]
    accumulation: int


class StepTable(Observer):
    """The rows of one fit.

    Losses and norms stay on their device until some hundred have gathered: fetching each one
    would make an accelerator wait at every step.

    Attributes:
        num_steps: steps recorded, on disk or not.
        written: those on disk.
        skipped: steps that Lightning counted and the optimizer did not take.
        stepped: the optimizer has taken the step under way.
    """

    def __init__(self, indices: ExampleIndices, rng: RngLog, processes: Processes) -> None:
        self.num_steps, self.written, self.skipped, self.stepped = 0, 0, 0, False
        self._indices, self._rng, self._processes = indices, rng, processes
        self._trainer: Trainer
        self._trained: TrainedParameters
        self._hooks: list[Any] = []
        self._clips = self._measures_backward = False
        self._warned = False
        self._earlier: Steps | None = None  # rows from before a resume that are not on disk
        self._rows: list[_Row] = []
        self._fetched = 0  # rows whose losses and norms are numbers
        self._num_jumps = 0  # batches with random states
        # The step under way.
        self._batches: list[_Batch] = []  # those whose gradients are in the parameters
        self._losses: list[Tensor] = []
        self._loss: Tensor | None = None  # of the batch under way, times the gradient scaler's
        self._scale: Tensor | None = None
        self._backward_norm: Tensor | None = None  # of the gradient as the last batch left it
        self._row: _Row | None = None

    @property
    def full(self) -> bool:
        """Whether the rows in memory should be written before the next checkpoint."""
        in_memory = self.num_steps - self.written
        return in_memory >= ROWS_IN_MEMORY or self._num_jumps >= _JUMPS_IN_MEMORY

    @property
    def in_step(self) -> bool:
        """Whether the gradients of a batch are waiting for their step."""
        return bool(self._batches)

    @property
    def stepping(self) -> bool:
        """Whether the optimizer may have made a part of a step."""
        return self._row is not None

    def begin(self, trainer: Trainer, trained: TrainedParameters) -> None:
        self._trainer, self._trained = trainer, trained
        kind = clipping_kind(trainer, trained.module)
        # Hooks of others run after ours, and so after the backward pass ours sees no gradient that
        # they have changed. A gradient scaler's factor is still in it there.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._clips, self._measures_backward = kind != "none", kind == "hooks" and not scaled
        self._hooks = [
            trained.optimizer.register_step_pre_hook(self._before_step),
            trained.optimizer.register_step_post_hook(self._after_step),
        ]

    def _gradient_norm(self) -> Tensor:
        """Without a gradient scaler's factor, which fused optimizers take out themselves."""
        norm = self._trained.gradient_norm()
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        fused = getattr(self._trained.optimizer, "_step_supports_amp_scaling", False)
        if scaler is None or not fused:
            return norm
        return norm / scaler.scale(torch.ones_like(norm))  # get_scale() would wait for the device

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure")
        if not self._clips:
            return None
        if closure is None:
            self._measure_clipped()
            return None

        # Lightning computes and clips the gradients inside the closure.
        def measured() -> Any:
            result = closure()
            self._measure_clipped()
            return result

        return args, {**kwargs, "closure": measured}

    def _measure_clipped(self) -> None:
        if self._row is not None:
            self._row.applied_norm = self._gradient_norm()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        # A fused optimizer under a gradient scaler is called all the same and skips inside.
        skipped = getattr(optimizer, "found_inf", None)
        # Without any gradient, no torch optimizer moves anything.
        moves = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        self.stepped = moves and not (skipped is not None and bool(skipped))

    def resume(self, facts: Facts, state: RecorderState) -> None:
        self.written, self._earlier = state.rows_on_disk, state.rows
        self.num_steps = self.written + len(state.rows)
        self.skipped = state.global_step - self.num_steps

    def begin_backward(self, loss: Tensor) -> None:
        """The loss of a batch, times a gradient scaler's factor."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        self._loss = loss.detach()
        # A new tensor: the factor changes after the step.
        self._scale = None if scaler is None else scaler.scale(torch.ones_like(self._loss))

    def end_backward(self) -> None:
        indices = self._indices.batch
        self._batches.append(_Batch(_NO_INDICES if indices is None else indices, self._rng.jump))
        if self._measures_backward:
            self._backward_norm = self._gradient_norm()

    def begin_step(self, optimizer: Optimizer) -> None:
        """The gradients are complete. By the end of the batch a scheduler has moved the rates."""
        self._trained.require_unchanged(self.num_steps + 1)
        norm = self._gradient_norm() if self._backward_norm is None else self._backward_norm
        self._row = _Row(
            epoch=self._trainer.current_epoch,
            rates=read_rates(optimizer),
            hyperparameters=read_hyperparameters(optimizer),
            losses=self._losses,
            norm=norm,
            applied_norm=norm,
            batches=self._batches,
            accumulation=self._trainer.accumulate_grad_batches,
        )

    def end_batch(self, outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is None and self._loss is not None:
            loss = self._loss if self._scale is None else self._loss / self._scale
        if loss is not None:
            # Lightning divides the loss by the accumulation.
            self._losses.append(loss.detach() * self._trainer.accumulate_grad_batches)
        self._loss = None

    def end_step(self, taken: bool) -> None:
        if taken:
            assert self._row is not None
            self._rows.append(self._row)
            self.num_steps += 1
            self._num_jumps += sum(batch.random is not None for batch in self._batches)
            if len(self._rows) - self._fetched >= _UNFETCHED:
                self._fetch_scalars()
        else:
            self.skipped += 1
        self._row, self.stepped = None, False
        self.drop()

    def drop(self) -> None:
        self._batches, self._losses = [], []

    def _fetch_scalars(self) -> None:
        rows = self._rows[self._fetched :]
        scalars = [s for row in rows for s in (*row.losses, row.norm, row.applied_norm)]
        numbers = iter(_fetch(scalars))
        for row in rows:
            row.losses = [next(numbers) for _ in row.losses]
            row.norm, row.applied_norm = next(numbers), next(numbers)
        self._fetched = len(self._rows)

    def write(self, writer: TrajectoryWriter, step: int, last: bool) -> None:
        steps = self._table()
        infinite = (~steps.loss.isfinite()).nonzero()
        if len(infinite) and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"The training loss of step {self.written + int(infinite[0]) + 1} is "
                f"{steps.loss[infinite[0]].item()}; it is recorded as it is, and training goes on."
            )
        writer.append(steps)
        self.written = self.num_steps
        self._earlier, self._rows, self._fetched, self._num_jumps = None, [], 0, 0

    def state(self) -> dict[str, Any]:
        return {
            "global_step": self.num_steps + self.skipped,
            "rows_on_disk": self.written,
            "rows": self._table(),
            "accumulated": len(self._batches),
        }

    def _table(self) -> Steps:
        """The rows in memory; in the first process those of all."""
        self._fetch_scalars()
        rows = _table_of(self._rows)
        if self._earlier is not None and len(self._earlier):
            rows = join_steps([self._earlier, rows]) if len(rows) else self._earlier
        return gathered(rows, self._processes, sharded=self._trained.shards is not None)

    def detach(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def _table_of(rows: Sequence[_Row]) -> Steps:
    """Rows as a table whose offsets count from 0."""
    batches = [batch for row in rows for batch in row.batches]
    return Steps(
        epoch=torch.tensor([row.epoch for row in rows], dtype=torch.int64),
        learning_rate=_by_group([row.rates for row in rows], fill=0.0),
        hyperparameters={
            name: _by_group([row.hyperparameters[name] for row in rows])
            for name in (rows[0].hyperparameters if rows else ())
        },
        loss=_column([sum(row.losses) / (len(row.losses) or math.nan) for row in rows]),
        gradient_norm=_column([row.norm for row in rows]),
        batch_offsets=offsets([len(row.batches) for row in rows]),
        example_offsets=offsets([len(batch.indices) for batch in batches]),
        examples=torch.from_numpy(
            np.concatenate([_NO_INDICES, *(batch.indices for batch in batches)])
        ),
        accumulation=torch.tensor([row.accumulation for row in rows], dtype=torch.int64),
        clipping=_column([_ratio(row.applied_norm, row.norm) for row in rows]),
        random={b: batch.random for b, batch in enumerate(batches) if batch.random is not None},
    )


def _fetch(scalars: Sequence[Tensor]) -> list[float]:
    """Values of 0-d tensors, with one transfer for each device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for position, scalar in enumerate(scalars):
        kinds.setdefault((scalar.device, scalar.dtype), []).append(position)
    values = [math.nan] * len(scalars)
    for positions in kinds.values():
        fetched = torch.stack([scalars[p].reshape(()) for p in positions]).cpu().double()
        for position, value in zip(positions, fetched.tolist(), strict=True):
            values[position] = value
    return values


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _ratio(after: float, before: float) -> float:
    """1 where nothing was clipped: a gradient of nothing but zeros cannot be."""
    return 1.0 if after == before else after / before if before else math.nan


def _by_group(rows: Sequence[Sequence[float]], fill: float | None = None) -> Tensor:
    """Rows of groups; groups may have been added from one row to the next."""
    parts = [np.array(list(part), dtype=np.float64) for _, part in groupby(rows, len)]
    return torch.from_numpy(widened(parts, fill) if parts else np.zeros((0, 0)))
