"""The batches of a replay as edits would have them: other examples or labels at some positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tda_lightning.edits import GraphEditSet, Term
from tda_lightning.replay.run import Draws, Replay
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.session.session import Session, relabelled


class Change(NamedTuple):
    """A term of an edit of the example at a position of a batch."""

    position: int
    column: int
    term: Term


@dataclass(frozen=True)
class Variants:
    """Loads the batches of a replay, as they were and edited."""

    replay: Replay
    session: Session

    def of(
        self, batch: object, examples: Tensor, draws: Draws | None
    ) -> list[tuple[object, list[int]]]:
        """The batch with the examples and labels that edits put there, in as few batches as hold
        one at each position, and these positions."""
        return [
            (self._variant(batch, examples, draws, terms), list(terms))
            for terms in _disjoint(self._changes(examples)[1])
        ]

    def changes(self, examples: Tensor) -> tuple[list[Change], list[Change]]:
        """What the edits of a batch's examples take: their own gradients, and those of other
        examples or labels in their places, in the order of the variants."""
        own, other = self._changes(examples)
        ordered = [change for terms in _disjoint(other) for change in _of_variant(other, terms)]
        return own, ordered

    def fetched(
        self, examples: Tensor, draws: Draws | None, replaced: Mapping[int, object] | None = None
    ) -> object:
        """The batch, with other examples at some positions."""
        replay = self.replay
        with unchanged_randomness():
            if not replaced:
                if draws is None:
                    return replay.fetch(examples)
                return replay.fetched(examples, draws.fetch)[0]
            if draws is not None:
                draws.fetch.restore()
            items = [
                replaced[position] if position in replaced else replay.source.dataset[index]
                for position, index in enumerate(examples.tolist())
            ]
            return replay.source.placed(replay.source.join(items), replay.module, ())

    def _changes(self, examples: Tensor) -> tuple[list[Change], list[Change]]:
        own: list[Change] = []
        other: list[Change] = []
        edits = self.session.edits
        if edits is None or isinstance(edits, GraphEditSet):
            return own, other
        for position, index in enumerate(examples.tolist()):
            for number in edits.positions_of(index):
                column, term = edits.terms[number]
                itself = term.index == index and not term.labels
                (own if itself else other).append(Change(position, column, term))
        return own, other

    def _variant(
        self, batch: object, examples: Tensor, draws: Draws | None, terms: Mapping[int, Term]
    ) -> object:
        """The batch with the examples and labels of ``terms`` at their positions."""
        dataset = self.replay.source.dataset
        replaced = {
            position: term.example if term.index is None else dataset[term.index]
            for position, term in terms.items()
            if term.index != int(examples[position])
        }
        if replaced:
            batch = self.fetched(examples, draws, replaced)
        labels = {position: term.labels[0] for position, term in terms.items() if term.labels}
        return relabelled(self.session.task, batch, labels) if labels else batch


def add_changes(values: Tensor, changes: Sequence[Change], products: Tensor) -> None:
    """Take ``products`` [query, change] off the scores ``values`` [query, column]."""
    if changes:
        signs = torch.tensor([change.term.sign for change in changes]).to(values)
        places = torch.tensor([change.column for change in changes], device=values.device)
        values.index_add_(1, places, signs * products.to(values), alpha=-1)


def _disjoint(changes: Sequence[Change]) -> list[dict[int, Term]]:
    """Terms by position, in as few batches as hold one at each position."""
    variants: list[dict[int, Term]] = []
    for change in changes:
        free = (terms for terms in variants if change.position not in terms)
        terms = next(free, None)
        if terms is None:
            terms = {}
            variants.append(terms)
        terms[change.position] = change.term
    return variants


def _of_variant(changes: Sequence[Change], terms: Mapping[int, Term]) -> list[Change]:
    """The changes that a variant holds, in its order."""
    return [
        next(c for c in changes if c.position == position and c.term is term)
        for position, term in terms.items()
    ]
