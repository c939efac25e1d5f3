r"""Fewer recursions than queries: the directions that their measurement gradients have.

The way back is linear in the adjoint that it begins with, whatever the optimizer. So the gradients
of Q queries, each divided by its length, are written as

.. math::
    g_q / |g_q| = \sum_k U_{qk} d_k + r_q

with the leading left singular vectors U, as few as leave no :math:`|r_q|` above a tolerance. The
directions :math:`d_k` go back instead of the queries, and scores are U times theirs.

What the rest :math:`r_q` would have made of itself is measured: Gaussian mixtures
:math:`\sum_q \omega_q r_q` go back along with the directions. For the matrix E whose columns are
the errors of the queries' scores (divided by the lengths of their gradients) and p mixtures,

.. math::
    \|E\|_2 \le 10 \sqrt{2 / \pi}\; \max_j |E\, \omega_j| \qquad
    \text{with probability at least } 1 - 10^{-p}

(Halko, Martinsson & Tropp 2011, 0909.4061, eq. 4.3), and no query's error is longer than
:math:`\|E\|_2`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

PROBES = 3  # the bound fails once in 1000 times
_BOUND = 10 * math.sqrt(2 / math.pi)


@dataclass
class Directions:
    """How the scores of queries are made of those of directions.

    Attributes:
        mix: |g_q| U, [query, direction].
        lengths: |g_q|, [query].
        probes: of what is left, sums over the segments so far [probe, column].
        total: scores of the queries likewise, [query, column].
    """

    mix: Tensor
    lengths: Tensor
    probes: Tensor | None = None
    total: Tensor | None = None
    kept: int = field(init=False)

    def __post_init__(self) -> None:
        self.kept = self.mix.shape[1]

    @staticmethod
    def of(
        adjoints: Mapping[str, Tensor], tolerance: float
    ) -> tuple[Directions, dict[str, Tensor]] | None:
        """The directions of [query, *shape] by name, and what goes back for them; None where every
        query may as well go back itself.

        Args:
            tolerance: the longest |r_q|.
        """
        some = next(iter(adjoints.values()))
        count = len(some)
        lengths = torch.zeros(count, dtype=torch.float64, device=some.device)
        for own in adjoints.values():
            lengths += own.double().flatten(1).square().sum(1)
        lengths = lengths.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        products = torch.zeros(count, count, dtype=torch.float64, device=some.device)
        for own in adjoints.values():
            rows = own.flatten(1).double() / lengths[:, None]
            products += rows @ rows.T
        vectors = torch.linalg.eigh(products).eigenvectors.flip(1)
        # |r_q|^2 after k directions is what the other vectors hold of the query.
        along = (vectors.T @ products).T * vectors
        left = (products.diagonal()[:, None] - along.cumsum(1)).clamp(min=0).amax(0).sqrt()
        enough = (left <= tolerance).nonzero()
        kept = int(enough[0]) + 1 if len(enough) else count
        if kept + PROBES >= count:
            return None
        basis = vectors[:, :kept]
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(PROBES, count, generator=generator, dtype=torch.float64)
        rest = normal.to(basis) @ (torch.eye(count).to(basis) - basis @ basis.T)
        sent = torch.cat([basis.T, rest]) / lengths
        carried = {
            name: (sent @ own.flatten(1).double()).to(own).unflatten(1, own.shape[1:])
            for name, own in adjoints.items()
        }
        return Directions(basis * lengths[:, None], lengths), carried

    def scores(self, values: Tensor) -> Tensor:
        """Scores of the queries [query, ...] from those of all that went back, of a segment."""
        mixed: Tensor = torch.tensordot(self.mix.to(values), values[: self.kept], dims=1)
        return mixed

    def add(self, values: Tensor) -> Tensor:
        """:meth:`scores` of a segment [query, column], which counts in the error."""
        mixed, rest = self.scores(values), values[self.kept :].double()
        self.total = mixed.double() if self.total is None else self.total + mixed
        self.probes = rest if self.probes is None else self.probes + rest
        return mixed

    def errors(self) -> tuple[Tensor, Tensor]:
        """Of each query's scores over all segments, relative to their length: the root mean square
        that the probes say, and the bound; [query]."""
        assert self.probes is not None and self.total is not None
        sizes = self.probes.norm(dim=1)
        lengths = self.total.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        typical = sizes.square().mean().sqrt() / math.sqrt(len(self.lengths))
        relative = self.lengths / lengths
        return typical * relative, _BOUND * sizes.max() * relative

    def tensors(self) -> dict[str, Tensor]:
        """To resume from."""
        return {"mix": self.mix, "query_lengths": self.lengths}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor]) -> Directions | None:
        """What :meth:`tensors` gave; None where there was none."""
        if "mix" not in tensors:
            return None
        return Directions(tensors["mix"], tensors["query_lengths"])
