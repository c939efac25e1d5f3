"""The dense matrix, solved directly: for small models, and as the reference for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tda_lightning.curvature import check_product
from tda_lightning.runtime.setting_types import require_types
from tda_lightning.solvers.problem import Problem, check_limits

MAX_DIRECT = 10_000
_COLUMNS = 64  # of the matrix made by one walk over the training set


@dataclass
class Direct:
    """Builds C from products with unit vectors and solves in float64.

    Attributes:
        curvature: ``gauss_newton`` or ``hessian``.
        tolerance: the relative residual that counts as solved.

    Raises:
        ValueError: while solving, for too many parameters or a singular matrix.

    Example:
        C + D is diag(3, 3/2), so a score is 3 g / 4 divided by 3 or 3/2.

        >>> from tda_lightning.estimators import InfluenceFunction
        >>> from tda_lightning.examples.least_squares import least_squares_scores
        >>> solver = Direct()
        >>> least_squares_scores(InfluenceFunction(solver=solver, damping=1.0))
        tensor([-0.5000,  0.5000, -0.5000,  0.5000])
    """

    curvature: str = "gauss_newton"
    tolerance: float = 1e-3

    preconditioned: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False
    copies: ClassVar[int] = 5

    def __post_init__(self) -> None:
        require_types(self)
        check_product(self.curvature)
        check_limits(tolerance=self.tolerance)

    def solve(self, problem: Problem, vectors: Tensor) -> Tensor:
        """Solve for all rows with the dense matrix."""
        if problem.size > MAX_DIRECT:
            raise ValueError(
                f"The direct solver makes a dense matrix of all parameters: {problem.size} x "
                f"{problem.size} numbers are {8 * problem.size**2 / 2**30:.1f} GiB, and the limit "
                f"is {MAX_DIRECT} parameters. Use solver=cg, or restrict the task to some layers."
            )
        if "factor" not in problem.cache:
            rows = []
            starts = range(0, problem.size, _COLUMNS)
            for start in problem.session.loop("rows of the curvature", starts):
                number = min(_COLUMNS, problem.size - start)
                units = vectors.new_zeros(number, problem.size)
                units[range(number), range(start, start + number)] = 1
                rows.append(problem.products.over_training_set(units).double())
            matrix = torch.cat(rows)
            matrix = (matrix + matrix.T) / 2 + problem.diagonal.double().diag()
            values, basis = torch.linalg.eigh(matrix)
            smallest = float(values.abs().min())
            problem.session.require(
                smallest > 1e-14 * float(values.abs().max()),
                ValueError(
                    "Curvature plus weight decay plus damping is singular (its smallest eigenvalue "
                    f"is {smallest:.1g}): the inverse does not exist. Give a positive damping."
                ),
            )
            problem.cache["factor"] = values, basis
            problem.record["negative_eigenvalues"] = int((values < 0).sum())
        values, basis = problem.cache["factor"]
        solution: Tensor = (vectors.double() @ basis / values) @ basis.T
        return solution.to(vectors)
