"""Factor pairs alone, to compare ours with: no direction is chosen by curvature or queries.

Of every layer's gradient the leading pair of singular vectors is kept, after a random projection of
both sides where the room is less than whole vectors take (LoRIF, Li et al. 2026, does so). They are
rounded like ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tda_lightning.index.factors import FactoredBlock, FactorPairs
from tda_lightning.index.fit_factors import scaled
from tda_lightning.index.responses import Responder
from tda_lightning.index.samples import query_coordinates, sample_coordinates
from tda_lightning.session.session import Session


def plain_factors(
    session: Session,
    responder: Responder,
    widths: Sequence[int],
    sample: Sequence[Sequence[int]],
) -> list[FactorPairs]:
    """Pairs of so many numbers together, at most, for each of ``widths``."""
    drawn = [_drawn(session, len(responder.terms), width) for width in widths]
    examples = sample_coordinates(session, responder, drawn, sample)
    queries = query_coordinates(session, responder, drawn)
    return [scaled(*own) for own in zip(drawn, examples, queries, strict=True)]


def _drawn(session: Session, terms: int, width: int) -> FactorPairs:
    generator = torch.Generator().manual_seed(0)
    blocks = sorted(session.blocks, key=lambda block: block.name)
    whole = sum(own.shape[0] * (terms * own.shape[1] + own.shape[2]) for own in blocks)
    share, pairs = min(1.0, width / whole), {}
    for block in blocks:
        groups, rows, columns = block.shape
        count, across = (max(1, int(share * own)) for own in (rows, columns))
        left = _projection(groups, rows, count, generator, session)
        right = _projection(groups, columns, across, generator, session)
        pairs[block.name] = FactoredBlock(
            (left,) * terms,
            (left,) * terms,
            right,
            right,
            1,
            left.new_ones(groups, terms * count),
            left.new_ones(groups, across),
        )
    return FactorPairs(pairs)


def _projection(
    groups: int, width: int, count: int, generator: torch.Generator, session: Session
) -> Tensor:
    """Random directions that keep inner products in expectation; all axes where they fit."""
    if count == width:
        return torch.eye(width).expand(groups, -1, -1).to(session.device, session.dtype)
    drawn = torch.randn(groups, width, count, generator=generator) / count**0.5
    return drawn.to(session.device, session.dtype)
