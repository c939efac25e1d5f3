"""EK-FAC, K-FAC, diagonal and identity curvature against loops over examples, in float64."""

from __future__ import annotations

import pytest
import torch

from tda_lightning.estimators import InfluenceFunction, Source
from tests import oracles
from tests.attributing import attribute, relative
from tests.cases.training import OPTIMIZERS, everything, train
from tests.sampled import CASES, SEED, layer_places, oracle_curvature


@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diagonal", "identity"])
@pytest.mark.parametrize("name", CASES)
def test_source_and_influence_with_approximate_curvature(name, kind) -> None:
    case = CASES[name]
    run, module, data = train(case, OPTIMIZERS["decay"], checkpoints=(2, 5))
    segments, _, gradients, query = everything(case, run, module, data, [2])
    matrices = [
        oracle_curvature(case, run, module, data, segment.checkpoints, kind) for segment in segments
    ]
    expected = oracles.source_average(run, segments, matrices, gradients, query)
    estimator = Source(segment_steps=[2], curvature=kind, leading_directions=0, seed=SEED)
    scores = attribute(case, run, module, data, estimator)
    assert scores.provenance["fisher"] is None or "true Fisher" in scores.provenance["fisher"]
    assert relative(scores.by_segment, expected) < 1e-5
    # Damping is relative to the mean eigenvalue of a layer's own block.
    last = run.last_step
    matrix = oracle_curvature(case, run, module, data, [last], kind)
    damping = torch.zeros(len(matrix), dtype=torch.float64)
    for place in layer_places(run).values():
        damping[place] = 0.1 * matrix.diagonal()[place].mean()
    expected = oracles.influence(matrix, 0.05, damping, gradients[last], query)
    scores = attribute(case, run, module, data, InfluenceFunction(kind, seed=SEED))
    assert relative(scores.values, expected) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_source_with_ekfac_of_preconditioned_gradients(name) -> None:
    """Adam: EK-FAC of h * g, with exp(-eta K P H) = h exp(-eta K h H h) h^-1."""
    case = CASES[name]
    run, module, data = train(case, OPTIMIZERS["adamw"], checkpoints=(2, 5))
    segments, _, gradients, query = everything(case, run, module, data, [2])
    matrices = []
    for segment in segments:
        states = [run.checkpoints[step] for step in segment.checkpoints]
        scale = oracles.preconditioner(run, states).sqrt()
        assert (scale > 0).all()
        matrix = oracle_curvature(case, run, module, data, segment.checkpoints, "ekfac", scale)
        matrices.append(matrix / torch.outer(scale, scale))
    expected = oracles.source_average(run, segments, matrices, gradients, query)
    estimator = Source(segment_steps=[2], leading_directions=0, seed=SEED)
    scores = attribute(case, run, module, data, estimator)
    assert relative(scores.by_segment, expected) < 1e-5


def test_sampled_labels_average_to_the_gauss_newton_matrix() -> None:
    """Over many draws EK-FAC's trace is the exact one's: no factor is lost in the units."""
    case = CASES["sequence"]
    run, module, data = train(case, OPTIMIZERS["sgd"])
    (exact,) = oracles.mean_curvature(run, run.segments(1), module, case.criterion, data)
    traces = []
    for seed in range(20):
        attribute(case, run, module, data, InfluenceFunction(seed=1000 * seed))
        (fitted,) = run.curvature.values()
        run.curvature.clear()
        traces.append(sum(float(v.sum()) for k, v in fitted.items() if "eigenvalues" in k))
    mean = torch.tensor(traces).mean()
    assert abs(float(mean / exact.trace()) - 1) < 0.1
