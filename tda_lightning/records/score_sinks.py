"""Where an attribution puts its scores, block by block: memory or a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tda_lightning.records.provenance import Provenance
from tda_lightning.records.score_checks import (
    require_candidates,
    require_finite,
    require_finite_query_tokens,
    require_finite_self_influence,
    require_finite_tokens,
)
from tda_lightning.records.scores import Scores


class ScoreSink(Protocol):
    """Where an attribution puts its scores, block by block: memory or a file."""

    def add(
        self, segment: int | None, train_indices: Tensor, values: Tensor, first_query: int = 0
    ) -> None:
        """Add ``values`` [some queries, block] to the rows from ``first_query`` on and the columns
        ``train_indices`` [block]."""

    def set_self_influence(self, values: Tensor) -> None:
        """Keep the self-influence [train] of every training example."""

    def set_by_token(self, values: Tensor) -> None:
        """Keep the scores of single terms, [query, train, position]."""

    def set_by_query_token(self, values: Tensor) -> None:
        """Keep the scores of single tokens of the queries, [query, position, train]."""

    def set_direct(self, values: Tensor) -> None:
        """Keep the direct terms of edits, [query, edit], and add them to the scores."""

    def set_candidates(self, candidates: Tensor) -> None:
        """Score these alone, int64 [query, k]: whatever is added to others is forgotten."""

    def finish(self, provenance: Provenance) -> Scores:
        """The finished scores; a file appears under its name only now."""

    def abort(self) -> None:
        """Give up; a file leaves nothing behind. After ``finish`` it does nothing."""


@dataclass(frozen=True)
class StageSink:
    """The part of ``sink`` that belongs to one stage of training."""

    sink: ScoreSink
    first_segment: int
    first_column: int

    def add(
        self, segment: int | None, train_indices: Tensor, values: Tensor, first_query: int = 0
    ) -> None:
        """Add to the stage's own segments and columns, which count from 0."""
        assert segment is not None
        columns = train_indices + self.first_column
        self.sink.add(self.first_segment + segment, columns, values, first_query)

    def set_self_influence(self, values: Tensor) -> None:
        """Refused: one stage's examples are not all of them."""
        raise ValueError("Self-influence belongs to the scores of all stages together.")

    def set_by_token(self, values: Tensor) -> None:
        """Refused: one stage's examples are not all of them."""
        raise ValueError("Scores by token belong to the scores of all stages together.")

    def set_by_query_token(self, values: Tensor) -> None:
        """Refused: one stage's examples are not all of them."""
        raise ValueError("Scores by token belong to the scores of all stages together.")

    def set_direct(self, values: Tensor) -> None:
        """Refused: edits are of one training set."""
        raise ValueError("Direct terms belong to the scores of all stages together.")

    def set_candidates(self, candidates: Tensor) -> None:
        """Refused: one stage's examples are not all of them."""
        raise ValueError("Candidates belong to the scores of all stages together.")

    def finish(self, provenance: Provenance) -> Scores:
        """The finished scores of all stages."""
        return self.sink.finish(provenance)

    def abort(self) -> None:
        """Give up the scores of all stages."""
        self.sink.abort()


@dataclass
class QueryTokenSink:
    """Takes the scores of single tokens of queries, and hands their sums to ``sink``.

    Attributes:
        query: that each row belongs to, int64 [row].
        position: of its token, int64 [row].
        by_query_token: [query, position, train].
    """

    sink: ScoreSink
    query: Tensor
    position: Tensor
    by_query_token: Tensor

    def add(
        self, segment: int | None, train_indices: Tensor, values: Tensor, first_query: int = 0
    ) -> None:
        """Add rows to the scores of their tokens, and to those of their queries."""
        own, first = self._summed(values, first_query)
        self.sink.add(segment, train_indices, own, first)
        values = values.detach().to("cpu", self.by_query_token.dtype)
        rows = slice(first_query, first_query + len(values))
        columns = train_indices.cpu()
        for query, position, row in zip(
            self.query[rows].tolist(), self.position[rows].tolist(), values, strict=True
        ):
            self.by_query_token[query, position].index_add_(0, columns, row)

    def set_self_influence(self, values: Tensor) -> None:
        """It is of no query."""
        self.sink.set_self_influence(values)

    def set_by_token(self, values: Tensor) -> None:
        """They are of whole queries."""
        self.sink.set_by_token(values)

    def set_by_query_token(self, values: Tensor) -> None:
        """Refused: they are what is gathered here."""
        raise ValueError("Scores by query token are gathered from the rows.")

    def set_direct(self, values: Tensor) -> None:
        """Refused: edits of a graph have no tokens."""
        raise ValueError("Edits of a graph have no scores by token.")

    def set_candidates(self, candidates: Tensor) -> None:
        """Those of a query's first token are those of all."""
        first = torch.searchsorted(self.query, torch.arange(len(self.by_query_token)))
        self.sink.set_candidates(candidates.cpu()[first])

    def finish(self, provenance: Provenance) -> Scores:
        """The finished scores."""
        return self.sink.finish(provenance)

    def abort(self) -> None:
        """Give up."""
        self.sink.abort()

    def _summed(self, values: Tensor, first_row: int) -> tuple[Tensor, int]:
        own = self.query[first_row : first_row + len(values)].to(values.device)
        first, last = int(own[0]), int(own[-1])
        total = values.new_zeros(last + 1 - first, *values.shape[1:])
        return total.index_add_(0, own - first, values), first


@dataclass(frozen=True)
class MemberSink:
    """The part of ``sink`` that belongs to one member of an ensemble; all of them add to the mean.

    Attributes:
        number: of the member, from 0.
        by_segment: whether the member is split by the segments of the others.
        runs: how many add to the member, which is their mean.
        apart: whether the scores of the ensemble are no mean over its members and are added to
            ``sink`` itself.
    """

    sink: MemorySink
    number: int
    by_segment: bool
    runs: int = 1
    apart: bool = False

    def add(
        self, segment: int | None, train_indices: Tensor, values: Tensor, first_query: int = 0
    ) -> None:
        """Add to the member's own scores, and a share of it to the mean."""
        members = self.sink.members
        assert members is not None
        values = values / self.runs
        if not self.apart:
            segment = segment if self.by_segment else None
            self.sink.add(segment, train_indices, values / len(members), first_query)
        rows = members[self.number, first_query : first_query + len(values)]
        _add_columns(rows, train_indices.cpu(), values.detach().to("cpu", members.dtype))

    def set_self_influence(self, values: Tensor) -> None:
        """Add a share to the mean."""
        self.sink.set_self_influence(self._mean(self.sink.self_influence, values))

    def set_by_token(self, values: Tensor) -> None:
        """Add a share to the mean."""
        self.sink.set_by_token(self._mean(self.sink.by_token, values))

    def set_by_query_token(self, values: Tensor) -> None:
        """Add a share to the mean."""
        self.sink.set_by_query_token(self._mean(self.sink.by_query_token, values))

    def set_direct(self, values: Tensor) -> None:
        """Add the member's own to its scores, and a share to the mean."""
        assert self.sink.members is not None
        self.sink.members[self.number] += values.to(self.sink.values) / self.runs
        self.sink.direct = self._mean(self.sink.direct, values)

    def set_candidates(self, candidates: Tensor) -> None:
        """Refused: every member has candidates of its own."""
        raise ValueError(
            "Every member of an ensemble has other candidates, so the mean of their scores does "
            "not exist. Use InfluenceFunction, or attribute the members one by one."
        )

    def _mean(self, total: Tensor | None, values: Tensor) -> Tensor:
        assert self.sink.members is not None
        share = values.detach().to("cpu", self.sink.values.dtype) / len(self.sink.members)
        share = share / self.runs
        return share if total is None else total + share

    def finish(self, provenance: Provenance) -> Scores:
        """The finished scores of the ensemble."""
        return self.sink.finish(provenance)

    def abort(self) -> None:
        """Give up the scores of the ensemble."""
        self.sink.abort()


@dataclass(frozen=True)
class TimestepSink:
    """Takes the scores of parts of a measurement (timesteps), row by row as if they were queries,
    and adds them to the ``by_timestep`` of ``whole`` and a share to the mean in ``sink``.

    Attributes:
        sink: of one run; ``whole`` itself, or a part of it.
        whole: the scores of all runs.
        share: of this run in ``by_timestep``.
    """

    sink: ScoreSink
    whole: MemorySink
    share: float = 1.0

    def add(
        self, segment: int | None, train_indices: Tensor, values: Tensor, first_query: int = 0
    ) -> None:
        """Add rows; row t * queries + q is query q at timestep t."""
        kept = self.whole.by_timestep
        assert kept is not None
        timesteps, queries = kept.shape[:2]
        row, last = first_query, first_query + len(values)
        while row < last:
            timestep, query = divmod(row, queries)
            stop = min(last, (timestep + 1) * queries)
            block = values[row - first_query : stop - first_query]
            self.sink.add(segment, train_indices, block / timesteps, query)
            own = (block * self.share).detach().to("cpu", kept.dtype)
            _add_columns(kept[timestep, query : query + len(block)], train_indices.cpu(), own)
            row = stop

    def set_self_influence(self, values: Tensor) -> None:
        """As it is: it is of whole measurements."""
        self.sink.set_self_influence(values)

    def set_by_token(self, values: Tensor) -> None:
        """The mean over timesteps."""
        assert self.whole.by_timestep is not None
        self.sink.set_by_token(values.unflatten(0, self.whole.by_timestep.shape[:2]).mean(0))

    def set_by_query_token(self, values: Tensor) -> None:
        """Refused: the parts of a query are its timesteps."""
        raise ValueError("Scores by query token do not go with scores by timestep.")

    def set_direct(self, values: Tensor) -> None:
        """Refused: a graph has no timesteps."""
        raise ValueError("Direct terms belong to edits of a graph, which has no timesteps.")

    def set_candidates(self, candidates: Tensor) -> None:
        """Refused: a query has other candidates at every timestep."""
        raise ValueError(
            "FastInfluence scores other candidates at every timestep, so there are no scores "
            "by_timestep. Use InfluenceFunction, or by_timestep=False."
        )

    def finish(self, provenance: Provenance) -> Scores:
        """The finished scores."""
        return self.sink.finish(provenance)

    def abort(self) -> None:
        """Give up the scores."""
        self.sink.abort()


class MemorySink:
    """Scores gathered in memory; every entry starts at zero.

    Args:
        num_queries: rows.
        num_train: columns.
        num_segments: when given, each block belongs to a segment and ``values`` is their sum.
        dtype: float32 or float64.
        num_members: when given, each block belongs to a member of an ensemble, and ``values`` is
            the mean over the members.
        num_timesteps: when given, scores are also kept by timestep (:class:`TimestepSink`).
    """

    members: Tensor | None = None
    direct: Tensor | None = None
    by_timestep: Tensor | None = None

    def __init__(
        self,
        num_queries: int,
        num_train: int,
        num_segments: int | None = None,
        dtype: torch.dtype = torch.float32,
        num_members: int | None = None,
        num_timesteps: int | None = None,
    ) -> None:
        shape = (num_queries, num_train)
        self.values = torch.zeros(shape, dtype=dtype)
        self.by_segment = (
            None if num_segments is None else torch.zeros(num_segments, *shape, dtype=dtype)
        )
        self.self_influence: Tensor | None = None
        self.by_token: Tensor | None = None
        self.by_query_token: Tensor | None = None
        self.candidates: Tensor | None = None
        if num_members is not None:
            self.members = torch.zeros(num_members, *shape, dtype=dtype)
        if num_timesteps is not None:
            self.by_timestep = torch.zeros(num_timesteps, *shape, dtype=dtype)

    def add(
        self, segment: int | None, train_indices: Tensor, values: Tensor, first_query: int = 0
    ) -> None:
        """Add ``values`` [some queries, block] to the columns ``train_indices`` [block].

        Args:
            segment: number of the segment from 0; None exactly when there are no segments.
            train_indices: int64, in any order; an index that comes twice is added twice.
            values: on any device, of any floating-point type.
            first_query: the query of the first row of ``values``.

        Raises:
            NonFiniteError: a score is NaN or infinite; names the query and the example.
        """
        queries, train = self.values.shape
        if (segment is None) != (self.by_segment is None):
            kind = "without segments" if self.by_segment is None else "by segment"
            raise ValueError(f"These scores are gathered {kind}, got segment={segment}.")
        if self.by_segment is not None and not 0 <= (segment or 0) < len(self.by_segment):
            raise IndexError(
                f"Segment {segment} does not exist: the scores are gathered in "
                f"{len(self.by_segment)} segments, numbered from 0."
            )
        last_query = first_query + len(values)
        if (
            values.shape[1:] != (len(train_indices),)
            or not 0 <= first_query < last_query <= queries
        ):
            raise ValueError(
                f"values must have the shape [up to {queries} queries, {len(train_indices)} "
                f"training indices], got {list(values.shape)} from query {first_query} on."
            )
        if not len(train_indices):
            return
        columns = train_indices.cpu()
        if int(columns.min()) < 0 or int(columns.max()) >= train:
            raise ValueError(
                f"train_indices must lie in 0 to {train - 1}, got {int(columns.min())} to "
                f"{int(columns.max())}."
            )
        block = values.detach().to("cpu", self.values.dtype)
        require_finite(block, columns, first_query)
        target = self.values if self.by_segment is None else self.by_segment[segment]
        _add_columns(target[first_query:last_query], columns, block)

    def set_self_influence(self, values: Tensor) -> None:
        """Keep the self-influence [train] of every training example."""
        if values.shape != (self.values.shape[1],):
            raise ValueError(
                f"self_influence must hold one number for each of the {self.values.shape[1]} "
                f"training examples, got shape {list(values.shape)}."
            )
        require_finite_self_influence(values)
        self.self_influence = values.detach().to("cpu", self.values.dtype)

    def set_by_token(self, values: Tensor) -> None:
        """Keep the scores of single terms, [query, train, position]."""
        if values.ndim != 3 or values.shape[:2] != self.values.shape:
            raise ValueError(
                f"by_token must have the shape [{', '.join(map(str, self.values.shape))}, "
                f"position], got {list(values.shape)}."
            )
        require_finite_tokens(values)
        self.by_token = values.detach().to("cpu", self.values.dtype)
        if self.candidates is not None:
            _keep_candidates(self.by_token, self.candidates)

    def set_by_query_token(self, values: Tensor) -> None:
        """Keep the scores of single tokens of the queries, [query, position, train]."""
        queries, train = self.values.shape
        if values.ndim != 3 or (values.shape[0], values.shape[2]) != (queries, train):
            raise ValueError(
                f"by_query_token must have the shape [{queries}, position, {train}], got "
                f"{list(values.shape)}."
            )
        if self.candidates is not None:
            values = values.detach().cpu().clone()
            _keep_candidates(values.transpose(1, 2), self.candidates)
        else:
            require_finite_query_tokens(values)
        self.by_query_token = values.detach().to("cpu", self.values.dtype)

    def set_direct(self, values: Tensor) -> None:
        """Keep the direct terms of edits, [query, edit], and add them to the scores."""
        if values.shape != self.values.shape:
            raise ValueError(
                f"direct must have the shape {list(self.values.shape)} of the scores, got "
                f"{list(values.shape)}."
            )
        self.direct = values.detach().to("cpu", self.values.dtype)

    def set_candidates(self, candidates: Tensor) -> None:
        """Score these alone, int64 [query, k]: whatever is added to others is forgotten.

        Call it before anything is added.
        """
        if self.by_segment is not None:
            raise ValueError("Scores of candidates alone have no segments.")
        require_candidates(candidates, *self.values.shape)
        self.candidates = candidates.detach().cpu()
        # What is added to NaN stays NaN, here and in a sum over processes.
        for row, chosen in zip(self.values, self.candidates, strict=True):
            row.fill_(torch.nan)
            row[chosen] = 0

    def finish(self, provenance: Provenance) -> Scores:
        """The finished scores."""
        self._sum_segments()
        return Scores(
            self.values,
            self.by_segment,
            self.self_influence,
            provenance,
            self.by_token,
            self.candidates,
            self.members,
            self.by_query_token,
            self.direct,
            self.by_timestep,
        )

    def abort(self) -> None:
        """Nothing to undo in memory."""

    def _sum_segments(self) -> None:
        if self.by_segment is not None:
            # Row by row, because the twin of this class works on files larger than memory.
            for query in range(len(self.values)):
                torch.sum(self.by_segment[:, query], dim=0, out=self.values[query])
        if self.direct is not None:
            self.values += self.direct


def _keep_candidates(tokens: Tensor, candidates: Tensor) -> None:
    """Make the scores [query, train, position] of those that are no candidates NaN, in place."""
    for own, chosen in zip(tokens, candidates, strict=True):
        others = torch.ones(len(own), dtype=torch.bool)
        others[chosen] = False
        own[others] = torch.nan


def _add_columns(target: Tensor, columns: Tensor, block: Tensor) -> None:
    first, count = int(columns[0]), len(columns)
    if torch.equal(columns, torch.arange(first, first + count)):
        target[:, first : first + count] += block
        return
    unique, inverse = torch.unique(columns, return_inverse=True)
    if len(unique) < count:
        block = block.new_zeros(len(block), len(unique)).index_add_(1, inverse, block)
        columns = unique
    target[:, columns] += block
