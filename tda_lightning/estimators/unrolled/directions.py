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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tda_lightning.records.provenance import Provenance
from tda_lightning.session.session import Session

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

    def add(self, values: Tensor, first_column: int = 0) -> Tensor:
        """:meth:`scores` of a segment [query, column], which counts in the error; its columns begin
        with ``first_column`` of all."""
        mixed, rest = self.scores(values), values[self.kept :].double()
        self.total = _added(self.total, mixed.double(), first_column)
        self.probes = _added(self.probes, rest, first_column)
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


def directions_record(
    session: Session, tolerance: float, rounds: Sequence[tuple[int, Directions | None]]
) -> Provenance:
    """How many directions went back, and what that did to the scores of the queries, of all
    processes together; nothing where all queries went back themselves.

    Args:
        rounds: of this process, each with the number of its first query.
    """
    if not tolerance:
        return {}
    counts = torch.zeros(3, dtype=torch.float64)
    errors = torch.zeros(3, session.num_query, dtype=torch.float64)
    for first, directions in rounds:
        if directions is not None:
            made = slice(first, first + len(directions.lengths))
            known = torch.ones_like(directions.lengths)
            errors[:, made] = torch.stack([*directions.errors(), known]).cpu()
            counts += torch.tensor([directions.kept, PROBES, len(directions.lengths)])
    kept, probes, queries = (int(n) for n in session.reduce(counts.to(session.device)))
    typical, bound, truncated = session.reduce(errors.to(session.device))
    if not queries:
        return {}
    return {
        "directions": {
            "kept": kept,
            "probes": probes,
            "queries": queries,
            "tolerance": tolerance,
            "relative_error": float(typical[truncated > 0].median()),
            "error_bound": float(bound.max()),
        }
    }


def _added(total: Tensor | None, values: Tensor, first_column: int) -> Tensor:
    """A sum of segments, of which each may have columns of its own."""
    values = torch.nn.functional.pad(values, (first_column, 0))
    if total is None:
        return values
    width = max(total.shape[1], values.shape[1])
    padded = [torch.nn.functional.pad(own, (0, width - own.shape[1])) for own in (total, values)]
    return padded[0] + padded[1]
