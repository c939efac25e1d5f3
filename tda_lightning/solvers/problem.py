r"""The linear system that solvers are given, and what several of them need.

.. math::
    (C + D) h = v, \qquad D = \lambda + \delta

with C the curvature of the mean training loss (known through products), :math:`\lambda` the
recorded weight decay of each parameter and :math:`\delta` the damping. Vectors are rows over all
parameters, [query, parameters], in the order of :func:`~tda_lightning.curvature.as_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tda_lightning.curvature import Products, Spectrum, as_matrices
from tda_lightning.records.provenance import SolverRecord
from tda_lightning.session.session import Session, Span

_PROBES, _STARTS, _POWER_STEPS = 8, 4, 20
# Power iteration comes from below, and the next batches may have more curvature than the probes.
_MARGIN = 1.2


class Solver(Protocol):
    """What a solver is: a dataclass of settings that can solve.

    Attributes:
        curvature: what C is, ``gauss_newton`` or ``hessian``.
        tolerance: the relative residual that counts as solved; None for a closed form.
    """

    curvature: str
    tolerance: float | None

    @property
    def preconditioned(self) -> bool:
        """Whether it needs :meth:`Problem.precondition`."""

    @property
    def by_layer(self) -> bool:
        """Whether relative damping refers to each layer's mean eigenvalue, not the matrix's."""

    @property
    def copies(self) -> int:
        """How many copies of the queries' vectors it holds in memory at a time."""

    def solve(self, problem: Problem, vectors: Tensor) -> Tensor:
        """Solutions for the rows of ``vectors``, [query, parameters]."""


@dataclass
class Problem:
    """One system, for all queries of an attribution.

    Attributes:
        session: the model and the training set.
        products: with C.
        decay: the weight decay of each parameter, [parameters].
        damping: [parameters].
        spectra: of a block-wise curvature close to C, by block, for :meth:`precondition`.
        seed: of random batches and starts.
        used: the steps whose use of examples weighs them in C; None: evenly.
        record: what a solver has to say of its settings and results, for the provenance.
        cache: what a solver needs again for the next queries.
    """

    session: Session
    products: Products
    decay: Tensor
    damping: Tensor
    spectra: dict[str, Spectrum]
    seed: int = 0
    used: Span | None = None
    record: SolverRecord = field(default_factory=lambda: SolverRecord(name=""))
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def diagonal(self) -> Tensor:
        """D, [parameters]."""
        return self.decay + self.damping

    @property
    def size(self) -> int:
        """Number of parameters."""
        return len(self.decay)

    def apply(self, vectors: Tensor) -> Tensor:
        """(C + D) v with the whole training set."""
        return self.products.over_training_set(vectors) + self.diagonal * vectors

    def apply_some(self, vectors: Tensor, examples: Sequence[int]) -> Tensor:
        """(C + D) v with the curvature of some examples."""
        return self.products.over(vectors, examples) + self.diagonal * vectors

    def precondition(self, vectors: Tensor, power: float = -1) -> Tensor:
        """(C~ + D)^power v with the block-wise curvature C~."""
        if "damped" not in self.cache:
            diagonal = as_matrices(self.session.blocks, self.diagonal)
            self.cache["damped"] = {
                name: spectrum.shifted(diagonal[name]) for name, spectrum in self.spectra.items()
            }
            for name, damped in self.cache["damped"].items():
                if not bool((damped.eigenvalues > 0).all()):
                    raise ValueError(
                        f"The curvature of {name} is singular and damping is 0: it cannot "
                        "precondition. Give a positive damping."
                    )
        parts = []
        for name, matrix in as_matrices(self.session.blocks, vectors).items():
            spectrum: Spectrum = self.cache["damped"][name]
            scaled = spectrum.project(matrix) * spectrum.eigenvalues**power
            parts.append(spectrum.lift(scaled).flatten(-3))
        return torch.cat(parts, dim=-1)

    def random_batches(self, size: int, stream: int) -> Iterator[list[int]]:
        """Batches of the shuffled training set, over and over; the same for the same stream."""
        own = torch.Generator().manual_seed(self.seed * 10_007 + stream)
        count = self.session.num_train
        while True:
            order = torch.randperm(count, generator=own).tolist()
            # A short last batch would weigh its few examples more than the others.
            for start in range(0, max(count - size, 0) + 1, size):
                yield order[start : start + size]

    def largest_eigenvalue(
        self, size: int, transform: Callable[[Tensor], Tensor] = lambda rows: rows
    ) -> float:
        """Above the largest eigenvalue of ``transform`` after (C_B + D) over random batches of so
        many examples, as far as power iteration on a few of them tells."""
        own = torch.Generator().manual_seed(self.seed)
        # Several, since one may be all but perpendicular to the leading eigenvector.
        start = torch.randn(_STARTS, self.size, generator=own).to(self.decay)
        batches = self.random_batches(size, stream=0)
        whole = size >= self.session.num_train
        largest = 0.0
        for _ in range(1 if whole else _PROBES):
            batch, vector = next(batches), start
            for _ in range(_POWER_STEPS):
                vector = vector / vector.norm(dim=1, keepdim=True)
                vector = transform(self.apply_some(vector, batch))
            largest = max(largest, float(vector.norm(dim=1).max()))
        return _MARGIN * largest


def check_limits(**limits: float | None) -> None:
    """Refuse settings that must be positive and are not; None is left to the solver.

    Raises:
        ValueError: names the setting.
    """
    for name, value in limits.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")


def norms(rows: Tensor) -> Tensor:
    """Length of each row, in float64."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return lengths


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products row by row, in float64."""
    return (left.double() * right.double()).sum(1)
