"""Sampled losses, and the noise behind them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tda_lightning.tasks import (
    ClassificationTask,
    LanguageModelingTask,
    RegressionTask,
    TrainingStepTask,
    gauss_newton_losses,
    seeded_examples,
)
from tests.cases.tasks import (
    EXAMPLES,
    INPUTS,
    NUMBERS,
    TASKS,
    Step,
    built,
    outer_sum,
    per_example_gradients,
    task_case,
)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "margin"])
def test_sampled_losses_have_the_gauss_newton_matrix_as_second_moment(name):
    task, module, batch = task_case(name)
    assert task.can_sample
    matrix = sum(outer_sum(task, module, batch, index) for index in range(EXAMPLES))
    draws = 150
    moments = []
    for draw in range(draws):
        with seeded_examples(draw, torch.arange(EXAMPLES)):
            gradients = per_example_gradients(task.sampled_loss(module, batch), module)
        moments.append(gradients.T @ gradients)
    moments = torch.stack(moments)
    error = (moments.mean(0) - matrix).norm()
    expected = ((moments - matrix).square().sum((1, 2)).mean() / draws).sqrt()
    assert error < 2 * expected + 1e-12 * matrix.norm()
    assert expected < 0.2 * matrix.norm()


def test_one_output_is_sampled_without_noise():
    module = Step(None, outputs=1)
    task, batch = RegressionTask(), (INPUTS, NUMBERS[:, :1])
    gradients = per_example_gradients(task.sampled_loss(module, batch), module)
    matrix = sum(outer_sum(task, module, batch, index) for index in range(EXAMPLES))
    torch.testing.assert_close(gradients.T @ gradients, matrix)


def test_reduction_of_the_same_total_changes_nothing():
    results = []
    for name in ("mean", "module", "sum", "none", "nll"):
        module, batch = built(name)
        with seeded_examples(0, torch.arange(EXAMPLES)):
            results.append(
                per_example_gradients(TrainingStepTask().sampled_loss(module, batch), module)
            )
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    tokens, module, batch = task_case("tokens")
    per_batch = LanguageModelingTask(reduction="batch")
    torch.testing.assert_close(
        tokens.train_loss(module, batch), per_batch.train_loss(module, batch)
    )


@pytest.mark.parametrize("name", ["classification", "regression", "tokens batch"])
def test_noise_belongs_to_the_example(name):
    task, module, batch = task_case(name)
    indices = torch.tensor([40, 7, 0, 3, 123456789, 5])

    def sampled(order, seed=1):
        rows = torch.tensor(order)
        take = torch.utils._pytree.tree_map(lambda value: value[rows], batch)
        with seeded_examples(seed, indices[rows]):
            return per_example_gradients(task.sampled_loss(module, take), module)

    whole = sampled(range(EXAMPLES))
    torch.testing.assert_close(torch.cat([sampled([0, 1]), sampled([2, 3, 4, 5])]), whole)
    torch.testing.assert_close(sampled([5, 3, 1, 0, 2, 4])[[3, 2, 4, 1, 5, 0]], whole)
    assert not torch.allclose(sampled(range(EXAMPLES), seed=2), whole)
    state = torch.get_rng_state()
    sampled([0])
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_uniform():
    from tda_lightning.tasks.example_seeds import random_integers

    with seeded_examples(3, torch.arange(400)):
        draws = random_integers(400, 50, 0, torch.device("cpu")).double() / 2**31
        other = random_integers(400, 50, 1, torch.device("cpu")).double() / 2**31
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(float(draws.mean()) - 0.5) < 0.01
    bins = torch.histc(draws, 20, 0, 1)
    assert float(((bins - 1000).square() / 1000).sum()) < 45  # chi-squared, 19 degrees
    for left, right in ((draws, other), (draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        pair = torch.stack([left.flatten(), right.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.03


def test_masked_classes_and_sure_models_stay_finite():
    class Sure(nn.Module):
        def forward(self, inputs):
            return inputs

    logits = torch.tensor([[1.0, -torch.inf, 0.0], [200.0, 0.0, -200.0]], requires_grad=True)
    batch, task = (logits, torch.tensor([0, 0])), ClassificationTask()
    losses = [task.sampled_loss(Sure(), batch), *gauss_newton_losses(task, Sure(), batch)]
    gradients = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in losses]
    assert torch.stack(losses).isfinite().all()
    probabilities = logits.detach().softmax(1)
    found = sum(gradient[0].outer(gradient[0]) for gradient in gradients[1:])
    first = probabilities[0]
    torch.testing.assert_close(found, first.diag() - first.outer(first))
    assert torch.stack(gradients)[:, 1].abs().max() == 0


def test_many_classes_have_independent_signs():
    from tda_lightning.tasks.example_seeds import random_signs

    with seeded_examples(0, torch.arange(2000)):
        signs = random_signs(2000, 2, 70, 0, torch.device("cpu")).flatten(1).double()
        longer = random_signs(2000, 3, 70, 0, torch.device("cpu")).flatten(1)
    correlations = signs.T @ signs / 2000 - torch.eye(140)
    assert correlations.abs().max() < 5 / 2000**0.5
    assert torch.equal(longer[:, :140].double(), signs)  # padding moves nothing


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_is_the_same_on_the_gpu():
    from tda_lightning.tasks.example_seeds import random_integers

    with seeded_examples(-7, torch.tensor([3, 2**40])):
        draws = [random_integers(2, 9, 1, torch.device(name)).cpu() for name in ("cpu", "cuda")]
    assert torch.equal(*draws)
