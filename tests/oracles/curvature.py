"""Dense curvature matrices over all parameters, [parameters, parameters]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.oracles.gradients import Batch, Criterion, Loss, num_examples, take, trained


def gauss_newton(
    module: nn.Module,
    criterion: Criterion,
    data: Batch,
    names: Sequence[str] | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    r"""Gauss-Newton matrix of the mean loss, from full Jacobians.

    .. math::
        \frac1N \sum_n v_n J_n^T \, \nabla_o^2 \ell(o_n, y_n) \, J_n

    Args:
        criterion: the loss [batch] of outputs and targets, with the mean or sum over positions
            exactly as trained.
        data: all examples, (input, target).
        names: order of the parameters; the trained ones if None.
        weights: v [batch]; 1 if None.
    """
    names = trained(module) if names is None else names
    lookup = dict(module.named_parameters())
    parameters = [lookup[name] for name in names]
    total = torch.zeros(())
    for number in range(num_examples(data)):
        inputs, target = take(data, [number])
        outputs = module(inputs)
        rows = [
            torch.autograd.grad(
                output, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for output in outputs.reshape(-1)
        ]
        jacobian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
        shape = outputs.shape

        def loss_of_outputs(flat: Tensor, shape=shape, target=target) -> Tensor:
            return criterion(flat.reshape(shape), target).sum()

        inner = torch.autograd.functional.hessian(loss_of_outputs, outputs.detach().reshape(-1))
        own = 1.0 if weights is None else float(weights[number])
        total = total + own * jacobian.T @ inner @ jacobian
    return total / num_examples(data)


def loss_hessian(
    module: nn.Module, loss: Loss, data: Batch, names: Sequence[str] | None = None
) -> Tensor:
    """The true Hessian of the mean loss, row by row."""
    names = trained(module) if names is None else names
    lookup = dict(module.named_parameters())
    parameters = [lookup[name] for name in names]
    first = torch.autograd.grad(loss(module, data).mean(), parameters, create_graph=True)
    rows = [
        torch.cat(
            [
                part.reshape(-1)
                for part in torch.autograd.grad(
                    entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                )
            ]
        )
        for gradient in first
        for entry in gradient.reshape(-1)
    ]
    return torch.stack(rows)


def second_moment(gradients: Tensor) -> Tensor:
    """E[g g^T] over examples: the true or empirical Fisher, as the gradients [batch, P] are."""
    return torch.einsum("ni,nj->ij", gradients, gradients) / len(gradients)
