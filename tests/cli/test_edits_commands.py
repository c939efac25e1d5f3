"""From marks to scores and to another training: ``tda attribute edits=FILE``, ``tda train
drop=FILE``."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from tda_lightning import Scores, Trajectory
from tda_lightning.cli import main
from tda_lightning.cli.edited_data import Drop, as_trained, read_drop, without
from tda_lightning.cli.run_config import build, load_config
from tda_lightning.edits import Relabel, Removal, save_edits
from tda_lightning.examples.data import DigitsData

TINY = ["experiment=digits", "data.num_train=60", "data.num_query=3", "trainer.max_epochs=2"]


def digits():
    return DigitsData(num_train=60, num_query=3)


def test_from_marks_to_scores_and_to_another_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    label = int(digits().train_dataset[5][1])
    other = (label + 1) % 10
    save_edits([Removal(3), Relabel(5, other)], "edits.json", num_train=60)
    assert main(["train", *TINY]) == 0
    assert main(["attribute", "runs/digits", "estimator=tracin"]) == 0
    assert main(["attribute", "runs/digits", "estimator=tracin", "edits=edits.json"]) == 0
    whole = Scores.load("runs/digits/scores/tracin.h5")
    scores = Scores.load("runs/digits/scores/tracin-edits-edits.json.h5")
    # In float32, summed in batches of other sizes.
    torch.testing.assert_close(scores.values[:, 0], whole.values[:, 3], rtol=1e-5, atol=0)
    assert [edit["kind"] for edit in scores.provenance["edits"]] == ["Removal", "Relabel"]
    assert "Scored 2 edits for 3 queries" in capsys.readouterr().out
    assert main(["attribute", "runs/digits", "edits=edits.json", "relabel={3: 7}"]) == 1
    assert "not both" in capsys.readouterr().err

    both = "compare=[runs/digits/scores/tracin-edits-edits.json.h5]"
    assert main(["report", "runs/digits/scores/tracin.h5", both]) == 1
    assert "expected [3, 60], got [3, 2]" in capsys.readouterr().err
    both = "compare=[runs/digits/scores/tracin.h5]"
    assert main(["report", "runs/digits/scores/tracin.h5", both, "max_megabytes=1.0"]) == 0
    page = tmp_path / "runs" / "digits" / "scores" / "tracin.html"
    assert '"others":["tracin"]' in page.read_text(encoding="utf-8")
    assert page.stat().st_size < 2**20

    # Another training, which remembers what it left out when the file is gone.
    assert main(["train", *TINY, "output=runs/second", "drop=edits.json"]) == 0
    assert "without 1 training examples and with 1 other labels" in capsys.readouterr().out
    (tmp_path / "edits.json").unlink()
    config = load_config("runs/second")
    data = as_trained(config, build(config.data, False))
    assert len(data.train_dataset) == 59
    assert torch.equal(data.train_dataset[3][0], digits().train_dataset[4][0])
    assert int(data.train_dataset[4][1]) == other
    assert Trajectory.load("runs/second").facts.num_examples == 59
    assert main(["attribute", "runs/second", "estimator=tracin"]) == 0
    assert Scores.load("runs/second/scores/tracin.h5").num_train == 59
    assert main(["report", "runs/second/scores/tracin.h5"]) == 0
    page = (tmp_path / "runs" / "second" / "scores" / "tracin.html").read_text(encoding="utf-8")
    assert f"relabelled as {other}, was {label}" in page

    # Indices of the second run count what the first file left.
    save_edits([Removal(3)], "again.json", num_train=59)
    assert main(["train", *TINY, "output=runs/third", "drop=again.json"]) == 1
    assert "count 59 training examples, the training set has 60" in capsys.readouterr().err


def test_several_files_in_turn(tmp_path):
    save_edits([Removal(1), Relabel(4, 9)], tmp_path / "a.json", num_train=6)
    save_edits([Removal(1), Removal(3)], tmp_path / "b.json", num_train=5)
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    # Of 0 2 3 4 5, those at 1 and 3 are 2 and 4.
    assert read_drop(files, 6) == Drop((1, 2, 4), {})
    save_edits([Removal(index) for index in range(6)], tmp_path / "all.json", num_train=6)
    with pytest.raises(ValueError, match="leaves none of the 6"):
        read_drop(str(tmp_path / "all.json"), 6)


class Own:
    """A data module of a user's, whose loader does not go through ``train_dataset``."""

    def __init__(self, **options):
        self.examples = TensorDataset(torch.arange(4.0)[:, None], torch.arange(4))
        self.options = options

    @property
    def train_dataset(self):
        return self.examples

    def train_dataloader(self):
        return DataLoader(self.examples, batch_size=2, **self.options)


class Plain(Own):
    """One that names no training set."""

    train_dataset = None


@pytest.mark.parametrize("kind", [Own, Plain])
def test_a_loader_over_the_whole_data_set(kind):
    data = without(kind(), Drop((0, 2), {3: 7}))
    (batch,) = list(data.train_dataloader())
    assert batch[0].flatten().tolist() == [1, 3]
    assert batch[1].tolist() == [1, 7]
    sampled = without(Own(sampler=WeightedRandomSampler([1.0] * 4, 4)), Drop((0,), {}))
    with pytest.raises(ValueError, match="loader with WeightedRandomSampler"):
        sampled.train_dataloader()


def test_examples_that_cannot_be_relabelled():
    data = Own()
    data.examples = [torch.zeros(1)]
    with pytest.raises(ValueError, match="expected a tuple with the label last"):
        without(data, Drop((), {0: 1})).train_dataset[0]
    data = Own()
    with pytest.raises(ValueError, match=r"has the shape \[\], its new label \[1, 2\] has \[2\]"):
        without(data, Drop((), {0: [1, 2]})).train_dataset[0]


def test_groups_follow_new_labels():
    whole = digits()
    label, other = (int(whole.train_dataset[index][1]) for index in (5, 3))
    data = without(digits(), Drop((0,), {5: other}))
    column = data.group_columns("train")["class"]
    assert len(column) == 59
    assert column[4] == str(other) != str(label)
    assert data.train_dataset.labels[4] == other
    assert data.group_columns("query") == whole.group_columns("query")
