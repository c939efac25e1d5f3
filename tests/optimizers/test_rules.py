"""Each rule's adjoint is the derivative of its optimizer's step, whatever the options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tda_lightning.optimizers import (
    OptimizerRule,
    ParameterStep,
    find_rule,
    optimizer_name,
    read_rates,
)
from tda_lightning.records.errors import UnsupportedTrainingError
from tests.attributing import relative
from tests.oracles.unrolling import UPDATES

STEPS, QUERIES = 7, 3
muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1}),
    "dampening": ("SGD", {"lr": 0.1, "momentum": 0.8, "dampening": 0.3}),
    "dampening without momentum": ("SGD", {"lr": 0.1, "dampening": 0.3}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    "adam": ("Adam", {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    "adam, default moments": ("Adam", {"lr": 0.01}),
    "adam, large eps": ("Adam", {"lr": 0.05, "eps": 0.1}),
    "adamw": ("AdamW", {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.5}),
    "rmsprop": ("RMSprop", {"lr": 0.02, "alpha": 0.8, "weight_decay": 0.1}),
    "rmsprop, default": ("RMSprop", {"lr": 0.01}),
    "rmsprop, centered": ("RMSprop", {"lr": 0.02, "alpha": 0.8, "centered": True}),
    "rmsprop, momentum": ("RMSprop", {"lr": 0.01, "alpha": 0.8, "momentum": 0.7, "eps": 1e-3}),
    "rmsprop, everything": (
        "RMSprop",
        {"lr": 0.01, "alpha": 0.7, "momentum": 0.6, "centered": True, "weight_decay": 0.2},
    ),
    "adagrad": ("Adagrad", {"lr": 0.1}),
    "adagrad, everything": (
        "Adagrad",
        {
            "lr": 0.1,
            "lr_decay": 0.2,
            "weight_decay": 0.1,
            "initial_accumulator_value": 0.3,
            "eps": 1e-2,
        },
    ),
    "muon": ("Muon", {"lr": 0.05}),
    "muon, plain momentum": ("Muon", {"lr": 0.05, "nesterov": False, "momentum": 0.7}),
    "muon, everything": (
        "Muon",
        {
            "lr": 0.05,
            "weight_decay": 0.4,
            "adjust_lr_fn": "match_rms_adamw",
            "ns_steps": 3,
            "ns_coefficients": (3.0, -4.0, 1.7),
            "eps": 1e-3,
            "momentum": 0.5,
        },
    ),
}
SHAPES = {"tall": (5, 3), "wide": (2, 4)}


def cases() -> list[Any]:
    skipped = [muon]
    return [pytest.param(name, marks=skipped if CASES[name][0] == "Muon" else []) for name in CASES]


class Problem:
    """Gradients g_t = A_t theta + w_t c_t, whose Hessian is known, of one matrix of parameters."""

    def __init__(self, shape: tuple[int, ...], zeros: bool) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        size = shape[0] * shape[1]
        self.shape, self.start = shape, normal(*shape)
        roots = normal(STEPS, size, size) / size**0.5
        self.hessians = roots @ roots.mT
        self.shifts = normal(STEPS, *shape)
        if zeros:  # the first number never has a gradient, the second none at first
            for unused, until in ((0, STEPS), (1, 4)):
                self.hessians[:until, unused], self.hessians[:until, :, unused] = 0, 0
                self.shifts.view(STEPS, -1)[:until, unused] = 0
        self.queries = normal(QUERIES, *shape)

    def gradient(self, row: int, parameter: Tensor, weight: Tensor) -> Tensor:
        return self.curve(row, parameter[None])[0] + weight * self.shifts[row]

    def curve(self, row: int, vectors: Tensor) -> Tensor:
        return (vectors.flatten(1) @ self.hessians[row]).view(vectors.shape)


def rate_at(row: int, rate: float) -> float:
    return rate / (1 + 0.1 * row)


def train(problem: Problem, name: str, options: dict[str, Any]) -> tuple[Any, ...]:
    """The run by torch.optim: its rule, where it ends, and what each step was."""
    parameter = torch.nn.Parameter(problem.start.clone())
    optimizer = getattr(torch.optim, name)([parameter], **options)
    rule = find_rule(optimizer_name(optimizer))
    assert rule is not None
    steps = []
    for row in range(STEPS):
        group = optimizer.param_groups[0]
        group["lr"] = rate_at(row, options["lr"])
        before = parameter.detach().clone()
        held = set(optimizer.state.get(parameter, {}))
        parameter.grad = problem.gradient(row, before, torch.ones(()))
        seen = parameter.grad.clone()
        settings = rule.read(group)
        if not rule.decoupled:
            seen += settings["weight_decay"] * before
        optimizer.step()
        states = {key: value.clone() for key, value in optimizer.state[parameter].items()}
        count = float(states.get("step", 0))
        new = frozenset(states.keys() - held)
        read = {key: states[key] for key in rule.reads if key in states}
        steps.append(ParameterStep(group["lr"], settings, seen, read, count, new))
    return rule, parameter.detach(), steps, optimizer


def backwards(problem: Problem, rule: OptimizerRule, steps: list[ParameterStep]) -> Tensor:
    """d (queries . theta_T) / d w_t by the rule's adjoint, [query, step]."""
    a, states = problem.queries.clone(), {}
    for key in rule.states:
        states[key] = torch.zeros_like(a)
    columns = []
    for row in reversed(range(STEPS)):
        step = steps[row]
        kept = a.clone()
        u = rule.adjoint(a, states, step)
        assert torch.equal(a, kept)
        decay = step.settings["weight_decay"]
        a = a * (1 - step.rate * decay) if rule.decoupled else a + decay * u
        columns.append((u * problem.shifts[row]).flatten(1).sum(1))
        a = a + problem.curve(row, u)
    return torch.stack(columns[::-1], 1)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", cases())
def test_the_adjoint_is_the_derivative_of_the_steps(case: str, shape: str, zeros: bool) -> None:
    name, options = CASES[case]
    problem = Problem(SHAPES[shape], zeros)
    rule, end, steps, _ = train(problem, name, options)
    weights = torch.ones(STEPS, dtype=torch.float64, requires_grad=True)
    parameter, state = problem.start.clone().requires_grad_(), {}
    for row in range(STEPS):
        gradient = problem.gradient(row, parameter, weights[row])
        settings = {key: float(value) for key, value in steps[row].settings.items()}
        parameter = UPDATES[name](parameter, gradient, state, steps[row].rate, settings)
    assert relative(parameter.detach(), end) < 1e-12  # the restatement is the optimizer
    measured = (problem.queries * parameter).flatten(1).sum(1)
    expected = torch.stack(
        [torch.autograd.grad(m, weights, retain_graph=True)[0] for m in measured]
    )
    assert expected.abs().max() > 1e-3
    assert relative(backwards(problem, rule, steps), expected) < 1e-8


@pytest.mark.parametrize("case", cases())
def test_settings_are_read_and_written_back(case: str) -> None:
    name, options = CASES[case]
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = getattr(torch.optim, name)([parameter], **options)
    other = getattr(torch.optim, name)([torch.nn.Parameter(torch.zeros(2, 2))])
    rule = find_rule(name)
    group = other.param_groups[0]
    rule.write(group, rule.read(optimizer.param_groups[0]))
    wanted = dict(optimizer.param_groups[0])
    for key in ("params", "lr"):
        del wanted[key]
    assert {key: group[key] for key in wanted} == wanted
    assert all(isinstance(group[key], type(value)) for key, value in options.items() if key != "lr")


class Renamed(torch.optim.AdamW):
    pass


class OwnStep(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("first", [Renamed, torch.optim.AdamW])
def test_a_subclass_is_its_parent_unless_it_steps_in_its_own_way(first: Any) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    first(parameters)  # torch.optim hooks the step of the class that is made first
    assert optimizer_name(Renamed(parameters)) == "AdamW"
    assert optimizer_name(OwnStep(parameters)) == "tests.optimizers.test_rules.OwnStep"
    assert optimizer_name(torch.optim.AdamW(parameters)) == "AdamW"
    assert optimizer_name(torch.optim.Adam(parameters)) == "Adam"
    mixed = [
        {"params": [torch.nn.Parameter(torch.zeros(2))], "decoupled_weight_decay": d}
        for d in (True, False)
    ]
    assert optimizer_name(torch.optim.Adam(mixed)) == "Adam(decoupled_weight_decay=True)"


def test_a_run_without_rates_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(UnsupportedTrainingError, match="has no learning rate in its parameter"):
        read_rates(optimizer)
