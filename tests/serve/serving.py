"""A service in a process of its own, over a small run that needs no index: its searcher knows the
answer of every query by a formula, so that answers that were lost or mixed up are seen."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.data import TensorDataset

from tda_lightning.report import DatasetRenderer
from tda_lightning.serve import Limits
from tda_lightning.serve.example_form import form_of_dataset
from tda_lightning.serve.questions import Question, QuestionReader
from tda_lightning.serve.server import serve
from tda_lightning.serve.service import Found, Service

NUM_TRAIN, NUM_QUERY = 200, 80


def data():
    """Pictures with labels."""
    pictures = torch.rand(
        NUM_TRAIN + NUM_QUERY, 1, 4, 4, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(NUM_TRAIN + NUM_QUERY) % 10
    train = TensorDataset(pictures[:NUM_TRAIN], labels[:NUM_TRAIN])
    query = TensorDataset(pictures[NUM_TRAIN:], labels[NUM_TRAIN:])
    names = [f"class {number}" for number in range(10)]
    render = DatasetRenderer(train, query, class_names=names)
    return SimpleNamespace(train_dataset=train, query_dataset=query, render=render)


class Known:
    """Scores by a formula of the query's numbers, after some time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.own = data()
        self.num_rows = NUM_TRAIN
        self.seconds = seconds
        self.train = self.own.train_dataset.tensors[0].flatten(1).double()

    def during(self, work: Callable[[], None]) -> None:
        work()

    def search(self, questions: Sequence[Question], k: int) -> list[Found]:
        time.sleep(self.seconds)
        return [self.found(question, k) for question in questions]

    def found(self, question: Question, k: int) -> Found:
        item = question.item
        if item is None:
            item = self.own.query_dataset[question.index]
        if int(item[1]) > 9:
            raise IndexError("Target 12 is out of bounds.")
        if float(item[0].sum()) > 1e6:
            raise RuntimeError("Cannot read /home/somebody/private/weights.bin")
        scores = self.train @ (item[0].flatten().double() - 0.5)
        scores = scores * (1 + len(question.asked))
        return Found(*(strongest(scores, k, sign) for sign in (1, -1)))


def strongest(scores, k, sign):
    """(index, score) of the k largest of ``sign`` times the scores."""
    values, indices = (sign * scores).topk(min(k, len(scores)))
    return list(zip(indices.tolist(), (sign * values).tolist(), strict=True))


def known_service(seconds: float = 0.0, limits: Limits | None = None) -> Service:
    """A service over :class:`Known`."""
    return Service(
        "runs/known", data(), Known(seconds), {"index": "known"}, limits or Limits(), class_number
    )


def reader() -> QuestionReader:
    """Reads questions about :func:`data`."""
    own = data().query_dataset
    return QuestionReader(Limits(), len(own), NUM_TRAIN, form_of_dataset(own), class_number)


def class_number(name: str, word: str) -> int:
    """class 3 -> 3."""
    if not re.fullmatch("class [0-9]", word):
        raise ValueError(f"measurement.{name}={word!r} is not among the 10 words.")
    return int(word[-1])


class Running:
    """A service in a process that was forked from this one, which has imported torch already.

    Attributes:
        url: its address.
        process: that it runs in.
    """

    def __init__(self, folder: Path, run: Callable[[], None]) -> None:
        self.out, self.err = folder / "out", folder / "err"
        self.process = multiprocessing.get_context("fork").Process(target=self._child, args=(run,))
        self.process.start()
        self.url = self._address()

    def _child(self, run: Callable[[], None]) -> None:
        for number, path in ((1, self.out), (2, self.err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
        run()

    def _address(self) -> str:
        for _ in range(1200):
            text = self.out.read_text() if self.out.exists() else ""
            if found := re.search(r"http://\S+:\d+", text):
                return found.group()
            assert self.process.is_alive(), self.err.read_text()
            time.sleep(0.05)
        raise AssertionError("no address after a minute")

    def end(self, number: int) -> tuple[int | None, str, str]:
        """Send a signal; exit status, output and errors."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        self.process.join(30)
        return self.process.exitcode, self.out.read_text(), self.err.read_text()


@contextmanager
def running(run: Callable[[], None]) -> Iterator[Running]:
    """``run()`` in another process: it serves until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        service = Running(Path(folder), run)
        try:
            yield service
        finally:
            service.process.kill()
            service.process.join()


def known(
    seconds: float = 0.0, limits: Limits | None = None, token: str = ""
) -> Callable[[], None]:
    """Serves :func:`known_service`."""
    return lambda: serve(known_service(seconds, limits), "127.0.0.1", 0, token)
