"""Measurement gradients of the queries, dense, and how the training examples meet them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.curvature import Spectrum, units
from tda_lightning.curvature.fit import WHOLE
from tda_lightning.curvature.products import as_matrices
from tda_lightning.gradients import Gradient, Rows
from tda_lightning.gradients.basis import inverse, turning_cost
from tda_lightning.gradients.forms import CHUNK_SCALARS
from tda_lightning.session.session import Session


def query_gradients(session: Session, kind: str, start: int, stop: int) -> dict[str, Tensor]:
    """Measurement gradients at the weights in place, by unit: [query, groups, rows, columns]."""
    out: dict[str, Tensor] = {}
    first = 0
    for batch, examples in session.queries(start, stop):
        found = session.measurement_gradients(batch, examples)
        for name, gradient in units(kind, found.blocks).items():
            if name not in out:
                shape = (stop - start, *gradient.shape[1:])
                out[name] = torch.empty(shape, dtype=session.dtype, device=session.device)
            for rows in gradient.chunks():
                place = slice(first + rows.start, first + rows.stop)
                out[name][place] = gradient.dense(rows)
        first += len(examples)
    return out


def query_coordinates(
    session: Session, kind: str, start: int, stop: int, spectra: Mapping[str, Spectrum]
) -> dict[str, Tensor | Rows]:
    """Measurement gradients at the weights in place in the basis of each unit: [query, groups,
    rows, columns], or factored where a unit's rows are looked up and its curvature does not mix
    them."""
    out: dict[str, Tensor | Rows] = {}
    touched: dict[str, list[Rows]] = {}
    first = 0
    for batch, examples in session.queries(start, stop):
        found = session.measurement_gradients(batch, examples)
        for name, gradient in units(kind, found.blocks).items():
            left, right = spectra[name].left, spectra[name].right
            sparse = isinstance(gradient, Rows) and left is None
            if name in touched or (sparse and name not in out):
                rows = gradient if isinstance(gradient, Rows) else Rows.of(gradient)
                turned_rows = rows.in_basis(None, right)
                assert isinstance(turned_rows, Rows)
                touched.setdefault(name, []).append(turned_rows)
                continue
            if name not in out:
                shape = (stop - start, *gradient.shape[1:])
                out[name] = torch.empty(shape, dtype=session.dtype, device=session.device)
            dense = out[name]
            assert isinstance(dense, Tensor)
            for part in gradient.chunks():
                place = slice(first + part.start, first + part.stop)
                dense[place] = gradient.rotated(part, left, right)
        first += len(examples)
    return out | {name: Rows.stacked(parts) for name, parts in touched.items()}


@dataclass
class Response:
    """What the queries ask of the examples of one unit: [query, groups, rows, columns], or
    factored where they touch few rows, coordinates in the basis of ``spectrum`` (None: the
    parameters' own axes).

    Examples meet them in that basis or back on the parameters, whichever takes fewer operations
    over ``meetings`` examples: turning a factored example costs far less than a dense query, but
    there are more of them. The first examples decide.
    """

    values: Tensor | Rows
    spectrum: Spectrum | None
    meetings: int
    _settled: bool = False

    def dot(self, gradient: Gradient) -> Tensor:
        """Inner products with the examples: [query, batch]."""
        if isinstance(self.values, Rows):
            return self._on_parameters(self.values).met_by(gradient)
        if not self._settled:
            self._settle(gradient, self.values)
        if self.spectrum is not None:
            gradient = gradient.in_basis(self.spectrum.left, self.spectrum.right)
        return gradient.dot(self.values)

    def lifted(self) -> Tensor:
        """On the parameters, dense: [query, groups, rows, columns]."""
        if isinstance(self.values, Rows):
            return self._on_parameters(self.values).dense(slice(None))
        return self.values if self.spectrum is None else self.spectrum.lift(self.values)

    def _on_parameters(self, rows: Rows) -> Rows:
        if self.spectrum is not None:
            assert self.spectrum.left is None
            lifted = rows.in_basis(None, inverse(self.spectrum.right))
            assert isinstance(lifted, Rows)
            self.values = rows = lifted
            self.spectrum = None
        return rows

    def _settle(self, gradient: Gradient, values: Tensor) -> None:
        self._settled = True
        if self.spectrum is not None:
            self._choose_basis(gradient, self.spectrum, values)
        self.values = gradient.arranged(values)

    def _choose_basis(self, gradient: Gradient, spectrum: Spectrum, values: Tensor) -> None:
        queries, groups, rows, columns = values.shape
        left, right = spectrum.left, spectrum.right
        cost = turning_cost(left, rows) + turning_cost(right, columns)
        lifting = queries * groups * rows * columns * cost
        if lifting <= self.meetings * gradient.rotation_cost(left, right):
            # In place, a few at a time: one copy of the queries is enough.
            for part in values.split(max(1, CHUNK_SCALARS // (groups * rows * columns))):
                part.copy_(spectrum.lift(part))
            self.spectrum = None


def directions(session: Session, responses: Mapping[str, Response]) -> dict[str, Tensor]:
    """Responses by unit as tensors [query, *shape] by parameter, for ``Session.add_terms``."""
    return unit_directions(session, {name: own.lifted() for name, own in responses.items()})


def unit_directions(session: Session, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same of matrices [query, groups, rows, columns] on the parameters, by unit."""
    if WHOLE in units:
        units = as_matrices(session.blocks, units[WHOLE][:, 0, 0])
    return session.on_parameters(units)


def dot(responses: Mapping[str, Response], gradients: Mapping[str, Gradient]) -> Tensor:
    """Sum over units of the inner products: [query, batch]."""
    products = [responses[name].dot(gradient) for name, gradient in gradients.items()]
    return torch.stack(products).sum(0)
