"""Arnoldi iteration: the leading eigenvectors of the curvature, which counts as 0 elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tda_lightning.curvature import check_product
from tda_lightning.runtime.setting_types import require_types
from tda_lightning.solvers.problem import Problem, check_limits


@dataclass
class Lanczos:
    r"""Keeps the leading part :math:`V \Lambda V^\top` of C and inverts it plus D (Woodbury):

    .. math::
        (V \Lambda V^\top + D)^{-1} = D^{-1} - D^{-1} V (\Lambda^{-1} + V^\top D^{-1} V)^{-1}
        V^\top D^{-1}

    Lambda and V are the Ritz pairs of largest magnitude in the Krylov space of a random vector,
    with full reorthogonalisation. (C is symmetric, so Arnoldi's iteration is Lanczos's.) The paper
    projects on V and drops the complement; here C counts as 0 there and D stays, so that the answer
    tends to the exact one as the rank grows.

    Attributes:
        rank: number of eigenvectors.
        iterations: number of products; null: twice the rank, but no more than parameters.
        curvature: ``gauss_newton`` or ``hessian``.
        tolerance: the relative residual that counts as solved.

    Raises:
        ValueError: while solving, if damping and weight decay are 0.

    References:
        | Scaling Up Influence Functions (Schioppa et al., 2022), sec. 3
        | https://arxiv.org/abs/2112.03052

    Example:
        C + D is diag(3, 3/2), so a score is 3 g / 4 divided by 3 or 3/2.

        >>> from tda_lightning.estimators import InfluenceFunction
        >>> from tda_lightning.examples.least_squares import least_squares_scores
        >>> solver = Lanczos(rank=2)
        >>> least_squares_scores(InfluenceFunction(solver=solver, damping=1.0))
        tensor([-0.5000,  0.5000, -0.5000,  0.5000])
    """

    rank: int = 50
    iterations: int | None = None
    curvature: str = "gauss_newton"
    tolerance: float = 0.1

    preconditioned: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False
    copies: ClassVar[int] = 5

    def __post_init__(self) -> None:
        require_types(self)
        check_product(self.curvature)
        check_limits(rank=self.rank, iterations=self.iterations, tolerance=self.tolerance)
        if self.iterations is not None and self.iterations < self.rank:
            raise ValueError(
                f"iterations must be at least the rank {self.rank}, got {self.iterations}."
            )

    def solve(self, problem: Problem, vectors: Tensor) -> Tensor:
        """Solve for all rows by the leading part of C."""
        diagonal = problem.diagonal
        if float(diagonal.min()) <= 0:
            raise ValueError("A low rank has no inverse without damping: give a positive damping.")
        if "basis" not in problem.cache:
            problem.cache["basis"] = self._leading(problem)
            problem.record["rank"] = len(problem.cache["basis"][0])
        values, basis = problem.cache["basis"]
        flat = vectors.double() / diagonal
        inside = (basis / diagonal) @ basis.T + (1 / values).diag()
        weights = torch.linalg.solve(inside, basis @ flat.T).T
        solution: Tensor = flat - weights @ basis / diagonal
        return solution.to(vectors)

    def _leading(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Ritz values [rank] and vectors [rank, parameters], in float64."""
        own = torch.Generator().manual_seed(problem.seed)
        vector = torch.randn(problem.size, generator=own, dtype=torch.float64)
        basis = (vector / vector.norm()).to(problem.decay.device)[None]
        products: list[Tensor] = []
        steps = min(self.iterations or 2 * self.rank, problem.size)
        for _ in problem.session.loop("Lanczos", range(steps)):
            product = problem.products.over_training_set(basis[-1:].to(problem.decay)).double()
            products.append(product)
            rest = product
            for _ in range(2):  # once more: rounding
                rest = rest - (rest @ basis.T) @ basis
            if rest.norm() <= 1e-10 * product.norm() or len(basis) == problem.size:
                break  # the space is invariant
            basis = torch.cat([basis, rest / rest.norm()])
        basis = basis[: len(products)]
        inside = torch.cat(products) @ basis.T
        values, turn = torch.linalg.eigh((inside + inside.T) / 2)
        largest = values.abs().argsort(descending=True)[: self.rank]
        largest = largest[values[largest].abs() > 1e-12 * values.abs().max()]
        return values[largest], turn[:, largest].T @ basis
