r"""What edits of a graph change: the gradient of the training loss, and the queries themselves.

An edit reaches the nodes within as many hops as the model has layers of what it touches, and their
losses depend on one neighbourhood more, for the degrees at its border. So both sides of

.. math::
    \delta_e = \nabla_\theta \sum_n \ell_n(\theta, G) - \nabla_\theta \sum_n \ell_n(\theta, G_e)

are computed in a subgraph, for the affected nodes alone. How far the model sees is found from its
gradients, and the subgraphs are compared with the whole graph on some edits first; a model that
sees more (a norm over all nodes, a pooling) is run on the whole graph.
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
from tda_lightning.runtime.graphs import (
    around,
    edge_index,
    entries,
    num_nodes,
    restricted,
    with_entries,
)
from tda_lightning.tasks import NodeBatch

_PROBED = 16  # nodes whose receptive fields tell how far the model sees
_COMPARED = 6  # edits that are computed in the whole graph too
_MOST = 0.5  # of the nodes: from there on the whole graph costs no more than a copy of a part

Losses = Callable[[nn.Module, object, Tensor], Tensor]  # of (module, batch, examples)


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
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    changes = []
    with parameters_frozen(session.module, names), torch.enable_grad():
        for column in edited.columns:
            reached = _Reached(edited, column, edited.batch.nodes)
            total = reached.difference(session, session.train_loss)
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
        for batch, indices in session.queries(0, session.num_query):
            assert isinstance(batch, NodeBatch)
            if not same_graph(batch.graph, probe.batch.graph):
                _note(
                    session,
                    "The queries are nodes of another graph than the training graph: "
                    "edits reach them by way of the weights alone.",
                )
                continue
            asked = EditedGraphs(edits, range(len(edits)), batch)
            before = session.measurement(session.module, batch, indices)
            for column in session.loop(f"direct terms of {len(indices)} queries", asked.columns):
                reached = _Reached(asked, column, batch.nodes)
                if not len(reached.before):
                    continue
                place = torch.isin(batch.nodes, reached.before).nonzero().squeeze(1)
                batch_after = reached.batch(reached.graph, batch.nodes[place])
                after = session.measurement(session.module, batch_after, indices[place])
                _require_finite(after, edits, column)
                changes[indices[place].cpu(), column] = (after - before[place]).to(changes)
    return changes


def same_graph(one: Any, other: Any) -> bool:
    """Whether two graphs have the same nodes and edges."""
    return num_nodes(one) == num_nodes(other) and torch.equal(edge_index(one), edge_index(other))


def _note(session: Session, text: str) -> None:
    if text not in session.engine.notes:
        session.engine.notes.append(text)


def _note_unreached(session: Session, edited: EditedGraphs) -> None:
    """Say which edits reach no training node."""
    columns = range(len(edited.edits))
    nodes = edited.batch.nodes
    alone = [n for n in columns if not len(_Reached(edited, n, nodes).before)]
    if alone:
        named = ", ".join(map(str, alone[:10])) + (" and others" if len(alone) > 10 else "")
        _note(
            session,
            f"{len(alone)} of {len(columns)} edits ({named}) reach no training node: the direct "
            "term is all there is.",
        )


class _Reached:
    """The nodes whose losses an edit changes, and the part of the graph that they depend on.

    Attributes:
        graph: after the edit.
        before, after: ids of the nodes that it reaches, without and with those that it takes out.
    """

    def __init__(self, edited: EditedGraphs, column: int, nodes: Tensor) -> None:
        self.edited, self.column = edited, column
        edits, own = edited.edits, edited.batch.graph
        edit = edits.edits[column]
        self.graph = edit.applied(own)
        removed = edit.removed().to(nodes.device)
        self.edges = [edge_index(own), edge_index(self.graph)]
        self.count = num_nodes(own)
        if edits.whole:
            self.before = nodes
        else:
            assert edits.hops is not None
            reach = around(self.edges, edit.touched(own), edits.hops, self.count)
            self.before = nodes[reach[nodes] | torch.isin(nodes, removed)]
        self.after = self.before[~torch.isin(self.before, removed)]

    def difference(self, session: Session, loss: Losses) -> Tensor:
        """Sum of the losses of the nodes that are reached, before the edit minus after it."""
        before, after = self.losses(session, loss)
        _require_finite(after, self.edited.edits, self.column)
        return before.sum() - after.sum()

    def losses(self, session: Session, loss: Losses) -> tuple[Tensor, Tensor]:
        """Their losses, before the edit and after it."""
        both = []
        sides = (self.edited.batch.graph, self.before), (self.graph, self.after)
        for graph, nodes in sides:
            if not len(nodes):
                both.append(torch.zeros(0, dtype=session.dtype, device=session.device))
                continue
            examples = torch.searchsorted(self.edited.batch.nodes, nodes)
            both.append(loss(session.module, self.batch(graph, nodes), examples))
        return both[0], both[1]

    def batch(self, graph: Any, nodes: Tensor) -> NodeBatch:
        """Some of the nodes in the part of ``graph`` that they depend on."""
        mask, edits = self.edited.batch.mask, self.edited.edits
        if not edits.whole:
            assert edits.hops is not None
            inside = around(self.edges, self.before, edits.hops + 1, self.count)
            if float(inside.float().mean()) < _MOST:
                part = inside.nonzero().squeeze(1)
                return NodeBatch(restricted(graph, part), torch.searchsorted(part, nodes), mask)
        return NodeBatch(graph, nodes, mask)


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
    """Whether some edits give the same losses in their parts of the graph as in the whole graph,
    and leave all others as they are."""
    edits, batch = edited.edits, edited.batch
    last = len(edits) - 1
    some = {number * last // max(1, _COMPARED - 1) for number in range(min(_COMPARED, len(edits)))}
    examples = torch.arange(len(batch.nodes), device=session.device)
    with torch.no_grad():
        whole = session.train_loss(session.module, batch, examples)
        for column in sorted(some):
            reached = _Reached(edited, column, batch.nodes)
            removed = edits.edits[column].removed().to(batch.nodes.device)
            left = ~torch.isin(batch.nodes, removed)
            kept = NodeBatch(reached.graph, batch.nodes[left], batch.mask)
            if not len(kept):
                continue
            before, after = reached.losses(session, session.train_loss)
            expected = whole.clone()
            expected[left] = session.train_loss(session.module, kept, examples[left])
            place = torch.isin(batch.nodes, reached.before)
            found = whole.clone()
            found[torch.isin(batch.nodes, reached.after)] = after
            if not _close(before, whole[place]) or not _close(found[left], expected[left]):
                return False
    return True


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
