"""The schema of provenance: what is read from a file, and what is left out."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tda_lightning.records.errors import TrajectoryFormatError
from tda_lightning.records.provenance import well_formed
from tda_lightning.records.scores import Scores

STAGE = {
    "trajectory": "runs/first",
    "model": "Net",
    "task": {"class": "Task"},
    "num_train": 2,
    "columns": [0, 2],
    "segments": [0, 1],
    "steps": [0, 8],
    "trained_parameters": 3,
    "frozen_parameters": [],
    "notes": [],
}
GOOD = {
    "estimator": "Source",
    "settings": {"order": "average"},
    "curvature": None,
    "fisher": ["true Fisher", None],
    "statistics": [{"gathered": "in training", "examples": [3]}, None],
    "damping": {"relative to the layer's mean eigenvalue": 0.1},
    "solver": {"name": "LiSSA", "damping": [1, 2.0], "relative_residual": None, "reached": True},
    "checkpoints": [[1], [2, 3]],
    "segments": [[0, 1], [1, 3]],
    "stages": [STAGE, STAGE],
    "seconds": 1,
    "trust": {
        "spot_check": {"num_subsets": 3, "num_queries": 4, "lds": -1, "over_subsets": [None, 0.5]},
        "damping": {"setting": "damping", "value": 0.1, "0.1": 0.5, "10": 1.0},
    },
    "a key of the caller": {"any": "thing"},
}


def test_what_has_the_form_stays():
    assert well_formed(GOOD) == GOOD


@pytest.mark.parametrize(
    ("name", "odd"),
    [
        ("estimator", {"name": "Source"}),
        ("curvature", 3),
        ("fisher", ["true Fisher", 3]),
        ("segments", [[0, 1], [1]]),
        ("segments", [[0, 1], [1, -3]]),
        ("segments", ((0, 1), (1, 3))),
        ("checkpoints", [[1], 2]),
        ("seconds", True),
        ("seconds", math.nan),
        ("seconds", 10**400),
        ("seconds", -1),
        ("stages", [{**STAGE, "columns": None}]),
        ("stages", [{key: value for key, value in STAGE.items() if key != "notes"}]),
        ("solver", {"tolerance": 0.1}),
        ("trust", [1]),
    ],
)
def test_another_form_is_left_out(name, odd):
    expected = {key: value for key, value in GOOD.items() if key != name}
    assert well_formed({**GOOD, name: odd}) == expected


def test_a_record_loses_only_what_is_wrong_in_it():
    trust = {
        "agreement": {"a": 0.5, "b": 2.0, "c": "high"},
        "spot_check": {"num_subsets": 3, "num_queries": 4, "lds": "high"},
        "damping": {"setting": "damping", "value": math.inf, "10": True},
    }
    assert well_formed({"trust": trust}) == {
        "trust": {
            "agreement": {"a": 0.5},
            "spot_check": {"num_subsets": 3, "num_queries": 4},
            "damping": {"setting": "damping"},
        }
    }


def test_stages_of_a_damaged_provenance_are_refused():
    scores = Scores(torch.ones(1, 4), torch.ones(2, 1, 4) / 2, provenance={"stages": [STAGE] * 2})
    assert scores.stage(0).provenance == {"stage": STAGE}
    for odd in ("two", [STAGE, {**STAGE, "columns": "x"}]):
        damaged = dataclasses.replace(scores, provenance={"stages": odd})
        with pytest.raises(TrajectoryFormatError, match="expected 'stages' as described in"):
            damaged.stage(0)
