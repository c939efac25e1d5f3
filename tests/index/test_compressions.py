"""Compressions keep inner products: exactly where they have room, and about the same in fewer
numbers; what they are comes back from a file."""

import pytest
import torch

from tda_lightning.index import AttributionIndex
from tda_lightning.index.choosing import Samples, fitted
from tda_lightning.index.opened import in_session, training_source
from tda_lightning.index.responses import responder_of
from tda_lightning.index.rounding import bytes_of, numbers_of, rounded, width_of
from tda_lightning.index.samples import (
    exact_scores,
    query_coordinates,
    sample_coordinates,
)
from tda_lightning.runtime.loading import ExampleSource
from tests.attributing import relative
from tests.cases.training import CLASSIFIER, MLP
from tests.index.test_attribution_index import build, everything, run_of, scores


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize(
    ("kind", "width", "bound"),
    [("factors", 200, 1e-3), ("leading", 40, 1e-9), ("leading", 12, 1e-4)],
)
def test_with_room_they_keep_scores(kind, width, bound, optimizer):
    """Factor pairs of full width and rank; coordinates of which none is left out; as many principal
    components as there are examples."""
    attribution, train_set, queries = run_of(optimizer=optimizer)
    source = training_source(attribution, train_set, 4)
    everyone = source.batches(size=4)

    def work(session):
        responder = responder_of(attribution.estimator, session)
        samples = Samples(everyone, everyone, everyone)
        (made,) = fitted(session, responder, [(kind, width)], samples, 0)
        (batches,) = sample_coordinates(session, responder, [made], everyone)
        stored = torch.cat([made.stored(own) for own in batches])
        (coordinates,) = query_coordinates(session, responder, [made])
        found = made.dot(made.asked(coordinates), stored)
        return found, exact_scores(session, responder, everyone)

    found, exact = in_session(attribution, source, ExampleSource.of(queries, 4, "query"), work)
    assert relative(found / 10, scores(attribution, train_set, queries)) < bound
    assert relative(exact / 10, scores(attribution, train_set, queries)) < 1e-6  # float32


class _Louder:
    """The responses of a responder, of which the first query's are a thousand times as large."""

    def __init__(self, responder):
        self.responder, self.terms = responder, responder.terms
        self.query_bytes = responder.query_bytes

    def responses(self, first, last):
        for number, found in self.responder.responses(first, last):
            weights = torch.where(torch.arange(first, last) == 0, 1e3, 1.0).double()
            yield number, {name: own * weights[:, None, None, None] for name, own in found.items()}


@pytest.mark.parametrize(("kind", "alike"), [("leading", True), ("factors", False)])
def test_every_query_counts_alike_for_leading_coordinates(kind, alike):
    """However large its gradient is. Factor pairs are chosen for large ones."""
    attribution, train_set, queries = run_of(CLASSIFIER)
    source = training_source(attribution, train_set, 4)
    everyone = source.batches(size=4)

    def work(session):
        responder = responder_of(attribution.estimator, session)
        found = []
        for own in (responder, _Louder(responder)):
            samples = Samples(everyone, everyone, everyone)
            (made,) = fitted(session, own, [(kind, 6 if kind == "leading" else 16)], samples, 0)
            (batches,) = sample_coordinates(session, responder, [made], everyone)
            stored = torch.cat([made.stored(part) for part in batches])
            (coordinates,) = query_coordinates(session, responder, [made])
            found.append(made.dot(made.asked(coordinates), stored))
        return relative(*found), relative(found[0], exact_scores(session, responder, everyone))

    change, lost = in_session(attribution, source, ExampleSource.of(queries, 4, "query"), work)
    assert lost > 1e-3  # of that compression something is lost, which depends on the queries
    assert (change < 1e-8) == alike


@pytest.mark.parametrize("compression", ["factors", "leading", "random"])
def test_rounding_costs_little(tmp_path, compression):
    """The same compression in int8 and in float64."""
    attribution, train_set, queries = run_of(CLASSIFIER)
    found = []
    for dtype, size in (("float64", 8 * 16 + 8), ("int8", 20)):
        options = {"dtype": dtype, "bytes_per_example": size, "compression": compression}
        index = build(attribution, train_set, tmp_path / dtype, **options)
        assert index.facts.width <= 16
        found.append(everything(index, queries))
    assert relative(found[1], found[0]) < 0.05


@pytest.mark.parametrize("dtype", ["int4", "int8", "float16", "float32", "float64"])
def test_rows_are_rounded_to_their_bytes(dtype):
    rows = torch.randn(50, width_of(101, dtype), generator=torch.Generator().manual_seed(0))
    rows[0] = 0
    codes, scales = rounded(rows, dtype)
    assert 101 - 8 < bytes_of(rows.shape[1], dtype) <= 101
    assert codes.nbytes + scales.nbytes == 50 * bytes_of(rows.shape[1], dtype)
    back = numbers_of(codes, dtype, rows.shape[1]) * torch.from_numpy(scales)[:, None]
    bound = {"int4": 0.13, "int8": 0.01, "float16": 1e-3}.get(dtype, 1e-6)
    assert relative(back, rows.double()) < bound


@pytest.mark.parametrize("count", [4, 20, 60])
def test_rows_of_few_numbers_are_rounded_too(count):
    """Beside some thousand zeros, of which a sample of a row may show no others."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(50, 2000)
    for row in rows:
        places = torch.randperm(2000, generator=generator)[:count]
        row[places] = torch.randn(count, generator=generator)
    codes, scales = rounded(rows, "int4")
    back = numbers_of(codes, "int4", 2000) * torch.from_numpy(scales)[:, None]
    assert ((back - rows).norm(dim=1) < 0.25 * rows.norm(dim=1)).all()


def test_numbers_too_small_for_a_scale_are_zero():
    for dtype in ("int4", "int8", "float16"):
        codes, scales = rounded(torch.full((1, 5), 1e-46, dtype=torch.float64), dtype)
        assert (numbers_of(codes, dtype, 5) * torch.from_numpy(scales)[:, None] == 0).all()


def test_without_room_for_a_pair_of_factors_there_are_leading_coordinates(tmp_path):
    attribution, train_set, _ = run_of()
    options = {"bytes_per_example": 16, "dtype": "float64"}
    index = build(attribution, train_set, tmp_path / "any", **options)
    assert (index.compression.kind, index.facts.width) == ("leading", 1)
    with pytest.raises(ValueError, match="no room for a pair of factors, 2 numbers"):
        build(attribution, train_set, tmp_path / "factors", compression="factors", **options)
    with pytest.raises(ValueError, match="no fewer than the parameters. Give fewer"):
        build(
            attribution,
            train_set,
            tmp_path / "random",
            compression="random",
            dtype="int4",
            bytes_per_example=16,
        )


def test_what_is_built_is_what_is_opened(tmp_path):
    attribution, train_set, queries = run_of(MLP)
    for compression in ("factors", "leading", "random"):
        options = {"compression": compression, "bytes_per_example": 20, "dtype": "int8"}
        built = build(attribution, train_set, tmp_path / compression, **options)
        opened = AttributionIndex.open(built.path, attribution, train_set)
        assert torch.equal(everything(opened, queries), everything(built, queries))
