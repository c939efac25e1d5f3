"""The index, the model and the data of one run, open for questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from tda_lightning.records.data_module import AttributedData
from tda_lightning.serve.example_form import Form, form_of_dataset
from tda_lightning.serve.limits import Limits
from tda_lightning.serve.looks import Looks
from tda_lightning.serve.questions import MEASUREMENTS, Question, QuestionReader
from tda_lightning.serve.refusal import Refusal
from tda_lightning.serve.worker import Worker

SPLITS = ("train", "query")


@dataclass(frozen=True)
class Found:
    """What a search found for one query: (training example, score), the strongest first."""

    proponents: Sequence[tuple[int, float]]
    opponents: Sequence[tuple[int, float]]


class Searcher(Protocol):
    """Finds the strongest examples for queries.

    Attributes:
        num_rows: examples that are searched: the training set, and those that were appended.
    """

    num_rows: int

    def during(self, work: Callable[[], None]) -> None:
        """Do all of a thread's work with the run open around it."""

    def search(self, questions: Sequence[Question], k: int) -> Sequence[Found]:
        """``k`` proponents and opponents for each of several questions that have measurement and
        rerank in common."""


@dataclass(frozen=True)
class _Show:
    split: str
    index: int
    whole: bool  # its JSON too


_Job = Question | _Show


class Service:
    """Answers questions about a run; every answer is a dictionary of JSON.

    Args:
        name: of the run.
        data: training set and queries, and how they look.
        searcher: over the index.
        facts: of the index and the run, for ``/health``.
        limits: of requests.
        class_number: the number of a class or token that is named by a word.
    """

    def __init__(
        self,
        name: str,
        data: AttributedData,
        searcher: Searcher,
        facts: Mapping[str, object],
        limits: Limits,
        class_number: Callable[[str, str], int],
    ) -> None:
        self.name = name
        self.limits = limits
        self.facts = dict(facts)
        self.sizes = {"train": len(data.train_dataset), "query": len(data.query_dataset)}
        self.began = time.monotonic()
        self.answered = 0
        self.searches = 0
        self._data = data
        self._searcher = searcher
        self._looks = Looks(data.render)
        self._form, reason = _form(data.query_dataset)
        self.reader = QuestionReader(
            limits, self.sizes["query"], searcher.num_rows, self._form or reason, class_number
        )
        self._worker: Worker[_Job, dict[str, object]] = Worker(
            self._answer, _alike, limits.batch, limits.seconds / 4, searcher.during
        )
        self._worker.wait_until_open()

    def ask(self, question: Question) -> Future[dict[str, object]]:
        """The answer to a question, when it is there."""
        return self._worker.submit(question)

    def show(self, split: str, index: int, whole: bool) -> Future[dict[str, object]]:
        """How an example looks; with ``whole`` its JSON too, as a question may hold it.

        Raises:
            Refusal: there is no such example.
        """
        if split not in SPLITS:
            raise Refusal(400, f"split must be train or query; got {split!r:.60}.")
        if not 0 <= index < self.sizes[split]:
            raise Refusal(
                404,
                f"There is no example {index} in {split}: they are 0 to {self.sizes[split] - 1}.",
            )
        return self._worker.submit(_Show(split, index, whole))

    def health(self) -> dict[str, object]:
        """What is served, and what a question may hold."""
        return {
            "status": "ok",
            "run": self.name,
            "train": self.sizes["train"],
            "searched": self._searcher.num_rows,
            "queries": self.sizes["query"],
            **self.facts,
            "example": self._form.words if self._form else None,
            "measurements": list(MEASUREMENTS),
            "limits": {"k": self.limits.k, "rerank": self.limits.rerank},
            "seconds_up": round(time.monotonic() - self.began, 1),
            "answered": self.answered,
            "searches": self.searches,
        }

    def stop(self, seconds: float) -> bool:
        """Answer nothing more; whether what was being answered ended within ``seconds``."""
        return self._worker.stop(seconds)

    def _answer(self, jobs: Sequence[_Job]) -> list[dict[str, object]]:
        shown = [self._shown(job) for job in jobs if isinstance(job, _Show)]
        return shown or self._searched([job for job in jobs if isinstance(job, Question)])

    def _shown(self, job: _Show) -> dict[str, object]:
        look = self._looks.of(job.split, job.index)
        if not job.whole:
            return look
        if self._form is None:
            raise Refusal(400, str(self.reader.form))
        dataset = self._data.train_dataset if job.split == "train" else self._data.query_dataset
        return {**look, "example": self._form.write(dataset[job.index])}

    def _searched(self, questions: Sequence[Question]) -> list[dict[str, object]]:
        began = time.monotonic()
        found = self._searcher.search(questions, max(question.k for question in questions))
        seconds = round(time.monotonic() - began, 4)
        self.answered += len(questions)
        self.searches += 1
        measurement = questions[0].measurement
        about = "the task's own measurement" if measurement is None else measurement.quantity
        return [
            {
                "query": dict(question.name),
                "measurement": about,
                "proponents": _listed(one.proponents[: question.k]),
                "opponents": _listed(one.opponents[: question.k]),
                "reranked": question.rerank,
                "together_with": len(questions) - 1,
                "seconds": seconds,
            }
            for question, one in zip(questions, found, strict=True)
        ]


def _listed(found: Sequence[tuple[int, float]]) -> list[dict[str, object]]:
    return [{"index": index, "score": score} for index, score in found]


def _alike(job: _Job) -> Hashable:
    return ("show",) if isinstance(job, _Show) else (job.asked, job.rerank)


def _form(dataset: Any) -> tuple[Form | None, str]:
    """The form of the queries; or None, and why they have none."""
    try:
        return form_of_dataset(dataset), ""
    except ValueError as error:
        return None, f"The queries of this run have no form in JSON: {error}."
