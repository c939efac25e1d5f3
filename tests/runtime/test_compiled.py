"""Modules under ``torch.compile``: recorded under their plain names, attributed without it."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule
from tda_lightning.estimators import Source, TracIn
from tda_lightning.evaluation import retrain
from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.store import open_trajectory
from tda_lightning.tasks import RegressionTask
from tests.attributing import quiet
from tests.plain_loop import Small, epochs, require_agreement, train
from tests.quick import quick
from tests.runs import Numbered, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore")

DATA = TensorDataset(Numbered().x, Numbered().y)
NAMES = [f"net.{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")]


def sgd(net: nn.Module) -> Any:
    return torch.optim.SGD(net.parameters(), 0.1, 0.9)


class Standard(Small):
    """By a standard loss, which attribution finds by watching torch's functions."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def plain() -> Standard:
    return Standard(sgd)


def submodule() -> Standard:
    module = plain()
    module.net = torch.compile(module.net, backend="eager")
    return module


def part_of_it() -> Standard:
    module = plain()
    module.net[0] = torch.compile(module.net[0], backend="eager")
    return module


def in_place() -> Standard:
    module = plain()
    module.net.compile(backend="eager")
    return module


def function() -> Standard:
    module = plain()
    module.forward = torch.compile(module.forward, backend="eager")  # type: ignore[method-assign]
    return module


def whole() -> Any:
    return torch.compile(plain(), backend="eager")


COMPILED = {
    "submodule": submodule,
    "part": part_of_it,
    "in place": in_place,
    "method": function,
    "whole": whole,
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("how", quick(COMPILED, ["submodule", "in place", "whole"]))
def test_compiled_and_plain_modules_record_and_score_alike(how: str, tmp_path: Path) -> None:
    module, net = COMPILED[how](), copy.deepcopy(plain().net)
    recorder = TrajectoryRecorder(tmp_path, every_n_steps=4)
    trainer(recorder).fit(module, loader(DATA))
    trajectory = open_trajectory(tmp_path)
    assert list(trajectory.facts.parameters) == NAMES
    require_agreement(trajectory, train(net, epochs(), sgd(net)))

    names = [name for name, _ in module.named_parameters()]
    # Once the compiled module has run, and afresh; by its own training_step and by a task.
    for estimator, task in ((Source(2), None), (TracIn(), RegressionTask())):
        trained, fresh, expected = (
            AttributionModule(
                given, dataclasses.replace(trajectory, curvature={}), estimator, task
            ).attribute(DATA, DATA, trainer=quiet())
            for given in (module, COMPILED[how](), plain())
        )
        assert not any("single examples" in note for note in expected.provenance["notes"])
        for scores in (trained, fresh):
            assert torch.equal(scores.values, expected.values)
            assert scores.provenance["notes"] == expected.provenance["notes"]
    assert [name for name, _ in module.named_parameters()] == names


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's default compiler needs g++")
def test_the_default_compiler(tmp_path: Path) -> None:
    """It fuses and rounds in another order; all that is recorded is else the plain loop's."""
    module, net = plain(), copy.deepcopy(plain().net)
    module.net = torch.compile(module.net)
    trainer(TrajectoryRecorder(tmp_path, every_n_steps=4)).fit(module, loader(DATA))
    trajectory, log = open_trajectory(tmp_path), train(net, epochs(), sgd(net))
    steps = trajectory.steps
    assert list(trajectory.facts.parameters) == NAMES
    assert [[b.tolist() for b in steps.batches(row)] for row in range(12)] == log.batches
    for found, expected in ((steps.loss, log.losses), (steps.gradient_norm, log.norms)):
        torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-4, atol=1e-6)
    for step, checkpoint in trajectory.checkpoints.items():
        for name, value in {**checkpoint.parameters, **checkpoint.buffers}.items():
            expected = log.states[step][name.removeprefix("net.")]
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    scores, expected = (
        AttributionModule(
            given, dataclasses.replace(trajectory, curvature={}), Source(2)
        ).attribute(DATA, DATA, trainer=quiet())
        for given in (module, plain())
    )
    assert torch.equal(scores.values, expected.values)


@pytest.mark.parametrize("how", ["submodule", "whole"])
def test_a_compiled_run_is_replayed(how: str, tmp_path: Path) -> None:
    trainer(TrajectoryRecorder(tmp_path)).fit(COMPILED[how](), loader(DATA))
    trajectory = open_trajectory(tmp_path)
    states = [
        retrain(trajectory, module, None, DATA, torch.ones(22))
        for module in (COMPILED[how](), plain())
    ]
    last = trajectory.checkpoints[trajectory.last_step]
    assert states[0].keys() == states[1].keys() == {*last.parameters, *last.buffers}
    for name, value in last.parameters.items():
        assert torch.equal(states[0][name], value)
