"""Edits of the graph of models of torch_geometric: the parts that are looked at against the whole
graph, in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.edits import AddEdges, GraphEditSet, RemoveEdges, RemoveFeatures, RemoveNodes
from tda_lightning.gradients import GradientEngine
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.session.edited_graphs import edit_gradients
from tda_lightning.session.reached_nodes import Reached, in_groups, losses_of
from tda_lightning.tasks import Nodes, NodeTask
from tests.attributing import relative
from tests.tasks.test_graph_layers import LAYERS, Net

Data = pytest.importorskip("torch_geometric.data").Data

COUNT = 400


def sparse_graph() -> Any:
    """Few edges for many nodes, so that parts are small; one hub; directed edges, loops and an edge
    that is there twice."""
    own = torch.Generator().manual_seed(5)
    ring = torch.stack([torch.arange(COUNT), (torch.arange(COUNT) + 1) % COUNT])
    hub = torch.stack([torch.full((12,), 3), torch.randperm(COUNT, generator=own)[:12]])
    both = torch.cat([ring, hub], 1)
    one_way = torch.tensor([[10, 40, 60, 7, 20, 50], [12, 70, 20, 7, 21, 50]])
    edges = torch.cat([both, both.flip(0), one_way], 1)
    return Data(
        x=torch.randn(COUNT, 5, generator=own, dtype=torch.float64),
        y=torch.randint(0, 3, (COUNT,), generator=own),
        edge_index=edges,
        train_mask=torch.rand(COUNT, generator=own) < 0.5,
    )


EDITS = [
    RemoveEdges([(20, 21)]),  # of which one direction is there twice
    RemoveEdges([(20, 21)], directed=True),
    RemoveEdges([(10, 12)], directed=True),
    RemoveEdges([(7, 7), (3, 4)]),
    AddEdges([(15, 55), (56, 58)]),
    AddEdges([(8, 8)]),
    AddEdges([(12, 10)], directed=True),
    RemoveNodes([3]),
    RemoveNodes([42, 80]),
    RemoveFeatures([30]),
]


@pytest.mark.parametrize("kind", LAYERS)
def test_parts_of_the_graph_give_the_gradients_and_losses_of_the_whole(kind: str) -> None:
    torch.manual_seed(0)
    data, module, task = sparse_graph(), Net(kind).double(), NodeTask()
    nodes = Nodes(data, data.train_mask)
    batch = nodes[range(len(nodes))]
    engine = GradientEngine(module, [name for name, _ in module.named_parameters()])

    def loss(own: nn.Module, part: Any, _: Tensor) -> Tensor:
        return task.train_loss(own, part)

    engine.discover(loss, batch, torch.arange(len(nodes)))
    source = ExampleSource.of(DataLoader(nodes, batch_size=len(nodes)), len(nodes), "training")
    edited = GraphEditSet(EDITS, source)[range(len(EDITS))]
    session: Any = SimpleNamespace(
        module=module, engine=engine, blocks=engine.blocks, device=torch.device("cpu"),
        dtype=torch.float64, train_loss=loss,
    )  # fmt: skip
    found = edit_gradients(session, edited).blocks
    assert not edited.edits.whole
    named = {}
    for block in engine.blocks:
        named |= block.tensors(found[block.name].dense(slice(None)))
    parameters = dict(module.named_parameters())

    def total(graph: Any, left: Tensor) -> Tensor:
        summed = F.cross_entropy(module(graph)[left], data.y[left], reduction="sum")
        gradients = torch.autograd.grad(summed, list(parameters.values()), allow_unused=True)
        each = zip(gradients, parameters.values(), strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in each])

    before = total(data, nodes.nodes)
    for number, edit in enumerate(EDITS):
        left = nodes.nodes[~torch.isin(nodes.nodes, edit.removed())]
        expected = before - total(edit.applied(data), left)
        own = torch.cat([named[name][number].flatten() for name in parameters])
        scale = max(expected.norm(), 1e-6 * before.norm())  # some edits change nothing
        assert (own - expected).norm() < 1e-9 * scale
    reached = [Reached(edited, number) for number in range(len(EDITS))]
    assert sum(one.inside is not None for one in reached) >= 5  # parts, and not copies of all
    for group in in_groups(reached):
        sides = [one.changed(one.after) for one in group]
        losses = losses_of(module, loss, sides, torch.arange(len(nodes)))
        for one, values in zip(group, losses, strict=True):
            kept = nodes.nodes[one.after]
            outputs = module(EDITS[one.column].applied(data)).detach()[kept]
            expected = F.cross_entropy(outputs, data.y[kept], reduction="none")
            assert relative(values.detach(), expected) < 1e-9
