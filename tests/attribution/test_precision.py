"""Coarser arithmetic is switched on by torch and by Lightning, and acts on attribution."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule
from tda_lightning.estimators import Source
from tda_lightning.tasks import ClassificationTask
from tests import oracles
from tests.attributing import quiet, relative
from tests.cases.training import CLASSIFIER, OPTIMIZERS


@pytest.fixture
def scored():
    module, data = CLASSIFIER.build().float(), CLASSIFIER.batch(40, 0)
    data = (data[0].float(), data[1])
    batches = oracles.cut_batches(40, 8, epochs=1)
    run = oracles.record_run(module, CLASSIFIER.loss, data, OPTIMIZERS["sgd"], batches, (2, 5))

    def score(**options):
        run.curvature.clear()
        attribution = AttributionModule(module, run, Source(1), ClassificationTask())
        train, query = TensorDataset(*data), TensorDataset(*(part[:5] for part in data))
        return attribution.attribute(
            train, query, self_influence=False, trainer=quiet(**options)
        ).values

    return score


def test_mixed_precision_runs_the_network_in_half(scored) -> None:
    """Scores move by rounding of bfloat16 and no more."""
    assert 1e-5 < relative(scored(precision="bf16-mixed"), scored()) < 0.05


def test_torchs_own_switch_is_left_as_it_is(scored) -> None:
    before, expected = torch.get_float32_matmul_precision(), scored()
    try:
        torch.set_float32_matmul_precision("high")
        found = scored()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert relative(found, expected) < 0.01
