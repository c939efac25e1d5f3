"""A run cut where its set of trained parameters changed or a further fit began, each part a run of
its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from tda_lightning.records.errors import TrajectoryFormatError, UnsupportedTrainingError
from tda_lightning.records.trajectory import Checkpoint, StageFact, Statistics, Trajectory


def cut_into_stages(trajectory: Trajectory) -> tuple[Trajectory, ...]:
    """The stages of ``trajectory`` in their order; itself alone when there is one.

    A part has the rows of its own steps, counts its checkpoints from its start (0 is the state
    there) and knows as parameters only what it trains; what is frozen is among the buffers.
    """
    facts = trajectory.facts
    if len(facts.stages) == 1:
        return (trajectory,)
    stops = [*(stage.start for stage in facts.stages[1:]), trajectory.last_step]
    for step in stops:
        if step not in trajectory.checkpoints:
            raise TrajectoryFormatError(
                f"The checkpoint at step {step} is missing: a stage begins there, and expected is "
                f"one at each such step, got checkpoints at {sorted(trajectory.checkpoints)}. "
                "Restore the file, or record again."
            )
    parts = []
    taken: dict[str, int] = {}
    for stage, stop in zip(facts.stages, stops, strict=True):
        if stage.new_optimizer:
            taken = {}
        parameters = {
            name: fact for name, fact in facts.parameters.items() if name in stage.parameters
        }
        own = replace(facts, parameters=parameters, stages=(StageFact(0, tuple(parameters)),))
        parts.append(
            replace(
                trajectory,
                facts=own,
                steps=trajectory.steps.between(stage.start, stop),
                checkpoints=StageCheckpoints(
                    trajectory.checkpoints, stage.start, stop, tuple(parameters)
                ),
                statistics=StageStatistics(trajectory.statistics, stage.start, stop),
                steps_before=dict(taken),
            )
        )
        for name in parameters:
            taken[name] = taken.get(name, 0) + stop - stage.start
    return tuple(parts)


def require_one_stage(trajectory: Trajectory) -> None:
    """Refuse a run that froze or unfroze parameters: its parts are runs of their own."""
    stages = trajectory.facts.stages
    if len(stages) > 1:
        raise UnsupportedTrainingError(
            f"The run has {len(stages)} stages (its trained parameters change after steps "
            f"{[stage.start for stage in stages[1:]]}), expected one. Attribute its parts, "
            "Trajectory.load(path).stages(), one by one."
        )


@dataclass(frozen=True, eq=False)
class StageCheckpoints(Mapping[int, Checkpoint]):
    """Checkpoints ``start`` to ``stop`` of a run, counted from ``start``, loaded when asked for."""

    run: Mapping[int, Checkpoint]
    start: int
    stop: int
    names: tuple[str, ...]  # of the parameters that the stage trains

    def __getitem__(self, step: int) -> Checkpoint:
        if not 0 <= step <= self.stop - self.start:
            raise KeyError(step)
        whole = self.run[self.start + step]
        frozen = {n: value for n, value in whole.parameters.items() if n not in self.names}
        optimizer = whole.optimizer
        return Checkpoint(
            step=step,
            parameters={name: whole.parameters[name] for name in self.names},
            buffers={**frozen, **whole.buffers},
            optimizer=None if optimizer is None else {n: optimizer.get(n, {}) for n in self.names},
            random=whole.random,
        )

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(s - self.start for s in self.run if self.start <= s <= self.stop))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True, eq=False)
class StageStatistics(Mapping[tuple[int, int], Statistics]):
    """Statistics of the intervals between ``start`` and ``stop``, counted from ``start``.

    Without any where no step of the stage was looked at, as in one shorter than
    ``curvature_every``.
    """

    run: Mapping[tuple[int, int], Statistics]
    start: int
    stop: int

    def __getitem__(self, interval: tuple[int, int]) -> Statistics:
        first, last = interval
        if not 0 <= first < last <= self.stop - self.start:
            raise KeyError(interval)
        return self.run[self.start + first, self.start + last]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._intervals)

    @cached_property
    def _intervals(self) -> list[tuple[int, int]]:
        inside = [at for at in self.run if self.start <= at[0] and at[1] <= self.stop]
        looked_at = any(float(b.examples) for at in inside for b in self.run[at].values())
        return [(a - self.start, b - self.start) for a, b in inside] if looked_at else []

    def __len__(self) -> int:
        return len(self._intervals)
