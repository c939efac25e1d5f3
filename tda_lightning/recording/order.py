"""When the recorder looks, among other callbacks that change what it looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging

from tda_lightning.recording.wrapping import Wrapped


def come_first(trainer: Trainer, callback: Callback) -> None:
    """Let ``callback`` see every hook before the other callbacks, whose order stays.

    Averaging callbacks replace the module's weights when training ends: the last checkpoint must
    have been written by then.
    """
    others = [other for other in _callbacks(trainer) if other is not callback]
    # A new list: Lightning is walking along the present one.
    vars(trainer)["callbacks"] = [callback, *others]


def precedes_averaging(trainer: Trainer) -> bool:
    """Whether training is over and the epoch that starts only counts the batch statistics of
    averaged weights, as ``StochasticWeightAveraging`` does for modules with batch norm.

    Lightning steps the optimizer once in it, at the last batch, with gradients left from training.
    """
    return any(
        isinstance(other, StochasticWeightAveraging) and trainer.current_epoch == other.swa_end + 1
        for other in _callbacks(trainer)
    )


def _callbacks(trainer: Trainer) -> list[Callback]:
    return list(vars(trainer)["callbacks"])  # public, but not declared for type checkers


class BeforeBatch:
    """Calls ``notify`` between the last hook of Lightning before a batch and its forward pass.

    That is ``Strategy.on_train_batch_start``, which strategies may define and callbacks cannot.
    """

    def __init__(self, trainer: Trainer, notify: Callable[[], None]) -> None:
        def wrap(own: Callable[..., Any]) -> Callable[..., Any]:
            def on_train_batch_start(*args: Any, **kwargs: Any) -> Any:
                notify()
                return own(*args, **kwargs)

            return on_train_batch_start

        self._wrapped = Wrapped(trainer.strategy, "on_train_batch_start", wrap)

    def remove(self) -> None:
        self._wrapped.remove()
