"""An attribution says nothing of devices and services."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule
from tda_lightning.attribution.launch import quiet_trainer
from tda_lightning.estimators import TracIn
from tda_lightning.tasks import RegressionTask
from tests.attributing import quiet
from tests.standing import standing_run


@pytest.fixture
def lines():
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]  # of all of which conftest.py has a say
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.NOTSET if logger is loggers[2] else logging.INFO)
    yield found
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_no_lines(lines):
    module, data = nn.Linear(2, 1), TensorDataset(torch.randn(4, 2), torch.randn(4, 1))
    trajectory = standing_run(module, [[0, 1], [2, 3]])
    trainer = quiet()
    assert lines, "a Trainer of one's own says which devices there are"
    lines.clear()
    for own in (None, trainer):
        attribution = AttributionModule(module, trajectory, TracIn(), RegressionTask())
        attribution.attribute(data, data, trainer=own)
    assert not lines
    assert logging.getLogger("lightning.pytorch").level == logging.INFO


def test_a_level_of_ones_own_stays(lines):
    logging.getLogger("lightning.pytorch").setLevel(logging.DEBUG)
    quiet_trainer()
    assert lines
