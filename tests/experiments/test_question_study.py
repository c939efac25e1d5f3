"""The study of where to take the derivative: its slow oracle, and its tables from what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.question import adamw, additive, kept, table, tiny, tiny_table
from experiments.question.studies import HALF, STUDIES, Point, Study, rows
from tda_lightning import Scores
from tda_lightning.cli.question_guide import ROWS
from tda_lightning.evaluation import draw_subsets
from tda_lightning.evaluation import linear_datamodeling_score as score_of
from tda_lightning.evaluation.linear_datamodeling import rank_correlation
from tests.attributing import relative

TRAIN, QUERIES, SUBSETS = 200, 5, 12
ESTIMATORS_PAGE = Path(__file__).parents[2] / "docs" / "estimators.md"


def _problem() -> tiny.Problem:
    torch.manual_seed(0)

    def losses(w: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = torch.tanh(inputs @ w["in"] + w["in_bias"][:, None])
        return ((hidden @ w["out"])[..., 0] - targets).square()

    shapes = {"in": (3, 4), "in_bias": (4,), "out": (4, 1)}
    inputs = torch.randn(12, 3).double(), torch.randn(2, 3).double()
    targets = torch.randn(12).double(), torch.randn(2).double()
    return tiny.Problem(inputs, targets, shapes, losses, batch_size=4, epochs=2, rate=3e-2)


@pytest.mark.parametrize("spread", [0.0, 0.25])
def test_the_derivative_is_that_of_retraining(spread: float) -> None:
    problem, step = _problem(), 1e-5
    weights, change = torch.rand(2, 12).double(), torch.randn(2, 12).double()

    def runs(at: Tensor) -> tiny.Runs:
        return tiny.Runs([0, 1], at, spread=spread, speeds=[1.0, 0.5])

    def measured(at: Tensor) -> Tensor:
        last = tiny.train(problem, runs(at), torch.float64)[-1]
        return tiny.measure(problem, last.weights)

    scores = tiny.scores(problem, runs(weights))
    expected = (measured(weights - step * change) - measured(weights + step * change)) / (2 * step)
    found = (scores * change[:, None]).sum(2)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_runs_are_those_of_the_optimizer() -> None:
    problem = _problem()
    weights = torch.ones(1, 12).double()
    weights[0, ::3] = 0
    for removed in (False, True):
        runs = tiny.Runs([3], weights, removed=removed)
        found = tiny.train(problem, runs, torch.float64)[-1].weights
        own = tiny.initial(problem, [3], torch.float64).weights.clone().requires_grad_()
        optimizer = torch.optim.AdamW([own], lr=problem.rate)
        order = tiny.orders(problem, runs)[0]
        assert len(order) == (4 if removed else 6)
        for chosen in order:
            optimizer.zero_grad()
            batch = problem.inputs[0][chosen][None], problem.targets[0][chosen][None]
            losses = problem.losses(tiny.named(problem, own), *batch)[0]
            (losses * weights[0, chosen]).mean().backward()
            optimizer.step()
        torch.testing.assert_close(found, own.detach(), rtol=1e-12, atol=1e-14)


def test_sums_that_are_kept_are_enough_for_the_score(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    torch.manual_seed(0)
    study = Study("of nothing", points=(HALF,), subsets=SUBSETS)
    files = list(rows(study))[:2]
    scores = {row: Scores(torch.randn(QUERIES, TRAIN)) for row in files}
    for row, found in scores.items():
        found.save(tmp_path / "run" / "scores" / f"{row}.h5")
        kept.keep("nothing", study, tmp_path / "run")
    # A machine without the files adds nothing and loses nothing.
    kept.keep("nothing", study, tmp_path / "elsewhere")
    arrays, about = kept._read("nothing")
    assert about["rows"] == files
    truth = torch.randn(QUERIES, SUBSETS).double()
    for share in kept.shares(study):
        removed = torch.from_numpy(arrays[f"removed-{share:g}"]).double()
        removed *= torch.from_numpy(arrays[f"unit-{share:g}"])[..., None]
        found = kept.Kept(
            {share: dict(zip(files, removed, strict=True))},
            {},
            {("single_run", share): truth},
            {},
            None,
            about,
        )
        for row in files:
            expected = score_of(scores[row], draw_subsets(TRAIN, share, SUBSETS), truth.T)
            got = table.lds(found, row, "single_run", share)
            assert got is not None
            assert got.value == pytest.approx(expected.value, abs=0.02)


def test_a_slope_is_what_measured_changes_are_of_predicted_ones() -> None:
    predicted, recorded = torch.randn(4, 30).double(), torch.rand(4).double()
    assert table.slope(predicted, recorded[:, None] + 2 * predicted, recorded) == (
        "2.00 [2.00, 2.00]"
    )


def test_a_datamodel_finds_effects_that_add_up() -> None:
    subsets = torch.rand(300, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    effects = torch.arange(40).double().view(2, 20).sin()
    outcomes = subsets.double() @ effects.T + 3
    found = additive.fitted(subsets, outcomes)
    assert relative(found, effects) < 0.02  # the least ridge that is tried
    noise = torch.randn(300, 2, generator=torch.Generator().manual_seed(1)).double()
    assert additive.fitted(subsets, noise).norm() < 0.3 * effects.norm()


def test_points_have_names_of_their_own() -> None:
    assert str(Point(1.0)) == "1" and Point(1.0).settings == []
    assert Point(0.5, 4).settings == ["keep=0.5", "draws=4"] and str(Point(0.5, 4)) == "0.5x4"
    for study in STUDIES.values():
        assert len(set(rows(study))) == len(rows(study))


def test_the_readme_has_a_table_of_the_kept_results() -> None:
    name = "fashion_mnist_noisy_tenth"
    assert table.estimators(name, STUDIES[name], kept.load(name)) in (
        (table.HERE / "README.md").read_text()
    )


def test_the_guide_of_tda_check_has_the_figures_of_the_studies() -> None:
    studies = ("concrete", "wikitext2_gpt", "fashion_mnist_noisy_tenth")
    found = [kept.load(name) for name in studies]
    for gone, whose, arguments, _, said in ROWS:
        asked = dict(part.split("=") for part in arguments.split()[1:])
        estimator = asked["estimator"] + ("_recorded" if "estimator.order" in asked else "")
        row = f"{estimator}@{asked.get('keep', 1)}" + ("+seeds" if "seeds" in arguments else "")
        protocol = "single_run" if whose == "this run" else "algorithm"
        share = 0.5 if gone == "half of the data" else 0.95
        truths = [one.truth.get((protocol, share)) for one in found]
        if any(truth is None for truth in truths):
            assert not said
            continue
        figures = []
        for one, truth in zip(found, truths, strict=True):
            sums = one.removed[share][row][:, : truth.shape[1]]
            figures.append(f"{float(rank_correlation(sums, truth).nanmean()):.2f}"[1:])
        assert said == " / ".join(figures), row
        assert not said or said.replace(" / ", ", ") in ESTIMATORS_PAGE.read_text(), row


@pytest.mark.slow  # intervals of all studies: 10 s
def test_the_readme_has_the_tables_of_the_kept_results() -> None:
    found = {name: kept.load(name) for name in STUDIES if (kept.RESULTS / f"{name}.npz").exists()}
    files = {name: adamw.RESULTS / f"adamw_{name}.npz" for name in tiny_table.TITLES}
    exact = {name: tiny_table.load(file) for name, file in files.items() if file.exists()}
    assert table.tables(found, exact) in (table.HERE / "README.md").read_text()
    for name in found:
        json.dumps(found[name].about, allow_nan=False)
    for file in files.values():
        if file.exists():
            with np.load(file, allow_pickle=False) as arrays:
                assert all(np.isfinite(arrays[key]).all() for key in arrays.files if "-" in key)
