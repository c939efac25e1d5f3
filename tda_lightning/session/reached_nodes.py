"""The nodes whose losses an edit of a graph changes, and the part of the graph they depend on.

An edit reaches the nodes within as many hops as the model has layers of what it touches, and their
losses depend on one neighbourhood more, for the degrees at its border.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tda_lightning.edits.graph_edit_set import EditedGraphs
from tda_lightning.runtime.graphs import around, edge_index, num_nodes, side_by_side
from tda_lightning.tasks import NodeBatch

_MOST = 0.5  # of the nodes: from there on the whole graph costs no more than a copy of a part

Losses = Callable[[nn.Module, object, Tensor], Tensor]  # of (module, batch, examples)


class Reached:
    """What one edit does to some nodes.

    Args:
        edited: the edits, and the graph with the nodes that are asked about.
        column: which edit.

    Attributes:
        graph: after the edit.
        before, after: which of the nodes it reaches, with and without those that it takes out:
            their positions.
    """

    def __init__(self, edited: EditedGraphs, column: int) -> None:
        self.edited, self.column = edited, column
        edits, own, nodes = edited.edits, edited.batch.graph, edited.batch.nodes
        edit = edits.edits[column]
        self.graph = edit.applied(own)
        removed = edit.removed().to(nodes.device)
        self.edges = [edge_index(own), edge_index(self.graph)]
        self.count = num_nodes(own)
        reached = torch.ones(len(nodes), dtype=torch.bool, device=nodes.device)
        if not edits.whole:
            reached = torch.isin(nodes, self._within_reach()) | torch.isin(nodes, removed)
        self.before = reached.nonzero().squeeze(1)
        self.after = self.before[~torch.isin(nodes[self.before], removed)]

    def _within_reach(self) -> Tensor:
        """Ids of the nodes that the edit reaches, which every batch of nodes asks for."""
        edits, own = self.edited.edits, self.edited.batch.graph
        if self.column not in edits.reach:
            assert edits.hops is not None
            touched = edits.edits[self.column].touched(own)
            inside = around(self.edges, touched, edits.hops, self.count)
            edits.reach[self.column] = inside.nonzero().squeeze(1)
        return edits.reach[self.column]

    @cached_property
    def part(self) -> Tensor:
        """Ids of the nodes that their losses depend on, or all nodes."""
        edits, every = self.edited.edits, torch.arange(self.count, device=self.edges[0].device)
        if edits.whole:
            return every
        assert edits.hops is not None
        start = self.edited.batch.nodes[self.before]
        inside = around(self.edges, start, edits.hops + 1, self.count)
        part = inside.nonzero().squeeze(1)
        return part if len(part) < _MOST * self.count else every

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
        parts = [side.reached.part for side in group]
        nodes, start = [], 0
        for side, part in zip(group, parts, strict=True):
            own = side.reached.edited.batch.nodes[side.positions]
            nodes.append(torch.searchsorted(part, own) + start)
            start += len(part)
        positions = torch.cat([side.positions for side in group])
        graph = group[0].graph if alone else side_by_side([side.graph for side in group], parts)
        batch = NodeBatch(graph, torch.cat(nodes), group[0].reached.edited.batch.mask)
        losses = loss(module, batch, examples[positions.to(examples.device)])
        found += losses.split([len(side.positions) for side in group])
    each = iter(found)
    nothing = next(module.parameters()).detach().new_zeros(0)
    return [next(each) if len(side.positions) else nothing for side in sides]


def in_groups(reached: Iterable[Reached]) -> Iterator[list[Reached]]:
    """Several at a time, whose parts together are no larger than the graph; those that need the
    whole graph alone."""
    group: list[Reached] = []
    total = 0
    for own in reached:
        if group and total + len(own.part) > own.count:
            yield group
            group, total = [], 0
        group.append(own)
        total += len(own.part)
    if group:
        yield group
