"""Orthonormal rows of wide matrices, a few rows by many columns."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

_COLUMNS = 1 << 14  # converted to float64 at a time: they stay near the processor
_DEPENDENT = 1e-5  # share of a row's length that is new in it: below, squares lose too many digits


def orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows with the span of ``rows`` [count, size], in their type, and how long each
    was beyond the span of those before it, float64 [count].

    Cholesky QR, twice (Yamamoto et al. 2015, Roundoff error analysis of the CholeskyQR2 algorithm):
    matrix products in place of reflections, which take several times as long at this shape. Rows
    that are nearly dependent are left to reflections. A mode that watches calls (``tda plan``) sees
    this as one.
    """
    if has_torch_function_unary(rows):
        found: tuple[Tensor, Tensor] = handle_torch_function(orthonormal, (rows,), rows)
        return found
    lengths = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    basis = rows
    for _ in range(2):
        squares = products(basis, basis)
        sizes = squares.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        triangle, failed = torch.linalg.cholesky_ex(squares / sizes[:, None] / sizes)
        if bool(failed) or not bool((triangle.diagonal() > _DEPENDENT).all()):
            reflected, upper = torch.linalg.qr(rows.T.double())
            return reflected.T.to(rows.dtype), upper.diagonal().abs()
        lengths = lengths * triangle.diagonal() * sizes
        inverse = torch.linalg.solve_triangular(triangle, torch.diag(1 / sizes), upper=False)
        basis = turned(inverse, basis)
    return basis, lengths


def products(rows: Tensor, others: Tensor) -> Tensor:
    """Inner products of the rows of two matrices, summed in float64: [rows, others]."""
    total = torch.zeros(len(rows), len(others), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        total.addmm_(rows[:, part].double(), others[:, part].double().T)
    return total


def turned(matrix: Tensor, rows: Tensor) -> Tensor:
    """``matrix`` [any, count], float64, times ``rows`` [count, size], in their type."""
    out = rows.new_empty(len(matrix), rows.shape[1])
    for start in range(0, rows.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        out[:, part] = (matrix @ rows[:, part].double()).to(rows.dtype)
    return out
