"""What an index keeps of a gradient: so many numbers, by which inner products can be guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from tda_lightning.gradients import Gradient

# Of a batch of examples in a term, as a kind of compression has them: those at two checkpoints are
# added by +, and multiplied with weights [batch, 1] by *.
Coordinates: TypeAlias = Any


class Rough(Protocol):
    """A cheaper :meth:`Compression.dot` with some queries, and a bound on what it is off by."""

    def products(self, stored: Tensor) -> Tensor:
        """About the products with rows, [query, row]."""

    def largest(self, number: float) -> Tensor:
        """How much they are off at most, in rows without a number beyond this one, [query]."""

    def bound(self, stored: Tensor) -> Tensor:
        """How much they are off at most in each of these rows, [query, row]."""


class Compression(Protocol):
    """A way to compress gradients, and to compare them with responses.

    Gradients and responses first become coordinates, by a linear map for each term
    (``responses.py``), so that those of several checkpoints can be averaged. Of an example's
    coordinates in all terms ``width`` numbers are stored. A new kind is a class that has these,
    listed in ``compressions.py``.

    Attributes:
        kind: its name in files.
        degree: c times the stored numbers have c to this power times the inner products.
        width: how many numbers are stored of an example.
    """

    kind: ClassVar[str]
    degree: ClassVar[int]

    @property
    def width(self) -> int:
        """How many numbers are stored of an example."""

    def coordinates(self, term: int, gradients: Mapping[str, Gradient]) -> Coordinates:
        """Of a term's gradients, by block."""

    def stored(self, coordinates: Sequence[Coordinates]) -> Tensor:
        """What is kept of examples with these coordinates, of one term after the other: [batch,
        width], all of about one size, so that they can be rounded together."""

    def response_coordinates(self, term: int, responses: Mapping[str, Tensor]) -> Tensor:
        """Of a term's responses [query, groups, rows, columns], by block: [query, coordinate of
        the term]."""

    def asked(self, coordinates: Tensor) -> Tensor:
        """What is compared with stored numbers, of queries with these coordinates: [query, any]."""

    def dot(self, asked: Tensor, stored: Tensor) -> Tensor:
        """The sums over terms of the inner products, about: [query, example]."""

    def rough(self, asked: Tensor) -> Rough | None:
        """A cheaper product with these queries; None where there is none."""

    def tensors(self) -> dict[str, Tensor]:
        """All that was drawn or fitted."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Compression:
        """The same on a device, in a precision."""
