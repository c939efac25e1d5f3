r"""Coordinates in the leading directions of what scores are made of: ours.

Three steps, each of which keeps the inner products of gradients g and responses r:

1. In every layer and term, balanced directions of both sides (``sides.py``): matrices [a, b] where
   gradients have [rows, columns], at the cost of two thin products.
2. Of all these coordinates, over all layers and terms, those with the largest
   :math:`E[r_i^2] E[g_i^2]`, the mean square that a coordinate adds to scores. So layers, segments
   and checkpoints share the room by what they matter.
3. The principal components of :math:`\rho_i g_i` with :math:`\rho_i^2 = E[r_i^2]`, over a sample of
   the training set: the best rank-k approximation of scores in the least-squares sense where the
   coordinates of responses are uncorrelated, as step 1 makes them about.

Coordinates are stored with unit variance, queries take the scale: then rounding to int8 costs every
coordinate the same share of what it adds to scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tda_lightning.gradients import Gradient
from tda_lightning.gradients.basis import matmul_sides
from tda_lightning.index.matrices import Matrices
from tda_lightning.session.session import Session


@dataclass(frozen=True)
class Grid:
    """The coordinates of one block in one term.

    Attributes:
        examples: directions of the two sides for gradients, [groups, width, count]; None: the axes.
        responses: the same for responses.
        kept: positions among the flattened [groups, a, b]; None: all.
    """

    examples: tuple[Tensor | None, Tensor | None]
    responses: tuple[Tensor | None, Tensor | None]
    kept: Tensor | None

    def of_gradients(self, gradient: Gradient) -> Tensor:
        """[batch, coordinate]."""
        return self._kept(Matrices.of(gradient, *self.examples).dense())

    def of_responses(self, responses: Tensor) -> Tensor:
        """[query, coordinate]."""
        return self._kept(matmul_sides(self.responses[0], responses, self.responses[1]))

    def _kept(self, coordinates: Tensor) -> Tensor:
        flat = coordinates.flatten(1)
        return flat if self.kept is None else flat[:, self.kept]


# Of every term by block, in the order of their names: that of a file's.
Grids = Sequence[Mapping[str, Grid]]
_MOST_TERMS = 1 << 16
LEAST = 1e-8  # of the largest mean square: smaller ones are noise of the sample


@dataclass(frozen=True)
class LeadingCoordinates:
    """See the top of the file; ``fit_directions.py`` makes it.

    Attributes:
        grids: of every term, by block.
        mix: coordinates in the grids, of one term after the other, to stored ones, for gradients:
            [coordinate, width]; or [coordinate] where each is stored by itself.
        mix_responses: the same for responses.
    """

    grids: Grids
    mix: Tensor
    mix_responses: Tensor
    kind: ClassVar[str] = "leading"
    degree: ClassVar[int] = 1

    @property
    def width(self) -> int:
        """Number of coordinates."""
        return self.mix.shape[-1]

    def coordinates(self, term: int, gradients: Mapping[str, Gradient]) -> Tensor:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        return gradient_coordinates(self.grids[term], gradients)

    def stored(self, coordinates: Sequence[Tensor]) -> Tensor:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        return _mixed(torch.cat(list(coordinates), dim=1), self.mix)

    def response_coordinates(self, term: int, responses: Mapping[str, Tensor]) -> Tensor:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        return response_coordinates(self.grids[term], responses)

    def asked(self, coordinates: Tensor) -> Tensor:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        return _mixed(coordinates, self.mix_responses)

    def dot(self, asked: Tensor, stored: Tensor) -> Tensor:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        return asked @ stored.mT

    def rough(self, asked: Tensor) -> None:
        """See :class:`~tda_lightning.index.compression.Compression`."""

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`~tda_lightning.index.compression.Compression`."""
        found = {"mix": self.mix, "mix_responses": self.mix_responses}
        found["terms"] = torch.tensor(len(self.grids))
        for term, grids in enumerate(self.grids):
            for name, grid in grids.items():
                sides = zip(_SIDES, (*grid.examples, *grid.responses), strict=True)
                for part, tensor in (*sides, ("kept", grid.kept)):
                    if tensor is not None:
                        found[f"{term} {part} {name}"] = tensor
        return found

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor]) -> LeadingCoordinates:
        """What :meth:`tensors` were of.

        Raises:
            ValueError: they are of nothing like that.
        """
        parts: dict[int, dict[str, dict[str, Tensor]]] = {}
        for key, tensor in tensors.items():
            if key not in ("mix", "mix_responses", "terms"):
                term, part, name = key.split(" ", 2)
                parts.setdefault(int(term), {}).setdefault(name, {})[part] = tensor
        grids = [
            {
                name: Grid(
                    (own.get(_SIDES[0]), own.get(_SIDES[1])),
                    (own.get(_SIDES[2]), own.get(_SIDES[3])),
                    own["kept"],
                )
                for name, own in sorted(parts.get(term, {}).items())
            }
            for term in range(min(int(tensors["terms"]), _MOST_TERMS))
        ]
        made = cls(grids, tensors["mix"], tensors["mix_responses"])
        counts = sum(map(coordinate_count, grids))
        if made.mix.shape != made.mix_responses.shape or len(made.mix) != counts:
            raise ValueError(f"{counts} coordinates are mixed by {tuple(made.mix.shape)}")
        return made

    def to(self, device: torch.device, dtype: torch.dtype) -> LeadingCoordinates:
        """On a device, in a precision."""
        return self.restored(
            {
                name: own.to(device, dtype if own.is_floating_point() else own.dtype)
                for name, own in self.tensors().items()
            }
        )


def all_coordinates(session: Session, terms: int) -> LeadingCoordinates:
    """Every coordinate on the parameters' own axes: nothing is lost."""
    grid = {
        block.name: Grid(
            (None, None), (None, None), torch.arange(block.size, device=session.device)
        )
        for block in sorted(session.blocks, key=lambda block: block.name)
    }
    count = terms * sum(block.size for block in session.blocks)
    ones = torch.ones(count, dtype=session.dtype, device=session.device)
    return LeadingCoordinates([grid] * terms, ones, ones)


def sizes(squares: Tensor) -> Tensor:
    """What numbers with these mean squares are divided by, so that they can be rounded together."""
    least = LEAST * float(squares.max().clamp(min=1e-30))
    return squares.clamp(min=least).sqrt()


def coordinate_count(grids: Mapping[str, Grid]) -> int:
    """Coordinates of a term."""
    return sum(0 if grid.kept is None else len(grid.kept) for grid in grids.values())


_SIDES = ("left", "right", "left_responses", "right_responses")


def _mixed(coordinates: Tensor, mix: Tensor) -> Tensor:
    return coordinates @ mix if mix.dim() == 2 else coordinates * mix


def gradient_coordinates(grids: Mapping[str, Grid], gradients: Mapping[str, Gradient]) -> Tensor:
    """Of a term's gradients: [batch, coordinate]."""
    found = [grid.of_gradients(gradients[name]) for name, grid in grids.items()]
    return torch.cat(found, dim=1) if found else _nothing(gradients.values())


def response_coordinates(grids: Mapping[str, Grid], responses: Mapping[str, Tensor]) -> Tensor:
    """Of a term's responses: [query, coordinate]."""
    found = [grid.of_responses(responses[name]) for name, grid in grids.items()]
    return torch.cat(found, dim=1) if found else _nothing(responses.values())


def _nothing(found: Iterable[Gradient | Tensor]) -> Tensor:
    """No coordinates, of a term that adds too little to scores."""
    return torch.empty(next(iter(found)).shape[0], 0)
