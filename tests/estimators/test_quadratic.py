"""Least squares by gradient descent: SOURCE is leave-one-out retraining, to the order 1/N."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from tda_lightning.estimators import Source
from tda_lightning.optimizers import applied_rates
from tests import oracles
from tests.attributing import attribute
from tests.cases.training import LINEAR, OPTIMIZERS, queries_of
from tests.quick import quick

STEPS, LEFT_OUT = 60, 8
SEGMENTS = 12
LEVERAGE = 4  # of all examples together: inputs and bias of each output


def trained(count: int, optimizer: str):
    data = LINEAR.batch(count)
    batches = [[list(range(count))]] * STEPS
    steps = range(0, STEPS, 5)
    return data, oracles.record_run(
        LINEAR.build(), LINEAR.loss, data, OPTIMIZERS[optimizer], batches, steps
    )


def slope_and_ranks(truth: Tensor, scores: Tensor) -> tuple[float, float]:
    """Slope of the truth on the scores, and the mean over queries of their rank correlation."""
    ranks = [float(spearmanr(a, b).statistic) for a, b in zip(truth, scores, strict=True)]
    return float((scores * truth).sum() / scores.square().sum()), sum(ranks) / len(ranks)


RUNS: list[tuple[str, dict[str, str]]] = [
    ("decay", {}),
    ("momentum", {"momentum": "recursion"}),
    ("decay", {"order": "recorded"}),
    ("momentum", {"order": "recorded"}),
]


@pytest.mark.parametrize(
    ("optimizer", "options"),
    quick(RUNS, [RUNS[0], RUNS[3]]),
    ids=["average", "momentum", "recorded", "recorded momentum"],
)
def test_source_is_leave_one_out_retraining(optimizer, options) -> None:
    """A weight of 0 keeps the batch's denominator: exact to first order, so that the slope's error
    falls with 1/N. With fewer than all steps as segments, gradients add an error of their own."""
    slopes = []
    for count in (20, 80):
        data, run = trained(count, optimizer)
        estimator = Source(SEGMENTS, curvature="exact", **options)
        scores = attribute(
            LINEAR, run, LINEAR.build(), data, estimator, batch_size=count, self_influence=False
        ).values
        work = (run, LINEAR.build(), LINEAR.loss, data, LINEAR.loss, queries_of(LINEAR))
        derivative, _ = slope_and_ranks(oracles.unrolled(*work), scores)
        assert abs(derivative - 1) < 0.02
        removed = oracles.leave_one_out(*work, examples=range(LEFT_OUT))
        slope, ranks = slope_and_ranks(removed, scores[:, :LEFT_OUT])
        assert ranks > 0.95
        slopes.append(slope)
    # Removing an example lowers the curvature that resists it: the truth is larger by about its
    # leverage, LEVERAGE / N on average and more for the large scores that decide the slope.
    assert 0 < slopes[1] - 1 < 0.4 * (slopes[0] - 1)
    assert slopes[1] - 1 < 2 * LEVERAGE / 80


def test_removal_that_renormalises_is_the_centred_form() -> None:
    """docs/methods.md, "Judging scores": s' = N / (N - 1) (s - mean of s over the training set)."""
    count = 80
    data, run = trained(count, "sgd")
    scores = attribute(
        LINEAR, run, LINEAR.build(), data, Source(SEGMENTS, curvature="exact")
    ).values
    work = (run, LINEAR.build(), LINEAR.loss, data, LINEAR.loss, queries_of(LINEAR))
    removed = oracles.leave_one_out(*work, examples=range(LEFT_OUT), renormalise=True)
    centred = count / (count - 1) * (scores - scores.mean(1, keepdim=True))
    slope, ranks = slope_and_ranks(removed, centred[:, :LEFT_OUT])
    assert abs(slope - 1) < 2 * LEVERAGE / count
    assert ranks > 0.95


@pytest.mark.parametrize("optimizer", ["sgd", "decay"])
def test_the_exponent_is_the_measured_decay_of_descent(optimizer) -> None:
    """eta K sigma in the run's own units: a perturbation of the weights, unrolled, shrinks along
    each eigenvector as S(sigma) says, up to (1 - x / K)^K against exp(-x)."""
    data, run = trained(40, optimizer)
    (curvature,) = oracles.mean_curvature(
        run, run.segments(1), LINEAR.build(), LINEAR.criterion, data
    )
    decay = 0.05 if optimizer == "decay" else 0.0
    values, vectors = torch.linalg.eigh(curvature)
    start = run.checkpoints[0]
    ends = []
    for sign in (0.0, 1e-3):
        moved, place = {}, 0
        direction = vectors.sum(1)
        for name, fact in run.facts.parameters.items():
            size = torch.Size(fact.shape).numel()
            part = direction[place : place + size].reshape(fact.shape)
            moved[name], place = start.parameters[name] + sign * part, place + size
        module = LINEAR.build()
        with torch.no_grad():
            for name, value in moved.items():
                module.get_parameter(name).copy_(value)
        again = oracles.record_run(
            module, LINEAR.loss, data, OPTIMIZERS[optimizer], [[list(range(40))]] * STEPS, ()
        )
        end = again.checkpoints[STEPS].parameters
        ends.append(torch.cat([end[name].flatten() for name in run.facts.parameters]))
    measured = (vectors.T @ (ends[1] - ends[0])) / 1e-3
    exponent = float(applied_rates(run, slice(0, STEPS)).sum()) * (values + decay)
    assert exponent.max() > 1
    predicted = torch.exp(-exponent)
    torch.testing.assert_close(measured, predicted, rtol=0.25, atol=1e-3)
    exact = (1 - exponent / STEPS) ** STEPS
    torch.testing.assert_close(measured, exact, rtol=1e-6, atol=1e-9)
