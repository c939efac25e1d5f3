r"""The running statistics of BatchNorm as functions of the weights.

In train mode every forward pass moves them towards the batch's statistics,

.. math::
    r \leftarrow (1 - \rho)\, r + \rho\, s(\theta)

and the measurement, taken in eval mode, reads them. So their adjoint ``c`` runs back through
training too: a step hands :math:`\rho\, c` to the weights through s, and :math:`(1 - \rho)\, c` to
the step before. A later stage of training may keep the layer in eval mode: then its own loss reads
what an earlier one left (:func:`read_statistics`). torch differentiates neither the update nor the
use; both are restated here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Use:
    """One forward pass of a layer that moves its running statistics.

    Attributes:
        statistics: the batch's mean and unbiased variance by buffer name, with their graph.
        momentum: how far they move the running ones.
    """

    statistics: Mapping[str, Tensor]
    momentum: float


def moving_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """The layers whose running statistics move in the modes that the parts are in, by name."""
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.training and part.running_mean is not None
    }


def statistics_names(layers: Mapping[str, _BatchNorm]) -> list[str]:
    """Names of the running statistics of ``layers``."""
    return [f"{layer}.{kind}".lstrip(".") for layer in layers for kind in _KINDS]


_KINDS = ("running_mean", "running_var")


@contextmanager
def watched(layers: Mapping[str, _BatchNorm]) -> Iterator[list[Use]]:
    """Note the uses of the layers, in order, while active."""
    uses: list[Use] = []

    def hook(name: str, layer: _BatchNorm) -> RemovableHandle:
        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0]
            axes = [axis for axis in range(values.dim()) if axis != 1]
            found = (values.mean(axes), values.var(axes, unbiased=True))
            names = statistics_names({name: layer})
            uses.append(Use(dict(zip(names, found, strict=True)), _momentum(layer)))

        return layer.register_forward_pre_hook(before)

    handles = [hook(name, layer) for name, layer in layers.items()]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def _momentum(layer: _BatchNorm) -> float:
    if layer.momentum is not None:
        return float(layer.momentum)
    assert layer.num_batches_tracked is not None
    return 1 / (int(layer.num_batches_tracked) + 1)  # a cumulative average


@contextmanager
def read_statistics(layers: Mapping[str, _BatchNorm]) -> Iterator[dict[str, Tensor]]:
    """Copies of the running statistics of layers in eval mode that require gradients, by buffer
    name; while active, the layers read these."""
    leaves: dict[str, Tensor] = {}
    before = {name: layer.__dict__.get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():
        assert layer.running_mean is not None and layer.running_var is not None
        own = [layer.running_mean, layer.running_var]
        own = [statistic.detach().clone().requires_grad_() for statistic in own]
        leaves |= zip(statistics_names({name: layer}), own, strict=True)
        layer.forward = functools.partial(_normalised, layer, *own)  # type: ignore[method-assign]
    try:
        yield leaves
    finally:
        for name, layer in layers.items():
            del layer.forward
            if before[name] is not None:
                layer.__dict__["forward"] = before[name]


def _normalised(layer: _BatchNorm, mean: Tensor, variance: Tensor, inputs: Tensor) -> Tensor:
    shape = [1, -1, *[1] * (inputs.dim() - 2)]
    outputs = (inputs - mean.view(shape)) / (variance + layer.eps).sqrt().view(shape)
    if layer.weight is not None:
        outputs = outputs * layer.weight.view(shape)
    return outputs if layer.bias is None else outputs + layer.bias.view(shape)


def measurement_adjoints(
    measure: Callable[[int], Tensor], layers: Mapping[str, _BatchNorm], queries: int
) -> dict[str, Tensor]:
    """Derivatives of each query's measurement with respect to the running statistics.

    Args:
        measure: query number -> its measurement, a scalar with its graph, in eval mode.
        layers: in eval mode now.
        queries: how many.

    Returns:
        [query, features] by buffer name.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in statistics_names(layers)}
    with read_statistics(layers) as leaves:
        for query in range(queries):
            gradients = torch.autograd.grad(
                measure(query), list(leaves.values()), allow_unused=True, materialize_grads=True
            )
            for name, gradient in zip(leaves, gradients, strict=True):
                found[name].append(gradient)
    return {name: torch.stack(tensors) for name, tensors in found.items()}
