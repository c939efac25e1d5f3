"""Runs by RMSprop, Adagrad, Muon, and by optimizers without a rule, through every estimator."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

from tda_lightning.estimators import InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.evaluation import measure, retrain, retrain_each
from tda_lightning.optimizers import applied_rates
from tda_lightning.records.errors import UnsupportedTrainingError
from tests import oracles
from tests.attributing import CaseTask, attribute, in_float32, relative
from tests.cases import Case
from tests.cases.case import normal
from tests.cases.training import CLASSIFIER, MLP, everything, queries_of, schedule, train
from tests.oracles.estimators import spread
from tests.unrolling import (
    EXACT,
    NETWORKS,
    NEW,
    OPTIMIZERS,
    expected_of,
    in_memory,
    mostly,
    muon,
    per_step,
    record,
    scores_of,
    unroll,
)

pytestmark = pytest.mark.filterwarnings("ignore")
MATRICES = [name for name in NEW if "muon" in name]
WITH_METRIC = [name for name in NEW if name not in MATRICES]

TRAINERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped by norm": {"gradient_clip_val": 0.3},
    "clipped by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
}


ONCE = [
    ("plain", "rmsprop, everything"),
    ("clipped by norm", "adagrad, everything"),
    ("clipped by value", "muon, everything"),
]


@pytest.mark.parametrize(
    ("how", "name"),
    mostly(TRAINERS, NEW, kept=[*ONCE, *(("accumulated", n) for n in NEW)]),
)
def test_recorded_runs_are_unrolled_exactly(how: str, name: str, tmp_path: Path) -> None:
    network = NETWORKS["dropout"]
    optimizers = per_step(OPTIMIZERS[name], LambdaLR, lr_lambda=lambda step: 0.9**step)
    run, module, data = record(tmp_path, network, optimizers, **TRAINERS[how])
    if "clipped" in how:
        assert (run.steps.clipping < 1).any()
    queries = network.data(2, seed=7)
    scores = scores_of(run, module, data, queries, network.task)
    expected = expected_of(run, network, module, data, queries)
    assert expected.abs().max() > 1e-6
    assert relative(scores.by_segment, expected) < EXACT
    assert scores.provenance["certificate"]["bit_equal"]


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("name", NEW)
def test_retraining_is_the_run(keeps: bool, name: str, tmp_path: Path) -> None:
    network = NETWORKS["mlp"]
    run, module, data = record(
        tmp_path, network, OPTIMIZERS[name], recorder={"save_optimizer": keeps}
    )
    end = retrain(run, module, network.task, data, torch.ones(len(data), dtype=torch.float64))
    for key, value in run.checkpoints[run.last_step].parameters.items():
        torch.testing.assert_close(end[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NEW)
def test_retraining_many_at_once_is_retraining_one_by_one(name: str) -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS[name])
    weights = torch.linspace(0, 2, 30, dtype=torch.float64).view(3, 10)
    work = (run, module, CaseTask(MLP.kind), TensorDataset(*data), weights)
    ends = [list(retrain_each(*work, training=False, together=n)) for n in (1, 3)]
    for alone, together in zip(*ends, strict=True):
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in MATRICES if n == "muon"])
def test_the_derivative_of_rounded_steps_predicts_retraining(name: str) -> None:
    """Muon rounds to bfloat16: small changes drown in it, and 10% of an example's weight do not."""
    case = Case("matrices", _matrices, normal(3))
    batches = oracles.cut_batches(10, 5, epochs=8)
    run, module, data = in_memory(case, muon(lr=0.02), batches=batches)
    scores = unroll(case, run, module, data).values.flatten()
    task, train_set = CaseTask(case.kind), TensorDataset(*data)
    columns = []
    for example in range(10):
        weights = torch.ones(2, 10, dtype=torch.float64)
        weights[:, example] += torch.tensor([0.1, -0.1])
        ends = retrain_each(run, module, task, train_set, weights, training=False)
        more, less = (measure(module, task, end, TensorDataset(*queries_of(case))) for end in ends)
        columns.append((less - more) / 0.2)
    changes = torch.stack(columns, 1).detach().flatten()
    assert torch.corrcoef(torch.stack([scores, changes]))[0, 1] > 0.97


def _matrices() -> nn.Module:
    layers = [nn.Linear(3, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 2, bias=False))


@pytest.mark.parametrize("name", NEW)
def test_single_precision(name: str) -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS[name])
    queries = queries_of(MLP)
    expected = oracles.removals(run, module, MLP.loss, data, MLP.loss, queries).sum(0)
    single, module, (data, single_queries) = in_float32(run, module, data, queries)
    scores = attribute(MLP, single, module, data, Unrolled(tolerance=1e-2), queries=single_queries)
    # Rounded to bfloat16, Muon's steps differ by more than the rounding of float32.
    assert relative(scores.values, expected) < (5e-2 if name in MATRICES else 1e-4)


@pytest.mark.parametrize("name", WITH_METRIC)
@pytest.mark.parametrize("case", [MLP, CLASSIFIER], ids=lambda case: case.name)
def test_source_and_tracin_are_the_dense_formulas(case: Any, name: str) -> None:
    run, module, data = train(case, OPTIMIZERS[name], checkpoints=(2, 3, 5, 6), schedule=schedule)
    estimator = Source(curvature="exact", num_segments=2)
    expected = oracles.source_average(run, *everything(case, run, module, data, estimator.cuts()))
    scores = attribute(case, run, module, data, estimator)
    assert relative(scores.by_segment, expected) < 1e-9
    steps = [step for step in sorted(run.checkpoints) if step]
    gradients = oracles.checkpoint_gradients(run, module, case.loss, data, steps)
    queries = oracles.checkpoint_gradients(run, module, case.loss, queries_of(case), steps)
    expected = oracles.tracin(run, gradients, queries)
    scores = attribute(case, run, module, data, TracIn())
    assert relative(scores.by_segment, expected) < 1e-9


@pytest.mark.parametrize("name", NEW)
def test_influence_and_tracin(name: str) -> None:
    run, module, data = train(MLP, OPTIMIZERS[name], checkpoints=(3,), schedule=schedule)
    last = run.last_step
    segments = run.segments([last - 1])[1:]
    (curvature,) = oracles.mean_curvature(run, segments, module, MLP.criterion, data)
    _, _, gradients, query = everything(MLP, run, module, data, 1)
    decay = spread(run, run.steps.hyperparameters["weight_decay"][-1])
    expected = oracles.influence(curvature, decay, 0.03, gradients[last], query)
    scores = attribute(MLP, run, module, data, InfluenceFunction("exact", damping=0.03))
    assert relative(scores.values, expected) < 1e-9
    gradients = oracles.checkpoint_gradients(run, module, MLP.loss, data, [3, last])
    query = oracles.checkpoint_gradients(run, module, MLP.loss, queries_of(MLP), [3, last])
    expected = oracles.tracin(run, gradients, query).sum(0)
    assert relative(attribute(MLP, run, module, data, TracIn()).values, expected) < 1e-9


@pytest.mark.parametrize("name", NEW)
def test_what_has_no_formula_is_refused_by_name(name: str) -> None:
    run, module, data = train(MLP, OPTIMIZERS[name], checkpoints=(3,))
    kind = run.facts.optimizer
    formula = "advance" if name in WITH_METRIC else "(advance|metric)"
    with pytest.raises(UnsupportedTrainingError, match=rf"{kind}, whose rule has no {formula}"):
        attribute(MLP, run, module, data, Source(1, order="recorded"))
    if name in MATRICES:
        with pytest.raises(UnsupportedTrainingError, match=rf"{kind}, whose rule has no metric"):
            attribute(MLP, run, module, data, Source(1))
    with pytest.raises(UnsupportedTrainingError, match=rf"{kind}, whose steps are not"):
        attribute(MLP, run, module, data, InfluenceFunction(damping="segment"))


@pytest.mark.parametrize("name", WITH_METRIC)
def test_source_without_optimizer_states_is_refused(name: str) -> None:
    run, module, data = train(MLP, OPTIMIZERS[name])
    bare = {s: dataclasses.replace(c, optimizer=None) for s, c in run.checkpoints.items()}
    with pytest.raises(UnsupportedTrainingError, match="save_optimizer=True"):
        attribute(MLP, dataclasses.replace(run, checkpoints=bare), module, data, Source(1))


WITHOUT: dict[str, Any] = {
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01, weight_decay=0.1),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters(), lr=0.01),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_runs_without_a_rule_are_recorded_and_scored_by_their_rates(
    name: str, tmp_path: Path
) -> None:
    network = NETWORKS["mlp"]
    run, module, data = record(tmp_path, network, WITHOUT[name])
    queries = network.data(2, seed=7)
    assert run.facts.optimizer == name and len(run.steps) == 6
    assert torch.equal(applied_rates(run, slice(None)), run.steps.learning_rate)
    scores = scores_of(run, module, data, queries, network.task, InfluenceFunction())
    assert scores.values.isfinite().all() and scores.values.abs().max() > 0
    if name == "LBFGS":
        with pytest.raises(UnsupportedTrainingError, match="evaluates the loss several times"):
            scores_of(run, module, data, queries, network.task, TracIn())
    else:
        scores = scores_of(run, module, data, queries, network.task, TracIn())
        assert scores.values.isfinite().all() and scores.values.abs().max() > 0
    for estimator in (Source(1), Unrolled()):
        with pytest.raises(UnsupportedTrainingError, match=f"trained with {name}.*no formula"):
            scores_of(run, module, data, queries, network.task, estimator)


def test_a_parameter_without_gradient_is_passed_over() -> None:
    from tests.estimators.test_unrolled import CASES

    case = CASES["sometimes"]
    for name in NEW:
        run, module, data = in_memory(case, OPTIMIZERS[name], clip_norm=1.0)
        expected = oracles.removals(run, module, case.loss, data, case.loss, queries_of(case))
        scores = unroll(case, run, module, data)
        assert relative(scores.by_segment, expected) < EXACT, name
