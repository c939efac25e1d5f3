"""Every contraction of every factored form against the same on dense gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from tda_lightning.curvature.sides import completed
from tda_lightning.gradients import (
    Basis,
    Dense,
    Gradient,
    Joined,
    Outer,
    Reflections,
    SideForm,
    forms,
    moments,
    scaled,
)
from tda_lightning.gradients.composite import Scaled, Sum
from tda_lightning.gradients.moments import AXES, FULL, random_test_matrix
from tda_lightning.gradients.rows import Rows

BATCH, GROUPS, HEIGHT, WIDTH = 5, 2, 3, 4


def outer(positions: int, groups: int = GROUPS, height: int = HEIGHT, seed: int = 0) -> Outer:
    torch.manual_seed(seed)
    inputs = torch.randn(BATCH, groups, positions, WIDTH).double()
    outputs = torch.randn(BATCH, groups, positions, height).double()
    return Outer(inputs.__getitem__, outputs, WIDTH)


def touched_rows() -> Rows:
    """Example 3 touches nothing; some rows are touched twice by one example."""
    torch.manual_seed(1)
    example, index = torch.tensor([0, 0, 0, 1, 2, 4, 4]), torch.tensor([2, 0, 2, 1, 1, 0, 2])
    return Rows(example, index, torch.randn(7, WIDTH).double(), BATCH, HEIGHT)


def dense(groups: int = GROUPS) -> Dense:
    torch.manual_seed(2)
    return Dense(torch.randn(BATCH, groups, HEIGHT, WIDTH).double())


def scale(groups: int = GROUPS) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.rand(groups, HEIGHT, WIDTH).double() + 0.1


def joined() -> Joined:
    """Blocks of all forms and of different shapes."""
    return Joined([outer(2), touched_rows(), dense(), scaled(outer(1, height=2), None)])


def joined_scale() -> torch.Tensor:
    torch.manual_seed(5)
    return torch.rand(1, 1, joined().shape[3]).double() + 0.1


FORMS = {
    "dense": dense,
    "dense expanded": lambda: Dense(torch.ones(()).double().expand(BATCH, GROUPS, HEIGHT, WIDTH)),
    "outer": lambda: outer(1),
    "outer, two positions": lambda: outer(2),
    "outer, many positions": lambda: outer(9),
    "rows": touched_rows,
    "sum": lambda: Sum([touched_rows(), outer(2, groups=1), dense(1)]),
    "scaled dense": lambda: scaled(dense(), scale()),
    "scaled outer": lambda: scaled(outer(2), scale()),
    "outer scaled evenly": lambda: scaled(outer(2), torch.full((GROUPS, HEIGHT, WIDTH), 0.3)),
    "scaled rows": lambda: scaled(touched_rows(), scale(1)),
    "scaled sum": lambda: scaled(Sum([touched_rows(), dense(1)]), scale(1)),
    "joined": joined,
    "scaled joined": lambda: scaled(joined(), joined_scale()),
    "joined of one": lambda: Joined([touched_rows()]),
    "unscaled": lambda: scaled(outer(1), None),
}
MOMENTS = (FULL, AXES, SideForm("sketch", 1))
SIDES = ["none", "left", "right", "both", "reflections"]


def bases(gradient: Gradient, sides: str) -> tuple[Basis, Basis]:
    torch.manual_seed(4)
    _, groups, height, width = gradient.shape
    left = torch.linalg.qr(torch.randn(groups, height, height).double())[0]
    right = torch.linalg.qr(torch.randn(groups, width, width).double())[0]
    if sides == "reflections":
        return completed(left[..., :2])[0], completed(right[..., :1])[0]
    return (
        left if sides in ("left", "both") else None,
        right if sides in ("right", "both") else None,
    )


def dense_basis(basis: Basis, groups: int, width: int) -> torch.Tensor | None:
    """I - W T W^T."""
    if not isinstance(basis, Reflections):
        return basis
    product = torch.einsum("gik,gkl,gjl->gij", basis.vectors, basis.core, basis.vectors)
    return torch.eye(width).double().expand(groups, -1, -1) - product


def turned(values: torch.Tensor, left, right) -> torch.Tensor:
    """left^T D right by einsum."""
    if left is not None:
        values = torch.einsum("gik,bgij->bgkj", left, values)
    return values if right is None else torch.einsum("bgij,gjk->bgik", values, right)


@pytest.fixture(params=["whole", "one example at a time"])
def chunking(request, monkeypatch) -> None:
    if request.param != "whole":
        monkeypatch.setattr(forms, "CHUNK_SCALARS", 1)
        monkeypatch.setattr(forms, "_MET_TOGETHER", 1)
        monkeypatch.setattr(moments, "_STRIP", 2)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("name", FORMS)
def test_contractions(name) -> None:
    gradient = FORMS[name]()
    values = gradient.dense(slice(None)).clone()
    assert gradient.shape == tuple(values.shape) == (BATCH, *gradient.shape[1:])
    assert gradient.batch == BATCH
    torch.testing.assert_close(gradient.dense(slice(1, 4)), values[1:4])
    torch.testing.assert_close(gradient.mean(), values.mean(0))
    for count in (3, WIDTH + 1):  # fewer and more than an input is wide
        queries = torch.randn(count, *values.shape[1:]).double()
        expected = torch.einsum("qgij,bgij->qb", queries, values)
        torch.testing.assert_close(gradient.dot(queries), expected)
        arranged = gradient.arranged(queries)
        torch.testing.assert_close(arranged, queries, rtol=0, atol=0)
        torch.testing.assert_close(gradient.dot(arranged), expected)
        weight = torch.rand(values.shape[1:]).double()
        products, squares = gradient.dot_and_squares(arranged, weight)
        torch.testing.assert_close(products, expected)
        torch.testing.assert_close(squares, (values.square() * weight).flatten(1).sum(1))
        weights = torch.randn(count, BATCH).double()
        expected = torch.einsum("kb,bgij->kgij", weights, values)
        torch.testing.assert_close(gradient.weighted_sums(weights), expected)
    # Nothing that was asked has changed the gradients.
    torch.testing.assert_close(gradient.dense(slice(None)), values, rtol=0, atol=0)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", FORMS)
def test_squares_and_coordinates(name, sides) -> None:
    gradient = FORMS[name]()
    values = gradient.dense(slice(None)).clone()
    left, right = bases(gradient, sides)
    _, groups, height, width = gradient.shape
    expected = turned(values, dense_basis(left, groups, height), dense_basis(right, groups, width))
    weight = torch.rand(values.shape[1:]).double()
    torch.testing.assert_close(gradient.rotated(slice(2, 5), left, right), expected[2:5])
    torch.testing.assert_close(gradient.sum_of_squares(left, right), expected.square().sum(0))
    for factor, value in ((weight, weight), (None, torch.ones(()).double())):
        torch.testing.assert_close(
            gradient.weighted_squares(left, right, factor),
            (expected.square() * value).flatten(1).sum(1),
        )
    torch.testing.assert_close(gradient.dense(slice(None)), values, rtol=0, atol=0)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("sides", list(itertools.product(MOMENTS, repeat=2)))
@pytest.mark.parametrize("name", FORMS)
def test_covariances(name, sides) -> None:
    """Factored: sums over positions of b b^T and a a^T; else D D^T and D^T D."""
    gradient = FORMS[name]()
    values = gradient.dense(slice(None))
    left, right, count = gradient.covariances(sides)
    if isinstance(gradient, Outer):
        outputs, inputs = gradient.outputs, gradient.inputs(slice(None))
        rows = torch.einsum("bgti,bgtj->gij", outputs, outputs)
        columns = torch.einsum("bgti,bgtj->gij", inputs, inputs)
        total = torch.full((gradient.shape[1],), BATCH * gradient.positions).double()
    elif isinstance(gradient, Rows):
        # A token is a one-hot input: its covariance is diagonal, the number of its uses.
        used = (
            torch.zeros(HEIGHT)
            .double()
            .index_add_(0, gradient.index, torch.ones(len(gradient.index)).double())
        )
        rows, total = torch.diag(used)[None], used.sum()[None]
        columns = (gradient.values.T @ gradient.values)[None]
    else:
        rows = torch.einsum("bgij,bgkj->gik", values, values)
        columns = torch.einsum("bgij,bgik->gjk", values, values)
        total = values.square().sum((0, 2, 3))
    torch.testing.assert_close(count, total)
    for found, expected, form in ((left, rows, sides[0]), (right, columns, sides[1])):
        diagonal = expected.diagonal(dim1=1, dim2=2)
        if form.kind == "axes" or (isinstance(gradient, Rows) and found is left):
            expected = diagonal
        elif form.kind == "sketch":
            omega = random_test_matrix(expected.shape[1], 1)
            expected = torch.cat([expected @ omega, diagonal.unsqueeze(2)], 2)
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("positions", [1, 3])
def test_products_of_gram_matrices(positions) -> None:
    gradient, queries = outer(positions), outer(2, seed=7)
    expected = torch.einsum(
        "qgij,bgij->qb", queries.dense(slice(None)), gradient.dense(slice(None))
    )
    torch.testing.assert_close(gradient.gram(queries), expected)


def test_gram_is_chosen_where_gradients_are_large_beside_their_factors() -> None:
    wide = Outer(torch.zeros(2, 1, 1, 100).__getitem__, torch.zeros(2, 1, 1, 100), 100)
    assert wide.gram_is_cheaper(wide)
    assert not outer(9).gram_is_cheaper(outer(9))


def test_forms_stay_factored_where_the_scale_allows_it() -> None:
    assert isinstance(scaled(outer(2), torch.full((GROUPS, HEIGHT, WIDTH), 0.3)), Outer)
    assert isinstance(scaled(touched_rows(), scale(1)), Rows)
    assert isinstance(scaled(outer(2), scale()), Scaled)
    expected = touched_rows().dense(slice(None)) * scale(1)
    torch.testing.assert_close(scaled(touched_rows(), scale(1)).dense(slice(None)), expected)
    expected = outer(2).dense(slice(None)) * scale()
    torch.testing.assert_close(scaled(outer(2), scale()).dense(slice(None)), expected)


def test_joined_gradients_are_the_blocks_end_to_end() -> None:
    expected = torch.cat([block.dense(slice(1, 4)).flatten(1) for block in joined().blocks], 1)
    torch.testing.assert_close(joined().dense(slice(1, 4)), expected[:, None, None])
    assert joined().cost_per_example > sum(joined().widths)
