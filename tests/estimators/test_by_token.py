"""Scores of single tokens, of training examples and of queries.

The oracle of a training token: where the loss is a *sum* over tokens, the score of a token is that
of replacing its example by one in which the token's label is ignored. That goes through edits,
which know nothing of tokens.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
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
from tda_lightning.runtime.module_state import load_tensors
from tda_lightning.solvers import ConjugateGradients
from tda_lightning.tasks import LanguageModelingTask, TrainingStepTask
from tests import oracles
from tests.attributing import quiet, relative
from tests.cases.case import Case, tokens
from tests.oracles.draws import drawn_weights
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
    "unrolled": ("adam", Unrolled()),  # of a run that was trained on means over tokens
}


QUICK = ("tracin", "source", "source, recorded", "trak")
SUMS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in ESTIMATORS
    if name != "unrolled"
]


def test_exact_unrolling_scores_tokens_as_it_did(runs):
    run, module, data = runs["adam"]
    found = scored(run, module, data, Unrolled(), "mean", by_token="both")
    known = scored(run, module, data, Unrolled(token_weights=True), "mean")
    assert relative(found.by_token, known.by_token) < EXACT
    assert relative(found.by_query_token.sum(1), known.values) < EXACT


@pytest.mark.parametrize("name", SUMS)
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


def test_parts_of_a_mean_sum_to_the_score(runs):
    """Also where the number of tokens differs."""
    run, module, _ = runs["sgd"]
    data, estimator = texts(10, seed=0), InfluenceFunction(relative_damping=0.5)
    found = scored(run, module, data, estimator, "mean", by_token="train")
    assert relative(found.by_token.sum(2), found.values) < EXACT
    assert not bool(found.by_token[:, 1, 2:].any())
    assert not bool(found.by_token[:, 2, 0].any())
    whole = scored(run, module, data, estimator, "mean")
    assert torch.equal(found.values, whole.values)


class Step(LightningModule):
    """Of a training_step that was written for training alone: a mean over the batch's tokens."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return F.cross_entropy(self.gpt(inputs).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_unchanged_step_has_tokens_on_both_sides(alone):
    data, queries = texts(10, seed=0), texts(3, seed=7)
    module = Step(TEXTS.build())

    def loss(module, batch):
        return module.training_step(batch, 0)

    batches = [[[0, 1, 2, 3, 4]], [[5, 6, 7, 8, 9]]]
    run = oracles.record_run(
        module, loss, data, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), batches, ()
    )
    task = TrainingStepTask()
    if alone:
        task._needs_alone = True
    attribution = AttributionModule(module, run, TracIn(), task)
    options = {"batch_size": 5, "trainer": quiet(), "self_influence": False}
    sets = TensorDataset(*data), TensorDataset(*queries)
    found = attribution.attribute(*sets, by_token="both", **options)
    whole = attribution.attribute(*sets, **options)
    assert relative(found.values, whole.values) < EXACT
    assert relative(found.by_token.sum(2), whole.values) < EXACT
    assert relative(found.by_query_token.sum(1), whole.values) < EXACT
    # A term of the training loss is -log p over the average number of tokens; a query is measured
    # by the mean over its own.
    parameters = list(module.parameters())

    def gradient(inputs, labels, example, place):
        logp = module.gpt(inputs[example][None]).log_softmax(2)[0, place, labels[example, place]]
        found = torch.autograd.grad(-logp, parameters)
        return torch.cat([own.flatten() for own in found])

    counted = data[1] != IGNORED
    expected = torch.zeros(3, 10, 4, dtype=torch.float64)
    for step in [step for step in sorted(run.checkpoints) if step]:
        load_tensors(module, run.checkpoints[step].parameters)
        rate = float(run.steps.learning_rate[before(run, step) : step].sum())
        for query in range(3):
            own = [u for u in range(4) if queries[1][query, u] != IGNORED]
            measured = sum(gradient(*queries, query, u) for u in own) / len(own)
            for example, place in counted.nonzero().tolist():
                term = gradient(*data, example, place) / (float(counted.sum()) / 10)
                expected[query, example, place] += rate * float(measured @ term) / 10
    assert relative(found.by_token, expected) < EXACT


def before(run, step):
    """The checkpoint before one."""
    return max(other for other in run.checkpoints if other < step)


QUERIES = {
    "loss": (None, lambda q, u, count: (Loss(positions=[[u]] * 3), 1 / count[q])),
    "span": (Loss(span=[1, 3]), lambda q, u, count: (Loss(positions=[[u]] * 3), 1 / 2)),
}


@pytest.mark.parametrize("name", ["loss", pytest.param("span", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "estimator",
    [
        "tracin",
        pytest.param("source, recorded adam", marks=pytest.mark.slow),
        pytest.param("unrolled", marks=pytest.mark.slow),
    ],
)
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
        for query in range(place % 2, 3, 2):
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
    for estimator in (TracIn(), InfluenceFunction("identity", damping=1.0)):
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
    estimator = InfluenceFunction(relative_damping=0.5)
    whole = scored(run, module, data, estimator, by_token="both")
    monkeypatch.setattr("tda_lightning.session.session.memory_budget", lambda: 1)
    path = str(tmp_path / "scores.h5")
    apart = scored(run, module, data, estimator, by_token="both", scores_path=path)
    for name in ("values", "by_token", "by_query_token"):
        assert relative(getattr(apart, name), getattr(whole, name)) < EXACT
    loaded = Scores.load(path, queries=slice(1, 3))
    assert torch.equal(loaded.by_query_token, apart.by_query_token[1:3])


@pytest.mark.slow
def test_the_mean_over_runs_is_taken_by_token(runs):
    first, module, data = runs["sgd"]
    second = recorded(sgd(lr=0.03))[0]
    found = scored(Ensemble([first, second]), module, data, TracIn(), by_token="both")
    apart = [scored(run, module, data, TracIn(), by_token="both") for run in (first, second)]
    for name in ("by_token", "by_query_token"):
        expected = (getattr(apart[0], name) + getattr(apart[1], name)) / 2
        assert relative(getattr(found, name), expected) < EXACT


def test_tokens_of_trak_over_several_runs(runs):
    """A token counts in proportion to its part in the gradient of each member's loss."""
    first, module, data = runs["sgd"]
    second = recorded(sgd(lr=0.03))[0]
    ensemble, estimator = Ensemble([first, second]), TRAK(10**6, relative_damping=0.1)
    found = scored(ensemble, module, data, estimator, by_token="train")
    assert relative(found.by_token.sum(2), found.values) < EXACT
    with pytest.raises(UnsupportedTrainingError, match="tokens of a query have no parts in that"):
        scored(ensemble, module, data, estimator, by_token="query")
    task = LanguageModelingTask(reduction="sum")
    expected = torch.zeros(3, 10, 4, dtype=torch.float64)
    outputs, slopes = [], []
    for run in (first, second):
        load_tensors(module, run.checkpoints[run.last_step].parameters)
        parameters = list(module.parameters())

        def gradient(value, parameters=parameters):
            own = torch.autograd.grad(value, parameters, retain_graph=True)
            return torch.cat([part.flatten() for part in own])

        texts_of = [data, texts(3, seed=7)]
        rows = [task.model_output(module, batch) for batch in texts_of]
        features = [torch.stack([gradient(v) for v in own.values]) for own in rows]
        used = drawn_weights(run, 0, run.last_step, 10)
        moments = features[0].T @ (used[:, None] * features[0])
        moments.diagonal().add_(0.1 * moments.diagonal().mean())
        responses = torch.linalg.solve(moments, features[1].T).T
        losses = F.cross_entropy(module(data[0]).transpose(1, 2), data[1], reduction="none")
        tokens = torch.stack([torch.stack([gradient(t) for t in text]) for text in losses])
        outputs.append(torch.einsum("qp,ntp,n->qnt", responses, tokens, used))
        slopes.append([own.slopes.detach() for own in rows])
    train, query = (torch.stack([own[side] for own in slopes]).mean(0) for side in (0, 1))
    for products, own in zip(outputs, slopes, strict=True):
        expected += query[:, None, None] * products * (train / own[0])[:, None] / 2
    assert relative(found.by_token, expected) < EXACT


def test_what_has_no_tokens_is_refused(runs):
    run, module, data = runs["sgd"]
    with pytest.raises(ValueError, match="by_token must be 'train'"):
        scored(run, module, data, TracIn(), by_token=True)
    with pytest.raises(ValueError, match="self_influence has no queries"):
        scored(run, module, data, TracIn(), by_token="query", self_influence=True)
    asked = OfOutputs(lambda outputs: outputs.square().mean((1, 2)))
    with pytest.raises(ValueError, match="is one number for a query and has no parts by token"):
        scored(run, module, data, TracIn(), by_token="query", measurement=asked)
