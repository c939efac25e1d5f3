"""Compare the engine with plain autograd, one example at a time."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tda_lightning.gradients.engine import GradientEngine
from tda_lightning.gradients.functional import Loss, doubled, in_double

SUSPICIOUS = 1e-4


def largest_errors(
    engine: GradientEngine, loss: Loss, batch: Any, examples: Tensor
) -> dict[str, float]:
    """Largest relative error of any example's gradient, by block.

    The error is |engine - autograd| / |autograd| over the block's parameters; for a gradient that
    is a rounding error beside the largest in the batch, relative to that one.
    """
    errors = _errors(engine, loss, batch, examples)
    if max(errors.values()) > SUSPICIOUS:
        # A batch of one may round otherwise in float32 and send a value near a kink (a ReLU, a
        # maximum) the other way: float64 tells that from an error.
        with suppress(RuntimeError, TypeError, ValueError), in_double(engine.module):
            exact = _errors(engine, loss, doubled(batch), examples)
            errors = {name: min(error, exact[name]) for name, error in errors.items()}
    return errors


def _errors(engine: GradientEngine, loss: Loss, batch: Any, examples: Tensor) -> dict[str, float]:
    found = engine.gradients(loss, batch, examples).blocks
    plain = [_alone(engine, loss, batch, examples, i) for i in range(len(examples))]
    errors = {}
    for block in engine.blocks:
        expected = torch.stack([block.matrix(gradient) for gradient in plain]).flatten(1)
        got = found[block.name].dense(slice(None)).flatten(1)
        norms = expected.norm(dim=1)
        floor = norms.max() * torch.finfo(norms.dtype).eps
        scale = torch.maximum(norms, floor)
        error = (got - expected).norm(dim=1) / scale.clamp(min=torch.finfo(norms.dtype).tiny)
        errors[block.name] = float(error.max())
    return errors


def _alone(
    engine: GradientEngine, loss: Loss, batch: Any, examples: Tensor, position: int
) -> dict[str, Tensor]:
    """Gradient of one example's loss in a batch of one, by plain autograd."""
    own = slice(position, position + 1)

    def cut(leaf: Any) -> Any:
        sliced = isinstance(leaf, Tensor) and leaf.shape[:1] == examples.shape
        return leaf[own] if sliced else leaf

    return engine.plain_gradient(loss, pytree.tree_map(cut, batch), examples[own])
