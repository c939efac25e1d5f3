"""The Gauss-Newton matrix of losses that are no standard ones, against dense second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tda_lightning.tasks import (
    AttributionTask,
    TrainingStepTask,
    gauss_newton_losses,
    sampled_gauss_newton_loss,
    seeded_examples,
)
from tests.cases.tasks import EXAMPLES, INPUTS, LABELS, NUMBERS, Step, flat_gradient, outer_sum


def focal(o: Tensor, y: Tensor, t: Tensor) -> Tensor:
    own = F.cross_entropy(o, y, reduction="none")
    return (1 - torch.exp(-own)) ** 2 * own


def gaussian(o: Tensor, y: Tensor, t: Tensor) -> Tensor:
    mean, log_variance = o.chunk(2, 1)
    return 0.5 * (log_variance + (mean - t[:, :2]) ** 2 / log_variance.exp()).sum(1)


# Losses [batch] of outputs, labels and numbers.
LOSSES = {
    "square": lambda o, y, t: ((o - t) ** 2).sum(1),
    "huber": lambda o, y, t: F.huber_loss(o, t, reduction="none", delta=0.5).sum(1),
    "gather": lambda o, y, t: -o.log_softmax(1).gather(1, y[:, None])[:, 0],
    "focal": focal,
    "gaussian": gaussian,
    "poisson": lambda o, y, t: F.poisson_nll_loss(o, t.abs(), reduction="none").sum(1),
    "kl": lambda o, y, t: F.kl_div(o.log_softmax(1), t.softmax(1), reduction="none").sum(1),
    "probabilities": lambda o, y, t: F.binary_cross_entropy(
        o.sigmoid(), (t > 0).to(o), reduction="none"
    ).sum(1),
    "z": lambda o, y, t: F.cross_entropy(o, y, reduction="none") + 0.1 * o.logsumexp(1) ** 2,
    "cosine": lambda o, y, t: 1 - F.cosine_similarity(o, t),
    "dice": lambda o, y, t: (
        1 - 2 * (o.sigmoid() * t.sigmoid()).sum(1) / (o.sigmoid() + t.sigmoid()).sum(1)
    ),
}


def absolute(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.abs()) @ vectors.T


def dense(module: nn.Module, name: str, example: int) -> Tensor:
    """J^T |H| J of one example."""
    parameters = dict(module.named_parameters())
    rows = slice(example, example + 1)

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return functional_call(module, values, (INPUTS[rows],))[0]

    def loss(flat: Tensor) -> Tensor:
        return LOSSES[name](flat[None], LABELS[rows], NUMBERS[rows])[0]

    jacobian = torch.func.jacrev(outputs)(parameters)
    flat = torch.cat([part.flatten(1) for part in jacobian.values()], 1)
    hessian = torch.func.hessian(loss)(outputs(parameters).detach())
    return flat.T @ absolute(hessian) @ flat


def step(name: str) -> Any:
    return lambda self, x, y, t: LOSSES[name](self(x), y, t).mean()


BATCH = (INPUTS, LABELS, NUMBERS)


@pytest.mark.parametrize("name", LOSSES)
def test_the_matrix_of_any_loss(name: str) -> None:
    torch.manual_seed(1)
    module, task = Step(step(name)), TrainingStepTask()
    task.prepare(module, BATCH)
    assert task.can_sample
    for example in (0, EXAMPLES - 1):
        found = outer_sum(task, module, BATCH, example)
        torch.testing.assert_close(found, dense(module, name, example), rtol=1e-7, atol=1e-10)


@pytest.mark.slow
def test_sampled_losses_have_the_matrix_as_second_moment() -> None:
    torch.manual_seed(1)
    module, task = Step(step("focal")), TrainingStepTask()
    task.prepare(module, BATCH)
    total, draws = torch.zeros(()), 800
    for seed in range(draws):
        with seeded_examples(seed, torch.arange(EXAMPLES)):
            losses = sampled_gauss_newton_loss(task, module, BATCH)
        gradient = flat_gradient(losses[2], module)
        total = total + torch.outer(gradient, gradient) / draws
    wanted = dense(module, "focal", 2)
    assert (total - wanted).norm() < 0.2 * wanted.norm()


def test_two_calls_of_a_module_on_the_same_inputs_are_one_output() -> None:
    torch.manual_seed(1)
    module = Step(lambda s, x, y, t: ((s(x) - t) * (s(x) - t)).sum(1).mean())
    task = TrainingStepTask()
    task.prepare(module, BATCH)
    assert task.notes == []  # H is not indefinite
    found = outer_sum(task, module, BATCH, 0)
    torch.testing.assert_close(found, dense(module, "square", 0), rtol=1e-7, atol=1e-10)


class Bare(nn.Module):
    """Parameters outside of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return ((self.logits(batch[0]) - batch[2]) ** 2).sum(1).mean()


class Marked(TrainingStepTask):
    def outputs(self, module: nn.Module, batch: Any) -> list[Tensor]:
        return [module.logits(batch[0])]


def test_outputs_are_marked_by_hand() -> None:
    torch.manual_seed(1)
    module, task = Bare(), TrainingStepTask()
    task.prepare(module, BATCH)
    assert not task.can_sample
    assert any("AttributionTask.outputs" in note for note in task.notes)
    task = Marked()
    task.prepare(module, BATCH)
    assert task.can_sample
    jacobian = torch.kron(INPUTS[:1], torch.eye(4, dtype=torch.float64))
    found = outer_sum(task, module, BATCH, 0)
    torch.testing.assert_close(found, 2 * jacobian.T @ jacobian)


def test_a_wide_output_without_structure_has_no_matrix() -> None:
    torch.manual_seed(1)
    module = Step(lambda s, x, y, t: (s(x).sum(1) ** 4 + s(x).square().sum(1)).mean(), outputs=130)
    task = TrainingStepTask()
    task.prepare(module, BATCH)
    assert not task.can_sample
    assert any("130 outputs" in note and "empirical Fisher" in note for note in task.notes)


class LogDensity(nn.Module):
    """Returns the losses themselves, as the modules of normalizing flows do."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean).square().sum(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).mean()


FLAT = {
    "l1": lambda: Step(lambda s, x, y, t: F.l1_loss(s(x), t)),
    "hinge": lambda: Step(lambda s, x, y, t: F.relu(1 - s(x) * t.sign()).sum(1).mean()),
    "losses of a module": LogDensity,
}


@pytest.mark.parametrize("name", FLAT)
def test_without_a_second_derivative_curvature_is_the_empirical_fisher(name: str) -> None:
    torch.manual_seed(1)
    module, task = FLAT[name](), TrainingStepTask()
    task.prepare(module, BATCH)
    assert not task.can_sample
    assert any("is 0" in note and "empirical Fisher" in note for note in task.notes)


def test_a_task_whose_losses_are_no_standard_ones() -> None:
    class Focal(AttributionTask):
        def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
            return focal(module(batch[0]), batch[1], batch[2])

        def sampled_loss(self, module: nn.Module, batch: Any) -> Tensor:
            return sampled_gauss_newton_loss(self, module, batch)

    torch.manual_seed(1)
    module = Step(step("focal"))
    found = outer_sum(Focal(), module, BATCH, 3)
    torch.testing.assert_close(found, dense(module, "focal", 3), rtol=1e-7, atol=1e-10)
    assert len(list(gauss_newton_losses(Focal(), module, BATCH))) == 4
