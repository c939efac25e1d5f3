"""Parts of a graph, and several parts side by side as one graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tda_lightning.runtime.graphs import (
    Key,
    edge_index,
    entries,
    matrix_key,
    matrix_like,
    num_nodes,
    of_edges,
    of_nodes,
    with_entries,
)


class Part(NamedTuple):
    """Some nodes of a graph, and edges between them.

    Attributes:
        nodes: their ids.
        edges: [2, edges], as positions among them.
        kept: positions of these edges in the graph.
    """

    nodes: Tensor
    edges: Tensor
    kept: Tensor


def inner_part(edges: Tensor, nodes: Tensor, count: int) -> Part:
    """Some nodes, of ``count``, in their order, with the edges between them."""
    position = edges.new_full((count,), -1)
    position[nodes] = torch.arange(len(nodes), device=edges.device)
    ends = position[edges]
    kept = (ends >= 0).all(0).nonzero().squeeze(1)
    return Part(nodes, ends[:, kept], kept)


def bordered_part(edges: Tensor, inside: Tensor) -> Part:
    """The nodes that a mask [nodes] selects, in increasing order, with all their edges.

    Neighbours outside, which are there for the degrees alone, follow them, and several nodes inside
    share one: there are as many as the node with the most of them has. Which node outside stands
    for others is arbitrary.
    """
    nodes, count = inside.nonzero().squeeze(1), len(inside)
    within = inside[edges]
    kept = within.any(0).nonzero().squeeze(1)
    within, ends = within[:, kept], edges[:, kept]
    position = torch.empty(count, dtype=torch.int64, device=edges.device)
    position[nodes] = torch.arange(len(nodes), device=edges.device)
    places = position[ends]
    crossing = (~within).any(0).nonzero().squeeze(1)
    if not len(crossing):
        return Part(nodes, places, kept)
    first = within[0, crossing]
    source, target = ends[:, crossing]
    near, far = torch.where(first, source, target), torch.where(first, target, source)
    pairs, pair = (near * count + far).unique(return_inverse=True)
    owner = torch.div(pairs, count, rounding_mode="floor")
    # The number of each pair among those of its node: the neighbour outside that it shares.
    number = torch.arange(len(pairs), device=edges.device) - torch.searchsorted(owner, owner)
    most = int(number.max()) + 1
    standing = torch.full((most,), count, dtype=torch.int64, device=edges.device)
    standing = standing.scatter_reduce(0, number, pairs % count, "amin")
    outer = len(nodes) + number[pair]
    places[1, crossing] = torch.where(first, outer, places[1, crossing])
    places[0, crossing] = torch.where(first, places[0, crossing], outer)
    return Part(torch.cat([nodes, standing]), places, kept)


def whole_part(edges: Tensor, count: int) -> Part:
    """All nodes and edges."""
    every = torch.arange(count, device=edges.device)
    return Part(every, edges, torch.arange(edges.shape[1], device=edges.device))


def side_by_side(graphs: Sequence[Any], parts: Sequence[Part]) -> Any:
    """Parts of several graphs with the same keys as one graph, with no edges between the parts.

    Args:
        graphs: forms of one graph, say. What belongs neither to nodes nor to edges is the first's.
        parts: what is taken of each, in this order.
    """
    held, counts = [entries(graph) for graph in graphs], [num_nodes(graph) for graph in graphs]
    each_edges = [edge_index(graph) for graph in graphs]
    shifted, total = [], 0
    for part in parts:
        shifted.append(part.edges + total)
        total += len(part.nodes)
    edges, chosen = torch.cat(shifted, 1), torch.cat([part.nodes for part in parts])
    changes: dict[Key, object] = {}
    if (key := matrix_key(graphs[0])) is not None:
        changes[key] = matrix_like(held[0][key], edges, total)
    else:
        (name,) = [name for name, value in held[0].items() if value is each_edges[0]]
        changes[name] = edges
    for own_key in held[0].keys() - changes.keys():
        values = [other[own_key] for other in held]
        sizes = list(zip(values, each_edges, counts, strict=True))
        if own_key == "num_nodes":
            changes[own_key] = total
        elif own_key == "ptr":
            changes[own_key] = torch.tensor([0, total], device=edges.device)
        elif key is None and all(of_edges(own_key, v, e.shape[1], n) for v, e, n in sizes):
            changes[own_key] = torch.cat(
                [value[part.kept] for value, part in zip(values, parts, strict=True)]
            )
        elif all(of_nodes(value, count) for value, _, count in sizes):
            if all(value is values[0] for value in values):  # one copy, and not one for each part
                changes[own_key] = values[0][chosen]
            else:
                changes[own_key] = torch.cat(
                    [value[part.nodes] for value, part in zip(values, parts, strict=True)]
                )
    return with_entries(graphs[0], changes)


def around(edges: Sequence[Tensor], start: Tensor, hops: int, count: int) -> Tensor:
    """Whether each of ``count`` nodes is at most ``hops`` edges from one of ``start``, in either
    direction: [nodes]."""
    reached = torch.zeros(count, dtype=torch.bool, device=start.device)
    reached[start] = True
    sources = torch.cat([one[0] for one in edges])
    targets = torch.cat([one[1] for one in edges])
    for _ in range(hops):
        further = reached.clone()
        further[targets[reached[sources]]] = True
        further[sources[reached[targets]]] = True
        reached = further
    return reached
