r"""Inner products of the gradients of single terms of examples' losses with given directions.

An example's loss is a sum of terms, :math:`l_n = \sum_t l_{nt}` (the tokens of a sequence). The
gradient of a term runs through every earlier position of the model, so that the factors of a
layer's gradient at position t are not those of term t. The products with a direction v are one
Jacobian-vector product for all terms together:

.. math::
    \langle \nabla l_{nt}, v \rangle = \partial_{u_{nt}}
    \Big\langle \nabla_\theta \sum_{ms} u_{ms}\, l_{ms}, v \Big\rangle

the derivative of a backward pass by the weights u of its terms, on a graph that all directions
share. It is exact for every layer and costs as much for long sequences as for short ones in
relation to the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tda_lightning.gradients.functional import (
    TwiceDifferentiable,
    ends_early,
    parameters_frozen,
    plain_recurrence,
)
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.runtime.checkpointing import without_recomputation
from tda_lightning.runtime.random_states import unchanged_randomness


def term_products(
    module: nn.Module, terms: Callable[[], Tensor], directions: Mapping[str, Tensor]
) -> Tensor:
    """<grad l_nt, v> for every term and direction: [direction, batch, position].

    Args:
        module: at the weights in place.
        terms: gives the terms of the examples of a batch, [batch, position].
        directions: [direction, *shape] by parameter, for those that are differentiated by.

    Raises:
        UnsupportedTrainingError: an operation has no second derivative.
    """
    names = list(directions)
    try:
        # The fused attention kernels have no second derivative; their definition has. What is
        # computed again in a backward pass would be computed without it.
        with (
            parameters_frozen(module, names),
            plain_recurrence(module),
            sdpa_kernel(SDPBackend.MATH),
            without_recomputation(),
            unchanged_randomness(),
            torch.enable_grad(),
        ):
            with TwiceDifferentiable():
                values = terms()
            weights = torch.ones_like(values, requires_grad=True)
            gradient = torch.autograd.grad(
                (weights * values).sum(),
                [module.get_parameter(name) for name in names],
                create_graph=True,
                allow_unused=True,
            )
            if ends_early(gradient):
                raise RuntimeError("the backward pass of a Function is once_differentiable.")
            used = [
                (own, directions[name])
                for name, own in zip(names, gradient, strict=True)
                if own is not None and own.requires_grad
            ]
            count = len(next(iter(directions.values())))
            products = values.new_zeros(count, *values.shape)
            for number in range(count if used else 0):
                (product,) = torch.autograd.grad(
                    [own for own, _ in used],
                    weights,
                    [direction[number].to(own) for own, direction in used],
                    retain_graph=number + 1 < count,
                    materialize_grads=True,
                )
                products[number] = product
    except RuntimeError as error:
        text = str(error)
        if "derivative" not in text and "differentiable" not in text:
            raise
        raise UnsupportedTrainingError(
            "Scores by token differentiate the training loss twice, and an operation in it cannot "
            f"be: {text.splitlines()[0][:300]} Write it with operations that can, or score whole "
            "examples (by_token=None)."
        ) from error
    return products.detach()
