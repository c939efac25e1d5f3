"""What records show at a prompt and in a notebook, and the scores of one query."""

import pytest
import torch

from tda_lightning.records.gradient_errors import GradientErrors
from tda_lightning.records.plans import AttributionPlan, PassPlan, PlanItem, RecordingPlan
from tda_lightning.records.query_scores import QueryScores
from tda_lightning.records.scores import Scores
from tests.runs import Net
from tests.standing import standing_run


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(2, 4, 300, generator=generator)
    made = {"measurements": [0.0, 1.0, 2.0, 3.0], "predictions": ["<script>x</script>", *"bcd"]}
    made["members"] = [{"measurements": [0.0, 2.0, 4.0, 6.0]}]
    return Scores(parts.sum(0), parts, torch.rand(300), made, torch.zeros(4, 300, 2))


def test_a_query_is_a_row(scores):
    one = scores[2]
    assert isinstance(one, QueryScores) and one.query == 2
    assert torch.equal(one.values, scores.values[2])
    assert torch.equal(one.by_segment, scores.by_segment[:, 2])
    assert one.measurement == 2.0 and one.prediction == "c"
    for k in (1, 5):
        for own, whole in (
            (one.proponents(k), scores.proponents(2, k)),
            (one.opponents(k), scores.opponents(2, k)),
        ):
            assert all(torch.equal(a, b) for a, b in zip(own, whole, strict=True))
    assert scores[-1].query == 3 and scores[torch.tensor(1)].query == 1
    assert [row.query for row in scores] == [0, 1, 2, 3] and len(scores) == 4


@pytest.mark.parametrize(
    "chosen", [slice(1, 3), [1, 2], (1, 2), torch.tensor([1, 2]), torch.tensor([0, 1, 1, 0]) > 0]
)
def test_several_queries_are_scores(scores, chosen):
    some = scores[chosen]
    assert torch.equal(some.values, scores.values[1:3])
    assert torch.equal(some.by_segment, scores.by_segment[:, 1:3])
    assert some.by_token.shape == (2, 300, 2)
    assert some.provenance["measurements"] == [1.0, 2.0]
    assert some.provenance["members"] == [{"measurements": [2.0, 4.0]}]
    assert some.query_indices == [1, 2] and some[1].query == 2
    assert some[[1]].query_indices == [2]
    assert scores.provenance["measurements"] == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("wrong", [4, -5, [0, 9], torch.tensor([True]), [0.5], "a", [[1]]])
def test_there_is_no_such_query(scores, wrong):
    with pytest.raises((IndexError, TypeError)):
        scores[wrong]


def test_no_queries(scores):
    assert scores[[]].num_queries == 0 and "0 queries" in repr(scores[[]])
    assert scores[2:2]._repr_html_()


def test_scores_show_themselves_in_a_few_lines(scores):
    text, page = repr(scores), scores._repr_html_()
    assert text.startswith("Scores of 300 training examples for 4 queries\n")
    assert len(text.splitlines()) < 15 and len(page) < 6000
    assert "<script>" not in page and "&lt;script&gt;" in page
    best = int(scores.values[2].argmax())
    assert f"most helpful: {best} (" in repr(scores[2])
    assert "<script>" not in scores[0]._repr_html_()


def test_a_trajectory_shows_itself_in_a_few_lines():
    trajectory = standing_run(Net(), [[0, 1], [2, 3]])
    text = repr(trajectory)
    assert text.startswith("Trajectory in memory\n") and len(text.splitlines()) < 15
    assert f"steps: {len(trajectory.steps)}" in text
    assert "<table>" in trajectory._repr_html_()
    assert "tensor(" not in repr(trajectory.steps) + repr(trajectory.checkpoints[0])


def test_plans_and_checks_show_themselves():
    passes = (PassPlan("fit", 2, 10, 1.5),)
    plan = AttributionPlan("Source", 5, 3, 1.0, passes, None, 0, 100, 0)
    assert "fit: 2 x 1.5 s" in repr(plan) and "<td>fit</td>" in plan._repr_html_()
    recording = RecordingPlan(10, 3, (PlanItem("steps", 2048),), (), ("no rate",))
    assert "10 steps, 3 checkpoints: disk 2.0 KiB" in repr(recording)
    assert "<td>2.0 KiB</td>" in recording._repr_html_() and "no rate" in repr(recording)
    errors = GradientErrors({"head": 2e-7})
    assert "head: 2.0e-07" in repr(errors) and "<td>head</td>" in errors._repr_html_()
