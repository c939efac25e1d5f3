r"""Directions for one side of a layer's gradients: what is asked and what is there share them.

A layer's gradients D and the responses Q that they meet are matrices, and a score is their inner
product. Let :math:`M_D = E[D D^\top] = L_D L_D^\top` and :math:`M_Q = E[Q Q^\top] = L_Q L_Q^\top`
be the second moments of their row side. With :math:`L_Q^\top L_D = U S V^\top`,

.. math::
    A = L_Q U S^{-1/2}, \qquad B = L_D V S^{-1/2}, \qquad A B^\top = I,

so :math:`\langle Q, D \rangle = \langle B^\top Q, A^\top D \rangle`, and of both factors the second
moment in direction i is :math:`S_i`: leaving a direction out costs :math:`S_i^2` of the mean square
of scores, and no other basis needs fewer directions (balanced truncation, Moore 1981). For an
influence function in the curvature's eigenbasis :math:`S_i^2` is about
:math:`\lambda_i^2 / (\lambda_i + \delta)^2`: neither the largest gradients nor the largest
responses decide, but their product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

WIDEST = 2048  # a side beyond it is first sketched
SKETCH = 256
_RIDGE = 1e-4  # of the mean eigenvalue: nothing is known of directions that no sample shows


@dataclass(frozen=True)
class Side:
    """Directions of one side, the most important ones first.

    Attributes:
        examples: A, [groups, width, count], which gradients are multiplied with.
        responses: B, likewise for responses.
        shares: S^2, [groups, count].
        energy: the mean squares of gradients and of responses, multiplied: [groups].
    """

    examples: Tensor
    responses: Tensor
    shares: Tensor
    energy: Tensor

    def first(self, count: int) -> Side:
        """The leading ``count`` directions."""
        return replace(
            self,
            examples=self.examples[..., :count],
            responses=self.responses[..., :count],
            shares=self.shares[..., :count],
        )


def sketch(groups: int, width: int, generator: torch.Generator) -> Tensor | None:
    """Random directions [groups, width, SKETCH] for a side that is too wide for its moments; None
    for others. In expectation they keep every inner product."""
    if width <= WIDEST:
        return None
    return torch.randn(groups, width, SKETCH, generator=generator) / SKETCH**0.5


def balanced(gradients: Tensor, responses: Tensor, before: Tensor | None) -> Side:
    """The directions of a side from the two second moments [groups, width, width].

    Args:
        before: the sketch that the moments were taken in.
    """
    offered, asked = _root(gradients.double()), _root(responses.double())
    left, values, right = torch.linalg.svd(asked.mT @ offered)
    scale = values.clamp(min=values.amax(-1, keepdim=True) * 1e-12).rsqrt()[..., None, :]
    examples, answers = asked @ left * scale, offered @ right.mT * scale
    if before is not None:
        examples, answers = before.double() @ examples, before.double() @ answers
    of_both = [one.diagonal(dim1=-2, dim2=-1).sum(-1).double() for one in (gradients, responses)]
    return Side(examples, answers, values.square(), of_both[0] * of_both[1])


def _root(moment: Tensor) -> Tensor:
    """The Cholesky factor, of a matrix that is made positive definite."""
    width = moment.shape[-1]
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = torch.where(mean > 0, _RIDGE * mean, torch.ones_like(mean))
    return torch.linalg.cholesky(moment + ridge * torch.eye(width).to(moment))
