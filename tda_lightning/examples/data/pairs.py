"""Pairs of sentences: does the first entail the second?"""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from tda_lightning.examples.data.base import DataModule, choose, find_files, predicted_classes
from tda_lightning.examples.data.text import UNKNOWN, build_vocabulary, encode
from tda_lightning.examples.models.pretrained import encode_pairs, load_tokenizer
from tda_lightning.records.rendered import Rendered

PADDING, SEPARATOR = "<pad>", "<sep>"
# Their numbers are 0, 1 and 2, as ``tda_lightning.examples.models.Encoder`` expects.
MARKS = (PADDING, UNKNOWN, SEPARATOR)
CLASSES = ("entailment", "non-entailment")
# HANS knows no neutral pairs (McCoy et al., 2019, sec. 2), so both sets ask its question.
LABELS = {"entailment": 0, "neutral": 1, "contradiction": 1, "non-entailment": 1}


class Pair(NamedTuple):
    """Two sentences and the label that their file gives them.

    Attributes:
        heuristic: the heuristic of HANS that the pair tests; empty for MNLI.
        subcase: the pattern that the pair follows; empty for MNLI.
        origin: "eval" or "train" in HANS, "contradicts a heuristic" for the added MNLI pairs.
    """

    premise: str
    hypothesis: str
    gold_label: str
    heuristic: str = ""
    subcase: str = ""
    origin: str = ""


class MNLIData(DataModule):
    """Sentence pairs of MultiNLI, entailment (class 0) or not (class 1); an example is (inputs,
    class).

    Trains on the matched *development* pairs, except for some that are held out, because that file
    is small enough to share. So results are not comparable with published MNLI results. Neutral
    and contradiction are one class, so that training and HANS (McCoy et al., 2019,
    https://arxiv.org/abs/1902.01007) ask the same question. The HANS pairs here are regenerated
    from its templates, so results are not comparable with published HANS results.

    Inputs are the words' numbers [position]: premise, ``<sep>``, hypothesis, then ``<pad>``. Words
    are lower-cased; the vocabulary is the most frequent ones of the pairs that are not held out,
    everything else is ``<unk>``. With a ``tokenizer`` they are that tokenizer's fields [field,
    position] instead, as :class:`~tda_lightning.examples.models.Pretrained` takes them. A pair that
    is too long loses the ends of its sentences, the longer one's first.

    Args:
        root: folder that holds ``mnli/`` and ``hans_regenerated/``.
        batch_size: pairs in a training batch.
        queries: "mnli" for held-out pairs, "hans" for the regenerated HANS pairs.
        holdout: pairs kept apart from training.
        num_train: training pairs to keep; None keeps all the others.
        num_query: queries to keep; None keeps all.
        split_seed: seed of these draws.
        contradicting: also train on MNLI pairs that contradict the heuristics of HANS; they follow
            the others.
        sequence_length: words (or tokens) of a pair, separator included.
        vocabulary_size: upper limit of the vocabulary, the three marks included.
        min_count: words that appear less often are ``<unk>``.
        tokenizer: folder of a Hugging Face checkpoint whose tokenizer to use instead.
        seed: of the order in which training examples are drawn.
        num_workers: processes that load batches.

    Attributes:
        pairs: what the examples say, by split ("train" or "query"), once loaded.
        vocabulary: the words by their number; empty with a ``tokenizer``.
    """

    source = (
        "They are the matched development pairs of MultiNLI (https://cims.nyu.edu/~sbowman/multinli)"
        ", its training pairs that contradict the heuristics of HANS, and pairs from the templates "
        "of HANS (both from https://github.com/tommccoy1/hans), each with tab-separated columns "
        "premise, hypothesis and gold_label under a header line, compressed by gzip."
    )

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 32,
        queries: Literal["mnli", "hans"] = "mnli",
        holdout: int = 1815,
        num_train: int | None = None,
        num_query: int | None = 200,
        split_seed: int = 0,
        contradicting: bool = False,
        sequence_length: int = 48,
        vocabulary_size: int = 2048,
        min_count: int = 2,
        tokenizer: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if queries not in ("mnli", "hans"):
            raise ValueError(f'queries must be "mnli" or "hans", got {queries!r}.')
        if sequence_length < 3:
            raise ValueError(
                "sequence_length must be at least 3, for a word, the separator and a word, got "
                f"{sequence_length}."
            )
        self.root = root
        self.queries = queries
        self.holdout = holdout
        self.num_train = num_train
        self.num_query = num_query
        self.split_seed = split_seed
        self.contradicting = contradicting
        self.sequence_length = sequence_length
        self.vocabulary_size = vocabulary_size
        self.min_count = min_count
        self.tokenizer = tokenizer
        self.vocabulary: list[str] = []
        self.pairs: dict[str, list[Pair]] = {}

    def load(self) -> tuple[Dataset, Dataset]:
        pairs = self._read("mnli", "dev_matched.tsv.gz")
        if not 1 <= self.holdout < len(pairs):
            raise ValueError(f"holdout must be between 1 and {len(pairs) - 1}, got {self.holdout}.")
        held_out = set(choose(len(pairs), self.holdout, self.split_seed, "holdout").tolist())
        train = [pair for place, pair in enumerate(pairs) if place not in held_out]
        if self.tokenizer is None:
            # Of all of them, so that a word has the same number whatever is trained on.
            self.vocabulary = build_vocabulary(
                (word for pair in train for word in [*words(pair[0]), *words(pair[1])]),
                MARKS,
                self.vocabulary_size,
                self.min_count,
            )
        train = self._some(train, self.num_train, "num_train")
        if self.contradicting:
            added = self._read("mnli", "train_contradicting_heuristics.tsv.gz")
            train += [pair._replace(origin="contradicts a heuristic") for pair in added]
        if self.queries == "hans":
            query = self._read("hans_regenerated", "hans_regenerated.tsv.gz")
        else:
            query = [pairs[place] for place in sorted(held_out)]
        query = self._some(query, self.num_query, "num_query")
        self.pairs = {"train": train, "query": query}
        return self._dataset(train), self._dataset(query)

    def describe(self, outputs: Tensor) -> list[str]:
        """The likeliest class of each pair and its probability."""
        return predicted_classes(outputs, CLASSES)

    def group_columns(self, split: str) -> dict[str, list[str]]:
        """The class of each pair, and where it comes from."""
        self.dataset(split)
        pairs = self.pairs[split]
        return {
            "class": [CLASSES[LABELS[pair.gold_label]] for pair in pairs],
            "gold label": [pair.gold_label for pair in pairs],
            "heuristic": [pair.heuristic or "none" for pair in pairs],
            "subcase": [pair.subcase or "none" for pair in pairs],
            "origin": [pair.origin or "MNLI" for pair in pairs],
        }

    def documents(self, split: str) -> list[list[str]]:
        """The words of premise and hypothesis."""
        self.dataset(split)
        return [[*words(pair[0]), *words(pair[1])] for pair in self.pairs[split]]

    def render(self, split: str, index: int) -> Rendered:
        self.dataset(split)
        pair = self.pairs[split][index]
        label = CLASSES[LABELS[pair.gold_label]]
        if pair.gold_label != label:
            label += f" ({pair.gold_label})"
        about = [label, pair.heuristic, pair.subcase, pair.origin]
        return Rendered(
            caption=", ".join(filter(None, about)),
            text=f"Premise: {pair.premise.strip()}\nHypothesis: {pair.hypothesis.strip()}",
        )

    def _read(self, folder: str, name: str) -> list[Pair]:
        (path,) = find_files(self.root, folder, [name], self.source)
        return read_pairs(path)

    def _some(self, pairs: list[Pair], size: int | None, what: str) -> list[Pair]:
        return [pairs[place] for place in choose(len(pairs), size, self.split_seed, what).tolist()]

    def _dataset(self, pairs: Sequence[Pair]) -> Dataset:
        length = self.sequence_length
        if self.tokenizer is None:
            rows = [sequence(words(pair[0]), words(pair[1]), length) for pair in pairs]
            inputs = encode([word for row in rows for word in row], self.vocabulary)
            inputs = inputs.view(len(rows), length)
        else:
            inputs = encode_pairs(
                load_tokenizer(self.tokenizer),
                [pair.premise for pair in pairs],
                [pair.hypothesis for pair in pairs],
                length,
            )
        return TensorDataset(inputs, torch.tensor([LABELS[pair.gold_label] for pair in pairs]))


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a gzip-compressed, tab-separated file; quotes mean nothing in it.

    Raises:
        ValueError: a column is missing, or a line has other fields or another label than expected;
            names it.
    """
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        lines = [line.rstrip("\r\n").split("\t") for line in file]
    header = lines[0] if lines else []
    missing = {"premise", "hypothesis", "gold_label"} - set(header)
    if missing:
        raise ValueError(
            f"{path}: expected the columns premise, hypothesis and gold_label under a header line, "
            f"got no {', '.join(sorted(missing))}."
        )
    pairs = []
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise ValueError(
                f"{path}, line {number}: expected {len(header)} fields as in the header, "
                f"got {len(line)}."
            )
        row = dict(zip(header, line, strict=True))
        if row["gold_label"] not in LABELS:
            raise ValueError(
                f"{path}, line {number}: expected a label that is one of {', '.join(LABELS)}, "
                f"got {row['gold_label']!r}. Drop pairs that have none."
            )
        pairs.append(
            Pair(
                row["premise"],
                row["hypothesis"],
                row["gold_label"],
                row.get("heuristic", ""),
                row.get("subcase", ""),
                row.get("split", ""),
            )
        )
    return pairs


def words(sentence: str) -> list[str]:
    """Lower-case words, with what follows an apostrophe, and single marks.

    Example:
        >>> words("I don't, um, know.")
        ['i', "don't", ',', 'um', ',', 'know', '.']
    """
    return re.findall(r"\w+(?:'\w+)?|[^\w\s]", sentence.lower())


def sequence(premise: Sequence[str], hypothesis: Sequence[str], length: int) -> list[str]:
    """Premise, ``<sep>``, hypothesis and ``<pad>``, ``length`` words in all.

    Where they do not fit, the longer sentence loses its end, and then both.

    Example:
        >>> sequence("a b c d".split(), ["e"], length=5)
        ['a', 'b', 'c', '<sep>', 'e']
        >>> sequence(["a"], ["e"], length=5)
        ['a', '<sep>', 'e', '<pad>', '<pad>']
    """
    room = length - 1
    second = min(len(hypothesis), max(room // 2, room - len(premise)))
    row = [*premise[: room - second], SEPARATOR, *hypothesis[:second]]
    return row + [PADDING] * (length - len(row))
