"""experiments/solvers: its own arithmetic, and the README's tables are those of what is kept."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.solvers import run, table
from experiments.solvers.studies import STUDIES
from tda_lightning import Scores
from tda_lightning.evaluation import GroundTruth, draw_seeds, draw_subsets
from tda_lightning.evaluation import linear_datamodeling_score as score_of
from tda_lightning.store.ground_truth_file import write_ground_truth

TRAIN, QUERIES, ASKED, SUBSETS = 20, 5, 3, 8


def _scores(values: torch.Tensor, seconds: float, residual: float | None = None) -> Scores:
    told: dict[str, object] = {"processor_seconds": seconds}
    if residual is not None:
        told["solver"] = {
            "damping": 0.5,
            "products": 12.0,
            "relative_residual": {"max": residual, "median": 0.0},
        }
    return Scores(values, provenance=told)


def _truth(seed: int) -> GroundTruth:
    torch.manual_seed(seed)
    return GroundTruth(
        protocol="single_run",
        subsets=draw_subsets(TRAIN, 0.5, SUBSETS, seed),
        seeds=draw_seeds(SUBSETS, 1, seed),
        outcomes=torch.randn(SUBSETS, 1, QUERIES).double(),
        done=torch.ones(SUBSETS, 1, dtype=torch.bool),
        seconds=torch.ones(SUBSETS, 1).double(),
        baseline=torch.zeros(QUERIES).double(),
        configuration={},
    )


def test_a_study_is_kept_for_the_queries_that_were_asked(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    source, target = tmp_path / "run", tmp_path / "scores"
    folder = source / "ground_truth"
    folder.mkdir(parents=True)
    for seed in (0, 1):
        write_ground_truth(_truth(seed), folder / f"single_run-0.5-{seed}.h5")
    exact, layers = torch.randn(ASKED, TRAIN), torch.randn(QUERIES, TRAIN)
    _scores(layers, 1.0).save(source / "scores" / "influence-0.1.h5")
    _scores(exact, 9.0, 1e-5).save(target / "cg-1.h5")
    _scores(2 * exact, 0.5).save(target / "ekfac-1.h5")
    _scores(2 * exact, 3.0, 0.25).save(target / "start-1.h5")
    assert run.mean_eigenvalue(target) == 0.5

    run.keep("small", source, target)
    found = table.read(tmp_path / "results" / "small.npz")
    told = found.about["told"]
    assert set(found.predicted) == set(told) == {"layers", "cg-1", "ekfac-1"}
    # The residual of EK-FAC is measured where ASTRA starts; the time is its own.
    assert told["ekfac-1"]["residual"] == 0.25 and told["ekfac-1"]["seconds"] == 0.5
    assert told["ekfac-1"]["correlation"] == pytest.approx(1.0)
    assert told["cg-1"]["walks"] == 12 / ASKED
    torch.testing.assert_close(found.predicted["cg-1"], found.predicted["ekfac-1"])
    expected = score_of(layers[:ASKED], _truth(0).subsets, _truth(0).outcomes[..., :ASKED])
    got = table.lds(found, "layers")["single_run"]
    torch.testing.assert_close(got.per_query, expected.per_query)


def test_the_damping_is_unknown_before_conjugate_gradients_ran(tmp_path) -> None:
    assert run.mean_eigenvalue(tmp_path) is None


@pytest.mark.parametrize("name", STUDIES)
def test_kept_results_are_whole(name: str) -> None:
    found = table.load()[name]
    study = STUDIES[name]
    for protocol, truth in found.truth.items():
        assert truth.isfinite().all(), protocol
        for ranks in found.predicted.values():
            assert ranks.shape == truth.T.shape
    own = study.dampings.items()
    expected = {f"{name}-{one}" for name, several in own if name != "start" for one in several}
    assert set(found.predicted) == expected | {"layers"}
    json.dumps(found.about, allow_nan=False)


def test_the_readme_has_the_tables_of_the_kept_results() -> None:
    assert table.tables(table.load()) in (table.HERE / "README.md").read_text()
