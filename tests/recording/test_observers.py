"""Observers have one interface, and list it in one order: reading one teaches the others."""

from __future__ import annotations

import pytest

from tda_lightning.recording.checkpoints import Checkpoints
from tda_lightning.recording.curvature_statistics import CurvatureStatistics
from tda_lightning.recording.example_indices import ExampleIndices
from tda_lightning.recording.observer import Observer
from tda_lightning.recording.rng_log import RngLog
from tda_lightning.recording.step_table import StepTable

INTERFACE = [name for name in vars(Observer) if not name.startswith("_")]


@pytest.mark.parametrize(
    "observer", [ExampleIndices, RngLog, StepTable, CurvatureStatistics, Checkpoints]
)
def test_methods_stand_in_the_order_in_which_they_are_called(observer: type) -> None:
    assert issubclass(observer, Observer)
    own = [name for name in vars(observer) if name in INTERFACE]
    assert len(own) > 3
    assert own == [name for name in INTERFACE if name in own]
