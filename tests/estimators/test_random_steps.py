"""Training steps that draw random numbers, against plain loops that draw what the run drew."""

from __future__ import annotations

import pytest
import torch

from tda_lightning import AttributionModule
from tda_lightning.estimators import TracIn, Unrolled
from tda_lightning.evaluation import landing_error, retrain
from tests import noisy
from tests.attributing import quiet

QUERIES = noisy.data(3, seed=5)


def scores_of(module, run, estimator, task=None, **options):
    task = task or noisy.CleanMeasurement()
    attribution = AttributionModule(module, run, estimator, task)
    return attribution.attribute(noisy.data(), QUERIES, trainer=quiet(), **options)


@pytest.mark.parametrize("name", noisy.NOISE)
def test_unrolling_replays_the_draws_of_the_run(name, tmp_path):
    module, run = noisy.recorded(tmp_path / "run", name)
    scores = scores_of(module, run, Unrolled())
    expected = noisy.unrolled(module, run, QUERIES)
    assert scores.provenance["certificate"]["bit_equal"]
    assert noisy.relative(scores.values, expected) < 1e-8


@pytest.mark.parametrize("name", noisy.NOISE)
def test_tracin_draws_what_the_run_drew(name, tmp_path):
    module, run = noisy.recorded(tmp_path / "run", name)
    scores = scores_of(module, run, TracIn())
    expected = noisy.tracin(module, run, QUERIES)
    assert noisy.relative(scores.values, expected) < 1e-8
    assert any("the run's own draws" in note for note in scores.provenance["notes"])


@pytest.mark.parametrize("name", noisy.NOISE)
def test_retraining_draws_what_the_run_drew(name, tmp_path):
    module, run = noisy.recorded(tmp_path / "run", name)
    weights = torch.ones(noisy.TRAIN)
    assert landing_error(run, retrain(run, module, None, noisy.data(), weights)) < 1e-12
