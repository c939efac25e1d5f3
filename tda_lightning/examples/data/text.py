"""Running text as sequences of word numbers."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from tda_lightning.examples.data.base import DataModule, choose, find_files
from tda_lightning.records.rendered import Rendered

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
MARKS = (UNKNOWN, END_OF_LINE)


class WikiText2Data(DataModule):
    """WikiText-2 by words, cut into sequences of equal length; an example is (inputs, targets).

    Trains on the *validation* text and queries the *test* text, because these two files are small
    enough to share. So results are not comparable with published WikiText-2 results. The vocabulary
    consists of the most frequent words of the training text; all others are ``<unk>``.

    Args:
        root: folder that holds ``wikitext2/wiki.valid.tokens.gz`` and ``wiki.test.tokens.gz``.
        batch_size: sequences in a training batch.
        sequence_length: words that a sequence predicts.
        vocabulary_size: upper limit of the vocabulary, ``<unk>`` and ``<eos>`` included.
        min_count: words that appear less often are ``<unk>``.
        num_train: training sequences to keep, drawn with ``subset_seed``; None keeps all.
        num_query: queries to keep, likewise.
        subset_seed: seed of both draws.
        seed: of the order in which training examples are drawn.
        num_workers: processes that load batches.
    """

    source = (
        "They are the word-level validation and test files of WikiText-2 "
        "(https://huggingface.co/datasets/Salesforce/wikitext, wikitext-2-v1), compressed by gzip."
    )

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 16,
        sequence_length: int = 64,
        vocabulary_size: int = 4096,
        min_count: int = 2,
        num_train: int | None = None,
        num_query: int | None = 100,
        subset_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.root = root
        self.sequence_length = sequence_length
        self.vocabulary_size = vocabulary_size
        self.min_count = min_count
        self.num_train = num_train
        self.num_query = num_query
        self.subset_seed = subset_seed
        self.vocabulary: list[str] = []
        self._words: dict[str, list[list[str]]] = {}

    def load(self) -> tuple[Dataset, Dataset]:
        names = ["wiki.valid.tokens.gz", "wiki.test.tokens.gz"]
        words = [
            read_words(path) for path in find_files(self.root, "wikitext2", names, self.source)
        ]
        self.vocabulary = build_vocabulary(words[0], MARKS, self.vocabulary_size, self.min_count)
        train = sequences(encode(words[0], self.vocabulary), self.sequence_length)
        query = sequences(encode(words[1], self.vocabulary), self.sequence_length)
        kept = [
            choose(len(train), self.num_train, self.subset_seed, "num_train"),
            choose(len(query), self.num_query, self.subset_seed, "num_query"),
        ]
        train, query = train[kept[0]], query[kept[1]]
        length = self.sequence_length
        self._words = {
            split: [own[length * place : length * place + length + 1] for place in places.tolist()]
            for split, own, places in zip(("train", "query"), words, kept, strict=True)
        }
        return (
            TensorDataset(train[:, :-1], train[:, 1:]),
            TensorDataset(query[:, :-1], query[:, 1:]),
        )

    def documents(self, split: str) -> list[list[str]]:
        """The words of each sequence, the last predicted one included."""
        self.dataset(split)
        return self._words[split]

    def render(self, split: str, index: int) -> Rendered:
        self.dataset(split)
        known = set(self.vocabulary)
        words = [
            word if word in known else f"\u2039{word}\u203a" for word in self._words[split][index]
        ]
        caption = "Words in \u2039 \u203a are <unk> to the model." if split == "query" else ""
        # The first word is predicted by none; the loss of an example begins with the second.
        positions = [None, *range(self.sequence_length)]
        pieces = tuple(zip(readable_pieces(words), positions, strict=True))
        return Rendered(caption, text=readable(words), pieces=pieces)


def readable(words: Iterable[str]) -> str:
    """Words as a text: lines where they end, and WikiText's marks inside numbers resolved.

    Example:
        >>> readable("3 @.@ 1 mi <eos> <eos> = = Film = = <eos> award @-@ winning".split())
        '3.1 mi\\n= = Film = =\\naward-winning'
    """
    return "".join(readable_pieces(list(words))).rstrip("\n")


def readable_pieces(words: Sequence[str]) -> list[str]:
    """What each of the words adds to the readable text, the space before it included.

    Example:
        >>> readable_pieces("3 @.@ 1 mi <eos> <eos> = Film".split())
        ['3', '.', '1', ' mi', '\\n', '', '=', ' Film']
    """
    pieces: list[str] = []
    glue = ""  # before the next word
    for place, word in enumerate(words):
        inside = 0 < place < len(words) - 1
        if word == END_OF_LINE:
            empty = not pieces or pieces[-1] in ("", "\n")
            pieces.append("" if empty else "\n")
            glue = ""
        elif inside and len(word) == 3 and word[0] == word[2] == "@" and word[1] in "-.,":
            pieces.append(word[1])
            glue = ""
        else:
            pieces.append(glue + word)
            glue = " "
    return pieces


def read_words(path: Path) -> list[str]:
    """The words of a gzip-compressed text, with an end-of-line mark after each line."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [word for line in file for word in (*line.split(), END_OF_LINE)]


def build_vocabulary(
    words: Iterable[str], marks: Sequence[str], size: int, min_count: int
) -> list[str]:
    """``marks``, then the most frequent words; ties in alphabetical order.

    Example:
        >>> build_vocabulary("b a b c a b <eos>".split(), MARKS, size=4, min_count=1)
        ['<unk>', '<eos>', 'b', 'a']
    """
    if size <= len(marks):
        raise ValueError(f"vocabulary_size must be at least {len(marks) + 1}, got {size}.")
    counts = Counter(words)
    for mark in marks:
        counts.pop(mark, None)
    frequent = sorted(
        (word for word, count in counts.items() if count >= min_count),
        key=lambda word: (-counts[word], word),
    )
    return [*marks, *frequent[: size - len(marks)]]


def encode(words: Sequence[str], vocabulary: Sequence[str]) -> Tensor:
    """Position of each word in the vocabulary, ``<unk>``'s where it has none; int64 [word]."""
    position = {word: number for number, word in enumerate(vocabulary)}
    unknown = position[UNKNOWN]
    return torch.tensor([position.get(word, unknown) for word in words], dtype=torch.int64)


def sequences(tokens: Tensor, length: int) -> Tensor:
    """Cut a text into pieces of ``length + 1`` that overlap by one; int64 [sequence, length + 1].

    The last word of a piece is the first input of the next, so every word but the first is
    predicted once. An incomplete last piece is dropped.

    Example:
        >>> sequences(torch.arange(6), length=2)
        tensor([[0, 1, 2],
                [2, 3, 4]])
    """
    if len(tokens) <= length:
        raise ValueError(f"A text of {len(tokens)} words has no sequence of {length} + 1 words.")
    return tokens.unfold(0, length + 1, length).contiguous()
