"""Places in a trainer for which Lightning has no callback hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer, callbacks
from lightning.pytorch.callbacks import StochasticWeightAveraging


class ReplacedMethod:
    """``owner.name`` replaced for a while, also where others do so at the same time.

    Two recorders replace methods of one strategy, and either may end first. Only the outermost
    replacement can be taken away; one beneath another passes every call on until its turn comes.

    Args:
        owner: whose attribute dictionary takes the replacement.
        name: of the method.
        replacement: called with the method as it is now, then the arguments of each call.
    """

    def __init__(self, owner: object, name: str, replacement: Callable[..., Any]) -> None:
        self._owner, self._name, self._replacement = owner, name, replacement
        self._active = True
        self._before = vars(owner).get(name)  # None: the method of the class
        self._inner = getattr(owner, name)
        vars(owner)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._active:
            return self._replacement(self._inner, *args, **kwargs)
        return self._inner(*args, **kwargs)

    def remove(self) -> None:
        """Put the method back as it was."""
        self._active = False
        methods = vars(self._owner)
        while isinstance(top := methods.get(self._name), ReplacedMethod) and not top._active:
            if top._before is None:
                del methods[self._name]
            else:
                methods[self._name] = top._before


def come_first(trainer: Trainer, callback: Callback) -> None:
    """Let ``callback`` see every hook before the other callbacks, whose order stays.

    Averaging callbacks replace the module's weights when training ends: the last checkpoint must
    have been written by then.
    """
    # Public, but not declared for type checkers. A new list: Lightning iterates over the old one.
    others = [other for other in vars(trainer)["callbacks"] if other is not callback]
    vars(trainer)["callbacks"] = [callback, *others]


def averaged_by(trainer: Trainer) -> str | None:
    """Class of the callback that averages weights, if there is one."""
    kinds = (StochasticWeightAveraging, getattr(callbacks, "WeightAveraging", ()))  # from 2.6 on
    averaging = [one for one in vars(trainer)["callbacks"] if isinstance(one, kinds)]
    return type(averaging[0]).__name__ if averaging else None


def precedes_averaging(trainer: Trainer) -> bool:
    """Whether training is over, and the epoch that starts only updates the batch statistics of
    averaged weights, as ``StochasticWeightAveraging`` does for modules with batch norm.

    Lightning steps the optimizer once in it, at the last batch, with gradients left from training.
    """
    return any(
        isinstance(other, StochasticWeightAveraging) and trainer.current_epoch == other.swa_end + 1
        for other in vars(trainer)["callbacks"]
    )
