"""What graph layers keep of the first graph they saw.

Layers of torch_geometric with ``cached=True`` normalise the edges once, in their first call, and
take these ever after, whatever graph they are given. An edited graph must be seen as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_KEPT = "_cached"  # begins the names of what torch_geometric keeps


def forget(module: nn.Module) -> None:
    """Let go of what its layers keep of a graph; the next call looks at its graph again."""
    for layer in _caching(module):
        for name in [name for name in vars(layer) if name.startswith(_KEPT)]:
            setattr(layer, name, None)


@contextmanager
def without_caches(module: nn.Module) -> Iterator[None]:
    """Every call looks at the graph that it is given; afterwards all is as it was."""
    layers = _caching(module)
    held = [dict(vars(layer)) for layer in layers]
    forget(module)
    for layer in layers:
        layer.cached = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, before in zip(layers, held, strict=True):
            layer.cached = before["cached"]
            for name, value in before.items():
                if name.startswith(_KEPT):
                    setattr(layer, name, value)


def _caching(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if vars(layer).get("cached") is True]
