"""Random coordinates, as the field stores them (TRAK, Park et al. 2023; LoGra, Choe et al. 2024).
They are there to be compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tda_lightning.estimators.projection import Projection
from tda_lightning.gradients import Dense, Gradient
from tda_lightning.session.session import Session

_SIDES = ("left", "right")


@dataclass(frozen=True)
class RandomProjection:
    """Inner products with random directions, which keep those of gradients and responses in
    expectation (``estimators/projection.py``). Every term has its own, and an example's numbers are
    summed over terms: products of different ones have mean zero.

    Attributes:
        width: how many numbers are stored of an example.
        sides: of every term, the two factors of the directions by block.
    """

    width: int
    sides: Sequence[Mapping[str, tuple[Tensor, Tensor]]]
    kind: ClassVar[str] = "random"
    degree: ClassVar[int] = 1

    @classmethod
    def drawn(cls, session: Session, terms: int, width: int, seed: int) -> RandomProjection:
        """Directions for the blocks of a session."""
        place = (session.device, session.dtype)
        sides = []
        for term in range(terms):
            found = Projection.drawn(session.blocks, width, seed + term, *place).sides
            if found is None:
                raise ValueError(
                    f"{width} random coordinates are no fewer than the parameters. Give fewer "
                    "bytes_per_example, or leave compression='random' away."
                )
            sides.append(found)
        return cls(width, sides)

    def coordinates(self, term: int, gradients: Mapping[str, Gradient]) -> Tensor:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        return Projection(self.width, self.sides[term]).coordinates(gradients)

    def stored(self, coordinates: Sequence[Tensor]) -> Tensor:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        return torch.stack(list(coordinates)).sum(0)

    def response_coordinates(self, term: int, responses: Mapping[str, Tensor]) -> Tensor:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        return self.coordinates(term, {name: Dense(own) for name, own in responses.items()})

    def asked(self, coordinates: Tensor) -> Tensor:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        return coordinates.unflatten(1, (len(self.sides), self.width)).sum(1)

    def dot(self, asked: Tensor, stored: Tensor) -> Tensor:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        return asked @ stored.mT

    def rough(self, asked: Tensor) -> None:
        """See :class:`~tda_lightning.index.compression.Compression`."""

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        return {
            f"{term} {side} {name}": tensor
            for term, own in enumerate(self.sides)
            for name, both in own.items()
            for side, tensor in zip(_SIDES, both, strict=True)
        }

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor]) -> RandomProjection:
        """What :meth:`tensors` were of.

        Raises:
            ValueError: they do not belong together.
        """
        parts: dict[int, dict[str, dict[str, Tensor]]] = {}
        for key, tensor in sorted(tensors.items()):
            term, side, name = key.split(" ", 2)
            parts.setdefault(int(term), {}).setdefault(name, {})[side] = tensor
        sides = [
            {name: (own["left"], own["right"]) for name, own in parts[term].items()}
            for term in range(len(parts))
        ]
        widths = {tensor.shape[-1] for tensor in tensors.values()}
        if len(widths) != 1:
            raise ValueError(f"random directions of different number, {sorted(widths)}")
        return cls(widths.pop(), sides)

    def to(self, device: torch.device, dtype: torch.dtype) -> RandomProjection:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        return self.restored({name: own.to(device, dtype) for name, own in self.tensors().items()})
