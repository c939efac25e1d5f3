"""Sentence pairs: the data module, and the encoder under every estimator in float64."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import os

import pytest
import torch

from tda_lightning import AttributionModule, TrajectoryRecorder
from tda_lightning.estimators import InfluenceFunction, Source, TracIn
from tda_lightning.examples.data import MNLIData
from tda_lightning.examples.data.pairs import sequence, words
from tda_lightning.examples.models import Classifier, Encoder
from tda_lightning.tasks import ClassificationTask
from tests import oracles
from tests.attributing import attribute, quiet, relative
from tests.cases import CASES
from tests.cases.training import OPTIMIZERS, everything, queries_of, train
from tests.oracles.estimators import spread

HEADER = "premise\thypothesis\tgold_label"
MNLI = [
    ('A cat sat, "alone', "A cat slept.", "neutral"),
    ("A cat sat", "Nothing sat", "contradiction"),
    ("The cat didn't sit", "The cat sat", "contradiction"),
    ("A dog and a cat ran", "A dog ran", "entailment"),
    ("A dog ran", "A dog moved", "entailment"),
]
ADDED = [("A dog that a cat saw sat", "A cat sat", "contradiction")]
HANS = [
    ("The dog saw a cat", "The cat saw a dog", "non-entailment\tlexical_overlap\tswap\teval"),
    ("A cat ran and sat", "A cat ran", "entailment\tsubsequence\tconjunction\ttrain"),
]


def write(path, rows, header=HEADER):
    path.parent.mkdir(exist_ok=True)
    lines = [header, *("\t".join(row) for row in rows)]
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))


@pytest.fixture
def root(tmp_path):
    """A data folder with a few pairs in every file."""
    write(tmp_path / "mnli" / "dev_matched.tsv.gz", MNLI)
    write(tmp_path / "mnli" / "train_contradicting_heuristics.tsv.gz", ADDED)
    hans = tmp_path / "hans_regenerated" / "hans_regenerated.tsv.gz"
    write(hans, HANS, f"{HEADER}\theuristic\tsubcase\tsplit")
    return tmp_path


def pairs_of(root, **options):
    given = {"holdout": 2, "num_query": None, "sequence_length": 9, "min_count": 1, **options}
    return MNLIData(root=str(root), **given)


def test_pairs_are_split_once(root):
    data = pairs_of(root)
    assert (len(data.train_dataset), len(data.query_dataset)) == (3, 2)
    everything = [tuple(pair[:3]) for pair in data.pairs["train"] + data.pairs["query"]]
    assert sorted(everything) == sorted(MNLI)
    # The order of the batches has a seed of its own.
    assert pairs_of(root, seed=5).query_dataset.tensors[0].equal(data.query_dataset.tensors[0])
    held_out = set()
    for split_seed in range(5):
        data = pairs_of(root, split_seed=split_seed)
        data.setup()
        held_out.add(tuple(data.pairs["query"]))
    assert len(held_out) > 1


def test_inputs_are_premise_separator_hypothesis_padding(root):
    data = pairs_of(root, num_train=2, num_query=1)
    for split, count in (("train", 2), ("query", 1)):
        inputs, labels = data.dataset(split).tensors
        assert inputs.shape == (count, 9)
        assert inputs.dtype == labels.dtype == torch.int64
        known = set(data.vocabulary)
        for pair, text in zip(data.pairs[split], data.documents(split), strict=True):
            assert text == words(f"{pair.premise} {pair.hypothesis}")
        for pair, row, label in zip(data.pairs[split], inputs.tolist(), labels, strict=True):
            read = [data.vocabulary[number] for number in row]
            whole = sequence(words(pair.premise), words(pair.hypothesis), 9)
            assert read == [word if word in known else "<unk>" for word in whole]
            assert int(label) == (pair.gold_label != "entailment")
    assert data.vocabulary[:3] == ["<pad>", "<unk>", "<sep>"]


def test_the_vocabulary_is_that_of_the_pairs_not_held_out(root):
    """And the same whatever is trained on, so that models can be compared."""
    data = pairs_of(root)
    data.setup()
    seen = {word for pair in data.pairs["train"] for text in pair[:2] for word in words(text)}
    assert set(data.vocabulary[3:]) == seen
    for options in ({"num_train": 1}, {"contradicting": True}, {"queries": "hans"}):
        other = pairs_of(root, **options)
        other.setup()
        assert other.vocabulary == data.vocabulary
    small = pairs_of(root, vocabulary_size=5)
    small.setup()
    assert small.vocabulary == data.vocabulary[:5]


@pytest.mark.parametrize(
    ("premise", "hypothesis", "expected"),
    [
        ("a b c d e f g", "h i j k l m", "a b c d <sep> h i j k"),
        ("a b", "h i j k l m n o", "a b <sep> h i j k l m"),
        ("a b c d e f g", "h i", "a b c d e f <sep> h i"),
        ("a b", "h", "a b <sep> h <pad> <pad> <pad> <pad> <pad>"),
    ],
)
def test_long_pairs_lose_the_end_of_the_longer_sentence_first(premise, hypothesis, expected):
    assert sequence(premise.split(), hypothesis.split(), 9) == expected.split()


def test_contradicting_pairs_follow_the_others(root):
    plain, more = pairs_of(root), pairs_of(root, contradicting=True)
    assert more.train_dataset.tensors[0][:3].equal(plain.train_dataset.tensors[0])
    assert more.train_dataset.tensors[1].tolist()[3:] == [1]
    assert more.pairs["train"][3].premise == ADDED[0][0]
    shown = more.render("train", 3)
    assert shown.caption == "non-entailment (contradiction), contradicts a heuristic"
    assert shown.text == "Premise: A dog that a cat saw sat\nHypothesis: A cat sat"
    columns = {name: values[3] for name, values in more.group_columns("train").items()}
    assert columns == {
        "class": "non-entailment",
        "gold label": "contradiction",
        "heuristic": "none",
        "origin": "contradicts a heuristic",
        "subcase": "none",
    }


def test_hans_pairs_ask_the_same_question(root):
    data = pairs_of(root, queries="hans")
    assert data.train_dataset.tensors[0].equal(pairs_of(root).train_dataset.tensors[0])
    assert data.query_dataset.tensors[1].tolist() == [1, 0]
    captions = [data.render("query", index).caption for index in (0, 1)]
    assert captions == [
        "non-entailment, lexical_overlap, swap, eval",
        "entailment, subsequence, conjunction, train",
    ]
    assert data.pairs["query"][0].heuristic == "lexical_overlap"
    outputs = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    assert data.describe(outputs) == ["entailment (95%)", "entailment (50%)"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": "snli"}, 'queries must be "mnli" or "hans", got \'snli\''),
        ({"sequence_length": 2}, "sequence_length must be at least 3, .* got 2"),
        ({"holdout": 5}, "holdout must be between 1 and 4, got 5"),
        ({"num_train": 4}, "num_train must be between 1 and 3, got 4"),
        ({"num_query": 3}, "num_query must be between 1 and 2, got 3"),
        ({"vocabulary_size": 3}, "vocabulary_size must be at least 4, got 3"),
    ],
)
def test_bad_arguments(root, options, message):
    with pytest.raises(ValueError, match=message):
        pairs_of(root, **options).setup()


@pytest.mark.parametrize(
    ("option", "file"),
    [
        ({"contradicting": True}, "mnli/train_contradicting_heuristics.tsv.gz"),
        ({"queries": "hans"}, "hans_regenerated/hans_regenerated.tsv.gz"),
    ],
)
def test_only_the_files_that_are_asked_for_are_needed(root, option, file):
    (root / file).unlink()
    pairs_of(root).setup()
    with pytest.raises(FileNotFoundError, match=f"Missing data files: .*{file}"):
        pairs_of(root, **option).setup()


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (HEADER, ("a", "b"), "line 3: expected 3 fields as in the header, got 2"),
        (HEADER, ("a", "b", "-"), "line 3: expected a label .*non-entailment, got '-'"),
        ("premise\thypothesis\tlabel", ("a", "b", "neutral"), "got no gold_label"),
    ],
)
def test_broken_files_are_named(root, header, row, message):
    write(root / "mnli" / "dev_matched.tsv.gz", [MNLI[0], row], header)
    with pytest.raises(ValueError, match=f"dev_matched.tsv.gz.*{message}"):
        pairs_of(root).setup()


@pytest.mark.skipif("TDA_DATA_ROOT" not in os.environ, reason="TDA_DATA_ROOT is not set")
def test_real_files():
    data = MNLIData(root=os.environ["TDA_DATA_ROOT"], contradicting=True, queries="hans")
    assert (len(data.train_dataset), len(data.query_dataset)) == (8261, 200)
    assert len(data.vocabulary) == 2048
    assert {pair.heuristic for pair in data.pairs["query"]} == {
        "lexical_overlap",
        "subsequence",
        "constituent",
    }
    unknown = (data.train_dataset.tensors[0] == 1).float().mean()
    assert 0 < unknown < 0.2


# The encoder

ENCODER = dataclasses.replace(
    next(case for case in CASES if case.name == "transformer/pair_encoder"),
    factory=lambda: Encoder(7, 6, outputs=2, width=4, depth=1, heads=2),
)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("estimator", [Source(2, curvature="exact"), TracIn()])
def test_scores_of_the_encoder_are_those_of_dense_oracles(estimator, optimizer):
    """In float64. Padding's own embedding is never used: its curvature and moments are 0."""
    run, module, data = train(ENCODER, OPTIMIZERS[optimizer], checkpoints=(3, 6))
    if isinstance(estimator, TracIn):
        gradients = oracles.checkpoint_gradients(run, module, ENCODER.loss, data, [3, 6, 9])
        queries = oracles.checkpoint_gradients(
            run, module, ENCODER.loss, queries_of(ENCODER), [3, 6, 9]
        )
        expected = oracles.tracin(run, gradients, queries)
    else:
        work = everything(ENCODER, run, module, data, estimator.cuts())
        expected = oracles.source_average(run, *work)
    scores = attribute(ENCODER, run, module, data, estimator)
    assert relative(scores.by_segment, expected) < 1e-9


def test_influence_of_the_encoder_is_that_of_a_dense_oracle():
    run, module, data = train(ENCODER, OPTIMIZERS["adamw"], checkpoints=(8,))
    (curvature,) = oracles.mean_curvature(
        run, run.segments([8])[1:], module, ENCODER.criterion, data
    )
    _, _, gradients, query = everything(ENCODER, run, module, data, 1)
    decay = spread(run, run.steps.hyperparameters["weight_decay"][-1])
    expected = oracles.influence(curvature, decay, 0.03, gradients[run.last_step], query)
    scores = attribute(ENCODER, run, module, data, InfluenceFunction("exact", damping=0.03))
    assert relative(scores.values, expected) < 1e-9


def test_a_recorded_run_on_pairs_is_attributed(root, tmp_path):
    """With everything as the commands use it, in float32."""
    data = pairs_of(root, batch_size=2)
    torch.manual_seed(0)
    network = Encoder(30, 9, outputs=2, width=8, depth=1, heads=2)
    module = Classifier(network, functools.partial(torch.optim.AdamW, lr=0.01))
    recorder = TrajectoryRecorder(tmp_path / "run", num_checkpoints=3)
    quiet(max_epochs=3, callbacks=[recorder]).fit(module, data)
    for estimator in (Source(), InfluenceFunction(), TracIn()):
        attribution = AttributionModule(
            module, str(tmp_path / "run"), estimator, ClassificationTask()
        )
        errors = attribution.check(data.train_dataset, data.query_dataset)
        assert max(errors.values()) < 1e-4
        scores = attribution.attribute(data.train_dataset, data.query_dataset, trainer=quiet())
        assert scores.values.shape == (2, 3)
        assert scores.values.isfinite().all() and bool(scores.values.any())
