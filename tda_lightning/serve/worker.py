"""One thread that owns the model and the data, and answers waiting requests in batches.

Nothing of torch, Lightning or a data set is asked by two threads at once. Requests that wait while
a batch is computed make up the next one, so that throughput grows with the number of clients.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

A = TypeVar("A")
J = TypeVar("J")
_REMEMBERED = 1000
_FIRST = 8  # jobs of the first batch, of which nobody knows how long it takes


class Stopped(Exception):
    """The service ends before the request was answered."""


@dataclass
class _Waiting(Generic[J, A]):
    job: J
    future: Future[A] = field(default_factory=Future)


class Worker(Generic[J, A]):
    """Answers jobs in a thread of its own.

    Args:
        answer: the answers of several jobs with the same key, in order.
        key: jobs of different keys are not answered together.
        most: jobs that are answered together.
        seconds: that a batch should take at most: fewer jobs make up one where they have taken
            longer so far.
        around: runs all of the thread's work, with what it needs open around it.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[J]], Sequence[A]],
        key: Callable[[J], Hashable],
        most: int,
        seconds: float,
        around: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self._answer = answer
        self._key = key
        self._most = most
        self._seconds = seconds
        self._each: dict[Hashable, float] = {}  # seconds of a job in the latest batch, by its key
        self._waiting: deque[_Waiting[J, A]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        # A daemon: a search that takes hours does not keep the process from ending.
        self._begun: Future[None] = Future()
        work = self._work if around is None else partial(around, self._work)
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def wait_until_open(self) -> None:
        """Wait until the first job can be answered; the error of what is around it."""
        self._begun.result()

    def submit(self, job: J) -> Future[A]:
        """The future answer; cancel it where nobody waits for it any more."""
        waiting: _Waiting[J, A] = _Waiting(job)
        with self._changed:
            if self._stopping:
                waiting.future.set_exception(Stopped())
                return waiting.future
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting.future

    def stop(self, seconds: float) -> bool:
        """Answer nothing new; jobs that wait get :class:`Stopped`.

        Returns:
            Whether the batch that was being answered ended within ``seconds``.
        """
        with self._changed:
            self._stopping = True
            left, self._waiting = self._waiting, deque()
            self._changed.notify()
        for waiting in left:
            if waiting.future.set_running_or_notify_cancel():
                waiting.future.set_exception(Stopped())
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            if self._begun.done():
                raise
            self._begun.set_exception(error)

    def _work(self) -> None:
        self._begun.set_result(None)
        while True:
            with self._changed:
                while not self._waiting and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                batch = self._next_batch()
            if batch:
                self._answer_all(batch)

    def _next_batch(self) -> list[_Waiting[J, A]]:
        """The oldest job and those like it; of those whose clients gave up, none."""
        batch: list[_Waiting[J, A]] = []
        rest: deque[_Waiting[J, A]] = deque()
        key: Hashable = None
        most = 1
        for waiting in self._waiting:
            if batch and (len(batch) == most or self._key(waiting.job) != key):
                rest.append(waiting)
            elif waiting.future.set_running_or_notify_cancel():
                if not batch:
                    key = self._key(waiting.job)
                    most = self._size(key)
                batch.append(waiting)
        self._waiting = rest
        return batch

    def _size(self, key: Hashable) -> int:
        each = self._each.get(key)
        fit = _FIRST if each is None else int(self._seconds / max(each, 1e-9))
        return max(1, min(self._most, fit))

    def _answer_all(self, batch: Sequence[_Waiting[J, A]]) -> None:
        began = time.monotonic()
        try:
            answers = self._answer([waiting.job for waiting in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            # One of them is to blame; the others get their answers.
            for waiting in batch:
                self._answer_all([waiting])
            return
        if len(self._each) >= _REMEMBERED:
            self._each.clear()
        self._each[self._key(batch[0].job)] = (time.monotonic() - began) / len(batch)
        for waiting, one in zip(batch, answers, strict=True):
            waiting.future.set_result(one)
