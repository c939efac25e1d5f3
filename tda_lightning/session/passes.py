"""Passes planned ahead, for estimators that do not read from top to bottom yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from tda_lightning.records.provenance import Provenance
from tda_lightning.session.session import Session, Stage, memory_budget

__all__ = ["NO_SELF", "Pass", "Plan", "Session", "Stage", "memory_budget", "numbered", "run_plan"]

NO_SELF = (
    "No self-influence over several stages: an example of an earlier stage has no measurement of "
    "its own on the final model. Attribute that stage's trajectory alone, or ask for examples as "
    "queries."
)


@dataclass
class Pass:
    """One walk over the training set.

    Attributes:
        title: a few words for the progress bar.
        step: the checkpoint whose weights the module holds.
        accumulate: called with every batch, its example indices, int64 [batch], and the batch's
            position in ``order``.
        begin: called before the first batch, the weights being in place.
        end: called after the last batch of every process.
        order: the batches as lists of example indices; None for every example once.
        catches_up: ``end`` only does what is left where another process had the last batches.
        stage: whose weights and training set these are, where a run has several stages.
        rows: steps of the run to visit in this order, in every process, instead of batches: for
            work that fetches its batches itself. ``accumulate`` is called with None, the row,
            int64 [1], and its position.
        returns: the rows are those of the pass before, the last one first, and need what it kept.
        holds: bytes of main memory that it and those before have filled for later passes, or its
            rows for those after them, when all are done.
    """

    title: str
    step: int
    accumulate: Callable[[Any, Tensor, int], None]
    begin: Callable[[], None] | None = None
    end: Callable[[], None] | None = None
    order: Sequence[Sequence[int]] | None = None
    catches_up: bool = False
    stage: int = 0
    rows: Sequence[int] | None = None
    returns: bool = False
    holds: int = 0


@dataclass
class Plan:
    """The passes of an attribution and what a reader should know of how it was made.

    Attributes:
        then: called once the passes have run, plans the rest: passes that depend on what was found.
    """

    passes: list[Pass]
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    then: Callable[[], Plan] | None = None

    def rest(self) -> Plan | None:
        """What is left to do once these passes have run, with all that is known by then; None
        when nothing is."""
        if self.then is None:
            return None
        found = self.then()
        # In place: its own passes may have more to say later on.
        for name, value in self.provenance.items():
            found.provenance.setdefault(name, value)
        found.notes[:0] = self.notes
        return found


def numbered(passes: Sequence[Pass], stage: int) -> list[Pass]:
    """The passes of one stage among several."""
    return [replace(one, stage=stage, title=f"stage {stage + 1}, {one.title}") for one in passes]


def run_plan(plan: Plan, sessions: Sequence[Session]) -> Provenance:
    """Run the passes over the sessions of the stages; the provenance, notes among it."""
    current: Plan | None = plan
    while current is not None:
        plan = current
        for task in plan.passes:
            session = sessions[task.stage]
            session.load(task.step)
            if task.begin is not None:
                task.begin()
            if task.rows is not None:
                for position, row in enumerate(session.loop(task.title, task.rows)):
                    task.accumulate(None, torch.tensor([row]), position)
            else:
                for batch in session.walk(task.title, None, task.order):
                    task.accumulate(batch.data, batch.examples, batch.position)
            if task.end is not None:
                task.end()
        current = plan.rest()
    return cast(Provenance, {**plan.provenance, "notes": plan.notes})
