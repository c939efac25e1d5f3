"""A rank-limited eigenbasis of a wide side, by dense matrices and loops."""

from __future__ import annotations

import torch
from torch import Tensor


def limited_eigenbasis(matrices: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [groups, width] and orthogonal columns [groups, width, width] of approximations
    of positive-semidefinite ``matrices`` by their products with the columns of ``omega`` and
    their diagonals.

    Nystrom's approximation N = A Omega (Omega^T A Omega)^+ Omega^T A gives leading eigenvectors:
    so many, the same in all groups, as predict the products with the last eighth of Omega best,
    when found from the others (0, 1, 2, 4, ... or all of them). They are completed by
    Householder's reflections, each in the place of the axis that Gaussian elimination pivots on,
    and an eigenvalue is the diagonal entry of N + diag(A - N).
    """
    held = max(1, omega.shape[1] // 8)
    pairs = [nystrom(matrix, omega[:, :-held]) for matrix in matrices]
    found = max(len(values) for values, _ in pairs)
    errors = {}
    for count in {0, found, *(2**power for power in range(8) if 2**power < found)}:
        errors[count] = 0.0
        for matrix, (values, vectors) in zip(matrices, pairs, strict=True):
            own, basis = with_axes(matrix, values[:count], vectors[:, :count])
            model = basis @ own.diag() @ basis.T
            errors[count] += float(((matrix - model) @ omega[:, -held:]).square().sum())
    best = min(errors, key=lambda count: errors[count])
    bases = []
    for matrix in matrices:
        values, vectors = nystrom(matrix, omega)
        count = len(values) if best == found else best
        bases.append(with_axes(matrix, values[:count], vectors[:, :count]))
    return torch.stack([own for own, _ in bases]), torch.stack([basis for _, basis in bases])


def nystrom(matrix: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors of N."""
    products = matrix @ omega
    approximation = products @ torch.linalg.pinv(omega.T @ products, rtol=1e-12) @ products.T
    values, vectors = torch.linalg.eigh((approximation + approximation.T) / 2)
    found = min(omega.shape[1], int((values > 1e-12 * values.max()).sum()))
    return values[-found:].flip(0), vectors[:, -found:].flip(1)


def with_axes(matrix: Tensor, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and basis of the leading eigenpairs and the diagonal that they leave."""
    basis = completed_basis(vectors)
    approximation = vectors @ values.diag() @ vectors.T
    rest = (matrix - approximation).diagonal().clamp(min=0)
    own = (basis.T @ (approximation + rest.diag()) @ basis).diagonal()
    return own.clamp(min=0), basis


def completed_basis(vectors: Tensor) -> Tensor:
    """An orthogonal matrix with ``vectors`` [width, count], up to sign, among its columns."""
    width, count = vectors.shape
    axes: list[int] = []
    left = vectors.clone()
    for k in range(count):  # Gaussian elimination, largest entry of each column as its pivot
        candidates = left[:, k].abs()
        candidates[axes] = -1
        axes.append(int(candidates.argmax()))
        left = left - torch.outer(left[:, k] / left[axes[k], k], left[axes[k]])
    rest = [axis for axis in range(width) if axis not in axes]
    order = torch.tensor([*axes, *rest])
    total = torch.eye(width).to(vectors)
    left = vectors[order]
    for k in range(count):  # Householder's QR
        normal = torch.zeros(width).to(vectors)
        normal[k:] = left[k:, k]
        normal[k] += torch.sign(left[k, k]) * left[k:, k].norm()
        reflection = torch.eye(width).to(vectors) - 2 * torch.outer(normal, normal) / normal.dot(
            normal
        )
        left, total = reflection @ left, total @ reflection
    out = torch.empty(width, width).to(vectors)
    out[order[:, None], order[None, :]] = total
    return out
