"""Features of examples: one vector each, read inside the model."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def require_layer(module: nn.Module, layer: str) -> None:
    """Refuse the name of a layer that ``module`` does not have.

    Raises:
        ValueError: lists the names near it.
    """
    names = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
    if layer in names:
        return
    last = layer.rpartition(".")[2]
    near = difflib.get_close_matches(layer, names, n=5)
    near += [name for name in names if name.rpartition(".")[2] == last and name not in near][:5]
    known = f"Near it: {', '.join(near)}" if near else f"It has: {', '.join(names[:20])}"
    raise ValueError(
        f"The model has no layer {layer!r}. {known}{'' if near or len(names) <= 20 else ', ...'}. "
        "Names are those of module.named_modules()."
    )


def read_features(
    module: nn.Module,
    layer: str | None,
    forward: Callable[[], int],
    nodes: Tensor | None = None,
) -> tuple[Tensor, str]:
    """Features of the examples of one batch, and the name of their layer.

    Args:
        module: the model.
        layer: its outputs are the features; None: the *inputs* of the last linear layer
            (``torch.nn.Linear``) called, the hidden features that a classifier's head sees.
        forward: runs the model on the batch and returns the number of examples.
        nodes: where the batch is a graph, which of its nodes the examples are.

    Returns:
        float32 [example, feature], and the layer's name. Sequences [example, position, feature]
        are averaged over positions, images [example, channel, height, width] over height and
        width; the features of a linear layer are in its last axis. If a layer is called several
        times, the last call counts.

    Raises:
        ValueError: the layer is not called, or yields no floating-point tensor with the same
            number of rows for each example.
    """
    with _watched(module, layer) as seen:
        size = forward()
    if not seen:
        if layer is None:
            raise ValueError(
                "The model calls no linear layer (torch.nn.Linear), so its examples have no "
                "features of the last layer to compare. Where a layer can be named (layer=NAME), "
                "its outputs are taken in place of them."
            )
        raise ValueError(
            f"The layer {layer!r} is not called when the model runs, so it has no features. Name "
            "one that is."
        )
    name, found = seen[-1]
    in_last_axis = isinstance(module.get_submodule(name), nn.Linear)
    if nodes is not None and isinstance(found, Tensor) and found.dim():
        found = found[nodes]
    # Detached: a task may need a graph for its losses, whatever is asked.
    return _rows(found, size, name, in_last_axis).detach(), name


def read_every_linear_input(module: nn.Module, forward: Callable[[], int]) -> dict[str, Tensor]:
    """Inputs of every linear layer that is called, by its name: float32 [example, feature] as in
    :func:`read_features`.

    Raises:
        ValueError: the model calls no linear layer, or one has not as many rows for each example.
    """
    with _watched(module, None) as seen:
        size = forward()
    if not seen:
        raise ValueError(
            "The model calls no linear layer (torch.nn.Linear), so there are no activations to "
            "compare."
        )
    return {name: _rows(found, size, name, True).detach() for name, found in dict(seen).items()}


@contextmanager
def _watched(module: nn.Module, layer: str | None) -> Iterator[list[tuple[str, object]]]:
    """Name and inputs of linear layers, or outputs of ``layer``, in the order of their calls."""
    seen: list[tuple[str, object]] = []

    def before(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        return lambda _, inputs: seen.append((name, inputs[0]))

    def after(_: nn.Module, __: object, output: object) -> None:
        assert layer is not None
        seen.append((layer, output))

    if layer is not None:
        hooks = [module.get_submodule(layer).register_forward_hook(after)]
    else:
        hooks = [
            part.register_forward_pre_hook(before(name))
            for name, part in module.named_modules()
            if isinstance(part, nn.Linear)
        ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _rows(found: object, size: int, name: str, in_last_axis: bool) -> Tensor:
    """One row for each of ``size`` examples."""
    if isinstance(found, tuple | list) and found:  # a recurrent layer has its state besides
        found = found[0]
    if not isinstance(found, Tensor) or not found.is_floating_point():
        kind = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"The layer {name!r} gives {kind}, expected a floating-point tensor. Name another "
            "layer."
        )
    if found.ndim == 2 and len(found) != size and size and len(found) % size == 0:
        found = found.reshape(size, -1, found.shape[1])  # positions in place of examples
    if found.ndim < 2 or len(found) != size:
        raise ValueError(
            f"The layer {name!r} gives a tensor of shape {list(found.shape)} for {size} examples, "
            "expected examples first. Name another layer."
        )
    found = found.float()
    if found.ndim == 2:
        return found
    if found.ndim == 3 or in_last_axis:
        return found.flatten(1, -2).mean(1)
    return found.flatten(2).mean(2)
