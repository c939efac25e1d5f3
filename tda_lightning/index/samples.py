"""What a sample of examples and of queries shows: second moments, coordinates, exact scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tda_lightning.gradients import Gradient, Outer, Rows
from tda_lightning.gradients.basis import matmul_sides
from tda_lightning.index.compression import Compression, Coordinates
from tda_lightning.index.matrices import Matrices
from tda_lightning.index.responses import Responder, Responses, Term
from tda_lightning.index.sides import Side, balanced, sketch
from tda_lightning.session.session import Session

_Sketches = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class BlockMoments:
    """Mean second moments of both sides of a block's gradients and responses in one term, float64
    [groups, width, width].

    Attributes:
        sketches: of the two sides, in which moments are taken; None: a side's own axes.
    """

    left_gradients: Tensor
    right_gradients: Tensor
    left_responses: Tensor
    right_responses: Tensor
    sketches: _Sketches

    @cached_property
    def left(self) -> Side:
        """The balanced directions of the row side."""
        return balanced(self.left_gradients, self.left_responses, self.sketches[0])

    @cached_property
    def right(self) -> Side:
        """The balanced directions of the column side."""
        return balanced(self.right_gradients, self.right_responses, self.sketches[1])

    @property
    def gradients(self) -> float:
        """Mean square of the gradients."""
        return _trace(self.left_gradients)

    @property
    def responses(self) -> float:
        """Mean square of the responses."""
        return _trace(self.left_responses)

    @property
    def weight(self) -> float:
        """About the mean square of the block's part of scores, as if the sides were
        independent."""
        left = (self.left_gradients * self.left_responses).sum((1, 2))
        right = (self.right_gradients * self.right_responses).sum((1, 2))
        sizes = [
            own.diagonal(dim1=-2, dim2=-1).sum(-1)
            for own in (self.left_gradients, self.left_responses)
        ]
        return float((left * right / (sizes[0] * sizes[1]).clamp(min=1e-300)).sum())


def side_moments(
    session: Session, responder: Responder, sample: Sequence[Sequence[int]], seed: int
) -> list[dict[str, BlockMoments]]:
    """Of every term by block, over the sample's gradients and the session's queries."""
    generator = torch.Generator().manual_seed(seed)
    sketches: dict[str, _Sketches] = {}
    for block in session.blocks:
        groups, rows, columns = block.shape
        own = (sketch(groups, width, generator) for width in (rows, columns))
        left, right = (
            None if one is None else one.to(session.device, session.dtype) for one in own
        )
        sketches[block.name] = (left, right)
    examples = [_Sums(sketches) for _ in responder.terms]
    asked = [_Sums(sketches) for _ in responder.terms]
    for number, gradients in gradients_of(session, responder, sample):
        for name, gradient in gradients.items():
            examples[number].add_gradient(name, gradient, *sketches[name])
    for number, responses in responses_of(session, responder):
        for name, response in responses.items():
            left, right = sketches[name]
            asked[number].add(name, matmul_sides(left, response, right))
    return [
        {
            name: BlockMoments(*own.means(name), *queries.means(name), both)
            for name, both in sketches.items()
        }
        for own, queries in zip(examples, asked, strict=True)
    ]


class _Sums:
    """Second moments of both sides of matrices [*, groups, rows, columns], summed, by block."""

    def __init__(self, sketches: Mapping[str, _Sketches]) -> None:
        self._left = dict.fromkeys(sketches, torch.zeros(()))
        self._right = dict.fromkeys(sketches, torch.zeros(()))
        self._count = dict.fromkeys(sketches, 0)

    def add(self, name: str, matrices: Tensor) -> None:
        """Of matrices [*, groups, rows, columns]."""
        across = matrices.transpose(0, 1)  # [groups, *, rows, columns]
        tall, wide = across.flatten(1, 2), across.mT.flatten(1, 2)
        self._add(name, len(matrices), wide.mT @ wide, tall.mT @ tall)

    def add_gradient(
        self, name: str, gradient: Gradient, left: Tensor | None, right: Tensor | None
    ) -> None:
        """Of gradients, through a sketch of either side; from their factors where they have few."""
        if isinstance(gradient, Rows) and left is None:
            self._add(name, gradient.batch, *_row_moments(gradient, right))
            return
        if isinstance(gradient, Outer) and gradient.positions < min(gradient.shape[2:]) / 2:
            own = Matrices.of(gradient, left, right)
            if own.right is not None:
                self._add(name, gradient.batch, *_factor_moments(own.left, own.right))
                return
        for part in gradient.chunks():
            self.add(name, gradient.rotated(part, left, right))

    def _add(self, name: str, count: int, left: Tensor, right: Tensor) -> None:
        self._left[name] = self._left[name].to(left.device) + left.double()
        self._right[name] = self._right[name].to(left.device) + right.double()
        self._count[name] += count

    def means(self, name: str) -> tuple[Tensor, Tensor]:
        return self._left[name] / self._count[name], self._right[name] / self._count[name]


def _factor_moments(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of both second moments of left @ right^T, [batch, groups, width, inner] each."""
    found = []
    for one, other in ((left, right), (right, left)):
        products = one @ (other.mT @ other)
        across, turned = (own.mT.transpose(0, 1).flatten(1, 2) for own in (one, products))
        found.append(across.mT @ turned)
    return found[0], found[1]


def _row_moments(gradient: Rows, right: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of both second moments of gradients that touch few rows: those of the row side are in
    the pairs of rows that an example touches."""
    values = gradient.values if right is None else gradient.values @ right[0]
    height = gradient.shape[2]
    left = values.new_zeros(1, height, height)
    first, count = 0, torch.bincount(gradient.example, minlength=gradient.batch).tolist()
    for own in count:
        index, part = gradient.index[first : first + own], values[first : first + own]
        left[0, index[:, None], index] += part @ part.mT  # an example has each row once
        first += own
    return left, (values.mT @ values)[None]


def _trace(moment: Tensor) -> float:
    return float(moment.diagonal(dim1=-2, dim2=-1).sum())


def gradients_of(
    session: Session, responder: Responder, sample: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Mapping[str, Gradient]]]:
    """The number of each term with the gradients of a batch of the sample, checkpoint by
    checkpoint."""
    for number, term in enumerate(responder.terms):
        for step in term.steps:
            session.load(step)
            for batch, examples in session.batches(sample):
                yield number, session.train_gradients(batch, examples).blocks


def averaged_coordinates(
    terms: Sequence[Term],
    session: Session,
    compressions: Sequence[Compression],
    walk: Callable[[], Iterable[Mapping[str, Gradient]]],
) -> list[list[list[Coordinates]]]:
    """Coordinates averaged over the checkpoints of each term: [compression][batch][term].

    Args:
        walk: gives the gradients of every batch at the loaded checkpoint.
    """
    found: list[list[list[Coordinates]]] = [[] for _ in compressions]
    for number, term in enumerate(terms):
        weight = torch.full((1, 1), 1 / len(term.steps), dtype=session.dtype, device=session.device)
        for step in term.steps:
            session.load(step)
            for place, gradients in enumerate(walk()):
                for own, compression in zip(found, compressions, strict=True):
                    part = compression.coordinates(number, gradients)
                    if len(term.steps) > 1:
                        part = part * weight
                    if place == len(own):
                        own.append([])
                    if number == len(own[place]):
                        own[place].append(part)
                    else:
                        own[place][number] = own[place][number] + part
    return found


def sample_coordinates(
    session: Session,
    responder: Responder,
    compressions: Sequence[Compression],
    sample: Sequence[Sequence[int]],
) -> list[list[list[Coordinates]]]:
    """Those of a sample's gradients: [compression][batch][term]. One walk for all compressions."""

    def walk() -> Iterator[Mapping[str, Gradient]]:
        for batch, examples in session.batches(sample):
            yield session.train_gradients(batch, examples).blocks

    return averaged_coordinates(responder.terms, session, compressions, walk)


class ExactScores:
    """Scores of a sample, without uses and 1/N.

    Attributes:
        values: [query, example], of the responses that were added.
    """

    def __init__(
        self, session: Session, responder: Responder, sample: Sequence[Sequence[int]]
    ) -> None:
        self._session, self._responder, self._sample = session, responder, sample
        shape = (session.num_query, sum(map(len, sample)))
        self.values = torch.zeros(shape, dtype=session.dtype, device=session.device)

    def add(self, queries: slice, number: int, responses: Responses) -> None:
        """Add the products of a term's responses with the sample's gradients."""
        steps = self._responder.terms[number].steps
        for step in steps:
            self._session.load(step)
            before = 0
            for batch, examples in self._session.batches(self._sample):
                gradients = self._session.train_gradients(batch, examples).blocks
                columns = slice(before, before + len(examples))
                for name, gradient in gradients.items():
                    values = gradient.dot(gradient.arranged(responses[name]))
                    self.values[queries, columns] += values / len(steps)
                before += len(examples)


def query_coordinates(
    session: Session,
    responder: Responder,
    compressions: Sequence[Compression],
    exact: ExactScores | None = None,
) -> list[Tensor]:
    """Of the responses of the session's queries, one term after the other, for each compression:
    [query, coordinate]. Each response is computed once for all, and added to ``exact``."""
    parts: list[list[list[Tensor]]] = [[] for _ in compressions]
    for first, last in session.query_rounds(responder.query_bytes):
        for own in parts:
            own.append([])
        by_term: dict[int, list[Tensor]] = {}
        for number, responses in responder.responses(first, last):
            by_term[number] = [own.response_coordinates(number, responses) for own in compressions]
            if exact is not None:
                exact.add(slice(first, last), number, responses)
        for place, own in enumerate(parts):
            own[-1] = [by_term[number][place] for number in sorted(by_term)]
    return [torch.cat([torch.cat(terms, dim=1) for terms in own]) for own in parts]


def exact_scores(session: Session, responder: Responder, sample: Sequence[Sequence[int]]) -> Tensor:
    """Scores of a sample, without uses and 1/N: [query, example]."""
    exact = ExactScores(session, responder, sample)
    query_coordinates(session, responder, [], exact)
    return exact.values


def responses_of(session: Session, responder: Responder) -> Iterator[tuple[int, Responses]]:
    """The number of each term with the responses of some of the session's queries, in order."""
    for first, last in session.query_rounds(responder.query_bytes):
        yield from responder.responses(first, last)
