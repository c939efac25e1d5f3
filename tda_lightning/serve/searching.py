"""Searches of an index for the queries of several requests at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Subset

from tda_lightning.index import AttributionIndex
from tda_lightning.index.asking import Asker
from tda_lightning.index.opened import in_session, training_source
from tda_lightning.index.reranking import reranked
from tda_lightning.index.run_record import require_same_run
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.runtime.indexed import Keys, one_key
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.serve.questions import Question
from tda_lightning.serve.refusal import Refusal
from tda_lightning.serve.service import Found
from tda_lightning.session.session import Session


class IndexSearcher:
    """Searches an index, with model, run and curvature opened once.

    Args:
        index: with the attribution and the training set that it was built with.
        queries: the query set, and how its items become batches.
        batch_size: examples at a time.
        trainer: whose device the searches run on.
    """

    def __init__(
        self, index: AttributionIndex, queries: ExampleSource, batch_size: int, trainer: Any = None
    ) -> None:
        if index.attribution is None:
            raise ValueError("The index must be opened with its attribution and training set.")
        self.index = index
        self.queries = queries
        self.num_rows = index.num_examples
        self._attribution = index.attribution
        self._train = training_source(index.attribution, index.train, batch_size)
        self._trainer = trainer
        self._asker: Asker | None = None

    def during(self, work: Callable[[], None]) -> None:
        """Do all of a thread's work with the run open around it."""

        def inside(session: Session) -> None:
            require_same_run(self.index.facts.provenance, session)
            estimator = self._attribution.estimator
            self._asker = Asker(estimator, self.index.compression, session)
            work()

        some = self.queries.with_dataset(Subset(self.queries.dataset, [0]))
        in_session(self._attribution, self._train, some, inside, self._trainer)

    def search(self, questions: Sequence[Question], k: int) -> list[Found]:
        """``k`` proponents and opponents for each of several questions that have measurement and
        rerank in common; :meth:`AttributionIndex.search` finds the same.

        Raises:
            Refusal: an example came with a request, and the data set makes its batches itself.
        """
        assert self._asker is not None
        measurement, rerank = questions[0].measurement, questions[0].rerank
        queries = self.queries.with_dataset(AskedExamples.of(questions, self.queries))
        asked = self._asker.encode_others(queries, measurement)
        if not bool(asked.isfinite().all()):
            raise NonFiniteError("The gradient of the query is NaN or infinite.")
        found = self.index.search_encoded(asked, max(k, rerank))
        if rerank:
            found = reranked(self._attribution, self._train, queries, found, k, rerank, measurement)
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
