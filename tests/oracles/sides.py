"""A rank-limited eigenbasis of a wide side, by dense matrices and loops."""

from __future__ import annotations

import torch
from torch import Tensor


def limited_eigenbasis(matrix: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [width] and orthogonal columns [width, width] of the approximation of a
    positive-semidefinite ``matrix`` by its products with the columns of ``omega`` and its diagonal.

    Nystrom's approximation N = A Omega (Omega^T A Omega)^+ Omega^T A gives leading eigenvectors.
    Those are completed by Householder's reflections, each vector in the place of the axis that
    Gaussian elimination pivots on, and an eigenvalue is the diagonal entry of N + diag(A - N).
    """
    products = matrix @ omega
    approximation = products @ torch.linalg.pinv(omega.T @ products, rtol=1e-12) @ products.T
    values, vectors = torch.linalg.eigh((approximation + approximation.T) / 2)
    found = min(omega.shape[1], int((values > 1e-12 * values.max()).sum()))
    basis = completed_basis(vectors[:, -found:].flip(1))
    rest = (matrix - approximation).diagonal().clamp(min=0)
    values = (basis.T @ (approximation + rest.diag()) @ basis).diagonal()
    return values.clamp(min=0), basis


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
