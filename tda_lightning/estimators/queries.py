"""Measurement gradients of the queries, dense, and how the training examples meet them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.curvature import Spectrum, units
from tda_lightning.gradients import Gradient
from tda_lightning.gradients.basis import turning_cost
from tda_lightning.gradients.forms import CHUNK_SCALARS
from tda_lightning.session.session import Session


def query_gradients(
    session: Session,
    kind: str,
    start: int,
    stop: int,
    spectra: Mapping[str, Spectrum] | None = None,
) -> dict[str, Tensor]:
    """Measurement gradients at the weights in place, by unit: [query, groups, rows, columns].

    With ``spectra`` they are coordinates in each unit's basis.
    """
    out: dict[str, Tensor] = {}
    first = 0
    for batch, examples in session.queries(start, stop):
        found = session.measurement_gradients(batch, examples)
        for name, gradient in units(kind, found.blocks).items():
            if name not in out:
                shape = (stop - start, *gradient.shape[1:])
                out[name] = torch.empty(shape, dtype=session.dtype, device=session.device)
            left, right = (None, None)
            if spectra is not None:
                left, right = spectra[name].left, spectra[name].right
            for rows in gradient.chunks():
                place = slice(first + rows.start, first + rows.stop)
                out[name][place] = gradient.rotated(rows, left, right)
        first += len(examples)
    return out


@dataclass
class Response:
    """What the queries ask of the examples of one unit: [query, groups, rows, columns],
    coordinates in the basis of ``spectrum`` (None: the parameters' own axes).

    Examples meet them in that basis or back on the parameters, whichever takes fewer operations
    over ``meetings`` examples: turning a factored example costs far less than a dense query, but
    there are more of them. The first examples decide.
    """

    values: Tensor
    spectrum: Spectrum | None
    meetings: int
    _settled: bool = False

    def dot(self, gradient: Gradient) -> Tensor:
        """Inner products with the examples: [query, batch]."""
        if not self._settled:
            self._settle(gradient)
        if self.spectrum is not None:
            gradient = gradient.in_basis(self.spectrum.left, self.spectrum.right)
        return gradient.dot(self.values)

    def _settle(self, gradient: Gradient) -> None:
        self._settled = True
        if self.spectrum is not None:
            self._choose_basis(gradient, self.spectrum)
        self.values = gradient.arranged(self.values)

    def _choose_basis(self, gradient: Gradient, spectrum: Spectrum) -> None:
        queries, groups, rows, columns = self.values.shape
        left, right = spectrum.left, spectrum.right
        cost = turning_cost(left, rows) + turning_cost(right, columns)
        lifting = queries * groups * rows * columns * cost
        if lifting <= self.meetings * gradient.rotation_cost(left, right):
            # In place, a few at a time: one copy of the queries is enough.
            for part in self.values.split(max(1, CHUNK_SCALARS // (groups * rows * columns))):
                part.copy_(spectrum.lift(part))
            self.spectrum = None


def dot(responses: Mapping[str, Response], gradients: Mapping[str, Gradient]) -> Tensor:
    """Sum over units of the inner products: [query, batch]."""
    products = [responses[name].dot(gradient) for name, gradient in gradients.items()]
    return torch.stack(products).sum(0)
