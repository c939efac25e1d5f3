"""``tda reweight``: weights from scores, from words and from columns, and what they do."""

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import TensorDataset

from tda_lightning import Scores
from tda_lightning.cli import main
from tda_lightning.cli.commands.reweight import _columns, _require_same_queries
from tda_lightning.reweighting import load_weights, predicted_change, weights_from_scores
from tests.cli.made_up_pairs import TINY, write_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")
    write_pairs(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert main(["train", *TINY, "optimizer=sgd", "optimizer.lr=0.3"]) == 0
        assert main(["attribute", "runs/pairs", "estimator=unrolled", "data.num_query=4"]) == 0
        yield path


def test_weights_from_scores(folder, capsys):
    scores = "scores=runs/pairs/scores/unrolled.h5"
    assert main(["reweight", "runs/pairs", scores, "rate=0.02"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    weights, found = load_weights("runs/pairs/weights-scores.csv"), Scores.load(scores[7:])
    assert torch.equal(weights, weights_from_scores(found.values, 0.02, 4.0))
    assert "Weighted 20 training examples" in out
    assert "Mean measurement of 4 queries" in out  # as many as were scored
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
    columns = ["reweight", "runs/pairs", "by=columns", "weights=x.csv"]
    assert main([*columns, "columns=[colour]"]) == 1
    assert "columns must be some of class, gold label" in capsys.readouterr().err
    assert main([*columns, "columns=[gold label]"]) == 1
    assert "Each value of gold label comes with one label alone" in capsys.readouterr().err


def test_columns_that_are_the_label_are_left_out(capsys):
    class Data:
        train_dataset = TensorDataset(torch.zeros(4, 1), torch.tensor([0, 0, 1, 1]))

        def group_columns(self, split):
            assert split == "train"
            return {"class": list("aabb"), "finer": list("axbb"), "colour": list("rggr")}

    labels = Data.train_dataset.tensors[1].tolist()
    asked = OmegaConf.create({"columns": None})
    assert list(_columns(asked, Data(), labels)) == ["colour"]
    said = capsys.readouterr().out
    assert said == "Left out, since each of its values comes with one label alone: finer.\n"


def test_other_queries_are_refused():
    measured, asked = torch.tensor([0.5, 0.7]).double(), OmegaConf.create({"scores": "few.h5"})
    scores = Scores(torch.zeros(2, 3), provenance={"measurements": [0.5001, 0.7]})
    _require_same_queries(scores, measured, asked)
    with pytest.raises(ValueError, match=r"other queries than these: .* 0.7 for query 1, and 0.8"):
        _require_same_queries(scores, torch.tensor([0.5, 0.8]), asked)


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
