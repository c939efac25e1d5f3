"""The searcher of a service, with its run open, finds what the index finds by itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule
from tda_lightning.estimators import Source
from tda_lightning.index import AttributionIndex
from tda_lightning.measurements import Contrast
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.serve.questions import Question
from tda_lightning.serve.searching import IndexSearcher
from tests.attributing import CaseTask
from tests.cases.training import CLASSIFIER, OPTIMIZERS, queries_of, train


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    run, module, data = train(CLASSIFIER, OPTIMIZERS["momentum"], checkpoints=(0, 3, 6, 9))
    estimator = Source(num_segments=2, leading_directions=0)
    attribution = AttributionModule(module, run, estimator, CaseTask(CLASSIFIER.kind))
    train_set, queries = TensorDataset(*data), TensorDataset(*queries_of(CLASSIFIER))
    path = tmp_path_factory.mktemp("index") / "index"
    AttributionIndex.build(attribution, train_set, path, bytes_per_example=40, batch_size=4)
    index = AttributionIndex.open(path, attribution, train_set)
    return index, queries


def question(index=None, item=None, rerank=0, measurement=None):
    return Question(index, item, {}, 3, rerank, measurement, repr(measurement))


ASKED = [(0, None), (10, None), (0, Contrast(0, 1)), (10, Contrast(0, 1)), (0, None)]


def test_it_finds_what_the_index_finds(built):
    index, queries = built
    searcher = IndexSearcher(index, ExampleSource.of(queries, 4, "query"), 4)
    found = []

    def work():
        for rerank, measurement in ASKED:
            asked = [
                question(1, rerank=rerank, measurement=measurement),
                question(item=queries[0], rerank=rerank, measurement=measurement),
                question(1, rerank=rerank, measurement=measurement),
            ]
            found.append(searcher.search(asked, 3))

    searcher.during(work)
    for (rerank, measurement), answers in zip(ASKED, found, strict=True):
        own = index.search(queries, 3, measurement=measurement, rerank=rerank, batch_size=4)
        for answer, row in zip(answers, (1, 0, 1), strict=True):
            for pairs, indices, values in (
                (answer.proponents, own.indices[row], own.values[row]),
                (answer.opponents, own.opponents[row], own.opponent_values[row]),
            ):
                assert [index for index, _ in pairs] == indices.tolist()
                got = torch.tensor([value for _, value in pairs], dtype=values.dtype)
                torch.testing.assert_close(got, values, rtol=1e-12, atol=0)


def test_a_query_without_a_finite_gradient_is_refused(built):
    index, queries = built
    searcher = IndexSearcher(index, ExampleSource.of(queries, 4, "query"), 4)
    inputs, label = queries[0]

    def work():
        with pytest.raises(NonFiniteError, match="nan"):
            searcher.search([question(item=(inputs * float("nan"), label))], 3)

    searcher.during(work)
