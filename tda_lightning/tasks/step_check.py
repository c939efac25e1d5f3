"""Compare the losses that were taken out of a training step with the step itself.

The step is run as its author wrote it, with nothing that watches it: on the batch, and on single
examples. What is left of its gradient without the examples' parts must be the same every time: the
gradient of a penalty on the weights, which no example changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.runtime.irregular_weights import irregular_weights
from tda_lightning.runtime.module_state import doubled, in_double
from tda_lightning.runtime.silence import silenced
from tda_lightning.tasks import batches
from tda_lightning.tasks.base import AttributionTask
from tda_lightning.tasks.batches import Batch

Step: TypeAlias = Callable[[nn.Module, Batch], Tensor]
# What a function gives for each example of a batch, in a batch of one.
Singles: TypeAlias = Callable[
    [Batch, Callable[[Batch], tuple[Tensor, Tensor, Tensor] | None]],
    list[tuple[Tensor, Tensor, Tensor] | None],
]

# Far above rounding, far below what a lost or doubled term makes.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
# How many times smaller than what is tolerated of one difference a sum of them must be, to be
# taken for all of them: rounding is smaller still.
_CLEARLY = 16


def compare_with_plain_steps(
    task: AttributionTask,
    step: Step,
    module: nn.Module,
    batch: Batch,
    singles: Singles,
    some: bool = False,
    constant: bool = True,
) -> None:
    """Refuse losses of examples that do not make up what ``step`` returns.

    Args:
        task: gives the losses of examples (``train_loss``), and their parts in the loss of a batch
            (``batch_loss``).
        step: the loss of a batch.
        singles: what a function gives for each example of a batch alone.
        constant: whether what means divide by is the same for all examples, so that the loss of an
            example is its part in a batch of one.
        some: look at the first, the last and one between, rather than at all of them.

    Raises:
        UnsupportedTrainingError: the examples of a batch depend on one another.
    """
    problem = _difference(task, step, module, batch, singles, some, constant)
    own = next(module.parameters()).dtype
    if problem is not None and own != torch.float64:
        # Near a kink the rounding of float32 decides which way a gradient goes.
        with suppress(RuntimeError, TypeError, ValueError), in_double(module):
            problem = _difference(task, step, module, doubled(batch), singles, some, constant)
    if problem is not None:
        raise UnsupportedTrainingError(
            f"The loss that training_step returns for a batch is not made of losses of single "
            f"examples: {problem}. Its examples depend on one another (a contrastive loss, batch "
            "statistics, a root or a ratio of means over the batch, a divisor that the model "
            "learns), so an example has no loss of its own. Give a task whose train_loss is each "
            "example's own."
        )


def _difference(
    task: AttributionTask,
    step: Step,
    module: nn.Module,
    batch: Batch,
    singles: Singles,
    some: bool,
    constant: bool,
) -> str | None:
    """What does not fit; None where all does."""
    count = batches.num_examples(batch)
    numbers = {0, count // 2, count - 1} if some else set(range(count))
    parameters = [p for p in module.parameters() if p.requires_grad]
    with torch.enable_grad(), silenced(module):
        total = step(module, batch)
        # Models of transformers compute their losses in float32, whatever they are in themselves.
        both = (next(module.parameters()).dtype, total.dtype)
        tolerance = max(_TOLERANCE.get(dtype, 5e-2) for dtype in both)
        parts = task.batch_loss(module, batch)[1]
        losses = task.train_loss(module, batch)
        rest = [total - parts.sum()]
        mine: list[Tensor] = []
        alone: list[Tensor] = []
        parts_alone: list[Tensor] = []

        following = iter(range(count))

        def of_single(one: Batch) -> tuple[Tensor, Tensor, Tensor] | None:
            if next(following) not in numbers:
                return None
            part = task.batch_loss(module, one)[1].sum()
            return step(module, one) - part, task.train_loss(module, one).sum(), part

        for number, single in enumerate(singles(batch, of_single)):
            if single is not None:
                left, loss, part = single
                rest.append(left)
                mine.append(losses[number])
                alone.append(loss)
                parts_alone.append(part / task.share(1))
        whole = _gradient(total, parameters)
        if not (bool(total.isfinite()) and bool(whole.isfinite().all())):
            return None  # whoever uses it says which example's loss it is
        scale = max(float(total.detach().abs()), float(losses.detach().abs().max()))
        gradients = [whole, *(_gradient(x, parameters) for x in alone)]
        size = max(float(gradient.norm()) for gradient in gradients)
        compared = [
            *(
                ("an example's loss alone and in its batch", a, b)
                for a, b in zip(mine, alone, strict=True)
            ),
            *(
                ("an example's loss and its part in a batch of one", a, b)
                for a, b in zip(alone, parts_alone, strict=True)
                if constant
            ),
            *(("what is left without the examples' parts", rest[0], other) for other in rest[1:]),
        ]
        if _clearly_alike([a - b for _, a, b in compared], parameters, tolerance, scale, size):
            return None
        for name, left, right in compared:
            values = abs(float(left.detach() - right.detach()))
            if not values <= tolerance * scale:
                return f"{name} differ ({float(left.detach()):.4g} and {float(right.detach()):.4g})"
            apart = float(_gradient(left - right, parameters).norm())
            if not apart <= tolerance * size:
                return f"{name} have gradients that differ by {apart:.1e} ({size:.1e} in all)"
    return None


def _clearly_alike(
    differences: Sequence[Tensor],
    parameters: Sequence[Tensor],
    tolerance: float,
    scale: float,
    size: float,
) -> bool:
    """Whether all differences, and their gradients, are far below what is tolerated.

    A backward pass through the batch costs as much for one difference as for their sum, with
    weights so irregular that gradients which cancel in a plain sum do not cancel in it.
    """
    values = torch.stack([difference.detach() for difference in differences])
    if not bool((values.abs() <= tolerance * scale).all()):
        return False
    weights = irregular_weights(len(differences), values)
    total = (torch.stack(list(differences)) * weights).sum()
    return float(_gradient(total, parameters).norm()) <= tolerance * size / _CLEARLY


def _gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """By all parameters, in one row."""
    if not parameters or not value.requires_grad:
        return torch.zeros(1)
    gradients = torch.autograd.grad(
        value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([gradient.to_dense().flatten() for gradient in gradients])
