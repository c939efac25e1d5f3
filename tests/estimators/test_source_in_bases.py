"""Queries that stay in the segments' bases are scored as those that go by way of the parameters."""

from __future__ import annotations

import pytest

from tda_lightning.estimators import Source
from tda_lightning.estimators.source import blockwise
from tests.attributing import attribute, relative
from tests.cases import CASES as WIRED
from tests.cases.training import OPTIMIZERS, train
from tests.sampled import CASES

TIED = {case.name: case for case in WIRED if case.name.startswith("tied/")}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convolutions", {"leading_directions": 5}),
        ("sequence", {"leading_directions": 5, "dense_side": 2}),
        pytest.param("sequence", {"leading_directions": 0}, marks=pytest.mark.slow),
        pytest.param(
            "regression", {"leading_directions": 5, "momentum": "recursion"}, marks=pytest.mark.slow
        ),
        ("classification", {"leading_directions": 0, "momentum": "recursion"}),
        pytest.param("classification", {"curvature": "exact"}, marks=pytest.mark.slow),
        ("tied/embedding_and_head", {"leading_directions": 5}),
        pytest.param(
            "tied/two_linears",
            {"leading_directions": 5, "curvature": "diagonal"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_scores_do_not_depend_on_the_way(name, options, monkeypatch) -> None:
    case = TIED[name] if name in TIED else CASES[name]
    run, module, data = train(case, OPTIMIZERS["decay"], checkpoints=(2, 4, 5))
    found, followed, own = [], [], blockwise.follow
    monkeypatch.setattr(blockwise, "follow", lambda *a: followed.append(a) or own(*a))
    for possible in (blockwise.stays_in_bases, lambda segments: False):
        monkeypatch.setattr(blockwise, "stays_in_bases", possible)
        estimator = Source(segment_steps=[2, 4], **options)
        found.append(attribute(case, run, module, data, estimator))
    assert len(followed) == 1
    assert relative(*(scores.by_segment for scores in found)) < 1e-10
    assert relative(*(scores.self_influence for scores in found)) < 1e-10
