"""Preconditioned block conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tda_lightning.curvature import check_product
from tda_lightning.runtime.setting_types import require_types
from tda_lightning.session.session import Session
from tda_lightning.solvers.problem import Problem, check_limits, norms

# Times the rounding of one operation: what products over a training set are taken to be off.
_NOISE = 8
# Times the smallest residual so far: rounding has the better of the recursion, and more walks only
# lead away.
_LOST = 1e3


@dataclass
class ConjugateGradients:
    r"""Minimises :math:`\frac12 h^\top (C + D) h - v^\top h` for all queries over the Krylov space
    that they span together.

    Each walk over the training set multiplies one direction per query, and every query steps along
    all of them. So no query needs more walks than by itself, and many together need far fewer: the
    block finds the leading directions of the curvature, which they share. The reported residual is
    computed at the end, not taken from the recursion.

    Attributes:
        preconditioner: null: none. ``ekfac``: solve
            :math:`P^{-1/2} (C + D) P^{-1/2} x = P^{-1/2} v` with P the block-wise curvature that
            the estimator fits (EK-FAC, or its ``curvature``) plus D. If the Gauss-Newton matrix has
            far less rank than there are parameters, P assigns curvature to directions that have
            none, and it takes about twice as many walks (``experiments/solvers``).
        curvature: ``gauss_newton`` or ``hessian`` (which must be positive definite with D).
        tolerance: stop when all queries have this relative residual.
        iterations: the largest number of walks. If they are not enough, or if rounding ends the
            recursion before (float32, with a damping below a millionth of the largest eigenvalue),
            the solution is that of the walk with the smallest residual.

    Raises:
        ValueError: while solving, if the curvature is negative along a direction.

    References:
        | The block conjugate gradient algorithm and related methods (O'Leary, 1980)
        | Retooling the method of block conjugate gradients (Dubrulle, 2001): residuals are kept as
          an orthonormal basis and coordinates in it, which tolerates linearly dependent queries

    Example:
        C + D is diag(3, 3/2), so a score is 3 g / 4 divided by 3 or 3/2.

        >>> from tda_lightning.estimators import InfluenceFunction
        >>> from tda_lightning.examples.least_squares import least_squares_scores
        >>> solver = ConjugateGradients()
        >>> least_squares_scores(InfluenceFunction(solver=solver, damping=1.0))
        tensor([-0.5000,  0.5000, -0.5000,  0.5000])
    """

    preconditioner: str | None = None
    curvature: str = "gauss_newton"
    tolerance: float = 1e-4
    iterations: int = 100

    by_layer: ClassVar[bool] = False
    copies: ClassVar[int] = 9

    def __post_init__(self) -> None:
        require_types(self)
        check_product(self.curvature)
        check_limits(tolerance=self.tolerance, iterations=self.iterations)
        if self.preconditioner not in (None, "ekfac"):
            raise ValueError(
                f"Unknown preconditioner {self.preconditioner!r}: expected 'ekfac' or null (None)."
            )

    @property
    def preconditioned(self) -> bool:
        """Whether EK-FAC preconditions."""
        return self.preconditioner is not None

    def solve(self, problem: Problem, vectors: Tensor) -> Tensor:
        """Solve for all rows together."""
        lengths = norms(vectors)
        asked = (lengths > 0).nonzero().squeeze(1)
        solution = torch.zeros_like(vectors)
        if len(asked):
            bound = self.tolerance * lengths[asked]
            solution[asked] = self._solve(problem, vectors[asked], bound)
        return solution

    def _solve(self, problem: Problem, vectors: Tensor, bound: Tensor) -> Tensor:
        def turned(rows: Tensor, power: float = -0.5) -> Tensor:
            return problem.precondition(rows, power) if self.preconditioned else rows

        # The residual is weights @ basis, in turned coordinates; basis and directions are
        # orthonormal, so that what is inverted has no worse condition than the matrix itself.
        eps = torch.finfo(vectors.dtype).eps
        solution = torch.zeros_like(vectors)
        basis, weights = _orthonormal(turned(vectors))
        directions = basis
        best, nearest, largest = solution, float("inf"), 0.0
        for _ in problem.session.loop("conjugate gradients", range(self.iterations)):
            left = float((norms(turned(weights @ basis, 0.5)) / bound).max())
            if left < nearest:
                best, nearest = solution.clone(), left
            if left <= 1:
                break
            if not left <= _LOST * nearest:
                problem.record["ended_by"] = "rounding"
                break
            products = turned(problem.apply(turned(directions)))
            curved = (directions @ products.T).double()
            values, turn = torch.linalg.eigh((curved + curved.T) / 2)
            largest = max(largest, float(values[-1]))
            _require_positive(problem.session, float(values[0]), _NOISE * eps * largest)
            # Along the others the products say nothing but their rounding.
            kept = values > _NOISE * eps * values[-1]
            inverse = ((turn[:, kept] / values[kept]) @ turn[:, kept].T).to(vectors)
            step = inverse @ (directions @ basis.T)
            solution += weights @ step.T @ directions
            basis, turn = _orthonormal(basis - step.T @ products)
            weights = weights @ turn
            # Without what the matrix makes of the directions before: conjugate to them.
            before = inverse @ (products @ basis.T)
            directions, _ = _orthonormal(basis - before.T @ directions)
        else:
            left = float((norms(turned(weights @ basis, 0.5)) / bound).max())
            best = solution if left < nearest else best
        return turned(best)


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows, and the matrix that makes the given ones of them."""
    factors = torch.linalg.qr(rows.T)
    return factors.Q.T, factors.R.T


def _require_positive(session: Session, least: float, noise: float) -> None:
    session.require(
        least >= -noise,
        ValueError(
            "Conjugate gradients need a positive definite matrix, and curvature plus weight decay "
            f"plus damping is {least:.3g} along a direction that they met. Raise the damping by "
            f"more than {-least:.3g}, or use curvature=gauss_newton."
        ),
    )
