r"""What can be changed in the graph that a model was trained on.

Unlike the removal of an example, an edit of the graph changes the losses of all nodes that it
reaches, and those of queries. With the loss :math:`\sum_n \ell_n(\theta, G)` over the training
nodes it counts by

.. math::
    \delta_e = \nabla_\theta \sum_n \ell_n(\theta, G) - \nabla_\theta \sum_n \ell_n(\theta, G_e)

the gradient before it minus the gradient after it (Wu et al. 2023, 2304.02835, eq. 7; Chen et al.
2022, 2210.07441). Batches keep their denominators: a removed node has weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tda_lightning.runtime.graphs import Key, edge_index, entry, num_nodes, with_edges, with_entries


@runtime_checkable
class GraphEdit(Protocol):
    """A change of the graph; a new kind is a class that has these four."""

    def applied(self, graph: Any) -> Any:
        """The graph after it, with the same nodes.

        Raises:
            ValueError: it does not fit the graph.
        """

    def touched(self, graph: Any) -> Tensor:
        """The nodes whose own features or edges it changes, int64: it reaches as many hops from
        them as the model has layers."""

    def removed(self) -> Tensor:
        """Nodes whose losses it takes out of training, int64."""

    def record(self) -> dict[str, object]:
        """What it changes, as JSON can hold it."""


@dataclass(frozen=True)
class _OfEdges:
    edges: Sequence[tuple[int, int]]
    directed: bool = False

    def touched(self, graph: Any) -> Tensor:
        """Their ends."""
        ends: Tensor = _pairs(self.edges, graph).flatten().unique()
        return ends

    def removed(self) -> Tensor:
        """None."""
        return torch.empty(0, dtype=torch.int64)

    def record(self) -> dict[str, object]:
        """Its edges."""
        return {"edges": [list(map(int, edge)) for edge in self.edges]}


@dataclass(frozen=True)
class RemoveEdges(_OfEdges):
    """Some edges, as pairs of node ids, are not there.

    Attributes:
        edges: (from, to) each; in an adjacency matrix (row, column).
        directed: whether (v, u) stays where (u, v) goes. An undirected graph holds both.

    Example:
        >>> graph = {"edge_index": torch.tensor([[0, 1, 1], [1, 0, 2]]), "num_nodes": 3}
        >>> RemoveEdges([(0, 1)]).applied(graph)["edge_index"]
        tensor([[1],
                [2]])
    """

    def applied(self, graph: Any) -> Any:
        """The graph without them.

        Raises:
            ValueError: an edge is not there.
        """
        present = edge_index(graph)
        gone = _pairs(self.edges, graph)
        codes, wanted = _codes(present), _codes(gone)
        found = torch.isin(codes, wanted)
        missing = ~torch.isin(wanted, codes[found])
        if bool(missing.any()):
            u, v = gone[:, int(missing.nonzero()[0])].tolist()
            raise ValueError(f"RemoveEdges names the edge ({u}, {v}), which the graph has not got.")
        if not self.directed:
            found |= torch.isin(codes, _codes(gone.flip(0)))
        kept = (~found).nonzero().squeeze(1)
        return with_edges(graph, present[:, kept], kept)


@dataclass(frozen=True)
class AddEdges(_OfEdges):
    """Some edges, as pairs of node ids, are there that were not.

    Attributes:
        edges: (from, to) each; in an adjacency matrix (row, column).
        directed: whether (v, u) is left out where (u, v) comes. Otherwise both are there
            afterwards, each once.
    """

    def applied(self, graph: Any) -> Any:
        """The graph with them.

        Raises:
            ValueError: an edge is there, or edges have weights or attributes.
        """
        present, new = edge_index(graph), _pairs(self.edges, graph)
        there = torch.isin(_codes(new), _codes(present))
        if bool(there.any()):
            u, v = new[:, int(there.nonzero()[0])].tolist()
            raise ValueError(f"AddEdges names the edge ({u}, {v}), which the graph has.")
        if not self.directed:
            new = torch.cat([new, new.flip(0)], 1)
            new = new[:, ~torch.isin(_codes(new), _codes(present))]
        new = new.unique(dim=1)
        kept = torch.cat([torch.arange(present.shape[1]), torch.full((new.shape[1],), -1)])
        return with_edges(graph, torch.cat([present, new], 1), kept.to(present.device))


@dataclass(frozen=True)
class RemoveNodes:
    """Some nodes are not there: neither their edges nor, of training nodes, their losses.

    They stay in the graph as isolated nodes that nobody asks about, so that the ids of the others
    stay as they are.

    Attributes:
        nodes: their ids.
    """

    nodes: Sequence[int]

    def applied(self, graph: Any) -> Any:
        """The graph without their edges."""
        present = edge_index(graph)
        gone = _ids(self.nodes, graph)
        kept = (~torch.isin(present, gone).any(0)).nonzero().squeeze(1)
        return with_edges(graph, present[:, kept], kept)

    def touched(self, graph: Any) -> Tensor:
        """They and their neighbours, which lose an edge."""
        present, gone = edge_index(graph), _ids(self.nodes, graph)
        own = torch.isin(present, gone).any(0)
        both: Tensor = torch.cat([gone, present[:, own].flatten()]).unique()
        return both

    def removed(self) -> Tensor:
        """They themselves."""
        return torch.as_tensor(list(self.nodes), dtype=torch.int64)

    def record(self) -> dict[str, object]:
        """Its nodes."""
        return {"nodes": list(map(int, self.nodes))}


@dataclass(frozen=True)
class RemoveFeatures:
    """Some nodes have no features: zeros in their place.

    Attributes:
        nodes: their ids.
        columns: which features; None: all.
        features: key of the features in the graph.
    """

    nodes: Sequence[int]
    columns: Sequence[int] | None = None
    features: Key = "x"

    def applied(self, graph: Any) -> Any:
        """The graph with zeros there.

        Raises:
            ValueError: it has no features, or not these columns.
        """
        values = entry(graph, self.features, "features").clone()
        rows = _ids(self.nodes, graph)
        if self.columns is None:
            values[rows] = 0
            return with_entries(graph, {self.features: values})
        columns = torch.as_tensor(list(self.columns), device=values.device)
        if bool((columns < 0).any()) or bool((columns >= values.shape[1]).any()):
            raise ValueError(
                f"RemoveFeatures names columns {list(self.columns)}; expected 0 to "
                f"{values.shape[1] - 1}."
            )
        values[rows[:, None], columns] = 0
        return with_entries(graph, {self.features: values})

    def touched(self, graph: Any) -> Tensor:
        """The nodes."""
        return _ids(self.nodes, graph)

    def removed(self) -> Tensor:
        """None."""
        return torch.empty(0, dtype=torch.int64)

    def record(self) -> dict[str, object]:
        """Its nodes and columns."""
        columns = None if self.columns is None else list(map(int, self.columns))
        return {"nodes": list(map(int, self.nodes)), "columns": columns}


def _codes(edges: Tensor) -> Tensor:
    """One number for each edge."""
    return edges[0] * (1 << 31) + edges[1]


def _pairs(edges: Sequence[tuple[int, int]], graph: Any) -> Tensor:
    """[2, edges] of pairs of nodes."""
    pairs = torch.as_tensor([list(edge) for edge in edges], dtype=torch.int64)
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"edges must be pairs of node ids, got {list(edges)[:3]}.")
    return _inside(pairs.T.contiguous(), graph)


def _ids(nodes: Sequence[int], graph: Any) -> Tensor:
    ids = torch.as_tensor(list(nodes), dtype=torch.int64)
    if ids.dim() != 1 or not len(ids):
        raise ValueError(f"nodes must be a list of node ids, got {list(nodes)[:3]}.")
    return _inside(ids, graph)


def _inside(ids: Tensor, graph: Any) -> Tensor:
    count = num_nodes(graph)
    outside = (ids < 0) | (ids >= count)
    if bool(outside.any()):
        raise ValueError(
            f"An edit names node {int(ids[outside][0])}; the graph has nodes 0 to {count - 1}."
        )
    return ids.to(edge_index(graph).device)
