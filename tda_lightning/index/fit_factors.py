"""Chooses directions and ranks of factor pairs, from a sample of examples and of queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda_lightning.index.directions import sizes
from tda_lightning.index.factors import FactoredBlock, FactorPairs
from tda_lightning.index.matrices import BlockMatrices
from tda_lightning.index.responses import Responder
from tda_lightning.index.samples import BlockMoments, sample_coordinates
from tda_lightning.index.sides import Side, balanced
from tda_lightning.session.session import Session

_RANKS = 8  # pairs of a block, at most
_TRIED = 64  # examples whose singular values are looked at, in so many directions of a row side
_BY_WEIGHT = 0.25  # 0: numbers of one size; 1: numbers whose rounding costs scores the same
_STEPS = 512  # of the search for the best widths: so many parts of the budget


@dataclass(frozen=True)
class BlockShares:
    """What directions and pairs of a run's blocks hold, from which any number of them is cut.

    Attributes:
        sides: all directions, by block.
        ranks: share of the squared singular values that the first 0, 1, ... hold, by block.
    """

    sides: Mapping[str, _Sides]
    ranks: Mapping[str, list[float]]

    @classmethod
    def measured(
        cls,
        session: Session,
        responder: Responder,
        moments: Sequence[Mapping[str, BlockMoments]],
        sample: Sequence[Sequence[int]],
    ) -> BlockShares:
        """From the moments of every term, by block, and singular values of some of the sample."""
        sides = {name: _whole(moments, name) for name in sorted(moments[0])}
        return cls(sides, _shares_by_rank(session, responder, sides, sample))

    def cut(self, session: Session, width: int) -> FactorPairs:
        """Pairs of vectors of ``width`` numbers together, unscaled."""
        chosen = _allocated(self.sides, self.ranks, width)
        if not chosen:
            raise ValueError(
                "Factor pairs cannot be chosen: the gradients of all examples of the sample, or "
                "the responses of all queries, are zero. Look at the run's last checkpoints."
            )
        place = (session.device, session.dtype)
        return FactorPairs(
            {name: self.sides[name].cut(*own, *place) for name, own in chosen.items()}
        )


def least_pair(session: Session) -> int:
    """The fewest numbers that a pair of vectors of some block takes."""
    return min(2 * block.shape[0] for block in session.blocks)


@dataclass(frozen=True)
class _Sides:
    """All directions of a block: the row side's of every term, the column side's of all together.

    Attributes:
        weights: what each term adds to the mean square of scores.
    """

    left: list[Side]
    right: Side
    weights: list[float]

    def held_left(self, term: int) -> list[float]:
        """Share of the term's scores that the first 0, 1, ... directions hold."""
        return _cumulative(self.left[term].shares)

    def held_right(self) -> list[float]:
        """The same of the column side."""
        return _cumulative(self.right.shares)

    def cut(
        self,
        heights: Sequence[int],
        width: int,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> FactoredBlock:
        """The leading directions alone, unscaled."""
        left = [own.first(height) for own, height in zip(self.left, heights, strict=True)]
        right = self.right.first(width)
        groups = right.shares.shape[0]
        return FactoredBlock(
            tuple(own.examples.to(device, dtype) for own in left),
            tuple(own.responses.to(device, dtype) for own in left),
            right.examples.to(device, dtype),
            right.responses.to(device, dtype),
            rank,
            torch.ones(groups, sum(heights), device=device, dtype=dtype),
            torch.ones(groups, width, device=device, dtype=dtype),
        )


def _whole(moments: Sequence[Mapping[str, BlockMoments]], name: str) -> _Sides:
    own = [term[name] for term in moments]
    # Gradients and responses of a term are brought to one size: their product stays.
    gauge = [(one.responses / max(one.gradients, 1e-300)) ** 0.5 for one in own]
    right = balanced(
        sum((g * one.right_gradients for g, one in zip(gauge, own, strict=True)), torch.zeros(())),
        sum(
            (one.right_responses / max(g, 1e-300) for g, one in zip(gauge, own, strict=True)),
            torch.zeros(()),
        ),
        own[0].sketches[1],
    )
    return _Sides([one.left for one in own], right, [one.weight for one in own])


def _cumulative(shares: Tensor) -> list[float]:
    mean = shares.sum(0)
    total = mean.sum().clamp(min=1e-300)
    return [0.0, *(mean.cumsum(0) / total).tolist()]


def _shares_by_rank(
    session: Session,
    responder: Responder,
    blocks: Mapping[str, _Sides],
    sample: Sequence[Sequence[int]],
) -> dict[str, list[float]]:
    """Which share of the squared singular values the first 0, 1, ... hold, by block."""
    place = (session.device, session.dtype)
    leading = FactorPairs(
        {
            name: own.cut(
                [min(_TRIED, side.shares.shape[1]) for side in own.left],
                min(2 * _TRIED, own.right.shares.shape[1]),
                1,
                *place,
            )
            for name, own in blocks.items()
        }
    )
    few = [batch[:_TRIED] for batch in sample[:1]]
    ((coordinates,),) = sample_coordinates(session, responder, [leading], few)
    shares = {}
    for name in blocks:
        matrices = leading.stacked(name, coordinates).dense()
        squares = torch.linalg.svdvals(matrices.float()).square().sum((0, 1))[:_RANKS]
        whole = matrices.float().square().sum()
        shares[name] = [0.0, *(squares.cumsum(0) / whole.clamp(min=1e-30)).tolist()]
    return shares


@dataclass
class _Choice:
    """How wide and deep a block is: a of every term, b, c."""

    heights: list[int]
    width: int
    rank: int


def _allocated(
    blocks: Mapping[str, _Sides], ranks: Mapping[str, list[float]], room: int
) -> dict[str, tuple[list[int], int, int]]:
    """Widths and ranks that hold most of the mean square of scores in ``room`` numbers: step by
    step, what adds most for its numbers."""
    tables = {
        name: ([own.held_left(term) for term in range(len(own.left))], own.held_right())
        for name, own in blocks.items()
    }
    chosen = {name: _Choice([0] * len(own.left), 0, 1) for name, own in blocks.items()}
    step, used = max(1, room // _STEPS), 0
    moves = {name: list(_moves(chosen[name], tables[name], ranks[name], step)) for name in blocks}
    while True:
        best, gain = None, 0.0
        for name, own in blocks.items():
            value, numbers = _worth(own, chosen[name], tables[name], ranks[name])
            for move in moves[name]:
                more, taken = _worth(own, move, tables[name], ranks[name])
                if used + taken - numbers <= room and more - value > gain * (taken - numbers):
                    best, gain = (name, move, taken - numbers), (more - value) / (taken - numbers)
        if best is None:
            break
        name, move, taken = best
        chosen[name], used = move, used + taken
        moves[name] = list(_moves(move, tables[name], ranks[name], step))
    return {name: (own.heights, own.width, own.rank) for name, own in chosen.items() if own.width}


def _worth(
    sides: _Sides,
    choice: _Choice,
    tables: tuple[list[list[float]], list[float]],
    ranks: list[float],
) -> tuple[float, int]:
    """What a choice holds of the mean square of scores, and the numbers that it takes."""
    lefts, right = tables
    held = sum(
        weight * left[height]
        for weight, left, height in zip(sides.weights, lefts, choice.heights, strict=True)
    )
    groups = sides.right.shares.shape[0]
    numbers = groups * choice.rank * (sum(choice.heights) + choice.width)
    return held * right[choice.width] * ranks[choice.rank], numbers


def _moves(
    choice: _Choice,
    tables: tuple[list[list[float]], list[float]],
    ranks: list[float],
    step: int,
) -> Iterator[_Choice]:
    lefts, right = tables
    wider = min(choice.width + step, len(right) - 1)
    for term, left in enumerate(lefts):
        higher = list(choice.heights)
        higher[term] = min(higher[term] + step, len(left) - 1)
        if higher != choice.heights:
            yield _Choice(higher, choice.width or wider, choice.rank)
    if choice.width and wider > choice.width:
        yield replace(choice, width=wider)
    if choice.rank < min(len(ranks) - 1, sum(choice.heights), choice.width):
        yield replace(choice, rank=choice.rank + 1)


def scaled(
    pairs: FactorPairs, sample: Sequence[Sequence[BlockMatrices]], queries: Tensor
) -> FactorPairs:
    """The same with u and v scaled for rounding.

    Rounding adds about the same to every number of a row. Divided by their mean size alone, all
    numbers would lose the same share, those that scores hardly depend on too; divided by one over
    their weight in scores, rounding would cost scores the same by each number, but the largest
    would need more levels than there are. The scale is in between (``_BY_WEIGHT``).

    Args:
        sample: coordinates of examples: [batch][term].
        queries: those of queries.
    """
    made = {}
    for name, asked in pairs.matrices(queries):
        own = pairs.blocks[name]
        found = [pairs.stacked(name, coordinates).leading(own.rank) for coordinates in sample]
        rows, columns = (torch.cat(side).square().mean((0, 3)) for side in zip(*found, strict=True))
        squares = asked.square().mean(0)  # [groups, sum of a, b]
        row_weights = (squares @ columns[..., None])[..., 0]
        column_weights = (squares.mT @ rows[..., None])[..., 0]
        made[name] = replace(
            own,
            row_scale=_scale(rows, row_weights),
            column_scale=_scale(columns, column_weights),
        )
    return FactorPairs(made)


def _scale(squares: Tensor, weights: Tensor) -> Tensor:
    return sizes(squares) ** (1 - _BY_WEIGHT) / sizes(weights) ** _BY_WEIGHT
