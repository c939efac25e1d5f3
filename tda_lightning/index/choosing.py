"""Chooses how the gradients of a run are compressed: by what a sample's scores lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.index.compression import Compression
from tda_lightning.index.directions import LeadingCoordinates, all_coordinates
from tda_lightning.index.factors import FactorPairs
from tda_lightning.index.fit_directions import fit_directions
from tda_lightning.index.fit_factors import fit_factors
from tda_lightning.index.random_projection import RandomProjection
from tda_lightning.index.responses import Responder
from tda_lightning.index.rounding import numbers_of, rounded, width_of
from tda_lightning.index.samples import (
    BlockMoments,
    exact_scores,
    query_coordinates,
    sample_coordinates,
    side_moments,
)
from tda_lightning.session.session import Session


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
    moments = side_moments(session, responder, samples.directions, seed)
    exact = exact_scores(session, responder, samples.judging)
    tried: dict[str, tuple[Compression, str]] = {}
    agreement = {}
    for dtype in dtypes:
        for kind in kinds:
            width = width_of(bytes_per_example, dtype)
            made = fitted(kind, session, responder, width, moments, samples, seed)
            name = f"{kind} in {dtype}"
            tried[name] = (made, dtype)
            agreement[name] = _agreement(session, responder, made, dtype, samples.judging, exact)
    return *tried[max(agreement, key=lambda name: agreement[name])], agreement


def fitted(
    kind: str,
    session: Session,
    responder: Responder,
    width: int,
    moments: Sequence[Mapping[str, BlockMoments]],
    samples: Samples,
    seed: int,
) -> Compression:
    """A compression of a kind, to ``width`` numbers at most."""
    if kind == LeadingCoordinates.kind:
        return fit_directions(session, responder, width, moments, samples.components)
    if kind == FactorPairs.kind:
        return fit_factors(session, responder, width, moments, samples.directions)
    return RandomProjection.drawn(session, len(responder.terms), width, seed)


def _agreement(
    session: Session,
    responder: Responder,
    compression: Compression,
    dtype: str,
    sample: Sequence[Sequence[int]],
    exact: Tensor,
) -> float:
    stored = compression.stored(sample_coordinates(session, responder, compression, sample))
    codes, scales = rounded(stored, dtype)
    rows = numbers_of(codes, dtype, compression.width) * torch.from_numpy(scales)[:, None]
    asked = compression.asked(query_coordinates(session, responder, compression))
    values = compression.dot(asked, rows.to(asked))
    return float(_correlation(values.double(), exact.double()).mean())


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Of each row of [query, example] with the same row of the other."""
    one, other = (own - own.mean(1, keepdim=True) for own in (one, other))
    sizes = one.norm(dim=1) * other.norm(dim=1)
    return (one * other).sum(1) / sizes.clamp(min=1e-300)
