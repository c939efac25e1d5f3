"""The certificate of a replay, and what exact unrolling refuses by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning import Trajectory
from tda_lightning.estimators import Unrolled
from tda_lightning.records.errors import TrajectoryMismatchError, UnsupportedTrainingError
from tda_lightning.tasks import RegressionTask
from tests.attributing import CaseTask, relative
from tests.cases.training import MLP, queries_of
from tests.runs import Net, Numbered, adamw, fit, loader, scheduled
from tests.unrolling import (
    NETWORKS,
    OPTIMIZERS,
    Trained,
    in_memory,
    record,
    scores_of,
    sgd,
    unroll,
)

pytestmark = pytest.mark.filterwarnings("ignore")


# The certificate


@pytest.mark.parametrize("options", [{}, {"optimizers": adamw}, {"optimizers": scheduled}])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_replay_lands_bit_for_bit(workers: int, options: dict[str, Any], tmp_path: Path) -> None:
    """Dropout, batch normalisation, noise from every generator, in single precision."""
    data = Numbered(augment=not workers)
    make = lambda: loader(data, shuffle=True, num_workers=workers)  # noqa: E731
    fit(tmp_path, make, accumulate_grad_batches=2, gradient_clip_val=0.5, **options)
    queries = Numbered(3, seed=1)
    scores = scores_of(str(tmp_path), Net(), data, queries, None)
    found = scores.provenance["certificate"]
    assert found["bit_equal"] is True
    assert found["largest_difference"] == found["relative_difference"] == 0
    assert found["checkpoints"] == len(Trajectory.load(str(tmp_path)).checkpoints) - 1
    assert any("bit for bit" in note for note in scores.provenance["notes"])
    assert scores.values.dtype == torch.float32 and scores.values.abs().max() > 0


def moved(run: Trajectory, step: int, by: float) -> Trajectory:
    """The run with one recorded weight of a checkpoint changed."""
    found = run.checkpoints[step]
    name = next(iter(found.parameters))
    tensor = found.parameters[name].clone()
    tensor.view(-1)[0] += by
    other = dataclasses.replace(found, parameters={**found.parameters, name: tensor})
    return dataclasses.replace(run, checkpoints={**run.checkpoints, step: other})


@pytest.mark.parametrize("step", [2, 3, 7])
def test_a_changed_checkpoint_is_noticed(step: int) -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS["adamw"])
    with pytest.raises(TrajectoryMismatchError) as error:
        unroll(MLP, moved(run, step, 0.1), module, data)
    # The way back starts from it; what the last one started from lands elsewhere.
    first = f"step {step + 1}" if step < 7 else f"step {step}"
    assert first in str(error.value) and "tolerance" in str(error.value)


def test_a_changed_beginning_is_noticed() -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS["adamw"])
    with pytest.raises(TrajectoryMismatchError):
        unroll(MLP, moved(run, 0, 0.1), module, data)


def test_a_small_difference_is_said() -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS["adamw"])
    exact = unroll(MLP, run, module, data)
    scores = unroll(MLP, moved(run, 3, 1e-6), module, data)
    found = scores.provenance["certificate"]
    assert found["bit_equal"] is False
    assert found["largest_difference"] == pytest.approx(1e-6, rel=1e-3)
    assert 0 < found["relative_difference"] < 1e-3
    assert any("not bit for bit" in note for note in scores.provenance["notes"])
    assert 0 < relative(scores.values, exact.values) < 1e-3
    with pytest.raises(TrajectoryMismatchError, match="tolerance"):
        unroll(MLP, moved(run, 3, 1e-6), module, data, Unrolled(tolerance=1e-7))
    # A tolerance that lets everything pass is the reader's own choice.
    scores = unroll(MLP, moved(run, 3, 0.01), module, data, Unrolled(tolerance=10.0))
    assert scores.provenance["certificate"]["largest_difference"] == pytest.approx(0.01, rel=1e-3)


def test_changed_data_is_noticed(tmp_path: Path) -> None:
    """Also when no fingerprint tells."""
    network = NETWORKS["batch norm"]
    run, module, data = record(tmp_path, network, OPTIMIZERS["adamw"])
    unknown = dataclasses.replace(run, facts=dataclasses.replace(run.facts, fingerprint=None))
    queries = network.data(2, seed=7)
    inputs, labels = data.tensors
    for changed in (
        TensorDataset(inputs.flip(0), labels.flip(0)),
        TensorDataset(inputs + 0.1 * (torch.arange(10) == 4)[:, None, None, None], labels),
        TensorDataset(inputs, (labels + (torch.arange(10) == 4)) % 3),
    ):
        with pytest.raises(TrajectoryMismatchError, match="data or code"):
            scores_of(unknown, module, changed, queries, network.task)
        with pytest.raises(TrajectoryMismatchError, match="not the recorded one"):
            scores_of(run, module, changed, queries, network.task)


class Altered(Trained):
    """Another loss than the recorded one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)


class ByEpoch(Trained):
    """The loss depends on what no batch holds and no trainer knows."""

    factor = 1.0

    def on_train_batch_end(self, *args: Any) -> None:
        self.factor += 0.1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1]) * self.factor


def test_changed_code_is_noticed(tmp_path: Path) -> None:
    network, optimizer = NETWORKS["batch norm"], OPTIMIZERS["adamw"]
    run, module, data = record(tmp_path / "one", network, optimizer)
    queries = network.data(2, seed=7)
    altered = Altered(module.net, network.losses, optimizer)
    with pytest.raises(TrajectoryMismatchError, match="data or code"):
        scores_of(run, altered, data, queries, None)
    made = ByEpoch(network.module(optimizer).net, network.losses, optimizer)
    record(tmp_path / "two", network, optimizer, module=made, data=data)
    other = ByEpoch(module.net, network.losses, optimizer)
    with (
        pytest.raises(TrajectoryMismatchError, match="outside"),
        pytest.warns(UserWarning, match="reads self.factor, which on_train_batch_end sets"),
    ):
        scores_of(str(tmp_path / "two"), other, data, queries, None)
    # Another activation, with the weights of the recorded one.
    module.net[2] = nn.ReLU()
    with pytest.raises(TrajectoryMismatchError, match="data or code"):
        scores_of(run, module, data, queries, network.task)


def test_a_task_with_another_loss_is_noticed(tmp_path: Path) -> None:
    network = NETWORKS["mlp"]
    run, module, data = record(tmp_path, network, OPTIMIZERS["adamw"])

    class Half(CaseTask):
        def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
            return 0.5 * super().train_loss(module, batch)

    with pytest.raises(TrajectoryMismatchError, match="task"):
        scores_of(run, module, data, network.data(2, seed=7), Half("regression"))


# What is refused


def noted(run: Trajectory, **settings: Any) -> Trajectory:
    facts = dataclasses.replace(run.facts, settings={**run.facts.settings, **settings})
    return dataclasses.replace(run, facts=facts)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true", "transformer-engine"])
def test_other_precisions(precision: str) -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS["sgd"])
    with pytest.raises(UnsupportedTrainingError, match=precision):
        unroll(MLP, noted(run, precision=precision), module, data)


@pytest.mark.parametrize(
    "kind", ["Adam(amsgrad=True)", "SGD(maximize=True)", "RAdam", "Adadelta", "LBFGS"]
)
def test_other_optimizers(kind: str) -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS["adam"])
    facts = dataclasses.replace(run.facts, optimizer=kind)
    with pytest.raises(UnsupportedTrainingError) as error:
        unroll(MLP, dataclasses.replace(run, facts=facts), module, data)
    assert kind in str(error.value)


@pytest.mark.parametrize(
    "options", [{"amsgrad": True}, {"maximize": True}, {"amsgrad": True, "capturable": False}]
)
def test_variants_of_adam_as_recorded(options: dict[str, Any], tmp_path: Path) -> None:
    network = NETWORKS["mlp"]
    run, module, data = record(
        tmp_path, network, lambda m: torch.optim.Adam(m.parameters(), **options)
    )
    with pytest.raises(UnsupportedTrainingError, match="Adam"):
        scores_of(run, module, data, network.data(2), network.task)


class ClipsItself(Trained):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        nn.utils.clip_grad_value_(self.parameters(), 0.1)


class Shrinks(Trained):
    def on_after_backward(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class ShrinksLater(Trained):
    def on_before_optimizer_step(self, *args: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class Looks(Trained):
    seen = 0.0

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.seen += sum(float(p.grad.norm()) for p in self.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("kind", "by"),
    [
        (ClipsItself, "configure_gradient_clipping"),
        (Shrinks, "on_after_backward"),
        (ShrinksLater, "on_before_optimizer_step"),
    ],
)
def test_gradients_that_the_module_changes(kind: type[Trained], by: str, tmp_path: Path) -> None:
    network = NETWORKS["mlp"]
    made = kind(network.module(sgd()).net, network.losses, sgd())
    run, module, data = record(tmp_path, network, sgd(), module=made)
    with pytest.raises(UnsupportedTrainingError, match=rf"{by}.*changed the gradients"):
        scores_of(run, module, data, network.data(2), network.task)


def test_gradients_that_the_module_looks_at(tmp_path: Path) -> None:
    network = NETWORKS["mlp"]
    made = Looks(network.module(sgd()).net, network.losses, sgd())
    run, module, data = record(tmp_path, network, sgd(), module=made)
    assert made.seen and run.facts.settings["clipping"] == "hooks"
    assert scores_of(run, module, data, network.data(2), network.task).values.any()


def test_runs_without_indices() -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS["sgd"])
    steps = run.steps
    none = dataclasses.replace(
        steps,
        examples=steps.examples[:0],
        example_offsets=torch.zeros_like(steps.example_offsets),
    )
    with pytest.raises(UnsupportedTrainingError, match="indices"):
        unroll(MLP, dataclasses.replace(run, steps=none), module, data)


class Freezes(Trained):
    def on_train_epoch_start(self) -> None:
        self.net[0].weight.requires_grad_(self.current_epoch == 0)


def test_restricted_layers() -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS["sgd"])
    task = RegressionTask(layers=["2"])
    with pytest.raises(UnsupportedTrainingError, match="layers"):
        unroll(MLP, run, module, data, task=task)


class Contrastive(Trained):
    """No standard loss, and no loss of single examples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self(batch[0])
        return (outputs @ outputs.T).logsumexp(1).mean() - outputs.square().mean()


def test_losses_of_single_examples_that_are_not_known(tmp_path: Path) -> None:
    network = NETWORKS["mlp"]
    made = Contrastive(network.module(sgd()).net, network.losses, sgd())
    run, module, data = record(tmp_path, network, sgd(), module=made)
    with pytest.raises(UnsupportedTrainingError, match=r"single examples.*task"):
        scores_of(run, module, data, network.data(2), None)


@pytest.mark.parametrize("name", ["dropout", "gru"])
def test_draws_whose_states_were_not_recorded(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    run, module, data = record(tmp_path, network, OPTIMIZERS["adamw"])
    steps = dataclasses.replace(run.steps, random={})
    unknown = dataclasses.replace(noted(run, random="absent: two processes"), steps=steps)
    with pytest.raises(UnsupportedTrainingError, match=r"draws random numbers.*one process"):
        scores_of(unknown, module, data, network.data(2), network.task)


def test_draws_of_none_need_no_states(tmp_path: Path) -> None:
    network = NETWORKS["batch norm"]
    run, module, data = record(tmp_path, network, OPTIMIZERS["adamw"])
    steps = dataclasses.replace(run.steps, random={})
    unknown = dataclasses.replace(noted(run, random="absent: two processes"), steps=steps)
    queries = network.data(2, seed=7)
    found, expected = (
        scores_of(one, module, data, queries, network.task) for one in (unknown, run)
    )
    assert torch.equal(found.values, expected.values)


class Average(nn.Module):
    """Keeps a running mean that the measurement reads, in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * inputs.detach().mean(0)
        return inputs - self.centre


@pytest.mark.parametrize(
    "norm",
    [
        Average,
        lambda: nn.Sequential(
            nn.Unflatten(1, (3, 1)),
            nn.InstanceNorm1d(3, track_running_stats=True, affine=True),
            nn.Flatten(),
        ),
    ],
)
def test_other_running_statistics_are_refused(norm: Any, tmp_path: Path) -> None:
    """They are functions of the weights that nothing here differentiates."""
    network = dataclasses.replace(
        NETWORKS["mlp"],
        build=lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), norm(), nn.Linear(3, 2)),
    )
    if norm is not Average:
        network = dataclasses.replace(
            network,
            build=lambda: nn.Sequential(
                nn.Linear(3, 6),
                nn.Unflatten(1, (3, 2)),
                nn.InstanceNorm1d(3, track_running_stats=True, affine=True),
                nn.Flatten(),
                nn.Linear(6, 2),
            ),
        )
    run, module, data = record(tmp_path, network, sgd())
    with pytest.raises(UnsupportedTrainingError, match="2.*(centre|running)"):
        scores_of(run, module, data, network.data(2), network.task)


class OnlyOnce(torch.autograd.Function):
    """x squared, whose backward pass has no derivative."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class Squares(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return OnlyOnce.apply(inputs)


def test_operations_without_second_derivative(tmp_path: Path) -> None:
    network = dataclasses.replace(
        NETWORKS["mlp"],
        build=lambda: nn.Sequential(nn.Linear(3, 3), Squares(), nn.Linear(3, 2)),
    )
    run, module, data = record(tmp_path, network, sgd())
    with pytest.raises(UnsupportedTrainingError, match=r"twice.*Source"):
        scores_of(run, module, data, network.data(2), network.task)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"last_steps": 0}, "last_steps must be at least 1"),
        ({"memory_budget": 0}, "memory_budget must be"),
        ({"states": "cloud"}, "states must be one of auto, memory, disk, recompute"),
        ({"tolerance": -1.0}, "tolerance must not be negative"),
        ({"tolerance": float("nan")}, "tolerance must not be negative"),
    ],
)
def test_impossible_settings_are_refused_at_once(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Unrolled(**options)


def test_self_influence_is_not_there_and_that_is_said() -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS["sgd"])
    scores = unroll(MLP, run, module, data)
    assert scores.self_influence is None
    assert any("No self-influence" in note for note in scores.provenance["notes"])
    quietly = unroll(MLP, run, module, data, self_influence=False)
    assert not any("No self-influence" in note for note in quietly.provenance["notes"])
    assert queries_of(MLP)[0].shape[0] == len(scores.values)
