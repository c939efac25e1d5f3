"""Preconditioned conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tda_lightning.curvature import check_product
from tda_lightning.solvers.problem import Problem, Work, check_limits, column, inner, norms


@dataclass
class ConjugateGradients:
    r"""Minimises :math:`\frac12 h^\top (C + D) h - v^\top h` over growing Krylov spaces.

    All queries share each walk over the training set and have step sizes of their own; those that
    have arrived drop out. The residual at the end is computed afresh, not the recursion's.

    Attributes:
        preconditioner: ``ekfac``: solve :math:`P^{-1} (C + D) h = P^{-1} v` with P the block-wise
            curvature that the estimator fits (EK-FAC, or its ``curvature``) plus D; null: plain.
        curvature: ``gauss_newton`` or ``hessian`` (which must be positive definite with D).
        tolerance: stop a query at this relative residual.
        iterations: stop at this number of products.

    Raises:
        ValueError: while solving: the curvature is negative along a direction.

    References:
        | Methods of Conjugate Gradients for Solving Linear Systems (Hestenes & Stiefel, 1952)
    """

    preconditioner: str | None = "ekfac"
    curvature: str = "gauss_newton"
    tolerance: float = 1e-4
    iterations: int = 100

    by_layer: ClassVar[bool] = False
    copies: ClassVar[int] = 8

    def __post_init__(self) -> None:
        check_product(self.curvature)
        check_limits(tolerance=self.tolerance, iterations=self.iterations)
        if self.preconditioner not in (None, "ekfac"):
            raise ValueError(
                f"Unknown preconditioner {self.preconditioner!r}: expected 'ekfac' or null (None)."
            )

    @property
    def preconditioned(self) -> bool:
        return self.preconditioner is not None

    def steps(self, problem: Problem) -> int:
        return self.iterations

    def solve(self, problem: Problem, vectors: Tensor) -> Work:
        turn = problem.precondition if self.preconditioned else lambda rows: rows
        lengths = norms(vectors)
        solution = torch.zeros_like(vectors)
        active = (lengths > 0).nonzero().squeeze(1)
        residual = vectors[active]
        direction = turned = turn(residual)
        energy = inner(residual, turned)
        for _ in range(self.iterations):
            if not len(active):
                break
            product = problem.apply(direction)
            curved = inner(direction, product)
            if not problem.context.rehearsal:
                _require_positive(curved, direction)
            step = column(energy / curved, direction)
            solution[active] += step * direction
            residual = residual - step * product
            going = norms(residual) > self.tolerance * lengths[active]
            active, residual = active[going], residual[going]
            turned, before = turn(residual), energy[going]
            energy = inner(residual, turned)
            direction = turned + column(energy / before, turned) * direction[going]
            yield
        return solution


def _require_positive(curved: Tensor, direction: Tensor) -> None:
    quotients = curved / inner(direction, direction)
    if bool((quotients > 0).all()):
        return
    least = float(quotients.min())
    raise ValueError(
        "Conjugate gradients need a positive definite matrix, and curvature plus weight decay plus "
        f"damping is {least:.3g} along a direction that they met. Raise the damping by more than "
        f"{-least:.3g}, or use curvature=gauss_newton."
    )
