"""Estimators on a denoiser, against loops over examples, timesteps and draws in plain autograd."""

from __future__ import annotations

import pytest
import torch

from tda_lightning import AttributionModule, Scores
from tda_lightning.estimators import (
    FastInfluence,
    InfluenceFunction,
    Retrac,
    Source,
    TracIn,
    Unrolled,
)
from tda_lightning.estimators import retrac as retrac_module
from tda_lightning.tasks import MEASURED_SEED, DiffusionTask
from tests import denoising, noisy
from tests.attributing import quiet

TIMESTEPS, DRAWS = [3, 16], 2
TRAIN, QUERIES = denoising.images(), denoising.images(2, seed=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    module = denoising.denoiser()
    return module, denoising.recorded(tmp_path_factory.mktemp("run") / "run", module)


def attribute(run, estimator, task=None, **options):
    module, trajectory = run
    task = task or DiffusionTask(timesteps=TIMESTEPS, by_timestep=True, draws=DRAWS)
    attribution = AttributionModule(module, trajectory, estimator, task)
    return attribution.attribute(TRAIN, QUERIES, trainer=quiet(), **options)


def without_own_draws(monkeypatch):
    place = "tda_lightning.replay.recorded_draws.RecordedDraws.of"
    monkeypatch.setattr(place, lambda session: None)


def measured(run, step, normalised):
    """Gradients of the measurement of each timestep, mean over draws: [timestep, query, ...]."""
    module, trajectory = run
    rows = []
    for timestep in TIMESTEPS:
        for query in range(len(QUERIES)):
            own = []
            for draw in range(DRAWS):
                clean, example = QUERIES[query : query + 1][0], torch.tensor([query])
                with (
                    denoising.numbered_draw(draw),
                    denoising.seeded_examples(MEASURED_SEED, example),
                ):
                    noise = torch.randn_like(clean)
                times = torch.tensor([timestep])
                own.append(
                    denoising.gradient(
                        module,
                        trajectory,
                        step,
                        lambda t=times, e=noise, x=clean: denoising.loss(module, x, t, e),
                    )
                )
            own = [denoising.unit(g) for g in own] if normalised else own
            rows.append(torch.stack(own).mean(0))
    return torch.stack(rows).unflatten(0, (len(TIMESTEPS), len(QUERIES)))


def trained(run, step):
    """Gradients of the training losses, mean over draws: [train, ...]."""
    module, trajectory = run

    def loss(example):
        clean = TRAIN[example : example + 1][0]
        own = [denoising.drawn_loss(module, clean, example, draw) for draw in range(DRAWS)]
        return torch.stack(own).mean()

    return torch.stack(
        [
            denoising.gradient(module, trajectory, step, lambda n=n: loss(n))
            for n in range(len(TRAIN))
        ]
    )


def test_tracin_at_seeded_draws(run, monkeypatch):
    without_own_draws(monkeypatch)
    scores = attribute(run, TracIn())
    expected = sum(
        2 * denoising.RATE * measured(run, step, False) @ trained(run, step).T / len(TRAIN)
        for step in (2, 4)
    )
    assert noisy.relative(scores.by_timestep, expected) < 1e-8
    assert noisy.relative(scores.values, expected.mean(0)) < 1e-8
    assert scores.provenance["timesteps"] == TIMESTEPS


def test_retrac_leaves_the_sizes_of_gradients_out(run, monkeypatch):
    without_own_draws(monkeypatch)
    scores = attribute(run, Retrac())
    expected = 0
    for step in (2, 4):
        directions = torch.nn.functional.normalize(trained(run, step), dim=1)
        expected = expected + 2 * denoising.RATE * measured(run, step, True) @ directions.T
    assert noisy.relative(scores.by_timestep, expected) < 1e-8
    assert noisy.relative(scores.values, expected.mean(0)) < 1e-8
    assert scores.provenance["sizes"].startswith("no unit")
    assert "beyond_range" not in scores.provenance


def test_retrac_forms_each_norm_once(run, monkeypatch):
    without_own_draws(monkeypatch)
    counts = []
    norms = retrac_module.reciprocal_norms

    def counted(gradients):
        counts.append(len(gradients))
        return norms(gradients)

    monkeypatch.setattr(retrac_module, "reciprocal_norms", counted)
    attribute(run, Retrac(), DiffusionTask(timesteps=TIMESTEPS, draws=DRAWS))
    # At two checkpoints a batch of training examples, and of queries each timestep and draw.
    assert len(counts) <= 2 * (1 + len(TIMESTEPS) * DRAWS)


@pytest.mark.slow
def test_retrac_of_training_examples_themselves(run, monkeypatch):
    without_own_draws(monkeypatch)
    scores = attribute(run, Retrac())
    module, trajectory = run
    together = attribute(
        run, Retrac(), DiffusionTask(timesteps=TIMESTEPS, draws=DRAWS), self_influence=True
    )
    assert noisy.relative(together.values, scores.values) < 1e-8
    assert together.by_timestep is None
    task = DiffusionTask(timesteps=TIMESTEPS, draws=DRAWS)
    attribution = AttributionModule(module, trajectory, Retrac(), task)
    own = attribution.attribute(TRAIN, TRAIN, trainer=quiet()).values.diagonal()
    assert noisy.relative(together.self_influence, own) < 1e-8


def test_retrac_at_the_draws_of_the_run_normalises_each_use(tmp_path):
    module, run = noisy.recorded(tmp_path / "run", "diffusion, from tables")
    queries = noisy.data(3, seed=5)
    attribution = AttributionModule(module, run, Retrac(), noisy.CleanMeasurement())
    scores = attribution.attribute(noisy.data(), queries, trainer=quiet())
    expected = noisy.tracin(module, run, queries, directions=True)
    assert noisy.relative(scores.values, expected) < 1e-8
    assert any("the run's own draws" in note for note in scores.provenance["notes"])


def test_the_run_keeps_its_own_draws_under_the_task(run):
    """The training loss is the recorded one, whatever measures."""
    task = DiffusionTask(timesteps=TIMESTEPS, by_timestep=True)
    tracin = attribute(run, TracIn(), task, draws=1)
    unrolled = attribute(run, Unrolled(), task, draws=1)
    assert unrolled.provenance["certificate"]["bit_equal"]
    for scores in (tracin, unrolled):
        assert any("the run's own draws" in note for note in scores.provenance["notes"])
        assert noisy.relative(scores.by_timestep.mean(0), scores.values) < 1e-10
    plain = attribute(run, Unrolled(), DiffusionTask(timesteps=TIMESTEPS), draws=1)
    assert noisy.relative(unrolled.values, plain.values) < 1e-8


@pytest.mark.parametrize(
    "estimator",
    [
        InfluenceFunction(relative_damping=0.1),
        pytest.param(Source(num_segments=2), marks=pytest.mark.slow),
        pytest.param(Source(num_segments=2, order="recorded"), marks=pytest.mark.slow),
        pytest.param(Unrolled(), marks=pytest.mark.slow),
    ],
    ids=["influence", "source", "recorded order", "unrolled"],
)
def test_scores_by_timestep_are_those_of_each_timestep_alone(run, estimator):
    both = attribute(run, estimator)
    assert both.by_timestep.shape == (2, 2, len(TRAIN))
    for number, timestep in enumerate(TIMESTEPS):
        alone = attribute(run, estimator, DiffusionTask(timesteps=[timestep], draws=DRAWS))
        assert noisy.relative(both.by_timestep[number], alone.values) < 1e-6
    assert noisy.relative(both.by_timestep.mean(0), both.values) < 1e-10
    assert len(both.provenance["measurements"]) == len(QUERIES)


def test_features_are_those_of_the_middle(run):
    task = DiffusionTask(timesteps=TIMESTEPS, draws=DRAWS)
    fast = attribute(run, FastInfluence(k=3, layer="network.middle", relative_damping=0.1), task)
    exact = attribute(run, InfluenceFunction(relative_damping=0.1), task)
    for query, chosen in enumerate(fast.candidates):
        assert noisy.relative(fast.values[query, chosen], exact.values[query, chosen]) < 1e-8
    with pytest.raises(ValueError, match="other candidates at every timestep"):
        attribute(run, FastInfluence(k=3, layer="network.middle"))


def test_scores_by_timestep_are_kept_in_a_file(run, tmp_path):
    path = str(tmp_path / "scores.h5")
    scores = attribute(run, TracIn(), scores_path=path)
    loaded = Scores.load(path)
    assert torch.equal(loaded.by_timestep, scores.by_timestep)
    assert loaded.by_timestep.shape == (2, 2, len(TRAIN))
    assert torch.allclose(loaded.values, loaded.by_timestep.mean(0), rtol=1e-12)
    assert Scores.load(path, queries=slice(1, 2)).by_timestep.shape == (2, 1, len(TRAIN))
    with pytest.raises(ValueError, match=r"by_timestep must have the shape \[timestep, 2, 6\]"):
        Scores(scores.values, by_timestep=torch.zeros(2, 2, 5))
