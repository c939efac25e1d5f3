"""What experiments/judges counts, its tables, and its explainer where quanda is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from torch.utils.data import TensorDataset

from experiments.judges import date_lm, table
from experiments.shares import NORMAL, area_interval, share_interval
from tests.cases.training import CLASSIFIER, queries_of
from tests.evaluation.test_evaluation import small

VALUES = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 3.0, 2.0, 0.0]])


def test_filtering_ranks_by_the_mean_over_references():
    # Means 2, 2, 2, 0: three together hold both unsafe examples.
    unsafe = torch.tensor([True, False, True, False])
    value, low, high, share = date_lm.filtering(VALUES, unsafe)
    assert (value, share) == pytest.approx((2 / 3, 1 / 2))
    # The first reference alone finds both, the second one ranks them 2 and 3.
    assert (low, high) == pytest.approx(((1 / 2 + 2 / 3) / 2, 1))
    assert date_lm.filtering(VALUES[:1], unsafe)[:3] == [1, 1, 1]


def test_facts_are_those_that_the_published_fields_name():
    counterfact = [
        {"true_entity": "Rome", "counterfactual_entity": "Paris"},
        {"true_entity": "Rome", "counterfactual_entity": "Bonn"},
        {"true_entity": "Rome", "counterfactual_entity": "Paris"},
    ]
    sought = date_lm.stating_the_fact(counterfact, counterfact[:2])
    assert sought.tolist() == [[True, False, True], [False, True, False]]
    ftrace = [{"facts": ["a", "b"]}, {"facts": ["c"]}]
    assert date_lm.stating_the_fact(ftrace, ftrace).tolist() == [[True, False], [False, True]]
    kinds = [{"type": "Unsafe"}, {"type": "Benign"}]
    assert date_lm.unsafe_examples(kinds).tolist() == [True, False]
    found = date_lm.factual_attribution(VALUES, torch.tensor([[False, False, True, False]] * 2))
    assert found["recall@50"][0] == 1 and found["MRR"][0] == pytest.approx(1 / 2)


def test_sets_are_read_from_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"type": "Unsafe"}, {"type": "Benign"}])
    datasets.DatasetDict({"train": rows, "ref": rows}).save_to_disk(tmp_path / "set")
    train, _ = date_lm.load_sets(str(tmp_path / "set"), None)
    assert date_lm.unsafe_examples(train).tolist() == [True, False]
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="splits train and ref, it has train"):
        date_lm.load_sets(str(tmp_path / "other"), None)


def test_a_cell_is_the_kept_result_or_a_dash(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    kept = {
        "accuracy": {"query": 0.5},
        "TracIn": {"class": [0.75, 0.5, 1.0], "cardinality": [0.25]},
        "TracIn: LDS fresh": [0.125, 0.1, 0.2],
        "dattri: LDS fresh": {"TracIn": [0.5, 0.5, 0.4, 0.6, 1e-17]},
    }
    (tmp_path / "results" / "clean.json").write_text(json.dumps(kept))
    monkeypatch.setattr(table, "HERE", tmp_path)
    row = table.digits().splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["TracIn", "–", "0.12 [0.10, 0.20]", "–", "0.75 [0.50, 1.00]"]
    assert cells[8] == "0.25"
    assert "| LDS, fresh | TracIn | 0.5000 | 0.5000 | 1e-17 |" in table.dattri()


@pytest.mark.skipif(find_spec("quanda") is None, reason="needs quanda")
def test_the_explainer_gives_our_scores_and_walks_once_for_expected_queries():
    from experiments.judges.explainer import RecordedExplainer, with_weights
    from tda_lightning.estimators import TracIn
    from tda_lightning.evaluation import last_checkpoint
    from tests import runs as recorded

    run, module, task, data = small("sgd")
    inputs, targets = queries_of(CLASSIFIER)
    explainer = RecordedExplainer(
        module,
        data,
        trajectory=last_checkpoint(run),
        estimator=TracIn(),
        loss=task,
        expected=(inputs, targets),
    )
    walks = []
    attribute = explainer.attribution.attribute
    explainer.attribution.attribute = lambda *given, **more: (
        walks.append(1) or attribute(*given, **more)
    )
    expected = attribute(
        data, TensorDataset(inputs, targets), trainer=recorded.trainer(), self_influence=True
    )
    parts = [explainer.explain(inputs[n : n + 1], targets[n : n + 1]) for n in range(3)]
    torch.testing.assert_close(torch.cat(parts), expected.values, rtol=1e-10, atol=0)
    assert len(walks) == 1
    other = explainer.explain(inputs[:1], 1 - targets[:1])  # another target is another query
    assert len(walks) == 2 and not torch.equal(other, parts[0])
    torch.testing.assert_close(explainer.self_influence(), expected.self_influence)
    weights = {name: torch.ones_like(value) for name, value in module.state_dict().items()}
    put = with_weights(run, module, weights)
    assert all(
        torch.equal(put.checkpoints[step].parameters[name], weights[name])
        for step in run.checkpoints
        for name in weights
    )


def test_intervals_of_shares_and_areas_from_counts():
    for share in (0.0, 0.2, 0.5, 1.0):  # at either end a test of that share just fails
        for end in share_interval(share, 24):
            distance, spread = (share - end) ** 2, end * (1 - end) / 24
            assert distance == pytest.approx(NORMAL**2 * spread, abs=1e-12)
    low, high = area_interval(0.5, 30, 270)  # Mann and Whitney's variance where there is no skill
    half = NORMAL * (301 / (12 * 30 * 270)) ** 0.5
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))
