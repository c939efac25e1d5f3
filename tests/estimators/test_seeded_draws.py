"""Losses that draw random numbers where no run's draws can be had: means over seeded draws."""

from __future__ import annotations

import pytest
import torch

from tda_lightning import AttributionModule
from tda_lightning.estimators import InfluenceFunction, Source, TracIn
from tda_lightning.evaluation import measure
from tda_lightning.tasks import MEASURED_SEED, numbered_draw, seeded_examples
from tests import noisy
from tests.attributing import quiet

QUERIES = noisy.data(3, seed=5)
FAST = ("vae", "negatives")
SLOW = pytest.mark.slow
BY_EXAMPLE = [pytest.param(name, marks=() if name in FAST else SLOW) for name in noisy.BY_EXAMPLE]


def scores_of(module, run, estimator, task=None, queries=QUERIES, **options):
    attribution = AttributionModule(module, run, estimator, task)
    return attribution.attribute(noisy.data(), queries, trainer=quiet(), **options)


def mean_gradients(module, run, dataset, seed, draws):
    """The mean over seeded draws of each example's gradient, an example after the other."""
    x, y = dataset.tensors
    rows = []
    for index in range(len(x)):
        each = []
        for draw in range(draws):
            with numbered_draw(draw), seeded_examples(seed, torch.tensor([index])):
                one = slice(index, index + 1)
                each.append(
                    noisy.gradients(
                        module, run, run.last_step, lambda m, o=one: m.noise.rows(m, x[o], y[o])
                    )
                )
        rows.append(torch.stack(each).mean(0))
    return torch.cat(rows)


@pytest.mark.parametrize("name", BY_EXAMPLE)
def test_gradients_are_means_over_seeded_draws_whatever_the_batches(name, tmp_path):
    module, run = noisy.recorded(tmp_path / "run", name, checkpoints=1, epochs=1)
    estimator = InfluenceFunction(curvature="identity", damping=1.0)
    scores = scores_of(module, run, estimator, draws=3, batch_size=5)
    own = mean_gradients(module, run, noisy.data(), 0, 3)
    measured = mean_gradients(module, run, QUERIES, MEASURED_SEED, 3)
    assert noisy.relative(scores.values, measured @ own.T / (2 * noisy.TRAIN)) < 1e-8
    other = scores_of(module, run, estimator, draws=3, batch_size=12)
    assert noisy.relative(other.values, scores.values) < 1e-12
    assert scores.provenance["draws"] == 3
    assert any("3 seeded draws" in note for note in scores.provenance["notes"])
    task = AttributionModule(module, run, estimator).task
    task.draws = 3
    state = {**run.checkpoints[run.last_step].parameters}
    found = measure(module, task, state, QUERIES)
    assert torch.allclose(found.float(), torch.tensor(scores.provenance["measurements"]))


def test_curvature_is_a_mean_over_draws(tmp_path):
    """Gauss-Newton of cross entropy with noisy inputs, from full Jacobians."""
    module, run = noisy.recorded(tmp_path / "run", "noisy inputs", checkpoints=1, epochs=1)
    x, _ = noisy.data().tensors
    matrix = 0.0
    for draw in range(2):
        for index in range(len(x)):
            with numbered_draw(draw), seeded_examples(0, torch.tensor([index])):
                noise = torch.randn_like(x[index : index + 1])

            def logits(m, index=index, noise=noise):
                return m.f(x[index : index + 1] + 0.5 * noise)[0]

            jacobian = noisy.gradients(module, run, run.last_step, logits)
            chances = logits(module).detach().softmax(0)
            inner = chances.diag() - chances[:, None] * chances
            matrix = matrix + jacobian.T @ inner @ jacobian / (2 * len(x))
    damped = matrix + 0.1 * torch.eye(len(matrix))
    own = mean_gradients(module, run, noisy.data(), 0, 2)
    measured = mean_gradients(module, run, QUERIES, MEASURED_SEED, 2)
    expected = measured @ torch.linalg.solve(damped, own.T) / noisy.TRAIN
    estimator = InfluenceFunction(curvature="exact", damping=0.1)
    scores = scores_of(module, run, estimator, draws=2)
    assert noisy.relative(scores.values, expected) < 1e-8
    # What was fitted for two draws does not serve one.
    single = scores_of(module, run, estimator)
    assert noisy.relative(single.values, expected) > 1e-3


def test_the_mean_over_draws_has_less_noise():
    """What noise adds to a gradient has the mean 0 and a variance of 1 / draws."""
    x = torch.randn(2000, 3)

    def variance(draws):
        total = 0.0
        for draw in range(draws):
            with numbered_draw(draw), seeded_examples(0, torch.arange(2000)):
                total = total + torch.randn_like(x) / draws
        return float(total.square().mean())

    assert variance(1) == pytest.approx(1.0, rel=0.1)
    assert variance(16) == pytest.approx(1 / 16, rel=0.1)


@pytest.mark.parametrize(
    "name",
    [
        "mixup, weight from numpy",
        pytest.param("mixup", marks=SLOW),
        pytest.param("pasted", marks=SLOW),
    ],
)
def test_mixed_examples_have_the_losses_of_their_rows(name, tmp_path):
    module, run = noisy.recorded(tmp_path / "run", name, checkpoints=1, epochs=1)
    x, y = noisy.data().tensors
    estimator = InfluenceFunction(curvature="identity", damping=1.0)
    scores = scores_of(
        module, run, estimator, noisy.CleanMeasurement(), draws=2, batch_size=noisy.TRAIN
    )
    each = []
    for draw in range(2):
        with numbered_draw(draw), seeded_examples(0, torch.arange(noisy.TRAIN)):
            each.append(
                noisy.gradients(module, run, run.last_step, lambda m: m.noise.rows(m, x, y))
            )
    measured = noisy.gradients(
        module, run, run.last_step, lambda m: noisy.clean(m, QUERIES.tensors[0])
    )
    expected = measured @ torch.stack(each).mean(0).T / (2 * noisy.TRAIN)
    assert noisy.relative(scores.values, expected) < 1e-8
    assert any("mixed with another" in note for note in scores.provenance["notes"])
    attribution = AttributionModule(module, run, estimator)
    assert max(attribution.check(noisy.data(), QUERIES).values()) < 1e-8


@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=SLOW), "adamw"])
def test_the_recorded_order_is_that_of_the_noisy_data(optimizer, tmp_path):
    """In one epoch every example is used once: the run is that on the noisy inputs, as data."""
    module, run = noisy.recorded(tmp_path / "a", "noisy inputs", 3, 1, optimizer=optimizer)
    x, y = noisy.data().tensors
    noisy_x = x.clone()
    for row, states in enumerate(module.states):
        (chosen,) = run.steps.batches(row)
        with noisy.drawing(states):
            noisy_x[chosen] += 0.5 * torch.randn_like(x[chosen])
    order = torch.cat([run.steps.batches(row)[0] for row in range(run.last_step)])
    data = torch.utils.data.TensorDataset(noisy_x, y)
    plain, other = noisy.recorded(
        tmp_path / "b", "plain", 3, 1, optimizer=optimizer, dataset=data, order=order.tolist()
    )
    assert all(
        torch.equal(other.checkpoints[3].parameters[name], value)
        for name, value in run.checkpoints[3].parameters.items()
    )
    estimator = Source(order="recorded", curvature="identity", num_segments=1)
    task = noisy.CleanMeasurement()
    scores = scores_of(module, run, estimator, task)
    attribution = AttributionModule(plain, other, estimator, task)
    expected = attribution.attribute(data, QUERIES, trainer=quiet())
    assert noisy.relative(scores.values, expected.values) < 1e-8
    assert any("the run's own draws" in note for note in scores.provenance["notes"])


def test_seeded_draws_stand_in_for_draws_that_were_not_recorded(tmp_path):
    module, run = noisy.recorded(tmp_path / "run", "noisy inputs", checkpoints=1, epochs=1)
    run.facts.settings["random"] = "absent: lost"
    scores = scores_of(module, run, TracIn(), noisy.CleanMeasurement())
    own = mean_gradients(module, run, noisy.data(), 0, 1)
    measured = noisy.gradients(
        module, run, run.last_step, lambda m: noisy.clean(m, QUERIES.tensors[0])
    )
    rate = noisy.RATE / (1 - noisy.MOMENTUM) * run.last_step
    assert noisy.relative(scores.values, rate * measured @ own.T / noisy.TRAIN) < 1e-8
    assert any("cannot be had" in note for note in scores.provenance["notes"])


def test_draws_are_a_positive_number(tmp_path):
    module, run = noisy.recorded(tmp_path / "run", "noisy inputs", checkpoints=1, epochs=1)
    with pytest.raises(ValueError, match="draws must be at least 1"):
        scores_of(module, run, TracIn(), draws=0)
