"""The scores of a round of queries, as the way back finds them, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tda_lightning.estimators.unrolled.adjoints import Adjoints
from tda_lightning.estimators.unrolled.directions import Directions
from tda_lightning.session.stage import Stage


@dataclass
class RoundScores:
    """Hands the scores of a round's queries on.

    Attributes:
        stages: of training.
        first_query: number of the first of the queries.
        directions: what goes back instead of the queries; None: they go back themselves.
        lengths: of what went back at the end of training, [query] or [direction].
        found: scores of what went back, by stage and segment.
        tokens: their parts by the terms of losses, [query, train, position], by stage.
    """

    stages: Sequence[Stage]
    first_query: int
    directions: Directions | None
    lengths: Tensor
    found: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    tokens: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def begun(
        stages: Sequence[Stage],
        first_query: int,
        parameters: dict[str, Tensor],
        statistics: dict[str, Tensor],
        tolerance: float,
    ) -> tuple[RoundScores, Adjoints]:
        """At the end of training, and the adjoints that go back.

        Args:
            parameters: gradients of the queries' measurements.
            statistics: derivatives of the measurements by running statistics.
            tolerance: how far a query may be from the directions that go back in its place; 0: it
                goes back itself.
        """
        directions = None
        if tolerance and (found := Directions.of({**parameters, **statistics}, tolerance)):
            directions, carried = found
            parameters = {name: carried[name] for name in parameters}
            statistics = {name: carried[name] for name in statistics}
        made = RoundScores(stages, first_query, directions, lengths_of(parameters))
        return made, Adjoints(parameters, statistics)

    def add(self, number: int, segment: int, values: Tensor) -> None:
        """Add the scores of a stage's segment, [query, column]."""
        stage = self.stages[number]
        self.found[number, segment] = values
        if self.directions is not None:
            values = self.directions.add(values, stage.columns.start)
        columns = torch.arange(values.shape[1])
        stage.session.scores.add(segment, columns, values, self.first_query)

    def add_tokens(
        self, number: int, queries: int, rows: slice, columns: Tensor, parts: Tensor
    ) -> None:
        """Add the terms of a batch of a stage, [some queries, batch, position]."""
        own, length = self.tokens.get(number), parts.shape[2]
        if own is None:
            own = parts.new_zeros(queries, self.stages[number].session.num_train, length)
        if length > own.shape[2]:  # sequences of another batch may be longer
            own = torch.nn.functional.pad(own, (0, length - own.shape[2]))
        own[rows, :, :length].index_add_(1, columns, parts, alpha=-1)
        self.tokens[number] = own

    def finish_tokens(self) -> None:
        """Hand the scores of terms on, once all are found."""
        for number, own in self.tokens.items():
            values = own if self.directions is None else self.directions.scores(own)
            self.stages[number].session.add_term_scores(values, self.first_query)

    def segments_of(self, number: int) -> int:
        """How many segments of a stage have been added."""
        return sum(stage == number for stage, _ in self.found)

    def growth(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """How many times longer the parameters' adjoint of each query has become on its way back:
        [query]; of directions in their place, where there are such."""
        tiny = torch.finfo(torch.float64).tiny
        return lengths_of(parameters) / self.lengths.clamp(min=tiny)

    def tensors(self) -> dict[str, Tensor]:
        """To resume from."""
        tensors = {f"scores.{stage}.{own}": values for (stage, own), values in self.found.items()}
        tensors |= {f"tokens.{stage}": values for stage, values in self.tokens.items()}
        tensors["lengths"] = self.lengths
        return tensors if self.directions is None else {**tensors, **self.directions.tensors()}

    @staticmethod
    def restored(
        stages: Sequence[Stage], first_query: int, tensors: Mapping[str, Tensor]
    ) -> RoundScores:
        """What :meth:`tensors` gave; its scores are added again."""
        directions = Directions.restored(tensors)
        made = RoundScores(stages, first_query, directions, tensors["lengths"])
        for name, values in tensors.items():
            kind, *numbers = name.split(".")
            if kind == "scores":
                number, segment = (int(own) for own in numbers)
                made.add(number, segment, values.to(stages[number].session.device))
            elif kind == "tokens":
                (number,) = (int(own) for own in numbers)
                made.tokens[number] = values.to(stages[number].session.device)
        return made


def lengths_of(parameters: Mapping[str, Tensor]) -> Tensor:
    """Of [query, *shape] by name, over all names together: float64 [query]."""
    rows = [own.double().reshape(len(own), -1) for own in parameters.values()]
    return torch.stack([row.square().sum(1).cpu() for row in rows]).sum(0).sqrt()
