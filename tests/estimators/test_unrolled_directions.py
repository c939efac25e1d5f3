"""Exact unrolling of the directions that queries have, in place of the queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from tda_lightning import Scores
from tda_lightning.estimators import Unrolled
from tda_lightning.estimators.unrolled.directions import PROBES, Directions
from tests.attributing import CaseTask
from tests.cases.training import MLP
from tests.unrolling import NETWORKS, OPTIMIZERS, in_memory, record, scores_of, sgd

QUERIES = 40


def both(tolerance: float, optimizer: str, **options: Any) -> tuple[Scores, Scores]:
    """Scores of 40 queries of an MLP with 20 weights, truncated and exact."""
    run, module, data = in_memory(MLP, OPTIMIZERS[optimizer], **options)
    queries = TensorDataset(*MLP.batch(QUERIES, seed=7))
    truncated, exact = (
        scores_of(run, module, TensorDataset(*data), queries, CaseTask(MLP.kind), estimator)
        for estimator in (Unrolled(query_tolerance=tolerance), Unrolled())
    )
    return truncated, exact


def errors(truncated: Scores, exact: Scores) -> torch.Tensor:
    """Of every query, relative to the length of its scores."""
    return (truncated.values - exact.values).norm(dim=1) / truncated.values.norm(dim=1)


@pytest.mark.parametrize("optimizer", ["momentum and decay", "adamw"])
def test_no_more_directions_than_weights_go_back(optimizer: str) -> None:
    """Nothing is left out of the gradients, and the scores are exact, by segment too."""
    truncated, exact = both(1e-6, optimizer)
    record = truncated.provenance["directions"]
    assert record["kept"] <= 20 and record["queries"] == QUERIES
    assert float(errors(truncated, exact).max()) < 1e-6
    torch.testing.assert_close(truncated.by_segment, exact.by_segment, rtol=1e-5, atol=1e-10)
    assert "directions" not in exact.provenance


@pytest.mark.parametrize("tolerance", [0.03, 0.3])
def test_what_is_left_out_is_measured(tolerance: float) -> None:
    truncated, exact = both(tolerance, "momentum and decay")
    record, found = truncated.provenance["directions"], errors(truncated, exact)
    assert 1 < record["kept"] < 20
    assert 1e-6 < float(found.max()) <= record["error_bound"]
    # Three probes tell the root mean square to within its chance.
    mean = float(found.square().mean().sqrt())
    assert mean / 5 < record["relative_error"] < 5 * mean


def test_adjoints_of_running_statistics_go_along(tmp_path: Path) -> None:
    network = NETWORKS["batch norm"]
    run, module, data = record(tmp_path, network, sgd(momentum=0.8, lr=0.1))
    some = network.data(3, seed=7)
    repeated = torch.utils.data.ConcatDataset([some] * 4)
    truncated, exact = (
        scores_of(run, module, data, repeated, network.task, estimator)
        for estimator in (Unrolled(query_tolerance=1e-6), Unrolled())
    )
    assert truncated.provenance["directions"]["kept"] == 3
    assert float(errors(truncated, exact).max()) < 1e-6


def test_as_few_queries_as_directions_go_back_themselves() -> None:
    torch.manual_seed(0)
    gradients = {"a": torch.randn(6, 30).double(), "b": torch.randn(6, 2, 5).double()}
    assert Directions.of(gradients, 0.1) is None
    many = {name: torch.cat([own] * 3) for name, own in gradients.items()}
    found = Directions.of(many, 1e-6)
    assert found is not None
    directions, carried = found
    assert (directions.kept, len(carried["a"])) == (6, 6 + PROBES)
    for name, own in many.items():
        torch.testing.assert_close(directions.scores(carried[name]), own)
        assert float(carried[name][directions.kept :].abs().max()) < 1e-12


def test_a_query_without_a_gradient() -> None:
    gradients = {"a": torch.cat([torch.zeros(1, 4), torch.ones(9, 4)]).double()}
    found = Directions.of(gradients, 1e-6)
    assert found is not None
    scores = found[0].scores(found[1]["a"])
    torch.testing.assert_close(scores, gradients["a"])


def test_impossible_tolerances_are_refused() -> None:
    for value in (-0.1, 1.0):
        with pytest.raises(ValueError, match="query_tolerance is a share of a gradient's length"):
            Unrolled(query_tolerance=value)
