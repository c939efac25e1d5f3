"""The nodes whose losses an edit of a graph changes, and the part of the graph they depend on.

An edit reaches the nodes within as many hops as the model has layers of what it touches. Their
losses depend on the nodes as many hops away again, and on nothing of the neighbours of these but
that they are there (:func:`~tda_lightning.runtime.graph_parts.bordered_part`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tda_lightning.edits.graph_edit_set import EditedGraphs
from tda_lightning.runtime.graph_parts import (
    Part,
    around,
    bordered_part,
    side_by_side,
    whole_part,
)
from tda_lightning.runtime.graphs import edge_index, num_nodes
from tda_lightning.tasks import NodeBatch

_MOST = 0.5  # of the nodes: from there on the whole graph costs no more than a copy of a part

Losses = Callable[[nn.Module, object, Tensor], Tensor]  # of (module, batch, examples)


class Reached:
    """What one edit does to some nodes.

    Args:
        edited: the edits, and the graph with the nodes that are asked about.
        column: which edit.

    Attributes:
        before, after: which of the nodes it reaches, with and without those that it takes out:
            their positions.
    """

    def __init__(self, edited: EditedGraphs, column: int) -> None:
        self.edited, self.column = edited, column
        edits, nodes = edited.edits, edited.batch.nodes
        self.count = num_nodes(edited.batch.graph)
        removed = edits.edits[column].removed().to(nodes.device)
        reached = torch.ones(len(nodes), dtype=torch.bool, device=nodes.device)
        if not edits.whole:
            reached = self._within_reach()[nodes]
        taken_out = torch.isin(nodes, removed) if len(removed) else torch.zeros_like(reached)
        self.before = (reached | taken_out).nonzero().squeeze(1)
        self.after = (reached & ~taken_out).nonzero().squeeze(1)

    @cached_property
    def graph(self) -> Any:
        """The graph after the edit."""
        return self.edited.edits.edits[self.column].applied(self.edited.batch.graph)

    @cached_property
    def edges(self) -> list[Tensor]:
        """Those before the edit and those after it."""
        return [edge_index(self.edited.batch.graph), edge_index(self.graph)]

    def _within_reach(self) -> Tensor:
        """Which nodes the edit reaches, [nodes]: every batch of nodes asks for them."""
        edits, own = self.edited.edits, self.edited.batch.graph
        inside = torch.zeros(self.count, dtype=torch.bool, device=edge_index(own).device)
        if self.column not in edits.reach:
            assert edits.hops is not None
            # New edges are between nodes that it touches, from where one looks anyway.
            touched = edits.edits[self.column].touched(own)
            inside = around([edge_index(own)], touched, edits.hops, self.count)
            edits.reach[self.column] = inside.nonzero().squeeze(1)
        inside[edits.reach[self.column]] = True
        return inside

    @cached_property
    def inside(self) -> Tensor | None:
        """Which nodes their losses depend on, [nodes]; None: all, or so many that the whole graph
        costs no more."""
        edits = self.edited.edits
        if edits.whole:
            return None
        assert edits.hops is not None
        start = self.edited.batch.nodes[self.before]
        inside = around(self.edges, start, edits.hops, self.count)
        return inside if int(inside.sum()) < _MOST * self.count else None

    @property
    def size(self) -> int:
        """Nodes that their losses depend on."""
        return self.count if self.inside is None else int(self.inside.sum())

    def sides(self) -> list[Side]:
        """Before the edit and after it."""
        return [Side(self, self.edited.batch.graph, self.before), self.changed(self.after)]

    def changed(self, positions: Tensor) -> Side:
        """Some of the nodes after the edit."""
        return Side(self, self.graph, positions)


class Side(NamedTuple):
    """Some nodes before or after an edit.

    Attributes:
        reached: by the edit.
        graph: before it or after it.
        positions: among the nodes that are asked about.
    """

    reached: Reached
    graph: Any
    positions: Tensor

    @property
    def part(self) -> Part:
        """The part of the graph that is looked at."""
        edges, inside = edge_index(self.graph), self.reached.inside
        return (
            whole_part(edges, self.reached.count)
            if inside is None
            else bordered_part(edges, inside)
        )

    def places(self) -> Tensor:
        """Where the nodes are in the part."""
        nodes = self.reached.edited.batch.nodes[self.positions]
        inside = self.reached.inside
        return nodes if inside is None else inside.cumsum(0)[nodes] - 1


def losses_of(
    module: nn.Module, loss: Losses, sides: Sequence[Side], examples: Tensor
) -> list[Tensor]:
    """The losses of the nodes of several sides, in one pass over their parts of the graph side by
    side; one by one where the model sees more than neighbourhoods.

    Args:
        examples: numbers of the nodes that are asked about, by position.
    """
    asked = [side for side in sides if len(side.positions)]
    alone = asked[:1] and asked[0].reached.edited.edits.whole
    groups = [[side] for side in asked] if alone else [asked] * bool(asked)
    found: list[Tensor] = []
    for group in groups:
        first = group[0]
        graph, nodes = first.graph, [side.places() for side in group]
        if not alone:
            parts = [side.part for side in group]
            graph, total = side_by_side([side.graph for side in group], parts), 0
            for number, part in enumerate(parts):
                nodes[number] = nodes[number] + total
                total += len(part.nodes)
        positions = torch.cat([side.positions for side in group])
        batch = NodeBatch(graph, torch.cat(nodes), first.reached.edited.batch.mask)
        losses = loss(module, batch, examples[positions.to(examples.device)])
        found += losses.split([len(side.positions) for side in group])
    each = iter(found)
    nothing = next(module.parameters()).detach().new_zeros(0)
    return [next(each) if len(side.positions) else nothing for side in sides]


def in_groups(
    reached: Iterable[Reached], nodes: int | None = None, edits: int | None = None
) -> Iterator[list[Reached]]:
    """Several at a time; those that need the whole graph alone.

    Args:
        nodes: that their parts have together, at most; None: as many as the graph.
        edits: how many at most; None: any number.
    """
    group: list[Reached] = []
    total = 0
    for own in reached:
        most = own.count if nodes is None else min(nodes, own.count)
        if group and (total + own.size > most or len(group) == edits):
            yield group
            group, total = [], 0
        group.append(own)
        total += own.size
    if group:
        yield group
