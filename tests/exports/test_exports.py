"""Scores as tables, arrays and issues, against loops over single scores."""

import json
import sys

import numpy as np
import pytest
import torch

from tda_lightning.exports import add_to_fiftyone, label_issues, label_quality, training_table
from tda_lightning.exports.long_rows import long_rows
from tda_lightning.records.scores import Scores


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    made = {
        "estimator": "Source",
        "segments": [[0, 4], [4, 9]],
        "measurements": [0.5, 1.5, 2.5],
        "predictions": ["<b>cat</b>", "dog", "cow"],
    }
    return Scores(parts.sum(0), parts, torch.rand(7, generator=generator), made)


@pytest.fixture
def candidates():
    values = torch.tensor([[2.0, torch.nan, -1.0, 2.0, torch.nan], [torch.nan] * 2 + [3.0, 0, -4]])
    return Scores(values, candidates=torch.tensor([[3, 0, 2], [4, 2, 3]]))


def looped(scores, k=None):
    """The rows of the long form, one by one."""
    rows = []
    for query in range(scores.num_queries):
        known = [n for n in range(scores.num_train) if not scores.values[query, n].isnan()]
        order = sorted(known, key=lambda n: (-float(scores.values[query, n]), n))
        for rank, example in enumerate(order, start=1):
            if k is None or rank <= k or rank > len(order) - k:
                rows.append((query, example, rank, float(scores.values[query, example])))
    return rows


@pytest.mark.parametrize("k", [None, 1, 2, 3, 4, 50])
def test_long_form_is_the_loop_over_scores(scores, candidates, k):
    for one in (scores, candidates):
        columns = long_rows(one, range(len(one)), k)
        names = ("query", "train", "rank", "score")
        assert list(zip(*(columns[n].tolist() for n in names), strict=True)) == looped(one, k)


def test_segments_sum_to_the_score_and_spread_is_that_of_the_members(scores):
    columns = long_rows(scores, range(3), None)
    np.testing.assert_allclose(columns["segment_1"] + columns["segment_2"], columns["score"])
    members = torch.stack([scores.values, 2 * scores.values, 6 * scores.values])
    mean = Scores(members.mean(0), members=members)
    columns = long_rows(mean, range(3), 2)
    expected = mean.spread[columns["query"], columns["train"]]
    np.testing.assert_allclose(columns["spread"], expected)


@pytest.mark.parametrize("k", [0, -1, True, 2.0])
def test_an_impossible_number_of_examples_is_refused(scores, k):
    with pytest.raises(ValueError, match="k must be at least 1"):
        long_rows(scores, range(3), k)


def test_pandas(scores):
    pandas = pytest.importorskip("pandas")
    frame = scores.to_pandas(k=2)
    assert isinstance(frame, pandas.DataFrame)
    assert frame.columns.tolist() == ["query", "train", "rank", "score", "segment_1", "segment_2"]
    assert frame[frame["rank"] == 1].train.tolist() == scores.values.argmax(1).tolist()
    assert frame.attrs["estimator"] == "Source"
    assert scores[1:].to_pandas().query("query == 2").score.max() == scores.values[2].max()
    edited = Scores(scores.values, provenance={"edits": [{"kind": "Removal", "index": 0}] * 7})
    assert "edit" in edited.to_pandas()


def test_parquet_in_several_groups(scores, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("tda_lightning.exports.frames._ROWS", 10)
    path = tmp_path / "new" / "scores.parquet"
    scores.to_parquet(path)
    file = parquet.ParquetFile(path)
    assert file.num_row_groups == 3
    assert file.read().to_pydict() == {
        name: values.tolist() for name, values in long_rows(scores, range(3), None).items()
    }
    assert json.loads(file.schema_arrow.metadata[b"tda_lightning"])["estimator"] == "Source"
    with pytest.raises(FileExistsError, match="overwrite=True"):
        scores.to_parquet(path)
    scores.to_parquet(path, k=1, overwrite=True)
    assert parquet.read_table(path).num_rows == 6
    assert [file.name for file in path.parent.iterdir()] == ["scores.parquet"]


def test_xarray(scores, candidates, tmp_path):
    xarray = pytest.importorskip("xarray")
    dataset = scores.to_xarray()
    assert dataset.by_segment.dims == ("segment", "query", "train")
    xarray.testing.assert_allclose(dataset.by_segment.sum("segment"), dataset.score)
    assert dataset.measurement.values.tolist() == [0.5, 1.5, 2.5]
    assert dataset.last_step.values.tolist() == [4, 9]
    assert candidates.to_xarray().candidates.shape == (2, 3)
    dataset.to_netcdf(tmp_path / "scores.nc")
    again = xarray.load_dataset(tmp_path / "scores.nc")
    xarray.testing.assert_equal(again.score, dataset.score)
    assert json.loads(again.attrs["segments"]) == [[0, 4], [4, 9]]


def test_a_missing_package_says_how_to_install_it(scores, tmp_path, monkeypatch):
    for name in ("pandas", "xarray", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'tda-lightning\[pandas\]'"):
        scores.to_pandas()
    with pytest.raises(ImportError, match=r"pip install 'tda-lightning\[xarray\]'"):
        scores.to_xarray()
    with pytest.raises(ImportError, match="pyarrow"):
        scores.to_parquet(tmp_path / "scores.parquet")


def test_the_training_table_counts_queries(scores, candidates):
    table = training_table(scores)
    for n in range(7):
        column = scores.values[:, n].tolist()
        assert table["harmed"][n] == sum(value < 0 for value in column)
        assert table["helped"][n] == sum(value > 0 for value in column)
        assert table["mean_score"][n] == pytest.approx(sum(column) / 3, rel=1e-12)
    with pytest.raises(ValueError, match="3 of 5 training examples"):
        training_table(candidates)


def test_label_issues_mark_the_largest_self_influence(scores):
    pytest.importorskip("pandas")
    frame = label_issues(scores, share=0.4, labels=list("abcdefg"))
    order = scores.self_influence.argsort(descending=True)[:3]
    assert set(np.flatnonzero(frame.is_label_issue)) == set(order.tolist())
    assert frame.label_quality.idxmin() == int(order[0])
    assert frame.given_label.tolist() == list("abcdefg")
    with pytest.raises(ValueError, match="share is the part"):
        label_issues(scores, share=5)
    with pytest.raises(ValueError, match="one for each of the 7"):
        label_issues(scores, share=0.1, labels=[1])
    with pytest.raises(ValueError, match="self_influence=True"):
        label_quality(Scores(scores.values))


def test_cleanlab_takes_the_issues(scores):
    """The real package trains without the marked examples."""
    classification = pytest.importorskip("cleanlab.classification")
    linear = pytest.importorskip("sklearn.linear_model")

    class Counting(linear.LogisticRegression):
        def fit(self, X, y, sample_weight=None):
            Counting.seen = X[:, 0].tolist()
            return super().fit(X, y, sample_weight)

    examples, labels = np.arange(7.0)[:, None], np.array([0, 1, 0, 1, 0, 1, 0])
    issues = label_issues(scores, share=2 / 7, labels=labels)
    learning = classification.CleanLearning(Counting())
    learning.fit(examples, labels, label_issues=issues)
    assert Counting.seen == np.flatnonzero(~issues.is_label_issue).tolist()


class Samples:
    """What FiftyOne's sample collections do, as documented: ``set_values(field, list)``."""

    def __init__(self, count):
        self.count, self.fields = count, {}

    def __len__(self):
        return self.count

    def set_values(self, field, values):
        assert len(values) == self.count and all(type(v) in (int, float) for v in values)
        self.fields[field] = values


def test_fiftyone_gets_a_field_for_each_column(scores):
    samples = Samples(7)
    names = add_to_fiftyone(samples, scores, queries=[2])
    assert names == list(samples.fields)
    assert samples.fields["tda_query_2"] == scores.values[2].tolist()
    assert samples.fields["tda_self_influence"] == scores.self_influence.tolist()
    assert samples.fields["tda_index"] == list(range(7))
    with pytest.raises(ValueError, match="expected 7 samples, got 6"):
        add_to_fiftyone(Samples(6), scores)


def test_wandb_tables(scores, candidates):
    pytest.importorskip("wandb")
    from tda_lightning.exports import wandb_tables
    from tda_lightning.records.rendered import Rendered

    def render(split, index):
        return Rendered(text=f"{split} {index}")

    tables = wandb_tables(scores, k=2, render=render)
    pairs = tables["tda/pairs"]
    assert [row[:4] for row in pairs.data] == [list(row) for row in looped(scores, 2)]
    train, shown = pairs.columns.index("train"), pairs.columns.index("train_example")
    assert all(row[shown] == f"train {row[train]}" for row in pairs.data)
    assert len(tables["tda/training"].data) == 7
    assert list(wandb_tables(candidates)) == ["tda/pairs"]
