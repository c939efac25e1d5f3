"""Nodes of one graph as the examples of a batch: the graph, and which of its nodes are meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tda_lightning.runtime.graphs import Key, num_nodes, with_entries


@dataclass(frozen=True)
class NodeBatch:
    """Some nodes of a graph, each an example. The whole graph is needed for any of them.

    Attributes:
        graph: as the loader gives it.
        nodes: their ids, int64 [batch].
        mask: key of the boolean vector by which a ``training_step`` chooses its nodes; None where
            the task chooses them itself.
    """

    graph: Any
    nodes: Tensor
    mask: Key | None = None

    def __len__(self) -> int:
        return len(self.nodes)

    def as_graph(self) -> Any:
        """The graph whose mask selects these nodes and no others: what a ``training_step`` is
        given, so that its loss is that of these nodes.

        Raises:
            ValueError: the nodes are not in increasing order, in which a mask selects them.
        """
        if self.mask is None:
            return self.graph
        if bool((self.nodes.diff() <= 0).any()):
            raise ValueError(
                "A mask selects nodes in increasing order, each once; got "
                f"{self.nodes[:10].tolist()}. Sort them."
            )
        mask = torch.zeros(num_nodes(self.graph), dtype=torch.bool, device=self.nodes.device)
        mask[self.nodes] = True
        return with_entries(self.graph, {self.mask: mask})

    def take(self, index: int) -> NodeBatch:
        """The node at ``index`` alone."""
        return replace(self, nodes=self.nodes[index : index + 1])


class Nodes(Dataset[NodeBatch]):
    """Nodes of one graph as a data set, such as ``query=Nodes(data, data.val_mask)``.

    Args:
        graph: a dictionary, a tuple, an object, or a ``Data`` of torch_geometric.
        chosen: which nodes: a boolean mask [nodes], or ids. With ``task=None`` ids must increase.
        mask: key of the mask by which a ``training_step`` chooses its nodes; an attribution gives
            it its own.

    Raises:
        ValueError: it selects no node, or one that the graph has not got.
    """

    def __init__(self, graph: Any, chosen: Tensor | Sequence[int], mask: Key | None = None) -> None:
        self.graph = graph
        self.mask = mask
        self.nodes = node_ids(chosen, num_nodes(graph), "chosen")

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, positions: int | Sequence[int]) -> NodeBatch:
        index = torch.as_tensor(positions, dtype=torch.int64, device=self.nodes.device)
        return NodeBatch(self.graph, self.nodes[index.reshape(-1)], self.mask)


def node_ids(chosen: Tensor | Sequence[int], count: int, name: str) -> Tensor:
    """The nodes that a mask or a list of ids selects, int64.

    Raises:
        ValueError: none, or one outside the graph, or a mask of another length.
    """
    given = torch.as_tensor(chosen)
    if given.dtype == torch.bool:
        if given.shape != (count,):
            raise ValueError(
                f"{name} must be a boolean vector of the {count} nodes, got {list(given.shape)}."
            )
        given = given.nonzero().squeeze(1)
    if given.dim() != 1 or given.is_floating_point():
        raise ValueError(f"{name} must be a mask of nodes or their ids, got {list(given.shape)}.")
    if not len(given):
        raise ValueError(f"{name} selects no node: there is nothing to attribute.")
    given = given.to(torch.int64)
    if int(given.min()) < 0 or int(given.max()) >= count:
        raise ValueError(
            f"{name} names node {int(given.max() if given.min() >= 0 else given.min())}; expected "
            f"0 to {count - 1}."
        )
    return given
