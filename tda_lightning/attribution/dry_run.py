"""How long and how large an attribution will be: its own code, run over a few batches of every
walk, with a clock."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from tda_lightning.attribution.dry_run_substitutes import (
    Decompositions,
    DiscardedScores,
    MeasuredCache,
    ReadOnlyCache,
    synchronize,
)
from tda_lightning.attribution.provenance import measured_queries
from tda_lightning.attribution.scoring import OpenedRuns
from tda_lightning.estimators import EnsembleEstimator, Estimator, StagedEstimator
from tda_lightning.records.plans import AttributionPlan, PassPlan
from tda_lightning.records.score_sinks import StageSink
from tda_lightning.runtime import clock
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.memory import PeakMemory
from tda_lightning.session.pace import Numbered, Pace, loaded_batches
from tda_lightning.session.stage import Stage

T = TypeVar("T")

# A kind of walk is timed over at least two batches, then until one of these is reached.
_SECONDS, _BATCHES = 1.0, 12
_FEW = 4  # examples that stand for a whole walk where only its state is needed


@dataclass(frozen=True)
class _Rate:
    """A kind of walk: seconds for each example, and for the first batch beyond its examples."""

    per_example: float
    first: float


@dataclass
class _Tally:
    """Walks or loops of one kind, so far."""

    count: float = 0.0
    batches: float = 0.0
    seconds: float = 0.0


class DryRun(Pace):
    """Visits a few batches of every walk and a few items of every loop, and counts the rest.

    Walks that are alike (the same title but for numbers) share the time of their batches. Of
    rounds of queries the second stands for all later ones. Large decompositions have stand-ins
    (``dry_run_substitutes.py``).

    Attributes:
        tallies: by title, with "#" for numbers.
        elsewhere: seconds outside of walks and loops.
    """

    def __init__(self, memory: PeakMemory) -> None:
        self.memory = memory
        self.decompositions = Decompositions(memory)
        self.stores: list[MeasuredCache] = []
        self.device = torch.device("cpu")
        self.tallies: dict[str, _Tally] = {}
        self.elsewhere = 0.0
        self._rates: dict[str, _Rate] = {}
        self._since = self._now()

    def walk(
        self, title: str, source: ExampleSource, module: nn.Module, batches: Sequence[Numbered]
    ) -> Iterator[tuple[int, Tensor, object]]:
        """The first batches of a new kind of walk; of a known kind, a few examples."""
        self._credit()
        tally = self._tally(title)
        examples = sum(len(indices) for _, indices in batches)
        in_order = [index for _, indices in batches for index in indices] == list(range(examples))
        # Segments of the recorded order differ in how far back they lie.
        kind = _without_numbers(title) if in_order else _without_steps(title)
        try:
            if kind not in self._rates:
                timed = yield from self._timed(source, module, batches)
                self._rates[kind] = _rate(timed)
            elif in_order and batches:
                few = [(0, list(batches[0][1])[:_FEW])]
                yield from loaded_batches(source, module, few)
        finally:
            rate = self._rates.get(kind, _Rate(0.0, 0.0))
            tally.count += 1
            tally.batches += len(batches)
            tally.seconds += rate.first + rate.per_example * examples
            self._since = self._now()

    def _timed(
        self, source: ExampleSource, module: nn.Module, batches: Sequence[Numbered]
    ) -> Generator[tuple[int, Tensor, object], None, list[tuple[float, int]]]:
        """Yield the first batches; returns (seconds, examples) of each."""
        timed: list[tuple[float, int]] = []
        began = self._now()
        for loaded in loaded_batches(source, module, batches):
            yield loaded
            ended = self._now()
            timed.append((ended - began, len(loaded[1])))
            total = sum(seconds for seconds, _ in timed)
            if len(timed) > 1 and (total > _SECONDS or len(timed) >= _BATCHES):
                break
            began = self._now()
        return timed

    def loop(self, title: str, items: Iterable[T], total: int | None, memory: int) -> Iterator[T]:
        """The first item, then a few that stand for all others."""
        if total is None:
            items = list(items)
            total = len(items)
        tally = self._tally(title)
        self._credit()
        elsewhere = self.elsewhere
        visited, began = 0, self._now()
        remaining = iter(items)
        try:
            for item in remaining:
                visited += 1
                yield item
                self._credit()
                break
            with self._repeated(lambda: (total - 1) / max(1, visited - 1)):
                for item in remaining:
                    visited += 1
                    yield item
                    self._credit()
                    if visited > _BATCHES or self._now() - began > _SECONDS:
                        break
        finally:
            self._credit()
            tally.count += 1
            tally.batches += total
            tally.seconds += self.elsewhere - elsewhere
            self.elsewhere = elsewhere
            if total:
                self.memory.also(memory * (total - visited) // total)

    def rounds(self, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The first round, and the second for all others."""
        yield from ranges[:1]
        self._credit()
        with self._repeated(lambda: len(ranges) - 1):
            yield from ranges[1:2]
            self._credit()

    def refuse(self, error: Exception) -> None:
        """Nothing: a few batches tell nothing of the whole."""

    def finish(self) -> None:
        """Count what has passed since the last walk."""
        self._credit()

    def _tally(self, title: str) -> _Tally:
        return self.tallies.setdefault(_without_numbers(title), _Tally())

    @contextmanager
    def _repeated(self, times: Callable[[], float]) -> Iterator[None]:
        """What is counted within happens so many times."""
        before = {title: replace(tally) for title, tally in self.tallies.items()}
        elsewhere = self.elsewhere
        try:
            yield
        finally:
            factor = times()
            self.elsewhere = elsewhere + factor * (self.elsewhere - elsewhere)
            for title, tally in self.tallies.items():
                start = before.get(title, _Tally())
                tally.count = start.count + factor * (tally.count - start.count)
                tally.batches = start.batches + factor * (tally.batches - start.batches)
                tally.seconds = start.seconds + factor * (tally.seconds - start.seconds)

    def _credit(self) -> None:
        now = self._now()
        self.elsewhere += now - self._since
        self._since = now

    def _now(self) -> float:
        """Seconds, with what stand-ins have saved."""
        synchronize(self.device)
        owed = self.decompositions.owed + sum(store.owed for store in self.stores)
        return clock.now() + owed


def dry_run(
    estimator: Estimator, stages: Sequence[Stage], pace: DryRun, in_ensemble: bool = False
) -> AttributionPlan:
    """Score in a dry run.

    Args:
        stages: of training, one or several; nothing that they find is kept, in memory or on disk.
        pace: whose clock has been running since they were opened.
        in_ensemble: as a member of an ensemble, which may take more.
    """
    session, kept = stages[-1].session, [_measured(stage, pace) for stage in stages]
    pace.stores, pace.device = [store for pair in kept for store in pair], session.device
    estimator = _invertible(estimator)
    counts = OpenedRuns(estimator, [stages], 1).segment_counts(stages)
    segments = None if counts is None else sum(counts)
    columns = min(max(stage.session.num_train for stage in stages), session.batch_size)
    sink = DiscardedScores(session.num_query, columns, segments, session.dtype)
    with pace.decompositions:
        if in_ensemble and isinstance(estimator, EnsembleEstimator):
            session.scores = sink
            estimator.score_ensemble([session], sink)
        elif len(stages) == 1:
            session.scores = sink
            estimator.score(session)
        else:
            assert isinstance(estimator, StagedEstimator) and counts is not None
            for number, stage in enumerate(stages):
                stage.session.scores = StageSink(sink, sum(counts[:number]), 0)
            estimator.score_stages(stages)
    measured_queries(session)
    terms = [stage.session.finished_terms() for stage in stages]
    pace.finish()
    matrices = 1 if segments is None else 1 + segments
    num_train = stages[-1].columns.stop
    size = matrices * session.num_query * num_train * session.dtype.itemsize
    size += sum(own.numel() * own.element_size() for own in terms if own is not None)
    peak = pace.memory.bytes
    return AttributionPlan(
        estimator=type(estimator).__name__,
        num_train=num_train,
        num_query=session.num_query,
        preparation=pace.elsewhere,
        passes=tuple(
            PassPlan(title, round(t.count), round(t.batches), t.seconds / t.count)
            for title, t in pace.tallies.items()
        ),
        peak_bytes=None if peak is None else peak + size,
        device_bytes=pace.memory.device_bytes,
        scores_bytes=size,
        curvature_bytes=sum(curvature.size for curvature, _ in kept),
        features_bytes=sum(features.size for _, features in kept),
        checks=sum(stage.session.check_seconds for stage in stages),
    )


def _measured(stage: Stage, pace: DryRun) -> tuple[MeasuredCache, MeasuredCache]:
    """Let a stage keep nothing, and be timed; what it would keep as curvature and as features."""
    real = stage.session.trajectory
    on_disk = real.path is not None
    curvature = MeasuredCache(real.curvature, on_disk)
    features = MeasuredCache(real.features, on_disk)
    trajectory = replace(
        real, curvature=curvature, features=features, unfinished=ReadOnlyCache(real.unfinished)
    )
    for session in (stage.session, stage.wide):
        session.trajectory, session.pace = trajectory, pace
    return curvature, features


def _rate(timed: Sequence[tuple[float, int]]) -> _Rate:
    if not timed:
        return _Rate(0.0, 0.0)
    seconds, count = timed[0]
    if len(timed) == 1:
        return _Rate(seconds / count, 0.0)
    # The first batch also starts the loader.
    rest = timed[1:]
    rate = sum(duration for duration, _ in rest) / sum(examples for _, examples in rest)
    return _Rate(rate, max(0.0, seconds - rate * count))


def _invertible(estimator: Estimator) -> Estimator:
    """The estimator, or one with a little damping: curvature of a few batches is singular."""
    if not is_dataclass(estimator) or isinstance(estimator, type):
        return estimator
    undamped = {
        setting.name: 1.0
        for setting in fields(estimator)
        if setting.name in ("damping", "relative_damping") and getattr(estimator, setting.name) == 0
    }
    return replace(estimator, **undamped) if undamped else estimator  # type: ignore[return-value]


def _without_numbers(title: str) -> str:
    # Stages of training differ in their models and data.
    return re.sub(r"(?<!stage )(?<!\d)\d+", "#", title)


def _without_steps(title: str) -> str:
    return re.sub(r"\b(steps? )\d+( to )?\d*", r"\1#", title)
