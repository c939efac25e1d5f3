"""The numbers behind the workbench, against slow and obvious ones."""

import io
import math
import re
import wave
from base64 import b64decode

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.utils.data import Subset, TensorDataset

from tda_lightning.records.scores import Scores
from tda_lightning.report import Rendered, write_report
from tda_lightning.report.agreement import agreement, ranks, require_comparable, spearman
from tda_lightning.report.columns import Column, group, guess, raw_labels
from tda_lightning.report.groups import group_sums, matrix, proponents_in_all, regions
from tda_lightning.report.page import page_script
from tda_lightning.report.query_order import judge, relative_spread
from tda_lightning.report.sounds import sound
from tda_lightning.report.triage import triage
from tests.report.test_report import Page

QUERIES, TRAIN, CLASSES = 7, 240, 3


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(2, QUERIES, TRAIN, generator=generator, dtype=torch.float64)
    return Scores(parts.sum(0), parts)


@pytest.fixture
def label():
    return column("label", CLASSES, np.arange(TRAIN) % CLASSES, np.arange(QUERIES) % 2)


def column(name, count, train, query):
    return Column(name, tuple("abcdefgh"[:count]), train, query)


def unpacked(packed):
    ((form, text),) = packed.items()
    return np.frombuffer(b64decode(text), f"<{form}")


def test_triage(scores, label):
    found = triage(scores, label)
    for n in range(TRAIN):
        own = scores.values[:, n]
        # 1% of 240 are 3, rounded up.
        harmed = [own[q] in scores.values[q].sort().values[:3] and own[q] < 0 for q in range(7)]
        assert found.harmed[n] == sum(harmed)
        assert found.net[n] == pytest.approx(float(own.sum()), rel=1e-9)
        # No query is of class c.
        harm = {c: -float(own[c::2].mean()) for c in range(2) if c != n % CLASSES}
        worst = max(harm, key=harm.get)
        if harm[worst] <= 0:
            assert (found.disagreement[n], found.suggested[n]) == (0, -1)
            continue
        assert found.disagreement[n] == pytest.approx(harm[worst], rel=1e-9)
        assert found.suggested[n] == worst


def test_triage_without_labels_and_with_candidates(scores):
    values = torch.full((1, 5), torch.nan)
    values[0, [1, 3]] = torch.tensor([-1.0, 2.0])
    found = triage(Scores(values, candidates=torch.tensor([[3, 1]])), None)
    assert found.harmed.tolist() == [0, 1, 0, 0, 0]
    assert found.net.tolist() == [0, -1, 0, 2, 0]
    assert found.disagreement is None


def test_sums_of_groups(scores, label):
    (sums,) = group_sums(scores, [label])
    torch.testing.assert_close(sums.sums, scores.by_group(label.train.tolist()).values)
    torch.testing.assert_close(sums.by_segment.sum(0), sums.sums)
    means = matrix(sums.sums, label)
    for asked in range(2):
        for group_ in range(CLASSES):
            block = scores.values[asked::2, group_::CLASSES]
            expected = float(block.sum(1).mean())
            assert float(means[asked, group_]) == pytest.approx(expected, rel=1e-9)
    assert means[2].tolist() == [0, 0, 0]


def test_regions_that_are_hardly_covered():
    values = torch.tensor([[1.0, 1, 1, 1, -1], [1, 1, 1, 1, 0], [0, 0, 0.5, 0, -3.0]])
    asked = column("label", 3, np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2]))
    scores = Scores(values, provenance={"measurements": [1.0, 2.0, 3.0]})
    strength, number = proponents_in_all(scores)
    assert (strength.tolist(), number.tolist()) == ([4, 4, 0.5], [4, 4, 1])
    judged = judge(scores, scores.provenance, asked, ["a (10%)", "a", "d"])
    assert judged.wrong == [False, True, None]
    assert judged.order(3) == [1, 2, 0]
    rows = regions(strength, number, [asked], judged)
    assert [row.group for row in rows] == ["c", "a", "b"]
    assert [row.few_and_weak for row in rows] == [True, False, False]
    assert [row.wrong for row in rows] == [None, 0, 1]
    assert [row.training for row in rows] == [0, 3, 2]


def test_predictions_that_name_no_class_are_not_wrong(scores, label):
    assert judge(scores, {}, label, ["strength 3.5"] * QUERIES).wrong == []
    named = column("label", 2, np.array([0, 1]), np.array([0, 1]))
    named = Column("label", ("label 0", "label 1"), named.train, named.query)
    pair = Scores(torch.ones(2, 2))
    assert judge(pair, {}, named, ["0", "0 (60%)"]).wrong == [False, True]


def test_rank_correlation_is_scipys():
    generator = np.random.default_rng(0)
    for size in (2, 5, 40):
        one, two = generator.integers(0, 6, size), generator.integers(0, 6, size)
        if len(set(one)) > 1 and len(set(two)) > 1:
            found = spearman(torch.from_numpy(one).double(), torch.from_numpy(two).double())
            assert found == pytest.approx(spearmanr(one, two)[0], abs=1e-11)
    assert spearman(torch.ones(3), torch.arange(3.0)) == 0
    assert ranks(torch.tensor([1.0, torch.nan, 3.0])).tolist() == [1, 2, 0]


def test_agreement_is_over_what_both_have_scored():
    one = Scores(torch.tensor([[1.0, torch.nan, 3.0, 2.0]]), candidates=torch.tensor([[0, 2, 3]]))
    other = Scores(torch.tensor([[3.0, 9.0, 1.0, 2.0]]))
    found = agreement(one, other, [0])
    assert (found.rank, found.overlap) == ([-1.0], [1.0])
    with pytest.raises(ValueError, match=r"expected \[1, 4\], got \[1, 3\] in b"):
        require_comparable(one, {"a": other, "b": Scores(torch.ones(1, 3))})


def test_spread_of_an_ensemble():
    members = torch.tensor([[[1.0, 2.0]], [[3.0, 2.0]]], dtype=torch.float64)
    scores = Scores(members.mean(0), members=members)
    assert relative_spread(scores) == [pytest.approx(1 / math.sqrt(8), rel=1e-12)]
    assert relative_spread(Scores(members[0])) == []


class TestColumns:
    def test_numbers_of_many_values_are_cut_into_quarters(self):
        (age,) = group({"age": np.arange(100.0)}, {"age": [-5.0, 99.0, 50.0]}, [1, 0, 2])
        assert len(age.groups) == 4
        assert np.bincount(age.train).tolist() == [25, 25, 25, 25]
        assert age.query.tolist() == [3, 0, 2]
        assert age.groups[0].startswith("\N{LESS-THAN OR EQUAL TO} ")

    def test_rare_values_are_together(self):
        words = [f"w{n // 2}" for n in range(200)]
        (column,) = group({"word": words}, {"word": ["new"]}, [0])
        assert len(column.groups) == 40 and column.groups[-1] == "other"
        assert column.query.tolist() == [39]

    def test_texts_that_never_repeat_and_constants_group_nothing(self):
        columns = {"id": [f"i{n}" for n in range(100)], "one": [1] * 100}
        assert group(columns, {}, [0]) == []

    def test_the_label_comes_first(self):
        columns = group({"source": ["a", "b"], "class": ["x", "y"]}, {"class": ["y"]}, [0])
        assert [(column.name, column.is_label) for column in columns] == [
            ("class", True),
            ("source", False),
        ]
        assert columns[1].query is None

    @pytest.mark.parametrize(
        ("dataset", "labels"),
        [
            (TensorDataset(torch.rand(3, 2), torch.tensor([2, 0, 1])), [2, 0, 1]),
            (Subset(TensorDataset(torch.rand(3, 2), torch.tensor([2, 0, 1])), [2, 0]), [1, 2]),
            ([("text", "a"), ("text", "b")], ["a", "b"]),
            ([{"x": 1, "label": 3}], [3]),
            ([1, 2], None),
            (TensorDataset(torch.rand(3, 2)), None),
            (TensorDataset(torch.rand(3, 2), torch.rand(3, 4)), None),
            (None, None),
        ],
    )
    def test_labels_are_found(self, dataset, labels):
        assert raw_labels(dataset) == labels

    def test_named_and_guessed(self):
        data = TensorDataset(torch.rand(3, 2), torch.tensor([0, 1, 5]))
        found = guess(data, ["cat", "dog"])
        assert found["label"] == ["cat", "dog", "label 5"]
        assert set(found) == {"label", "x0", "x1"}
        assert "label" not in guess(TensorDataset(torch.rand(3, 2), torch.rand(3)))

    def test_of_another_length_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="each of the 3 training examples, got 2 in 'a'"):
            write_report(Scores(torch.ones(1, 3)), tmp_path / "r.html", columns={"a": [1, 2]})
        with pytest.raises(ValueError, match="query 1 was scored; got 1 in 'a'"):
            write_report(Scores(torch.ones(2, 3)), tmp_path / "r.html", query_columns={"a": [1]})


class TestSounds:
    def samples(self, uri):
        with wave.open(io.BytesIO(b64decode(uri.partition(",")[2]))) as file:
            assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
            return file.getframerate(), np.frombuffer(file.readframes(10**6), "<i2")

    def test_samples_are_kept(self):
        rate, kept = self.samples(sound(torch.tensor([0.0, 0.5, -1.0]), 8000))
        assert (rate, kept.tolist()) == (8000, [0, 16384, -32767])

    def test_two_channels_at_a_high_rate(self):
        rate, kept = self.samples(sound(np.ones((2, 5 * 44100)), 44100))
        assert rate == 44100 // 5
        assert len(kept) == 4 * 44100 // 5
        assert set(kept.tolist()) == {32767}

    def test_integers_loud_and_odd_ones(self):
        assert self.samples(sound(np.array([0, 32767], np.int16), 8000))[1][1] == 32767
        assert self.samples(sound(np.array([np.nan, 4.0, -2.0]), 8000))[1].tolist() == [
            0,
            32767,
            -16384,
        ]
        with pytest.raises(ValueError, match=r"the shape \[sample\] or .* got \[2, 2, 2\]"):
            sound(np.zeros((2, 2, 2)), 8000)
        with pytest.raises(ValueError, match="must be positive samples per second, got 0"):
            sound(np.zeros(3), 0)

    def test_a_player(self, tmp_path):
        path = write_report(
            Scores(torch.tensor([[1.0, -1.0]])),
            tmp_path / "report.html",
            render=lambda split, index: Rendered(sound=(torch.zeros(80), 8000)),
        )
        page = Page(path)
        page.require_harmless()
        assert page.elements.count("audio") == 3
        assert page.numbers["examples"]["train-0"]["sound"] == ""  # taken from the section


def test_what_a_page_of_many_examples_keeps(tmp_path):
    many = 110_000
    values = torch.randn(3, many, generator=torch.Generator().manual_seed(0))
    scores = Scores(values, self_influence=values[0].abs())
    path = write_report(
        scores,
        tmp_path / "report.html",
        render=lambda split, index: Rendered(text=f"{index} " * 300),
        columns={"source": np.arange(many) % 5},
    )
    assert path.stat().st_size < 10 * 2**20
    numbers = Page(path).numbers
    kept = unpacked(numbers["train"]["index"])
    assert len(kept) == 100_000
    assert set(scores.self_influence.topk(1000).indices.tolist()) <= set(kept.tolist())
    own = unpacked(numbers["train"]["selfInfluence"])
    assert np.array_equal(own, scores.self_influence.numpy()[kept])
    (source,) = numbers["columns"]
    assert np.array_equal(unpacked(source["train"]), kept % 5)
    listed = numbers["lists"]["1"]
    assert set(unpacked(listed["index"])) == {
        *scores.proponents(1, 50)[0].tolist(),
        *scores.opponents(1, 50)[0].tolist(),
    }
    assert sum(listed["histogram"]["counts"]) == many


def test_scores_at_the_edge_of_their_type(tmp_path):
    huge = Scores(torch.tensor([[1.7e308, 1.7e308, -1.7e308]], dtype=torch.float64))
    Page(write_report(huge, tmp_path / "r.html", columns={"label": ["a", "a", "b"]}))
    Page(write_report(Scores(torch.zeros(2, 3)), tmp_path / "r.html"))


def test_the_script_makes_text_nodes_only():
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
    ):
        assert word not in page_script()
    # Nothing is fetched, and nothing in it ends the element that it stands in.
    assert not re.search(r"fetch\(|XMLHttp|https?://(?!www\.w3\.org/2000/svg)", page_script())
    assert "</script" not in page_script().lower() and "<!--" not in page_script()
