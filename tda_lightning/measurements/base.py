"""What every measurement offers."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sized
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tda_lightning.records.provenance import MeasurementRecord
from tda_lightning.tasks import AttributionTask
from tda_lightning.tasks.batches import Batch


class Measurement(ABC):
    """A number for each query that scores are about, in place of the task's own.

    A new one has :meth:`measure`, :attr:`quantity` and :attr:`sign`.

    Attributes:
        sign: measurement = sign x quantity; -1 where a larger quantity is better, so that a
            positive score says that the example raises the quantity.
        takes_loss: whether the task's loss is computed for the queries; otherwise they may have
            another structure than training examples.
    """

    sign: int = -1
    takes_loss: bool = True
    per_query: ClassVar[tuple[str, ...]] = ()  # settings that may be a list with one for each query

    @property
    @abstractmethod
    def quantity(self) -> str:
        """What is asked about, in words."""

    @abstractmethod
    def measure(
        self, task: AttributionTask, module: nn.Module, batch: Batch, queries: Tensor
    ) -> Tensor:
        """The measurement of each query of a batch, [batch]; smaller is better.

        Args:
            queries: their indices, int64 [batch].
        """

    def terms(
        self, task: AttributionTask, module: nn.Module, batch: Batch, queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Numbers [batch, position] whose gradients sum to that of the measurement, and which
        positions they are of, bool [batch, position].

        Raises:
            ValueError: the measurement is of no single positions.
        """
        raise ValueError(
            f"This measurement ({self.quantity}) is one number for a query and has no parts by "
            "token. Ask about tokens by Loss, LogProbability, Probability, Logit, Margin or "
            "Contrast, or leave out by_token='query'."
        )

    def check(self, num_query: int) -> None:
        """Refuse settings for another number of queries.

        Raises:
            ValueError: names the setting.
        """
        for name in self.per_query:
            own = getattr(self, name)
            if _is_list(own) and len(own) != num_query:
                raise ValueError(
                    f"{name} has {len(own)} entries, and there are {num_query} queries: give one "
                    "for all, or one for each query."
                )

    @property
    def each_own(self) -> list[str]:
        """Settings that differ between queries."""
        return [name for name in self.per_query if _is_list(getattr(self, name))]

    def record(self) -> MeasurementRecord:
        """For the provenance."""
        return {"quantity": self.quantity, "sign": self.sign}

    def settings(self) -> str:
        """What determines it, as text: part of what an interrupted attribution resumes by."""
        names = [item.name for item in fields(self)] if is_dataclass(self) else list(vars(self))
        return f"{type(self).__qualname__}({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"


def _is_list(value: object) -> bool:
    return isinstance(value, Sized) and not isinstance(value, str)


def function_of(given: Callable[..., Any] | str, name: str) -> Callable[..., Any]:
    """A function, or the one that a dotted name stands for.

    Raises:
        ValueError: there is none of that name.
    """
    if callable(given):
        return given
    place, _, attribute = str(given).rpartition(".")
    try:
        found = getattr(importlib.import_module(place), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{name} must be a function or its full name, such as my_package.my_module.my_function;"
            f" got {given!r} ({error})."
        ) from error
    if not callable(found):
        raise ValueError(f"{name} names {given!r}, which is no function.")
    return found  # type: ignore[no-any-return]


def function_name(given: Callable[..., Any] | str) -> str:
    """What a function is called in the provenance."""
    if isinstance(given, str):
        return given
    return f"{getattr(given, '__module__', '')}.{getattr(given, '__qualname__', repr(given))}"
