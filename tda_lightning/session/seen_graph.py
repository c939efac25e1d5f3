"""How much of a graph a model looks at for a node: found once, from its gradients, and checked.

A model that sees neighbourhoods can be run on parts of the graph. Some edits are computed in the
whole graph too, and where the losses differ all are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from tda_lightning.edits.edit_set import EditSet
from tda_lightning.edits.graph_edit_set import EditedGraphs, GraphEditSet
from tda_lightning.gradients import Block, GradientEngine
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.graph_parts import around
from tda_lightning.runtime.graphs import (
    edge_index,
    entries,
    num_nodes,
    with_edges,
    with_entries,
)
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


def look(session: Session, edited: EditedGraphs) -> None:
    """Find out how far the model sees, once."""
    edits = edited.edits
    if edits.hops is not None:
        return
    hops = _hops(session, edited.batch)
    edits.hops = 0 if hops is None else hops
    _note_edges_unused(session, edited)
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


def _note_edges_unused(session: Session, edited: EditedGraphs) -> None:
    """Say so where the losses are the same without any edge."""
    batch = edited.batch
    edges = edge_index(batch.graph)
    if not bool(torch.isin(edges, batch.nodes).any()):
        return
    bare = NodeBatch(with_edges(batch.graph, edges[:, :0], edges[0, :0]), batch.nodes, batch.mask)
    examples = torch.arange(len(batch.nodes), device=session.device)
    with torch.no_grad():
        try:
            both = [session.train_loss(session.module, own, examples) for own in (batch, bare)]
        except (RuntimeError, IndexError):  # a model that cannot have it looks at the edges
            return
    if torch.equal(*both):
        note(
            session,
            "The training losses are the same without any edge of the graph, so edits of edges "
            "change nothing. A model that uses edges has kept those of its first call: have it "
            "look at the graph that it is given.",
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


def note(session: Session, text: str) -> None:
    """Add a note to those of the scores, once."""
    if text not in session.engine.notes:
        session.engine.notes.append(text)
