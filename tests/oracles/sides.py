"""A rank-limited eigenbasis of a wide side, by dense matrices and loops."""

from __future__ import annotations

import torch
from torch import Tensor


def limited_eigenbasis(matrix: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [width] and orthogonal columns [width, width] of the approximation of a
    positive-semidefinite ``matrix`` by its products with the columns of ``omega`` and its diagonal.

    Nystrom's approximation N = A Omega (Omega^T A Omega)^+ Omega^T A gives leading eigenvectors,
    so many of them as predict the products with the last eighth of Omega best, when found from the
    others (0, 1, 2, 4, ... or all of them). Those are completed by Householder's reflections, each vector in the place of the axis that
    Gaussian elimination pivots on, and an eigenvalue is the diagonal entry of N + diag(A - N).
    """
    held = max(1, omega.shape[1] // 8)
    pairs = nystrom(matrix, omega[:, :-held])
    found = len(pairs[0])
    errors = {}
    for count in {0, found, *(2**power for power in range(8) if 2**power < found)}:
        values, basis = with_axes(matrix, pairs[0][:count], pairs[1][:, :count])
        model = basis @ values.diag() @ basis.T
        errors[count] = float(((matrix - model) @ omega[:, -held:]).norm())
    best = min(errors, key=lambda count: errors[count])
    values, vectors = nystrom(matrix, omega)
    count = len(values) if best == found else best
    return with_axes(matrix, values[:count], vectors[:, :count])


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
