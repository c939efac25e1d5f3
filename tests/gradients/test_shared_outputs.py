"""What examples share, experts and biases of relative positions, has a native form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda_lightning.gradients import GradientEngine
from tda_lightning.gradients.check import largest_errors
from tda_lightning.gradients.moments import SideForm
from tests import oracles
from tests.cases.case import Case, Function, normal, parameter, tokens
from tests.cases.shared import EXPERTS, INNER, SHARED, WIDTH, looped, mixture
from tests.gradients.test_engine import dense, engine_of, require_equal, with_examples


@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_nothing_is_left_to_the_general_path(case: Case) -> None:
    engine, batch = engine_of(case), case.batch()
    engine.discover(with_examples(case.loss), batch, torch.arange(case.size))
    assert engine.generic == []


def test_experts_are_one_block_of_a_matrix_each() -> None:
    """Its curvature sums over the rows that each expert has met, of the examples' weights."""
    case = Case("experts", lambda: mixture(looped), tokens(9, 5), size=4)
    engine, batch = engine_of(case), case.batch()
    module, examples = engine.module, torch.arange(case.size)
    engine.discover(with_examples(case.loss), batch, examples)
    (block,) = (block for block in engine.blocks if block.name == "up")
    assert block.shape == (EXPERTS, INNER, WIDTH)
    gradient = engine.gradients(with_examples(case.loss), batch, examples).blocks["up"]
    weights = torch.tensor([1.0, 0.5, 2.0, 0.25], dtype=torch.float64)
    _, right, count = gradient.covariances((SideForm("full"), SideForm("full")), weights)
    hidden = module.words(batch[0])
    index = module.router(hidden).topk(2, -1).indices
    for expert in range(EXPERTS):
        met = (index == expert).any(-1) * weights[:, None]
        assert count[expert] == met.sum()
        inputs = hidden.flatten(0, 1)
        expected = (inputs * met.flatten()[:, None]).T @ inputs
        torch.testing.assert_close(right[expert], expected.detach())


def test_a_stack_that_is_used_in_two_ways_has_no_native_form() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return F.linear(F.linear(x.flatten(0, 1), m.stack[0]).tanh() @ m.stack[1], m.stack[2])

    case = Case("both", lambda: Function(run, stack=parameter(3, 4, 4)), normal(2, 4))
    loss = lambda m, b: m(b[0]).view(len(b[0]), -1).square().sum(1)  # noqa: E731
    engine, batch = engine_of(case), case.batch()
    engine.discover(with_examples(loss), batch, torch.arange(case.size))
    assert engine.generic == ["stack"]
    require_equal(
        dense(engine, loss, batch), oracles.per_example_gradients(engine.module, loss, batch)
    )


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch of before 2.10")
def test_experts_on_rows_sorted_by_expert() -> None:
    """torch has ``grouped_mm`` in single precision only."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 8)
        expert, order = m.router(flat).argmax(-1).sort()
        ends = torch.bincount(expert, minlength=3).cumsum(0).int()
        rows = F.grouped_mm(flat[order], m.up.transpose(-2, -1), offs=ends).tanh()
        rows = F.grouped_mm(rows, m.down, offs=ends)
        return torch.zeros_like(rows).index_copy(0, order, rows).view(*x.shape[:-1], 4)

    torch.manual_seed(2)
    module = Function(run, router=nn.Linear(8, 3), up=parameter(3, 4, 8), down=parameter(3, 4, 4))
    module = module.float()
    names = ["up", "down"]
    engine, inputs = GradientEngine(module, names), torch.randn(5, 4, 8)
    loss = lambda m, b, _: m(b).square().sum((1, 2))  # noqa: E731
    for batch in (inputs, inputs[:3], inputs[:1]):
        examples = torch.arange(len(batch))
        if batch is inputs:
            engine.discover(loss, batch, examples)
        assert engine.generic == []
        assert max(largest_errors(engine, loss, batch, examples).values()) < 1e-5
