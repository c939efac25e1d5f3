"""Weights moved by the predicted change, against the dense formula and against training again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule
from tda_lightning.edits import Relabel, Removal, RemoveEdges, RemoveFeatures, RemoveNodes
from tda_lightning.estimators import InfluenceFunction, TracIn
from tda_lightning.evaluation import accuracy, compare_unlearned
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.solvers import ConjugateGradients
from tda_lightning.tasks import NodeTask, RegressionTask
from tests.attributing import CaseTask, relative
from tests.cases.graphs import SGC, loader_of, random_graph, train_on
from tests.cases.training import CLASSIFIER, OPTIMIZERS, train

DECAY, DAMPING = 0.05, 0.01
SOLVER = ConjugateGradients(curvature="gauss_newton", tolerance=1e-13, iterations=300)
EXACT = {
    "dense": InfluenceFunction("exact", damping=DAMPING),
    "solver": InfluenceFunction(damping=DAMPING, solver=SOLVER),
}


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.fixture(scope="module")
def run() -> Any:
    torch.manual_seed(0)
    graph, module = random_graph(), SGC(rate=1.0, decay=DECAY)
    return graph, module, train_on(graph, module, steps=150, checkpoints=1)


def optimum(module: SGC, graph: Any, nodes: Tensor) -> Tensor:
    """Where training on some nodes ends, with 14 for a denominator, by Newton's method."""
    weights = flat(module).clone()
    shapes = [(p.numel(), p.shape) for p in module.parameters()]
    names = [name for name, _ in module.named_parameters()]

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([size for size, _ in shapes])
        own = {n: part.view(s) for n, part, (_, s) in zip(names, parts, shapes, strict=True)}
        outputs = torch.func.functional_call(module, own, (graph,))[nodes]
        total = F.cross_entropy(outputs, graph["y"][nodes], reduction="sum") / 14
        return total + DECAY / 2 * vector.square().sum()

    for _ in range(20):
        step = torch.linalg.solve(torch.func.hessian(loss)(weights), torch.func.grad(loss)(weights))
        weights = weights - step
    return weights


@pytest.mark.parametrize("name", EXACT)
def test_edits_of_a_graph_move_the_weights_as_the_formula_says(name: str, run: Any) -> None:
    graph, module, trajectory = run
    edges = [tuple(e) for e in graph["edge_index"].T.tolist() if e[0] < e[1]]
    train = graph["train_mask"].nonzero().squeeze(1)
    edits = [RemoveEdges(edges[2:5]), RemoveNodes([int(train[4])])]
    moved = AttributionModule(module, trajectory, EXACT[name]).unlearned(loader_of(graph), edits)
    before = flat(module)
    changed = edits[1].applied(edits[0].applied(graph))
    left = train[train != train[4]]

    def gradient(own: Any, nodes: Tensor) -> Tensor:
        total = F.cross_entropy(module(own)[nodes], own["y"][nodes], reduction="sum")
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, module.parameters())])

    delta = gradient(graph, train) - gradient(changed, left)

    def loss(vector: Tensor) -> Tensor:
        own = {"linear.weight": vector[:15].view(3, 5), "linear.bias": vector[15:]}
        outputs = torch.func.functional_call(module, own, (graph,))[train]
        return F.cross_entropy(outputs, graph["y"][train])

    # The loss of a linear model: its Hessian is its Gauss-Newton matrix.
    matrix = torch.func.hessian(loss)(before)
    matrix += (DECAY + DAMPING) * torch.eye(18, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, delta) / 14
    assert relative(flat(moved) - before, expected) < 1e-8


def test_unlearned_weights_come_close_to_those_of_training_again(run: Any) -> None:
    graph, module, trajectory = run
    train = graph["train_mask"].nonzero().squeeze(1)
    edit = RemoveFeatures([0], columns=[2])  # a small change: the formula is its limit
    estimator = InfluenceFunction("exact", damping=0.0)
    attribution = AttributionModule(module, trajectory, estimator, NodeTask())
    moved = attribution.unlearned(loader_of(graph), [edit])
    again = SGC().double()
    torch.nn.utils.vector_to_parameters(
        optimum(module, edit.applied(graph), train), again.parameters()
    )
    held_out = graph["val_mask"].nonzero().squeeze(1)
    report = compare_unlearned(
        module,
        moved,
        again,
        {"loss": lambda own: float(F.cross_entropy(own(graph)[held_out], graph["y"][held_out]))},
        seconds=(1.0, 3.0),
    )
    assert report.recovered > 0.95
    before, after, wanted = report.measures["loss"]
    assert abs(after - wanted) < 0.5 * abs(before - wanted)
    assert report.speedup == 3.0
    assert report.rows()[0][0] == "distance to the retrained weights"


@pytest.mark.parametrize("name", EXACT)
def test_removals_in_any_model(name: str) -> None:
    trajectory, module, data = train(CLASSIFIER, OPTIMIZERS["momentum"], checkpoints=(3, 6, 9))
    module.load_state_dict({**trajectory.checkpoints[9].parameters})
    task = CaseTask("classification")
    dataset = TensorDataset(*data)
    attribution = AttributionModule(module, trajectory, EXACT[name], task)
    moved = attribution.unlearned(dataset, [Removal(2), Removal(7), Relabel(4, 1 - data[1][4])])
    before = flat(module)
    alone = [
        flat(attribution.unlearned(dataset, [edit])) - before
        for edit in (Removal(2), Removal(7), Relabel(4, 1 - data[1][4]))
    ]
    assert relative(flat(moved) - before, torch.stack(alone).sum(0)) < 1e-8
    scores = attribution.attribute(dataset, dataset, edits=[Removal(2)])
    gradients = []
    for inputs, label in zip(*data, strict=True):
        loss = task.train_loss(module, (inputs[None], label[None])).sum()
        found = torch.autograd.grad(loss, module.parameters())
        gradients.append(torch.cat([g.flatten() for g in found]))
    assert relative(torch.stack(gradients) @ alone[0], scores.values[:, 0]) < 1e-8


def test_what_cannot_be_unlearned_is_refused(run: Any) -> None:
    graph, module, trajectory = run
    with pytest.raises(UnsupportedTrainingError, match="moves the weights of one run by Influence"):
        AttributionModule(module, trajectory, TracIn()).unlearned(loader_of(graph), [Removal(0)])
    attribution = AttributionModule(module, trajectory, EXACT["dense"])
    with pytest.raises(ValueError, match="edits is empty"):
        attribution.unlearned(loader_of(graph), [])
    with pytest.raises(ValueError, match="the same parameters"):
        compare_unlearned(module, module, nn.Linear(2, 2), {})


def test_accuracy_counts_the_labels_that_lead() -> None:
    trajectory, classifier, data = train(CLASSIFIER, OPTIMIZERS["momentum"], checkpoints=(9,))
    classifier.load_state_dict({**trajectory.checkpoints[9].parameters})
    with torch.no_grad():
        expected = float((classifier(data[0]).argmax(1) == data[1]).double().mean())
    found = accuracy(classifier, CaseTask("classification"), TensorDataset(*data))
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0 < expected < 1
    numbers = TensorDataset(data[0], torch.zeros(len(data[0]), 1, dtype=torch.float64))
    regression = nn.Linear(data[0].shape[1], 1).double()
    assert accuracy(regression, RegressionTask(), numbers) is None
