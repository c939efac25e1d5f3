"""``tda reweight``: weights from scores, from words and from columns, and what they do."""

import pytest
import torch

from tda_lightning import Scores
from tda_lightning.cli import main
from tda_lightning.reweighting import load_weights, predicted_change, weights_from_scores
from tests.cli.made_up_pairs import TINY, write_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")
    write_pairs(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert main(["train", *TINY, "optimizer=sgd", "optimizer.lr=0.3"]) == 0
        assert main(["attribute", "runs/pairs", "estimator=unrolled"]) == 0
        yield path


def test_weights_from_scores(folder, capsys):
    scores = "scores=runs/pairs/scores/unrolled.h5"
    assert main(["reweight", "runs/pairs", scores, "rate=0.02"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    weights, found = load_weights("runs/pairs/weights-scores.csv"), Scores.load(scores[7:])
    assert torch.equal(weights, weights_from_scores(found.values, 0.02, 4.0))
    assert "Weighted 20 training examples" in out
    predicted = float(predicted_change(found.values, weights).mean())
    assert f"predicted change │ {predicted:.5g}" in out
    true = float(out.split("true change │")[1].split("│")[0])
    # The scores are the derivative, and the step is small; float32 leaves few digits of it.
    assert abs(true - predicted) < 0.05 * abs(predicted)
    assert main(["reweight", "runs/pairs", scores]) == 1
    assert "overwrite=true" in capsys.readouterr().err


def test_weights_from_words_and_columns(folder, capsys):
    few = ["min_count=3", "retrain=false"]
    assert main(["reweight", "runs/pairs", "by=words", *few]) == 0
    assert "What 10 features say about the label" in capsys.readouterr().out
    weights = load_weights("runs/pairs/weights-words.csv")
    assert abs(float(weights.sum()) - 20) < 1e-9
    columns = ["by=columns", "columns=[gold label]"]
    assert main(["reweight", "runs/pairs", *columns, *few]) == 0
    assert main(["reweight", "runs/pairs", *columns[:1], "columns=[colour]", "weights=x.csv"]) == 1
    assert "columns must be some of class, gold label" in capsys.readouterr().err


@pytest.mark.slow  # it starts the command six times
def test_what_cannot_be(folder, capsys):
    for asked, message in (
        ("by=luck", "by must be one of scores, words, columns"),
        ("by=words", "min_count"),
        ("by=scores", "takes its weights from scores=FILE"),
        ("bound=0.5", "bound must be at least 1"),
    ):
        scores = [] if asked.startswith("by") else ["scores=runs/pairs/scores/unrolled.h5"]
        given = [asked, "min_count=30", "weights=x.csv", *scores]
        assert main(["reweight", "runs/pairs", *given]) == 1
        assert message in capsys.readouterr().err
    assert main(["attribute", "runs/pairs", "estimator=tracin", "pool={num_train: 30}"]) == 0
    pool = "scores=runs/pairs/scores/tracin-pool-num_train-30.h5"
    assert main(["reweight", "runs/pairs", pool, "weights=x.csv"]) == 1
    assert "expected the removals of the 20" in capsys.readouterr().err
