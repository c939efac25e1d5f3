"""Retrainings at once of runs whose steps draw random numbers: all draw what was recorded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tda_lightning.evaluation import retrain_each, stacked_replay
from tests import denoising
from tests.attributing import relative

WEIGHTS = torch.tensor([[1.0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1], [1, 0.5, 0, 1, 0, 1]]).double()


def compared(tmp_path: Path, monkeypatch: Any, network: Any) -> tuple[float, int]:
    """Largest difference between one by one and all at once, and how many stacks were trained."""
    stacks = []
    whole = stacked_replay.replay_stacked
    monkeypatch.setattr(
        "tda_lightning.evaluation.retraining.replay_stacked",
        lambda *given: stacks.append(given) or whole(*given),
    )
    module = denoising.denoiser(network)
    run = denoising.recorded(tmp_path / "run", module)
    alone, together = (
        list(retrain_each(run, module, None, denoising.images(), WEIGHTS, together=count))
        for count in (1, 3)
    )
    end = run.checkpoints[run.last_step].parameters
    assert all(relative(alone[0][name], value) < 1e-12 for name, value in end.items())
    pairs = zip(alone, together, strict=True)
    return max(relative(b[n], a[n]) for a, b in pairs for n in end), len(stacks)


class Drawing(nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.layer, self.draw = nn.Conv2d(1, 1, 3, padding=1), draw

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.draw(self.layer(noisy))


DRAWS = {
    "timesteps and noise alone": (lambda h: h, 1),
    "dropout": (nn.Dropout(0.5), 1),
    "uniform": (lambda h: h * torch.rand_like(h), 1),
    # By numbers that differ from model to model, which vmap refuses.
    "by the model": (lambda h: h * torch.bernoulli(h.detach().sigmoid()), 0),
    "outside of torch": (lambda h: h * random.random(), 1),
}


@pytest.mark.parametrize("name", DRAWS)
def test_all_draw_what_was_recorded(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    draw, expected = DRAWS[name]
    difference, stacks = compared(tmp_path, monkeypatch, Drawing(draw))
    assert difference < 1e-10
    assert stacks == expected
