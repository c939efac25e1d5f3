"""A graph in any form: a dictionary, a tuple, an object, a ``Data`` of torch_geometric.

Entries are read and exchanged by their keys, and edges are found where graphs have them: in an
``edge_index`` [2, edges], or in a square adjacency matrix, dense or sparse.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tda_lightning.runtime.structures import parts, with_parts

Key: TypeAlias = Any  # a name, or a position in a tuple
EDGE_INDEX = "edge_index"
_ADJACENCY = ("adj", "adjacency", "adj_t", "edge_index")  # square matrices


def entries(graph: Any) -> dict[Key, Any]:
    """Everything that a graph holds, by key."""
    if not isinstance(graph, Mapping) and callable(getattr(graph, "keys", None)):
        keys = graph.keys()  # of torch_geometric's Data: iterating it gives pairs
        return {key: graph[key] for key in keys}
    return parts(graph) or {}


def with_entries(graph: Any, changes: Mapping[Key, object]) -> Any:
    """A copy of the graph with other values under some keys; what is not changed is shared."""
    if hasattr(graph, "keys") and hasattr(graph, "__setitem__"):
        changed = copy.copy(graph)
        for key, value in changes.items():
            changed[key] = value
        return changed
    return with_parts(graph, {**entries(graph), **changes})


def entry(graph: object, key: Key, what: str) -> Any:
    """The entry under ``key``.

    Raises:
        ValueError: there is none; says what it is for and lists the others.
    """
    held = entries(graph)
    if key not in held:
        raise ValueError(
            f"Expected the graph to have {what} under {key!r}, got the keys {list(held)}."
        )
    return held[key]


def find_mask(graph: object) -> Key | None:
    """The key of the mask of training nodes: ``train_mask``, else the only boolean vector."""
    vectors = [
        key
        for key, value in entries(graph).items()
        if isinstance(value, Tensor) and value.dtype == torch.bool and value.dim() == 1
    ]
    if "train_mask" in vectors:
        return "train_mask"
    return vectors[0] if len(vectors) == 1 else None


def matrix_key(graph: object) -> Key | None:
    """The key of the adjacency matrix, where the graph has one."""
    held = entries(graph)
    named = [key for key in _ADJACENCY if key in held and _square(held[key])]
    if named:
        return named[0]
    if EDGE_INDEX in held:
        return None
    square = [key for key, value in held.items() if _square(value)]
    return square[0] if len(square) == 1 else None


def edge_index(graph: object) -> Tensor:
    """Its edges [2, edges], from and to.

    Raises:
        ValueError: none are found, or an adjacency matrix has other values than 0 and 1.
    """
    held = entries(graph)
    key = matrix_key(graph)
    if key is None:
        found = held.get(EDGE_INDEX)
        if found is None:
            pairs = [v for v in held.values() if _looks_like_edges(v)]
            found = pairs[0] if len(pairs) == 1 else None
        if not isinstance(found, Tensor) or not _looks_like_edges(found):
            raise ValueError(
                "Expected a graph with edge_index [2, edges] or an adjacency matrix (adj), got the "
                f"keys {list(held)}."
            )
        return found
    matrix = held[key]
    sparse = matrix if matrix.layout == torch.sparse_coo else matrix.to_sparse_coo()
    sparse = sparse.coalesce()
    if not bool((sparse.values() == 1).all()):
        raise ValueError(
            f"The adjacency matrix {key!r} has other values than 0 and 1, so what an edit of its "
            "edges would change is not known: a normalisation depends on the degrees. Give the "
            "plain matrix and normalise it in the module."
        )
    return sparse.indices()


def num_nodes(graph: object) -> int:
    """How many nodes it has: the length of what belongs to nodes.

    Raises:
        ValueError: nothing tells.
    """
    held = entries(graph)
    key = matrix_key(graph)
    if key is not None:
        return len(held[key])
    count = held.get("num_nodes")
    if isinstance(count, int):
        return count
    mask = find_mask(graph)
    for name in ("x", mask, "y"):
        if name is not None and isinstance(held.get(name), Tensor):
            return len(held[name])
    raise ValueError(f"The number of nodes is not known of a graph with the keys {list(held)}.")


def with_edges(graph: Any, edges: Tensor, kept: Tensor | None = None) -> Any:
    """The graph with other edges.

    Args:
        edges: [2, edges].
        kept: for each of them its position among those before, -1 for a new one; None: all are as
            they were, in their order. What the graph holds of edges (``edge_weight``,
            ``edge_attr``) goes with them.

    Raises:
        ValueError: a new edge, where the graph holds weights or attributes of edges.
    """
    held, key = entries(graph), matrix_key(graph)
    if key is not None:
        return with_entries(graph, {key: matrix_like(held[key], edges, num_nodes(graph))})
    old = edge_index(graph)
    (name,) = [name for name, value in held.items() if value is old]
    changes: dict[Key, object] = {name: edges}
    for own, value in held.items():
        if kept is not None and of_edges(own, value, old.shape[1], num_nodes(graph)):
            if bool((kept < 0).any()):
                raise ValueError(
                    f"The graph holds {own!r} of its edges, which a new edge has not got."
                )
            changes[own] = value[kept]
    return with_entries(graph, changes)


def _square(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == value.shape[1] > 2


def _looks_like_edges(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype == torch.int64
        and value.dim() == 2
        and len(value) == 2
    )


def of_edges(key: Key, value: object, count: int, nodes: int) -> bool:
    """Whether an entry has a row for each of ``count`` edges, in a graph of ``nodes``."""
    if not isinstance(value, Tensor) or not value.dim() or key == EDGE_INDEX:
        return False
    named = isinstance(key, str) and key.startswith("edge_")
    return len(value) == count and (named or count != nodes)


def of_nodes(value: object, count: int) -> bool:
    """Whether an entry has a row for each of ``count`` nodes."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == count


def matrix_like(matrix: Tensor, edges: Tensor, count: int) -> Tensor:
    """The plain adjacency matrix of edges between ``count`` nodes, in the layout of another."""
    ones = torch.ones(edges.shape[1], dtype=matrix.dtype, device=matrix.device)
    sparse = torch.sparse_coo_tensor(edges, ones, (count, count)).coalesce()
    if matrix.layout == torch.strided:
        return sparse.to_dense()
    return sparse if matrix.layout == torch.sparse_coo else sparse.to_sparse(layout=matrix.layout)
