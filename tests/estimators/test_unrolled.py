"""Exact unrolling is the derivative of the whole training: against autograd and retraining."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torch.utils.checkpoint import checkpoint

from tda_lightning import Scores
from tests import oracles
from tests.attributing import CaseTask, in_float32, relative
from tests.cases import Case
from tests.cases.case import Function, frozen, normal, tokens
from tests.cases.training import CLASSIFIER, MLP, queries_of
from tests.runs import loader
from tests.unrolling import (
    BATCHES,
    EXACT,
    NETWORKS,
    OPTIMIZERS,
    SOME,
    Augmented,
    FusedAttention,
    Network,
    adam,
    adamw,
    differences_of,
    everything,
    expected_of,
    fetching,
    in_memory,
    mostly,
    per_epoch,
    per_step,
    record,
    scores_of,
    sgd,
    unroll,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def require_equal(scores: Scores, expected: Tensor) -> None:
    """Scores by interval are those expected, [interval, query, train], and sum to the values."""
    assert scores.values.dtype == torch.float64
    assert scores.self_influence is None and scores.by_segment is not None
    assert scores.by_segment.shape == expected.shape
    for found, interval in zip(scores.by_segment, expected, strict=True):
        assert relative(found, interval) < EXACT
    assert relative(scores.values, expected.sum(0)) < EXACT
    assert scores.provenance["certificate"]["relative_difference"] < 1e-9


def expected_in_memory(
    case: Case, run: Any, module: nn.Module, data: Any, **options: Any
) -> Tensor:
    queries = queries_of(case)
    return oracles.removals(run, module, case.loss, data, case.loss, queries, **options)


# In eval mode


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name: str) -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS[name])
    expected = expected_in_memory(MLP, run, module, data)
    assert expected.abs().max() > 1e-5
    require_equal(unroll(MLP, run, module, data), expected)


CLIPPED: dict[str, dict[str, float]] = {
    "norm": {"clip_norm": 0.8},
    "norm, always": {"clip_norm": 0.1},
    "value": {"clip_value": 0.2},
}


@pytest.mark.parametrize(
    ("how", "name"),
    mostly(
        CLIPPED,
        ["momentum and decay", "nesterov", "adam and decay", "adamw"],
        kept=["nesterov", "adam and decay"],
    ),
)
def test_clipping_is_differentiated(how: str, name: str) -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS[name], **CLIPPED[how])
    acts = float((run.steps.clipping < 1 - 1e-9).double().mean())
    assert acts > 0 and (acts < 1 or how != "norm")
    expected = expected_in_memory(MLP, run, module, data)
    require_equal(unroll(MLP, run, module, data), expected)
    # The factor alone is not the derivative.
    if how != "value":
        work = (run, module, MLP.loss, data, MLP.loss, queries_of(MLP))
        constant = oracles.unrolled(*work, recorded_clipping=True)
        assert relative(constant, expected.sum(0)) > 1e-3


def _convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def _mean_of_embedded(module: Any, numbers: Tensor) -> Tensor:
    return module.head(module.table(numbers).mean(1).tanh())


def _sometimes(module: Any, inputs: Tensor) -> Tensor:
    """One layer is for some batches only, another for none."""
    outputs = module.layer(inputs).tanh()
    if float(inputs[:, 0].max()) > 0.9:
        outputs = outputs + module.extra(inputs)
    return module.head(outputs)


CASES: dict[str, Case] = {
    "classifier": CLASSIFIER,
    "convolution": Case("frozen statistics", _convolution, normal(1, 4, 4), "classification"),
    "embedding": Case(
        "tokens never seen",
        lambda: Function(_mean_of_embedded, table=nn.Embedding(9, 3), head=nn.Linear(3, 2)),
        tokens(6, 4),
    ),
    "sometimes": Case(
        "parameters without gradient",
        lambda: Function(
            _sometimes,
            layer=nn.Linear(3, 3),
            extra=nn.Linear(3, 3),
            spare=nn.Linear(2, 2),
            head=nn.Linear(3, 2),
        ),
        normal(3),
    ),
}


@pytest.mark.parametrize(
    ("case", "name"),
    mostly(
        CASES,
        [*SOME, "dampening", "adam and decay", "adam, default moments"],
        kept=["dampening", "adamw", "adam, default moments"],
    ),
)
def test_every_kind_of_parameter(case: str, name: str) -> None:
    run, module, data = in_memory(CASES[case], OPTIMIZERS[name], clip_norm=1.0)
    expected = expected_in_memory(CASES[case], run, module, data)
    require_equal(unroll(CASES[case], run, module, data), expected)
    last = run.checkpoints[run.last_step].optimizer or {}
    if case == "embedding" and name == "adamw":
        assert not last["table.weight"]["exp_avg_sq"][6:].any()
    if case == "sometimes":
        assert not last.get("spare.weight") and last["extra.weight"]
    if case == "sometimes" and name == "adamw":
        assert 0 < float(last["extra.weight"]["step"]) < run.last_step


@pytest.mark.parametrize("name", ["momentum and decay", "adam and decay", "adamw"])
def test_single_precision(name: str) -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS[name])
    expected = expected_in_memory(MLP, run, module, data).sum(0)
    single, module, (data, queries) = in_float32(run, module, data, queries_of(MLP))
    scores = scores_of(
        single,
        module,
        torch.utils.data.TensorDataset(*data),
        torch.utils.data.TensorDataset(*queries),
        CaseTask(MLP.kind),
    )
    assert scores.values.dtype == torch.float32
    assert relative(scores.values, expected) < 1e-4


# Recorded by Lightning


@pytest.mark.parametrize(
    ("network", "name"),
    mostly(NETWORKS, SOME, kept=["adamw", ("batch norm", "nesterov")]),
)
def test_every_network_in_train_mode(network: str, name: str, tmp_path: Path) -> None:
    chosen = NETWORKS[network]
    run, module, data = record(tmp_path, chosen, OPTIMIZERS[name], gradient_clip_val=1.0)
    queries = chosen.data(2, seed=7)
    scores = scores_of(run, module, data, queries, chosen.task)
    require_equal(scores, expected_of(run, chosen, module, data, queries))


class Checkpointed(nn.Sequential):
    """Whose middle is computed again in the backward pass."""

    def forward(self, numbers: Tensor) -> Tensor:
        first, middle, last = self
        return last(checkpoint(middle, first(numbers), use_reentrant=False))


def test_checkpointed_activations_change_nothing(tmp_path: Path) -> None:
    """Computed again in a backward pass, attention would be by a kernel without derivative."""

    def network(kind: Any) -> Network:
        def build() -> nn.Module:
            middle = nn.Sequential(FusedAttention(4), nn.Tanh())
            return kind(nn.Embedding(7, 4), middle, nn.Linear(4, 7))

        return Network(build, tokens(6, 5), NETWORKS["fused attention"].losses)

    make = OPTIMIZERS["adamw"]
    run, module, data = record(tmp_path, network(Checkpointed), make)
    queries = network(Checkpointed).data(2, seed=7)
    scores = scores_of(run, module, data, queries, network(Checkpointed).task)
    plain = network(nn.Sequential).module(make, seed=4)
    expected = scores_of(run, plain, data, queries, network(nn.Sequential).task)
    assert relative(scores.values, expected.values) < 1e-12


SCHEDULED: dict[str, dict[str, Any]] = {
    "by steps": {"optimizers": per_step(sgd(momentum=0.8), LambdaLR, lr_lambda=lambda s: 0.8**s)},
    "by epochs": {"optimizers": per_epoch(adam(adamw), StepLR, step_size=1, gamma=0.3)},
    "one cycle": {"optimizers": per_step(sgd(momentum=0.8), OneCycleLR, max_lr=0.2, total_steps=9)},
    "one cycle, nesterov": {
        "optimizers": per_step(
            sgd(momentum=0.8, nesterov=True, weight_decay=0.1),
            OneCycleLR,
            max_lr=0.2,
            total_steps=9,
        )
    },
    "one cycle of betas": {"optimizers": per_step(adam(), OneCycleLR, max_lr=0.05, total_steps=9)},
    "groups by steps": {
        "optimizers": per_step(
            OPTIMIZERS["sgd in groups"], LambdaLR, lr_lambda=[lambda s: 0.8**s, lambda s: 1 + s]
        )
    },
    "clipped by value": {
        "optimizers": sgd(momentum=0.8),
        "gradient_clip_val": 0.1,
        "gradient_clip_algorithm": "value",
    },
    "accumulated": {"optimizers": adam(), "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    "accumulated by value": {
        "optimizers": adam(adamw),
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.05,
        "gradient_clip_algorithm": "value",
    },
    "cut short": {"optimizers": sgd(momentum=0.8), "max_steps": 5, "max_epochs": -1},
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_every_option_of_a_trainer(name: str, tmp_path: Path) -> None:
    network = NETWORKS["dropout"]
    run, module, data = record(tmp_path, network, **{"max_epochs": 3, **SCHEDULED[name]})
    if "one cycle" in name:
        key = "beta1" if "betas" in name else "momentum"
        assert len(run.steps.hyperparameters[key].unique()) > 3
    if "value" in name:
        assert (run.steps.clipping < 1).any()
    queries = network.data(2, seed=7)
    scores = scores_of(run, module, data, queries, network.task)
    require_equal(scores, expected_of(run, network, module, data, queries))
    assert scores.provenance["certificate"]["bit_equal"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_augmented_examples_are_drawn_as_recorded(accumulate: int, tmp_path: Path) -> None:
    network = NETWORKS["batch norm"]
    data = Augmented(network.data(10))
    run, module, _ = record(
        tmp_path, network, OPTIMIZERS["nesterov"], data=data, accumulate_grad_batches=accumulate
    )
    queries = network.data(2, seed=7)
    scores = scores_of(run, module, data, queries, network.task)
    require_equal(scores, expected_of(run, network, module, data, queries))


def _twice(module: Any, inputs: Tensor) -> Tensor:
    """One normalisation, used twice in a forward pass."""
    return module.head(module.norm(module.second(module.norm(module.first(inputs)).tanh())))


MOVING: dict[str, Any] = {
    "used twice": dataclasses.replace(
        NETWORKS["mlp"],
        build=lambda: Function(
            _twice,
            first=nn.Linear(3, 4, bias=False),
            second=nn.Linear(4, 4, bias=False),
            norm=nn.BatchNorm1d(4, momentum=0.3),
            head=nn.Linear(4, 2),
        ),
    ),
    "without weights": dataclasses.replace(
        NETWORKS["mlp"],
        build=lambda: nn.Sequential(
            nn.Linear(3, 4, bias=False),
            nn.BatchNorm1d(4, affine=False),
            nn.Tanh(),
            nn.Linear(4, 2),
        ),
    ),
}


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("name", MOVING)
def test_running_statistics(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    network = MOVING[name]
    run, module, data = record(tmp_path, network, sgd(momentum=0.8, lr=0.1), **options)
    queries = network.data(2, seed=7)
    scores = scores_of(run, module, data, queries, network.task)
    require_equal(scores, expected_of(run, network, module, data, queries))


def test_parts_in_eval_mode_stay_in_it(tmp_path: Path) -> None:
    network = NETWORKS["batch norm"]
    module = network.module(OPTIMIZERS["nesterov"])
    module.net[1].eval()
    run, _, data = record(tmp_path, network, OPTIMIZERS["nesterov"], module=module)
    assert run.facts.settings["eval_modules"] == ["net.1"]
    other, queries = network.module(OPTIMIZERS["nesterov"], seed=4), network.data(2, seed=7)
    scores = scores_of(run, other, data, queries, network.task)
    require_equal(scores, expected_of(run, network, other, data, queries))
    assert scores.provenance["certificate"]["bit_equal"]


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_frozen_parameters(name: str, tmp_path: Path) -> None:
    network, optimizer = NETWORKS["transformer"], OPTIMIZERS[name]
    frozen(module := network.module(optimizer), "net.positions.weight", "net.norm.bias")
    run, _, data = record(tmp_path, network, optimizer, module=module, gradient_clip_val=1.0)
    assert "net.norm.bias" not in run.facts.parameters
    other, queries = network.module(optimizer, seed=4), network.data(2, seed=7)
    scores = scores_of(run, other, data, queries, network.task)
    require_equal(scores, expected_of(run, network, other, data, queries))
    assert all(p.requires_grad for p in other.parameters())


def test_the_path_through_running_statistics_matters(tmp_path: Path) -> None:
    """The derivative with running statistics held constant is another one."""
    network = NETWORKS["batch norm"]
    run, module, data = record(tmp_path, network, OPTIMIZERS["nesterov"])
    queries = network.data(2, seed=7)
    expected = expected_of(run, network, module, data, queries).sum(0)
    end = run.checkpoints[run.last_step]

    def held(module: nn.Module, batch: Any) -> Tensor:
        """The loss with the statistics that training ended with, as constants."""
        for name, part in module.named_modules():
            if f"{name}.running_mean" in end.buffers:
                part.mean = end.buffers[f"{name}.running_mean"]
                part.variance = end.buffers[f"{name}.running_var"]
        return network.loss(module, batch)

    constant = oracles.removals(
        run, module, network.loss, fetching(data), held, everything(queries)
    ).sum(0)
    assert relative(constant, expected) > 0.01


# Retraining


@pytest.mark.parametrize("name", ["mlp", "batch norm", "transformer", "gru"])
def test_central_differences_of_retraining(name: str, tmp_path: Path) -> None:
    network, optimizer = NETWORKS[name], per_epoch(adam(adamw), StepLR, step_size=1, gamma=0.5)
    run, module, data = record(tmp_path, network, optimizer, gradient_clip_val=1.0)
    queries = network.data(2, seed=7)
    scores = scores_of(run, module, data, queries, network.task)
    found = differences_of(run, module, network.task, data, queries, [0, 3, 9])
    assert relative(scores.values[:, [0, 3, 9]], found) < 1e-4


# What must not matter


@pytest.mark.parametrize("checkpoints", [(), (3,), range(1, 7)])
def test_how_many_checkpoints_there_are_changes_nothing(checkpoints: Any) -> None:
    name = "adamw"
    run, module, data = in_memory(MLP, OPTIMIZERS[name], checkpoints=checkpoints)
    steps = {0, len(BATCHES), *(step for step in checkpoints if step <= len(BATCHES))}
    assert set(run.checkpoints) == steps
    expected = expected_in_memory(MLP, run, module, data, cuts=(0, run.last_step)).sum(0)
    scores = unroll(MLP, run, module, data)
    assert relative(scores.values, expected) < EXACT
    require_equal(scores, expected_in_memory(MLP, run, module, data))


@pytest.mark.parametrize("kept", [lambda step: False, lambda step: step in (0, 4)])
@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_checkpoints_without_optimizer_state(name: str, kept: Any) -> None:
    run, module, data = in_memory(MLP, OPTIMIZERS[name], checkpoints=(2, 4, 5, 7))
    whole = unroll(MLP, run, module, data)
    states = {
        step: dataclasses.replace(one, optimizer=one.optimizer if kept(step) else None)
        for step, one in run.checkpoints.items()
    }
    scores = unroll(MLP, dataclasses.replace(run, checkpoints=states), module, data)
    assert relative(scores.by_segment, whole.by_segment) < EXACT
    require_equal(scores, expected_in_memory(MLP, run, module, data))


@pytest.mark.parametrize("recorder", [{"save_optimizer": False}, {"save_optimizer": 2}])
def test_recorded_without_optimizer_state(recorder: dict[str, Any], tmp_path: Path) -> None:
    network, optimizer = NETWORKS["dropout"], OPTIMIZERS["adamw"]
    run, module, data = record(tmp_path, network, optimizer, recorder=recorder)
    assert any(run.checkpoints[step].optimizer is None for step in run.checkpoints)
    queries = network.data(2, seed=7)
    scores = scores_of(run, module, data, queries, network.task)
    require_equal(scores, expected_of(run, network, module, data, queries))
    assert scores.provenance["certificate"]["bit_equal"]


def test_batches_of_the_attribution_change_nothing(tmp_path: Path) -> None:
    network = NETWORKS["batch norm"]
    run, module, data = record(tmp_path, network, OPTIMIZERS["adamw"])
    queries = network.data(5, seed=7)
    found = [
        scores_of(run, module, data, queries, network.task, batch_size=size).values
        for size in (1, 3, 256)
    ]
    found.append(
        scores_of(run, module, loader(data, 3, shuffle=True), queries, network.task).values
    )
    for one in found[1:]:
        assert relative(one, found[0]) < 1e-11


def test_weights_and_modes_are_left_as_they_were(tmp_path: Path) -> None:
    network = NETWORKS["batch norm"]
    run, module, data = record(tmp_path, network, OPTIMIZERS["adamw"])
    module.net[1].eval()
    queries = network.data(2, seed=7)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    scores_of(run, module, data, queries, network.task)
    assert [part.training for part in module.modules()] == modes
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
