"""Gathers the rows of the steps table while training runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tda_lightning.recording.indices import Indices
from tda_lightning.records.trajectory import Steps
from tda_lightning.runtime.random_states import States
from tda_lightning.store.steps_file import join_steps, widened

_PENDING = 512  # rows whose device scalars are not yet fetched


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, left on the device: float32 or better, []."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    first = dense[0]
    if all((g.device, g.dtype) == (first.device, first.dtype) for g in dense) and not _wide(
        first.dtype
    ):
        # One call for all of them: forty small ones cost a small model a hundredth of its step.
        norms = list(torch._foreach_norm([g.detach() for g in dense]))
    else:
        norms = [torch.linalg.vector_norm(g.detach(), dtype=_wide(g.dtype)) for g in dense]
    device = norms[0].device
    return torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else None


class Batch(NamedTuple):
    """A batch whose gradients are in the parameters."""

    indices: Indices
    random: States | None = None  # before it was fetched, where they had jumped


@dataclass
class _Row:
    epoch: int
    rates: list[float]
    hyperparameters: dict[str, list[float]]
    losses: list[Any]  # 0-d tensors on any device, numbers once settled
    norm: Any
    applied_norm: Any
    batches: list[Batch]
    accumulation: int


class StepLog:
    """Rows since the last :meth:`clear`.

    Losses and norms stay on their device until some hundred have gathered: fetching each one
    would make an accelerator wait at every step.
    """

    def __init__(self, earlier: Steps | None = None) -> None:
        self._earlier = earlier  # rows from before a resume that are not on disk
        self._rows: list[_Row] = []
        self._settled = 0
        self.num_jumps = 0  # batches with random states

    def __len__(self) -> int:
        return len(self._rows) + (0 if self._earlier is None else len(self._earlier))

    def add(
        self,
        epoch: int,
        rates: list[float],
        hyperparameters: dict[str, list[float]],
        losses: list[Tensor],
        norm: Tensor,
        applied_norm: Tensor | None,
        batches: list[Batch],
        accumulation: int,
    ) -> None:
        """One optimizer step.

        Args:
            epoch: counted from 0.
            rates: applied learning rates.
            hyperparameters: as ``optimizers.read_hyperparameters`` gives them.
            losses: of each batch, as the user's training_step returned it.
            norm: of the gradient before clipping.
            applied_norm: after it; None where nothing clips.
            batches: those that its gradient was accumulated over.
            accumulation: what each batch loss was divided by.
        """
        after = norm if applied_norm is None else applied_norm
        row = _Row(epoch, rates, hyperparameters, list(losses), norm, after, batches, accumulation)
        self._rows.append(row)
        self.num_jumps += sum(batch.random is not None for batch in batches)
        if len(self._rows) - self._settled >= _PENDING:
            self._settle()

    def _settle(self) -> None:
        rows = self._rows[self._settled :]
        scalars = [s for row in rows for s in (*row.losses, row.norm, row.applied_norm)]
        numbers = iter(_fetch(scalars))
        for row in rows:
            row.losses = [next(numbers) for _ in row.losses]
            row.norm, row.applied_norm = next(numbers), next(numbers)
        self._settled = len(self._rows)

    def clear(self) -> None:
        """Forget the rows: they are on disk."""
        self._earlier, self._rows, self._settled, self.num_jumps = None, [], 0, 0

    def table(self) -> Steps:
        """The rows as a table whose offsets count from 0."""
        earlier = [] if self._earlier is None or not len(self._earlier) else [self._earlier]
        if earlier and not self._rows:
            return earlier[0]
        self._settle()
        return join_steps([*earlier, self._table_of_rows()]) if earlier else self._table_of_rows()

    def _table_of_rows(self) -> Steps:
        rows = self._rows
        batches = [batch for row in rows for batch in row.batches]
        return Steps(
            epoch=torch.tensor([row.epoch for row in rows], dtype=torch.int64),
            learning_rate=_table([row.rates for row in rows], fill=0.0),
            hyperparameters={
                name: _table([row.hyperparameters[name] for row in rows])
                for name in (rows[0].hyperparameters if rows else ())
            },
            loss=_column([_mean(row.losses) for row in rows]),
            gradient_norm=_column([row.norm for row in rows]),
            batch_offsets=_offsets([len(row.batches) for row in rows]),
            example_offsets=_offsets([len(batch.indices) for batch in batches]),
            examples=torch.from_numpy(
                np.concatenate([np.zeros(0, np.int64), *(batch.indices for batch in batches)])
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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _ratio(after: float, before: float) -> float:
    """1 where nothing was clipped: a gradient of nothing but zeros cannot be."""
    return 1.0 if after == before else after / before if before else math.nan


def _table(rows: Sequence[Sequence[float]], fill: float | None = None) -> Tensor:
    """Rows of groups; groups may have been added from one row to the next."""
    if not rows:
        return torch.zeros(0, 0, dtype=torch.float64)
    return widened([torch.tensor([row], dtype=torch.float64) for row in rows], fill)


def _offsets(sizes: Sequence[int]) -> Tensor:
    return torch.cumsum(torch.tensor([0, *sizes], dtype=torch.int64), 0)
