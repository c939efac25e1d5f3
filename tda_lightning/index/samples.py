"""What a sample of examples and of queries shows: second moments, coordinates, exact scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tda_lightning.gradients import Gradient
from tda_lightning.gradients.basis import matmul_sides
from tda_lightning.index.compression import Compression
from tda_lightning.index.responses import Responder, Responses
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
            for part in gradient.chunks():
                examples[number].add(name, gradient.rotated(part, *sketches[name]))
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
        across = matrices.transpose(0, 1)  # [groups, *, rows, columns]
        tall, wide = across.flatten(1, 2), across.mT.flatten(1, 2)
        self._left[name] = self._left[name].to(across.device) + (wide.mT @ wide).double()
        self._right[name] = self._right[name].to(across.device) + (tall.mT @ tall).double()
        self._count[name] += len(matrices)

    def means(self, name: str) -> tuple[Tensor, Tensor]:
        return self._left[name] / self._count[name], self._right[name] / self._count[name]


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


def responses_of(session: Session, responder: Responder) -> Iterator[tuple[int, Responses]]:
    """The number of each term with the responses of some of the session's queries, in order."""
    for first, last in session.query_rounds(responder.query_bytes):
        yield from responder.responses(first, last)


def sample_coordinates(
    session: Session,
    responder: Responder,
    compression: Compression,
    sample: Sequence[Sequence[int]],
) -> Tensor:
    """Of a sample's gradients, averaged over each term's checkpoints: [example, coordinate]."""
    by_term: list[list[Tensor]] = [[] for _ in responder.terms]
    for number, gradients in gradients_of(session, responder, sample):
        by_term[number].append(compression.coordinates(number, gradients))
    return torch.cat(
        [
            torch.cat(own).unflatten(0, (len(term.steps), -1)).mean(0)
            for term, own in zip(responder.terms, by_term, strict=True)
        ],
        dim=1,
    )


def query_coordinates(session: Session, responder: Responder, compression: Compression) -> Tensor:
    """Of the responses of the session's queries: [query, coordinate]."""
    by_term: list[list[Tensor]] = [[] for _ in responder.terms]
    for number, responses in responses_of(session, responder):
        by_term[number].append(compression.response_coordinates(number, responses))
    return torch.cat([torch.cat(own) for own in by_term], dim=1)


def exact_scores(session: Session, responder: Responder, sample: Sequence[Sequence[int]]) -> Tensor:
    """Scores of a sample, without uses and 1/N: [query, example]."""
    rounds = []
    for first, last in session.query_rounds(responder.query_bytes):
        total = torch.zeros(last - first, sum(map(len, sample)), device=session.device)
        for number, responses in responder.responses(first, last):
            steps = responder.terms[number].steps
            for step in steps:
                session.load(step)
                before = 0
                for batch, examples in session.batches(sample):
                    for name, gradient in session.train_gradients(batch, examples).blocks.items():
                        values = gradient.dot(gradient.arranged(responses[name]))
                        total[:, before : before + len(examples)] += values / len(steps)
                    before += len(examples)
        rounds.append(total)
    return torch.cat(rounds)
