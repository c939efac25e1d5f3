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

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tda_lightning.edits.edit_set import EditSet
from tda_lightning.edits.graph_edit_set import EditedGraphs, GraphEditSet
from tda_lightning.gradients import Block, Dense, ExampleGradients, GradientEngine
from tda_lightning.gradients.functional import parameters_frozen
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.graphs import around, edge_index, entries, num_nodes, with_entries
from tda_lightning.session.reached_nodes import Reached, in_groups, losses_of
from tda_lightning.tasks import NodeBatch

_PROBED = 16  # nodes whose receptive fields tell how far the model sees
_COMPARED = 6  # edits that are computed in the whole graph too


class Session(Protocol):
    """What is asked here of a :class:`~tda_lightning.session.session.Session`."""

    module: nn.Module
    engine: GradientEngine
    trajectory: Trajectory
    edits: EditSet | GraphEditSet | None
    num_query: int

    @property
    def queries(self) -> Callable[[int, int], Iterable[tuple[object, Tensor]]]:
        """Loads the queries between two numbers."""

    @property
    def blocks(self) -> list[Block]:
        """Units of parameters."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the scores."""

    def load(self, step: int) -> None:
        """Put the weights of a checkpoint in place."""

    def loop(self, title: str, items: Sequence[int]) -> Iterator[int]:
        """The items, with a progress bar."""

    def train_loss(self, module: nn.Module, batch: object, examples: Tensor) -> Tensor:
        """Training losses, [batch]."""

    def measurement(self, module: nn.Module, batch: object, examples: Tensor) -> Tensor:
        """Measurements, [batch]."""


def edit_gradients(session: Session, edited: EditedGraphs) -> ExampleGradients:
    """The change that each edit makes to the gradient of the summed training losses, as if it
    were an example's: before it minus after it."""
    _look(session, edited)
    names = session.engine.names
    parameters = [session.module.get_parameter(name) for name in names]
    every = torch.arange(len(edited.batch.nodes), device=session.device)
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    changes = []
    with parameters_frozen(session.module, names), torch.enable_grad():
        for column in edited.columns:
            reached = Reached(edited, column)
            before, after = losses_of(session.module, session.train_loss, reached.sides(), every)
            _require_finite(after, edited.edits, column)
            total = (before.sum() - after.sum()).to(session.dtype)
            found: tuple[Tensor | None, ...] = (None,) * len(parameters)
            if total.requires_grad:
                found = torch.autograd.grad(total, parameters, allow_unused=True)
            changes.append(total.detach())
            for name, parameter, gradient in zip(names, parameters, found, strict=True):
                if gradient is None:
                    gradient = torch.zeros_like(parameter)
                rows[name].append(gradient.to_dense() if gradient.is_sparse else gradient)
    stacked = {name: torch.stack(own).detach() for name, own in rows.items()}
    blocks = {block.name: Dense(block.matrix(stacked)) for block in session.blocks}
    return ExampleGradients(torch.stack(changes), dict(blocks))


def direct_terms(session: Session) -> Tensor:
    """How the measurement of each query changes with its own neighbourhood, at the final weights:
    [query, edit]. Zero for queries of another graph than the training graph."""
    edits = session.edits
    assert isinstance(edits, GraphEditSet)
    session.load(session.trajectory.last_step)
    changes = torch.zeros(session.num_query, len(edits), dtype=session.dtype)
    source = edits.column_source
    probe: EditedGraphs = source.batch([0], session.module)  # type: ignore[assignment]
    _look(session, probe)
    _note_unreached(session, probe)
    with torch.no_grad():
        for batch, indices in _by_graph(session):
            if not same_graph(batch.graph, probe.batch.graph):
                _note(
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


def _note(session: Session, text: str) -> None:
    if text not in session.engine.notes:
        session.engine.notes.append(text)


def _note_unreached(session: Session, edited: EditedGraphs) -> None:
    """Say which edits reach no training node."""
    columns = range(len(edited.edits))
    alone = [n for n in columns if not len(Reached(edited, n).before)]
    if alone:
        named = ", ".join(map(str, alone[:10])) + (" and others" if len(alone) > 10 else "")
        _note(
            session,
            f"{len(alone)} of {len(columns)} edits ({named}) reach no training node: the direct "
            "term is all there is.",
        )


def _look(session: Session, edited: EditedGraphs) -> None:
    """Find out how far the model sees, once."""
    edits = edited.edits
    if edits.hops is not None:
        return
    hops = _hops(session, edited.batch)
    edits.hops = 0 if hops is None else hops
    try:
        edits.whole = hops is None or not _parts_suffice(session, edited)
    except (RuntimeError, IndexError):  # the model is made for this very number of nodes
        edits.whole = True
    if edits.whole:
        session.engine.notes.append(
            "The model sees more of the graph than neighbourhoods of its nodes (a norm or a "
            "pooling over all of them, or no features to tell by): edits are looked at in the "
            "whole graph, which is exact and slow."
        )


def _hops(session: Session, batch: NodeBatch) -> int | None:
    """The most edges between a node and those whose features its loss depends on; None where the
    graph has no features with a derivative, or a loss depends on nodes that no path leads to."""
    graph, count = batch.graph, num_nodes(batch.graph)
    leaves = {
        key: value.detach().requires_grad_()
        for key, value in entries(graph).items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.dim() == 2
        and len(value) == count != value.shape[1]
    }
    if not leaves:
        return None
    some = torch.linspace(0, len(batch.nodes) - 1, min(_PROBED, len(batch.nodes))).long()
    probed = NodeBatch(with_entries(graph, leaves), batch.nodes[some], batch.mask)
    hops, edges = 0, [edge_index(graph)]
    with torch.enable_grad():
        losses = session.train_loss(session.module, probed, some.to(session.device))
        for node, loss in zip(probed.nodes, losses, strict=True):
            found = torch.autograd.grad(
                loss, [*leaves.values()], retain_graph=True, allow_unused=True
            )
            parts = [g.flatten(1).ne(0).any(1) for g in found if g is not None]
            if not parts:
                return None
            seen = torch.stack(parts).any(0)
            while bool((seen & ~around(edges, node[None], hops, count)).any()):
                hops += 1
                if hops > count:
                    return None
    return hops


def _parts_suffice(session: Session, edited: EditedGraphs) -> bool:
    """Whether some edits give the same losses in their parts of the graph, side by side, as in the
    whole graph, and leave all others as they are."""
    edits, batch = edited.edits, edited.batch
    last = len(edits) - 1
    some = {number * last // max(1, _COMPARED - 1) for number in range(min(_COMPARED, len(edits)))}
    examples = torch.arange(len(batch.nodes), device=session.device)
    with torch.no_grad():
        whole = session.train_loss(session.module, batch, examples)
        for group in in_groups(Reached(edited, column) for column in sorted(some)):
            sides = [side for one in group for side in one.sides()]
            each = losses_of(session.module, session.train_loss, sides, examples)
            for one, before, after in zip(group, each[::2], each[1::2], strict=True):
                if not _alike(session, one, whole, before, after):
                    return False
    return True


def _alike(session: Session, one: Reached, whole: Tensor, before: Tensor, after: Tensor) -> bool:
    """Whether losses in a part of the graph are those in the whole graph; ``whole``: of all nodes
    before the edit."""
    batch = one.edited.batch
    left = torch.ones(len(whole), dtype=torch.bool, device=whole.device)
    left[one.before] = False
    left[one.after] = True
    if not bool(left.any()):
        return True
    expected, found = whole.clone(), whole.clone()
    kept = NodeBatch(one.graph, batch.nodes[left], batch.mask)
    expected[left] = session.train_loss(session.module, kept, left.nonzero().squeeze(1))
    found[one.after] = after.to(found)
    return _close(before, whole[one.before]) and _close(found[left], expected[left])


def _close(one: Tensor, other: Tensor) -> bool:
    scale = other.abs().max() if other.numel() else 0
    allowed = torch.finfo(one.dtype).eps ** 0.5 * scale
    return bool(((one - other).nan_to_num().abs() <= allowed).all())


def _require_finite(after: Tensor, edits: GraphEditSet, column: int) -> None:
    if not bool(after.isfinite().all()):
        name = type(edits.edits[column]).__name__
        raise NonFiniteError(
            f"Edit {column}, {name} {edits.edits[column].record()}, leaves a node for which the "
            "model's loss is not finite: probably an isolated one, which a layer without "
            "self-loops cannot have. Add self-loops in the module, or leave the edit out."
        )
