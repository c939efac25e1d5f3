"""What the page says of scores that are about something else than a loss, or than removals."""

from __future__ import annotations

import torch

from tda_lightning.records.rendered import Rendered
from tda_lightning.records.scores import Scores
from tda_lightning.report import write_report

ASKED = {"quantity": "the probability of class 3", "sign": -1}


def page(scores, path, **options):
    pieces = (("It", None), (" was", 0), (" here", 1))
    render = options.pop("render", lambda split, index: Rendered(text="It was here", pieces=pieces))
    written = write_report(scores, path / "report.html", render=render, **options)
    return " ".join(written.read_text(encoding="utf-8").split())


def test_a_probability_falls_without_a_proponent(tmp_path):
    values = torch.tensor([[0.5, -0.25]])
    text = page(
        Scores(values, provenance={"measurement": ASKED, "measurements": [-0.75]}), tmp_path
    )
    assert "removing one is predicted to lower the probability of class 3 by its score" in text
    assert "removing one is predicted to raise the probability of class 3 by its score" in text
    assert '<dt>The probability of class 3</dt><dd class="numeric">0.75</dd>' in text
    assert "The scores are about the probability of class 3." in text
    plain = page(Scores(values, provenance={"measurements": [0.75]}), tmp_path)
    assert "removing one is predicted to raise the measurement by its score" in plain
    assert '<dt>Measurement</dt><dd class="numeric">0.75</dd>' in plain


def test_words_of_the_query_are_shaded_by_what_the_proponents_shown_did(tmp_path):
    tokens = torch.tensor([[[3.0, -9.0, 1.0], [1.0, 4.0, -2.0]]])  # [query, position, train]
    scores = Scores(tokens.sum(1), by_query_token=tokens)
    text = page(scores, tmp_path)
    # The only proponent is example 0: +3 and +1.
    assert '<span class="token proponent" style="--share: 100.0%" title="+3.00"> was</span>' in text
    assert '<span class="token proponent" style="--share: 33.3%" title="+1.00"> here</span>' in text
    assert "Words are shaded by what the examples that helped most" in text


def test_a_pool_shows_what_would_help_first(tmp_path):
    same = {"size": 3, "in_training": 1, "same": [[2, 17]]}
    provenance = {"pool": same, "edits": [{"kind": "Addition"}] * 3}
    scores = Scores(torch.tensor([[0.5, -0.25, -1.0]]), provenance=provenance)
    shown = page(scores, tmp_path, pool=lambda index: Rendered(text=f"text of {index}"))
    help_, harm = shown.index("Would help most"), shown.index("Would harm most")
    assert help_ < shown.index("text of 2") < shown.index("text of 1") < harm
    assert harm < shown.index("text of 0")
    assert "is training example 17 too" in shown
    assert "adding one is predicted to lower the measurement by its score" in shown
    assert "3 examples that were not in training" in shown
    assert "1 are in it already" in shown
