"""An ensemble's scores are the mean over its members, with their standard error."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Ensemble, Scores
from tda_lightning.estimators import (
    TRAK,
    FastInfluence,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
)
from tda_lightning.records.errors import TrajectoryMismatchError
from tests import oracles
from tests.attributing import CaseTask, quiet, relative
from tests.cases.training import CLASSIFIER, OPTIMIZERS, queries_of, train

TASK = CaseTask("classification")


@pytest.fixture(scope="module")
def runs() -> Any:
    """Three runs of one model that differ in the order of their batches."""
    batches = oracles.cut_batches(10, 4, epochs=3)
    orders = [batches, batches[::-1], batches[1:] + batches[:1]]
    trained = [
        train(CLASSIFIER, OPTIMIZERS["momentum"], batches=order, checkpoints=(3, 6, 9))
        for order in orders
    ]
    _, module, data = trained[0]
    return [run for run, *_ in trained], module, TensorDataset(*data)


def attribute(trajectory: Any, runs: Any, estimator: Any, **options: Any) -> Scores:
    _, module, data = runs
    queries = TensorDataset(*queries_of(CLASSIFIER))
    attribution = AttributionModule(module, trajectory, estimator, TASK)
    options.setdefault("self_influence", True)
    return attribution.attribute(data, queries, 4, quiet(), **options)


@pytest.mark.parametrize(
    "estimator",
    [TracIn(), InfluenceFunction(), Source(2), Source(2, order="recorded"), Unrolled()],
    ids=lambda estimator: type(estimator).__name__,
)
def test_scores_are_means_with_their_standard_error(estimator: Any, runs: Any) -> None:
    alone = [attribute(run, runs, estimator) for run in runs[0]]
    together = attribute(Ensemble(runs[0]), runs, estimator)
    values = torch.stack([scores.values for scores in alone])
    assert relative(values[0], values[1]) > 1e-3  # the members differ
    assert relative(together.values, values.mean(0)) < 1e-12
    assert relative(together.spread, values.std(0) / 3**0.5) < 1e-9
    for number, scores in enumerate(alone):
        assert relative(together.member(number).values, scores.values) < 1e-12
        measured = scores.provenance["measurements"]
        assert together.member(number).provenance["measurements"] == measured
    if alone[0].by_segment is not None:
        segments = torch.stack([scores.by_segment for scores in alone]).mean(0)
        assert together.by_segment is not None
        assert relative(together.by_segment, segments) < 1e-12
    if alone[0].self_influence is not None:
        own = torch.stack([scores.self_influence for scores in alone]).mean(0)
        assert together.self_influence is not None
        assert relative(together.self_influence, own) < 1e-12


def test_members_are_named_in_the_provenance(runs: Any) -> None:
    scores = attribute(Ensemble(runs[0]), runs, Unrolled())
    members = scores.provenance["members"]
    assert len(members) == 3
    assert all(member["certificate"]["bit_equal"] for member in members)
    means = torch.tensor([member["measurements"] for member in members]).mean(0)
    torch.testing.assert_close(torch.tensor(scores.provenance["measurements"]), means)


def test_segments_that_do_not_fit_are_left_out(runs: Any) -> None:
    """TracIn has a segment for each checkpoint."""
    first, second, _ = runs[0]
    checkpoints = {step: second.checkpoints[step] for step in (0, 6, 9)}
    fewer = dataclasses.replace(second, checkpoints=checkpoints)
    together = attribute(Ensemble([first, fewer]), runs, TracIn())
    alone = [attribute(run, runs, TracIn()).values for run in (first, fewer)]
    assert together.by_segment is None and "segments" not in together.provenance
    assert relative(together.values, torch.stack(alone).mean(0)) < 1e-12


def test_streamed_saved_and_loaded(runs: Any, tmp_path: Path) -> None:
    ensemble = Ensemble(runs[0])
    expected = attribute(ensemble, runs, Source(2))
    streamed = attribute(ensemble, runs, Source(2), scores_path=str(tmp_path / "streamed.h5"))
    expected.save(tmp_path / "saved.h5")
    loaded = [
        streamed,
        Scores.load(tmp_path / "saved.h5"),
        Scores.load(tmp_path / "streamed.h5", mapped=True),
    ]
    for scores in loaded:
        assert torch.equal(scores.values, expected.values)
        assert torch.equal(scores.spread, expected.spread)
        assert torch.equal(scores.member(2).values, expected.member(2).values)
    some = Scores.load(tmp_path / "saved.h5", queries=slice(1, 3))
    assert torch.equal(some.spread, expected.spread[1:3])


# TRAK looks at every member once more to put them together.
@pytest.mark.parametrize(
    ("estimator", "more"), [(TracIn(), 0), (TRAK(), 1)], ids=["TracIn", "TRAK"]
)
def test_a_plan_counts_every_member(estimator: Any, more: int, runs: Any) -> None:
    trajectories, module, data = runs
    queries = TensorDataset(*queries_of(CLASSIFIER))
    plans = [
        AttributionModule(module, trajectory, estimator, TASK).plan(data, queries, 4, quiet())
        for trajectory in (trajectories[0], Ensemble(trajectories))
    ]
    assert plans[1].num_passes == 3 * (plans[0].num_passes + more)
    scores = attribute(Ensemble(trajectories), runs, estimator)
    kept = [scores.values, scores.by_segment, scores.members]
    assert plans[1].scores_bytes == sum(t.numel() * t.element_size() for t in kept if t is not None)


class TestBadInput:
    def test_of_one(self, runs: Any) -> None:
        for single in ([runs[0][0]], "runs/a"):
            with pytest.raises(ValueError, match="at least two runs, got 1"):
                Ensemble(single)

    def test_one_run_twice(self, runs: Any) -> None:
        with pytest.raises(ValueError, match="Members 1 and 2 of the ensemble are the same run"):
            Ensemble([runs[0][0], runs[0][0]])

    def test_members_or_lists_of_several_stages(self, runs: Any) -> None:
        trajectories, module, _ = runs
        with pytest.raises(TypeError, match=r"each of one stage; got \['a', 'b'\]"):
            Ensemble([["a", "b"], ["c", "d"]])
        with pytest.raises(TypeError, match="ensemble has runs of one stage: got .*Ensemble"):
            AttributionModule(module, [Ensemble(trajectories)] * 2, Source(), TASK)

    def test_another_model(self, runs: Any) -> None:
        first, second, _ = runs[0]
        fact = dataclasses.replace(first.facts.parameters["0.weight"], shape=(5, 3))
        facts = dataclasses.replace(
            second.facts, parameters={**second.facts.parameters, "0.weight": fact}
        )
        other = dataclasses.replace(second, facts=facts)
        with pytest.raises(TrajectoryMismatchError, match="Member 2 .* another model.*has shape"):
            Ensemble([first, other])

    @pytest.mark.parametrize("change", [{"num_examples": 11}, {"fingerprint": {"kind": "other"}}])
    def test_other_data(self, change: Any, runs: Any) -> None:
        first, second, _ = runs[0]
        facts = dataclasses.replace(first.facts, fingerprint={"kind": "first"}, num_examples=10)
        first = dataclasses.replace(first, facts=facts)
        other = dataclasses.replace(second, facts=dataclasses.replace(facts, **change))
        with pytest.raises(TrajectoryMismatchError, match="Member 2 .* another training set"):
            Ensemble([first, other])

    @pytest.mark.parametrize("name", ["module", "task"])
    def test_a_list_of_modules_or_tasks(self, name: str, runs: Any) -> None:
        trajectories, module, _ = runs
        given: Any = {"module": module, "task": TASK}
        given[name] = [given[name]] * 3
        with pytest.raises(ValueError, match=f"share one {name}, got a list of 3"):
            AttributionModule(given["module"], Ensemble(trajectories), TracIn(), given["task"])

    def test_candidates(self, runs: Any) -> None:
        with pytest.raises(ValueError, match="other candidates.*Use InfluenceFunction"):
            attribute(Ensemble(runs[0]), runs, FastInfluence(k=2))

    def test_a_single_run_has_no_spread(self, runs: Any) -> None:
        scores = attribute(runs[0][0], runs, TracIn())
        with pytest.raises(ValueError, match="Attribute an Ensemble"):
            scores.spread  # noqa: B018
        with pytest.raises(ValueError, match="Attribute an Ensemble"):
            scores.member(0)
        with pytest.raises(IndexError, match="Member 3 does not exist"):
            attribute(Ensemble(runs[0]), runs, TracIn()).member(3)
