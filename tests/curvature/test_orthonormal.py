"""Orthonormal rows by products, compared with reflections."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tda_lightning.curvature.orthonormal import orthonormal, products, turned

GENERATOR = torch.Generator().manual_seed(0)


def wide(scales: Tensor) -> Tensor:
    """Rows whose own directions have these lengths, over several chunks of columns."""
    basis = torch.linalg.qr(torch.randn(40_000, len(scales), generator=GENERATOR).double()).Q
    mixed = torch.linalg.qr(torch.randn(len(scales), len(scales), generator=GENERATOR).double()).Q
    return (mixed * scales) @ basis.T


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-7, 1e-13])
def test_the_rows_are_those_of_reflections(smallest: float) -> None:
    """Down to 1e-3 by products; further, where squares lose digits, by reflections."""
    rows = wide(torch.logspace(0, torch.log10(torch.tensor(smallest)), 6).double())
    found, lengths = orthonormal(rows)
    torch.testing.assert_close(found @ found.T, torch.eye(6).double(), rtol=0, atol=1e-12)
    basis, upper = torch.linalg.qr(rows.T)
    torch.testing.assert_close(lengths, upper.diagonal().abs(), rtol=1e-6, atol=1e-15)
    signs = (found * basis.T).sum(1)
    settled = 1e-14 / smallest  # how well reflections know the last direction
    torch.testing.assert_close(found * signs[:, None], basis.T, rtol=0, atol=max(1e-12, settled))


def test_rows_that_are_zero_or_alike_are_left_to_reflections() -> None:
    rows = wide(torch.ones(4).double())
    rows[2], rows[3] = rows[1], 0
    found, lengths = orthonormal(rows)
    torch.testing.assert_close(found @ found.T, torch.eye(4).double(), rtol=0, atol=1e-12)
    assert float(lengths[2]) < 1e-12 and float(lengths[3]) < 1e-12


def test_single_precision() -> None:
    rows = wide(torch.tensor([3.0, 1.0, 0.01]).double()).float()
    found, _ = orthonormal(rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found @ found.T, torch.eye(3), rtol=0, atol=1e-5)


def test_products_and_turns() -> None:
    rows, others = wide(torch.ones(3).double()), wide(torch.ones(2).double())
    torch.testing.assert_close(products(rows, others), rows @ others.T, rtol=1e-12, atol=1e-12)
    matrix = torch.randn(2, 3, generator=GENERATOR).double()
    torch.testing.assert_close(turned(matrix, rows), matrix @ rows, rtol=1e-12, atol=1e-12)
