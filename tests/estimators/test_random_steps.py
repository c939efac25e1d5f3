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
HAND_WRITTEN = ("vae",)  # losses that are no standard ones


def scores_of(module, run, estimator, task=None, **options):
    task = task or noisy.CleanMeasurement()
    attribution = AttributionModule(module, run, estimator, task)
    return attribution.attribute(noisy.data(), QUERIES, trainer=quiet(), **options)


@pytest.mark.parametrize("name", [name for name in noisy.NOISE if name not in HAND_WRITTEN])
def test_what_the_run_drew_is_drawn_again(name, tmp_path):
    module, run = noisy.recorded(tmp_path / "run", name)

    unrolled = scores_of(module, run, Unrolled())
    assert unrolled.provenance["certificate"]["bit_equal"]
    assert noisy.relative(unrolled.values, noisy.unrolled(module, run, QUERIES)) < 1e-8

    tracin = scores_of(module, run, TracIn())
    assert noisy.relative(tracin.values, noisy.tracin(module, run, QUERIES)) < 1e-8
    for scores in (unrolled, tracin):
        assert any("the run's own draws" in note for note in scores.provenance["notes"])

    state = retrain(run, module, None, noisy.data(), torch.ones(noisy.TRAIN))
    assert landing_error(run, state) < 1e-12
