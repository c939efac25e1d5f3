"""Scores of texts by the words that they share: BM25, which knows no model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from tda_lightning.records.scores import Scores
from tda_lightning.runtime.loading import ExampleSource

Documents = Sequence[Sequence[Hashable]]  # words or token numbers of each example


def bm25(train: Documents, queries: Documents, k1: float = 1.5, b: float = 0.75) -> Scores:
    r"""Okapi BM25, the ranking function of text search.

    .. math::
        s_{qn} = \sum_{w \in q} \log\Big(1 + \frac{N - N_w + 1/2}{N_w + 1/2}\Big)
        \frac{(k_1 + 1)\, c_{nw}}{c_{nw} + k_1 (1 - b + b\, |n| / \overline{|n|})}

    over the words of the query, repeated ones each time, with :math:`c_{nw}` how often training
    example n contains w, :math:`N_w` how many examples do, and :math:`|n|` the example's length.
    The 1 in the logarithm, as in Lucene, keeps frequent words from counting against an example.

    Args:
        train: words or token numbers of each training example, without padding.
        queries: of each query.
        k1: how soon repetitions of a word stop to count.
        b: how much of the length is divided out, from 0 to 1.

    Raises:
        ValueError: no training example contains anything.

    References:
        | The Probabilistic Relevance Framework: BM25 and Beyond (Robertson & Zaragoza, 2009)
        | https://doi.org/10.1561/1500000019

    Example:
        >>> bm25(["the cat".split(), "the dog".split()], [["a", "dog"]]).values
        tensor([[0.0000, 0.6931]])
    """
    words = {word: number for number, word in enumerate(dict.fromkeys(w for d in train for w in d))}
    if not words:
        raise ValueError("BM25 compares words, and the training examples contain none.")
    counts, asked = _counts(train, words), _counts(queries, words)
    containing = np.bincount(counts.indices, minlength=len(words))
    rarity = np.log1p((len(train) - containing + 0.5) / (containing + 0.5))
    length = np.array([len(document) for document in train])
    example = np.repeat(np.arange(len(train)), np.diff(counts.indptr))
    damped = counts.data + k1 * (1 - b + b * length / length.mean())[example]
    counts.data = rarity[counts.indices] * (k1 + 1) * counts.data / damped
    values = (asked @ counts.T).toarray()
    return Scores(torch.from_numpy(values).float(), provenance={"estimator": "bm25"})


def token_numbers(source: ExampleSource) -> list[list[int]]:
    """Token numbers of each example, read from its batches: ``input_ids`` of a dictionary, without
    what its ``attention_mask`` hides, or the first tensor of a tuple, all of it.

    Raises:
        ValueError: the examples are not sequences of token numbers.
    """
    documents: list[list[int]] = []
    for indices in source.batches():
        batch: object = source.read(indices)
        mask = None
        if isinstance(batch, Mapping):
            tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
        else:
            tokens = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(
                "BM25 compares words: expected batches of token numbers [example, position], or a "
                "data module with documents(split)."
            )
        for row, example in enumerate(tokens):
            shown = example if mask is None else example[mask[row] != 0]
            documents.append(shown.tolist())
    return documents


def _counts(documents: Documents, words: Mapping[Hashable, int]) -> csr_array:
    """How often each document contains each word: float64 [document, word]."""
    found = [[words[word] for word in document if word in words] for document in documents]
    ends = np.cumsum([0, *map(len, found)])
    flat = np.fromiter((number for document in found for number in document), np.int64, ends[-1])
    counts = csr_array((np.ones(len(flat)), flat, ends), shape=(len(documents), len(words)))
    counts.sum_duplicates()
    return counts
