"""Tokens of the training sequences, left out of the recorded run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.data import TensorDataset

from tda_lightning import Scores
from tda_lightning.estimators import Unrolled
from tda_lightning.evaluation import measure, num_tokens, retrain_each, token_removals, top_removal
from tda_lightning.tasks import LanguageModelingTask
from tests.attributing import relative
from tests.unrolling import NETWORKS, OPTIMIZERS, record, scores_of

pytestmark = pytest.mark.filterwarnings("ignore")
TASK = LanguageModelingTask()


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """A transformer trained by AdamW in float64, and exact scores of its tokens."""
    chosen = NETWORKS["transformer"]
    run, module, data = record(tmp_path_factory.mktemp("tokens"), chosen, OPTIMIZERS["adamw"])
    queries = chosen.data(2, seed=7)
    scores = scores_of(run, module, data, queries, TASK, Unrolled(token_weights=True))
    return run, module, data, queries, scores


def test_retraining_with_weights_of_tokens_has_the_derivative_of_their_scores(sequences) -> None:
    """Central differences of retrained models, against exact unrolling."""
    run, module, data, queries, scores = sequences
    step = 1e-5
    places = [(0, 0), (4, 2), (9, 3)]
    weights = torch.ones(2 * len(places), 10, 4, dtype=torch.float64)
    for number, place in enumerate(places):
        weights[(2 * number, *place)] += step
        weights[(2 * number + 1, *place)] -= step
    ends = retrain_each(run, module, TASK, data, weights, together=4)
    measured = torch.stack([measure(module, TASK, end, queries) for end in ends])
    slopes = (measured[1::2] - measured[0::2]) / (2 * step)
    expected = torch.stack([scores.by_token[:, n, t] for n, t in places])
    assert relative(slopes, expected) < 1e-6


def test_a_weight_for_all_tokens_is_that_of_the_example(sequences) -> None:
    run, module, data, _, _ = sequences
    weights = torch.rand(1, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (whole,) = retrain_each(run, module, TASK, data, weights)
    # Sequences of another batch may be longer.
    (parts,) = retrain_each(run, module, TASK, data, weights[:, :, None].expand(1, 10, 6))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="one number for each training example"):
        list(retrain_each(run, module, TASK, data, torch.ones(1, 9, 4)))


def test_the_strongest_tokens_are_left_out_of_the_loss(sequences) -> None:
    run, module, data, queries, scores = sequences
    three, nine = top_removal(
        run, module, TASK, data, queries, scores, ks=[3, 9], draws=2, tokens=True
    )
    assert (three.k, nine.k) == (3, 9)
    assert nine.rise.value > three.rise.value > three.random_rise.value
    rises = []
    for query in range(2):
        weights = torch.ones(40)
        weights[scores.by_token[query].flatten().argsort(descending=True)[:3]] = 0
        both = torch.stack([torch.ones(40), weights]).view(2, 10, 4)
        before, after = (
            measure(module, TASK, end, queries)[query]
            for end in retrain_each(run, module, TASK, data, both)
        )
        rises.append(after - before)
    torch.testing.assert_close(three.rise.per_query, torch.stack(rises).double())


def test_only_tokens_with_a_term_in_the_loss_are_drawn(sequences) -> None:
    *_, scores = sequences
    padded = scores.by_token.clone()
    padded[:, :, 2:] = 0  # padding
    known = dataclasses.replace(scores, by_token=padded)
    assert num_tokens(known) == 20 and num_tokens(scores) == 40
    kept = token_removals(known, [5], draws=3).view(-1, 10, 4)
    assert (~kept).sum((1, 2)).tolist() == [0] + [5] * (2 + 3)
    assert kept[:, :, 2:].all()
    with pytest.raises(ValueError, match="from 1 to 19 tokens"):
        token_removals(known, [20], draws=3)
    with pytest.raises(ValueError, match="expected some of single tokens"):
        token_removals(Scores(scores.values), [1], draws=3)


def test_the_run_itself_has_all_weights_1(sequences) -> None:
    run, module, data, _, _ = sequences
    (end,) = retrain_each(run, module, TASK, TensorDataset(*data.tensors), torch.ones(1, 10, 4))
    for name, tensor in run.checkpoints[run.last_step].parameters.items():
        torch.testing.assert_close(end[name], tensor, rtol=0, atol=0)
