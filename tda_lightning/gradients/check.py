"""Compare the engine with plain autograd, one example at a time."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from tda_lightning.gradients.engine import GradientEngine
from tda_lightning.gradients.functional import Loss
from tda_lightning.runtime.module_state import doubled, in_double
from tda_lightning.tasks import batches
from tda_lightning.tasks.batches import Batch

SUSPICIOUS = 1e-4


def largest_errors(
    engine: GradientEngine, loss: Loss, batch: Batch, examples: Tensor, alone: bool = True
) -> dict[str, float]:
    """Largest relative error of any example's gradient, by block.

    The error is |engine - autograd| / |autograd| over the block's parameters; for a gradient that
    is a rounding error next to the largest in the batch, relative to that one.

    Args:
        alone: run each example in a batch of its own. False where examples are mixed with others
            of their batch (mixup): autograd then differentiates each example's loss in the batch.
    """
    errors = _errors(engine, loss, batch, examples, alone)
    if max(errors.values()) > SUSPICIOUS:
        # A batch of one may round otherwise in float32 and send a value near a kink (a ReLU, a
        # maximum) the other way: float64 tells that from an error.
        with suppress(RuntimeError, TypeError, ValueError), in_double(engine.module):
            exact = _errors(engine, loss, doubled(batch), examples, alone)
            errors = {name: min(error, exact[name]) for name, error in errors.items()}
    return errors


def _errors(
    engine: GradientEngine, loss: Loss, batch: Batch, examples: Tensor, alone: bool
) -> dict[str, float]:
    factored = engine.gradients(loss, batch, examples).blocks

    def plain_gradient(position: int) -> dict[str, Tensor]:
        own = slice(position, position + 1)
        if not alone:
            return engine.plain_gradient(lambda *a: loss(*a)[own], batch, examples)
        return engine.plain_gradient(
            loss, batches.take(batch, position, len(examples)), examples[own]
        )

    plain = [plain_gradient(position) for position in range(len(examples))]
    errors = {}
    for block in engine.blocks:
        expected = torch.stack([block.matrix(gradient) for gradient in plain]).flatten(1)
        got = factored[block.name].dense(slice(None)).flatten(1)
        norms = expected.norm(dim=1)
        floor = norms.max() * torch.finfo(norms.dtype).eps
        scale = torch.maximum(norms, floor)
        error = (got - expected).norm(dim=1) / scale.clamp(min=torch.finfo(norms.dtype).tiny)
        errors[block.name] = float(error.max())
    return errors
