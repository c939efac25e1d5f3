"""Finds the leading coordinates of an index, from a sample of examples and of queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tda_lightning.index.directions import (
    LEAST,
    Grid,
    Grids,
    LeadingCoordinates,
    coordinate_count,
    sizes,
)
from tda_lightning.index.samples import BlockMoments
from tda_lightning.index.sides import Side
from tda_lightning.session.session import Session

# Coordinates that principal components are taken of. More cost time in proportion.
MIXED = 8192


def unmixed_directions(
    session: Session, moments: Sequence[Mapping[str, BlockMoments]], room: int
) -> LeadingCoordinates:
    """The ``room`` coordinates of layers that matter most, as far as the moments of every term, by
    block, can tell."""
    sides = [{n: (own.left, own.right) for n, own in sorted(term.items())} for term in moments]
    grids = _grids(session, sides, room)
    ones = torch.ones(sum(map(coordinate_count, grids)), device=session.device, dtype=session.dtype)
    return LeadingCoordinates(grids, ones, ones)


Sides = list[dict[str, tuple[Side, Side]]]


def _grids(session: Session, sides: Sides, room: int) -> Grids:
    """The coordinates that matter most, as far as the sides can tell: of direction i on the left
    and j on the right, S_i^2 S_j^2 over the two factors' mean squares."""
    shares: list[Tensor] = []
    for own in sides:
        for left, right in own.values():
            product = left.shares[:, :, None] * right.shares[:, None, :]
            shares.append(product / left.energy.clamp(min=1e-300)[:, None, None])
    sizes = [share.numel() for share in shares]
    flat = torch.cat([share.flatten() for share in shares])
    best = torch.zeros_like(flat, dtype=torch.bool)
    best[flat.topk(min(room, len(flat))).indices] = True
    grids: list[dict[str, Grid]] = []
    masks = iter(
        mask.unflatten(0, share.shape)
        for mask, share in zip(best.split(sizes), shares, strict=True)
    )
    for own in sides:
        found = {}
        for name, (left, right) in own.items():
            mask = next(masks)
            if not bool(mask.any()):
                continue
            _, rows, columns = mask.nonzero(as_tuple=True)
            left, right = left.first(int(rows.max()) + 1), right.first(int(columns.max()) + 1)
            mask = mask[:, : int(rows.max()) + 1, : int(columns.max()) + 1]
            kept = mask.flatten().nonzero().squeeze(1)
            place = (session.device, session.dtype)
            found[name] = Grid(
                (left.examples.to(*place), right.examples.to(*place)),
                (left.responses.to(*place), right.responses.to(*place)),
                kept.to(session.device),
            )
        grids.append(found)
    return grids


def mixed(
    unmixed: LeadingCoordinates, gradients: Tensor, responses: Tensor, width: int, whole: bool
) -> tuple[LeadingCoordinates, Tensor]:
    """Principal components of the coordinates, ``width`` at most, and which of them they are made
    of, as a mask.

    Of a sample, components beyond half its size are noise, and other examples' numbers in them are
    larger than the sample's: they spoil rounding. A sample that is the whole training set has no
    other examples, and as many components as examples hold all of it. Where there is room for more
    than components that are no noise, single coordinates are taken.

    Args:
        gradients: of a sample, [example, coordinate].
        responses: of queries, by which they are weighed, [query, coordinate].
        whole: whether the sample is the whole training set.
    """
    asked = responses.double().square().mean(0)
    offered = gradients.double().square().mean(0)
    best = torch.ones_like(asked, dtype=torch.bool)
    noise = not whole and width >= len(gradients) // 2
    if len(asked) > (room := max(MIXED, width)):
        best = _largest(asked * offered, room)
    if noise or width >= int(best.sum()):
        if len(asked) > width:
            best = _largest(asked * offered, width)
        size = sizes(offered[best])
        mixes = size.reciprocal(), size
    else:
        root = _positive(asked[best]).sqrt()
        vectors, values = _principal(gradients[:, best].double() * root, width)
        values = values.sqrt()
        mixes = root[:, None] * vectors / values, vectors * values / root[:, None]
    grids = _chosen(unmixed.grids, best)
    return LeadingCoordinates(grids, *(own.to(gradients) for own in mixes)), best


def _largest(shares: Tensor, count: int) -> Tensor:
    best = torch.zeros_like(shares, dtype=torch.bool)
    best[shares.topk(count).indices] = True
    return best


def _principal(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors [coordinate, count] of the second moment, and their eigenvalues;
    fewer where the others are noise."""
    short = len(rows) < rows.shape[1]
    values, vectors = torch.linalg.eigh((rows @ rows.mT if short else rows.mT @ rows) / len(rows))
    count = max(1, min(count, int((values > LEAST * values[-1]).sum())))
    values, vectors = values.flip(0)[:count].clamp(min=1e-300), vectors.flip(1)[:, :count]
    if short:
        vectors = rows.mT @ vectors * (values * len(rows)).rsqrt()
    return vectors, values


def _positive(squares: Tensor) -> Tensor:
    """Mean squares, of which none is zero."""
    return squares.clamp(min=1e-12 * float(squares.max().clamp(min=1e-300)))


def _chosen(grids: Grids, best: Tensor) -> Grids:
    """The grids with some of their coordinates alone."""
    chosen, before = [], 0
    for own in grids:
        found = {}
        for name, grid in own.items():
            assert grid.kept is not None
            mask = best[before : before + len(grid.kept)]
            before += len(grid.kept)
            if bool(mask.any()):
                found[name] = replace(grid, kept=grid.kept[mask])
        chosen.append(found)
    return chosen
