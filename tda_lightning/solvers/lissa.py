"""LiSSA: the Neumann series of the inverse, over random batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tda_lightning.curvature import check_product
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.runtime.processes import rank_and_world
from tda_lightning.runtime.setting_types import require_types
from tda_lightning.solvers.problem import Problem, check_limits, inner, norms


@dataclass
class LiSSA:
    r"""Iterates, from :math:`h_0 = v` and over random batches B,

    .. math::
        h \leftarrow v + h - (C_B + D) h / s

    The answer is :math:`h / s`, averaged over ``repeats`` independent recursions. Damping is added
    to the curvature, as everywhere in this library; the published recursion (1 - damp) h - C h / s
    has the effective damping damp x s instead. Each step contracts if s is above the largest
    eigenvalue of C_B + D. After t steps, (1 - sigma / s)^t of the start is left along an eigenvalue
    sigma of C + D, so the depth must be several times s over the damping.

    Attributes:
        scale: s; null: above the largest eigenvalue of C_B + D in a few batches (power iteration).
        depth: steps of each recursion.
        batch: training examples per step.
        repeats: number of independent recursions.
        curvature: ``gauss_newton`` or ``hessian``.
        tolerance: the relative residual that counts as solved.

    Raises:
        NonFiniteError: while solving, if the recursion diverges; names a scale that would not.

    References:
        | Second-Order Stochastic Optimization for Machine Learning in Linear Time (Agarwal et al.,
          2017), sec. 3
        | Understanding Black-box Predictions via Influence Functions (Koh & Liang, 2017), sec. 3

    Example:
        C + D is diag(3, 3/2), so a score is 3 g / 4 divided by 3 or 3/2.

        >>> from tda_lightning.estimators import InfluenceFunction
        >>> from tda_lightning.examples.least_squares import least_squares_scores
        >>> solver = LiSSA(depth=50, batch=4)
        >>> least_squares_scores(InfluenceFunction(solver=solver, damping=1.0))
        tensor([-0.5000,  0.5000, -0.5000,  0.5000])
    """

    scale: float | None = None
    depth: int = 1000
    batch: int = 32
    repeats: int = 1
    curvature: str = "gauss_newton"
    tolerance: float = 0.1

    preconditioned: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_types(self)
        check_product(self.curvature)
        check_limits(
            scale=self.scale,
            depth=self.depth,
            batch=self.batch,
            repeats=self.repeats,
            tolerance=self.tolerance,
        )

    @property
    def copies(self) -> int:
        """Each recursion holds two."""
        return 4 + 2 * self.repeats

    def solve(self, problem: Problem, vectors: Tensor) -> Tensor:
        """Solve for all rows in the same recursions."""
        if "scale" not in problem.cache:
            problem.cache["scale"] = self.scale or problem.largest_eigenvalue(self.batch)
            problem.record["scale"] = problem.cache["scale"]
        scale = problem.cache["scale"]
        # Recursions are independent: each process takes its share of them.
        rank, world = rank_and_world()
        streams = range(self.repeats)[rank::world]
        batches = [problem.random_batches(self.batch, 1 + n) for n in streams]
        recursions = [vectors for _ in streams]
        counted = problem.products.counted
        for _ in problem.session.loop("LiSSA", range(self.depth)):
            recursions = [
                vectors + h - problem.apply_some(h, next(own)) / scale
                for h, own in zip(recursions, batches, strict=True)
            ]
            self._require_bounded(problem, vectors, recursions, scale)
        reduce = problem.session.reduce
        here = torch.tensor(problem.products.counted - counted, dtype=torch.float64)
        problem.products.counted = counted + float(reduce(here.to(vectors.device)))
        mean: Tensor = reduce(sum(recursions, torch.zeros_like(vectors))) / self.repeats / scale
        return mean

    def _require_bounded(
        self, problem: Problem, vectors: Tensor, recursions: list[Tensor], scale: float
    ) -> None:
        """Where every step contracts, |h| stays below s |v| over the least damping.

        Every process hears of a recursion that does not, wherever it is: they multiply together.
        """
        least = max(float(problem.diagonal.min()), 1e-8 * scale)
        bound = 2 * max(1.0, scale / least) * norms(vectors)
        outside = [h for h in recursions if not bool((norms(h) <= bound).all())]
        rank, world = rank_and_world()
        flags = torch.zeros(world, dtype=vectors.dtype, device=vectors.device)
        flags[rank] = float(bool(outside))
        flags = problem.session.reduce(flags)
        if not bool(flags.any()):
            return
        worst = torch.zeros_like(vectors[:1])
        if rank == int(flags.argmax()):
            lengths = norms(outside[0])
            worst = outside[0][lengths.nan_to_num(torch.inf).argmax()][None]
            if not bool(lengths.isfinite().all()):
                worst = torch.ones_like(worst)
        worst = problem.session.reduce(worst)
        quotient = float(inner(worst, problem.apply(worst)) / inner(worst, worst))
        enough = max(problem.largest_eigenvalue(self.batch), 1.2 * quotient)
        reason = (
            f"LiSSA diverges whatever its scale: curvature plus damping is {quotient:.3g} along "
            "the direction in which it grows. Raise the damping by more than "
            f"{-quotient:.3g}, or use curvature=gauss_newton."
            if quotient < 0
            else f"LiSSA diverges with scale={scale:.4g}: it must be above the largest eigenvalue "
            f"of the curvature of a batch of {self.batch}. scale={enough:.4g} would have "
            "converged; scale=null finds it."
        )
        problem.session.require(False, NonFiniteError(reason))
