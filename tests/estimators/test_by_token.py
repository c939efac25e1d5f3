"""Scores of single tokens, of training examples and of queries.

The oracle of a training token: where the loss is a *sum* over tokens, the score of a token is that
of replacing its example by one in which the token's label is ignored. That goes through edits,
which know nothing of tokens.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Ensemble, Scores
from tda_lightning.edits import Replace
from tda_lightning.estimators import (
    TRAK,
    FastInfluence,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
)
from tda_lightning.examples.models.gpt import GPT
from tda_lightning.measurements import Loss, Margin, OfOutputs, Reward
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.solvers import ConjugateGradients
from tda_lightning.tasks import LanguageModelingTask
from tests.attributing import quiet, relative
from tests.cases.case import Case, tokens
from tests.unrolling import BATCHES, adam, in_memory, sgd

EXACT = 1e-8
TEXTS = Case("gpt by token", lambda: GPT(6, 4, 4, 1, 2), tokens(6, 4), "classification")
IGNORED = -100


def texts(count, seed):
    """Inputs and next tokens, some of which do not count."""
    inputs, labels = TEXTS.batch(count, seed)
    labels = labels.clone()
    labels[1, 2:] = IGNORED
    labels[2, 0] = IGNORED
    return inputs, labels


def recorded(optimizer):
    """A run on ten texts, in memory: (run, module, data)."""
    return in_memory(TEXTS, optimizer, batches=BATCHES)


@pytest.fixture(scope="module")
def runs():
    return {"sgd": recorded(sgd(momentum=0.5)), "adam": recorded(adam())}


def scored(run, module, data, estimator, reduction="sum", **options):
    queries = options.pop("queries", None) or texts(3, seed=7)
    task = options.pop("task", None) or LanguageModelingTask(reduction=reduction)
    attribution = AttributionModule(module, run, estimator, task)
    options.setdefault("self_influence", False)
    return attribution.attribute(
        TensorDataset(*data),
        TensorDataset(*queries),
        batch_size=3,
        trainer=quiet(),
        **options,
    )


ESTIMATORS = {
    "tracin": ("sgd", TracIn()),
    "influence": ("sgd", InfluenceFunction(relative_damping=0.5)),
    "influence, exact": ("adam", InfluenceFunction("exact", damping=0.1)),
    "influence, solved": (
        "sgd",
        InfluenceFunction(damping=1.0, solver=ConjugateGradients(tolerance=1e-9)),
    ),
    "source": ("sgd", Source(num_segments=2)),
    "source, adam": ("adam", Source(num_segments=2)),
    "source, blocks": ("adam", Source(num_segments=2, leading_directions=0)),
    "source, plain blocks": ("sgd", Source(num_segments=2, leading_directions=0)),
    "source, recorded": ("sgd", Source(num_segments=2, order="recorded")),
    "source, recorded adam": ("adam", Source(num_segments=2, order="recorded")),
    "source, matrix-free": (
        "sgd",
        Source(num_segments=2, curvature="matrix_free", tolerance=1e-9, max_products=60),
    ),
    "trak": ("sgd", TRAK(projection_dimension=20, relative_damping=0.1)),
    "trak, not projected": ("adam", TRAK(projection_dimension=10**6, relative_damping=0.1)),
    "unrolled": ("adam", Unrolled()),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_token_counts_as_its_label_being_ignored(runs, name):
    optimizer, estimator = ESTIMATORS[name]
    run, module, data = runs[optimizer]
    found = scored(run, module, data, estimator, by_token="train")
    assert found.by_token.shape == (3, 10, 4)
    assert relative(found.by_token.sum(2), found.values) < EXACT
    edits = []
    for example in (0, 4):
        for position in range(4):
            labels = data[1][example].clone()
            labels[position] = IGNORED
            edits.append(Replace(example, (data[0][example], labels)))
    expected = scored(run, module, data, estimator, edits=edits).values
    own = found.by_token[:, [0, 4]].flatten(1)
    # Where an example's whole loss is scored as a difference, its digits are fewer.
    assert relative(own, expected) < 10 * EXACT


@pytest.mark.parametrize("task", ["mean", "step"])
def test_parts_of_a_mean_sum_to_the_score(runs, task):
    """Also where the number of tokens differs, and from an unchanged training_step."""
    run, module, _ = runs["sgd"]
    data, options = texts(10, seed=0), {}
    estimator = InfluenceFunction(relative_damping=0.5)
    if task == "step":
        pytest.importorskip("lightning")
        options["task"] = _stepping(module)
    found = scored(run, module, data, estimator, "mean", by_token="train", **options)
    assert relative(found.by_token.sum(2), found.values) < EXACT
    assert not bool(found.by_token[:, 1, 2:].any())
    assert not bool(found.by_token[:, 2, 0].any())
    # The same by an engine that knows whole examples alone.
    whole = scored(run, module, data, estimator, "mean", **options)
    assert torch.equal(found.values, whole.values)


def _stepping(module):
    class Step(LanguageModelingTask):
        pass

    return Step(reduction="mean")


QUERIES = {
    "loss": (None, lambda q, u, count: (Loss(positions=[[u]] * 3), 1 / count[q])),
    "span": (Loss(span=[1, 3]), lambda q, u, count: (Loss(positions=[[u]] * 3), 1 / 2)),
}


@pytest.mark.parametrize("name", QUERIES)
@pytest.mark.parametrize("estimator", ["tracin", "source, recorded adam", "unrolled"])
def test_a_token_of_a_query_counts_as_a_query_of_its_own(runs, name, estimator):
    optimizer, chosen = ESTIMATORS[estimator]
    run, module, data = runs[optimizer]
    asked, single = QUERIES[name]
    queries = texts(3, seed=7) if asked is None else TEXTS.batch(3, seed=7)
    options = {"queries": queries, "reduction": "mean"}
    found = scored(run, module, data, chosen, measurement=asked, by_token="query", **options)
    whole = scored(run, module, data, chosen, measurement=asked, **options)
    assert relative(found.values, whole.values) < EXACT
    assert relative(found.by_query_token.sum(1), whole.values) < EXACT
    assert found.provenance["measurements"] == whole.provenance["measurements"]
    count = (queries[1] != IGNORED).sum(1).tolist()
    for place in range(4):
        for query in range(3):
            own = found.by_query_token[query, place]
            if asked is None and queries[1][query, place] == IGNORED:
                assert not bool(own.any())
                continue
            if asked is not None and place not in (1, 2):
                assert not bool(own.any())
                continue
            of_one, share = single(query, place, count)
            one = tuple(tensor[query : query + 1] for tensor in queries)
            of_one = dataclasses.replace(of_one, positions=place)
            alone = scored(run, module, data, chosen, "mean", measurement=of_one, queries=one)
            assert relative(own, share * alone.values[0]) < EXACT


def test_both_sides_at_once(runs):
    run, module, data = runs["sgd"]
    for estimator in (TracIn(), Unrolled(), Source(num_segments=2, order="recorded")):
        both = scored(run, module, data, estimator, by_token="both")
        train = scored(run, module, data, estimator, by_token="train")
        query = scored(run, module, data, estimator, by_token="query")
        assert relative(both.by_token, train.by_token) < EXACT
        assert relative(both.by_query_token, query.by_query_token) < EXACT
        assert relative(both.values, train.values) < EXACT


@pytest.mark.parametrize("asked", [Margin(), Reward([1.0, -1.0, 0.5])])
def test_measurements_that_are_no_sums_have_parts_too(runs, asked):
    run, module, data = runs["sgd"]
    queries = TEXTS.batch(3, seed=7)
    options = {"measurement": asked, "queries": queries}
    found = scored(run, module, data, TracIn(), by_token="query", **options)
    whole = scored(run, module, data, TracIn(), **options)
    assert relative(found.by_query_token.sum(1), whole.values) < EXACT


def test_only_candidates_have_tokens(runs, tmp_path):
    run, module, data = runs["sgd"]
    settings = {"relative_damping": 0.5}
    found = scored(run, module, data, FastInfluence(k=4, **settings), by_token="both")
    every = scored(run, module, data, InfluenceFunction(**settings), by_token="both")
    for query in range(3):
        chosen = found.candidates[query]
        assert relative(found.by_token[query, chosen], every.by_token[query, chosen]) < EXACT
        own = found.by_query_token[query][:, chosen]
        assert relative(own, every.by_query_token[query][:, chosen]) < EXACT
    others = found.values.isnan()
    assert torch.equal(found.by_token.isnan().all(2), others)
    assert torch.equal(found.by_query_token.isnan().all(1), others)
    found.save(tmp_path / "scores.h5")
    loaded = Scores.load(tmp_path / "scores.h5")
    assert torch.equal(loaded.by_query_token.nan_to_num(), found.by_query_token.nan_to_num())
    assert torch.equal(loaded.by_token.nan_to_num(), found.by_token.nan_to_num())


def test_several_rounds_of_queries_and_a_file_are_the_same(runs, tmp_path, monkeypatch):
    run, module, data = runs["adam"]
    estimator = Source(num_segments=2)
    whole = scored(run, module, data, estimator, by_token="both")
    monkeypatch.setattr("tda_lightning.session.session.memory_budget", lambda: 1)
    path = str(tmp_path / "scores.h5")
    apart = scored(run, module, data, estimator, by_token="both", scores_path=path)
    for name in ("values", "by_token", "by_query_token"):
        assert relative(getattr(apart, name), getattr(whole, name)) < EXACT
    loaded = Scores.load(path, queries=slice(1, 3))
    assert torch.equal(loaded.by_query_token, apart.by_query_token[1:3])


def test_the_mean_over_runs_is_taken_by_token(runs):
    first, module, data = runs["sgd"]
    second = recorded(sgd(lr=0.03))[0]
    found = scored(Ensemble([first, second]), module, data, TracIn(), by_token="both")
    apart = [scored(run, module, data, TracIn(), by_token="both") for run in (first, second)]
    for name in ("by_token", "by_query_token"):
        expected = (getattr(apart[0], name) + getattr(apart[1], name)) / 2
        assert relative(getattr(found, name), expected) < EXACT
    with pytest.raises(UnsupportedTrainingError, match="TRAK puts the members of an ensemble tog"):
        scored(Ensemble([first, second]), module, data, TRAK(), by_token="train")


def test_what_has_no_tokens_is_refused(runs):
    run, module, data = runs["sgd"]
    with pytest.raises(ValueError, match="by_token must be 'train'"):
        scored(run, module, data, TracIn(), by_token=True)
    with pytest.raises(ValueError, match="self_influence has no queries"):
        scored(run, module, data, TracIn(), by_token="query", self_influence=True)
    asked = OfOutputs(lambda outputs: outputs.square().mean((1, 2)))
    with pytest.raises(ValueError, match="is one number for a query and has no parts by token"):
        scored(run, module, data, TracIn(), by_token="query", measurement=asked)
