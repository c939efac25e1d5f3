"""Leading eigenvectors of a sample's curvature by subspace iteration, which needs its gradients one
batch at a time.

With products F v = mean_n g_n (g_n . v): Halko, Martinsson & Tropp 2011 (0909.4061), section 4.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tda_lightning.curvature.orthonormal import orthonormal, turned
from tda_lightning.curvature.sampled import Sample

# Rounds before the one that takes the eigenvalues: Gauss-Newton spectra fall fast, and the
# directions of one segment are a good start for the next.
_ROUNDS, _ROUNDS_FROM_START = 2, 1


def power_iteration(
    count: int, fitted: Sample, tested: Sample | None, title: str, start: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """V and S of ``count`` directions that are fitted to one sample, with the eigenvalues in
    another, and the sum of eigenvalues in the first.

    Args:
        tested: None: the same sample.
        start: orthonormal rows [count, parameters] to begin with; None: random ones.
    """
    session = fitted.session
    if start is None:
        generator = torch.Generator().manual_seed(fitted.seed)
        begin = torch.randn(session.num_parameters, count, generator=generator)
        vectors = orthonormal(begin.T)[0].to(session.device, session.dtype)
    else:
        vectors = start
    fits = 0.0
    for number in range(1, (_ROUNDS if start is None else _ROUNDS_FROM_START) + 1):
        carried = torch.zeros_like(vectors)
        for drawn in fitted.walk(f"{title}, round {number}"):
            inner = drawn.joined.dot(vectors[:, None, None]) * drawn.roots.square()
            carried += drawn.joined.weighted_sums(inner).flatten(1)
        vectors, lengths = orthonormal(session.reduce(carried))
        fits = float(lengths.sum())
    # Rayleigh-Ritz: the best eigenvectors within the subspace.
    squares = torch.zeros(count, count, dtype=torch.float64, device=session.device)
    for drawn in (fitted if tested is None else tested).walk(f"{title}, eigenvalues"):
        inside = (drawn.joined.dot(vectors[:, None, None]) * drawn.roots).double()
        squares.addmm_(inside, inside.T)
    values, turn = torch.linalg.eigh(session.reduce(squares))
    return turned(turn.flip(1).T, vectors), values.flip(0), fits
