"""The Gauss-Newton matrix of any task whose ``train_loss`` calls standard losses.

For l_n = sum_t w_nt e_nt, with e_nt the loss of one element of example n and J_nt the Jacobian of
its outputs, the matrix is G_n = sum_t w_nt J_nt^T e''_nt J_nt. Both functions give losses whose
gradients have outer products that are G_n: in expectation, or as an exact sum. The weights enter
as square roots, once for every element: the gradient of the weighted *mean* loss itself would give
a matrix too small by the number of elements (docs/methods.md, "Units").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning.tasks.base import AttributionTask
from tda_lightning.tasks.interception import WeightedLoss


def sampled_gauss_newton_loss(task: AttributionTask, module: nn.Module, batch: Any) -> Tensor:
    r"""A random loss of each example, [batch], with G_n the second moment of its gradient.

    .. math::
        \sum_t \sqrt{w_{nt}} \, \langle \epsilon_{nt}, o_{nt} \rangle, \qquad
        E[\epsilon \epsilon^\top] = e''_{nt}

    The noise has the covariance that the gradients of labels drawn from the model have (see
    ``standard_losses`` on why it is not those labels themselves). Inside
    :func:`~tda_lightning.tasks.seeded_examples` it depends on the seed and the example alone.
    """
    found, batch_size = require_losses(task, module, batch)
    sampled = [
        item.loss.sampled(item.scale(batch_size), stream).sum(1)
        for stream, item in enumerate(found)
    ]
    return torch.stack(sampled).sum(0)


def gauss_newton_losses(task: AttributionTask, module: nn.Module, batch: Any) -> Iterator[Tensor]:
    """Losses [batch] whose gradients' outer products sum to the exact Gauss-Newton matrix.

    One forward pass, run at once; the losses share its graph, so ask for gradients with
    ``retain_graph=True``. There are (positions x classes) of them for cross entropy, one for each
    number or bit otherwise.
    """
    found, batch_size = require_losses(task, module, batch)

    def losses() -> Iterator[Tensor]:
        for item in found:
            for factor in item.loss.factors(item.scale(batch_size)):
                yield from factor.unbind(1)

    return losses()


def require_losses(
    task: AttributionTask, module: nn.Module, batch: Any
) -> tuple[list[WeightedLoss], int]:
    """The standard losses in the task's ``train_loss`` and the number of examples.

    Raises:
        ValueError: the Gauss-Newton matrix is unknown: there is no standard loss, its batch axis
            does not lead, or it enters with a negative weight.
    """
    with torch.enable_grad():
        found, batch_size = task.standard_losses(module, batch)
    name = type(task).__name__
    if not found:
        raise ValueError(
            f"{name}: the loss depends on none of cross_entropy, nll_loss, mse_loss and "
            "binary_cross_entropy_with_logits of torch.nn.functional, so its Gauss-Newton matrix "
            "is unknown. Use one of them, or a curvature that needs no outputs: the empirical "
            "Fisher, or a solver's curvature='hessian'."
        )
    for item in found:
        if not item.fits(batch_size):
            raise ValueError(
                f"{name}: expected losses with the batch axis first, got {item.loss.kind} losses "
                f"of shape {list(item.loss.values.shape)} for {batch_size} examples."
            )
        readable = not torch._C._functorch.is_functorch_wrapped_tensor(item.weights)
        if readable and (item.weights < 0).any():
            raise ValueError(
                f"{name}: a {item.loss.kind} loss enters with a negative weight, for which there "
                "is no Gauss-Newton matrix. Use a curvature from the empirical Fisher."
            )
    return found, batch_size
