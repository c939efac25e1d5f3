"""Random projections of per-example gradients that never form the gradient of a factored layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.gradients import Block, Gradient


@dataclass(frozen=True)
class Projection:
    r"""Coordinates of gradients in k random directions.

    A direction is an outer product of two normal vectors in every layer (for each of its groups),

    .. math::
        \phi_k(n) = \frac{1}{\sqrt K} \sum_{\text{layers}} r_k^\top D_n s_k
          = \frac{1}{\sqrt K} \sum_{\text{layers}} \sum_t (r_k \cdot b_{nt})(a_{nt} \cdot s_k),

    where :math:`D_n = \sum_t b_{nt} a_{nt}^\top` is a layer's gradient as the engine has it: the
    row-wise Khatri-Rao product of two normal matrices, and not their Kronecker product, whose
    directions share few factors. All directions are independent, their mean outer product is the
    identity, and for any two gradients the mean of :math:`\phi(n) \cdot \phi(m)` is their inner
    product. Its variance is between that of a dense normal matrix and four times that, the more
    where a single layer's gradient is one outer product; in a regression on the features the
    difference does not show (docs/methods.md, "TRAK").

    Attributes:
        dimension: K.
        sides: of every block, r [groups, rows, K] and s [groups, columns, K]; None: the gradient's
            own coordinates, nothing is projected.

    References:
        | Row products of random matrices (Rudelson, 2012), https://arxiv.org/abs/1102.1947
        | Oblivious sketching of high-degree polynomial kernels (Ahle et al., 2020), sec. 4
        | https://arxiv.org/abs/1909.01410
    """

    dimension: int
    sides: Mapping[str, tuple[Tensor, Tensor]] | None

    @staticmethod
    def drawn(
        blocks: Sequence[Block],
        dimension: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Projection:
        """Directions for gradients of these blocks; as many as there are parameters, or more, are
        the parameters' own axes."""
        if dimension >= (parameters := sum(block.size for block in blocks)):
            return Projection(parameters, None)
        generator = torch.Generator().manual_seed(seed)  # the same on every device
        sides = {}
        for block in blocks:
            groups, rows, columns = block.shape
            left, right = (
                torch.randn(groups, width, dimension, generator=generator)
                for width in (rows, columns)
            )
            sides[block.name] = (
                (left / dimension**0.5).to(device, dtype),
                right.to(device, dtype),
            )
        return Projection(dimension, sides)

    def combined(self, coordinates: Tensor, blocks: Sequence[Block]) -> dict[str, Tensor]:
        """The gradients whose inner products are those of ``coordinates`` [query, dimension] with
        the coordinates of others: P^T c, [query, groups, rows, columns] by block."""
        if self.sides is None:
            parts = coordinates.split([block.size for block in blocks], dim=1)
            return {
                block.name: part.unflatten(1, block.shape)
                for block, part in zip(blocks, parts, strict=True)
            }
        return {
            name: torch.einsum("qk,grk,gck->qgrc", coordinates, left, right)
            for name, (left, right) in self.sides.items()
        }

    def coordinates(self, gradients: Mapping[str, Gradient]) -> Tensor:
        """Of every example, [batch, dimension]."""
        if self.sides is None:
            parts = [gradient.dense(slice(None)).flatten(1) for gradient in gradients.values()]
            return torch.cat(parts, dim=1)
        terms = [gradient.bilinear(*self.sides[name]) for name, gradient in gradients.items()]
        return torch.stack(terms).sum(0)
