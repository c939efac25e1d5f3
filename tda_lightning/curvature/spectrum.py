"""Curvature of one unit (a block, or all parameters) in an eigenbasis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.gradients import Basis, Gradient, matmul_sides
from tda_lightning.gradients.basis import between, diagonal_in, inverse, placed, turned


@dataclass(frozen=True)
class Spectrum:
    """A symmetric matrix on [groups, rows, columns]-shaped gradients, diagonal in the basis
    left (x) right.

    Attributes:
        left: eigenvectors of the row side as columns, [groups, rows, rows] or reflections; None:
            the identity.
        right: likewise of the column side, [groups, columns, columns].
        eigenvalues: [groups, rows, columns], not negative.
    """

    left: Basis
    right: Basis
    eigenvalues: Tensor

    def project(self, matrix: Tensor) -> Tensor:
        """Coordinates of [..., groups, rows, columns] in the basis."""
        return matmul_sides(self.left, matrix, self.right)

    def lift(self, coordinates: Tensor) -> Tensor:
        """From coordinates back to the parameters."""
        return matmul_sides(inverse(self.left), coordinates, inverse(self.right))

    def project_from(self, other: Spectrum, coordinates: Tensor) -> Tensor:
        """Coordinates in this basis of those in the basis of another spectrum of the same unit."""
        rows, columns = coordinates.shape[-2:]
        count = coordinates[..., 0, 0].numel() // len(self.eigenvalues)
        for left in between(other.left, self.left, count * columns):
            coordinates = matmul_sides(left, coordinates, None)
        for right in between(other.right, self.right, count * rows):
            coordinates = turned(coordinates, right)
        return coordinates

    def coordinates(self, gradient: Gradient, rows: slice) -> Tensor:
        """Coordinates of some examples' gradients, by way of their factors."""
        return gradient.rotated(rows, self.left, self.right)

    def project_diagonal(self, diagonal: Tensor) -> Tensor:
        """Diagonal, in the basis, of a matrix that is diagonal in the parameters."""
        return diagonal_in(self.left, diagonal, self.right)

    def shifted(self, diagonal: Tensor) -> Spectrum:
        """The spectrum with ``diagonal`` [groups, rows, columns] (weight decay) added.

        Exact for a uniform diagonal and for a unit that is one dense matrix; otherwise the
        diagonal is kept up to its own projection on the basis.
        """
        uniform = bool((diagonal == diagonal.flatten()[0]).all())
        dense = self.left is None and diagonal.shape[:2] == (1, 1)
        if dense and not uniform and isinstance(self.right, Tensor):
            vectors = self.right.double()[0]
            matrix = vectors * self.eigenvalues.double()[0] @ vectors.T
            values, vectors = torch.linalg.eigh(matrix + diagonal.double().flatten().diag())
            own = self.eigenvalues
            return Spectrum(None, vectors[None].to(own), values.to(own)[None, None])
        return Spectrum(self.left, self.right, self.eigenvalues + self.project_diagonal(diagonal))

    def restricted(self, rows: Tensor) -> Spectrum:
        """Of some rows alone, where no eigenvector mixes rows."""
        assert self.left is None
        return Spectrum(None, self.right, self.eigenvalues[:, rows])

    def to(self, device: torch.device, dtype: torch.dtype) -> Spectrum:
        """The same spectrum on a device, in a precision."""
        left, right = (placed(basis, device, dtype) for basis in (self.left, self.right))
        return Spectrum(left, right, self.eigenvalues.to(device, dtype))
