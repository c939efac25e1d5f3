"""What several processes record, as one process would have recorded it.

Each process keeps the rows of its own batches. They come together only when rows are written, in
collectives that every process enters at the same optimizer step, so training itself is not
slowed. Whatever the first process does for all (reading the folder, writing) ends the same way
everywhere: it works, or the same error is raised in every process.

Parameters that are spread over processes (FSDP) are the subject of ``sharded.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Steps
from tda_lightning.runtime.processes import Processes
from tda_lightning.store.writer import TrajectoryWriter


class FirstProcessWriter:
    """Stands for a ``TrajectoryWriter``: every process calls its methods, the first one writes, and
    an error reaches all."""

    def __init__(self, writer: TrajectoryWriter, processes: Processes) -> None:
        self._writer, self._processes = writer, processes

    def __getattr__(self, name: str) -> Any:
        return partial(self._processes.by_first, getattr(self._writer, name))


def gathered(steps: Steps, processes: Processes, *, sharded: bool = False) -> Steps:
    """In the first process the rows of all, in the others their own ``steps``.

    Raises:
        UnsupportedTrainingError: in every process, when they did not take the same steps.
    """
    if processes.count == 1:
        return steps
    parts: list[Any] | None = [None] * processes.count if processes.is_first else None
    dist.gather_object(steps, parts, dst=0)
    processes.by_first(_require_same_steps, parts or [])
    return steps if parts is None else interleaved(parts, sharded=sharded)


def interleaved(parts: Sequence[Steps], *, sharded: bool = False) -> Steps:
    """The rows of the run whose processes recorded ``parts``, as one process would have them.

    The mean over W processes of gradients accumulated over k batches is accumulation over k W
    batches: a step's batches are batch 1 of every process in order of rank, then batch 2, and so
    on, each divided by ``accumulation`` x W. ``sharded``: gradient norms are those of each
    process's own pieces of the gradient.

    Raises:
        UnsupportedTrainingError: the processes did not take the same steps.
    """
    first = parts[0]
    _require_same_steps(parts)
    turns = [zip_longest(*(part.batches(row) for part in parts)) for row in range(len(first))]
    rows = [[batch for turn in row for batch in turn if batch is not None] for row in turns]
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
        batch_offsets=offsets([len(row) for row in rows]),
        example_offsets=offsets([len(batch) for batch in batches]),
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


def offsets(sizes: Sequence[int]) -> Tensor:
    """Where each of consecutive parts begins, and where the last one ends: int64 [parts + 1]."""
    return torch.cumsum(torch.tensor([0, *sizes], dtype=torch.int64), 0)
