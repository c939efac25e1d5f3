"""Training steps that draw random numbers, against plain loops that draw what the run drew."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tda_lightning import AttributionModule
from tda_lightning.estimators import Source, TracIn, Unrolled
from tda_lightning.evaluation import landing_error, retrain, retrain_each
from tda_lightning.records.errors import EngineError, UnsupportedTrainingError
from tda_lightning.tasks import AttributionTask
from tests import noisy
from tests.attributing import quiet

QUERIES = noisy.data(3, seed=5)
FAST = (
    "checkpointed",
    "mixup, weight from numpy",
    "vae",
    "dropout besides",
    "diffusion, from tables",
    "rows chosen by data",
)
NAMES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in noisy.NOISE
    if name != "plain"
]


def scores_of(module, run, estimator, task=None, **options):
    task = task or noisy.CleanMeasurement()
    attribution = AttributionModule(module, run, estimator, task)
    return attribution.attribute(noisy.data(), QUERIES, trainer=quiet(), **options)


@pytest.mark.parametrize("name", NAMES)
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


def test_accumulated_batches_draw_one_after_the_other(tmp_path):
    module, run = noisy.recorded(tmp_path / "run", "mixup", 2, accumulate=2)
    unrolled = scores_of(module, run, Unrolled())
    assert noisy.relative(unrolled.values, noisy.unrolled(module, run, QUERIES)) < 1e-8
    tracin = scores_of(module, run, TracIn())
    assert noisy.relative(tracin.values, noisy.tracin(module, run, QUERIES)) < 1e-8


class Noisy(AttributionTask):
    """A task whose module draws in its forward pass, in training and attribution alike."""

    def train_loss(self, module, batch):
        logits = noisy._input_noise(module, *batch)
        return F.cross_entropy(logits, batch[1], reduction="none")

    def measurement(self, module, batch):
        return noisy.clean(module, batch[0])

    @property
    def measures_loss(self):
        return False


def test_the_loss_of_a_task_draws_what_the_run_drew(tmp_path):
    module, run = noisy.recorded(tmp_path / "run", "noisy inputs")
    tracin = scores_of(module, run, TracIn(), Noisy())
    assert noisy.relative(tracin.values, noisy.tracin(module, run, QUERIES)) < 1e-8
    unrolled = scores_of(module, run, Unrolled(), Noisy())
    assert noisy.relative(unrolled.values, noisy.unrolled(module, run, QUERIES)) < 1e-8


def test_retraining_together_and_plans_know_of_draws(tmp_path):
    module, run = noisy.recorded(tmp_path / "run", "mixup")
    weights = torch.ones(3, noisy.TRAIN)
    for state in retrain_each(run, module, None, noisy.data(), weights, together=3):
        assert landing_error(run, state) < 1e-12
    for estimator in (TracIn(), Source(order="recorded", num_segments=1)):
        attribution = AttributionModule(module, run, estimator, noisy.CleanMeasurement())
        assert attribution.plan(noisy.data(), QUERIES).passes


def own_generator(module, x, y):
    return F.cross_entropy(module.f(x + torch.from_numpy(GENERATOR.standard_normal(x.shape))), y)


def compared(module, x, y):
    """The examples depend on one another, with or without noise."""
    hidden = module.f(x + torch.randn_like(x))
    return F.cross_entropy(hidden @ hidden.T, torch.arange(len(x)))


def compared_by_python(module, x, y):
    hidden = module.f(x * random.random())
    return F.cross_entropy(hidden @ hidden.T, torch.arange(len(x)))


def compared_by_place(module, x, y):
    hidden = module.f(x + torch.tensor([[random.gauss(0, 1)] for _ in range(len(x))]).double())
    return F.cross_entropy(hidden @ hidden.T, torch.arange(len(x)))


GENERATOR = np.random.default_rng(0)
REFUSED = {
    "a generator of its own": (own_generator, "generator of its own"),
    "compared, one number by Python": (compared_by_python, "influence one another"),
    "compared, numbers by Python": (compared_by_place, "influence one another"),
    "a contrastive loss": (compared, "depend on one another|influence one another|alone"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith("compared") else ())
        for name in REFUSED
    ],
)
def test_what_cannot_be_told_apart_is_refused_for_the_true_reason(name, tmp_path, monkeypatch):
    step, reason = REFUSED[name]
    monkeypatch.setitem(noisy.NOISE, name, noisy.Noise(step, step))
    module, run = noisy.recorded(tmp_path / "run", name, checkpoints=1, epochs=1)
    with pytest.raises((EngineError, ValueError, UnsupportedTrainingError), match=reason):
        scores_of(module, run, TracIn(), None)
