"""A batch remembers which examples of which data set it is made of, so that it can be cut into
batches of one: by its layout, or by reading its examples again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch.utils.weak import WeakIdKeyDictionary

from tda_lightning.runtime.layouts import CannotCut, Rule, cut, first_axis
from tda_lightning.runtime.structures import tensors


class Reader(Protocol):
    """Reads the examples of one data set for one module."""

    def rule_of(self, batch: object, indices: Sequence[int]) -> Rule:
        """How a batch of these examples is cut."""

    def single(self, index: int) -> object:
        """The batch of one."""

    @property
    def example(self) -> Callable[[Any, int], Any] | None:
        """What the task has in place of both."""


@dataclass(frozen=True)
class Origin:
    """Where a batch comes from.

    Attributes:
        reader: of its examples.
        indices: of its examples in the data set.
        change: what was done to the batch since it was read, and is to be done to a batch of one;
            None: nothing.
        known: False where the batch was changed in a way that reading again does not repeat.
    """

    reader: Reader
    indices: tuple[int, ...]
    change: Callable[[Any], Any] | None = None
    known: bool = True

    def rule_of(self, batch: object) -> Rule:
        """How the batch is cut."""
        return self.reader.rule_of(batch, self.indices)

    def single(self, batch: object, position: int) -> object:
        """The example at ``position`` as a batch of one."""
        if self.reader.example is not None:
            return self.reader.example(batch, position)
        return self.cut(batch, position)

    def cut(self, batch: object, position: int) -> object:
        """:meth:`single` without the task's own way."""
        rule = self.rule_of(batch)
        if rule.whole:
            with suppress(CannotCut):
                return cut(rule, batch, position, len(self.indices))
        if not self.known:
            raise CannotCut(
                "A batch with other labels than those of its data set cannot be cut into examples "
                "here. Override AttributionTask.example."
            )
        alone = self.reader.single(self.indices[position])
        return alone if self.change is None else self.change(alone)


# By the tensors of a batch, and by itself where it can be; with all tensors that it had.
_origins: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remember(batch: object, origin: Origin) -> None:
    """Note where a batch comes from, as long as it lives."""
    own = tuple(tensors(batch))
    entry = (tuple(map(id, own)), origin)
    for key in own or (batch,):
        try:
            _origins[key] = entry
        except TypeError:
            return  # it takes no weak reference


def inherit(batch: object, changed: object, change: Callable[[Any], Any] | None = None) -> None:
    """Note that ``changed`` is ``batch``, changed.

    Args:
        change: what does the same to a batch of one; None where nothing does.
    """
    origin = origin_of(batch)
    if origin is not None and changed is not batch:
        known = origin.known and change is not None
        earlier = origin.change
        both = change if earlier is None or change is None else lambda one: change(earlier(one))
        remember(changed, replace(origin, change=both, known=known))


def origin_of(batch: object) -> Origin | None:
    """Where a batch comes from; None where that is not known, or some of its tensors are others
    than they were."""
    own = tuple(tensors(batch))
    identities = tuple(map(id, own))
    for key in own or (batch,):
        try:
            found = _origins.get(key)
        except TypeError:
            return None
        if found is not None and found[0] == identities:
            origin: Origin = found[1]
            return origin
    return None


def rule_of(batch: object, count: int) -> Rule:
    """How a batch is cut: as its data set shows, or else along the first axes.

    Raises:
        CannotCut: its task has a way of its own.
    """
    origin = origin_of(batch)
    if origin is None:
        return first_axis(batch, count)
    if origin.reader.example is not None:
        raise CannotCut("The task has a way of its own to make batches of one.")
    return origin.rule_of(batch)
