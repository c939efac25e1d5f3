"""ASTRA: Neumann iterations over random batches, preconditioned by EK-FAC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tda_lightning.curvature import check_product
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.runtime.setting_types import require_types
from tda_lightning.solvers.problem import Problem, check_limits, norms


@dataclass
class ASTRA:
    r"""Iterates, over random batches B and with P the EK-FAC curvature plus D,

    .. math::
        h \leftarrow h - \alpha_t P^{-1} ((C_B + D) h - v)

    starting from EK-FAC's own answer :math:`P^{-1} v`, which is the paper's first iterate from 0
    with :math:`\alpha = 1`. Two differences from the paper: power iteration finds the step if none
    is given; and unless a batch is the whole training set, the step falls linearly to 0 over the
    second half of the iterations, because at a constant step the noise of the batches would stay.

    Attributes:
        iterations: number of batches.
        batch: training examples per batch; null: the whole training set, without noise.
        step: alpha; null: 1 over the largest eigenvalue of P^-1 (C_B + D) over a few batches, at
            most 1.
        curvature: ``gauss_newton`` or ``hessian``.
        tolerance: the relative residual that counts as solved.

    Raises:
        NonFiniteError: while solving, if the iteration diverges.

    References:
        | Better Training Data Attribution via Better Inverse Hessian-Vector Products (Wang et al.,
          2025)
        | https://arxiv.org/abs/2507.14740

    Example:
        C + D is diag(3, 3/2), so a score is 3 g / 4 divided by 3 or 3/2.

        >>> from tda_lightning.estimators import InfluenceFunction
        >>> from tda_lightning.examples.least_squares import least_squares_scores
        >>> solver = ASTRA(iterations=5, batch=None)
        >>> least_squares_scores(InfluenceFunction(solver=solver, damping=1.0))
        tensor([-0.5000,  0.5000, -0.5000,  0.5000])
    """

    iterations: int = 200
    batch: int | None = 256
    step: float | None = None
    curvature: str = "gauss_newton"
    tolerance: float = 0.05

    preconditioned: ClassVar[bool] = True
    by_layer: ClassVar[bool] = False
    copies: ClassVar[int] = 6

    def __post_init__(self) -> None:
        require_types(self)
        check_product(self.curvature)
        check_limits(
            iterations=self.iterations, batch=self.batch, step=self.step, tolerance=self.tolerance
        )

    def solve(self, problem: Problem, vectors: Tensor) -> Tensor:
        """Solve for all rows in one iteration."""
        count = problem.session.num_train
        size = min(self.batch or count, count)
        if "step" not in problem.cache:
            problem.cache["step"] = self.step or self._largest_step(problem, size)
            problem.record["step"] = problem.cache["step"]
        batches = problem.random_batches(size, stream=1)
        start = solution = problem.precondition(vectors)
        for number in problem.session.loop("ASTRA", range(self.iterations)):
            rate = problem.cache["step"]
            if size < count:
                rate *= min(1.0, 2 * (1 - number / self.iterations))
            rest = problem.apply_some(solution, next(batches)) - vectors
            solution = solution - rate * problem.precondition(rest)
            self._require_bounded(problem, start, solution, size)
        return solution

    def _largest_step(self, problem: Problem, size: int) -> float:
        return min(1.0, 1 / problem.largest_eigenvalue(size, problem.precondition))

    def _require_bounded(
        self, problem: Problem, start: Tensor, solution: Tensor, size: int
    ) -> None:
        lengths, bound = norms(solution), 1e4 * norms(start)
        if bool((lengths <= bound).all()):
            return
        enough = self._largest_step(problem, size)
        reason = (
            f"ASTRA diverges with step={problem.cache['step']:.4g}. step={enough:.4g} is below 1 "
            "over the largest eigenvalue that power iteration finds; if that diverges too the "
            "curvature is not positive: raise the damping, or use curvature=gauss_newton."
        )
        problem.session.require(False, NonFiniteError(reason))
