"""Penalties in a training step: found, and told apart by whether they are weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from tda_lightning.tasks import as_task, seeded_examples

Rule = Callable[[Any], Tensor]


class Penalised(LightningModule):
    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.first, self.second, self.rule = nn.Linear(3, 4), nn.Linear(4, 2), rule
        nn.init.zeros_(self.second.bias)

    def training_step(self, batch: Any) -> Tensor:
        inputs, labels = batch
        outputs = self.second(torch.tanh(self.first(inputs)))
        return F.cross_entropy(outputs, labels) + self.rule(self)


def squares(*parameters: Tensor) -> Tensor:
    return torch.stack([p.square().sum() for p in parameters]).sum()


EVERY = ("first.weight", "first.bias", "second.weight", "second.bias")
RULES: dict[str, tuple[Rule, dict[str, float], bool]] = {
    "none": (lambda m: torch.zeros(()), {}, False),
    "a constant": (lambda m: torch.ones(()), {}, False),
    "all": (lambda m: 0.005 * squares(*m.parameters()), dict.fromkeys(EVERY, 0.01), False),
    "one layer": (lambda m: 1e-4 * squares(m.second.weight), {"second.weight": 2e-4}, False),
    "two strengths": (
        lambda m: 0.5 * squares(m.first.weight) + 0.05 * squares(m.second.bias),
        {"first.weight": 1.0, "second.bias": 0.1},
        False,
    ),
    "a norm": (lambda m: 0.1 * m.first.weight.norm(), {}, True),
    "to the fourth": (
        lambda m: m.first.weight.pow(4).sum() + 0.5 * squares(m.first.bias),
        {"first.bias": 1.0},
        True,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", RULES)
def test_penalties_are_found(name: str, dtype: torch.dtype) -> None:
    rule, strengths, other = RULES[name]
    torch.manual_seed(0)
    module = Penalised(rule).to(dtype).eval()
    before = [p.detach().clone() for p in module.parameters()]
    batch = torch.randn(5, 3, dtype=dtype), torch.randint(0, 2, (5,))
    task = as_task(None)
    task.training_batch_size = 5
    with seeded_examples(0, torch.arange(5)):
        task.prepare(module, batch)
    assert task.penalty.strengths == pytest.approx(strengths, rel=1e-6)
    assert task.penalty.other == other
    assert sum("penalty" in note for note in task.notes) == bool(strengths) + other
    for old, new in zip(before, module.parameters(), strict=True):
        assert torch.equal(old, new)
        assert new.dtype == dtype
