"""Which listed proponents stand for the others: by their scores for all queries, or by features."""

import json
import re

import pytest
import torch

from tda_lightning.evaluation import representatives
from tda_lightning.records.scores import Scores
from tda_lightning.report import write_report
from tda_lightning.report.stand_ins import stand_ins
from tests.report.test_numbers import unpacked


def copies():
    """Query 0 has ten proponents of three kinds: six, three and one copies, and two opponents."""
    kinds = [0] * 6 + [1] * 3 + [2] + [0, 1]
    others = torch.eye(3, dtype=torch.float64)[kinds].T.repeat(2, 1)  # queries 1 to 6
    own = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 3, -5, -6], dtype=torch.float64)
    return Scores(torch.cat([0.01 * own[None], others])), kinds


@pytest.mark.parametrize("helps", [1, -1])
def test_one_stands_for_each_kind_of_copies(helps):
    scores, kinds = copies()
    listed = torch.tensor([0, 10, 1, 11, 2, 3, 4, 5, 6, 7, 8, 9])
    given = Scores(helps * scores.values)
    shares = stand_ins(given, 0, listed, helps, None)
    chosen = listed[shares > 0].tolist()
    assert {kinds[index] for index in chosen} == {0, 1, 2} and 10 not in chosen and 11 not in chosen
    assert float(shares.sum()) == pytest.approx(1)
    # By features, as the function that takes all proponents does it.
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    shares = stand_ins(given, 0, listed, helps, features)
    all_ = representatives(scores, features, query=0, k=4)
    assert set(listed[shares > 0].tolist()) == set(all_.examples.tolist())


def test_too_little_to_tell():
    scores, _ = copies()
    assert stand_ins(scores, 0, torch.arange(7), 1, None) is None
    assert stand_ins(Scores(scores.values[:4]), 0, torch.arange(12), 1, None) is None
    assert stand_ins(Scores(scores.values[:4]), 0, torch.arange(12), 1, torch.eye(12)) is not None


def test_the_page_holds_the_shares_of_its_lists(tmp_path):
    scores, _ = copies()
    page = write_report(scores, tmp_path / "page.html").read_text(encoding="utf-8")
    data = json.loads(
        re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page)[1]
    )
    entry = data["lists"]["0"]
    listed = torch.from_numpy(unpacked(entry["index"]).copy()).long()
    expected = stand_ins(scores, 0, listed, 1, None)
    assert unpacked(entry["stands"]).tolist() == pytest.approx(expected.tolist())
    with pytest.raises(ValueError, match=r"features must be \[12, feature\], got \[3, 2\]"):
        write_report(scores, tmp_path / "x.html", features=torch.zeros(3, 2))
