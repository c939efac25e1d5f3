"""Layers of every kind: with room for everything an index answers as ``attribute`` does."""

import pytest

from tda_lightning.estimators import InfluenceFunction, Source, TracIn
from tests.attributing import relative
from tests.cases.layers import LAYERS
from tests.cases.wiring import WIRING
from tests.index.test_attribution_index import build, everything, run_of, scores

CASES = {case.name: case for case in [*LAYERS, *WIRING]}
KINDS = [
    "conv/network",  # batch norm, and positions that share weights
    "conv/2d_groups",
    "embedding/wide_vocabulary",
    "tied/embedding_and_head",
    "norm/layer_positions",
    "norm/batch_1d_positions",
    "shared/called_at_two_lengths",
    "adapted/low_rank",
]
ESTIMATORS = {
    "source": Source(num_segments=2, leading_directions=0),
    "tracin": TracIn(),
    "influence": InfluenceFunction(),
    "source_leading": Source(num_segments=2, leading_directions=3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        name if name == "source" else pytest.param(name, marks=pytest.mark.slow)
        for name in ESTIMATORS
    ],
)
def test_with_room_for_everything_it_is_attribute(tmp_path, name, kind):
    attribution, train_set, queries = run_of(CASES[kind], "sgd", ESTIMATORS[name])
    index = build(attribution, train_set, tmp_path / "index", bytes_per_example=1 << 18)
    expected = scores(attribution, train_set, queries)
    assert expected.abs().max() > 0
    assert relative(everything(index, queries), expected) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_in_few_bytes_what_is_best_is_reranked(tmp_path, kind):
    attribution, train_set, queries = run_of(CASES[kind], "sgd", ESTIMATORS["source"])
    options = {"bytes_per_example": 24, "dtype": "int8"}
    index = build(attribution, train_set, tmp_path / "index", **options)
    expected = scores(attribution, train_set, queries)
    found = index.search(queries, 3, rerank=10)
    assert relative(found.values, expected.topk(3, dim=1).values) < 1e-10
