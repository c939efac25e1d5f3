"""What experiments/fastif takes for the truth, and how it chooses and counts."""

import os

import pytest
import torch
from torch.utils.data import TensorDataset

from experiments.fastif.exact import Exact, gather, look
from experiments.fastif.quality import agreement, problem_of
from experiments.fastif.recall import recalls
from experiments.fastif.recorded import open_run
from experiments.fastif.tuning import chosen_by, descend
from tda_lightning import Scores
from tda_lightning.cli import main as tda


def made_up(train=7, queries=3, parameters=11):
    own = torch.Generator().manual_seed(0)
    rows, asked = (torch.randn(n, parameters, generator=own) for n in (train, queries))
    present = torch.rand(train, 3, generator=own) > 0.5
    rows[:, 2:8] *= present.repeat_interleave(2, 1)
    weights = torch.rand(train, generator=own).double()
    return Exact(rows, asked, weights, decay=0.02, words=slice(2, 8), width=2)


def dense(exact, damping):
    """(C + d), from its definition."""
    rows = exact.gradients.double()
    curvature = (rows.T * exact.weights) @ rows / len(rows)
    return curvature + (exact.decay + damping) * torch.eye(rows.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_identity_of_woodbury_gives_the_scores_of_the_dense_inverse(damping, monkeypatch):
    monkeypatch.setattr("experiments.fastif.exact._BATCH", 3)
    exact = made_up()
    rows, asked = exact.gradients.double(), exact.queries.double()
    expected = asked @ torch.linalg.inv(dense(exact, damping)) @ rows.T / len(rows)
    torch.testing.assert_close(exact.scores(damping), expected, rtol=1e-5, atol=1e-6)


def test_residuals_are_of_the_dense_matrix():
    exact = made_up()
    solution = torch.linalg.solve(dense(exact, 0.5), exact.queries.double().T).T
    assert float(exact.residuals(0.5, solution.float(), exact.queries).max()) < 1e-5
    far = exact.residuals(0.5, 2 * solution.float(), exact.queries)
    torch.testing.assert_close(far, torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=0)


def test_recall_is_the_share_of_the_largest_that_are_candidates():
    truth = torch.tensor([[5.0, 4.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    candidates = torch.tensor([[0, 3], [2, 3]])
    assert recalls(candidates, truth, 2).tolist() == [0.5, 1.0]


def test_agreement_looks_for_the_largest_of_all_among_the_candidates():
    truth = torch.arange(40.0).double()[None]
    candidates = torch.arange(0, 35)[None]
    found = agreement(truth.clone(), truth, candidates)
    assert found["spearman"][0] == found["pearson"][0] == 1
    assert found["recall_at_10"][0] == 0.5  # 30 to 34 of 30 to 39
    assert agreement(-truth, truth, candidates)["recall_at_10"][0] == 0


def test_pairs_are_chosen_by_the_mean_score_and_by_the_mean_rank():
    values = torch.zeros(2, 2000)
    values[:, 100:132], values[:, 200:232], values[:, 1500] = 1.0, -1.0, 9.0
    scores = Scores(values, candidates=torch.arange(2000).expand(2, -1).contiguous())
    anchors, own = torch.tensor([0, 1]), torch.Generator().manual_seed(0)
    up, down = chosen_by("helpful", scores, anchors, own)
    assert sorted(up.tolist()) == list(range(100, 132)) and not len(down)
    up, down = chosen_by("harmful", scores, anchors, own)
    assert sorted(down.tolist()) == list(range(200, 232)) and not len(up)
    assert sorted(chosen_by("nearest", scores, anchors, own)[0].tolist()) == list(range(32))


def test_descent_lowers_a_loss_and_ascent_raises_it():
    module = torch.nn.Linear(2, 2)
    pair = torch.ones(1, 2), torch.tensor([0])
    loss = torch.nn.CrossEntropyLoss()
    before = float(loss(module(pair[0]), pair[1]))
    descend(module, pair, None, 0.1, 3)
    lower = float(loss(module(pair[0]), pair[1]))
    descend(module, None, pair, 0.1, 1)
    assert lower < before and float(loss(module(pair[0]), pair[1])) > lower


@pytest.mark.skipif("TDA_DATA_ROOT" not in os.environ, reason="needs the pairs of TDA_DATA_ROOT")
def test_gathered_gradients_give_the_curvature_of_the_library(tmp_path):
    folder = tmp_path / "mnli"
    small = ["data.num_train=64", "trainer.max_epochs=1", "threads=1"]
    assert tda(["train", "experiment=mnli_encoder", *small, f"output={folder}"]) == 0
    run = open_run(folder, seed=0)
    run.queries = TensorDataset(*(tensor[:2] for tensor in run.queries.tensors))
    exact = gather(run)
    products = []

    def work(context):
        problem = problem_of(context, exact.decay, 0.0)
        products.append(problem.products.over_training_set(exact.queries))

    look(run, run.queries, work)
    expected = exact.curved(exact.queries, slice(None))
    torch.testing.assert_close(products[0], expected, rtol=1e-3, atol=1e-5)
