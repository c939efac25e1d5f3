"""Every solver against the dense solve, and what it says of itself."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from tda_lightning.curvature import as_matrices, fit_curvature
from tda_lightning.estimators import InfluenceFunction
from tda_lightning.optimizers import applied_rates
from tda_lightning.records.errors import NonFiniteError, UnsupportedTrainingError
from tda_lightning.solvers import (
    ASTRA,
    ConjugateGradients,
    DataInf,
    Direct,
    Lanczos,
    LiSSA,
    Problem,
    norms,
)
from tests import oracles
from tests.attributing import CaseTask, attribute, relative
from tests.cases import CASES
from tests.cases.training import CLASSIFIER, OPTIMIZERS, queries_of, train
from tests.quick import quick
from tests.solving import case_context, in_rows

NAMES = ("mlp/classification", "conv/network", "transformer/language_model")
EXAMPLES = 6


class DenseProducts:
    """Products by dense matrices, one for each example, as :class:`Products` has them."""

    way = "dense"

    def __init__(self, matrices: Tensor) -> None:
        self.matrices, self.counted = matrices, 0.0

    def over_training_set(self, vectors: Tensor) -> Tensor:
        return self.over(vectors, list(range(len(self.matrices))))

    def over(self, vectors: Tensor, examples: list[int]) -> Tensor:
        self.counted += len(vectors) * len(examples) / len(self.matrices)
        return vectors @ self.matrices[examples].mean(0)


@functools.cache
def parts_of(name: str) -> tuple[Any, Any, Any, Tensor]:
    """Context, data, EK-FAC and the Gauss-Newton matrix of each example of a case."""
    case = next(case for case in CASES if case.name == name)
    context, data = case_context(case, EXAMPLES)
    context.trajectory = types.SimpleNamespace(curvature={}, data_weights=None)  # type: ignore[assignment]
    context.loaded.trajectory, context.loaded.step = context.trajectory, 0
    spectra = fit_curvature("ekfac", context, [0])
    names = context.engine.names
    matrices = [
        in_rows(
            context,
            oracles.gauss_newton(context.module, case.criterion, oracles.take(data, [n]), names),
        )
        for n in range(EXAMPLES)
    ]
    return context, data, spectra, torch.stack(matrices)


def problem_of(name: str = NAMES[0], damping: float = 0.05) -> tuple[Problem, Tensor, Tensor]:
    """A problem with the decay of two parameter groups, its dense matrix, and three queries."""
    context, _, spectra, matrices = parts_of(name)
    size = matrices.shape[-1]
    own = torch.Generator().manual_seed(3)
    decay = 0.02 * torch.randint(2, (size,), generator=own).double()
    products: Any = DenseProducts(matrices)
    problem = Problem(context, products, decay, torch.full_like(decay, damping), spectra)
    vectors = torch.randn(3, size, generator=own, dtype=torch.float64)
    return problem, matrices.mean(0) + problem.diagonal.diag(), vectors


def solved(solver: Any, problem: Problem, vectors: Tensor) -> Tensor:
    return solver.solve(problem, vectors)


EXACT = {
    "direct": (Direct(), 1e-10),
    "cg": (ConjugateGradients(None, tolerance=1e-10, iterations=1000), 1e-8),
    "cg with ekfac": (ConjugateGradients("ekfac", tolerance=1e-10, iterations=1000), 1e-8),
    "lanczos": (Lanczos(rank=10_000), 1e-7),
    "lissa": (LiSSA(depth=3000, batch=EXAMPLES), 1e-6),
    "astra": (ASTRA(iterations=5000, batch=None), 1e-6),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", EXACT)
def test_solvers_find_the_dense_solution(kind: str, name: str) -> None:
    solver, bound = EXACT[kind]
    problem, matrix, vectors = problem_of(name)
    if kind in ("lissa", "astra"):
        # What these two have left after t steps is (1 - damping / scale)^t of the start.
        largest = float(torch.linalg.eigvalsh(matrix).max())
        problem, matrix, vectors = problem_of(name, damping=0.01 * largest)
    expected = torch.linalg.solve(matrix, vectors.T).T
    assert relative(solved(solver, problem, vectors), expected) < bound


# The same two that have not come as far: they repeat themselves all the same.
SHORT = {
    **{kind: solver for kind, (solver, _) in EXACT.items()},
    "lissa": LiSSA(depth=200, batch=EXAMPLES, tolerance=10.0),
    "astra": ASTRA(iterations=200, batch=None),
}


@pytest.mark.parametrize("kind", SHORT)
def test_again_and_for_other_queries_the_answers_are_the_same(kind: str) -> None:
    """Nothing that is kept from one round of queries to the next changes (damping, above all)."""
    solver = SHORT[kind]
    problem, _, vectors = problem_of()
    first = solved(solver, problem, vectors)
    torch.testing.assert_close(solved(solver, problem, vectors), first)
    torch.testing.assert_close(
        solved(solver, problem, vectors[1:]), first[1:], rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("preconditioner", [None, "ekfac"])
@pytest.mark.parametrize("name", NAMES)
def test_queries_that_share_a_krylov_space_need_fewer_walks(
    name: str, preconditioner: str | None
) -> None:
    """None takes more than alone, and twelve together at most half of what the slowest takes."""
    problem, matrix, _ = problem_of(name, damping=0.001)
    own = torch.Generator().manual_seed(8)
    vectors = torch.randn(12, problem.size, generator=own, dtype=torch.float64)
    solver = ConjugateGradients(preconditioner, tolerance=1e-6, iterations=1000)

    def walks(rows: Tensor) -> float:
        before = problem.products.counted
        found = solved(solver, problem, rows)
        assert bool((norms(rows - found @ matrix) <= 1.01e-6 * norms(rows)).all())
        return (problem.products.counted - before) / len(rows)

    alone = [walks(vectors[n : n + 1]) for n in range(3)]
    assert walks(vectors[:3]) <= max(alone)
    assert walks(vectors) <= max(alone) / 2


@pytest.mark.parametrize("count", [1, 10, 60, 200])
def test_rounding_ends_conjugate_gradients_without_harm(count: int) -> None:
    """float32, a rank of 40 of 300, a damping down to what float32 cannot tell from nothing: never
    farther from the solution than where it began, and close to it where float32 allows that."""
    own = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(300, 300, generator=own, dtype=torch.float64)).Q
    values = torch.zeros(300, dtype=torch.float64)
    values[:40] = torch.logspace(1, -3, 40, dtype=torch.float64)
    curvature = turn * values @ turn.T
    vectors = torch.randn(count, 300, generator=own)
    session: Any = types.SimpleNamespace(loop=lambda _, items: items, require=lambda *_: None)
    products: Any = DenseProducts(curvature[None].float())
    for damping, bound in ((1e-3, 1e-3), (1e-4, 0.01), (1e-7, 1.01)):
        diagonal = torch.full((300,), damping)
        problem = Problem(session, products, torch.zeros(300), diagonal, {})
        found = solved(ConjugateGradients(iterations=300), problem, vectors)
        exact = curvature + damping * torch.eye(300, dtype=torch.float64)
        expected = torch.linalg.solve(exact, vectors.double().T).T
        assert relative(found.double(), expected) < bound, damping
        if damping == 1e-7 and count >= 60:
            assert problem.record["ended_by"] == "rounding"


def test_queries_that_depend_on_each_other_are_solved() -> None:
    problem, matrix, vectors = problem_of()
    vectors = torch.cat([vectors, vectors[:1], vectors[:1] - 2 * vectors[1:2]])
    for preconditioner in (None, "ekfac"):
        solver = ConjugateGradients(preconditioner, tolerance=1e-10, iterations=1000)
        expected = torch.linalg.solve(matrix, vectors.T).T
        assert relative(solved(solver, problem, vectors), expected) < 1e-8


@pytest.mark.parametrize("name", quick(NAMES, NAMES[:1]))
def test_random_batches_come_close(name: str) -> None:
    problem, matrix, vectors = problem_of(name, damping=1.0)
    expected = torch.linalg.solve(matrix, vectors.T).T
    ekfac = relative(problem.precondition(vectors), expected)
    for solver in (ASTRA(iterations=500, batch=2), LiSSA(depth=500, batch=2, repeats=8)):
        error = relative(solved(solver, problem_of(name, damping=1.0)[0], vectors), expected)
        assert error < 0.2
        if isinstance(solver, ASTRA):
            assert error < 0.5 * ekfac


def test_repeats_average_independent_recursions() -> None:
    problem, matrix, vectors = problem_of(damping=0.3)
    expected = torch.linalg.solve(matrix, vectors.T).T
    one, many = (
        relative(solved(LiSSA(depth=400, batch=2, repeats=n), problem, vectors), expected)
        for n in (1, 16)
    )
    assert many < 0.6 * one


@pytest.mark.parametrize("name", NAMES)
def test_datainf_is_the_mean_of_the_examples_inverses(name: str) -> None:
    problem, _, vectors = problem_of(name)
    context = problem.session
    ((batch, examples),) = context.batches([range(EXAMPLES)])
    gradients = context.train_gradients(batch, examples).blocks
    diagonal, queries = (as_matrices(context.blocks, r) for r in (problem.diagonal, vectors))
    parts = []
    for block in context.blocks:
        rows = gradients[block.name].dense(slice(None)).flatten(1)
        inverses = [
            torch.linalg.inv(g.outer(g) + diagonal[block.name].flatten().diag()) for g in rows
        ]
        parts.append(queries[block.name].flatten(1) @ torch.stack(inverses).mean(0))
    expected = torch.cat(parts, 1)
    assert relative(solved(DataInf(), problem, vectors), expected) < 1e-10


def test_damping_of_lissa_is_the_damping_whatever_the_scale() -> None:
    _, matrix, vectors = problem_of(damping=0.5)
    expected = torch.linalg.solve(matrix, vectors.T).T
    least = float(torch.linalg.eigvalsh(matrix).max())
    for scale in (least, 3 * least):
        found = solved(
            LiSSA(scale=scale, depth=3000, batch=EXAMPLES), problem_of(damping=0.5)[0], vectors
        )
        assert relative(found, expected) < 1e-6


def test_lissa_that_diverges_names_a_scale_that_converges() -> None:
    problem, matrix, vectors = problem_of(damping=0.3)
    small = 0.2 * float(torch.linalg.eigvalsh(matrix).max())
    with pytest.raises(NonFiniteError, match="scale=.* would have converged") as caught:
        solved(LiSSA(scale=small, depth=2000, batch=2), problem, vectors)
    named = float(str(caught.value).split(" would have converged")[0].rpartition("scale=")[2])
    found = solved(
        LiSSA(scale=named, depth=2000, batch=2, repeats=8), problem_of(damping=0.3)[0], vectors
    )
    assert relative(found, torch.linalg.solve(matrix, vectors.T).T) < 0.3


def test_negative_curvature_is_said() -> None:
    problem, _, vectors = problem_of()
    problem.products.matrices = -problem.products.matrices  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="need a positive definite matrix.*gauss_newton"):
        solved(ConjugateGradients(None), problem, vectors)
    with pytest.raises(NonFiniteError, match="diverges whatever its scale"):
        solved(LiSSA(scale=10.0, depth=20_000, batch=EXAMPLES), problem, vectors)


def test_astra_that_diverges_says_so() -> None:
    problem, _, vectors = problem_of()
    with pytest.raises(NonFiniteError, match="ASTRA diverges with step=50. step=.* is below"):
        solved(ASTRA(step=50.0, batch=None), problem, vectors)


def test_power_iteration_finds_the_largest_eigenvalue() -> None:
    problem, matrix, _ = problem_of()
    largest = float(torch.linalg.eigvalsh(matrix).max())
    assert largest <= problem.largest_eigenvalue(EXAMPLES) <= 1.21 * largest


def test_a_query_without_gradient_asks_for_nothing() -> None:
    _, _, vectors = problem_of()
    vectors[1] = 0
    for solver in SHORT.values():
        found = solved(solver, problem_of()[0], vectors)
        assert found.isfinite().all()
        assert not found[1].any()


def test_impossible_settings_are_named() -> None:
    for make, message in (
        (lambda: ConjugateGradients("jacobi"), "Unknown preconditioner 'jacobi'"),
        (lambda: ConjugateGradients(curvature="fisher"), "Unknown curvature 'fisher'"),
        (lambda: LiSSA(scale=0.0), "scale must be positive, got 0.0"),
        (lambda: Lanczos(rank=5, iterations=3), "iterations must be at least the rank 5, got 3"),
        (lambda: InfluenceFunction(solver="cg"), "solver must be one of"),  # type: ignore[arg-type]
        (lambda: InfluenceFunction(damping="auto"), "damping must be a number, 'segment'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    problem, _, vectors = problem_of(damping=0.0)
    problem.decay.zero_()
    for solver in (Lanczos(), DataInf()):
        with pytest.raises(ValueError, match="give a positive damping|Give a positive damping"):
            solved(solver, problem, vectors)


# The whole way, with the products of the model itself.

SOLVERS = {
    "direct": Direct(),
    "cg": ConjugateGradients(tolerance=1e-8),
    "lanczos": Lanczos(rank=200),
    "lissa": LiSSA(depth=60, batch=10, tolerance=1e-8),
}


@functools.cache
def trained() -> Any:
    return train(CLASSIFIER, OPTIMIZERS["groups"])


@functools.cache
def scores_of(kind: str, **options: Any) -> Any:
    run, module, data = trained()
    estimator = InfluenceFunction(solver=SOLVERS[kind], **options)
    return attribute(CLASSIFIER, run, module, data, estimator, batch_size=4)


def truth(kind: str, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores by the dense matrix, with the matrix and the queries' gradients."""
    run, module, data = trained()
    last = [run.last_step]
    case, names = CLASSIFIER, list(run.facts.parameters)
    state = oracles.with_state(module, run.checkpoints[run.last_step])
    matrix = oracles.gauss_newton(state, case.criterion, data, names)
    if kind == "hessian":
        matrix = oracles.loss_hessian(state, case.loss, data, names)
    rates = run.steps.hyperparameters["weight_decay"][-1]
    decay = torch.cat(
        [rates[f.group].expand(f.shape).flatten() for f in run.facts.parameters.values()]
    )
    matrix = matrix + (decay + damping).diag()
    gradients = oracles.checkpoint_gradients(run, module, case.loss, data, last)[run.last_step]
    queries = oracles.checkpoint_gradients(run, module, case.loss, queries_of(case), last)
    query = queries[run.last_step]
    return query @ torch.linalg.inv(matrix) @ gradients.T / len(gradients), matrix, query


@pytest.mark.parametrize("kind", ["direct", "cg", "lanczos"])
def test_scores_are_those_of_the_dense_inverse(kind: str) -> None:
    """Damping and the weight decay of each group are in the matrix, once."""
    scores = scores_of(kind, damping=0.01)
    assert relative(scores.values, truth("gauss_newton", 0.01)[0]) < 1e-6
    made = scores.provenance["solver"]
    assert made["reached"] is True
    assert made["damping"] == pytest.approx(0.01)
    assert made["relative_residual"]["max"] < 1e-7
    assert made["products"] > 0
    assert scores.self_influence is None
    assert any("No self-influence" in note for note in scores.provenance["notes"])


def test_the_hessian_is_solved_too() -> None:
    run, module, data = trained()
    estimator = InfluenceFunction(damping=0.5, solver=Direct("hessian"))
    scores = attribute(CLASSIFIER, run, module, data, estimator)
    assert relative(scores.values, truth("hessian", 0.5)[0]) < 1e-8


def test_the_default_damping_is_a_tenth_of_the_mean_eigenvalue() -> None:
    made = scores_of("direct").provenance
    run, module, data = trained()
    state = oracles.with_state(module, run.checkpoints[run.last_step])
    names = list(run.facts.parameters)
    matrix = oracles.gauss_newton(state, CLASSIFIER.criterion, data, names)
    exact = 0.1 * float(matrix.diagonal().mean())
    assert made["damping"] == {"relative to the mean eigenvalue": 0.1}
    # The trace is that of gradients of sampled labels, and weight decay is none of it.
    assert made["solver"]["damping"] == pytest.approx(exact, rel=0.5)


def test_damping_of_the_segment_is_one_over_the_applied_rates() -> None:
    run, _, _ = trained()
    scores = scores_of("direct", damping="segment")
    time = float(applied_rates(run, slice(None)).sum(0).max())
    assert scores.provenance["solver"]["damping"] == pytest.approx(1 / time)
    assert relative(scores.values, truth("gauss_newton", 1 / time)[0]) < 1e-6
    adam, module, data = train(CLASSIFIER, OPTIMIZERS["adam"])
    with pytest.raises(UnsupportedTrainingError, match="damping='segment'.*Adam"):
        attribute(CLASSIFIER, adam, module, data, InfluenceFunction(damping="segment"))


def test_a_tolerance_that_is_not_reached_is_said_with_the_true_residual() -> None:
    scores = scores_of("lissa", damping=0.01)
    made = scores.provenance["solver"]
    assert made["reached"] is False
    assert any("LiSSA did not reach its tolerance" in n for n in scores.provenance["notes"])
    # The residual by the dense matrix, from the recursion written out.
    _, matrix, query = truth("gauss_newton", 0.01)
    h = query
    for _ in range(60):
        h = query + h - h @ matrix / made["scale"]
    rest = query - h @ matrix / made["scale"]
    expected = norms(rest) / norms(query)
    assert made["relative_residual"]["max"] == pytest.approx(float(expected.max()), rel=1e-6)


def test_rounds_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run, module, data = trained()
    expected = scores_of("cg", damping=0.01)
    monkeypatch.setattr("tda_lightning.session.session.memory_budget", lambda: 1)
    estimator = InfluenceFunction(damping=0.01, solver=SOLVERS["cg"])
    scores = attribute(CLASSIFIER, run, module, data, estimator)
    assert relative(scores.values, expected.values.double()) < 1e-6


def test_datainf_serves_where_the_gauss_newton_matrix_is_unknown() -> None:
    @dataclasses.dataclass
    class Cubed(CaseTask):
        def train_loss(self, module, batch):
            weight = next(module.parameters())  # outside of its module
            return (batch[0].flatten(1) @ weight.T).pow(3).abs().sum(1)

    run, module, data = trained()
    estimator = InfluenceFunction(solver=DataInf(), damping=0.1)
    scores = attribute(CLASSIFIER, run, module, data, estimator, task=Cubed(CLASSIFIER.kind))
    made = scores.provenance["solver"]
    assert made["relative_residual"] is None
    assert made["reached"] is None
    assert any("residual of the solver is not known" in n for n in scores.provenance["notes"])
    estimator = InfluenceFunction(solver=ConjugateGradients())
    with pytest.raises(ValueError, match="no module returned anything that the loss depends on"):
        attribute(CLASSIFIER, run, module, data, estimator, task=Cubed(CLASSIFIER.kind))
