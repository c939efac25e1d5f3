"""Layers of torch_geometric: gradients of single nodes and graphs against autograd, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda_lightning.edits import RemoveEdges
from tda_lightning.gradients import GradientEngine
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.session.edited_graphs import same_graph
from tda_lightning.tasks import GraphTask, NodeBatch, NodeTask
from tests.attributing import relative
from tests.cases.graphs import random_graph

pytest.importorskip("torch_geometric")
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import (
    GATConv,
    GCNConv,
    GINConv,
    SAGEConv,
    SGConv,
    global_mean_pool,
)

LAYERS = {
    "GCN": lambda i, o: GCNConv(i, o),
    "GAT": lambda i, o: GATConv(i, o, heads=2, concat=False),
    "SAGE": lambda i, o: SAGEConv(i, o),
    "GIN": lambda i, o: GINConv(nn.Sequential(nn.Linear(i, 4), nn.Tanh(), nn.Linear(4, o))),
    "SGC": lambda i, o: SGConv(i, o, K=2),
}


class Net(nn.Module):
    def __init__(self, kind: str, pooled: bool = False) -> None:
        super().__init__()
        self.first, self.second = LAYERS[kind](5, 4), LAYERS[kind](4, 3)
        self.pooled = pooled

    def forward(self, data: Any) -> Tensor:
        hidden = self.first(data.x, data.edge_index).tanh()
        outputs = self.second(hidden, data.edge_index)
        return global_mean_pool(outputs, data.batch) if self.pooled else outputs


def flat(gradients: Any, blocks: Any) -> Tensor:
    named = {}
    for block in blocks:
        named |= block.tensors(gradients[block.name].dense(slice(None)))
    return torch.cat([named[name].flatten(1) for name in sorted(named)], 1)


def one_by_one(module: nn.Module, losses: list[Tensor]) -> Tensor:
    names = sorted(dict(module.named_parameters()))
    rows = []
    for loss in losses:
        parameters = [module.get_parameter(name) for name in names]
        found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_single_nodes(kind: str) -> None:
    torch.manual_seed(0)
    data, module = Data(**random_graph()), Net(kind).double()
    nodes = data.train_mask.nonzero().squeeze(1)
    batch, task = NodeBatch(data, nodes), NodeTask()
    engine = GradientEngine(module, [name for name, _ in module.named_parameters()])
    examples = torch.arange(len(nodes))

    def loss(own: nn.Module, part: Any, _: Tensor) -> Tensor:
        return task.train_loss(own, part)

    assert max(engine.discover(loss, batch, examples).values()) < 1e-10
    found = engine.gradients(loss, batch, examples).blocks
    outputs = module(data)
    expected = one_by_one(module, [F.cross_entropy(outputs[n], data.y[n]) for n in nodes])
    assert relative(flat(found, engine.blocks), expected) < 1e-10


@pytest.mark.parametrize("kind", ["GCN", "GIN"])
def test_gradients_of_single_graphs(kind: str) -> None:
    torch.manual_seed(0)
    graphs = [
        Data(
            x=torch.randn(4 + number % 3, 5, dtype=torch.float64),
            edge_index=torch.randint(0, 4 + number % 3, (2, 8)),
            y=torch.tensor([number % 3]),
        )
        for number in range(6)
    ]
    module, task = Net(kind, pooled=True).double(), GraphTask()
    source = ExampleSource.of(DataLoader(graphs, batch_size=6), 6, "training").checked(module)
    examples = torch.arange(6)
    batch = source.batch(examples, module)
    engine = GradientEngine(module, [name for name, _ in module.named_parameters()])

    def loss(own: nn.Module, part: Any, _: Tensor) -> Tensor:
        return task.train_loss(own, part)

    assert max(engine.discover(loss, batch, examples).values()) < 1e-10
    found = engine.gradients(loss, batch, examples).blocks
    alone = list(DataLoader(graphs, batch_size=1))
    expected = one_by_one(module, [F.cross_entropy(module(one), one.y) for one in alone])
    assert relative(flat(found, engine.blocks), expected) < 1e-10


def test_edits_of_data() -> None:
    data = Data(**random_graph())
    edge = tuple(data.edge_index[:, 0].tolist())
    edited = RemoveEdges([edge]).applied(data)
    assert isinstance(edited, Data)
    assert edited.edge_index.shape[1] == data.edge_index.shape[1] - 2
    assert edited.x is data.x
    assert same_graph(data, Data(**random_graph()))
    assert not same_graph(data, edited)


def test_another_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="loss must be one of cross_entropy, mse, bce"):
        GraphTask(loss="hinge")
    with pytest.raises(ValueError, match="loss must be one of cross_entropy, mse, bce"):
        NodeTask(loss="hinge")
