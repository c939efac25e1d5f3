"""An index in an object store, rows that were appended searched alone, and FAISS."""

from dataclasses import replace

import fsspec
import pytest
import torch
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule
from tda_lightning.estimators import TracIn
from tda_lightning.index import ApproximateSearch, AttributionIndex
from tda_lightning.records.errors import NonFiniteError, TrajectoryMismatchError
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.serve.searching import IndexSearcher
from tests.attributing import CaseTask
from tests.cases.training import CLASSIFIER, MLP, OPTIMIZERS, queries_of, train
from tests.index.test_attribution_index import build, everything, folder, run_of

OPTIONS = {"bytes_per_example": 40, "dtype": "int8", "shard": 3}


def test_an_index_is_fetched_from_an_object_store(tmp_path):
    attribution, train_set, queries = run_of(estimator=TracIn())
    index = build(attribution, train_set, tmp_path / "index", **OPTIONS)
    store = fsspec.filesystem("memory")
    store.put(str(index.path), "/bucket/index", recursive=True)
    store.pipe("/bucket/index/shards/../../outside.h5", b"not fetched")
    store.pipe("/bucket/index/shards/other.h5", b"not fetched")
    fetched = AttributionIndex.fetch(
        "memory://bucket/index", tmp_path / "fetched", attribution, train_set
    )
    assert folder(fetched.path) == folder(index.path)
    assert torch.equal(everything(fetched, queries), everything(index, queries))
    lost = fetched.path / "shards" / "000000000003-000000000006.h5"
    lost.unlink()
    AttributionIndex.fetch("memory://bucket/index", tmp_path / "fetched")  # again: the missing one
    assert folder(fetched.path) == folder(index.path)
    index.append(TensorDataset(*MLP.batch(5, seed=3)))
    store.put(str(index.path / "index.h5"), "/bucket/index/index.h5")
    with pytest.raises(FileExistsError, match="earlier state"):
        AttributionIndex.fetch("memory://bucket/index", tmp_path / "fetched")
    with pytest.raises(FileNotFoundError, match="holds no index"):
        AttributionIndex.fetch("memory://bucket/nothing", tmp_path / "none")
    store.rm("/bucket", recursive=True)


def test_appended_examples_are_searched_alone(tmp_path):
    attribution, train_set, queries = run_of(estimator=TracIn())
    index = build(attribution, train_set, tmp_path / "index", **OPTIONS)
    more = TensorDataset(*MLP.batch(5, seed=3))
    with pytest.raises(ValueError, match="expected them to be appended"):
        index.appended_rows(more)
    index.append(more)
    assert index.appended_rows(more) == (10, 15)
    whole = everything(index, queries)
    found = index.search_encoded(index.encode(queries), 5, among=(10, 15))
    expected = whole[:, 10:].sort(dim=1, descending=True)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.indices, expected.indices + 10)
    with pytest.raises(ValueError, match="between 1 and the number of examples, 5"):
        index.search_encoded(index.encode(queries), 6, among=(10, 15))


def test_an_index_of_another_estimator_is_not_asked(tmp_path):
    attribution, train_set, queries = run_of(estimator=TracIn())
    index = build(attribution, train_set, tmp_path / "index", **OPTIONS)
    other, _, _ = run_of()
    with pytest.raises(ValueError, match="built with TracIn"):
        AttributionIndex.open(index.path, other, train_set).search(queries, 1)


def test_rows_that_are_no_whole_shards_are_refused(tmp_path):
    attribution, train_set, queries = run_of(estimator=TracIn())
    index = build(attribution, train_set, tmp_path / "index", **OPTIONS)  # shards of 3 rows
    index.append(TensorDataset(*MLP.batch(5, seed=3)))
    asked = index.encode(queries)
    for among in ((3, 6), (9, 10), (6, 13), (0, 15)):
        found = index.search_encoded(asked, 1, among=among)
        assert ((found.indices >= among[0]) & (found.indices < among[1])).all()
    for among in ((0, 2), (1, 4), (4, 4), (9, 12), (6, 3), (-3, 3), (13, 18)):
        with pytest.raises(ValueError, match="not whole shards"):
            index.search_encoded(asked, 1, among=among)


def test_an_index_of_another_run_is_not_asked(tmp_path):
    """Of the same estimator and the same data, trained by another optimizer."""
    attribution, train_set, queries = run_of(estimator=TracIn())
    index = build(attribution, train_set, tmp_path / "index", **OPTIONS)
    other, _, _ = run_of(optimizer="adamw", estimator=TracIn())
    mistaken = AttributionIndex.open(index.path, other, train_set)
    with pytest.raises(TrajectoryMismatchError, match="built from another run"):
        mistaken.search(queries, 1)
    with pytest.raises(TrajectoryMismatchError, match="built from another run"):
        mistaken.append(TensorDataset(*MLP.batch(5, seed=3)))
    searcher = IndexSearcher(mistaken, ExampleSource.of(queries, 4, "query"), 4)
    with pytest.raises(TrajectoryMismatchError, match="built from another run"):
        searcher.during(lambda: None)


@pytest.mark.parametrize("named", [True, False])
def test_runs_that_end_at_the_same_weights_are_told_apart(tmp_path, named):
    """By the name that each was recorded under, or by its steps."""
    run, module, data = train(MLP, OPTIMIZERS["momentum"], checkpoints=(0, 3, 6, 9))
    if named:
        names = [{**run.facts.settings, "run_id": name} for name in ("one", "other")]
        runs = [replace(run, facts=replace(run.facts, settings=own)) for own in names]
    else:
        rates = run.steps.learning_rate.clone()
        rates[3] *= 2
        runs = [run, replace(run, steps=replace(run.steps, learning_rate=rates))]
    train_set, queries = TensorDataset(*data), TensorDataset(*queries_of(MLP))
    own, other = (AttributionModule(module, one, TracIn(), CaseTask(MLP.kind)) for one in runs)
    index = build(own, train_set, tmp_path / "index", **OPTIONS)
    AttributionIndex.open(index.path, own, train_set).search(queries, 1)
    mistaken = AttributionIndex.open(index.path, other, train_set)
    for refused in (
        lambda: mistaken.search(queries, 1),
        lambda: mistaken.append(TensorDataset(*MLP.batch(5, seed=3))),
    ):
        with pytest.raises(TrajectoryMismatchError, match="built from another run"):
            refused()
    with pytest.raises(FileExistsError, match="of another run"):
        build(other, train_set, tmp_path / "index", **OPTIONS)
    with pytest.raises(ValueError, match="of another run"):
        build(other, train_set, tmp_path / "more", like=tmp_path / "index", **OPTIONS)


def test_faiss_finds_what_a_search_of_all_rows_finds(tmp_path):
    pytest.importorskip("faiss")
    attribution, train_set, queries = run_of(CLASSIFIER, estimator=TracIn())
    index = build(attribution, train_set, tmp_path / "index", compression="leading", **OPTIONS)
    asked = index.encode(queries)
    expected = index.search_encoded(asked, 3)
    close = ApproximateSearch(index, cells=2)
    found = close.search_encoded(asked, 3, probes=2)  # all cells
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.opponents, expected.opponents)
    assert torch.allclose(found.values, expected.values, rtol=1e-6)
    assert torch.allclose(found.opponent_values, expected.opponent_values, rtol=1e-6)
    few = ApproximateSearch(index, cells=10).search_encoded(asked, 10, probes=1)
    assert (few.indices == -1).any() and (few.values[few.indices == -1] == 0).all()
    with pytest.raises(NonFiniteError, match="query 0 is NaN"):
        close.search_encoded(asked * torch.nan, 3, probes=2)
    for options in ({"k": 11}, {"probes": 3}):
        with pytest.raises(ValueError, match="must be between"):
            close.search_encoded(asked, **options)
    with pytest.raises(ValueError, match="cells must be"):
        ApproximateSearch(index, cells=11)


def test_where_faiss_does_not_serve_it_says_why(tmp_path, monkeypatch):
    attribution, train_set, _ = run_of(estimator=TracIn())
    index = build(attribution, train_set, tmp_path / "index", compression="factors", **OPTIONS)
    monkeypatch.setattr("tda_lightning.index.approximate.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="factor pairs"):
        ApproximateSearch(index)
    monkeypatch.setattr("tda_lightning.index.approximate.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"tda-lightning\[faiss\]"):
        ApproximateSearch(index)
