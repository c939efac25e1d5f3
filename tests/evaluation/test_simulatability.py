"""Fine-tuning on single examples against a plain loop, and runs with random weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Scores
from tda_lightning.estimators import TracIn
from tda_lightning.evaluation import (
    agreement,
    chosen_examples,
    fine_tuned_changes,
    last_checkpoint,
    randomised,
    simulatability,
)
from tda_lightning.records.errors import NonFiniteError
from tests import runs as recorded
from tests.cases.training import CLASSIFIER, queries_of
from tests.evaluation.test_evaluation import small


def test_steps_on_an_example_are_those_of_a_plain_loop() -> None:
    run, module, task, data = small("adam")
    queries = TensorDataset(*queries_of(CLASSIFIER))
    before = copy.deepcopy(module.state_dict())
    found = fine_tuned_changes(module, task, run, data, queries, [7, 2], steps=[1, 3], rate=0.2)
    assert found.shape == (3, 2, 2)
    inputs, targets = queries.tensors
    for column, example in enumerate([7, 2]):
        tuned = copy.deepcopy(module)
        tuned.load_state_dict(dict(run.checkpoints[run.last_step].parameters))
        optimizer = torch.optim.SGD(tuned.parameters(), 0.2)
        start = F.cross_entropy(tuned(inputs), targets, reduction="none")
        for step in range(1, 4):
            optimizer.zero_grad()
            x, y = data[example]
            F.cross_entropy(tuned(x[None]), y[None]).backward()
            optimizer.step()
            if step in (1, 3):
                change = F.cross_entropy(tuned(inputs), targets, reduction="none") - start
                torch.testing.assert_close(found[:, column, step // 2], change, rtol=1e-10, atol=0)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_small_step_moves_a_loss_by_the_dot_product_of_gradients() -> None:
    """The first-order closed form: all signs right, ranks and sizes too."""
    run, module, task, data = small("sgd")
    queries = TensorDataset(*queries_of(CLASSIFIER))
    work = (module, last_checkpoint(run), TracIn(), task)
    scores = AttributionModule(*work).attribute(data, queries, trainer=recorded.trainer())
    chosen = chosen_examples(scores, each=2)
    changes = fine_tuned_changes(module, task, run, data, queries, range(10), [1], rate=1e-6)
    own = torch.stack([changes[q, chosen[q].flatten(), :].view(3, 2, 1) for q in range(3)])
    (found,) = simulatability(scores, chosen, own, [1])
    assert found.rank.value == pytest.approx(1)
    assert {kind: part.value for kind, part in found.agrees.items()} == dict.fromkeys(
        ("helpful", "harmful", "random"), 1
    )
    assert found.change["helpful"].value < found.change["harmful"].value
    ratio = -changes[:, :, 0] / scores.values
    torch.testing.assert_close(ratio / ratio.mean(), torch.ones_like(ratio), rtol=1e-3, atol=0)


def test_the_examples_are_the_extremes_and_random_ones_with_a_score() -> None:
    nan = math.nan
    values = torch.tensor([[5.0, nan, -4.0, 3.0, 1.0, nan], [nan, 1.0, 2.0, 3.0, nan, 4.0]])
    candidates = torch.tensor([[0, 2, 3, 4], [1, 2, 3, 5]])
    chosen = chosen_examples(Scores(values, candidates=candidates), each=2)
    assert chosen[:, 0].tolist() == [[0, 3], [5, 3]]
    assert chosen[:, 1].tolist() == [[2, 4], [1, 2]]
    for query, row in enumerate(chosen[:, 2]):
        assert set(row.tolist()) <= set(candidates[query].tolist()) and len(set(row.tolist())) == 2


def test_scores_of_the_wrong_sign_foresee_nothing() -> None:
    scores = Scores(torch.tensor([[3.0, -1.0, 2.0, -2.0]] * 5))
    chosen = chosen_examples(scores, each=1)
    fell = scores.values.gather(1, chosen.flatten(1)).view(5, 3, 1, 1)  # rises where it should fall
    (found,) = simulatability(scores, chosen, fell, [1])
    assert found.agrees["helpful"].value == found.agrees["harmful"].value == 0
    assert found.rank.value == pytest.approx(-1)


def test_impossible_steps_are_refused() -> None:
    run, module, task, data = small("sgd")
    for steps, rate, message in (
        ([], 0.1, "numbers of steps"),
        ([5, 1], 0.1, "increasing order"),
        ([0, 1], 0.1, "numbers of steps"),
        ([1], 0.0, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            fine_tuned_changes(module, task, run, data, data, [0], steps, rate)
    with pytest.raises(NonFiniteError, match="not finite"):
        fine_tuned_changes(module, task, run, data, data, [0], [4], math.inf)


# Runs with random weights


class Scaled(nn.Module):
    """One parameter that no layer draws."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.full((50,), 4.0))


def test_every_checkpoint_has_the_same_random_weights_and_nothing_gathered() -> None:
    run, module, _, _ = small("sgd", checkpoints=[4])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = randomised(run, module, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(found.checkpoints) == list(run.checkpoints) and found.path is None
    again, other = randomised(run, module, seed=3), randomised(run, module, seed=4)
    for name, trained in run.checkpoints[run.last_step].parameters.items():
        first = found.checkpoints[0].parameters[name]
        assert first.dtype == trained.dtype and first.shape == trained.shape
        assert torch.equal(found.checkpoints[run.last_step].parameters[name], first)
        assert torch.equal(again.checkpoints[4].parameters[name], first)
        assert not torch.equal(other.checkpoints[4].parameters[name], first)
        assert not torch.equal(trained, first)
    # As Linear draws them: uniform within 1 / sqrt(3).
    assert float(found.checkpoints[0].parameters["0.weight"].abs().max()) <= 3**-0.5


def test_a_parameter_that_no_layer_draws_keeps_its_mean_and_deviation() -> None:
    from tda_lightning.evaluation.randomised import _drawn

    module = Scaled()
    trained = {"scale": 4 + torch.linspace(-1, 1, 50), "layer.weight": torch.full((2, 3), 9.0)}
    drawn = _drawn(module, trained, seed=0)
    assert float(drawn["scale"].mean()) == pytest.approx(4, abs=0.4)
    assert float(drawn["scale"].std()) == pytest.approx(0.59, abs=0.2)
    assert float(drawn["layer.weight"].abs().max()) <= 3**-0.5
    assert torch.equal(module.scale, torch.full((50,), 4.0))  # nothing is changed in place


def test_scores_of_a_randomised_run_are_products_of_gradients_at_the_random_weights() -> None:
    run, module, task, data = small("sgd", checkpoints=[4])
    queries = TensorDataset(*queries_of(CLASSIFIER))
    other = randomised(run, module)
    scores = AttributionModule(module, other, TracIn(), task).attribute(
        data, queries, trainer=recorded.trainer()
    )
    state = other.checkpoints[0].parameters

    def gradients(inputs, targets):
        def loss(weights, x, y):
            return F.cross_entropy(torch.func.functional_call(module, weights, x[None]), y[None])

        each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(dict(state), inputs, targets)
        return torch.cat([value.flatten(1) for value in each.values()], 1)

    expected = gradients(*queries.tensors) @ gradients(*data.tensors).T
    rates = float(run.steps.learning_rate.sum())
    torch.testing.assert_close(scores.values, expected * rates / 10, rtol=1e-8, atol=0)
    real = AttributionModule(module, run, TracIn(), task).attribute(
        data, queries, trainer=recorded.trainer()
    )
    assert agreement(real, scores).value < 0.99 < agreement(real, real).value
