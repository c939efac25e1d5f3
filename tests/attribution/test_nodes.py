"""Runs on one whole graph: a column for each training node, against autograd node by node."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from tda_lightning import AttributionModule, Trajectory
from tda_lightning.estimators import (
    FastInfluence,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
)
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.solvers import ConjugateGradients
from tda_lightning.tasks import ClassificationTask, Nodes, NodeTask
from tests.attributing import relative
from tests.cases.graphs import GCN, SGC, loader_of, random_graph, train_on

FORMS = ("edge_index", "dense", "sparse")


@pytest.fixture(scope="module")
def run() -> tuple[dict[str, Any], GCN, Trajectory]:
    torch.manual_seed(0)
    graph, module = random_graph(), GCN()
    return graph, module, train_on(graph, module)


def node_gradients(module: GCN, graph: Any, nodes: Tensor) -> Tensor:
    """Gradients of single nodes' losses by plain autograd, [node, parameters]."""
    rows = []
    for node in nodes.tolist():
        loss = F.cross_entropy(module(graph)[node : node + 1], graph["y"][node : node + 1])
        found = torch.autograd.grad(loss, list(module.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def attribute(run: Any, estimator: Any, task: Any = None, **options: Any) -> Any:
    graph, module, trajectory = run
    query = options.pop("query", Nodes(graph, graph["val_mask"]))
    attribution = AttributionModule(module, trajectory, estimator, task)
    return attribution.attribute(loader_of(graph), query, **options)


def at(module: GCN, trajectory: Trajectory, step: int) -> GCN:
    module.load_state_dict({**trajectory.checkpoints[step].parameters})
    return module.eval()


def test_an_unchanged_step_has_a_column_for_each_training_node(run: Any) -> None:
    graph, module, trajectory = run
    scores = attribute(run, TracIn())
    expected = torch.zeros(10, 14, dtype=torch.float64)
    for step, rate in ((4, 2.0), (8, 2.0)):
        at(module, trajectory, step)
        train = node_gradients(module, graph, graph["train_mask"].nonzero().squeeze(1))
        query = node_gradients(module, graph, graph["val_mask"].nonzero().squeeze(1))
        expected += rate * query @ train.T / 14
    assert relative(scores.values, expected) < 1e-10


def test_influence_functions_are_those_of_the_dense_matrix(run: Any) -> None:
    graph, module, trajectory = run
    at(module, trajectory, 8)
    parameters = list(module.parameters())
    nodes = graph["train_mask"].nonzero().squeeze(1)
    outputs = module(graph)[nodes]
    chances = outputs.detach().softmax(1)
    jacobian = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(o, parameters, retain_graph=True)])
            for o in outputs.flatten()
        ]
    ).view(14, 3, -1)
    curved = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
    matrix = torch.einsum("nap,nab,nbq->pq", jacobian, curved, jacobian) / 14
    matrix += (0.01 + 0.1) * torch.eye(len(matrix), dtype=torch.float64)
    train = node_gradients(module, graph, nodes)
    query = node_gradients(module, graph, graph["val_mask"].nonzero().squeeze(1))
    expected = query @ torch.linalg.solve(matrix, train.T) / 14
    solver = ConjugateGradients(curvature="gauss_newton", tolerance=1e-12, iterations=300)
    for estimator in (
        InfluenceFunction("exact", damping=0.1),
        InfluenceFunction("exact", damping=0.1, solver=solver),
    ):
        assert relative(attribute(run, estimator).values, expected) < 1e-8


ESTIMATORS = {
    "ekfac": InfluenceFunction(),
    "source": Source(2, curvature="exact"),
    "source recorded": Source(2, order="recorded"),
    "unrolled": Unrolled(),
    "fastif": FastInfluence(k=4),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_node_task_is_the_unchanged_step(name: str, run: Any) -> None:
    own = attribute(run, ESTIMATORS[name])
    written = attribute(run, ESTIMATORS[name], NodeTask())
    assert own.values.shape == (10, 14)
    assert relative(own.values.nan_to_num(), written.values.nan_to_num()) < 1e-9


def test_unrolling_is_the_derivative_of_the_run(run: Any) -> None:
    graph, module, trajectory = run
    nodes = graph["train_mask"].nonzero().squeeze(1)
    weights = torch.ones(14, dtype=torch.float64, requires_grad=True)
    values = {
        n: v.clone().requires_grad_() for n, v in trajectory.checkpoints[0].parameters.items()
    }
    for _ in range(8):
        outputs = torch.func.functional_call(module, values, (graph,))
        losses = F.cross_entropy(outputs[nodes], graph["y"][nodes], reduction="none")
        total = (weights * losses).mean()
        found = torch.autograd.grad(total, list(values.values()), create_graph=True)
        values = {
            n: v - 0.5 * (g + 0.01 * v) for (n, v), g in zip(values.items(), found, strict=True)
        }
    outputs = torch.func.functional_call(module, values, (graph,))
    queries = graph["val_mask"].nonzero().squeeze(1)
    measured = F.cross_entropy(outputs[queries], graph["y"][queries], reduction="none")
    expected = -torch.stack(
        [torch.autograd.grad(m, weights, retain_graph=True)[0] for m in measured]
    )
    assert relative(attribute(run, Unrolled()).values, expected) < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_graph_serves(form: str, run: Any) -> None:
    graph = random_graph(form)
    expected = attribute(run, TracIn()).values
    other = graph, run[1], _unfingerprinted(run[2])
    scores = attribute(other, TracIn(), NodeTask())
    assert relative(scores.values, expected) < 1e-10


def test_a_masked_sum_and_a_penalty_are_taken_apart() -> None:
    """The loss is masked by a product, and a penalty on the weights stands beside it."""

    class Masked(GCN):
        def training_step(self, graph: Any) -> Tensor:
            losses = F.cross_entropy(self(graph), graph["y"], reduction="none")
            mask = graph["train_mask"]
            penalty = sum(p.square().sum() for p in self.parameters())
            return (losses * mask).sum() / mask.sum() + 0.005 * penalty

    torch.manual_seed(0)
    graph, module = random_graph(), Masked(decay=0.0)
    trajectory = train_on(graph, module)
    torch.manual_seed(0)
    plain = GCN()
    expected = attribute((graph, plain, train_on(graph, plain)), TracIn())
    assert relative(attribute((graph, module, trajectory), TracIn()).values, expected.values) < 1e-9


def test_columns_are_nodes_and_not_positions_of_their_list(run: Any) -> None:
    """A published mistake: ids of nodes drawn as positions in the list of training nodes."""
    scores = attribute(run, TracIn())
    graph = run[0]
    assert scores.provenance["nodes"]["train"] == graph["train_mask"].nonzero().flatten().tolist()
    assert scores.provenance["nodes"]["query"] == graph["val_mask"].nonzero().flatten().tolist()


def test_labels_outside_the_mask_change_nothing(run: Any) -> None:
    """A published mistake: labels of test nodes leak into the training loss."""
    graph, module, trajectory = run
    other = {**graph, "y": graph["y"].clone()}
    unseen = ~graph["train_mask"] & ~graph["val_mask"]
    other["y"][unseen] = (other["y"][unseen] + 1) % 3
    changed = other, module, _unfingerprinted(trajectory)
    for task in (None, NodeTask()):
        found = attribute(changed, InfluenceFunction(), task)
        assert relative(found.values, attribute(run, InfluenceFunction(), task).values) < 1e-12


@pytest.mark.parametrize("adam", [False, True])
def test_a_regulariser_in_the_loss_is_in_the_curvature_too(adam: bool) -> None:
    """A published mistake: the regulariser of loss and gradient differing. Squared weights in the
    loss are weight decay in the optimizer, for scores as for training."""

    class Own(SGC):
        penalty = 0.0

        def training_step(self, graph: Any) -> Tensor:
            squares = sum(p.square().sum() for p in self.parameters())
            return super().training_step(graph) + self.penalty / 2 * squares

        def configure_optimizers(self) -> torch.optim.Optimizer:
            if not adam:
                return super().configure_optimizers()
            return torch.optim.Adam(self.parameters(), 0.1, weight_decay=self.decay)

    graph, runs = random_graph(), []
    for decay, penalty in ((0.05, 0.0), (0.0, 0.05)):
        torch.manual_seed(0)
        module = Own(decay=decay)
        module.penalty = penalty
        runs.append((graph, module, train_on(graph, module)))
    estimators = [Source(2, curvature="exact"), Source(2, order="recorded")]
    if not adam:
        estimators += [InfluenceFunction("exact", damping=0.01)]
    for estimator in estimators:
        decayed, penalised = (attribute(run, estimator) for run in runs)
        assert relative(penalised.values, decayed.values) < 1e-9
        assert not any("penalty" in note for note in decayed.provenance["notes"])
        assert any("weight decay that it is (0.05)" in n for n in penalised.provenance["notes"])


def _unfingerprinted(trajectory: Trajectory) -> Trajectory:
    facts = dataclasses.replace(trajectory.facts, fingerprint=None)
    return dataclasses.replace(trajectory, facts=facts, curvature={}, path=None)


def test_queries_must_be_said(run: Any) -> None:
    with pytest.raises(ValueError, match=r"not said which nodes .* Give query=Nodes"):
        attribute(run, TracIn(), query=loader_of(run[0]))
    named = attribute(run, TracIn(), NodeTask(query_mask="val_mask"), query=loader_of(run[0]))
    assert relative(named.values, attribute(run, TracIn()).values) < 1e-12


def test_masks_that_select_nothing_are_refused(run: Any) -> None:
    graph, module, trajectory = run
    with pytest.raises(ValueError, match="chosen selects no node"):
        Nodes(graph, torch.zeros(36, dtype=torch.bool))
    with pytest.raises(ValueError, match="boolean vector of the 36 nodes"):
        Nodes(graph, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="names node 36; expected 0 to 35"):
        Nodes(graph, [36])
    empty = {**graph, "none": torch.zeros(36, dtype=torch.bool)}
    attribution = AttributionModule(
        module, _unfingerprinted(trajectory), TracIn(), NodeTask(train_mask="none")
    )
    with pytest.raises(ValueError, match="'none' selects no node"):
        attribution.attribute(loader_of(empty), Nodes(graph, [1]))
    with pytest.raises(ValueError, match="mask of training nodes under 'missing'"):
        attribute(run, TracIn(), NodeTask(train_mask="missing"))


def test_the_engine_agrees_with_autograd_and_plans(run: Any) -> None:
    graph, module, trajectory = run
    attribution = AttributionModule(module, trajectory, InfluenceFunction())
    query = Nodes(graph, graph["val_mask"])
    assert max(attribution.check(loader_of(graph), query).values()) < 1e-10
    assert attribution.plan(loader_of(graph), query).seconds >= 0


def test_half_of_the_nodes(run: Any) -> None:
    scores = attribute(run, Unrolled(), keep=0.5)
    assert scores.values.shape == (10, 14)
    assert scores.provenance["what_if"]["keep"] == 0.5


def test_several_graphs_are_no_nodes(run: Any) -> None:
    graph, module, trajectory = run
    facts = dataclasses.replace(trajectory.facts, num_examples=2, fingerprint=None)
    two = dataclasses.replace(trajectory, facts=facts)
    both = DataLoader([graph, graph], collate_fn=loader_of(graph).collate_fn)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedTrainingError, match="on one graph, got a training set of 2"):
        AttributionModule(module, two, TracIn(), NodeTask()).attribute(both, Nodes(graph, [1]))


def test_sgc_and_regression() -> None:
    torch.manual_seed(0)

    class Regression(SGC):
        def training_step(self, graph: Any) -> Tensor:
            mask = graph["train_mask"]
            return F.mse_loss(self(graph)[mask], graph["target"][mask])

    graph = random_graph()
    graph["target"] = torch.randn(36, 3, dtype=torch.float64)
    module = Regression(rate=0.1)
    run = graph, module, train_on(graph, module)
    task = NodeTask(target="target", loss="mse")
    exact = InfluenceFunction("exact", damping=0.1)
    own, written = (attribute(run, exact, chosen) for chosen in (None, task))
    assert relative(own.values, written.values) < 1e-9


def test_a_classification_task_is_told_what_to_use(run: Any) -> None:
    with pytest.raises(ValueError, match="NodeTask"):
        attribute(run, TracIn(), ClassificationTask())
