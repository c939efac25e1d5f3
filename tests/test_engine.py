"""The gradient engine against a loop over examples, on every way a parameter can enter a loss."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor, nn

from tda_lightning.errors import EngineError, NonFiniteError
from tda_lightning.gradients import GradientEngine
from tests import oracles
from tests.cases import CASES, Case
from tests.cases.case import Function, normal, parameter

BOUND = 1e-9


def engine_of(case: Case, module: nn.Module | None = None) -> GradientEngine:
    module = case.build() if module is None else module
    return GradientEngine(module, [n for n, p in module.named_parameters() if p.requires_grad])


def with_examples(loss):
    """The engine's losses also take the examples' indices."""
    return lambda module, batch, examples: loss(module, batch)


def dense(engine: GradientEngine, loss, batch, first: int = 0) -> dict[str, Tensor]:
    """Per-example gradients by parameter, as plain tensors."""
    examples = torch.arange(len(batch[0])) + first
    found = engine.gradients(with_examples(loss), batch, examples)
    tensors: dict[str, Tensor] = {}
    for block in engine.blocks:
        tensors |= block.tensors(found.blocks[block.name].dense(slice(None)))
    return tensors


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor], scale=None) -> None:
    """Each example's gradient of each parameter, relative to the largest one of the parameter."""
    assert set(found) == set(expected)
    for name, truth in expected.items():
        assert found[name].shape == truth.shape, name
        error = (found[name] - truth).flatten(1).norm(dim=1).max()
        largest = truth.flatten(1).norm(dim=1).max()
        # A gradient that is zero in exact arithmetic is compared with the other parameters'.
        whole = max(float(g.flatten(1).norm(dim=1).max()) for g in expected.values())
        assert error <= BOUND * max(float(largest), 1e-3 * whole), (name, float(error))


def squared_outputs(case: Case):
    """A measurement that is not the loss: it reads no target."""
    return lambda module, batch: module(batch[0]).square().reshape(len(batch[0]), -1).sum(1) / 7


@pytest.mark.filterwarnings("ignore:Per-example gradients of")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_those_of_a_loop_over_examples(case: Case) -> None:
    """On the first batch, one of another size and order, one example, and for a measurement."""
    engine = engine_of(case)
    module, first = engine.module, case.batch()
    try:
        engine.discover(with_examples(case.loss), first, torch.arange(case.size))
        batches = [first]
        if case.size > 1:
            order = torch.randperm(case.size, generator=torch.Generator().manual_seed(3))
            batches.append(oracles.take(first, order))
        batches += [case.batch(size, seed=size) for size in (2, 5, 1)]
        for batch in batches:
            for loss in (case.loss, squared_outputs(case)):
                expected = oracles.per_example_gradients(module, loss, batch)
                require_equal(dense(engine, loss, batch), expected)
    except EngineError as error:
        assert case.may_refuse, error
        assert any(name in str(error) for name in engine.names), error


