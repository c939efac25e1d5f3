"""Leading eigenvectors of the whole curvature, across layers, in front of a block-wise one.

Block-diagonal curvature drops the coupling between layers. Each block then takes the whole error
on itself, forgetting is too slow and scores are several times too large. The coupling lives in few
directions: those with the largest eigenvalues of the whole Gauss-Newton matrix F. They are kept
exactly; the rest, F minus those directions, is left to the blocks:

    F ~ V S V^T  +  (I - V V^T) U max(Lambda - diag(U^T V S V^T U), 0) U^T (I - V V^T)

with U, Lambda the block-wise basis and eigenvalues (EK-FAC): Lambda less what the leading
directions account for is exactly the diagonal of the residual in the basis U (``deflated.py``).
Ours.

Few directions need few examples: of a large training set a random sample is decomposed, and
another one, of the same size, takes the eigenvalues. What the directions fit to the noise of their
own sample is not in the other one, so the ratio of the two sums of eigenvalues bounds the loss
(``LeadingDirections.held``).

With the sample's gradients as the rows of G, the leading eigenvectors of F = G^T G / m are

    V = S^(-1/2) Q^T G / sqrt(m),    G G^T / m = Q S Q^T

so that inner products of examples, which the factors of their gradients give, take the place of
products with all parameters. Only V U is needed, and the factors of a few gradients are turned by U
in fewer operations than V is. Where the sample's gradients do not fit into memory, or the sample is
too large to be decomposed, V comes from subspace iteration (``power_iteration.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.curvature.fit import Scales, cache_key
from tda_lightning.curvature.inner_products import inner_products, pair_cost, places_of
from tda_lightning.curvature.orthonormal import orthonormal, products, turned
from tda_lightning.curvature.power_iteration import power_iteration
from tda_lightning.curvature.sampled import Row, Sample
from tda_lightning.curvature.shared_walk import SampledOrder, SharedWalk
from tda_lightning.curvature.spectrum import Spectrum
from tda_lightning.gradients import Gradient, Joined
from tda_lightning.gradients.basis import turning_cost
from tda_lightning.runtime.digests import digest
from tda_lightning.runtime.full_precision import full_precision
from tda_lightning.session.queries import QueryGradients
from tda_lightning.session.session import Session, Span

_SAMPLE = 16  # examples for each direction, in each of the two samples: 8 cost fidelity
_DECOMPOSED = 4096  # the largest matrix of inner products: its eigenvectors take a minute of a core
_HELD_SCALARS = 1 << 28  # of a sample's gradients, factored
_BATCH_SCALARS = 1 << 26  # of a batch of them, dense
_FEWEST = 16  # examples in a batch


@dataclass(frozen=True)
class LeadingDirections:
    """The leading eigenvectors of the whole curvature.

    Attributes:
        turned: V U, in the bases of the blocks: orthonormal rows [count, parameters]; those of no
            curvature at all may be 0.
        eigenvalues: S, descending [count].
        held: the sum of eigenvalues, in examples that the directions were not fitted to, over that
            in those that they were; 1 where they were fitted to all.
    """

    turned: Tensor
    eigenvalues: Tensor
    held: float = 1.0


def leading_directions(
    count: int,
    session: Session,
    steps: Sequence[int],
    scales: Scales,
    seed: int,
    title: str,
    spectra: Mapping[str, Spectrum],
    used: Span | None = None,
    start: Callable[[], Tensor] | None = None,
    shared: SharedWalk | None = None,
) -> LeadingDirections:
    """Find the leading directions, or take those that were kept.

    Args:
        count: how many, at most the number of parameters.
        session: the model and the training set.
        steps: checkpoints to average over.
        scales: h of all parameters, [1, 1, parameters], by checkpoint and unit; a missing one
            is 1.
        seed: of the sampled labels, the same as the block-wise fit's.
        title: of what is fitted, for progress bars.
        spectra: block-wise curvature, in whose bases the directions are wanted.
        used: the steps whose use of examples weighs them; None: evenly.
        start: gives directions near these on the parameters, [count, parameters], for an iteration
            to begin with; None: random ones.
        shared: the walk that ``spectra`` were fitted in, if it was to serve for these too.
    """
    count = min(count, session.num_parameters)
    place = (session.device, session.dtype)
    title = f"{title}: leading directions"
    orders = _orders(count, session, steps, seed) if shared is None else shared.orders
    fitted, tested = _samples(orders, session, scales, seed, used, shared)
    decomposed = fitted.size <= _DECOMPOSED and fitted.held <= _HELD_SCALARS
    if decomposed or tested is None:
        start = None
    kind = f"leading {count}" + ("" if tested is None else f" of {_SAMPLE} each")
    if not decomposed:
        kind += ", iterated"
    begin = None if start is None else start()
    if begin is not None:
        kind += f" from {digest(begin)}"
    kind += f" in {digest([[spectra[b.name].left, spectra[b.name].right] for b in session.blocks])}"
    key = cache_key(session, kind, steps, seed, scales, used=used)
    if (cached := session.trajectory.curvature.get(key)) is not None:
        vectors, eigenvalues = cached["vectors"].to(*place), cached["eigenvalues"].to(*place)
        return LeadingDirections(vectors, eigenvalues, float(cached["held"]))
    if decomposed:
        vectors, eigenvalues, fits = _decomposed(count, fitted, tested, title, spectra)
    else:
        vectors, eigenvalues, fits = power_iteration(count, fitted, tested, title, begin)
        vectors = _projected(session, vectors, spectra, [block.name for block in session.blocks])
    eigenvalues = eigenvalues.clamp(min=0).to(*place)
    held = 1.0
    if tested is not None and fits:
        held = min(1.0, float(eigenvalues.sum()) / fits)
    session.trajectory.curvature[key] = {
        "vectors": vectors.cpu(),
        "eigenvalues": eigenvalues.cpu(),
        "held": torch.tensor([held]),
    }
    return LeadingDirections(vectors, eigenvalues, held)


def shared_walk(count: int, session: Session, steps: Sequence[int], seed: int) -> SharedWalk | None:
    """A walk over the training set whose gradients serve for ``count`` leading directions too; None
    where these need their own."""
    if session.num_processes > 1 or session.noise:
        return None
    orders = _orders(count, session, steps, seed)
    fitted, tested = _samples(orders, session, {}, seed, None, None)
    held = fitted.held if tested is None else fitted.held + tested.held
    there = fitted.size <= _DECOMPOSED and held <= _HELD_SCALARS
    return SharedWalk(orders) if there else None


def _orders(
    count: int, session: Session, steps: Sequence[int], seed: int
) -> dict[int, SampledOrder]:
    """Which examples are drawn at each checkpoint."""
    each = -(-_SAMPLE * min(count, session.num_parameters) // len(steps))
    fitting = max(_FEWEST, _BATCH_SCALARS // session.num_parameters)
    size = min(session.walk_size, each, fitting)
    generator = torch.Generator().manual_seed(seed)
    return {
        step: SampledOrder.of(session.num_train, each, size, session.walk_size, generator)
        for step in steps
    }


def _samples(
    orders: Mapping[int, SampledOrder],
    session: Session,
    scales: Scales,
    seed: int,
    used: Span | None,
    shared: SharedWalk | None,
) -> tuple[Sample, Sample | None]:
    """Two samples of training examples, to fit directions to and to take the eigenvalues in; all
    examples, and no second sample, where these are not many more."""
    batches = {step: own.batches for step, own in orders.items()}
    fitted = {step: own.fitted for step, own in orders.items()}
    tested = {step: own.tested for step, own in orders.items() if own.tested is not None}

    def sample(numbers: Mapping[int, Sequence[int]]) -> Sample:
        return Sample(session, batches, numbers, scales, seed, used, shared)

    return sample(fitted), sample(tested) if tested else None


def _decomposed(
    count: int, fitted: Sample, tested: Sample | None, title: str, spectra: Mapping[str, Spectrum]
) -> tuple[Tensor, Tensor, float]:
    """V U and S from the inner products of a sample's gradients, and the sum of S in that sample.

    V has rows of zeros where there are fewer eigenvectors.
    """
    session = fitted.session
    rows = list(fitted.everywhere(f"{title}, gradients"))
    inner = inner_products(fitted, f"{title}, inner products", rows)
    values, vectors = torch.linalg.eigh(inner)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count].T
    least = 16 * torch.finfo(session.dtype).eps * values[:1].clamp(min=0)
    sharp = values > least
    fits = float(values.clamp(min=0).sum())
    # Weights of the examples in each direction.
    weights = torch.where(sharp, values, 1.0).rsqrt()[:, None] * vectors * sharp[:, None]
    found = None
    size = fitted.size + (0 if tested is None else tested.size)
    first = {
        name: spectra[name]
        for name, gradient in rows[0].gradients.items()
        if _turned_first(gradient, spectra[name], size, count)
    }
    if tested is not None:
        pairs = sum(pair_cost(gradient) for gradient in rows[0].gradients.values())
        by_factors = pairs * len(inner) < count * session.num_parameters
        if not by_factors:
            found = _combined(fitted, title, weights, rows, first)
        squares = torch.zeros(len(weights), len(weights), dtype=torch.float64, device=inner.device)
        for one in tested.everywhere(f"{title}, eigenvalues"):
            if found is None:
                parts = [QueryGradients.of([row.gradients]).dot(one.gradients) for row in rows]
                own = [part * row.roots[:, None] for part, row in zip(parts, rows, strict=True)]
                inside = weights @ torch.cat(own).double()
            else:
                joined = Joined(list(_turned(one.gradients, first).values()))
                inside = joined.dot(found[:, None, None]).double()
            inside = inside * one.roots.double()
            squares.addmm_(inside, inside.T)
        # Rayleigh-Ritz: the best eigenvectors within the subspace.
        values, turn = torch.linalg.eigh(squares)
        values, turn = values.flip(0), turn.flip(1).T
        weights = turn @ weights
        if found is not None:
            found = turned(turn, found)
    if found is None:
        found = _combined(fitted, title, weights, rows, first)
    found = _projected(session, found, spectra, [name for name in spectra if name not in first])
    lacking = count - len(found)
    if lacking:
        found = torch.cat([found, found.new_zeros(lacking, found.shape[1])])
        values = torch.cat([values, values.new_zeros(lacking)])
    return found, values, fits


def _turned_first(gradient: Gradient, spectrum: Spectrum, examples: int, count: int) -> bool:
    """Whether so many examples are turned in fewer operations than ``count`` directions."""
    _, groups, rows, columns = gradient.shape
    left, right = spectrum.left, spectrum.right
    cost = groups * rows * columns * (turning_cost(left, rows) + turning_cost(right, columns))
    return gradient.factored and examples * gradient.rotation_cost(left, right) < count * cost


def _turned(
    gradients: Mapping[str, Gradient], spectra: Mapping[str, Spectrum]
) -> dict[str, Gradient]:
    """Gradients by block, those of ``spectra`` in its bases."""
    turned = {n: gradients[n].in_basis(own.left, own.right) for n, own in spectra.items()}
    return {**gradients, **turned}


@full_precision
def _projected(
    session: Session, vectors: Tensor, spectra: Mapping[str, Spectrum], names: Collection[str]
) -> Tensor:
    """Rows [count, parameters] in the bases of the blocks ``names``."""
    parts = vectors.split([block.size for block in session.blocks], dim=1)
    return torch.cat(
        [
            spectra[block.name].project(part.unflatten(1, block.shape)).flatten(1)
            if block.name in names
            else part
            for block, part in zip(session.blocks, parts, strict=True)
        ],
        dim=1,
    )


@full_precision
def _combined(
    sample: Sample,
    title: str,
    weights: Tensor,
    rows: Sequence[Row],
    first: Mapping[str, Spectrum],
) -> Tensor:
    """Weighted sums of a sample's gradients that are orthonormal: [weights, parameters], those of
    the blocks ``first`` in their bases."""
    session = sample.session
    total = torch.zeros(
        len(weights), session.num_parameters, dtype=session.dtype, device=session.device
    )
    places = places_of(rows)
    for number in session.loop(f"{title}, vectors", range(len(rows)), sample.batches):
        row = rows[number]
        own = (weights[:, places[number]] * row.roots.double()).to(session.dtype)
        parts = total.split([block.size for block in session.blocks], dim=1)
        for gradient, part in zip(_turned(row.gradients, first).values(), parts, strict=True):
            gradient.add_weighted_sums(part.unflatten(1, gradient.shape[1:]), own)
    # Rounding is far from orthonormal only in directions of hardly any curvature.
    lengths = products(total, total)
    there = lengths.diagonal() > 0.5
    apart = (lengths - torch.diag(there.double())).abs().max()
    if float(apart) > torch.finfo(session.dtype).eps ** 0.5:
        total[there] = orthonormal(total[there])[0]
        total[~there] = 0
    return total
