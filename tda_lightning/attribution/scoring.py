"""Run the estimator on every run that was asked for, with the scores going where they belong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor

from tda_lightning.edits import GraphEditSet
from tda_lightning.estimators import EnsembleEstimator, Estimator, StagedEstimator
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.provenance import Provenance
from tda_lightning.records.score_sinks import (
    MemberSink,
    MemorySink,
    QueryTokenSink,
    ScoreSink,
    StageSink,
    TimestepSink,
)
from tda_lightning.runtime.processes import Processes
from tda_lightning.session.edited_graphs import direct_terms
from tda_lightning.session.session import Session
from tda_lightning.session.stage import Stage
from tda_lightning.store.scores_file import ScoreFile


@dataclass(frozen=True)
class OpenedRuns:
    """The runs that scores are made of, open for attribution by one estimator.

    Attributes:
        estimator: what scores them.
        runs: the stages of each.
        draws: runs of each member of an ensemble (random subsets), which follow one another.
    """

    estimator: Estimator
    runs: Sequence[Sequence[Stage]]
    draws: int

    @property
    def session(self) -> Session:
        """The last stage of the first run, which stands for all."""
        return self.runs[0][-1].session

    def segment_counts(self, stages: Sequence[Stage]) -> list[int] | None:
        """Segments of each stage of a run; None for an estimator without."""
        if len(stages) > 1:
            assert isinstance(self.estimator, StagedEstimator)
            return self.estimator.stage_segment_counts(stages)
        count = self.estimator.segment_count(stages[0].session)
        return None if count is None else [count]

    @property
    def num_segments(self) -> int | None:
        """Segments of the scores; None where the estimator has none, or runs differ in theirs."""
        first, *others = [self.segment_counts(stages) for stages in self.runs]
        return None if first is None or any(other != first for other in others) else sum(first)

    @property
    def num_members(self) -> int | None:
        """Members whose own scores are kept; None for a single one.

        A mean over seeds has an error of its own: the draws of a member only make it up.
        """
        members = len(self.runs) // self.draws
        several = members if members > 1 else self.draws
        return several if several > 1 else None

    @property
    def num_timesteps(self) -> int | None:
        """Timesteps whose scores are kept; None where the task has none."""
        return None if self.session.task.kept_parts is None else self.session.num_parts

    def sink(self, path: str | None, overwrite: bool, trainer: Trainer) -> MemorySink:
        """Where the scores go: memory, or the file at ``path``."""
        session = self.session
        queries = (session.whole or session).num_query // session.num_parts
        edits = session.edits
        columns = self.runs[0][-1].columns.stop if edits is None else len(edits)
        sizes = queries, columns, self.num_segments
        kept = self.num_members, self.num_timesteps
        if path is None:
            return MemorySink(*sizes, session.dtype, *kept)
        if trainer.world_size > 1:
            # Saved at the end by one process; whether it can be is known before the work.
            Processes.of(trainer).by_first(
                lambda: ScoreFile(path, *sizes, session.dtype, *kept, overwrite).abort()
            )
            return MemorySink(*sizes, session.dtype, *kept)
        return ScoreFile(path, *sizes, session.dtype, *kept, overwrite)


def score_runs(opened: OpenedRuns, sink: MemorySink) -> list[Provenance]:
    """Run the estimator on every run; each process has its share of the work, and all of the
    scores at the end."""
    runs = opened.runs
    parts: list[ScoreSink] = [sink]
    together = len(runs) > 1 and isinstance(opened.estimator, EnsembleEstimator)
    if sink.members is not None:
        each = len(runs) // len(sink.members)
        by_segment = sink.by_segment is not None
        parts = [
            MemberSink(sink, number // each, by_segment, each, together)
            for number in range(len(runs))
        ]
    combined: ScoreSink = sink
    if sink.by_timestep is not None:
        share = 0.0 if together else 1 / len(runs)
        combined = TimestepSink(sink, sink)
        parts = [TimestepSink(part, sink, share) for part in parts]
    if together:
        estimated = _score_together(opened, combined, parts)
    else:
        estimated = [
            _score_stages(opened, stages, part)
            if len(stages) > 1
            else _score(opened.estimator, stages[0].session, part)
            for stages, part in zip(runs, parts, strict=True)
        ]
    for matrix in (sink.values, sink.by_segment, sink.members, sink.by_timestep):
        if matrix is not None:
            matrix.copy_(opened.session.reduce(matrix))
    return estimated


def _score(estimator: Estimator, session: Session, sink: ScoreSink) -> Provenance:
    """Run the estimator on a run of one stage."""
    columns = session.num_train if session.edits is None else len(session.edits)
    with _taken_apart(session, sink, columns) as session.scores:
        estimated = estimator.score(session)
        session.finish_self_influence()
        if (terms := session.finished_terms()) is not None:
            session.scores.set_by_token(terms)
        _require_tokens(session, sink, estimator)
    if isinstance(session.edits, GraphEditSet):
        sink.set_direct(direct_terms(session))
    return estimated


def _score_stages(opened: OpenedRuns, stages: Sequence[Stage], sink: ScoreSink) -> Provenance:
    """Run the estimator on a run of several stages."""
    counts = opened.segment_counts(stages)
    assert isinstance(opened.estimator, StagedEstimator) and counts is not None
    last = stages[-1].session
    with _taken_apart(last, sink, stages[-1].columns.stop) as whole:
        for number, stage in enumerate(stages):
            stage.session.scores = StageSink(whole, sum(counts[:number]), stage.columns.start)
        estimated = opened.estimator.score_stages(stages)
        if (terms := _terms_of_stages(stages)) is not None:
            whole.set_by_token(terms)
        _require_tokens(last, sink, opened.estimator)
    return estimated


def _terms_of_stages(stages: Sequence[Stage]) -> Tensor | None:
    """Scores by token of all stages, [query, column, position]. A run of several stages has the
    same columns in each."""
    found = [(stage.columns, stage.session.finished_terms()) for stage in stages]
    known = [(columns, terms) for columns, terms in found if terms is not None]
    if not known:
        return None
    some = known[0][1]
    longest = max(terms.shape[2] for _, terms in known)
    total = some.new_zeros(len(some), stages[-1].columns.stop, longest)
    for columns, terms in known:
        total[:, columns.start : columns.stop, : terms.shape[2]] += terms
    return total


def _score_together(
    opened: OpenedRuns, sink: ScoreSink, parts: Sequence[ScoreSink]
) -> list[Provenance]:
    """Run an estimator on several runs that it puts together in its own way."""
    assert isinstance(opened.estimator, EnsembleEstimator)
    sessions = [stages[-1].session for stages in opened.runs]
    for session, part in zip(sessions, parts, strict=True):
        session.scores = part
    estimated = opened.estimator.score_ensemble(sessions, sink)
    for session in sessions:
        session.finish_self_influence()
    known = [terms for one in sessions if (terms := one.finished_terms()) is not None]
    if known:
        longest = max(terms.shape[2] for terms in known)
        padded = [F.pad(terms, (0, longest - terms.shape[2])) for terms in known]
        sink.set_by_token(torch.stack(padded).sum(0))
    _require_tokens(sessions[0], sink, opened.estimator)
    return estimated


@contextmanager
def _taken_apart(session: Session, sink: ScoreSink, columns: int) -> Iterator[ScoreSink]:
    """Where scores go that end in ``sink``; where queries are taken apart, those of their tokens
    too."""
    rows = session.rows
    if rows is None:
        yield sink
        return
    tokens = torch.zeros(rows.num_query, rows.length, columns, dtype=session.dtype)
    yield QueryTokenSink(sink, rows.query, rows.position, tokens)
    whole = session.reduce(tokens.to(session.device))
    sink.set_by_query_token(whole)


def _require_tokens(session: Session, sink: ScoreSink, estimator: Estimator) -> None:
    """Check that an estimator that is none of ours has scored the tokens that were asked for."""
    own = sink.sink if isinstance(sink, MemberSink) else sink
    if session.by_token and getattr(own, "by_token", None) is None:
        raise UnsupportedTrainingError(
            f"{type(estimator).__name__} does not score single tokens: it must call "
            "session.add_terms where session.by_token is set."
        )


def member_scores(sink: MemorySink) -> list[Sequence[Tensor]]:
    """For each member, tensors [query, train] whose sum is its scores."""
    if sink.members is not None:
        return [[own] for own in sink.members]
    return [[sink.values] if sink.by_segment is None else list(sink.by_segment)]
