"""DataInf: the mean of inverses in place of the inverse of the mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tda_lightning.curvature import as_matrices
from tda_lightning.gradients import scaled
from tda_lightning.solvers.problem import Problem


@dataclass
class DataInf:
    r"""Layer by layer, from the gradients g_i of the n training examples' losses:

    .. math::
        (C + D)^{-1} v \approx \frac1n \sum_i (g_i g_i^\top + D)^{-1} v
        = \frac1n \sum_i D^{-1} \Bigl(v - g_i \frac{g_i^\top D^{-1} v}{1 + g_i^\top D^{-1} g_i}
        \Bigr)

    which for D = mu is the paper's formula. The paper's mu is 0.1 times the mean of |g_i|^2 / d in
    a layer of d parameters: the default relative damping, with the mean eigenvalue of the empirical
    Fisher matrix. Where examples were used unevenly, the mean is over their uses. There is no
    tolerance. The residual says how far exchanging mean and inverse, and using the empirical Fisher
    matrix, lead away from (C + D) h = v with the Gauss-Newton matrix C.

    References:
        | DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and Diffusion Models
          (Kwon et al., 2024), sec. 3
        | https://arxiv.org/abs/2310.00902

    Example:
        Half of the gradients are (+-2, 0), half are (0, +-1), and D = 1. The mean of the inverses
        is diag((1/5 + 1) / 2, (1/2 + 1) / 2), where the inverse of the mean is diag(1/3, 2/3).

        >>> from tda_lightning.estimators import InfluenceFunction
        >>> from tda_lightning.examples.least_squares import least_squares_scores
        >>> solver = DataInf()
        >>> least_squares_scores(InfluenceFunction(solver=solver, damping=1.0))
        tensor([-0.9000,  0.9000, -0.5625,  0.5625])
    """

    curvature: ClassVar[str] = "gauss_newton"
    tolerance: ClassVar[None] = None
    preconditioned: ClassVar[bool] = False
    by_layer: ClassVar[bool] = True
    copies: ClassVar[int] = 5

    def solve(self, problem: Problem, vectors: Tensor) -> Tensor:
        """Solve for all rows in one walk over the training set."""
        session, blocks = problem.session, problem.session.blocks
        if float(problem.diagonal.min()) <= 0:
            raise ValueError("DataInf divides by the damping: give a positive damping.")
        # In the coordinates D^(1/2), in which D is the identity.
        roots = as_matrices(blocks, problem.diagonal.rsqrt())
        inside = as_matrices(blocks, vectors * problem.diagonal.rsqrt())
        removed = {name: torch.zeros_like(part) for name, part in inside.items()}
        for batch in session.walk("DataInf"):
            counts = None if problem.used is None else batch.weights(problem.used)
            losses = session.data_weights(batch.examples)
            for name, part in inside.items():
                gradient = scaled(batch.gradients[name], roots[name])
                squares = gradient.weighted_squares(None, None, None)
                # A weighted loss has the gradient sqrt(w) g in its curvature.
                squares = squares if losses is None else losses * squares
                weights = gradient.dot(part) / (1 + squares)
                weights = weights if losses is None else weights * losses
                weights = weights if counts is None else weights * counts
                removed[name] += gradient.weighted_sums(weights)
        parts = []
        for name, part in inside.items():
            mean = session.reduce(removed[name]) / session.num_train
            parts.append(((part - mean) * roots[name]).flatten(-3))
        return torch.cat(parts, dim=-1)
