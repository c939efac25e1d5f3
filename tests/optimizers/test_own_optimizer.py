"""An optimizer of one's own, with a rule given through public names alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tda_lightning.estimators import InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.optimizers import OptimizerRule, ParameterStep, register
from tda_lightning.records.errors import UnsupportedTrainingError
from tests.attributing import relative
from tests.oracles import unrolling
from tests.unrolling import EXACT, NETWORKS, expected_of, record, scores_of

pytestmark = pytest.mark.filterwarnings("ignore")


class Bounded(torch.optim.Optimizer):
    """No number moves by more than the rate: theta -= lr * m / sqrt(1 + m^2)."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    mean = state.setdefault("mean", torch.zeros_like(parameter))
                    mean.mul_(group["beta"]).add_(parameter.grad)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(group["lr"] * mean / (1 + mean**2).sqrt())
        return loss


def adjoint(a: Tensor, states: dict[str, Tensor], step: ParameterStep) -> Tensor:
    mean = step.states["mean"]
    states["mean"] -= step.rate / (1 + mean**2) ** 1.5 * a
    u = states["mean"].clone()
    states["mean"] *= step.settings["beta"]
    return u


RULE = register(
    OptimizerRule(
        optimizer=Bounded,
        settings=("beta", "weight_decay"),
        states=("mean",),
        adjoint=adjoint,
        reads=("mean",),
        decoupled=True,
    )
)


def restated(parameter: Tensor, gradient: Tensor, state: dict, rate: float, hyper: dict) -> Tensor:
    mean = state["mean"] = hyper["beta"] * state.get("mean", torch.zeros_like(gradient)) + gradient
    move = mean / (1 + mean**2).sqrt()
    return parameter * (1 - rate * hyper["weight_decay"]) - rate * move


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(unrolling.UPDATES, RULE.name, restated)
    network = NETWORKS["dropout"]
    return (
        network,
        *record(tmp_path, network, lambda m: Bounded(m.parameters(), 0.05, weight_decay=0.2)),
    )


def test_it_is_unrolled_exactly_from_a_replay_that_equals_the_run(run: Any) -> None:
    network, trajectory, module, data = run
    assert trajectory.facts.optimizer == RULE.name == f"{__name__}.Bounded"
    assert {*trajectory.steps.hyperparameters} == {"beta", "weight_decay"}
    queries = network.data(2, seed=7)
    scores = scores_of(trajectory, module, data, queries, network.task, Unrolled())
    expected = expected_of(trajectory, network, module, data, queries).sum(0)
    assert expected.abs().max() > 1e-5
    assert relative(scores.values, expected) < EXACT
    assert scores.provenance["certificate"]["bit_equal"]


@pytest.mark.parametrize("estimator", [TracIn(), InfluenceFunction()])
def test_estimators_that_need_rates_alone(estimator: Any, run: Any) -> None:
    network, trajectory, module, data = run
    queries = network.data(2, seed=7)
    scores = scores_of(trajectory, module, data, queries, network.task, estimator)
    assert scores.values.isfinite().all() and scores.values.abs().max() > 0


def test_an_estimator_whose_formula_is_missing_says_which(run: Any) -> None:
    network, trajectory, module, data = run
    with pytest.raises(UnsupportedTrainingError, match=r"Bounded, whose rule has no metric, and"):
        scores_of(trajectory, module, data, network.data(2), network.task, Source(1))


def test_impossible_rules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reads \['sum'\], which are not among its states"):
        OptimizerRule(optimizer=Bounded, states=("mean",), reads=("sum",))
    with pytest.raises(ValueError, match="A linear rule has at most one state"):
        OptimizerRule(optimizer=Bounded, states=("a", "b"), linear=True)
