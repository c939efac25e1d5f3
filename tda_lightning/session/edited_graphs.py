r"""What edits of a graph change: the gradient of the training loss, and the queries themselves.

Both sides of

.. math::
    \delta_e = \nabla_\theta \sum_n \ell_n(\theta, G) - \nabla_\theta \sum_n \ell_n(\theta, G_e)

are computed in a subgraph, for the affected nodes alone (:mod:`.reached_nodes`), and several
subgraphs side by side in one pass. How far the model sees is found from its gradients, and the
subgraphs are compared with the whole graph on some edits first; a model that sees more (a norm over
all nodes, a pooling) is run on the whole graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tda_lightning.edits.graph_edit_set import EditedGraphs, GraphEditSet
from tda_lightning.gradients import Dense, ExampleGradients
from tda_lightning.gradients.functional import parameters_frozen
from tda_lightning.gradients.shared_graph import gradients_of_each
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.runtime.graph_caches import without_caches
from tda_lightning.runtime.graphs import edge_index, num_nodes
from tda_lightning.session.reached_nodes import Reached, in_groups, losses_of
from tda_lightning.session.seen_graph import Session, look, note
from tda_lightning.tasks import NodeBatch

# Edits whose gradients are taken from one pass: a step is read once for all, and the backward pass
# of each goes through the parts of all.
_NODES, _TOGETHER = 1024, 8


def edit_gradients(session: Session, edited: EditedGraphs) -> ExampleGradients:
    """The change that each edit makes to the gradient of the summed training losses, as if it
    were an example's: before it minus after it."""
    with without_caches(session.module):
        look(session, edited)
        return _edit_gradients(session, edited)


def _edit_gradients(session: Session, edited: EditedGraphs) -> ExampleGradients:
    names = session.engine.names
    parameters = {name: session.module.get_parameter(name) for name in names}
    every = torch.arange(len(edited.batch.nodes), device=session.device)
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    changes = []
    each = (Reached(edited, column) for column in edited.columns)
    with parameters_frozen(session.module, names), torch.enable_grad():
        for group in in_groups(each, _NODES, _TOGETHER):
            sides = [side for reached in group for side in reached.sides()]
            found = losses_of(session.module, session.train_loss, sides, every)
            totals = []
            for reached, before, after in zip(group, found[::2], found[1::2], strict=True):
                _require_finite(after, edited.edits, reached.column)
                totals.append((before.sum() - after.sum()).to(session.dtype))
            total = torch.stack(totals)
            changes.append(total.detach())
            if total.requires_grad:
                own = gradients_of_each(total, parameters)
            else:  # no training node is reached
                own = {n: p.new_zeros(len(group), *p.shape) for n, p in parameters.items()}
            for name, gradients in own.items():
                rows[name].append(gradients)
    stacked = {name: torch.cat(own).detach() for name, own in rows.items()}
    blocks = {block.name: Dense(block.matrix(stacked)) for block in session.blocks}
    return ExampleGradients(torch.cat(changes), dict(blocks))


def direct_terms(session: Session) -> Tensor:
    """How the measurement of each query changes with its own neighbourhood, at the final weights:
    [query, edit]. Zero for queries of another graph than the training graph."""
    edits = session.edits
    assert isinstance(edits, GraphEditSet)
    session.load(session.trajectory.last_step)
    with without_caches(session.module), torch.no_grad():
        return _direct_terms(session, edits)


def _direct_terms(session: Session, edits: GraphEditSet) -> Tensor:
    changes = torch.zeros(session.num_query, len(edits), dtype=session.dtype)
    source = edits.column_source
    probe: EditedGraphs = source.batch([0], session.module)  # type: ignore[assignment]
    look(session, probe)
    _note_unreached(session, probe)
    for batch, indices in _by_graph(session):
        if not same_graph(batch.graph, probe.batch.graph):
            note(
                session,
                "The queries are nodes of another graph than the training graph: "
                "edits reach them by way of the weights alone.",
            )
            continue
        asked = EditedGraphs(edits, range(len(edits)), batch)
        before = session.measurement(session.module, batch, indices)
        columns = session.loop(f"direct terms of {len(indices)} queries", asked.columns)
        reached = (Reached(asked, column) for column in columns)
        for group in in_groups(one for one in reached if len(one.before)):
            sides = [one.changed(one.before) for one in group]
            found = losses_of(session.module, session.measurement, sides, indices)
            for one, after in zip(group, found, strict=True):
                _require_finite(after, edits, one.column)
                rows = indices.cpu()[one.before.cpu()]
                changes[rows, one.column] = (after - before[one.before]).to(changes)
    return changes


def _by_graph(session: Session) -> Iterator[tuple[NodeBatch, Tensor]]:
    """The queries in as few batches as they have graphs."""
    held: list[tuple[NodeBatch, Tensor]] = []
    for batch, indices in session.queries(0, session.num_query):
        assert isinstance(batch, NodeBatch)
        if held and batch.graph is not held[0][0].graph:
            yield _together(held)
            held = []
        held.append((batch, indices))
    if held:
        yield _together(held)


def _together(held: Sequence[tuple[NodeBatch, Tensor]]) -> tuple[NodeBatch, Tensor]:
    first = held[0][0]
    nodes = torch.cat([batch.nodes for batch, _ in held])
    return NodeBatch(first.graph, nodes, first.mask), torch.cat([own for _, own in held])


def same_graph(one: Any, other: Any) -> bool:
    """Whether two graphs have the same nodes and edges."""
    return num_nodes(one) == num_nodes(other) and torch.equal(edge_index(one), edge_index(other))


def _note_unreached(session: Session, edited: EditedGraphs) -> None:
    """Say which edits reach no training node."""
    columns = range(len(edited.edits))
    alone = [n for n in columns if not len(Reached(edited, n).before)]
    if alone:
        named = ", ".join(map(str, alone[:10])) + (" and others" if len(alone) > 10 else "")
        note(
            session,
            f"{len(alone)} of {len(columns)} edits ({named}) reach no training node: the direct "
            "term is all there is.",
        )


def _require_finite(after: Tensor, edits: GraphEditSet, column: int) -> None:
    if not bool(after.isfinite().all()):
        name = type(edits.edits[column]).__name__
        raise NonFiniteError(
            f"Edit {column}, {name} {edits.edits[column].record()}, leaves a node for which the "
            "model's loss is not finite: probably an isolated one, which a layer without "
            "self-loops cannot have. Add self-loops in the module, or leave the edit out."
        )
