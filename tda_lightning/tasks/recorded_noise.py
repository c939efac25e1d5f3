"""The random numbers that a step drew in training, drawn again at other weights and in eval mode.

Dropout and its like draw from the same generator as a step's noise, in train mode and not in eval
mode: the generator's state at the start of the step does not lead to the same noise. So the step is
run in train mode once, with a note of the generators' states at every draw (by the line of code),
and in eval mode each draw starts from the state that its line had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.runtime.checkpointing import without_recomputation
from tda_lightning.runtime.random_states import Snapshot, unchanged_randomness
from tda_lightning.tasks.draw_sites import Site, Sites
from tda_lightning.tasks.noise_rules import RULES
from tda_lightning.tasks.step_noise import restarted_by

_DRAWING = frozenset(RULES) | {
    F.feature_alpha_dropout,
    F.fractional_max_pool2d,
    F.fractional_max_pool3d,
    F.multi_head_attention_forward,
    F.rrelu,
    F.scaled_dot_product_attention,
    torch.binomial,
    torch.rrelu,
    Tensor.random_,
}


class RecordedNoise:
    """The draws of one batch of the run.

    Args:
        start: states of the generators before the step.
    """

    def __init__(self, start: Snapshot) -> None:
        self.start = start
        self._states: dict[Site, Snapshot] = {}

    def note(self, step: Callable[[], object]) -> Snapshot:
        """Run the step in train mode; how it leaves the generators."""
        self._states.clear()
        self.start.restore()
        with restarted_by(None), _Noting(self._states):
            step()
        return Snapshot.take()

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """A step that runs while active draws what it drew in training.

        Raises:
            UnsupportedTrainingError: it draws what it did not draw then, or from a generator of
                its own.
        """
        with unchanged_randomness():
            again = _Again(self.start, self._states)
            with without_recomputation(), restarted_by(again.restart), again:
                yield
            again.require_known()


class _Noting(TorchFunctionMode):
    """Notes the generators' states before each draw."""

    def __init__(self, states: dict[Site, Snapshot]) -> None:
        super().__init__()
        self.states, self._sites = states, Sites()

    def __torch_function__(  # type: ignore[override]
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in _DRAWING:
            if kwargs.get("generator") is not None:
                raise UnsupportedTrainingError(
                    "training_step draws from a generator of its own, whose states are not "
                    "recorded."
                )
            self.states[self._sites.following()] = Snapshot.take()
        return func(*args, **kwargs)


class _Again(TorchFunctionMode):
    """Puts the generators into the noted states before each draw."""

    def __init__(self, start: Snapshot, states: dict[Site, Snapshot]) -> None:
        super().__init__()
        self._start, self._states, self._sites = start, states, Sites()
        self._left = torch.empty(0)  # torch's state after the last draw that was seen
        self.restart()

    def restart(self) -> None:
        """Begin a run of the step."""
        self._sites.restart()
        self._start.restore()
        self._left = torch.get_rng_state()

    def __torch_function__(  # type: ignore[override]
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func not in _DRAWING:
            return func(*args, **kwargs)
        self.require_known()
        state = self._states.get(self._sites.following())
        if state is not None:
            state.restore()
            self._left = torch.get_rng_state()
        result = func(*args, **kwargs)
        if state is None:
            self.require_known()
        self._left = torch.get_rng_state()
        return result

    def require_known(self) -> None:
        """Refuse random numbers that were drawn since the last draw that was seen."""
        if not torch.equal(self._left, torch.get_rng_state()):
            raise UnsupportedTrainingError(
                "training_step draws random numbers in eval mode where it drew none in training, "
                "or by a function that cannot be seen."
            )
