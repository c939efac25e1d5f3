"""Chooses how the gradients of a run are compressed: by what a sample's scores lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.index.compression import Compression
from tda_lightning.index.directions import all_coordinates
from tda_lightning.index.fit_directions import fit_directions
from tda_lightning.index.fit_factors import fit_factors
from tda_lightning.index.responses import Responder
from tda_lightning.index.rounding import as_tensor, rounded
from tda_lightning.index.samples import (
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
    width: int,
    dtype: str,
    samples: Samples,
    seed: int,
) -> tuple[Compression, dict[str, float]]:
    """The compression to ``width`` numbers whose scores of the sample, rounded to ``dtype``, agree
    best with the exact ones, and the agreement of each that was tried: the mean over the session's
    queries of the correlation over examples."""
    everything = all_coordinates(session, len(responder.terms))
    if width >= everything.width:
        return everything, {}
    moments = side_moments(session, responder, samples.directions, seed)
    tried: list[Compression] = [
        fit_directions(session, responder, width, moments, samples.components),
        fit_factors(session, responder, width, moments, samples.directions),
    ]
    exact = exact_scores(session, responder, samples.judging)
    agreement = {
        one.kind: _agreement(session, responder, one, dtype, samples.judging, exact)
        for one in tried
    }
    return max(tried, key=lambda one: agreement[one.kind]), agreement


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
    rows = as_tensor(codes) * torch.from_numpy(scales)[:, None]
    asked = compression.asked(query_coordinates(session, responder, compression))
    values = compression.dot(asked, rows.to(asked))
    return float(_correlation(values.double(), exact.double()).mean())


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Of each row of [query, example] with the same row of the other."""
    one, other = (own - own.mean(1, keepdim=True) for own in (one, other))
    sizes = one.norm(dim=1) * other.norm(dim=1)
    return (one * other).sum(1) / sizes.clamp(min=1e-300)
