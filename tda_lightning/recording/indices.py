"""Which training examples a batch is made of, without changing module, loader or order.

Lightning has no hook that sees a batch's indices, and a batch itself does not carry them. What
knows them is the loader's batch sampler (its sampler where ``batch_size=None``), and it must be
listened to before Lightning makes the first iterator, which is before ``on_train_start``. The
last public point before that is ``Strategy.process_dataloader``, through which Lightning passes
every loader it is about to use, reloaded ones too. There the sampler is replaced, inside the
user's own loader, by one that behaves like it in everything and remembers what it hands out.
Loader and strategy are put back when the fit ends.

A loader draws ahead for its worker processes, and more than one iterator can be alive (reloaded
loaders, a user who looks at the training data in a hook). So each iterator has a queue of its
own, and a batch belongs to the iterator that was last asked: the loop asks for a batch right
before ``on_train_batch_start``, and asks its iterator in the order in which it gets batches.

The last time that a loader asks its sampler before a batch is also the last moment before whatever
is drawn for that batch: a loader that fetches for itself then reads the examples, and one with
workers has just got them. So this is where the states of the random generators are looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from tda_lightning.recording.wrapping import Wrapped
from tda_lightning.runtime.random_states import Snapshot

Indices = np.ndarray  # int64 [examples]


class IndexCapture:
    """Listens to the training loaders of one fit.

    Args:
        random: look at the random generators each time that a loader has asked for indices.
    """

    def __init__(self, random: bool = False) -> None:
        self.before: Snapshot | None = None  # the generators before the batch that was last taken
        self._random = random
        self._asked_at: Snapshot | None = None  # when indices were last asked for
        self.loaders: list[DataLoader] = []  # those listened to
        self.absent: str | None = None  # why there are no indices
        self._last_asked: _RecordedIterator | None = None
        self._undo: list[Callable[[], None]] = []

    def install(self, trainer: Trainer) -> None:
        """Listen to every training loader that ``trainer`` is going to use."""

        def wrap(process: Callable[..., Any]) -> Callable[..., Any]:
            def process_dataloader(dataloader: object) -> object:
                if not (trainer.validating or trainer.sanity_checking):
                    self._listen(dataloader)
                return process(dataloader)

            return process_dataloader

        self._undo.append(Wrapped(trainer.strategy, "process_dataloader", wrap).remove)

    def uninstall(self) -> None:
        """Put strategy and loaders back as they were."""
        while self._undo:
            self._undo.pop()()
        self.loaders.clear()
        self._last_asked = None

    def _listen(self, loader: object) -> None:
        if not isinstance(loader, DataLoader):
            self.absent = f"the training loader is a {type(loader).__name__}, not a DataLoader"
            return
        if isinstance(loader.dataset, IterableDataset):
            self.absent = "the training data set is an IterableDataset"
            return
        slot = "sampler" if loader.batch_sampler is None else "batch_sampler"
        sampler = getattr(loader, slot)
        if type(sampler) is _RecordedSampler and sampler._capture is self:
            return  # the same loader, handed out again
        self.loaders.append(loader)
        recorded = _RecordedSampler(sampler, self)
        # DataLoader refuses to have its samplers set; the instance's own dictionary does not.
        vars(loader)[slot] = recorded

        self._undo.append(lambda: _take_out(recorded, loader, slot))

    @property
    def ahead(self) -> bool:
        """Whether the loader has ever asked for a batch before the loop had got the one before."""
        return self._last_asked is not None and self._last_asked.ahead

    def asking(self, iterator: _RecordedIterator) -> None:
        self._last_asked = iterator

    def asked(self) -> None:
        if self._random:
            self._asked_at = Snapshot.take()

    def take(self) -> Any | None:
        """What the sampler handed out for the batch that the loop has just got."""
        if self._random:
            # A loop that gets its batches ahead of their turn has all before it gets to the last.
            self.before, self._asked_at = self._asked_at or Snapshot.take(), None
        if self._last_asked is None or not self._last_asked.queue:
            return None
        return self._last_asked.queue.popleft()


def as_indices(drawn: Any, num_examples: int) -> Indices | None:
    """Positions in the data set, or None when ``drawn`` are keys of another kind."""
    array = np.asarray(drawn)
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in "iu" or array.ndim > 1:
        return None
    indices = array.astype(np.int64).reshape(-1)
    # As in any sequence, -1 is the last example.
    return np.where(indices < 0, indices + num_examples, indices)


class _Delegate:
    """Passes for ``wrapped`` in every respect that a subclass does not define itself."""

    __slots__ = ("_capture", "_wrapped")

    def __init__(self, wrapped: Any, capture: IndexCapture) -> None:
        object.__setattr__(self, "_wrapped", wrapped)
        object.__setattr__(self, "_capture", capture)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_wrapped"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._wrapped, name, value)


class _RecordedSampler(_Delegate):
    """A sampler whose every iterator remembers what it hands out."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Any]:
        return _RecordedIterator(iter(self._wrapped), self._capture)

    def __len__(self) -> int:
        return len(self._wrapped)


def _take_out(recorded: _RecordedSampler, loader: DataLoader, slot: str) -> None:
    """Leave what ``recorded`` wraps in its place, be it in the loader or in another recorder's."""
    holder = vars(loader)[slot]
    inner = object.__getattribute__(recorded, "_wrapped")
    if holder is recorded:
        vars(loader)[slot] = inner
        return
    while type(holder) is _RecordedSampler:
        beneath = object.__getattribute__(holder, "_wrapped")
        if beneath is recorded:
            object.__setattr__(holder, "_wrapped", inner)
            return
        holder = beneath


class _RecordedIterator(_Delegate):
    """An iterator over batches of indices and those that were handed out, in order."""

    __slots__ = ("ahead", "queue")

    def __init__(self, wrapped: Any, capture: IndexCapture) -> None:
        super().__init__(wrapped, capture)
        object.__setattr__(self, "queue", deque())
        object.__setattr__(self, "ahead", False)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        # At the end too: a loader with workers asks once more for each batch that it delivers.
        self._capture.asking(self)
        if self.queue:
            object.__setattr__(self, "ahead", True)
        try:
            drawn = next(self._wrapped)
        finally:
            # A sampler may draw too, when it starts or each time.
            self._capture.asked()
        # A sampler may reuse the list that it hands out.
        self.queue.append(list(drawn) if isinstance(drawn, list) else drawn)
        return drawn
