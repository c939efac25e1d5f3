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

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.curvature.shared_walk import Drawn, SharedWalk
from tda_lightning.curvature.sides import check_dense_side, eigenbasis, limits, side_forms
from tda_lightning.curvature.spectrum import Spectrum
from tda_lightning.gradients import (
    Basis,
    Block,
    Gradient,
    Joined,
    Reflections,
    example_scaled,
    scaled,
)
from tda_lightning.gradients.basis import placed
from tda_lightning.records.errors import NonFiniteError
from tda_lightning.runtime.digests import digest
from tda_lightning.session.session import Batch, Session, Span, memory_budget

Sides = tuple[Basis, Basis]
Bases = Mapping[str, Sides]  # eigenvectors of rows and columns, by unit
Scales = Mapping[int, Mapping[str, Tensor]]  # h by checkpoint and unit

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


def fit_curvature(
    kind: str,
    session: Session,
    steps: Sequence[int],
    scales: Scales | None = None,
    seed: int = 0,
    title: str = "curvature",
    dense_side: int | None = None,
    bases: Bases | None = None,
    used: Span | None = None,
    shared: SharedWalk | None = None,
) -> dict[str, Spectrum]:
    """Curvature by unit, fitted in walks over the training set and kept next to the trajectory.

    Args:
        kind: one of ``KINDS``.
        session: the model and the training set.
        steps: checkpoints to average over.
        scales: h at each of ``steps``, by unit, [groups, rows, columns]: fit the curvature of
            preconditioned gradients h * g instead of g (docs/methods.md, "SOURCE for Adam"); a
            missing unit has none.
        seed: of the sampled labels.
        title: of what is fitted, for progress bars.
        dense_side: the widest side of a block whose covariance is kept dense; a wider one is
            rank-limited. None: the defaults of ``curvature/sides.py``.
        bases: eigenvectors of both sides by unit, where they are known: ``ekfac`` then needs the
            walk for its eigenvalues alone.
        used: the steps whose use of examples weighs them (docs/methods.md, "Uneven use"); None:
            evenly.
        shared: the order of the first walk, which leaves its gradients there.

    Raises:
        ValueError: ``exact`` for a model of too many parameters.
        NonFiniteError: the gradient of an example is NaN or infinite.
    """
    check_kind(kind)
    check_dense_side(dense_side)
    if kind == "exact" and session.num_parameters > MAX_EXACT:
        size = session.num_parameters
        raise ValueError(
            f"curvature='exact' builds a dense matrix of all parameters: {size} x {size} "
            f"numbers are {8 * size**2 / 2**30:.1f} GiB, and the limit is {MAX_EXACT} "
            "parameters. Use curvature='ekfac', or restrict the task to some layers."
        )
    place = (session.device, session.dtype)
    if kind == "identity":
        return {
            name: Spectrum(None, None, torch.ones(shape, device=place[0], dtype=place[1]))
            for name, shape in _unit_shapes(kind, session.blocks).items()
        }
    known_kind = kind if bases is None else f"{kind} in {digest(bases)}"
    scales = scales or {}
    key = cache_key(session, known_kind, steps, seed, scales, limits(dense_side), used)
    if (cached := session.trajectory.curvature.get(key)) is not None:
        return {name: spectrum.to(*place) for name, spectrum in _unpack(cached).items()}
    walks = _Walks(kind, session, tuple(steps), scales, seed, title, used, shared)
    if kind == "exact":
        spectra = _fit_exact(walks)
    elif kind == "diagonal":
        spectra = _fit_eigenvalues(walks, {}, "squares")
    elif kind == "kfac":
        spectra = _fit_kfac(walks, dense_side)
    else:
        if bases is None:
            bases = _fit_bases(walks, dense_side)
        on_device = {
            name: (placed(left, *place), placed(right, *place))
            for name, (left, right) in bases.items()
        }
        spectra = _fit_eigenvalues(walks, on_device, "eigenvalues")
    spectra = {name: spectrum.to(*place) for name, spectrum in spectra.items()}
    session.trajectory.curvature[key] = _pack(spectra)
    return spectra


def _fit_exact(walks: _Walks) -> dict[str, Spectrum]:
    sums = _Sums(walks)
    for step, batch in walks.over("Gauss-Newton"):
        weights = walks.weights(batch)
        for _ in walks.session.losses.each_draw():
            for gradients in walks.session.gauss_newton_gradients(batch.data, batch.examples):
                for name, gradient in walks.scaled(gradients.blocks, step).items():
                    rows = gradient.dense(slice(None)).flatten(1)
                    weighted = rows if weights is None else rows * weights[:, None]
                    sums.add(name, [rows.T @ weighted])
    spectra = {}
    for name, (matrix,) in sums.means().items():
        eigenvalues, vectors = torch.linalg.eigh(matrix)
        spectra[name] = Spectrum(None, vectors[None], eigenvalues.clamp(min=0)[None, None])
    return spectra


def _fit_kfac(walks: _Walks, dense_side: int | None) -> dict[str, Spectrum]:
    spectra = {}
    for name, (left, right, count) in _covariances(walks, dense_side).items():
        left_values, left_vectors = eigenbasis(left)
        right_values, right_vectors = eigenbasis(right)
        product = left_values[:, :, None] * right_values[:, None, :] / count.view(-1, 1, 1)
        spectra[name] = Spectrum(left_vectors, right_vectors, product)
    return spectra


def _fit_bases(walks: _Walks, dense_side: int | None) -> Bases:
    """Kronecker eigenvectors of both sides."""
    return {
        name: (eigenbasis(left)[1], eigenbasis(right)[1])
        for name, (left, right, _) in _covariances(walks, dense_side).items()
    }


def _fit_eigenvalues(walks: _Walks, bases: Bases, what: str) -> dict[str, Spectrum]:
    """Mean squares of the gradients' coordinates in ``bases``."""
    sums = _Sums(walks)
    for name, gradient, weights in walks.fisher_gradients(what):
        rooted = gradient if weights is None else example_scaled(gradient, weights.sqrt())
        sums.add_squares(name, rooted, *bases.get(name, (None, None)))
    return {
        name: Spectrum(*bases.get(name, (None, None)), squares)
        for name, (squares,) in sums.means().items()
    }


def _covariances(walks: _Walks, dense_side: int | None) -> dict[str, list[Tensor]]:
    """Second moments of both sides, and the positions of an example, by unit."""
    sums = _Sums(walks)
    for name, gradient, weights in walks.fisher_gradients(
        "covariances", keep=walks.kind == "ekfac"
    ):
        sums.add(name, gradient.covariances(side_forms(gradient, dense_side), weights))
    return sums.means()


def _begun(items: Iterator[Drawn]) -> Iterator[Drawn]:
    """Items whose walk has begun: processes that are about to walk for different things say so
    there, and would wait for one another for ever if they added something up before."""
    first = list(itertools.islice(items, 1))
    return itertools.chain(first, items)


@dataclass
class _Walks:
    """The walks that fit one curvature; see :func:`fit_curvature` for the fields."""

    kind: str
    session: Session
    steps: tuple[int, ...]
    scales: Scales
    seed: int
    title: str
    used: Span | None
    shared: SharedWalk | None = None
    _kept: list[Drawn] | None = None

    def over(self, what: str) -> Iterator[tuple[int, Batch]]:
        """The training set at every checkpoint, as (step, batch)."""
        for step in self.steps:
            order = None if self.shared is None else self.shared.orders[step].batches
            for batch in self.session.walk(f"{self.title}: {what}, step {step}", step, order):
                yield step, batch

    def weights(self, batch: Batch) -> Tensor | None:
        """What each example of a batch counts by; None: 1."""
        return batch.curvature_weights(self.used)

    def fisher_gradients(
        self, what: str, keep: bool = False
    ) -> Iterator[tuple[str, Gradient, Tensor | None]]:
        """Scaled Fisher gradients of every batch by unit, as (unit, gradient, weights).

        Args:
            keep: for the next walk, which then reads no data and runs no model, where they fit
                into memory.
        """
        session = self.session
        own, times = session.num_train // session.num_processes, len(self.steps) * session.draws
        room = session.dtype.itemsize * session.engine.held * own * times
        if self._kept is None:
            drawn = _begun(self._drawn(what))
        else:
            total = max(len(self._kept), times * -(-own // session.walk_size))
            drawn = session.loop(f"{self.title}: {what}", self._kept, total, room)
        keep = keep and session.device.type == "cpu" and room <= memory_budget()
        # All processes keep theirs, or none does: they walk together.
        lacking = torch.tensor([float(not keep)], device=session.device)
        kept: list[Drawn] | None = None if bool(session.reduce(lacking)) else []
        for one in drawn:
            if kept is not None:
                kept.append(one)
            for name, gradient in one.gradients.items():
                yield name, gradient, one.weights
        self._kept = kept

    def _drawn(self, what: str) -> Iterator[Drawn]:
        session = self.session
        for step, batch in self.over(what):
            # Another draw of labels at every checkpoint, the same in every walk over one.
            seed, weights = self.seed + step, self.weights(batch)
            every = []
            for _ in session.losses.each_draw():
                gradients = session.fisher_gradients(batch.data, batch.examples, seed).blocks
                every.append(Drawn(self.scaled(gradients, step), weights))
                yield every[-1]
            if self.shared is not None:
                self.shared.keep(step, batch.position, every)

    def scaled(self, gradients: Mapping[str, Gradient], step: int) -> dict[str, Gradient]:
        """h * g by unit."""
        scale = self.scales.get(step, {})
        return {
            name: scaled(gradient, scale.get(name))
            for name, gradient in units(self.kind, gradients).items()
        }


class _Sums:
    """Sums of matrices by unit over examples, checkpoints and draws, in float64: sums of many small
    squares lose digits in float32."""

    def __init__(self, walks: _Walks) -> None:
        self._walks = walks
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Sequence[Tensor]) -> None:
        """Add to the sums of a unit."""
        exact = [value.double() for value in values]
        sums = self._sums.get(name)
        self._sums[name] = (
            exact if sums is None else [a + b for a, b in zip(sums, exact, strict=True)]
        )

    def add_squares(self, name: str, gradient: Gradient, left: Basis, right: Basis) -> None:
        """Add the squares of a unit's coordinates; of few rows, to those rows alone."""
        if name not in self._sums:
            place = self._walks.session.device
            shape = gradient.shape[1:]
            self._sums[name] = [torch.zeros(shape, dtype=torch.float64, device=place)]
        gradient.add_squares(self._sums[name][0], left, right)

    def means(self) -> dict[str, list[Tensor]]:
        """Sums over processes, divided by the number of examples and checkpoints."""
        session, steps = self._walks.session, self._walks.steps
        count = session.num_train * len(steps) * session.draws
        means = {
            name: [session.reduce(value) / count for value in values]
            for name, values in self._sums.items()
        }
        for name, values in means.items():
            if not all(bool(value.isfinite().all()) for value in values):
                raise NonFiniteError(
                    f"The curvature of {name} at steps {list(steps)} is not finite: the gradient "
                    "of a training example is NaN or infinite although its loss is not. Look for "
                    "infinite inputs, or use earlier checkpoints."
                )
        return means


def _unit_shapes(kind: str, blocks: Sequence[Block]) -> dict[str, tuple[int, ...]]:
    shapes = {block.name: torch.empty(block.shape, device="meta") for block in blocks}
    return {name: tuple(t.shape) for name, t in unit_matrices(kind, shapes).items()}


def cache_key(
    session: Session,
    kind: str,
    steps: Sequence[int],
    seed: int,
    scales: Scales,
    sides: Sequence[int] = (),
    used: Span | None = None,
) -> str:
    """A digest of everything that determines fitted tensors; ``sides``: how wide sides are kept."""
    description: dict[str, object] = {
        "format": _FORMAT,
        "kind": kind,
        "steps": steps,
        "seed": seed,
        "scales": [
            {name: values.double() for name, values in sorted(scales.get(step, {}).items())}
            for step in steps
        ],
        "sides": sides,
        "alike": session.cache_key(steps),
        "sampled": session.task.can_sample,
        "blocks": [[b.name, *b.parameters, *b.shape] for b in session.blocks],
    }
    chosen = {b.name: b.chosen for b in session.blocks if b.chosen is not None}
    if chosen:
        description["rows"] = chosen
    if used is not None and (weights := session.example_weights(used)) is not None:
        description["weights"] = weights
    if (weights := session.trajectory.data_weights) is not None:
        description["data weights"] = weights
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
