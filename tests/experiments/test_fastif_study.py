"""What experiments/fastif takes for the truth, and how it chooses and counts."""

import os

import pytest
import torch
from torch.utils.data import TensorDataset

from experiments.fastif.exact import Exact, by_word, gather, look, occurring
from experiments.fastif.kept import crossed, interval
from experiments.fastif.quality import PAPER_DAMPING, agreement, problem_of, published
from experiments.fastif.recall import recalls
from experiments.fastif.recorded import open_run
from experiments.fastif.tuning import RATES, chosen_by, chosen_rate, descend, grouped
from tda_lightning import Scores
from tda_lightning.cli import main as tda


def made_up(train=7, queries=3, parameters=11):
    own = torch.Generator().manual_seed(0)
    rows, asked = (torch.randn(n, parameters, generator=own) for n in (train, queries))
    present = torch.rand(train, 3, generator=own) > 0.5
    rows[:, 2:8] *= present.repeat_interleave(2, 1)
    weights = torch.rand(train, generator=own).double()
    parts = [
        occurring(rows[at : at + 4, 2:8].unflatten(1, (3, 2)), at) for at in range(0, train, 4)
    ]
    others = torch.cat([rows[:, :2], rows[:, 8:]], dim=1)
    exact = Exact(others, by_word(parts, 3), asked, weights, decay=0.02, place=slice(2, 8))
    return exact, rows.double()


def dense(exact, rows, damping):
    """(C + d), from its definition."""
    curvature = (rows.T * exact.weights) @ rows / len(rows)
    return curvature + (exact.decay + damping) * torch.eye(rows.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_identity_of_woodbury_gives_the_scores_of_the_dense_inverse(damping, monkeypatch):
    monkeypatch.setattr("experiments.fastif.exact._BATCH", 3)
    exact, rows = made_up()
    inverse = torch.linalg.inv(dense(exact, rows, damping))
    expected = exact.queries.double() @ inverse @ rows.T / len(rows)
    torch.testing.assert_close(exact.scores(damping), expected, rtol=1e-5, atol=1e-6)


def test_residuals_are_of_the_dense_matrix():
    exact, rows = made_up()
    solution = torch.linalg.solve(dense(exact, rows, 0.5), exact.queries.double().T).T
    assert float(exact.residuals(0.5, solution.float(), exact.queries).max()) < 1e-5
    far = exact.residuals(0.5, 2 * solution.float(), exact.queries)
    torch.testing.assert_close(far, torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=0)


def test_a_part_of_the_pairs_has_the_curvature_of_their_gradients():
    exact, rows = made_up()
    some = rows[2:5]
    expected = exact.queries.double() @ (some.T * exact.weights[2:5] / 3) @ some
    found = exact.curved(exact.queries, slice(2, 5)).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


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
    values[:, 400:416] = 0.5
    scores = Scores(values, candidates=torch.arange(2000).expand(2, -1).contiguous())
    labels = torch.zeros(2000, dtype=torch.int64)
    labels[400:416] = 1

    def choose(method):
        given = torch.tensor([0, 1]), torch.Generator().manual_seed(0), labels
        return chosen_by(method, scores, *given)

    up, down = choose("helpful")
    assert sorted(up.tolist()) == list(range(100, 132)) and not len(down)
    up, down = choose("balanced")
    assert labels[up].tolist() == [0] * 16 + [1] * 16 and not len(down)
    assert (values[0, up[:16]] == 1).all() and (values[0, up[16:]] == 0.5).all()
    up, down = choose("harmful")
    assert sorted(down.tolist()) == list(range(200, 232)) and not len(up)
    assert sorted(choose("nearest")[0].tolist()) == list(range(32))


def test_the_rate_is_chosen_on_pairs_on_which_its_gain_is_not_told():
    hans = torch.zeros(2, len(RATES), 6)
    hans[:, 2, ::2], hans[:, 2, 1::2], hans[:, 3, 1::2] = 0.3, -0.1, 0.9
    found = chosen_rate({"mnli": hans + 1, "hans": hans})
    assert found["rate"] == RATES[2]
    assert found["gain"]["hans"] == pytest.approx([-0.1] * 3)
    assert found["gain"]["mnli"] == pytest.approx([0.9] * 3)


def test_groups_are_whole_and_do_not_overlap():
    places = torch.arange(100, 150)
    groups = grouped(places, torch.Generator().manual_seed(0))
    together = torch.cat(groups).tolist()
    assert [len(group) for group in groups] == [16, 16, 16]
    assert len(set(together)) == 48 and set(together) <= set(places.tolist())


def test_an_interval_over_groups_and_pairs_knows_both_spreads():
    own = torch.Generator().manual_seed(0)
    by_group = torch.randn(9, 1, generator=own).double().expand(9, 400)
    for values in (by_group, by_group.T):
        mean, low, high = crossed(values)
        assert [mean, low, high] == pytest.approx(interval(by_group[:, 0]), abs=0.1)


def test_the_published_recursion_is_a_series_in_the_hessian(monkeypatch):
    monkeypatch.setattr("experiments.fastif.quality.DEPTH", 7)
    monkeypatch.setattr("experiments.fastif.quality.PAPER_SCALE", 3.0)
    module = torch.nn.Linear(2, 2, bias=False).double()
    pair, query = (torch.tensor([1.0, -2.0]).double(), 1), (torch.tensor([0.5, 1.0]).double(), 0)
    weight = module.weight.detach()

    def loss(flat, pair):
        output = flat.view(2, 2) @ pair[0]
        return torch.nn.functional.cross_entropy(output, torch.tensor(pair[1]))

    flat = weight.flatten()
    hessian = torch.autograd.functional.hessian(lambda w: loss(w, pair), flat)
    gradients = [
        torch.autograd.functional.jacobian(lambda w, p=p: loss(w, p), flat) for p in (query, pair)
    ]
    shrink = torch.eye(4).double() * (1 - PAPER_DAMPING) - hessian / 3
    solution = sum(torch.linalg.matrix_power(shrink, n) for n in range(8)) @ gradients[0] / 3
    found = published(module, [pair], query)
    torch.testing.assert_close(found, (solution @ gradients[1]).float()[None], rtol=1e-5, atol=0)


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
