"""SOURCE by products alone, against dense matrices in float64, and its bound on the error."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule
from tda_lightning.estimators import Source
from tda_lightning.estimators.source.matrix_functions import SegmentFunctions, segment_functions
from tda_lightning.records.errors import NonFiniteError, UnsupportedTrainingError
from tests import oracles
from tests.attributing import CaseTask, attribute, in_float32, quiet, relative
from tests.cases.case import Case, normal
from tests.cases.training import MLP, OPTIMIZERS, everything, queries_of, schedule, train

CNN = Case(
    "cnn",
    lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    ),
    normal(1, 5, 5),
    kind="classification",
)
MODELS = {"mlp": MLP, "cnn": CNN}
NAMES = ("momentum", "adam", "adamw")
CUTS = (3, 5)  # segments of two, one and two checkpoints
CLOSE = {"curvature": "matrix_free", "tolerance": 1e-8}


@functools.cache
def recorded(model: str, name: str) -> tuple[Any, Any, Any]:
    return train(
        MODELS[model], OPTIMIZERS[name], checkpoints=(2, 3, 5, 6), schedule=schedule
    )  # and step 9


def scored(model: str, name: str, **options: Any) -> Any:
    run, module, data = recorded(model, name)
    estimator = Source(**{"segment_steps": CUTS, **options})
    # In one batch: tests of batches are those of the products.
    return attribute(MODELS[model], run, module, data, estimator, batch_size=10)


@functools.cache
def parts_of(model: str, name: str, *cuts: int) -> Any:
    return everything(MODELS[model], *recorded(model, name), list(cuts) or 1)


def expected(model: str, name: str, *cuts: int, by_layer: bool = False) -> Tensor:
    """SOURCE by dense exponentials; ``by_layer`` with blocks of curvature on the diagonal alone."""
    run, _, _ = recorded(model, name)
    segments, curvature, gradients, query = parts_of(model, name, *cuts)
    if by_layer:
        layers = [parameter.rpartition(".")[0] for parameter in run.facts.parameters]
        sizes = [torch.Size(fact.shape).numel() for fact in run.facts.parameters.values()]
        number = torch.tensor([sorted(set(layers)).index(layer) for layer in layers])
        number = number.repeat_interleave(torch.tensor(sizes))
        curvature = [matrix * (number[:, None] == number) for matrix in curvature]
    return oracles.source_average(run, segments, curvature, gradients, query)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_full_is_the_dense_matrix(model: str, name: str) -> None:
    scores = scored(model, name, **CLOSE)
    assert relative(scores.by_segment, expected(model, name, *CUTS)) < 1e-7
    dense = scored(model, name, curvature="exact")
    assert relative(scores.by_segment, dense.by_segment) < 1e-7
    torch.testing.assert_close(scores.values, scores.by_segment.sum(0))
    assert scores.self_influence is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_layers_are_the_blocks_on_the_diagonal(model: str, name: str) -> None:
    scores = scored(model, name, blocks="layer", **CLOSE)
    blocks = expected(model, name, *CUTS, by_layer=True)
    assert relative(scores.by_segment, blocks) < 1e-7
    # The coupling matters here, so that the two cannot be taken for each other.
    assert relative(scores.by_segment, expected(model, name, *CUTS)) > 1e-2


@pytest.mark.parametrize("blocks", ["full", "layer"])
def test_one_segment_of_all_checkpoints(blocks: str) -> None:
    for name in ("adamw_groups", "groups"):
        scores = scored("mlp", name, segment_steps=None, num_segments=1, blocks=blocks, **CLOSE)
        dense = expected("mlp", name, by_layer=blocks == "layer")
        assert relative(scores.by_segment, dense) < 1e-7
        found = scores.provenance["matrix_free"]
        assert found["blocks"] == blocks and found["reached"]
        # All queries take their products together, at each of the five checkpoints.
        most = found["products_per_query_and_segment"]["max"]
        assert found["walks_over_training_set"] == 5 * most
        assert 2 * most < found["products"] <= 3 * most


def test_a_smaller_tolerance_is_nearer_and_takes_more_products() -> None:
    dense = expected("cnn", "adamw")
    errors, products = [], []
    for tolerance in (0.3, 1e-2, 1e-4, 1e-6):
        scores = scored(
            "cnn",
            "adamw",
            segment_steps=None,
            num_segments=1,
            curvature="matrix_free",
            tolerance=tolerance,
        )
        found = scores.provenance["matrix_free"]
        assert found["relative_error"]["max"] <= tolerance == found["tolerance"]
        errors.append(relative(scores.values, dense))
        products.append(found["products"])
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 < 1e-3 < errors[0]
    assert products == sorted(products) and products[0] < products[-1]


def test_a_tolerance_that_is_not_reached_is_told() -> None:
    scores = scored("cnn", "adamw", curvature="matrix_free", tolerance=1e-8, max_products=3)
    found = scores.provenance["matrix_free"]
    assert found["products_per_query_and_segment"] == {"max": 3, "mean": 3.0}
    assert not found["reached"] and found["relative_error"]["max"] > 1e-8
    (note,) = [note for note in scores.provenance["notes"] if "tolerance was not reached" in note]
    assert "9 of 9 functions" in note and f"{found['relative_error']['max']:.3g}" in note
    reached = scored("cnn", "adamw", **CLOSE)
    assert not any("tolerance" in note for note in reached.provenance["notes"])


def test_rounds_of_queries_and_single_precision_change_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = expected("cnn", "adamw", *CUTS)
    monkeypatch.setattr("tda_lightning.session.session.memory_budget", lambda: 1)
    scores = scored("cnn", "adamw", **CLOSE)
    assert relative(scores.by_segment, dense) < 1e-7
    monkeypatch.undo()
    run, _, data = recorded("cnn", "adamw")
    single, module, (data, asked) = in_float32(run, CNN.build(), data, queries_of(CNN))
    estimator = Source(segment_steps=CUTS, curvature="matrix_free", tolerance=1e-5)
    scores = attribute(CNN, single, module, data, estimator, queries=asked)
    assert scores.values.dtype == torch.float32
    assert relative(scores.by_segment, dense) < 1e-4


# The functions themselves


def matrix_of(sizes: list[int], spread: float = 3.0) -> Tensor:
    """Semi-definite, with eigenvalues from 0 and 10^-spread to 10 in every block."""
    own = torch.Generator().manual_seed(1)
    blocks = []
    for size in sizes:
        basis = torch.linalg.qr(torch.randn(size, size, generator=own, dtype=torch.float64)).Q
        values = torch.logspace(-spread, 1, size, dtype=torch.float64)
        values[:2] = 0
        blocks.append((basis * values) @ basis.T)
    return torch.block_diag(*blocks)


def run_on(
    matrix: Tensor, vectors: Tensor, sizes: list[int], time: float = 3.0, **options: Any
) -> tuple[SegmentFunctions, list[int]]:
    """What is found, and how many vectors each product took."""
    taken = []

    def apply(rows: Tensor) -> Tensor:
        taken.append(len(rows))
        return rows @ matrix

    settings = {"max_products": 200, "carry": True, **options}
    steps = range(1, settings["max_products"] + 1)
    return segment_functions(apply, vectors, sizes, time, steps, **settings), taken


def functions_of(matrix: Tensor, vectors: Tensor, time: float) -> tuple[Tensor, Tensor]:
    size = len(matrix)
    both = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
    both[:size, :size], both[:size, size:] = -time * matrix, time * torch.eye(size).double()
    both = torch.linalg.matrix_exp(both)
    return vectors @ both[:size, size:], vectors @ both[:size, :size]


def lengths(rows: Tensor) -> Tensor:
    return rows.norm(dim=1)


@pytest.mark.parametrize("time", [0.01, 3.0, 300.0])
@pytest.mark.parametrize("sizes", [[60], [25, 35]], ids=["full", "blocks"])
def test_the_bound_holds_and_is_not_far_off(sizes: list[int], time: float) -> None:
    matrix = matrix_of(sizes)
    own = torch.Generator().manual_seed(2)
    vectors = torch.randn(4, 60, generator=own, dtype=torch.float64)
    response, left = functions_of(matrix, vectors, time)
    tolerance = 1e-13
    least = 10 * torch.finfo(torch.float64).eps / tolerance * lengths(vectors)
    for products in (1, 2, 3, 5, 8, 12, 20, 35):
        found, _ = run_on(matrix, vectors, sizes, time, tolerance=tolerance, max_products=products)
        errors = torch.maximum(
            lengths(found.response - response) / lengths(found.response),
            lengths(found.left - left) / lengths(found.left).maximum(least),
        )
        assert (errors <= found.errors * (1 + 1e-6) + 1e-12).all()
        if (found.errors > 1e-9).all():
            assert (found.errors < 100 * errors).all()


def test_each_vector_stops_when_it_is_done() -> None:
    matrix = matrix_of([60])
    vectors = torch.linalg.eigh(matrix).eigenvectors.T[[50, 3, 20, 0]].clone()
    own = torch.Generator().manual_seed(2)
    vectors[2] = torch.randn(60, generator=own, dtype=torch.float64)
    vectors[3] = 0
    found, taken = run_on(matrix, vectors, [60], tolerance=1e-7)
    response, left = functions_of(matrix, vectors, 3.0)
    assert relative(found.response, response) < 1e-7 and relative(found.left, left) < 1e-7
    assert found.products.tolist() == [1, 1, len(taken), 0]
    assert taken == [3, *[1] * (len(taken) - 1)] and 5 < len(taken) < 60
    assert found.errors[3] == 0 and not found.response[3].any()


def test_next_to_nothing_left_is_not_chased() -> None:
    """All of a vector decays below its rounding errors."""
    matrix = matrix_of([60]) + 0.5 * torch.eye(60)
    vectors = torch.ones(1, 60, dtype=torch.float64)
    found, taken = run_on(matrix, vectors, [60], time=200.0, tolerance=1e-6)
    response, left = functions_of(matrix, vectors, 200.0)
    assert left.norm() < 1e-40 and (found.left - left).norm() < 1e-13
    assert relative(found.response, response) < 1e-6 and len(taken) < 60


def test_blocks_are_separate_and_may_be_empty() -> None:
    """A block's part is that of the block alone, whatever happens in the others."""
    matrix, sizes = matrix_of([25, 35]), [25, 35]
    own = torch.Generator().manual_seed(2)
    vectors = torch.randn(3, 60, generator=own, dtype=torch.float64)
    vectors[1, :25] = 0
    vectors[2, 25:] = torch.linalg.eigh(matrix[25:, 25:]).eigenvectors[:, 9]
    found, _ = run_on(matrix, vectors, sizes, tolerance=1e-9)
    response, left = functions_of(matrix, vectors, 3.0)
    assert relative(found.response, response) < 1e-9 and relative(found.left, left) < 1e-9
    assert not found.response[1, :25].any()


def test_what_is_not_asked_for_is_not_computed_and_nan_is_refused() -> None:
    matrix, vectors = matrix_of([8]), torch.ones(2, 8, dtype=torch.float64)
    found, _ = run_on(matrix, vectors, [8], tolerance=1e-6, carry=False)
    assert found.left is None
    with pytest.raises(NonFiniteError, match="product of a query with the curvature"):
        run_on(matrix * float("nan"), vectors, [8], tolerance=1e-6)


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "full"}, "goes with curvature='matrix_free', got 'full' with 'ekfac'"),
        ({**CLOSE, "blocks": "neuron"}, "one of layer, full or null .None., got 'neuron'"),
        ({**CLOSE, "order": "recorded"}, "expected order='average' and momentum='effective_rate'"),
        ({**CLOSE, "momentum": "recursion"}, "got 'average' and 'recursion'"),
        ({**CLOSE, "tolerance": 0.0}, "tolerance must be positive, got 0"),
        ({**CLOSE, "max_products": 0}, "max_products must be positive, got 0"),
        ({**CLOSE, "leading_directions": 8}, "goes with a block-wise curvature"),
        ({**CLOSE, "statistics": "recorded"}, "got curvature='matrix_free'"),
        ({"curvature": "matrixfree"}, "expected one of exact, .*, identity, matrix_free"),
    ],
)
def test_impossible_settings_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(**options)


def test_several_stages_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedTrainingError, match="one stage of training, got 2"):
        Source(curvature="matrix_free").stage_segment_counts([None, None])  # type: ignore[list-item]


def test_a_dry_run_counts_the_products() -> None:
    run, module, data = recorded("mlp", "adamw")
    estimator = Source(2, curvature="matrix_free", max_products=30)
    attribution = AttributionModule(module, run, estimator, CaseTask("regression"))
    data_sets = TensorDataset(*data), TensorDataset(*queries_of(MLP))
    plan = attribution.plan(*data_sets, batch_size=4, trainer=quiet())
    groups = {one.title: one for one in plan.passes}
    functions = groups["segment #: functions of curvature"]
    # Of 20 parameters there are at most 20 products, at two and three checkpoints.
    assert functions.count == 2 and functions.batches == 20 * 2
    assert groups["products with the curvature"].count == 20 * 5
    assert functions.seconds > 0 and "segment #: scores, step #" in groups
    assert dataclasses.asdict(estimator) == dataclasses.asdict(
        Source(2, curvature="matrix_free", max_products=30)
    )
