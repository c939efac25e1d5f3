r"""What can be changed in a training set, each as the gradients before it minus those after it.

A score is the predicted change of a query's measurement if the edit were made. To first order an
edit counts by the change :math:`\delta` that it makes to the training gradient (docs/methods.md,
"Edits"):

======== ==========================================================
Removal  the example's gradient
Relabel  its gradient minus that under the other label
Replace  its gradient minus that of the other example
Addition minus the gradient of the new example
======== ==========================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Term:
    """One of the gradients whose sum is the change that an edit makes.

    Attributes:
        sign: 1 for a gradient before the edit, -1 for one after it.
        index: of the training example whose gradient it is; None: that of ``example``.
        example: in the form of the data set's items.
        labels: the label that takes the place of the example's own, as the only element; empty for
            its own.
        used_with: the training example whose uses in training it goes with; None: the edit's own
            ``index``.
    """

    sign: float
    index: int | None = None
    example: object = None
    labels: tuple[object, ...] = ()
    used_with: int | None = None


class Edit(Protocol):
    """A change of the training set; a new kind is a class that has these two."""

    @property
    def index(self) -> int | None:
        """The training example whose uses in training it changes; None where it changes none."""

    def terms(self) -> tuple[Term, ...]:
        """The gradients before the edit minus those after it."""


@dataclass(frozen=True)
class Removal:
    """Training example ``index`` is left out: what a score means by default.

    Example:
        >>> Removal(3).terms()
        (Term(sign=1.0, index=3, example=None, labels=(), used_with=None),)
    """

    index: int

    def terms(self) -> tuple[Term, ...]:
        """Its own gradient."""
        return (Term(1.0, self.index),)


@dataclass(frozen=True)
class Relabel:
    """Training example ``index`` has another ``label``."""

    index: int
    label: object

    def terms(self) -> tuple[Term, ...]:
        """Its gradient minus that under the other label."""
        return (Term(1.0, self.index), Term(-1.0, self.index, labels=(self.label,)))


@dataclass(frozen=True)
class Replace:
    """Another ``example`` stands at ``index``, in the form of the data set's items."""

    index: int
    example: object

    def terms(self) -> tuple[Term, ...]:
        """The gradient of the example that stood there minus that of the other."""
        return (Term(1.0, self.index), Term(-1.0, example=self.example))


@dataclass(frozen=True)
class Addition:
    """An ``example`` that was not in training is added, in the form of the data set's items.

    It counts as if it had been used as often as an average example, so that its score is the
    negative of removing a training example with its gradient.
    """

    example: object

    @property
    def index(self) -> None:
        """It changes the use of no training example."""
        return None

    def terms(self) -> tuple[Term, ...]:
        """Minus the gradient of the new example."""
        return (Term(-1.0, example=self.example),)
