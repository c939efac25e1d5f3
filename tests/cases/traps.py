"""Ordinary-looking code on which an engine that watches layers goes silently wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.cases.case import Case, Function, frozen, normal, parameter, tokens


class _DoubledLinear(nn.Linear):
    """Is a Linear by its class, computes something else."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, 2 * self.weight, self.bias)


class _StandardisedConvolution(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019, 1903.10520)."""

    def forward(self, inputs: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(inputs, self.weight - mean, self.bias)


class _KeywordOnly(nn.Module):
    """Its layer is called by keyword, and hands back a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, *, features: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(input=features).tanh()}


def _inplace_after(module: nn.Module, inputs: Tensor) -> Tensor:
    hidden = module.first(inputs)
    hidden += inputs
    hidden.relu_()
    return module.second(hidden)


def _inplace_input(module: nn.Module, inputs: Tensor) -> Tensor:
    """The frozen first layer saves nothing, so its input may be overwritten after the call."""
    inputs = inputs.clone()
    hidden = module.first(inputs)
    inputs.mul_(0)
    return module.second(hidden.tanh()) + inputs.sum(-1, keepdim=True)


def _sometimes(module: nn.Module, inputs: Tensor) -> Tensor:
    """The second layer serves only the examples whose first feature is positive."""
    hidden = module.first(inputs).tanh()
    chosen = inputs[:, 0] > 0
    out = hidden.clone()
    out[chosen] = module.second(hidden[chosen])
    return out


def _generated(module: nn.Module, inputs: Tensor) -> Tensor:
    """A layer's input without an example axis: a learned code from which a weight is made."""
    return (inputs @ module.make(module.code).view(3, 2)).tanh()


def _batchless_positions(module: nn.Module, inputs: Tensor) -> Tensor:
    places = torch.linspace(-1, 1, inputs.shape[1], dtype=inputs.dtype)[:, None]
    return module.head((inputs + module.place(places)).tanh())


def _read_outside(module: nn.Module, inputs: Tensor) -> Tensor:
    """The weight is used by the layer's call and once more beside it."""
    return module.layer(inputs).tanh() + F.linear(inputs, F.normalize(module.layer.weight, dim=1))


def _fast_weights(module: nn.Module, inputs: Tensor) -> Tensor:
    return F.linear(inputs, module.layer.weight.exp(), module.layer.bias).tanh()


def _detached(module: nn.Module, inputs: Tensor) -> Tensor:
    target = module.layer(inputs).detach()
    return module.head(module.layer(inputs).tanh()) + target


def _gated(module: nn.Module, inputs: Tensor) -> Tensor:
    """Hard routing between two experts, both computed."""
    gate = module.gate(inputs).softmax(-1)
    outs = torch.stack([expert(inputs).tanh() for expert in module.experts], -1)
    return (outs * gate[:, None]).sum(-1)


def _output_unused(module: nn.Module, inputs: Tensor) -> Tensor:
    module.aside(inputs)
    return module.layer(inputs).tanh()


def _attention_unused(module: nn.Module, numbers: Tensor) -> Tensor:
    return module.layer(module.embed(numbers)).tanh()[:, 0]


def _weight_penalty(module: nn.Module, inputs: Tensor) -> Tensor:
    """Every example's output holds a term of the weights alone."""
    return module.layer(inputs).tanh() + module.layer.weight.square().sum()


def _repeated(module: nn.Module, inputs: Tensor) -> Tensor:
    """Every example takes part twice in the layer's batch, as contrastive views do."""
    both = module.layer(inputs.repeat_interleave(2, 0)).tanh()
    return both.view(len(inputs), 2, -1).prod(1)


def _without_batch(module: nn.Module, inputs: Tensor) -> Tensor:
    """A loop over the batch: the layer sees one example at a time, without an example axis."""
    return torch.stack([module.layer(row).tanh() for row in inputs])


TRAPS = [
    Case(
        "trap/subclass_of_linear", lambda: nn.Sequential(_DoubledLinear(3, 2), nn.Tanh()), normal(3)
    ),
    Case(
        "trap/subclass_of_convolution",
        lambda: nn.Sequential(_StandardisedConvolution(2, 3, 3), nn.Tanh()),
        normal(2, 4, 4),
    ),
    Case(
        "trap/keywords_and_dictionaries",
        lambda: Function(lambda m, x: m.inner(features=x)["logits"], inner=_KeywordOnly()),
        normal(3),
    ),
    Case(
        "trap/inplace_relu",
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.LeakyReLU(0.2, True)
        ),
        normal(3),
    ),
    Case(
        "trap/inplace_residual",
        lambda: Function(_inplace_after, first=nn.Linear(3, 3), second=nn.Linear(3, 2)),
        normal(3),
    ),
    Case(
        "trap/input_overwritten",
        lambda: Function(
            _inplace_input, first=frozen(nn.Linear(3, 3), "weight"), second=nn.Linear(3, 2)
        ),
        normal(3),
    ),
    Case(
        "trap/some_examples_only",
        lambda: Function(_sometimes, first=nn.Linear(3, 4), second=nn.Linear(4, 4)),
        normal(3),
        size=6,
        may_refuse=True,
    ),
    Case(
        "trap/generated_weight",
        lambda: Function(_generated, code=parameter(4), make=nn.Linear(4, 6)),
        normal(3),
    ),
    Case(
        "trap/positions_without_batch",
        lambda: Function(_batchless_positions, place=nn.Linear(1, 3), head=nn.Linear(3, 2)),
        normal(4, 3),
    ),
    Case(
        "trap/positions_without_batch_of_its_length",
        lambda: Function(_batchless_positions, place=nn.Linear(1, 3), head=nn.Linear(3, 2)),
        normal(4, 3),
        size=4,
    ),
    Case(
        "trap/weight_read_outside",
        lambda: Function(_read_outside, layer=nn.Linear(3, 2)),
        normal(3),
    ),
    Case(
        "trap/weight_only_read", lambda: Function(_fast_weights, layer=nn.Linear(3, 2)), normal(3)
    ),
    Case(
        "trap/weight_penalty", lambda: Function(_weight_penalty, layer=nn.Linear(3, 2)), normal(3)
    ),
    Case(
        "trap/detached_branch",
        lambda: Function(_detached, layer=nn.Linear(3, 4), head=nn.Linear(4, 4)),
        normal(3),
    ),
    Case(
        "trap/experts",
        lambda: Function(
            _gated, gate=nn.Linear(3, 2), experts=nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)])
        ),
        normal(3),
    ),
    Case(
        "trap/layer_unused",
        lambda: Function(
            lambda m, x: m.layer(x).tanh(),
            layer=nn.Linear(3, 2),
            spare=nn.Linear(3, 2),
            loose=parameter(2),
        ),
        normal(3),
    ),
    Case(
        "trap/output_unused",
        lambda: Function(_output_unused, layer=nn.Linear(3, 2), aside=nn.Linear(3, 2)),
        normal(3),
    ),
    Case(
        "trap/positions_unused",
        lambda: Function(_attention_unused, embed=nn.Embedding(6, 3), layer=nn.Linear(3, 2)),
        tokens(6, 4),
    ),
    Case("trap/views_repeated", lambda: Function(_repeated, layer=nn.Linear(3, 2)), normal(3)),
    Case(
        "trap/loop_over_examples",
        lambda: Function(_without_batch, layer=nn.Linear(3, 2)),
        normal(4, 3),
        may_refuse=True,
    ),
    Case(
        "trap/activation_checkpointing",
        lambda: Function(
            lambda m, x: m.second(checkpoint(m.first, x, use_reentrant=False).tanh()),
            first=nn.Linear(3, 4),
            second=nn.Linear(4, 2),
        ),
        normal(3),
        may_refuse=True,
    ),
    Case(
        "trap/dropout_in_eval",
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2)),
        normal(3),
    ),
]
