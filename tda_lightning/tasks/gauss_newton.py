"""The Gauss-Newton matrix of any task whose ``train_loss`` calls standard losses.

For l_n = sum_t w_nt e_nt, with e_nt the loss of one element of example n and J_nt the Jacobian of
its outputs, the matrix is G_n = sum_t w_nt J_nt^T e''_nt J_nt. The functions here give losses, or
gradients of outputs, whose outer products are G_n: in expectation, or as an exact sum. The weights
enter as square roots, once for every element: the gradient of the weighted *mean* loss itself would
give a matrix too small by the number of elements (docs/methods.md, "Units").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tda_lightning.tasks.base import AttributionTask, CurvedLoss
from tda_lightning.tasks.batches import Batch
from tda_lightning.tasks.loss_calls import ObservedLoss, WeightedLoss


def sampled_gauss_newton_loss(task: AttributionTask, module: nn.Module, batch: Batch) -> Tensor:
    r"""A random loss of each example, [batch], with G_n the second moment of its gradient.

    .. math::
        \sum_t \sqrt{w_{nt}} \, \langle \epsilon_{nt}, o_{nt} \rangle, \qquad
        E[\epsilon \epsilon^\top] = e''_{nt}

    The noise has the covariance that the gradients of labels drawn from the model have (see
    ``standard_losses`` on why it is not those labels themselves). Inside
    :func:`~tda_lightning.tasks.seeded_examples` it depends on the seed and the example alone.
    """
    losses, size = require_losses(task, module, batch)
    return torch.stack([loss.sampled(size, i) for i, loss in enumerate(losses)]).sum(0)


def gauss_newton_losses(task: AttributionTask, module: nn.Module, batch: Batch) -> Iterator[Tensor]:
    """Losses [batch] whose gradients' outer products sum to the exact Gauss-Newton matrix.

    One forward pass, run at once; the losses share its graph, so ask for gradients with
    ``retain_graph=True``. There are (positions x classes) of them for cross entropy, one for each
    number or bit otherwise.
    """
    losses, size = require_losses(task, module, batch)
    return (column for loss in losses for column in loss.factors(size))


def sampled_output_gradients(
    total: Tensor, losses: Sequence[ObservedLoss], batch: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Output gradients of sampled labels, for the loss of a training batch as it is optimised.

    Carried back to the parameters and split by example, their second moment, averaged over the
    batch, is the Gauss-Newton matrix of ``total`` (docs/methods.md, "Units"). Inside
    :func:`~tda_lightning.tasks.seeded_examples` they depend on the seed and the example alone.

    Args:
        total: the loss of the batch, a scalar with its graph, which is kept.
        losses: the standard losses behind it.
        batch: examples in the batch.

    Returns:
        The outputs that losses were taken of, and a gradient for each.

    Raises:
        ValueError: a loss enters with a negative weight, or is not laid out by example.
    """
    derivatives = torch.autograd.grad(
        total.sum(), [loss.value for loss in losses], retain_graph=True, allow_unused=True
    )
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for number, (loss, derivative) in enumerate(zip(losses, derivatives, strict=True)):
        if derivative is None:
            continue
        leaves = {name: loss.given[name].detach().requires_grad_() for name in loss.arguments}
        with torch.enable_grad():
            weighted = loss.weighted(derivative, leaves, number)
            weighted = replace(weighted, weights=weighted.weights * batch)
            _require_usable(
                weighted, batch, "training_step",
                "Record with fisher='empirical', or with curvature=None.",
            )  # fmt: skip
            sampled = weighted.sampled(batch, number).sum()
            gradients += torch.autograd.grad(sampled, list(leaves.values()))
        outputs += [loss.given[name] for name in leaves]
    return outputs, gradients


def require_losses(
    task: AttributionTask, module: nn.Module, batch: Batch
) -> tuple[Sequence[CurvedLoss], int]:
    """The losses that ``train_loss`` consists of, with their second derivatives in the outputs of
    the network, and the number of examples.

    Raises:
        ValueError: the outputs of the network cannot be found, or the second derivative is too
            large to be kept.
    """
    with torch.enable_grad():
        return task.curved_losses(module, batch)


def _require_usable(weighted: WeightedLoss, batch: int, where: str, remedy: str) -> None:
    kind = weighted.loss.kind
    if not weighted.fits(batch):
        raise ValueError(
            f"{where}: expected losses with the batch axis first, got {kind} losses of shape "
            f"{list(weighted.loss.values.shape)} for {batch} examples. {remedy}"
        )
    readable = not torch._C._functorch.is_functorch_wrapped_tensor(weighted.weights)
    if readable and bool((weighted.weights < 0).any()):
        raise ValueError(
            f"{where} subtracts a {kind} loss (it has a negative weight), for which there is no "
            f"Gauss-Newton matrix. {remedy}"
        )


def beside_standard_losses(total: Tensor, losses: Sequence[ObservedLoss]) -> str | None:
    """What the loss of a training batch consists of besides standard losses with constant weights,
    in words; None for nothing.

    Args:
        total: the loss of the batch, a scalar with its graph, which is kept.
        losses: the standard losses behind it.
    """
    values = [loss.value for loss in losses]
    weights = torch.autograd.grad(total.sum(), values, create_graph=True, allow_unused=True)
    used = [(w, v) for w, v in zip(weights, values, strict=True) if w is not None]
    if any(weight.requires_grad for weight, _ in used):
        return "weights of standard losses depend on the model"
    whole = float(total.detach().sum())
    rest = whole - sum(float((w * v.detach()).sum()) for w, v in used)
    return (
        f"{rest:.3g} of {whole:.3g} is no standard loss" if abs(rest) > 1e-3 * abs(whole) else None
    )


def example_weighted(gradients: Sequence[Tensor], weights: Tensor) -> list[Tensor] | None:
    """Output gradients, examples first, times the weights of the examples [batch]; None where the
    first axis does not hold them."""
    batch = len(weights)
    if any(g.dim() == 0 or g.shape[0] % batch for g in gradients):
        return None
    rows = [weights.to(g).repeat_interleave(g.shape[0] // batch) for g in gradients]
    return [g * r.view(-1, *[1] * (g.dim() - 1)) for g, r in zip(gradients, rows, strict=True)]
