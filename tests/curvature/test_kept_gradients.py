"""EK-FAC's second walk finds the gradients of the first, where they fit into memory."""

from __future__ import annotations

import pytest
import torch

from tda_lightning.curvature import fit
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.gradients import GradientEngine
from tests.attributing import attribute
from tests.cases.training import OPTIMIZERS, train
from tests.sampled import CASES


@pytest.mark.parametrize("name", CASES)
def test_kept_gradients_are_those_of_another_walk(name, monkeypatch) -> None:
    case = CASES[name]
    found, calls = {}, {}
    own = GradientEngine.gradients
    for room in (0, 1 << 30):
        monkeypatch.setattr(fit, "memory_budget", lambda room=room: room)
        run, module, data = train(case, OPTIMIZERS["decay"], checkpoints=(2, 5))
        counted = []
        monkeypatch.setattr(
            GradientEngine, "gradients", lambda *a, counted=counted: counted.append(a) or own(*a)
        )
        scores = attribute(case, run, module, data, InfluenceFunction(), batch_size=4)
        found[room], calls[room] = scores.values, len(counted)
    assert torch.equal(found[0], found[1 << 30])
    walk = -(-len(data[0]) // 4)
    assert calls[0] - calls[1 << 30] == walk
