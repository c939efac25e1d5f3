"""The steps table as NumPy arrays, as files hold it: checked, cut, joined, made tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from tda_lightning.records.trajectory import Steps

# Columns that are one number for each step or use of an example, and are joined as they are.
_PLAIN = ("epoch", "loss", "gradient_norm", "examples", "accumulation", "clipping")


@dataclass(frozen=True)
class StepArrays:
    """:class:`~tda_lightning.records.trajectory.Steps` of arrays in place of tensors.

    `tda inspect` needs no more, and torch takes seconds to import.
    """

    epoch: np.ndarray
    learning_rate: np.ndarray
    hyperparameters: Mapping[str, np.ndarray]
    loss: np.ndarray
    gradient_norm: np.ndarray
    batch_offsets: np.ndarray
    example_offsets: np.ndarray
    examples: np.ndarray
    accumulation: np.ndarray
    clipping: np.ndarray
    random: Mapping[int, Mapping[str, np.ndarray]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.epoch)

    def between(self, start: int, stop: int) -> StepArrays:
        """Rows ``start`` to ``stop`` as a table of their own, whose offsets count from 0."""
        # Slicing is the same for arrays, so the record's own method does it.
        return Steps.between(self, start, stop)  # type: ignore[arg-type,return-value]


def of_tensors(steps: Steps) -> StepArrays:
    """The same table as arrays, which share the tensors' memory."""
    columns = {name: np.asarray(getattr(steps, name)) for name in _columns()}
    hyperparameters = {name: np.asarray(values) for name, values in steps.hyperparameters.items()}
    random = {
        b: {n: np.asarray(s) for n, s in states.items()} for b, states in steps.random.items()
    }
    return StepArrays(hyperparameters=hyperparameters, random=random, **columns)


def as_tensors(steps: StepArrays) -> Steps:
    """The same table as the record that estimators read, which shares the arrays' memory."""
    import torch

    columns = {name: torch.from_numpy(getattr(steps, name)) for name in _columns()}
    hyperparameters = {n: torch.from_numpy(values) for n, values in steps.hyperparameters.items()}
    random = {
        batch: {name: torch.from_numpy(state) for name, state in states.items()}
        for batch, states in steps.random.items()
    }
    return Steps(hyperparameters=hyperparameters, random=random, **columns)


def _columns() -> list[str]:
    return [f.name for f in fields(StepArrays) if f.name not in ("hyperparameters", "random")]


def joined(blocks: Sequence[StepArrays]) -> StepArrays:
    """Consecutive tables as one; parameter groups that a later one added have rate 0 before."""

    def chained(column: str) -> np.ndarray:
        pieces, end = [np.zeros(1, dtype=np.int64)], 0
        for block in blocks:
            offsets = getattr(block, column)
            pieces.append(offsets[1:] + end)
            end += int(offsets[-1])
        return np.concatenate(pieces)

    random, before = {}, 0
    for block in blocks:
        random.update({before + batch: states for batch, states in block.random.items()})
        before += int(block.batch_offsets[-1])
    names = blocks[0].hyperparameters
    return StepArrays(
        learning_rate=widened([block.learning_rate for block in blocks], fill=0.0),
        hyperparameters={n: widened([b.hyperparameters[n] for b in blocks]) for n in names},
        batch_offsets=chained("batch_offsets"),
        example_offsets=chained("example_offsets"),
        random=random,
        **{column: np.concatenate([getattr(b, column) for b in blocks]) for column in _PLAIN},
    )


def widened(tables: Sequence[np.ndarray], fill: float | None = None) -> np.ndarray:
    """Stack tables [rows, groups], padded to the widest.

    Args:
        tables: from top to bottom.
        fill: value of the missing groups; None for the row's value of the first group, which is
            valid in every formula.
    """
    width = max(table.shape[1] for table in tables)
    filled = []
    for table in tables:
        column = table[:, :1] if fill is None else np.full_like(table[:, :1], fill)
        missing = np.broadcast_to(column, (len(table), width - table.shape[1]))
        filled.append(np.concatenate([table, missing], 1))
    return np.concatenate(filled)


def no_steps(groups: int) -> StepArrays:
    """A table without rows, for a run with so many parameter groups."""
    none, start = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
    nothing = np.zeros(0, dtype=np.float64)
    rates = np.zeros((0, groups), dtype=np.float64)
    return StepArrays(none, rates, {}, nothing, nothing, start, start, none, none, nothing)
