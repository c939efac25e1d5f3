"""A borrowed module comes back as it was."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from tda_lightning.runtime.module_state import borrowed, restored


def network() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    module[1].eval()
    module[3].bias.requires_grad_(False)
    module(torch.randn(5, 3)).sum().backward()
    return module


def state(module: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        "modes": {name: part.training for name, part in module.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "gradients": {
            n: None if p.grad is None else p.grad.tolist() for n, p in module.named_parameters()
        },
        "parameters": {name: p.tolist() for name, p in module.named_parameters()},
        "buffers": {name: b.tolist() for name, b in module.named_buffers()},
    }


def disturb(module: nn.Module) -> None:
    module.train()
    for parameter in module.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    module(torch.randn(5, 3)).sum().backward()
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.add_(1)


@pytest.mark.parametrize("error", [False, True])
def test_everything_is_put_back(error: bool) -> None:
    module = network()
    before, gradient = state(module), module[0].weight.grad
    with suppress(KeyError), borrowed(module):
        disturb(module)
        if error:
            raise KeyError
    assert state(module) == before
    assert module[0].weight.grad is gradient


@pytest.mark.parametrize("part", ["modes", "requires_grad", "gradients", "parameters", "buffers"])
def test_one_part_is_put_back_and_no_other(part: Any) -> None:
    module = network()
    before = state(module)
    with restored(module, part):
        disturb(module)
    after = state(module)
    assert {name for name in before if after[name] == before[name]} == {part}


@pytest.mark.parametrize("error", [False, True])
def test_buffers_of_another_shape_are_put_back_too(error: bool) -> None:
    """A cache that grows, one that was empty, one that is new, one that is gone."""
    module = network()
    module.register_buffer("grows", torch.arange(2.0))
    module[0].register_buffer("empty", None)
    module.register_buffer("goes", torch.ones(1), persistent=False)
    before, keys = state(module), set(module.state_dict())
    with suppress(KeyError), borrowed(module):
        disturb(module)
        module.grows = torch.arange(5.0)
        module[0].empty = torch.ones(3)
        module[3].register_buffer("new", torch.ones(2), persistent=False)
        del module.goes
        if error:
            raise KeyError
    assert state(module) == before
    assert set(module.state_dict()) == keys
    assert module[0].empty is None
    assert not hasattr(module[3], "new")


def test_modes_are_put_back_even_where_a_tensor_cannot_be() -> None:
    module = network()
    before = state(module)

    def lose_a_part() -> None:
        with borrowed(module):
            module.eval()
            del module[1]  # its statistics have no place to go back to

    with pytest.raises(AttributeError):
        lose_a_part()
    assert module.training and module[2].training == before["modes"]["3"]


def test_buffers_that_a_backward_pass_still_needs_can_be_put_back() -> None:
    module = nn.BatchNorm1d(3).eval()
    x = torch.randn(4, 3, requires_grad=True)
    loss = module(x).square().sum()
    with restored(module, "buffers"):
        module.train()(x)
    loss.backward()  # an error if a saved tensor counted as changed
