"""Measurements by functions of the user's, and of the plain outputs of a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning.measurements.base import Measurement, function_name, function_of
from tda_lightning.measurements.outputs import network_outputs, raw_outputs
from tda_lightning.tasks import AttributionTask
from tda_lightning.tasks.batches import Batch
from tda_lightning.tasks.loss_calls import inside_transform


@dataclass
class Function(Measurement):
    """Any function (module, batch) -> [batch]. The task does not see the queries, so they may have
    any structure.

    Attributes:
        function: or its full name.
        larger_is_better: a positive score then says that the example raises it.
        words: what it is, for the report; None: its name.
    """

    function: Callable[..., Any] | str
    larger_is_better: bool = False
    words: str | None = None

    def __post_init__(self) -> None:
        self._function = function_of(self.function, "function")
        self.sign = -1 if self.larger_is_better else 1
        self.takes_loss = False

    @property
    def quantity(self) -> str:
        return self.words or function_name(self.function)

    def measure(
        self, task: AttributionTask, module: nn.Module, batch: Batch, queries: Tensor
    ) -> Tensor:
        values = self._function(module, batch)
        _require_each(values, queries, self.quantity)
        return self.sign * values  # type: ignore[no-any-return]


@dataclass
class OfOutputs(Measurement):
    """Any function of the outputs of the network, [batch, ...] -> [batch].

    The outputs are what the network returns on the way to the task's loss: logits, predictions.

    Attributes:
        function: or its full name.
        larger_is_better: a positive score then says that the example raises it.
        words: what it is, for the report; None: its name.
    """

    function: Callable[..., Any] | str
    larger_is_better: bool = True
    words: str | None = None

    def __post_init__(self) -> None:
        self._function = function_of(self.function, "function")
        self.sign = -1 if self.larger_is_better else 1

    @property
    def quantity(self) -> str:
        return self.words or f"{function_name(self.function)} of the outputs"

    def measure(
        self, task: AttributionTask, module: nn.Module, batch: Batch, queries: Tensor
    ) -> Tensor:
        values = self._function(network_outputs(task, module, batch))
        _require_each(values, queries, self.quantity)
        return self.sign * values  # type: ignore[no-any-return]


@dataclass
class Output(Measurement):
    """One number of the network's output, as of a regression: a positive score says that the
    example raises it.

    Attributes:
        index: which one, of all outputs of a query in a row.
    """

    index: int = 0

    @property
    def quantity(self) -> str:
        return f"output {self.index} of the network"

    def measure(
        self, task: AttributionTask, module: nn.Module, batch: Batch, queries: Tensor
    ) -> Tensor:
        rows = raw_outputs(task, module, batch)
        if not -rows.shape[1] <= self.index < rows.shape[1]:
            raise ValueError(
                f"index must be 0 to {rows.shape[1] - 1}, the outputs of a query; got {self.index}."
            )
        return self.sign * rows[:, self.index]


def _require_each(values: object, queries: Tensor, what: str) -> None:
    if isinstance(values, Tensor) and values.shape == (len(queries),):
        if values.requires_grad or inside_transform() or not torch.is_grad_enabled():
            return
        raise ValueError(
            f"The measurement {what} has no gradient: it must be computed from the module's "
            "parameters, without detach() or no_grad()."
        )
    got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
    raise ValueError(
        f"The measurement {what} must be one number for each of {len(queries)} queries, a tensor "
        f"[{len(queries)}]; got {got}."
    )


def as_measurement(asked: object) -> Measurement | None:
    """The measurement itself; of a function (module, batch) -> [batch], the measurement that it
    computes; None for the task's own.

    Raises:
        TypeError: it is neither.
    """
    if asked is None or isinstance(asked, Measurement):
        return asked
    if callable(asked) and not isinstance(asked, type):
        return Function(asked)
    got = f"the class {asked.__name__}: make one of it" if isinstance(asked, type) else repr(asked)
    raise TypeError(
        "measurement must be one of tda_lightning.measurements, such as Probability(target=3), a "
        f"function (module, batch) -> [batch], or None for the task's own; got {got:.200}."
    )
