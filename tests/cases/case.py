"""What a test problem is."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tests.oracles.gradients import Criterion, Loss, cross_entropy, loss_of, mean_squared_error

Inputs = Callable[[int], Tensor]


def normal(*shape: int) -> Inputs:
    """Normal inputs [size, *shape]."""
    return lambda size: torch.randn(size, *shape, dtype=torch.float64)


def tokens(vocabulary: int, *shape: int) -> Inputs:
    """Token numbers [size, *shape] in 0 to vocabulary - 1, every one of them used if it can be."""
    return lambda size: torch.randint(vocabulary, (size, *shape))


@dataclass(frozen=True)
class Case:
    """One model with its data.

    Attributes:
        name: unique, the test's id.
        factory: makes the module; :meth:`build` seeds it.
        inputs: batch size -> input tensor, example axis first.
        kind: ``regression``: targets of the outputs' shape. ``classification``: a label for each
            of the outputs' leading axes, logits in the last.
        size: number of examples that a test should use, chosen so that it meets another axis of
            the same length where that is the point.
        may_refuse: exotic enough that an error naming the parameter will do instead of gradients.
    """

    name: str
    factory: Callable[[], nn.Module]
    inputs: Inputs
    kind: Literal["regression", "classification"] = "regression"
    size: int = 3
    may_refuse: bool = False

    def build(self) -> nn.Module:
        """The module in eval mode, the same at every call, no parameter left at 0 or 1."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        module = self.factory().double().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            for name, buffer in module.named_buffers():
                if buffer.is_floating_point():
                    noise = torch.rand_like(buffer)
                    buffer.add_(noise if name.endswith("running_var") else noise - 0.5)
        return module

    def batch(self, size: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets of ``size`` examples."""
        torch.manual_seed(seed + 1)
        inputs = self.inputs(self.size if size is None else size)
        with torch.no_grad():
            outputs = self.build()(inputs.clone())
        torch.manual_seed(seed + 2)
        if self.kind == "classification":
            return inputs, torch.randint(outputs.shape[-1], outputs.shape[:-1])
        return inputs, torch.randn_like(outputs)

    @property
    def criterion(self) -> Criterion:
        """Loss [batch] of outputs and targets, averaged over an example's positions or outputs."""
        return cross_entropy if self.kind == "classification" else mean_squared_error

    @property
    def loss(self) -> Loss:
        """Loss [batch] of module and batch."""
        return loss_of(self.criterion)


class Function(nn.Module):
    """Wires named submodules and parameters by a function of (self, input)."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **parts: object) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self, inputs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def frozen(module: nn.Module, *names: str) -> nn.Module:
    """The module with these parameters frozen, all of them if none is named."""
    for name, value in module.named_parameters():
        if not names or name in names:
            value.requires_grad_(False)
    return module
