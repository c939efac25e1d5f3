"""Small graphs, models of plain torch on them, and recorded runs: one whole graph is the batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning import Trajectory, TrajectoryRecorder
from tests.attributing import quiet

NODES, FEATURES, CLASSES = 36, 5, 3


def random_graph(form: str = "edge_index", nodes: int = NODES, edges: int = 45) -> dict[str, Any]:
    """An undirected graph with features, labels and disjoint masks; its edges as an ``edge_index``
    or as a ``dense`` or ``sparse`` adjacency matrix."""
    own = torch.Generator().manual_seed(3)
    ends = torch.randint(0, nodes, (2, edges), generator=own)
    ends = ends[:, ends[0] != ends[1]]
    index = torch.cat([ends, ends.flip(0)], 1).unique(dim=1)
    order = torch.randperm(nodes, generator=own)
    masks = torch.zeros(2, nodes, dtype=torch.bool)
    masks[0, order[:14]] = True
    masks[1, order[14:24]] = True
    graph: dict[str, Any] = {
        "x": torch.randn(nodes, FEATURES, generator=own, dtype=torch.float64),
        "y": torch.randint(0, CLASSES, (nodes,), generator=own),
        "train_mask": masks[0],
        "val_mask": masks[1],
    }
    if form == "edge_index":
        return {**graph, "edge_index": index}
    ones = torch.ones(index.shape[1], dtype=torch.float64)
    adjacency = torch.sparse_coo_tensor(index, ones, (nodes, nodes)).coalesce()
    return {**graph, "adj": adjacency.to_dense() if form == "dense" else adjacency}


def propagate(graph: dict[str, Any], values: Tensor) -> Tensor:
    """D^-1/2 (A + I) D^-1/2 values, in any form of the graph."""
    if "edge_index" in graph:
        source, target = graph["edge_index"]
        degrees = torch.ones(len(values), dtype=values.dtype).index_add(
            0, target, torch.ones(len(target), dtype=values.dtype)
        )
        scale = degrees.rsqrt()[:, None]
        scaled = scale * values
        return scale * (scaled + torch.zeros_like(values).index_add(0, target, scaled[source]))
    adjacency = graph["adj"]
    ones = torch.ones(len(values), 1, dtype=values.dtype)
    product: Callable[[Tensor], Tensor] = (
        (lambda v: torch.sparse.mm(adjacency, v))
        if adjacency.is_sparse
        else (lambda v: adjacency @ v)
    )
    scale = (product(ones) + 1).rsqrt()
    scaled = scale * values
    return scale * (scaled + product(scaled))


class GCN(LightningModule):
    """Two graph convolutions; the loss is the mean over the masked nodes."""

    def __init__(self, rate: float = 0.5, decay: float = 0.01, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 4), nn.Linear(4, CLASSES)
        self.rate, self.decay, self.dropout = rate, decay, dropout

    def forward(self, graph: dict[str, Any]) -> Tensor:
        hidden = torch.tanh(propagate(graph, self.first(graph["x"])))
        hidden = F.dropout(hidden, self.dropout, self.training)
        return propagate(graph, self.second(hidden))

    def training_step(self, graph: dict[str, Any]) -> Tensor:
        mask = graph["train_mask"]
        return F.cross_entropy(self(graph)[mask], graph["y"][mask])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate, weight_decay=self.decay)


class SGC(GCN):
    """One linear layer on features that are propagated twice: its loss is convex."""

    def __init__(self, rate: float = 0.5, decay: float = 0.01) -> None:
        super().__init__(rate, decay)
        del self.first, self.second
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, graph: dict[str, Any]) -> Tensor:
        return self.linear(propagate(graph, propagate(graph, graph["x"])))


def loader_of(graph: object) -> DataLoader[Any]:
    """A loader whose only batch is the graph."""
    return DataLoader([graph], batch_size=1, collate_fn=_only)  # type: ignore[arg-type]


def _only(items: list[object]) -> object:
    return items[0]


def train_on(
    graph: object, module: LightningModule, steps: int = 8, checkpoints: int = 2
) -> Trajectory:
    """The recorded run of so many full-batch steps in float64."""
    folder = tempfile.mkdtemp()
    recorder = TrajectoryRecorder(f"{folder}/run", num_checkpoints=checkpoints)
    quiet(max_epochs=steps, callbacks=[recorder]).fit(module.double(), loader_of(graph))
    return Trajectory.load(f"{folder}/run")
