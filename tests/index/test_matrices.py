"""Matrices as products of thin factors: the same as the dense ones, through sums and stacks; and
second moments from factors."""

import pytest
import torch

from tda_lightning.gradients import Dense, Outer, Rows
from tda_lightning.index.matrices import Matrices
from tda_lightning.index.samples import _Sums
from tests.attributing import relative

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def outer(positions, batch=5, groups=2, rows=12, columns=9):
    inputs = normal(batch, groups, positions, columns)
    return Outer(lambda part: inputs[part], normal(batch, groups, positions, rows), columns)


def looked_up(batch=5, height=12, columns=9):
    """Of which one example has looked up nothing, and another a row twice."""
    example, index = torch.tensor([0, 0, 0, 2, 3, 3, 4]), torch.tensor([3, 7, 3, 1, 0, 11, 5])
    return Rows(example, index, normal(7, columns), batch, height)


FORMS = {
    "one position": lambda: outer(1),
    "few positions": lambda: outer(3),
    "many positions": lambda: outer(40),
    "dense": lambda: Dense(normal(5, 2, 12, 9)),
    "rows": looked_up,
}


@pytest.mark.parametrize("form", FORMS)
def test_they_are_the_dense_ones(form):
    gradients = [FORMS[form]() for _ in range(3)]
    groups = gradients[0].shape[1]
    weights = torch.rand(5, 1, generator=GENERATOR, dtype=torch.float64)
    sides = [(normal(groups, 12, count), normal(groups, 9, 8)) for count in (11, 6)]
    parts, expected = [], []
    for left, right in sides:
        first, second, third = (Matrices.of(own, left, right) for own in gradients)
        parts.append((first + second + third) * weights)
        dense = sum(own.dense(slice(None)) for own in gradients)
        expected.append(left.mT @ dense @ right * weights[..., None, None])
    stacked = Matrices.stacked(parts)
    assert stacked.shape == (5, groups, 17, 8)
    assert relative(stacked.dense(), torch.cat(expected, dim=2)) < 1e-14
    whole = Matrices.of(gradients[0], None, None)
    assert relative(whole.dense(), gradients[0].dense(slice(None))) < 1e-14


@pytest.mark.parametrize("form", FORMS)
def test_the_leading_pairs_are_the_best_of_their_rank(form):
    gradient = FORMS[form]()
    groups = gradient.shape[1]
    found = Matrices.of(gradient, normal(groups, 12, 11), normal(groups, 9, 9))
    for rank in (1, 3, 9):
        u, v = found.leading(rank)
        assert u.shape[3] == v.shape[3] == rank
        assert relative(u.norm(dim=2), v.norm(dim=2)) < 1e-12
        left, values, right = torch.linalg.svd(found.dense(), full_matrices=False)
        best = left[..., :rank] * values[..., None, :rank] @ right[..., :rank, :]
        lost, least = ((found.dense() - own).norm() for own in (u @ v.mT, best))
        assert lost <= 1.05 * least + 1e-12 * found.dense().norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sketched", [False, True])
def test_moments_are_those_of_the_dense_ones(form, sketched):
    gradient = FORMS[form]()
    groups = gradient.shape[1]
    right = normal(groups, 9, 7) if sketched else None
    sums, expected = (_Sums({"a": (None, None)}) for _ in range(2))
    sums.add_gradient("a", gradient, None, right)
    expected.add("a", gradient.rotated(slice(None), None, right))
    for found, other in zip(sums.means("a"), expected.means("a"), strict=True):
        assert relative(found, other) < 1e-13
