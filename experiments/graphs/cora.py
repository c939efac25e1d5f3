"""Cora as one graph, the models that are trained on it, and training them, recorded or plainly."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning import TrajectoryRecorder

Graph = dict[str, Any]
CLASSES = 7


def load(root: str, components: int | None, dtype: torch.dtype = torch.float32) -> Graph:
    """Cora with its public split; features divided by their sums, and reduced to the first
    principal ``components`` (scaled to the length of the raw ones); None: all 1433."""
    with np.load(Path(root) / "cora" / "cora.npz") as file:
        held = {name: file[name] for name in file.files}
    parts = held["x_data"], held["x_indices"], held["x_indptr"]
    features = csr_matrix(parts, shape=tuple(held["x_shape"])).toarray().astype(np.float64)
    features /= np.maximum(features.sum(1, keepdims=True), 1e-12)
    if components is not None:
        values, vectors = np.linalg.eigh(features.T @ features)
        features = features @ vectors[:, np.argsort(values)[::-1][:components]]
    features *= 1 / np.linalg.norm(features, axis=1).mean()
    edges = torch.from_numpy(held["edges"].T.copy())
    graph: Graph = {
        "x": torch.from_numpy(features).to(dtype),
        "y": torch.from_numpy(held["y"]),
        "edge_index": torch.cat([edges, edges.flip(0)], 1).unique(dim=1),
    }
    for name in ("train", "val", "test"):
        mask = torch.zeros(len(features), dtype=torch.bool)
        mask[torch.from_numpy(held[f"{name}_idx"])] = True
        graph[f"{name}_mask"] = mask
    return graph


def propagate(edges: Tensor, values: Tensor) -> Tensor:
    """D^-1/2 (A + I) D^-1/2 values."""
    source, target = edges
    ones = torch.ones(len(target), dtype=values.dtype)
    scale = torch.ones(len(values), dtype=values.dtype).index_add(0, target, ones).rsqrt()[:, None]
    scaled = scale * values
    return scale * (scaled + torch.zeros_like(values).index_add(0, target, scaled[source]))


class NodeModel(LightningModule):
    """Full-batch training on the masked nodes."""

    def __init__(self, rate: float, decay: float, adam: bool) -> None:
        super().__init__()
        self.rate, self.decay, self.adam = rate, decay, adam

    def training_step(self, graph: Graph) -> Tensor:
        mask = graph["train_mask"]
        return F.cross_entropy(self(graph)[mask], graph["y"][mask])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.adam:
            return torch.optim.Adam(self.parameters(), self.rate, weight_decay=self.decay)
        return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9, weight_decay=self.decay)


class SGC(NodeModel):
    """Softmax regression on features that are propagated twice (Wu et al. 2019)."""

    def __init__(self, width: int, decay: float) -> None:
        super().__init__(2.0, decay, adam=False)
        self.linear = nn.Linear(width, CLASSES, bias=False)

    def forward(self, graph: Graph) -> Tensor:
        edges = graph["edge_index"]
        return propagate(edges, propagate(edges, self.linear(graph["x"])))


class Layers(NodeModel):
    """Two layers of torch_geometric: GCN, GAT or GIN."""

    def __init__(self, kind: str, width: int, hidden: int = 16, decay: float = 5e-3) -> None:
        super().__init__(0.01, decay, adam=True)
        from torch_geometric.nn import GATConv, GCNConv, GINConv

        if kind == "GCN":
            self.first, self.second = GCNConv(width, hidden), GCNConv(hidden, CLASSES)
        elif kind == "GAT":
            self.first = GATConv(width, hidden // 4, heads=4)
            self.second = GATConv(hidden, CLASSES)
        else:
            self.first = GINConv(nn.Linear(width, hidden))
            self.second = GINConv(nn.Linear(hidden, CLASSES))

    def forward(self, graph: Graph) -> Tensor:
        hidden = F.elu(self.first(graph["x"], graph["edge_index"]))
        return self.second(hidden, graph["edge_index"])


def loader_of(graph: Graph) -> DataLoader[Any]:
    """A loader whose only batch is the graph."""
    return DataLoader([graph], batch_size=1, collate_fn=lambda items: items[0])  # type: ignore[arg-type]


def record(module: NodeModel, graph: Graph, steps: int, folder: Path) -> str:
    """Train under the recorder; the folder of the run."""
    shutil.rmtree(folder, ignore_errors=True)
    recorder = TrajectoryRecorder(str(folder), num_checkpoints=2)
    Trainer(
        max_epochs=steps,
        callbacks=[recorder],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader_of(graph))
    return str(folder)


def train_again(
    module: NodeModel,
    initial: Mapping[str, Tensor],
    graph: Graph,
    nodes: Tensor,
    denominator: int,
    steps: int,
) -> NodeModel:
    """The same training on another graph and other training nodes, whose summed losses are divided
    by ``denominator``: what is removed has weight 0."""
    again = copy.deepcopy(module)
    again.load_state_dict(dict(initial))
    optimizer = again.configure_optimizers()
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = again(graph)[nodes]
        loss = F.cross_entropy(outputs, graph["y"][nodes], reduction="sum") / denominator
        loss.backward()
        optimizer.step()
    return again


@torch.no_grad()
def node_losses(module: nn.Module, graph: Graph, nodes: Tensor) -> Tensor:
    """Cross entropy of some nodes."""
    return F.cross_entropy(module(graph)[nodes], graph["y"][nodes], reduction="none")


@torch.no_grad()
def accuracy(module: nn.Module, graph: Graph, nodes: Tensor) -> float:
    """Share of some nodes that are classified right."""
    return float((module(graph)[nodes].argmax(1) == graph["y"][nodes]).float().mean())


def ids(graph: Graph, split: str) -> Tensor:
    """Nodes of a split."""
    return graph[f"{split}_mask"].nonzero().squeeze(1)
