"""Every estimator and solver on least squares, where its score is a function of one eigenvalue.

The examples in the docstrings are some of these; here the functions are written out.
"""

import math

import pytest
import torch

from tda_lightning.estimators import FastInfluence, InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.examples.least_squares import least_squares_scores
from tda_lightning.solvers import (
    ASTRA,
    ConjugateGradients,
    DataInf,
    Direct,
    Lanczos,
    LiSSA,
)

STEPS, RATE = 12, 0.05
TIME = STEPS * RATE
EIGENVALUES = torch.tensor([2.0, 2.0, 0.5, 0.5])  # of the direction that each example pulls in
GRADIENTS = torch.tensor([-2.0, 2.0, -1.0, 1.0])


def exponential(eigenvalue):
    return (1 - math.exp(-TIME * eigenvalue)) / eigenvalue


def descent(eigenvalue):
    """The sum of rate (1 - rate eigenvalue)^k over the steps."""
    return sum(RATE * (1 - RATE * eigenvalue) ** step for step in range(STEPS))


def mean_of_inverses(eigenvalue):
    """DataInf's, with damping 1: half of the gradients have the eigenvalue's direction."""
    square = 2 * eigenvalue
    return (1 + 1 / (square + 1)) / 2


CASES = {
    "tracin": (TracIn(), lambda _: TIME),
    "influence": (InfluenceFunction(damping=0.3), lambda e: 1 / (e + 0.3)),
    "influence, exact": (InfluenceFunction("exact", damping=0.3), lambda e: 1 / (e + 0.3)),
    "influence, segment": (InfluenceFunction(damping="segment"), lambda e: 1 / (e + 1 / TIME)),
    "influence, identity": (InfluenceFunction("identity", damping=0.5), lambda _: 1 / 1.5),
    "source": (Source(num_segments=1), exponential),
    "source, two segments": (Source(num_segments=2), exponential),
    "source, matrix-free": (Source(curvature="matrix_free", num_segments=2), exponential),
    "source, recorded order": (Source(num_segments=2, order="recorded"), descent),
    "source, recursion": (Source(num_segments=1, momentum="recursion"), descent),
    "unrolled": (Unrolled(), descent),
}
SOLVERS = {
    "direct": (Direct(), lambda e: 1 / (e + 1)),
    "conjugate gradients": (ConjugateGradients(), lambda e: 1 / (e + 1)),
    "preconditioned": (ConjugateGradients(preconditioner="ekfac"), lambda e: 1 / (e + 1)),
    "lanczos": (Lanczos(rank=2), lambda e: 1 / (e + 1)),
    "lissa": (LiSSA(depth=60, batch=4), lambda e: 1 / (e + 1)),
    "astra": (ASTRA(iterations=3, batch=None), lambda e: 1 / (e + 1)),
    "datainf": (DataInf(), mean_of_inverses),
}
CASES |= {name: (InfluenceFunction(damping=1.0, solver=s), f) for name, (s, f) in SOLVERS.items()}


@pytest.mark.parametrize("name", CASES)
def test_score_is_a_function_of_the_eigenvalue(name):
    estimator, function = CASES[name]
    factors = torch.tensor([function(float(eigenvalue)) for eigenvalue in EIGENVALUES])
    scores = least_squares_scores(estimator, STEPS, RATE)
    torch.testing.assert_close(scores, 3 * factors * GRADIENTS / 4, rtol=1e-5, atol=0)


def test_fast_influence_scores_the_neighbours_alone():
    scores = least_squares_scores(FastInfluence(k=2, damping=0.3), STEPS, RATE)
    whole = least_squares_scores(InfluenceFunction(damping=0.3), STEPS, RATE)
    assert scores[:2].isnan().all()  # (2, 0) is further from the query (1, 1) than (0, 1) is
    torch.testing.assert_close(scores[2:], whole[2:])


def test_unrolled_predicts_a_small_change_of_a_weight():
    """Against the training itself, by hand, with the first example's loss weighted by 1 - share."""
    share, weights = 1e-4, torch.tensor([1.0, 2.0], dtype=torch.float64)
    inputs = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).double()
    targets = torch.tensor([3.0, 1.0, 3.0, 1.0]).double()
    for _ in range(STEPS):
        errors = inputs @ weights - targets
        errors[0] *= 1 - share
        weights = weights - RATE * inputs.T @ errors / 4
    change = (weights.sum() ** 2 / 2 - 4.5) / share
    score = least_squares_scores(Unrolled(), STEPS, RATE)[0]
    torch.testing.assert_close(score.double(), change, rtol=1e-3, atol=0)
