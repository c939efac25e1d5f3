"""Runs a little of every pass of an attribution, with a clock, and keeps nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from tda_lightning.attribution.stand_ins import (
    Decompositions,
    KeptAside,
    ScoresForgotten,
    UnfinishedLeft,
    synchronize,
)
from tda_lightning.estimators import Estimator
from tda_lightning.records.plans import AttributionPlan, PassPlan
from tda_lightning.runtime import clock
from tda_lightning.runtime.loading import ExampleSource, PassLoader
from tda_lightning.runtime.memory import PeakMemory
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.session.passes import Context, Pass, Plan

# A kind of pass is timed over at least one full batch, then until one of these is reached.
_SECONDS, _BATCHES = 1.0, 12
_FEW = 4  # examples that stand for a whole pass where only its state is needed


@dataclass(frozen=True)
class _Rate:
    """A kind of pass: seconds for each example, and for the first batch beyond its examples."""

    per_example: float
    first: float


_NOTHING = _Rate(0.0, 0.0)  # of a pass without rows


@dataclass
class _Group:
    title: str
    count: int = 0
    batches: int = 0
    seconds: float = 0.0


@dataclass
class Rehearsal:
    """Rehearses one attribution.

    Every pass begins and ends as it will, with the same queries and the same shapes; of the
    training batches, or the steps of the run, only a few are visited. Passes that are alike (the
    same title but for numbers) share the time of their batches. Large decompositions have
    stand-ins (``stand_ins.py``).

    Attributes:
        estimator: whose passes.
        context: what it works with; its sink and what its trajectory keeps are exchanged.
        examples: the training set.
        placed: brings a batch to the device.
        memory: measures from before the context was made.
    """

    estimator: Estimator
    context: Context
    examples: ExampleSource
    placed: Callable[[Any], Any]
    memory: PeakMemory
    _rates: dict[Any, _Rate] = field(default_factory=dict)
    _ends: dict[Any, float] = field(default_factory=dict)
    _visited: list[int] = field(default_factory=list)

    def plan(self, began: float, finish: Callable[[], Any]) -> AttributionPlan:
        """Run it.

        Args:
            began: the clock when the preparation of the context began.
            finish: what follows the passes.
        """
        context, real = self.context, self.context.trajectory
        on_disk = real.path is not None
        curvature, features = (KeptAside(one, on_disk) for one in (real.curvature, real.features))
        self._kept = (curvature, features)
        context.trajectory = replace(
            real,
            curvature=curvature,
            features=features,
            unfinished=UnfinishedLeft(real.unfinished),
        )
        context.rehearsal = True
        self._algebra = Decompositions(self.memory)
        estimator = _invertible(self.estimator)
        segments = estimator.segment_count(context)
        columns = min(len(self.examples), self.examples.batch_size)
        sink = ScoresForgotten(context.num_query, columns, segments, context.dtype)
        context.sink = sink
        plan: Plan | None = estimator.plan(context)
        preparation = clock.now() - began
        groups: list[_Group] = []
        while plan is not None:
            groups += self._passes(plan)
            began = clock.now()
            plan = plan.rest()
            preparation += clock.now() - began
        preparation += self._timed(finish)
        matrices = 1 if segments is None else 1 + segments
        item = context.dtype.itemsize
        scores = matrices * context.num_query * context.num_train * item + sink.token_bytes
        peak = self.memory.bytes
        return AttributionPlan(
            estimator=type(self.estimator).__name__,
            num_train=context.num_train,
            num_query=context.num_query,
            preparation=preparation,
            passes=tuple(
                PassPlan(g.title, g.count, g.batches, g.seconds / g.count) for g in groups
            ),
            peak_bytes=None if peak is None else peak + scores,
            device_bytes=self.memory.device_bytes,
            scores_bytes=scores,
            curvature_bytes=curvature.size,
            features_bytes=features.size,
        )

    def _passes(self, plan: Plan) -> list[_Group]:
        batch, indices = next(iter(self.examples.loader([range(min(_FEW, len(self.examples)))])))
        self._few = self.placed(batch), indices.to(self.context.device)
        seen: Counter[str] = Counter()
        groups: dict[str, _Group] = {}
        with SlowProgress("Rehearsing", len(plan.passes)) as progress:
            for one in plan.passes:
                # The same title again is another round of queries; the first has extra work.
                seconds = self._pass(one, min(seen[one.title], 2))
                seen[one.title] += 1
                title = _without_numbers(one.title)
                group = groups.setdefault(title, _Group(title))
                group.count += 1
                group.batches += len(PassLoader(self.examples, one.order, one.rows))
                group.seconds += seconds
                progress.advance()
        return list(groups.values())

    def _pass(self, one: Pass, round_number: int) -> float:
        """Expected seconds of a pass."""
        # Segments of the recorded order differ in how far back they lie.
        kind = _without_numbers(one.title) if one.order is None else _without_steps(one.title)
        key = (kind, one.order is None, min(round_number, 1))
        if round_number == 2:
            return self._ends[one.title] + self._batches(one, self._rates.get(key, _NOTHING))
        around = self._timed(lambda: self.context.load(one.step))
        if one.begin is not None:
            around += self._timed(one.begin)
        if one.rows is not None:
            around += self._walk(one, key) if len(one.rows) else 0.0
        else:
            around += self._feed(one) if one.order is None else 0.0
            if key not in self._rates:
                self._rates[key] = self._time(one)
        if one.end is not None and not one.catches_up:
            around += self._timed(one.end)
        self._ends[one.title] = around
        return around + self._batches(one, self._rates.get(key, _NOTHING))

    def _batches(self, one: Pass, rate: _Rate) -> float:
        if one.rows is not None:
            count = len(one.rows)
        elif one.order is not None:
            count = sum(len(batch) for batch in one.order)
        else:
            count = len(self.examples)
        return rate.first + rate.per_example * count

    def _feed(self, one: Pass) -> float:
        """Give the pass a few examples, so that it can end.

        Returns:
            What the first batch takes longer than the others.
        """
        first, second = (self._timed(lambda: one.accumulate(*self._few, 0)) for _ in range(2))
        return max(0.0, first - second)

    def _walk(self, one: Pass, key: Any) -> float:
        """Visit the first rows of a kind of pass; on the way back, those that were visited last.

        Returns:
            What the first row takes longer than the others, once for all passes of the kind.
        """
        assert one.rows is not None
        rows = self._visited[::-1] if one.returns else list(one.rows[:_BATCHES])
        if len(rows) == 1:
            rows *= 2  # the first time takes longer
        self._visited = []
        first = 0.0
        if key not in self._rates:
            rate = self._time(replace(one, rows=rows))
            self._rates[key], first = replace(rate, first=0.0), rate.first
        unvisited = max(0, len(one.rows) - len(self._visited))
        self.memory.also(one.holds * unvisited // len(one.rows))
        return first

    def _time(self, one: Pass) -> _Rate:
        """Time the first batches, as the real pass loads them."""
        found: list[tuple[float, int]] = []
        total, began = 0.0, clock.now()
        for batch, indices, position in PassLoader(self.examples, one.order, one.rows):
            if one.rows is None:
                one.accumulate(self.placed(batch), self._on_device(indices), position)
            else:
                one.accumulate(None, indices, position)
                self._visited.append(int(indices))
            synchronize(self.context.device)
            ended = clock.now()
            found.append((ended - began, len(indices)))
            total += ended - began
            # The first batch of a recorded order carries what _feed finds out elsewhere.
            enough = len(found) > (one.order is not None or one.rows is not None)
            if enough and (total > _SECONDS or len(found) >= _BATCHES):
                break
            began = clock.now()
        if len(found) == 1:
            return _Rate(found[0][0] / found[0][1], 0.0)
        # The first one also starts the loader.
        rest = found[1:]
        rate = sum(seconds for seconds, _ in rest) / sum(count for _, count in rest)
        return _Rate(rate, max(0.0, found[0][0] - rate * found[0][1]))

    def _on_device(self, indices: Tensor) -> Tensor:
        return indices.to(self.context.device)

    def _timed(self, work: Callable[[], Any]) -> float:
        """Seconds of ``work`` without stand-ins."""
        owed = self._owed
        synchronize(self.context.device)
        began = clock.now()
        with self._algebra:
            work()
        synchronize(self.context.device)
        return clock.now() - began + self._owed - owed

    @property
    def _owed(self) -> float:
        """Seconds that stand-ins have saved so far."""
        return self._algebra.owed + sum(one.owed for one in self._kept)


def _invertible(estimator: Estimator) -> Estimator:
    """The estimator, or one with a little damping: curvature of a few batches is singular."""
    if not is_dataclass(estimator) or isinstance(estimator, type):
        return estimator
    zero = {
        setting.name: 1.0
        for setting in fields(estimator)
        if setting.name in ("damping", "relative_damping") and getattr(estimator, setting.name) == 0
    }
    return replace(estimator, **zero) if zero else estimator  # type: ignore[return-value]


def _without_numbers(title: str) -> str:
    return re.sub(r"\d+", "#", title)


def _without_steps(title: str) -> str:
    return re.sub(r"\b(steps? )\d+( to )?\d*", r"\1#", title)
