r"""The running statistics of BatchNorm as functions of the weights.

In train mode every forward pass moves them towards the batch's statistics,

.. math::
    r \leftarrow (1 - \rho)\, r + \rho\, s(\theta)

and the measurement, taken in eval mode, reads them. So their adjoint ``c`` runs back through
training too: a step hands :math:`\rho\, c` to the weights through s, and :math:`(1 - \rho)\, c` to
the step before. torch differentiates neither the update nor the use; both are restated here.
"""

from __future__ import annotations

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


def measurement_adjoints(
    measure: Callable[[int], Tensor], layers: Mapping[str, _BatchNorm], queries: int
) -> dict[str, Tensor]:
    r"""Derivatives of each query's measurement with respect to the running statistics.

    With y = (x - mean) / sqrt(var + eps) w + b the derivatives are sums over what the layer sees:

    .. math::
        \frac{\partial m}{\partial mean} = -\sum \frac{\partial m}{\partial y}
        \frac{w}{\sqrt{var + \epsilon}}, \qquad
        \frac{\partial m}{\partial var} = -\frac12 \sum \frac{\partial m}{\partial y}
        \frac{(x - mean)\, w}{(var + \epsilon)^{3/2}}

    Args:
        measure: query number -> its measurement, a scalar with its graph, in eval mode.
        layers: in eval mode now.
        queries: how many.

    Returns:
        [query, features] by buffer name.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in statistics_names(layers)}
    for query in range(queries):
        with _seen(layers) as seen:
            value = measure(query)
        outputs = [output for *_, output in seen]
        gradients = torch.autograd.grad(value, outputs, allow_unused=True)
        own = {name: [torch.zeros(())] for name in found}
        for (name, inputs, _), gradient in zip(seen, gradients, strict=True):
            if gradient is not None:
                through = _through(layers[name], inputs.detach(), gradient)
                for kind, part in zip(statistics_names({name: layers[name]}), through, strict=True):
                    own[kind].append(part)
        for name, parts in own.items():
            found[name].append(sum(parts[1:], torch.zeros_like(parts[-1])))
    return {name: torch.stack(tensors) for name, tensors in found.items()}


@contextmanager
def _seen(layers: Mapping[str, _BatchNorm]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Name, input and output of every use of the layers, while active."""
    seen: list[tuple[str, Tensor, Tensor]] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: seen.append((name, inputs[0], output))

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _through(layer: _BatchNorm, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None and layer.running_var is not None
    axes = [axis for axis in range(inputs.dim()) if axis != 1]
    shape = [1, -1, *[1] * (inputs.dim() - 2)]
    variance = layer.running_var + layer.eps
    weight = torch.ones_like(variance) if layer.weight is None else layer.weight.detach()
    centred = inputs - layer.running_mean.view(shape)
    by_mean = -gradient.sum(axes) * weight / variance.sqrt()
    by_variance = -0.5 * (gradient * centred).sum(axes) * weight / variance**1.5
    return by_mean, by_variance
