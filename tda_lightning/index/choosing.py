"""Chooses how the gradients of a run are compressed: by what a sample's scores lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda_lightning.index.compression import Compression, Coordinates
from tda_lightning.index.directions import LeadingCoordinates, all_coordinates
from tda_lightning.index.factors import FactorPairs
from tda_lightning.index.fit_directions import mixed, unmixed_directions
from tda_lightning.index.fit_factors import BlockShares, least_pair, scaled
from tda_lightning.index.random_projection import RandomProjection
from tda_lightning.index.responses import Responder
from tda_lightning.index.rounding import numbers_of, rounded, width_of
from tda_lightning.index.samples import (
    exact_scores,
    query_coordinates,
    sample_coordinates,
    side_moments,
)
from tda_lightning.session.session import Session

# Coordinates of layers that compete for a place among the leading ones. More cost time in
# proportion, and memory times the sample.
_GRID = 16384
_LEAST = 1e-6  # of the largest scores of a query: smaller ones are rounding, not made large


@dataclass(frozen=True)
class Samples:
    """Training examples that compressions are fitted to and judged by, as batches of indices.

    Attributes:
        directions: their second moments give the directions of layers' sides.
        components: principal components are taken over these, which are more.
        judging: none of the others is among them, if there are enough examples.
    """

    directions: Sequence[Sequence[int]]
    components: Sequence[Sequence[int]]
    judging: Sequence[Sequence[int]]


def chosen_compression(
    session: Session,
    responder: Responder,
    bytes_per_example: int,
    dtypes: Sequence[str],
    kinds: Sequence[str],
    samples: Samples,
    seed: int,
) -> tuple[Compression, str, dict[str, float]]:
    """The compression, and the type of stored numbers, whose scores of the sample agree best with
    the exact ones; and the agreement of each that was tried: the mean over the session's queries
    of the correlation over examples."""
    everything = all_coordinates(session, len(responder.terms))
    for dtype in reversed(dtypes):  # the most precise one that has room for everything
        if width_of(bytes_per_example, dtype) >= everything.width:
            return everything, dtype, {}
    tried = [
        (kind, dtype)
        for dtype in dtypes
        for kind in kinds
        if kind != FactorPairs.kind or width_of(bytes_per_example, dtype) >= least_pair(session)
    ]
    if not tried:
        raise ValueError(
            f"bytes_per_example={bytes_per_example} in {' or '.join(dtypes)} leaves no room for a "
            f"pair of factors, {least_pair(session)} numbers: expected more bytes, another dtype "
            "or compression='leading'."
        )
    wanted = [(kind, width_of(bytes_per_example, dtype)) for kind, dtype in tried]
    exact = exact_scores(session, responder, samples.judging)
    fits = _fits(session, responder, wanted, samples, seed, exact)
    agreement = {
        f"{kind} in {dtype}": _agreement(own, dtype, exact)
        for (kind, dtype), own in zip(tried, fits, strict=True)
    }
    best = max(range(len(tried)), key=lambda number: list(agreement.values())[number])
    return fits[best].compression, tried[best][1], agreement


def fitted(
    session: Session,
    responder: Responder,
    wanted: Sequence[tuple[str, int]],
    samples: Samples,
    seed: int,
) -> list[Compression]:
    """Compressions of these kinds, each to so many numbers at most."""
    exact = exact_scores(session, responder, samples.directions)
    fits = _fits(session, responder, wanted, replace(samples, judging=()), seed, exact)
    return [own.compression for own in fits]


@dataclass(frozen=True)
class _Fit:
    """A compression, with its coordinates of the judging sample, [batch][term], and of the
    session's queries."""

    compression: Compression
    judging: list[list[Coordinates]]
    asked: Tensor


def _fits(
    session: Session,
    responder: Responder,
    wanted: Sequence[tuple[str, int]],
    samples: Samples,
    seed: int,
    exact: Tensor,
) -> list[_Fit]:
    """Every response is computed three times and every gradient of a sample two or three times,
    however many compressions are wanted: that is where the time goes.

    Args:
        exact: scores of some examples, [query, example].
    """
    even = _even_weights(exact)
    drafts, places = _drafts(session, responder, wanted, samples, seed, even)
    fitted_to: list[list[list[Coordinates]]] = [[] for _ in drafts]
    for kind, sample in (
        (LeadingCoordinates.kind, samples.components),
        (FactorPairs.kind, samples.directions),
    ):
        own = [place for place, draft in enumerate(drafts) if draft.kind == kind]
        found = sample_coordinates(session, responder, [drafts[place] for place in own], sample)
        for place, coordinates in zip(own, found, strict=True):
            fitted_to[place] = coordinates
    judging = sample_coordinates(session, responder, drafts, samples.judging)
    asked = query_coordinates(session, responder, drafts)
    whole = sum(map(len, samples.components)) == session.num_train
    return [
        _finished(drafts[place], width, fitted_to[place], judging[place], asked[place], whole, even)
        for place, (_, width) in zip(places, wanted, strict=True)
    ]


def _even_weights(exact: Tensor) -> Tensor:
    """One over the size of each query's scores, times the largest size, [query].

    So weighed, all queries count alike when leading coordinates are chosen: proponents are ranked
    for each query by itself. The few with large gradients, of a classifier those that it gets
    wrong, would choose for all. Factor pairs lose numbers to rounding before they lose directions,
    and are rounded worse with such weights (measured, experiments/index).
    """
    sizes = exact.double().std(1, correction=0)
    largest = float(sizes.max())
    if largest == 0:
        return torch.ones_like(sizes)
    return largest / sizes.clamp(min=_LEAST * largest)


def _drafts(
    session: Session,
    responder: Responder,
    wanted: Sequence[tuple[str, int]],
    samples: Samples,
    seed: int,
    even: Tensor,
) -> tuple[list[Compression], list[int]]:
    """Compressions as far as second moments tell, and the place of each that is wanted among
    them."""
    kinds = {kind for kind, _ in wanted}
    weights = {FactorPairs.kind: torch.ones_like(even), LeadingCoordinates.kind: even}
    weights = {kind: own for kind, own in weights.items() if kind in kinds}
    if weights:
        both = torch.stack(list(weights.values()), dim=1)
        found = side_moments(session, responder, samples.directions, seed, both)
        moments = dict(zip(weights, found, strict=True))
    if FactorPairs.kind in kinds:
        shares = BlockShares.measured(
            session, responder, moments[FactorPairs.kind], samples.directions
        )
    drafts: list[Compression] = []
    made: dict[tuple[str, int], int] = {}
    places = []
    for kind, width in wanted:
        size = max(_GRID, width) if kind == LeadingCoordinates.kind else width
        if (kind, size) not in made:
            made[kind, size] = len(drafts)
            if kind == LeadingCoordinates.kind:
                drafts.append(unmixed_directions(session, moments[kind], size))
            elif kind == FactorPairs.kind:
                drafts.append(shares.cut(session, size))
            else:
                drafts.append(RandomProjection.drawn(session, len(responder.terms), size, seed))
        places.append(made[kind, size])
    return drafts, places


def _finished(
    draft: Compression,
    width: int,
    sample: list[list[Coordinates]],
    judging: list[list[Coordinates]],
    asked: Tensor,
    whole: bool,
    even: Tensor,
) -> _Fit:
    """The draft, fitted to what the sample and the queries show."""
    if isinstance(draft, FactorPairs):
        return _Fit(scaled(draft, sample, asked), judging, asked)
    if isinstance(draft, LeadingCoordinates):
        gradients = torch.cat([torch.cat(terms, dim=1) for terms in sample])
        made, kept = mixed(draft, gradients, asked * even[:, None].to(asked), width, whole)
        return _Fit(made, [[torch.cat(own, dim=1)[:, kept]] for own in judging], asked[:, kept])
    return _Fit(draft, judging, asked)


def _agreement(fit: _Fit, dtype: str, exact: Tensor) -> float:
    compression = fit.compression
    codes, scales = rounded(torch.cat([compression.stored(own) for own in fit.judging]), dtype)
    rows = numbers_of(codes, dtype, compression.width) * torch.from_numpy(scales)[:, None]
    asked = compression.asked(fit.asked)
    values = compression.dot(asked, rows.to(asked))
    return float(_correlation(values.double(), exact.double()).mean())


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Of each row of [query, example] with the same row of the other."""
    one, other = (own - own.mean(1, keepdim=True) for own in (one, other))
    sizes = one.norm(dim=1) * other.norm(dim=1)
    return (one * other).sum(1) / sizes.clamp(min=1e-300)
