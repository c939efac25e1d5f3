"""Where the random generators are not what the batch before left behind.

Draws within a batch follow from the states before it. Those in between do not (a new epoch's
sampler and workers draw seeds, a validation or another callback draws what it likes), so the states
before each batch are recorded if there were any. What a callback draws in the middle of a batch
looks like a draw of the batch itself: whoever repeats the batch must repeat the callback.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from tda_lightning.recording.example_indices import ExampleIndices
from tda_lightning.recording.observer import Observer
from tda_lightning.recording.resume import RecorderState
from tda_lightning.recording.trained_parameters import TrainedParameters
from tda_lightning.records.trajectory import Facts
from tda_lightning.runtime.random_states import Snapshot, States, current_states


class RngLog(Observer):
    """The states before the batches of one fit, compared with those after the batches before.

    A batch whose gradients are thrown away (a skipped step, an epoch cut short) is not in the
    steps table. What it drew is then a jump before the next one that is.

    Attributes:
        jump: the states before the batch under way, if they are not those after the one before.

    Args:
        indices: takes a snapshot before each batch.
        absent: why no states are recorded before batches; None if they are.
    """

    def __init__(self, indices: ExampleIndices, absent: str | None = None) -> None:
        self.jump: States | None = None
        self._indices, self._absent = indices, absent
        self._after_step: Snapshot | None = None
        self._after_batch: Snapshot | None = None  # also of batches whose step is under way
        self._before: Snapshot | None = None
        self._in_step = False  # the batch under way has its gradients in the parameters
        self._workers = False

    def begin(self, trainer: Trainer, trained: TrainedParameters) -> None:
        self._workers = bool(getattr(trainer.train_dataloader, "num_workers", 0))
        if self._indices.stated:
            self._absent = self._absent or "the training data set is a stream"

    def facts(self) -> dict[str, Any]:
        absent = self._absent or self._indices.absent
        return {"random": "recorded" if absent is None else f"absent: {absent}"}

    def resume(self, facts: Facts, state: RecorderState) -> None:
        recorded = facts.settings.get("random", "absent: not recorded from the start")
        if recorded != "recorded":
            self._absent = recorded.removeprefix("absent: ")
        elif state.left is not None:
            self._after_batch = self._after_step = Snapshot.of(state.left)

    @property
    def _recorded(self) -> bool:
        return self._absent is None and self._indices.absent is None

    def left(self) -> States:
        """The states that the last step left behind; those of now if that is not known."""
        after = self._after_step if self._recorded else None
        return current_states() if after is None else after.states()

    def begin_batch(self) -> None:
        self.jump, self._in_step = None, False
        if self._recorded and self._indices.ahead and not self._workers:
            # The generators before the batch itself was fetched are those of a batch or more ago.
            self._absent = "batches are fetched ahead of their turn"
        self._before = self._indices.before

    def end_backward(self) -> None:
        if self._recorded:
            assert self._before is not None
            self._in_step = True
            self.jump = None if self._before == self._after_batch else self._before.states()

    def end_batch(self, outputs: Any) -> None:
        if self._in_step:
            self._after_batch, self._in_step = Snapshot.take(), False

    def end_step(self, taken: bool) -> None:
        if taken:
            self._after_step = self._after_batch
        else:
            self.drop()

    def drop(self) -> None:
        self._after_batch = self._after_step

    def state(self) -> dict[str, Any]:
        after = self._after_step if self._recorded else None
        return {"left": None if after is None else after.states()}
