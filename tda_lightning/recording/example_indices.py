"""Which training examples a batch is made of, without changing module, loader or order.

Lightning has no hook that sees a batch's indices, and a batch does not carry them. The loader's
batch sampler (its sampler where ``batch_size=None``) knows them, and must be listened to before
Lightning makes the first iterator, which is before ``on_train_start``. The last public point before
that is ``Strategy.process_dataloader``, through which Lightning passes every loader that it is
about to use, reloaded ones too. There the sampler is replaced, inside the user's own loader, by one
that behaves like it in everything and remembers what it hands out. Loader and strategy are put back
when the fit ends.

A loader draws ahead for its worker processes, and several iterators can be alive (reloaded loaders,
a user who looks at the training data in a hook). So each iterator has a queue of its own, and a
batch belongs to the iterator that was asked last: the loop asks for a batch right before
``on_train_batch_start``, and asks its iterator in the order in which it gets batches.

The last time that a loader asks its sampler before a batch is also the last moment before anything
is drawn for that batch: a loader without workers then reads the examples, and one with workers has
just got them. So the states of the random generators are read there.

A stream has no sampler. Its batches may say themselves which examples they hold, under a key that
the recorder is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tda_lightning.recording.observer import Observer
from tda_lightning.recording.resume import RecorderState
from tda_lightning.recording.trained_parameters import TrainedParameters
from tda_lightning.recording.trainer_hooks import ReplacedMethod
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Facts
from tda_lightning.runtime.random_states import Snapshot
from tda_lightning.store.fingerprints import num_examples

Indices = np.ndarray  # int64 [examples]


class ExampleIndices(Observer):
    """The example indices of the batches of one fit.

    Attributes:
        batch: indices of the batch under way; None between batches, and where there are none.
        absent: why there are no indices; None where there are.
        before: the random generators before the batch under way, with ``snapshots``.
        stated: whether the batches of a stream say which examples they hold.

    Args:
        snapshots: read the random generators each time that a loader has asked for indices.
        key: entry of the batches of a stream with the positions of their examples.
    """

    def __init__(self, snapshots: bool, key: str | None = None) -> None:
        self.stated, self._key = False, key
        self.batch: Indices | None = None
        self.absent: str | None = None
        self.before: Snapshot | None = None
        self._snapshots = snapshots
        self._asked_at: Snapshot | None = None  # when indices were last asked for
        self._last_asked: _RecordedIterator | None = None
        self._replaced: ReplacedMethod | None = None
        self._samplers: list[tuple[_RecordedSampler, DataLoader, str]] = []  # with their places
        self._num_examples = 0

    def attach(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._replaced = ReplacedMethod(trainer.strategy, "process_dataloader", self._process)

    def _process(self, process_dataloader: Callable[[object], object], loader: object) -> object:
        if not (self._trainer.validating or self._trainer.sanity_checking):
            self._listen(loader)
        return process_dataloader(loader)

    def _listen(self, loader: object) -> None:
        if not isinstance(loader, DataLoader):
            self.absent = f"the training loader is a {type(loader).__name__}, not a DataLoader"
            return
        if isinstance(loader.dataset, IterableDataset):
            self.stated = self._key is not None
            if not self.stated:
                self.absent = "the training data set is an IterableDataset"
            return
        slot = "sampler" if loader.batch_sampler is None else "batch_sampler"
        sampler = getattr(loader, slot)
        if type(sampler) is _RecordedSampler and sampler._indices is self:
            return  # the same loader, handed out again
        recorded = _RecordedSampler(sampler, self)
        # DataLoader refuses to have its samplers set; the instance's own dictionary does not.
        vars(loader)[slot] = recorded
        self._samplers.append((recorded, loader, slot))

    def begin(self, trainer: Trainer, trained: TrainedParameters) -> None:
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        self._num_examples = num_examples(dataset) or 0
        if self.absent is None and not self._samplers and not self.stated:
            self.absent = "the training loader was made before the recorder's setup"

    def facts(self) -> dict[str, Any]:
        return {"indices": "recorded" if self.absent is None else f"absent: {self.absent}"}

    def resume(self, facts: Facts, state: RecorderState) -> None:
        recorded = facts.settings["indices"]
        if recorded != "recorded":
            self.absent = recorded.removeprefix("absent: ")

    def read(self, batch: object) -> None:
        """Take what a batch of a stream says of its examples.

        Raises:
            UnsupportedTrainingError: it does not say them.
        """
        if not self.stated or self.absent is not None:
            return
        own = batch.get(self._key) if isinstance(batch, Mapping) else None
        positions = own.detach().cpu().numpy() if isinstance(own, Tensor) else np.asarray(own)
        if positions.ndim != 1 or positions.dtype.kind not in "iu" or (positions < 0).any():
            got = f"the keys {[*batch]}" if isinstance(batch, Mapping) else type(batch).__name__
            raise UnsupportedTrainingError(
                f"index_key={self._key!r}: expected each batch of the stream to hold the positions "
                f"of its examples there, whole numbers from 0 on, [batch]; got {got}. Add them to "
                "the rows, for example stream.map(..., with_indices=True)."
            )
        self.batch = positions.astype(np.int64)

    def begin_batch(self) -> None:
        if self.absent is not None or self.stated:
            return
        if self._snapshots:
            # A loop that gets its batches ahead of their turn has all before it gets to the last.
            self.before, self._asked_at = self._asked_at or Snapshot.take(), None
        if self._last_asked is None or not self._last_asked.queue:
            self.absent = "the training loader does not draw its batches from its sampler"
            return
        drawn = self._last_asked.queue.popleft()
        self.batch = as_indices(drawn, self._num_examples)
        if self.batch is None:
            keys = f"{drawn!r:.60}"
            self.absent = f"the training sampler hands out keys such as {keys}, not positions"

    def end_batch(self, outputs: Any) -> None:
        self.batch = None

    @property
    def ahead(self) -> bool:
        """Whether the loader has ever asked for a batch before the loop had got the one before."""
        return self._last_asked is not None and self._last_asked.ahead

    def asking(self, iterator: _RecordedIterator) -> None:
        """An iterator is about to ask its sampler."""
        self._last_asked = iterator

    def asked(self) -> None:
        """The sampler has answered."""
        if self._snapshots:
            self._asked_at = Snapshot.take()

    def detach(self) -> None:
        if self._replaced is not None:
            self._replaced.remove()
        while self._samplers:
            _take_out(*self._samplers.pop())
        self._replaced, self._last_asked = None, None


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


class _RecordedSampler:
    """Behaves like the sampler ``wrapped``; every iterator remembers what it hands out."""

    __slots__ = ("_indices", "_wrapped")

    def __init__(self, wrapped: Any, indices: ExampleIndices) -> None:
        object.__setattr__(self, "_wrapped", wrapped)
        object.__setattr__(self, "_indices", indices)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_wrapped"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._wrapped, name, value)

    def __iter__(self) -> Iterator[Any]:
        return _RecordedIterator(iter(self._wrapped), self._indices)

    def __len__(self) -> int:
        return len(self._wrapped)


def _take_out(recorded: _RecordedSampler, loader: DataLoader, slot: str) -> None:
    """Leave what ``recorded`` wraps in its place, be it in the loader or in another recorder's."""
    holder = vars(loader)[slot]
    if holder is recorded:
        vars(loader)[slot] = recorded._wrapped
    while type(holder) is _RecordedSampler:
        if holder._wrapped is recorded:
            object.__setattr__(holder, "_wrapped", recorded._wrapped)
        holder = holder._wrapped


class _RecordedIterator:
    """An iterator over batches of indices, and a queue of those that it has handed out."""

    def __init__(self, wrapped: Iterator[Any], indices: ExampleIndices) -> None:
        self._wrapped, self._indices = wrapped, indices
        self.queue: deque[Any] = deque()
        self.ahead = False

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_wrapped"), name)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        # At the end too: a loader with workers asks once more for each batch that it delivers.
        self._indices.asking(self)
        self.ahead = self.ahead or bool(self.queue)
        try:
            drawn = next(self._wrapped)
        finally:
            # A sampler may draw too, when it starts or each time.
            self._indices.asked()
        # A sampler may reuse the list that it hands out.
        self.queue.append(list(drawn) if isinstance(drawn, list) else drawn)
        return drawn
