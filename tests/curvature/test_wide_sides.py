"""Sides too wide for a dense covariance: rank-limited eigenbases, against dense matrices."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tda_lightning.curvature import sides
from tda_lightning.curvature.fit import _pack, _unpack
from tda_lightning.curvature.sides import eigenbasis, side_form, side_forms
from tda_lightning.curvature.spectrum import Spectrum
from tda_lightning.estimators import InfluenceFunction, Source
from tda_lightning.gradients import Outer, Reflections, SideForm, matmul_sides
from tda_lightning.gradients.basis import inverse
from tda_lightning.gradients.composite import Rows
from tda_lightning.gradients.moments import AXES, FULL, random_test_matrix
from tests import oracles
from tests.attributing import attribute, relative
from tests.cases import Case
from tests.cases.case import normal, tokens
from tests.cases.training import OPTIMIZERS, everything, train
from tests.oracles.sides import completed_basis, limited_eigenbasis
from tests.sampled import CASES as BLOCKWISE
from tests.sampled import SEED, layer_places, oracle_curvature, sampled_gradients

WIDTH, RANK, GROUPS = 40, 6, 2
CPU = torch.device("cpu")


def samples(number: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    """[number, groups, 3 positions, width], directions of falling size."""
    torch.manual_seed(seed)
    mixing = torch.randn(width, width).double() * 0.7 ** torch.arange(width)[:, None]
    return torch.randn(number, GROUPS, 3, width).double() @ mixing


def moment(values: Tensor) -> Tensor:
    return torch.einsum("bgti,bgtj->gij", values, values)


def dense(basis: Reflections) -> Tensor:
    """Q, turning the identity."""
    groups, width, _ = basis.vectors.shape
    return basis.turn(torch.eye(width).to(basis.vectors).expand(groups, -1, -1))


def test_basis_is_orthogonal_and_holds_the_leading_eigenvectors() -> None:
    values = samples(50)
    eigenvalues, basis = eigenbasis(SideForm("sketch", RANK).moment(values))
    assert isinstance(basis, Reflections)
    full, matrix = dense(basis), moment(values)
    unit = torch.eye(WIDTH).double().expand(GROUPS, -1, -1)
    torch.testing.assert_close(full.transpose(1, 2) @ full, unit, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        eigenvalues.sum(1), matrix.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-12, atol=0
    )
    expected_values, expected = limited_eigenbasis(matrix, random_test_matrix(WIDTH, RANK))
    torch.testing.assert_close(full, expected)
    torch.testing.assert_close(eigenvalues, expected_values)
    for group in range(GROUPS):
        exact = torch.linalg.eigh(matrix[group])
        found = (full[group].T @ exact.eigenvectors[:, -2:]).abs()
        assert (found.max(0).values > 0.99).all()  # the first two are nearly exact


@pytest.mark.parametrize("count", [1, 7, 39, 40])
def test_completed_basis_is_householders(count) -> None:
    torch.manual_seed(count)
    vectors = torch.linalg.qr(torch.randn(GROUPS, WIDTH, count).double()).Q
    basis, axes = sides.completed(vectors)
    full = dense(basis)
    for group in range(GROUPS):
        torch.testing.assert_close(full[group], completed_basis(vectors[group]))
        held = full[group][:, axes[group]]
        torch.testing.assert_close(held * (held * vectors[group]).sum(0).sign(), vectors[group])
    assert float(torch.linalg.cond(basis.core).max()) < 1e4


def test_basis_of_axes_is_the_axes() -> None:
    """Eigenvectors along axes stand for those axes and leave the others as they are."""
    axes = torch.tensor([7, 0, 30])
    basis, places = sides.completed(torch.eye(WIDTH).double()[None, :, axes])
    assert places.tolist() == [axes.tolist()]
    signs = torch.ones(WIDTH).double().index_fill(0, axes, -1.0)
    torch.testing.assert_close(dense(basis)[0], torch.diag(signs))


def test_nearly_diagonal_matrix_keeps_the_axes() -> None:
    """The output side of a softmax over uneven classes: diag(p) - p p^T, but for the leading."""
    p = torch.softmax(torch.linspace(0, 3, 400).double(), 0)
    matrix = (torch.diag(p) - torch.outer(p, p))[None]
    products = matrix @ random_test_matrix(400, 32)
    sketch = torch.cat([products, matrix.diagonal(dim1=1, dim2=2).unsqueeze(2)], 2)
    eigenvalues, basis = eigenbasis(sketch)
    columns = basis.rank if isinstance(basis, Reflections) else 0
    assert columns < 4
    diagonal = torch.diag(p)[None]
    products = diagonal @ random_test_matrix(400, 32)
    eigenvalues, basis = eigenbasis(torch.cat([products, p[None, :, None]], 2))
    assert basis is None
    torch.testing.assert_close(eigenvalues, p[None])


@pytest.mark.parametrize("rank", [2, 6])
def test_matrix_of_low_rank_is_recovered(rank) -> None:
    """... exactly, with fewer vectors where it has fewer, and nothing left for the axes."""
    values = samples(50) @ torch.randn(WIDTH, rank).double() @ torch.randn(rank, WIDTH).double()
    eigenvalues, basis = eigenbasis(SideForm("sketch", RANK).moment(values))
    assert isinstance(basis, Reflections)
    assert basis.rank == rank
    full = dense(basis)
    matrix = full * eigenvalues.unsqueeze(1) @ full.transpose(1, 2)
    torch.testing.assert_close(matrix, moment(values), rtol=1e-9, atol=1e-9 * float(matrix.max()))


def test_rounding_of_float32_does_not_pass_for_directions() -> None:
    values = samples(50) @ torch.randn(WIDTH, 2).double() @ torch.randn(2, WIDTH).double()
    eigenvalues, basis = eigenbasis(SideForm("sketch", RANK).moment(values.float()).double())
    assert isinstance(basis, Reflections)
    full = dense(basis)
    matrix = full * eigenvalues.unsqueeze(1) @ full.transpose(1, 2)
    assert relative(matrix, moment(values)) < 1e-4


def test_no_samples_leave_the_axes() -> None:
    eigenvalues, basis = eigenbasis(torch.zeros(GROUPS, WIDTH, RANK + 1).double())
    assert basis is None
    assert not eigenvalues.any()


@pytest.mark.parametrize("form", [FULL, AXES, SideForm("sketch", RANK)])
def test_moments_add_up(form) -> None:
    first, second = samples(5), samples(4, seed=1)
    whole = form.moment(torch.cat([first, second]))
    torch.testing.assert_close(form.moment(first) + form.moment(second), whole)
    trace = moment(torch.cat([first, second])).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(form.trace(whole), trace)
    # Memory runs along the positions: gradients without factors come so.
    strided = first.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(form.moment(strided), form.moment(first))


def test_which_form_a_side_has() -> None:
    assert side_form(4096, dense_side=4096, rank=256) == FULL
    assert side_form(4097, dense_side=4096, rank=256) == SideForm("sketch", 256)
    assert side_form(9, dense_side=0, rank=8) == FULL  # the sketch would be as large
    wide = Outer(torch.zeros(1, 1, 1, 5000).__getitem__, torch.zeros(1, 1, 1, 3), 5000)
    assert side_forms(wide, None) == (FULL, SideForm("sketch", sides.RANK))
    assert side_forms(wide, 5000) == (FULL, FULL)
    index = torch.tensor([0, 4999])
    tokens_used = Rows(torch.tensor([0, 0]), index, torch.ones(2, 3), 1, 5000)
    left, _, _ = tokens_used.covariances(side_forms(tokens_used, None))
    assert left.shape == (1, 5000)  # one-hot: its diagonal is all there is
    assert eigenbasis(left)[1] is None
    with pytest.raises(ValueError, match="dense_side is a width and must not be negative, got -1"):
        Source(dense_side=-1)
    with pytest.raises(ValueError, match="dense_side is a width"):
        InfluenceFunction(dense_side=-1)


@pytest.mark.parametrize("columns", [1, 30])
def test_spectrum_in_reflections_is_that_of_the_dense_basis(columns) -> None:
    _, left = eigenbasis(SideForm("sketch", RANK).moment(samples(50)))
    _, right = eigenbasis(SideForm("sketch", 3).moment(samples(50, width=columns + 20)))
    assert isinstance(left, Reflections)
    assert isinstance(right, Reflections)
    torch.manual_seed(3)
    eigenvalues, matrix, diagonal = torch.rand(3, GROUPS, WIDTH, columns + 20).double()
    found = Spectrum(left, right, eigenvalues)
    expected = Spectrum(dense(left), dense(right), eigenvalues)
    torch.testing.assert_close(found.project(matrix), expected.project(matrix))
    torch.testing.assert_close(found.lift(matrix), expected.lift(matrix))
    torch.testing.assert_close(found.lift(found.project(matrix)), matrix)
    queries = matrix.expand(4, -1, -1, -1)
    torch.testing.assert_close(found.project(queries), expected.project(queries))
    uniform_rows = diagonal[:, :1].expand_as(diagonal)
    for weights in (diagonal, uniform_rows, torch.ones_like(diagonal)):
        torch.testing.assert_close(
            found.project_diagonal(weights), expected.project_diagonal(weights)
        )
        torch.testing.assert_close(
            found.shifted(weights).eigenvalues, expected.shifted(weights).eigenvalues
        )
    torch.testing.assert_close(matmul_sides(inverse(left), matrix, None), dense(left) @ matrix)
    kept = _unpack(_pack({"a.b": found, "c": Spectrum(None, dense(right), eigenvalues)}))
    torch.testing.assert_close(kept["a.b"].project(matrix), expected.project(matrix))
    assert kept["c"].left is None
    rounded = kept["a.b"].to(CPU, torch.float32)
    torch.testing.assert_close(rounded.project(matrix.float()), expected.project(matrix).float())


def test_diagonal_by_either_way_of_counting() -> None:
    """One column goes by small matrices, many by chunks of rows."""
    _, basis = eigenbasis(SideForm("sketch", 2).moment(samples(50)))
    assert isinstance(basis, Reflections)
    columns = torch.rand(GROUPS, WIDTH, 50).double()
    expected = dense(basis).square().transpose(1, 2) @ columns
    assert WIDTH * 2 <= 2 * 50 * 2**2  # else the test tests nothing
    torch.testing.assert_close(basis.diagonal(columns), expected)
    torch.testing.assert_close(basis.diagonal(columns[..., :1]), expected[..., :1])


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7, bias=False))


WIDE = Case("wide", wide, normal(6), "classification")
CASES = {**BLOCKWISE, "wide": WIDE}


def limit(monkeypatch, rank: int):
    """Sketches of ``rank`` wherever they are smaller; the oracle's basis of a side."""
    monkeypatch.setattr(sides, "RANK", rank)

    def basis(matrix: Tensor) -> tuple[Tensor, Tensor]:
        if matrix.shape[1] <= rank + 1:
            return torch.linalg.eigh(matrix)
        return limited_eigenbasis(matrix, random_test_matrix(matrix.shape[1], rank))

    return basis


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
@pytest.mark.parametrize("name", CASES)
def test_scores_with_limited_rank(name, kind, monkeypatch) -> None:
    """Grouped convolutions and norms among the layers."""
    basis = limit(monkeypatch, 2)
    case = CASES[name]
    run, module, data = train(case, OPTIMIZERS["decay"], checkpoints=(2, 5))
    segments, _, gradients, query = everything(case, run, module, data, [2])
    work = (case, run, module, data)
    matrices = [oracle_curvature(*work, s.checkpoints, kind, basis=basis) for s in segments]
    expected = oracles.source_average(run, segments, matrices, gradients, query)
    options = {"curvature": kind, "seed": SEED}
    source = partial(Source, segment_steps=[2], leading_directions=0, **options)
    scores = attribute(*work, source(dense_side=0))
    assert relative(scores.by_segment, expected) < 1e-5
    unlimited = attribute(*work, source())
    assert relative(unlimited.by_segment, expected) > 1e-4  # and not the cached fit
    last = run.last_step
    matrix = oracle_curvature(*work, [last], kind, basis=basis)
    damping = torch.zeros(len(matrix), dtype=torch.float64)
    for place in layer_places(run).values():
        damping[place] = 0.1 * matrix.diagonal()[place].mean()
    expected = oracles.influence(matrix, 0.05, damping, gradients[last], query)
    scores = attribute(*work, InfluenceFunction(dense_side=0, **options))
    assert relative(scores.values, expected) < 1e-5


@pytest.mark.parametrize("name", ["wide", "convolutions"])
def test_scores_with_limited_rank_of_preconditioned_gradients(name, monkeypatch) -> None:
    basis = limit(monkeypatch, 2)
    case = CASES[name]
    run, module, data = train(case, OPTIMIZERS["adamw"], checkpoints=(2, 5))
    segments, _, gradients, query = everything(case, run, module, data, [2])
    matrices = []
    for segment in segments:
        states = [run.checkpoints[step] for step in segment.checkpoints]
        scale = oracles.preconditioner(run, states).sqrt()
        matrix = oracle_curvature(
            case, run, module, data, segment.checkpoints, "ekfac", scale, basis
        )
        matrices.append(matrix / torch.outer(scale, scale))
    expected = oracles.source_average(run, segments, matrices, gradients, query)
    estimator = Source(segment_steps=[2], seed=SEED, dense_side=0, leading_directions=0)
    scores = attribute(case, run, module, data, estimator)
    assert relative(scores.by_segment, expected) < 1e-5


class TiedHead(nn.Module):
    """An embedding whose weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.embedding(inputs)).mean(1) @ self.embedding.weight.T


TIED = Case("tied", TiedHead, tokens(9, 4), "classification")


def test_tied_embedding_and_head(monkeypatch) -> None:
    basis = limit(monkeypatch, 2)
    run, module, data = train(TIED, OPTIMIZERS["decay"])
    _, _, gradients, query = everything(TIED, run, module, data, 1)
    last = run.last_step
    each = sampled_gradients(TIED, run, module, data, [last]).view(-1, 9, 5)
    _, left = basis(torch.einsum("nij,nkj->ik", each, each)[None])
    _, right = basis(torch.einsum("nij,nik->jk", each, each)[None])
    left, right = left[0], right[0]
    values = (left.T @ each @ right).square().mean(0).flatten()
    vectors = torch.kron(left, right)
    matrix = vectors * values @ vectors.T
    damping = 0.1 * values.mean() * torch.ones(len(matrix)).double()
    expected = oracles.influence(matrix, 0.05, damping, gradients[last], query)
    scores = attribute(TIED, run, module, data, InfluenceFunction(dense_side=0, seed=SEED))
    assert relative(scores.values, expected) < 1e-5


def broad() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 18))


BROAD = Case("broad", broad, normal(24), "classification")


@pytest.mark.parametrize("optimizer", ["decay", "adamw"])
@pytest.mark.parametrize("estimator", [InfluenceFunction, Source], ids=["influence", "source"])
def test_scores_approach_those_of_dense_sides(estimator, optimizer, monkeypatch) -> None:
    run, module, data = train(BROAD, OPTIMIZERS[optimizer], checkpoints=(3, 6))
    work = (BROAD, run, module, data)
    options = {"leading_directions": 0} if estimator is Source else {}
    exact = attribute(*work, estimator(seed=SEED, **options)).values
    errors = []
    for rank in (2, 5, 16):
        limit(monkeypatch, rank)
        found = attribute(*work, estimator(seed=SEED, dense_side=0, **options)).values
        errors.append(relative(found, exact))
    print(estimator.__name__, optimizer, errors)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                held = leaf.untyped_storage().nbytes() // max(1, leaf.element_size())
                self.numel = max(self.numel, held)
        return out


VOCABULARY = 20_000
HEAD = Case("head", lambda: nn.Linear(3, VOCABULARY), normal(3), "classification")
INPUTS = Case("inputs", lambda: nn.Linear(VOCABULARY, 2), normal(VOCABULARY))


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
@pytest.mark.parametrize("case", [HEAD, INPUTS], ids=lambda case: case.name)
def test_no_matrix_of_a_vocabularys_width(case, kind, monkeypatch) -> None:
    monkeypatch.setattr(sides, "RANK", 32)
    run, module, data = train(case, OPTIMIZERS["sgd"])
    with Largest() as seen:
        scores = attribute(case, run, module, data, InfluenceFunction(kind))
    assert scores.values.isfinite().all()
    (fitted,) = run.curvature.values()
    width = VOCABULARY if case is HEAD else VOCABULARY + 1  # the bias's input
    assert (1, width, 10) in [tuple(tensor.shape) for tensor in fitted.values()]  # ten examples
    assert 32 * VOCABULARY <= seen.numel <= 64 * VOCABULARY
