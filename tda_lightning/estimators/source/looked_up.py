"""Which rows of an embedding SOURCE must follow.

An embedding's curvature in blocks is diagonal in the rows: an example looks rows up, so that the
second moment of that side is their counts. A row that no query touches then meets nothing, in any
segment, and is left out of adjoints, segments and gradients. Leading directions do mix rows, those
that the curvature reaches: with them these are followed too. Over several stages, of which one may
use what another has trained, all rows are followed that any of them looks up. In every case nothing
is approximated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tda_lightning.curvature import Spectrum
from tda_lightning.estimators.source.segments import Curvature
from tda_lightning.gradients.rows import touched_rows
from tda_lightning.session.session import Session, memory_budget
from tda_lightning.session.stage import Stage

WIDE = 1 << 19  # scalars of a table from which a walk costs less than what it saves

Rows = dict[str, Tensor]  # ascending, by unit


def separable(session: Session, curvatures: Sequence[Mapping[str, Curvature]]) -> list[str]:
    """Units whose rows are looked up and not mixed by the curvature of any segment."""
    return [
        name
        for name in session.engine.rows_each
        if all(isinstance(own.get(name), Spectrum) for own in curvatures)
        and all(own[name].left is None for own in curvatures)  # type: ignore[union-attr]
    ]


def rows_of_queries(
    session: Session, names: Sequence[str], first: int, last: int, themselves: bool
) -> Rows:
    """Rows that the queries ``first`` to ``last`` touch at the end of training; ``themselves``:
    and the training examples as queries."""
    session.load(session.trajectory.last_step)
    rows = session.query_rows(first, last)
    if themselves:
        walk = session.walk("rows of examples")
        own = touched_rows(batch.measurement_gradients for batch in walk)
        rows = united(rows, {name: session.gathered(one) for name, one in own.items()})
    return {name: own for name, own in rows.items() if name in names}


def curved_rows(names: Sequence[str], curvatures: Sequence[Mapping[str, Curvature]]) -> Rows:
    """Rows on which the curvature of any segment is not zero."""
    return {
        name: torch.stack([own[name].eigenvalues[0].any(-1) for own in curvatures])
        .any(0)
        .nonzero()[:, 0]
        for name in names
    }


def united(some: Rows, others: Rows) -> Rows:
    """The rows of both, of units that both know."""
    return {n: torch.cat([some[n], others[n]]).unique() for n in some.keys() & others.keys()}


def without_unused_rows(stages: Sequence[Stage]) -> list[Stage]:
    """The stages without the rows of wide tables that neither a training example of any stage nor a
    query looks up: their adjoint is zero throughout.

    Where losses draw random numbers another walk may look up other rows, and all are kept.
    """
    engines = [stage.wide.engine for stage in stages]
    names = {
        block.name
        for engine in engines
        for block in engine.blocks
        if block.name in engine.rows_each and block.size >= WIDE
    }
    if not names or any(stage.wide.noise for stage in stages):
        return list(stages)
    last = stages[-1].wide
    last.load(last.trajectory.last_step)
    found = [(last, last.query_rows(0, last.num_query))]
    for stage in stages:
        session = stage.wide
        walk = session.walk("rows in use", session.trajectory.last_step)
        own = touched_rows(batch.gradients for batch in walk)
        found.append((session, _of_all_processes(session, own, names & _names(session))))
    used: Rows = {}
    for name in sorted(names):
        parts = [own.get(name) for session, own in found if name in _names(session)]
        if all(part is not None for part in parts):
            used[name] = torch.cat([part for part in parts if part is not None]).unique()
    return [_restricted(stage, used) for stage in stages]


def _of_all_processes(session: Session, rows: Rows, names: set[str]) -> Rows:
    """Rows of ``names`` that the examples of any process look up, where no process lacks them: each
    is asked about the same names."""
    absent = torch.tensor([-1])
    together = {name: session.gathered(rows.get(name, absent)) for name in sorted(names)}
    return {name: own for name, own in together.items() if own[0] >= 0}


def _names(session: Session) -> set[str]:
    return {block.name for block in session.blocks}


def _restricted(stage: Stage, used: Rows) -> Stage:
    def narrow(session: Session) -> Session:
        names = _names(session)
        return session.restricted({name: own for name, own in used.items() if name in names})

    wide = narrow(stage.wide)
    return replace(
        stage, wide=wide, session=wide if stage.session is stage.wide else narrow(stage.session)
    )


def query_bytes(session: Session, names: Sequence[str], copies: int) -> int:
    """Bytes that a query takes beside as many others as fit, each of which adds its rows."""
    count = session.num_query
    while count > 1 and count * _bytes_beside(session, names, copies, count) > memory_budget():
        count //= 2
    return _bytes_beside(session, names, copies, count)


def _bytes_beside(session: Session, names: Sequence[str], copies: int, count: int) -> int:
    scalars = 0
    for block in session.blocks:
        _, rows, columns = block.shape
        if block.name in names:
            # Room for queries that touch twice as many as the first training examples.
            rows = min(rows, 2 * count * session.engine.rows_each[block.name])
            scalars += rows * columns
        else:
            scalars += block.size
    return copies * scalars * session.dtype.itemsize
