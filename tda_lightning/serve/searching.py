"""Searches of an index for the queries of several requests at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tda_lightning.index import AttributionIndex
from tda_lightning.runtime.loading import ExampleSource, Keys, one_key
from tda_lightning.serve.questions import Question
from tda_lightning.serve.refusal import Refusal
from tda_lightning.serve.service import Found


@dataclass(frozen=True)
class IndexSearcher:
    """Searches an index.

    Args:
        index: with the attribution and the training set that it was built with.
        queries: the query set, and how its items become batches.
        batch_size: examples at a time.
    """

    index: AttributionIndex
    queries: ExampleSource
    batch_size: int

    def search(self, questions: Sequence[Question], k: int) -> list[Found]:
        """``k`` proponents and opponents for each of several questions that have measurement and
        rerank in common.

        Raises:
            Refusal: an example came with a request, and the data set makes its batches itself.
        """
        asked = AskedExamples.of(questions, self.queries)
        found = self.index.search(
            self.queries.with_dataset(asked),
            k,
            measurement=questions[0].measurement,
            rerank=questions[0].rerank,
            batch_size=self.batch_size,
        )
        return [
            Found(
                _pairs(found.indices[row], found.values[row]),
                _pairs(found.opponents[row], found.opponent_values[row]),
            )
            for row in range(len(questions))
        ]


@dataclass(frozen=True)
class AskedExamples:
    """The queries of several questions, as a data set.

    Attributes:
        dataset: the query set.
        entries: an index in it, or an example of the request's own, for each question.
        keys: as :class:`ExampleSource` has it.
    """

    dataset: Any
    entries: Sequence[tuple[int | None, Any]]
    keys: Keys | None

    @staticmethod
    def of(questions: Sequence[Question], source: ExampleSource) -> AskedExamples:
        """The queries of some questions.

        Raises:
            Refusal: see :meth:`IndexSearcher.search`.
        """
        if source.keys is not None and any(question.index is None for question in questions):
            raise Refusal(
                400,
                "The queries of this run are made into batches by their data set, which takes no "
                'example of your own. Ask about them by their index: {"index": 3}.',
            )
        entries = [(question.index, question.item) for question in questions]
        return AskedExamples(source.dataset, entries, source.keys)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, row: Any) -> Any:
        if self.keys is not None and self.keys is not one_key:  # the data set makes the batches
            return self.dataset[self.keys([int(self.entries[int(one)][0] or 0) for one in row])]
        index, item = self.entries[int(row)]
        return item if index is None else self.dataset[index]


def _pairs(indices: Tensor, values: Tensor) -> list[tuple[int, float]]:
    return list(zip(indices.tolist(), values.tolist(), strict=True))
