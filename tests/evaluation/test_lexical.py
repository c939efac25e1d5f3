"""BM25 and activation similarity, against loops over words and layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning.evaluation import activation_cosine, bm25, token_numbers
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.tasks import LanguageModelingTask, RegressionTask


def by_the_formula(train: list[list[int]], query: list[int], k1: float, b: float) -> list[float]:
    mean = sum(map(len, train)) / len(train)
    scores = []
    for document in train:
        total = 0.0
        for word in query:
            containing = sum(word in other for other in train)
            rarity = math.log(1 + (len(train) - containing + 0.5) / (containing + 0.5))
            count = document.count(word)
            length = 1 - b + b * len(document) / mean
            total += rarity * count * (k1 + 1) / (count + k1 * length)
        scores.append(total)
    return scores


def test_bm25_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)

    def texts(count: int) -> list[list[int]]:
        sizes = torch.randint(0, 9, (count,), generator=generator).tolist()
        return [torch.randint(12, (size,), generator=generator).tolist() for size in sizes]

    train, queries = texts(15), [*texts(4), [99], []]  # words that no example has, and none
    found = bm25(train, queries, k1=1.2, b=0.6)
    expected = [by_the_formula(train, query, 1.2, 0.6) for query in queries]
    torch.testing.assert_close(found.values, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert found.provenance["estimator"] == "bm25"
    assert (found.values[4:] == 0).all()
    # Words and their numbers are the same to it.
    words = [[str(word) for word in text] for text in (*train, *queries)]
    assert torch.equal(bm25(words[:15], words[15:], 1.2, 0.6).values, found.values)
    with pytest.raises(ValueError, match="the training examples contain none"):
        bm25([[], []], [[1]])


def test_token_numbers_are_read_from_batches() -> None:
    tokens = torch.arange(12).view(3, 4)
    assert (
        token_numbers(ExampleSource.of(TensorDataset(tokens, tokens), 2, "training"))
        == tokens.tolist()
    )
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])
    rows = [{"input_ids": t, "attention_mask": m} for t, m in zip(tokens, mask, strict=True)]
    shown = token_numbers(ExampleSource.of(DataLoader(rows, batch_size=2), 2, "training"))
    assert shown == [[0, 1, 2, 3], [4, 5], [9, 10, 11]]
    for other in (TensorDataset(torch.randn(3, 4)), TensorDataset(torch.arange(3))):
        with pytest.raises(ValueError, match="expected batches of token numbers"):
            token_numbers(ExampleSource.of(other, 2, "training"))


class Tiny(nn.Module):
    """Two linear layers over embedded tokens, the first one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.middle = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(self.embedding(tokens))
        return self.head(torch.tanh(self.middle(torch.tanh(hidden))))


def test_activations_are_compared_layer_by_layer() -> None:
    torch.manual_seed(0)
    module = Tiny()
    tokens = torch.randint(7, (6, 4))
    train, query = (TensorDataset(part[:, :-1], part[:, 1:]) for part in (tokens[:4], tokens[4:]))
    state = {name: 2 * tensor for name, tensor in module.state_dict().items()}
    found = activation_cosine(module, LanguageModelingTask(), state, train, query, batch_size=3)
    module.load_state_dict(state)
    with torch.no_grad():
        # The last call of a layer counts; positions are averaged.
        again = torch.tanh(module.middle(module.embedding(tokens[:, :-1])))
        last = torch.tanh(module.middle(again))
        expected = torch.zeros(2, 4)
        for layer in (again, last):
            pooled = layer.mean(1)
            for q in range(2):
                for n in range(4):
                    expected[q, n] += F.cosine_similarity(pooled[4 + q], pooled[n], dim=0) / 2
    torch.testing.assert_close(found.values, expected)
    no_linear = nn.Conv1d(1, 1, 1)
    data = TensorDataset(torch.ones(2, 1, 3), torch.ones(2, 1, 3))
    with pytest.raises(ValueError, match="calls no linear layer"):
        activation_cosine(no_linear, RegressionTask(), {}, data, data)
