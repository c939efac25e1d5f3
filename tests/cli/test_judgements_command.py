"""``tda evaluate judge=... simulate=...``: judgements without retraining."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import TensorDataset

from tda_lightning import Scores
from tda_lightning.cli import main
from tda_lightning.cli.judgements import check_judgements, judged_rows
from tda_lightning.cli.judgements_table import judgements_notes, judgements_table
from tda_lightning.cli.simulation import overshoot_note
from tda_lightning.evaluation import (
    Interval,
    Simulation,
    shared_group,
    times_similarity,
    top_cardinality,
)
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.tasks import ClassificationTask
from tests.cli.test_evaluate_command import TINY

# Training examples of the classes 0, 0, 1, 1; the last two carry a mark. The model says 1 to
# positive inputs.
TRAIN = TensorDataset(torch.tensor([[-1.0], [-2.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1]))
QUERY = TensorDataset(torch.tensor([[-3.0], [3.0], [5.0]]), torch.tensor([0, 1, 0]))
VALUES = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 4.0, 1.0]])


class Data:
    train_dataset, query_dataset = TRAIN, QUERY

    def group_columns(self, split):
        if split == "train":
            columns = {"mark": ["no", "no", "yes", "yes"], "kind": ["a", "b", "c", "c"]}
            return {**columns, "alien": ["no", "no", "no", "yes"]}
        return {"mark": ["no", "yes", "yes"], "kind": ["b", "c", "a"], "alien": ["no"] * 3}


def run(**settings):
    module = nn.Linear(1, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        module.bias.zero_()
    defaults = {"k": 2, "baselines": [], "subclass": None, "marked": None, "similarity": False}
    return SimpleNamespace(
        config=OmegaConf.create({**defaults, "batch_size": 2, "seed": 0, **settings}),
        data=Data(),
        task=ClassificationTask(),
        module=module,
        end=dict(module.state_dict()),
        train=ExampleSource.of(TRAIN, 2, "training"),
        queries=ExampleSource.of(QUERY, 2, "query"),
    )


def judged(**settings):
    (row, *others) = judged_rows(run(**settings), {"own": Scores(VALUES)})
    return row.values, others


def test_classes_subclasses_and_different_proponents():
    values, _ = judged(judge=["class", "subclass", "cardinality"], subclass="kind")
    # Top two: 0 1, 3 2 and 2 0; the queries' classes 0 1 0, kinds b c a.
    assert values["class"].per_query.tolist() == [1, 1, 0.5]
    assert values["subclass"].per_query.tolist() == [0.5, 1, 0.5]
    assert values["cardinality"] == pytest.approx(4 / 6)


def test_marked_examples_are_sought_for_marked_queries():
    values, _ = judged(judge=["mixed", "shortcut"], marked={"mark": "yes"})
    # Query 1 ranks them 1 and 2; query 2, of class 0 and taken for class 1, ranks them 1 and 4.
    assert values["mixed"].per_query.tolist() == pytest.approx([1, (1 + 2 / 4) / 2])
    assert values["shortcut"].per_query.tolist() == pytest.approx([(1 + 2 / 4) / 2])
    values, _ = judged(judge=["shortcut"], marked={"kind": "b"})
    assert values["shortcut"] == "no marked query is misled"


def test_scores_times_similarity_and_impossible_baselines_have_rows():
    asked = {"judge": ["class"], "similarity": True, "baselines": ["random", "bm25"]}
    asked_run = run(**asked)
    rows = list(judged_rows(asked_run, {"own": Scores(VALUES)}))
    assert [row.name for row in rows] == ["own", "own x last_layer", "random", "bm25"]
    cosines = torch.tensor([[1.0, 1.0, -1.0, -1.0], [-1.0, -1.0, 1.0, 1.0], [-1.0, -1.0, 1.0, 1.0]])
    expected = shared_group(times_similarity(Scores(VALUES), cosines), [0, 0, 1, 1], [0, 1, 0], 2)
    assert rows[1].values["class"].value == expected.value
    assert rows[3].values["class"].startswith("not possible: ")
    notes = judgements_notes(rows, asked_run.config)
    assert "share of the top 2 proponents" in notes and "No class of bm25: not possible" in notes
    assert judgements_table(rows, ["class"]).row_count == 4
    assert rows[3].as_json()["class"] == {"reason": rows[3].values["class"]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge": ["classes"]}, "judge must be among class, subclass"),
        ({"judge": ["subclass"]}, "needs subclass=COLUMN"),
        ({"judge": ["mixed"]}, r"need marked=\{COLUMN: VALUE\}"),
        ({"judge": ["shortcut"], "marked": {"a": 1, "b": 2}}, r"need marked=\{COLUMN: VALUE\}"),
        ({"judge": ["subclass"], "subclass": "shape"}, "no column 'shape'.* mark, kind"),
        ({"judge": ["mixed"], "marked": {"mark": "maybe"}}, "holds no, yes"),
        ({"judge": ["mixed"], "marked": {"alien": "yes"}}, "No query has alien='yes'.* holds no"),
    ],
)
def test_what_cannot_be_judged_is_said(settings, message):
    asked = run(**settings)
    with pytest.raises(ValueError, match=message):  # noqa: PT012
        check_judgements(asked.config)
        list(judged_rows(asked, {"own": Scores(VALUES)}))


def test_a_shortcut_leads_to_one_class(monkeypatch):
    columns = {"mark": ["yes", "no", "yes", "no"]}
    monkeypatch.setattr(Data, "group_columns", lambda self, split: columns)
    with pytest.raises(ValueError, match="one class, and the marked examples have 2"):
        judged(judge=["shortcut"], marked={"mark": "yes"})


def test_steps_that_overshoot_are_said():
    def simulated(helpful, harmful, steps=1):
        agrees = {"helpful": helpful, "harmful": harmful, "random": 0.0}
        agrees = {kind: Interval(share, 0, 1, torch.zeros(0)) for kind, share in agrees.items()}
        return Simulation(steps, agrees, agrees, agrees["random"])

    asked = run(simulate_rate=0.5)
    note = overshoot_note(asked, {"gradient_dot": [simulated(0.25, 1.0)]})
    assert "rate of 0.5 overshoots" in note and "in 25% of the cases" in note
    assert overshoot_note(asked, {"gradient_dot": [simulated(0.8, 1.0)]}) is None
    assert overshoot_note(asked, {"gradient_dot": [simulated(0.2, 0.2, steps=5)]}) is None
    assert overshoot_note(asked, {"own": [simulated(0.2, 0.2)]}) is None


def test_the_command_judges_and_simulates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY]) == 0
    assert main(["attribute", "runs/digits", "estimator=tracin"]) == 0
    capsys.readouterr()
    given = ["evaluate", "runs/digits", "judge=[class,cardinality,randomisation]", "k=3"]
    given += ["baselines=[random,gradient_dot]", "simulate=[1]", "simulate_queries=2"]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "Judged without retraining" in out and "Fine-tuning on single" in out
    assert not (tmp_path / "runs/digits/ground_truth").exists()  # nothing was retrained
    found = json.loads((tmp_path / "runs/digits/scores/judgements.json").read_text())
    tracin, chance, dot = found["judgements"]
    scores = Scores.load(tmp_path / "runs/digits/scores/tracin.h5")
    assert tracin["cardinality"]["value"] == top_cardinality(scores, 3)
    assert -1 < tracin["randomisation"]["value"] < 1
    assert abs(chance["randomisation"]["value"]) < 0.5
    assert dot["name"] == "gradient_dot"
    (one,) = found["simulatability"]["gradient_dot"]
    assert one["rank"]["value"] > 0.9 and one["agrees"]["helpful"]["value"] == 1
    assert list(found["simulatability"]) == ["tracin", "random", "gradient_dot"]
    assert main(["evaluate", "runs/digits", "judge=[clas]"]) != 0
    assert "judge must be among" in capsys.readouterr().err
