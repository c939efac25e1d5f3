"""Where the random generators are not what the batch before left behind.

Draws within a batch follow from the states before it. Those in between do not (a new epoch's
sampler and workers draw seeds, a validation or another callback draws what it likes), so the states
are kept of each batch before which there were any. What a callback draws in the midst of a batch
looks like a draw of the batch itself: whoever repeats the batch must repeat the callback.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tda_lightning.runtime.random_states import Snapshot, States


class Jumps:
    """The states before the batches of one fit, compared with those after the ones before.

    A batch whose gradients come to nothing (a skipped step, an epoch cut short) is not in the
    steps table. What it drew is then a jump before the next one that is.

    Args:
        left: what the last step before this fit left behind; None at the start of a run.
    """

    def __init__(self, left: Mapping[str, Tensor] | None = None) -> None:
        self._after_step = None if left is None else Snapshot.of(left)
        self._after_batch = self._after_step  # those of steps under way too
        self._before: Snapshot | None = None
        self._kept = False  # the batch under way has its gradients in the parameters

    @property
    def left(self) -> States | None:
        """The states that the last step left behind; None before the first step of a run."""
        return None if self._after_step is None else self._after_step.states()

    def begin_batch(self, before: Snapshot) -> None:
        """The states right before the batch was fetched."""
        self._before, self._kept = before, False

    def keep_batch(self) -> States | None:
        """The batch belongs to the step under way: the states before it, if there was a jump."""
        assert self._before is not None
        self._kept = True
        return None if self._before == self._after_batch else self._before.states()

    def end_batch(self) -> None:
        """Nothing that comes is a part of the batch; asked a second time, nothing happens."""
        if self._kept:
            self._after_batch, self._kept = Snapshot.take(), False

    def end_step(self) -> None:
        """The step under way has become a row of the table."""
        self._after_step = self._after_batch

    def drop(self) -> None:
        """The batches of the step under way have come to nothing."""
        self._after_batch = self._after_step
