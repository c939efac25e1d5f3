"""Eigenbases of a block's sides: dense up to a width, of limited rank beyond.

The second moment A of a wide side (the output side of a head over a vocabulary) is never formed.
It is summed as a sketch A Omega together with its diagonal (``gradients/moments.py``). Nystrom's
approximation takes the leading eigenpairs U, s from the sketch, and what they leave of the
diagonal, d, goes to the axes:

    A ~ U diag(s) U^T + diag(d),    d = max(diag(A) - diag(U diag(s) U^T), 0)

with as many pairs as held-out products say are worth having (:func:`worthwhile`). The basis is a
full orthogonal Q: as many columns as U has are U's, up to sign, each in the place of the axis it
stands for; the others are the remaining axes less what the leading eigenvectors hold of them. What
EK-FAC then loses are only the off-diagonal entries between the latter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tda_lightning.gradients.basis import Basis, Reflections, inverse, matmul_sides
from tda_lightning.gradients.forms import Gradient
from tda_lightning.gradients.moments import FULL, SideForm, random_test_matrix

# The widest side whose moment is kept dense unasked: float64 eigenvectors of this width take
# 128 MiB and 20 seconds of one core, eight times as long for twice the width.
DENSE_SIDE = 4096
# The same for gradients without factors (Adam's h * g): they must be turned one by one, which
# costs the width, and their limit is where that overtakes everything else.
DENSE_SIDE_UNFACTORED = 1024
RANK = 256


def check_dense_side(dense_side: int | None) -> None:
    """Refuse a negative width."""
    if dense_side is not None and dense_side < 0:
        raise ValueError(
            f"dense_side is a width and must not be negative, got {dense_side}. 0 keeps no "
            f"covariance wider than {RANK} dense, None those up to {DENSE_SIDE}."
        )


def limits(dense_side: int | None) -> tuple[int, int, int]:
    """Widest dense side of gradients with and without factors, and the rank of wider ones."""
    if dense_side is None:
        return DENSE_SIDE, DENSE_SIDE_UNFACTORED, RANK
    return dense_side, dense_side, RANK


def side_form(width: int, dense_side: int, rank: int) -> SideForm:
    """How the second moment of a side of ``width`` is summed: dense up to ``dense_side``, a
    sketch of ``rank`` beyond, unless that would be no smaller."""
    return FULL if width <= max(dense_side, rank + 1) else SideForm("sketch", rank)


def side_forms(gradient: Gradient, dense_side: int | None) -> tuple[SideForm, SideForm]:
    """Forms of a block's row and column side, for ``Gradient.covariances``.

    ``dense_side`` None: ``DENSE_SIDE``, or ``DENSE_SIDE_UNFACTORED`` for gradients without
    factors. A one-hot side is summed as its diagonal whatever its form here.
    """
    factored, unfactored, rank = limits(dense_side)
    limit = factored if gradient.factored else unfactored
    _, _, rows, columns = gradient.shape
    return side_form(rows, limit, rank), side_form(columns, limit, rank)


def eigenbasis(moment: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Basis]:
    """Eigenvalues [groups, width] of a summed second moment, and the basis they belong to.

    Args:
        moment: in any of the forms of :class:`SideForm`, which its shape tells.
        scale: c [groups, width], for those of diag(c) A diag(c) instead.

    Returns:
        By float64: eigenvalues, not negative, whose sum is the trace, in the order of the basis'
        columns; the basis: dense eigenvectors, the identity for a diagonal, reflections for a
        sketch.
    """
    if moment.dim() == 2:
        return moment if scale is None else moment * scale.square(), None
    if moment.shape[1] == moment.shape[2]:
        moment = moment.double()
        if scale is not None:
            moment = scale.unsqueeze(2) * moment * scale.unsqueeze(1)
        values, vectors = torch.linalg.eigh(moment)
        return values.clamp(min=0), vectors
    products, diagonal = moment[..., :-1].double(), moment[..., -1].double()
    omega = random_test_matrix(moment.shape[1], moment.shape[2] - 1).to(products)
    values, vectors = leading_eigenpairs(products, omega)
    count = worthwhile(products, omega, diagonal)
    values, vectors = values[:, :count], vectors[:, :, :count]
    if scale is not None:
        diagonal = diagonal * scale.square()
        roots = scale.unsqueeze(2) * vectors * values.sqrt().unsqueeze(1)
        vectors, singular, _ = torch.linalg.svd(roots, full_matrices=False)
        values = singular.square()
    return _with_axes(values, vectors, diagonal)


def trace_of(moment: Tensor) -> Tensor:
    """Trace of a second moment in any form: [groups]."""
    if moment.dim() == 2:
        return moment.sum(-1)
    if moment.shape[1] == moment.shape[2]:
        return moment.diagonal(dim1=1, dim2=2).sum(-1)
    return moment[..., -1].sum(-1)


def _with_axes(values: Tensor, vectors: Tensor, diagonal: Tensor) -> tuple[Tensor, Basis]:
    """diag(Q^T (U diag(s) U^T + diag(d)) Q) and Q, of U, s and the diagonal of A."""
    squares = vectors.square() @ values.unsqueeze(2)
    left = (diagonal - squares.squeeze(2)).clamp(min=0)
    if not values.shape[1]:
        return left, None
    basis, axes = completed(vectors)
    eigenvalues = basis.diagonal(left.unsqueeze(2)).squeeze(2)
    return eigenvalues.scatter_add(1, axes, values).clamp(min=0), basis


def worthwhile(products: Tensor, omega: Tensor, diagonal: Tensor) -> int | None:
    """How many eigenvectors describe the matrix best, beside the axes; None: all there are.

    Nystrom's last eigenvectors are mixtures, and worse than the axes where the matrix is nearly
    diagonal (the output side of a softmax). An eighth of the test vectors is held out: the norm
    of (A - M) Omega over those estimates the Frobenius norm of A - M, for the model M = Q diag Q^T
    that the other test vectors give with 0, 1, 2, 4, ... eigenvectors.
    """
    held = max(1, omega.shape[1] // 8)
    tests, outcomes = omega[:, -held:], products[..., -held:]
    values, vectors = leading_eigenpairs(products[..., :-held], omega[:, :-held])
    found = values.shape[1]
    sizes = [0, *(2**power for power in range(found.bit_length()) if 2**power < found), found]
    errors = []
    for size in sizes:
        eigenvalues, basis = _with_axes(values[:, :size], vectors[:, :, :size], diagonal)
        coordinates = eigenvalues.unsqueeze(2) * matmul_sides(basis, tests, None)
        predicted = matmul_sides(inverse(basis), coordinates, None)
        errors.append(float((outcomes - predicted).square().sum()))
    best = sizes[errors.index(min(errors))]
    return None if best == found else best


def leading_eigenpairs(products: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [groups, found], descending, and eigenvectors [groups, width, found] of Nystrom's
    approximation from products A Omega [groups, width, rank]; fewer than rank where A has fewer.

    Departs from the paper's algorithm 3 in the shift: it grows with the rounding errors of the
    sums, which show in the asymmetry of Omega^T A Omega, and the root of that matrix is taken by
    eigenvalues, so that no error makes it fail.

    References:
        | Fixed-rank approximation of a positive-semidefinite matrix from streaming data (Tropp et
          al., 2017), algorithm 3
        | https://arxiv.org/abs/1706.05736
    """
    width, rank = omega.shape
    # The sketch with orthonormal test vectors instead, which is better conditioned.
    orthonormal, triangle = torch.linalg.qr(omega)
    products = torch.linalg.solve_triangular(triangle, products, upper=True, left=False)
    core = orthonormal.T @ products
    asymmetry = torch.linalg.matrix_norm(core - core.transpose(1, 2)) / math.sqrt(rank)
    rounding = torch.finfo(products.dtype).eps * torch.linalg.matrix_norm(products)
    smallest = torch.finfo(products.dtype).tiny
    shift = (math.sqrt(width) * (asymmetry + rounding)).clamp(min=smallest)[:, None, None]
    core = (core + core.transpose(1, 2)) / 2 + shift * torch.eye(rank).to(core)
    values, vectors = torch.linalg.eigh(core)
    inverse_root = vectors * values.unsqueeze(1).clamp(min=shift).rsqrt()
    left, roots, _ = torch.linalg.svd(
        (products + shift * orthonormal) @ inverse_root, full_matrices=False
    )
    eigenvalues = (roots.square() - shift.squeeze(2)).clamp(min=0)
    found = int((eigenvalues > shift.squeeze(2)).sum(1).max())
    return eigenvalues[:, :found], left[:, :, :found]


def completed(vectors: Tensor) -> tuple[Reflections, Tensor]:
    r"""An orthogonal Q that holds orthonormal ``vectors`` U [groups, width, count] up to sign.

    With E the axes that U's columns are to stand for and signs S,

    .. math::
        Q = I - W T W^\top, \qquad W = U S - E, \qquad T = (I - (E^\top U S)^\top)^{-1}

    is orthogonal and Q E = U S, whatever S and E (a block reflector; insert and see). The axes are
    the pivots of U's LU decomposition: those that U holds most of, so that little of them is
    spread over the rest. The signs keep every pivot of T's inverse above 1.

    References:
        | Reconstructing Householder vectors from tall-skinny QR (Ballard et al., 2015), section 4

    Returns:
        Q, and the axis of each vector, int64 [groups, count].
    """
    groups, _, count = vectors.shape
    axes = torch.tensor([_pivots(group) for group in vectors], device=vectors.device)
    top = vectors.gather(1, axes.unsqueeze(2).expand(-1, -1, count))
    signs = _signs(top)
    held = vectors * signs.unsqueeze(1)
    ones = -torch.ones(groups, 1, count).to(vectors)
    reflections = held.scatter_add(1, axes.unsqueeze(1), ones)
    core = torch.eye(count).to(top) - (top * signs.unsqueeze(1)).transpose(1, 2)
    return Reflections(reflections, torch.linalg.inv(core)), axes


def _pivots(vectors: Tensor) -> list[int]:
    """Rows of [width, count] that LU decomposition with partial pivoting chooses, in order."""
    order = list(range(len(vectors)))
    for row, pivot in enumerate(torch.linalg.lu_factor(vectors).pivots.tolist()):
        order[row], order[pivot - 1] = order[pivot - 1], order[row]
    return order[: vectors.shape[1]]


def _signs(top: Tensor) -> Tensor:
    """S with pivots of ``top`` - S [groups, count, count] of at least 1: [groups, count]."""
    left = top.clone()
    signs = torch.ones_like(top[:, 0])
    for k in range(top.shape[1]):
        signs[:, k] = torch.where(left[:, k, k] > 0, -1.0, 1.0)
        column = left[:, k + 1 :, k] / (left[:, k, k] - signs[:, k]).unsqueeze(1)
        left[:, k + 1 :, k + 1 :] -= column.unsqueeze(2) * left[:, None, k, k + 1 :]
    return signs
