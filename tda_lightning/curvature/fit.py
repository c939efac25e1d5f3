"""Fit the curvature of the training loss at one or several checkpoints.

All choices estimate the Gauss-Newton matrix of the mean loss as trained, averaged over the
checkpoints, in an eigenbasis:

======== ==========================================================================
exact    all parameters as one dense matrix; small models
ekfac    per block, Kronecker eigenbasis with corrected eigenvalues (George et al. 2018,
         1806.03884; Grosse et al. 2023, 2308.03296)
kfac     per block, Kronecker product (Martens & Grosse 2015; shared weights: 'expand' of
         Eschenhagen et al. 2023)
diagonal squared gradients of single parameters
identity no curvature
======== ==========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tda_lightning.curvature.sides import check_dense_side, eigenbasis, limits, side_forms
from tda_lightning.curvature.spectrum import Spectrum
from tda_lightning.gradients import Basis, Gradient, Joined, Reflections, scaled
from tda_lightning.gradients.basis import placed
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.runtime.digests import digest
from tda_lightning.session.passes import Pass, Session

Sides = tuple[Basis, Basis]
Bases = Mapping[str, Sides]  # eigenvectors of rows and columns, by unit

KINDS = ("exact", "ekfac", "kfac", "diagonal", "identity")
MAX_EXACT = 10_000
# The unit of curvature that spans all blocks.
WHOLE = "all parameters"
_FORMAT = 2  # part of the cache's key: raise it when the meaning of fitted tensors changes


def check_kind(kind: str, also: Sequence[str] = ()) -> None:
    """Refuse a kind that is not in ``KINDS``, nor in those that an estimator has besides."""
    known = (*KINDS, *also)
    if kind not in known:
        raise ValueError(f"Unknown curvature {kind!r}: expected one of {', '.join(known)}.")


def units(kind: str, gradients: Mapping[str, Gradient]) -> dict[str, Gradient]:
    """Gradients by unit of curvature: the blocks, or for ``exact`` one row of all parameters."""
    if kind != "exact":
        return dict(gradients)
    return {WHOLE: Joined(list(gradients.values()))}


def unit_matrices(kind: str, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same for matrices [..., groups, rows, columns] by block."""
    if kind != "exact":
        return dict(matrices)
    rows = [matrix.flatten(-3) for matrix in matrices.values()]
    return {WHOLE: torch.cat(rows, dim=-1)[..., None, None, :]}


class CurvatureFit:
    """Plans the passes that fit a curvature, and holds it afterwards.

    Args:
        kind: one of ``KINDS``.
        context: what the passes work with.
        steps: checkpoints to average over.
        scale: h, by unit, [groups, rows, columns]: fit the curvature of preconditioned gradients
            h * g instead of g (docs/methods.md, "SOURCE for Adam"); a missing unit has none.
        seed: of the sampled labels.
        title: of what is fitted, for progress bars.
        dense_side: the widest side of a block whose covariance is kept dense; a wider one is
            rank-limited. None: the defaults of ``curvature/sides.py``.
        bases: eigenvectors of both sides by unit, where they are known: ``ekfac`` then needs the
            pass for its eigenvalues alone.
    """

    def __init__(
        self,
        kind: str,
        context: Session,
        steps: Sequence[int],
        scale: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        title: str = "curvature",
        dense_side: int | None = None,
        bases: Bases | None = None,
    ):
        check_kind(kind)
        check_dense_side(dense_side)
        self.kind, self.context, self.steps = kind, context, tuple(steps)
        self.scale, self.seed, self.title = dict(scale or {}), seed, title
        self.dense_side = dense_side
        self.spectra: dict[str, Spectrum] = {}
        self._sums: dict[str, list[Tensor]] = {}
        self._known = None if bases is None else digest(bases)
        self._bases: dict[str, Sides] = dict(bases or {})
        size = sum(block.size for block in context.blocks)
        if kind == "exact" and size > MAX_EXACT:
            raise ValueError(
                f"curvature='exact' builds a dense matrix of all parameters: {size} x {size} "
                f"numbers are {8 * size**2 / 2**30:.1f} GiB, and the limit is {MAX_EXACT} "
                "parameters. Use curvature='ekfac', or restrict the task to some layers."
            )

    def passes(self) -> list[Pass]:
        """The passes still to run: none when the fitted curvature was kept from before."""
        if self.kind == "identity":
            for name, shape in self._unit_shapes().items():
                self.spectra[name] = Spectrum(None, None, self._ones(shape))
            return []
        sides = limits(self.dense_side)
        name = self.kind if self._known is None else f"{self.kind} in {self._known}"
        self._key = cache_key(self.context, name, self.steps, self.seed, self.scale, sides)
        if (kept := self.context.trajectory.curvature.get(self._key)) is not None:
            self.spectra = _unpack(kept)
            return []
        passes = []
        for what, add, finish in self._walks():
            for number, step in enumerate(self.steps):
                last = number == len(self.steps) - 1
                title = f"{self.title}: {what}, step {step}"
                passes.append(
                    Pass(title, step, self._bound(add, step), None, finish if last else None)
                )
        return passes

    def _walks(self) -> list[tuple[str, Any, Any]]:
        """(title, what to add of every batch, what to do in the end) of each walk over the data."""
        if self.kind == "exact":
            return [("Gauss-Newton", self._add_outer_products, self._finish_exact)]
        if self.kind == "diagonal":
            return [("squares", self._add_squares, self._finish_eigenvalues)]
        if self.kind == "kfac":
            return [("covariances", self._add_covariances, self._finish_kfac)]
        eigenvalues = ("eigenvalues", self._add_squares, self._finish_eigenvalues)
        if self._known is not None:
            place = (self.context.device, self.context.dtype)
            self._bases = {
                name: (placed(left, *place), placed(right, *place))
                for name, (left, right) in self._bases.items()
            }
            return [eigenvalues]
        return [("covariances", self._add_covariances, self._finish_bases), eigenvalues]

    def _bound(self, add: Any, step: int) -> Any:
        return lambda batch, examples, _: add(batch, examples, step)

    def _gradients(self, batch: Any, examples: Tensor, step: int) -> dict[str, Gradient]:
        # Another draw of labels at every checkpoint, the same in both passes over one.
        found = self.context.fisher_gradients(batch, examples, self.seed + step)
        by_unit = units(self.kind, found.blocks)
        return {name: scaled(g, self.scale.get(name)) for name, g in by_unit.items()}

    def _accumulate(self, name: str, values: Sequence[Tensor]) -> None:
        """Add in float64: sums of many small squares lose digits in float32."""
        exact = [value.double() for value in values]
        known = self._sums.get(name)
        self._sums[name] = (
            exact if known is None else [a + b for a, b in zip(known, exact, strict=True)]
        )

    def _reduced(self) -> dict[str, list[Tensor]]:
        """Sums over processes, divided by examples and checkpoints; forgotten afterwards."""
        count = self.context.num_train * len(self.steps)
        sums = {
            name: [self.context.reduce(value) / count for value in values]
            for name, values in self._sums.items()
        }
        self._sums = {}
        for name, values in sums.items():
            if not all(bool(value.isfinite().all()) for value in values):
                raise NonFiniteError(
                    f"The curvature of {name} at steps {list(self.steps)} is not finite: the "
                    "gradient of a training example is NaN or infinite although its loss is not. "
                    "Look for infinite inputs, or use earlier checkpoints."
                )
        return sums

    def _add_covariances(self, batch: Any, examples: Tensor, step: int) -> None:
        for name, gradient in self._gradients(batch, examples, step).items():
            self._accumulate(name, gradient.covariances(side_forms(gradient, self.dense_side)))

    def _add_squares(self, batch: Any, examples: Tensor, step: int) -> None:
        for name, gradient in self._gradients(batch, examples, step).items():
            left, right = self._bases.get(name, (None, None))
            self._accumulate(name, [gradient.sum_of_squares(left, right)])

    def _add_outer_products(self, batch: Any, examples: Tensor, step: int) -> None:
        for found in self.context.gauss_newton_gradients(batch, examples):
            for name, gradient in units(self.kind, found.blocks).items():
                rows = scaled(gradient, self.scale.get(name)).dense(slice(None)).flatten(1)
                self._accumulate(name, [rows.T @ rows])

    def _finish_exact(self) -> None:
        for name, (matrix,) in self._reduced().items():
            eigenvalues, vectors = torch.linalg.eigh(matrix)
            self._keep(name, None, vectors[None], eigenvalues.clamp(min=0)[None, None])
        self._store()

    def _finish_bases(self) -> None:
        for name, (left, right, _) in self._reduced().items():
            place = (left.device, next(self.context.module.parameters()).dtype)
            bases = (eigenbasis(left)[1], eigenbasis(right)[1])
            self._bases[name] = (placed(bases[0], *place), placed(bases[1], *place))

    def _finish_kfac(self) -> None:
        for name, (left, right, count) in self._reduced().items():
            left_values, left_vectors = eigenbasis(left)
            right_values, right_vectors = eigenbasis(right)
            product = left_values[:, :, None] * right_values[:, None, :]
            self._keep(name, left_vectors, right_vectors, product / count.view(-1, 1, 1))
        self._store()

    def _finish_eigenvalues(self) -> None:
        for name, (squares,) in self._reduced().items():
            self._keep(name, *self._bases.get(name, (None, None)), squares)
        self._bases = {}
        self._store()

    def _keep(self, name: str, left: Basis, right: Basis, values: Tensor) -> None:
        context = self.context
        self.spectra[name] = Spectrum(left, right, values).to(context.device, context.dtype)

    def _store(self) -> None:
        self.context.trajectory.curvature[self._key] = _pack(self.spectra)

    def _unit_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {b.name: torch.empty(b.shape, device="meta") for b in self.context.blocks}
        return {name: tuple(t.shape) for name, t in unit_matrices(self.kind, shapes).items()}

    def _ones(self, shape: tuple[int, ...]) -> Tensor:
        return torch.ones(shape, dtype=self.context.dtype, device=self.context.device)


def cache_key(
    context: Session,
    kind: str,
    steps: Sequence[int],
    seed: int,
    scale: Mapping[str, Tensor],
    sides: Sequence[int] = (),
) -> str:
    """A digest of everything that determines fitted tensors; ``sides``: how wide sides are kept."""
    description = {
        "format": _FORMAT,
        "kind": kind,
        "steps": steps,
        "seed": seed,
        "scale": {name: values.double() for name, values in sorted(scale.items())},
        "sides": sides,
        "alike": context.cache_key(steps),
        "sampled": context.task.can_sample,
        "blocks": [[b.name, *b.parameters, *b.shape] for b in context.blocks],
    }
    return digest(description)


def _pack(spectra: Mapping[str, Spectrum]) -> dict[str, Tensor]:
    tensors = {}
    for position, (name, spectrum) in enumerate(spectra.items()):
        prefix = f"{position}:{name}"
        tensors[f"eigenvalues:{prefix}"] = spectrum.eigenvalues.cpu()
        for side, basis in (("left", spectrum.left), ("right", spectrum.right)):
            if isinstance(basis, Reflections):
                tensors[f"{side}_vectors:{prefix}"] = basis.vectors.cpu()
                tensors[f"{side}_core:{prefix}"] = basis.core.cpu()
            elif basis is not None:
                tensors[f"{side}:{prefix}"] = basis.cpu()
    return tensors


def _unpack(tensors: Mapping[str, Tensor]) -> dict[str, Spectrum]:
    keys = [key.partition(":")[2] for key in tensors if key.startswith("eigenvalues:")]
    keys.sort(key=lambda key: int(key.partition(":")[0]))

    def basis(side: str, key: str) -> Basis:
        if f"{side}_core:{key}" in tensors:
            return Reflections(tensors[f"{side}_vectors:{key}"], tensors[f"{side}_core:{key}"])
        return tensors.get(f"{side}:{key}")

    return {
        key.partition(":")[2]: Spectrum(
            basis("left", key), basis("right", key), tensors[f"eigenvalues:{key}"]
        )
        for key in keys
    }
