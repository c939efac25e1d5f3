"""One stage of training, open to be walked forwards and back; most runs have a single one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from tda_lightning.estimators.unrolled.batch_statistics import moving_layers, statistics_names
from tda_lightning.estimators.unrolled.certificate import Certificate
from tda_lightning.estimators.unrolled.refusals import require_exact
from tda_lightning.estimators.unrolled.replayed import ForwardSweeps, state_bytes
from tda_lightning.estimators.unrolled.reverse import ReverseSweeps
from tda_lightning.estimators.unrolled.sweeps import Sweep, least_budget, plan_sweeps
from tda_lightning.optimizers import remembers, rule_of
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.replay.run import Replay
from tda_lightning.session.session import Session
from tda_lightning.session.stage import Stage

_UNLIMITED = 1 << 62


@dataclass
class StageRun:
    """A stage of training with its replay.

    Attributes:
        number: of the stage, from 0.
        first_row: of the steps whose effects count.
        states: where states between two checkpoints are kept (``Unrolled.states``).
        moving: layers whose running statistics move in the stage, by name.
        resting: layers that read running statistics which an earlier stage moved.
        taken_over: names of running statistics that the stage before left.
        sizes: bytes of the kept state of a step, and of a snapshot.
    """

    number: int
    stage: Stage
    replay: Replay
    first_row: int
    states: str
    moving: Mapping[str, _BatchNorm]
    resting: Mapping[str, _BatchNorm]
    taken_over: frozenset[str]
    certificate: Certificate
    forward: ForwardSweeps
    sizes: tuple[int, int]

    @staticmethod
    def opened(
        stages: Sequence[Stage], first_step: int, states: str, tolerance: float, by_position: bool
    ) -> list[StageRun]:
        """The stages in order of training.

        Args:
            first_step: whose effects count, of all stages together.
            tolerance: of the certificates.
            by_position: score the terms of an example's loss.

        Raises:
            UnsupportedTrainingError: one of them cannot be replayed or differentiated.
        """
        runs: list[StageRun] = []
        for number, stage in enumerate(stages):
            session = stage.session
            replay = Replay(session.trajectory, session.module, session.task, session.examples)
            with replay.as_trained():
                moving = moving_layers(session.module)
            require_exact(replay, session, moving, by_position)
            _require_known_start(session.trajectory)
            session.recorded_draws = True
            left = runs[-1] if runs else None
            taken_over = frozenset() if left is None else _taken_over(left, stage)
            certificate = Certificate(tolerance, session.require, (len(stages) > 1) * (number + 1))
            runs.append(
                StageRun(
                    number,
                    stage,
                    replay,
                    max(0, min(first_step - stage.first_step, session.trajectory.last_step)),
                    states,
                    moving,
                    _layers_of(session.module, taken_over - {*statistics_names(moving)}),
                    taken_over,
                    certificate,
                    ForwardSweeps(replay, moving, certificate),
                    state_bytes(replay),
                )
            )
        return runs

    @property
    def trajectory(self) -> Trajectory:
        """The recorded stage."""
        return self.replay.trajectory

    @property
    def counts_nothing(self) -> bool:
        """Whether all steps whose effects count are those of later stages."""
        return self.first_row == self.trajectory.last_step

    @property
    def layers(self) -> dict[str, _BatchNorm]:
        """All whose running statistics have an adjoint."""
        return {**self.moving, **self.resting}

    @property
    def checkpoints(self) -> list[int]:
        """Their steps, in order, counted from the stage's start."""
        return sorted(self.trajectory.checkpoints)

    @property
    def segments(self) -> list[tuple[int, int]]:
        """The rows that scores are split by."""
        return list(zip(self.checkpoints, self.checkpoints[1:], strict=False))

    @property
    def adjoint_bytes(self) -> int:
        """Bytes of the adjoints of one query."""
        named, dtype = dict(self.replay.module.named_parameters()), self.stage.session.dtype
        trained = sum(named[name].numel() for name in self.trajectory.facts.parameters)
        copies = 1 + 2 * len(rule_of(self.trajectory).states)
        frozen = sum(named[name].numel() for name in self.stage.frozen)
        return (copies * trained + frozen) * dtype.itemsize

    def stretches(self, end: int) -> list[tuple[int, int]]:
        """The stretches up to row ``end`` between the checkpoints from which a replay can start,
        the last one first."""
        bounds = [*(start for start in self.starts if start < end), end]
        pairs = zip(bounds, bounds[1:], strict=False)
        return [(start, stop) for start, stop in pairs if stop > self.first_row][::-1]

    @property
    def starts(self) -> list[int]:
        """The checkpoints that hold the optimizer's state, and all of them where the weights are
        all that training goes on from."""
        if not remembers(self.trajectory):
            return self.checkpoints
        held = self.trajectory.checkpoints
        return [s for s in self.checkpoints if s == 0 or held[s].optimizer is not None]

    @property
    def least_budget(self) -> int:
        """Bytes that the states take at least."""
        stretches = self.stretches(self.trajectory.last_step)
        if self.states not in ("auto", "recompute") or not stretches:
            return 0
        longest = max(stop - max(start, self.first_row) for start, stop in stretches)
        return 2 * least_budget(longest, *self.sizes)

    def sweep(self, reverse: ReverseSweeps, rows: tuple[int, int, int], room: int) -> None:
        """Go forwards and back through a stretch of steps.

        Args:
            rows: where a replay can start, and the first and the last row of the stretch.
            room: bytes for its states.
        """
        restart, start, stop = rows
        session, forward, sizes = self.stage.session, self.forward, self.sizes
        sweeps = [Sweep("advance", restart, start, (start,))] if start > restart else []
        sweeps += plan_sweeps(start, stop, self._room(stop - start, room), *sizes)
        longest = max(s.stop - s.start for s in sweeps if s.kind == "record")
        file_size = longest * sizes[0] if self.states == "disk" else None
        snapshots: set[int] = set()
        for sweep in sweeps:
            steps = sweep.stop - sweep.start
            if sweep.kind == "reverse":
                title = f"steps {sweep.stop} to {sweep.start + 1}, backwards"
                states = forward.last_state_first()
                memory = len(snapshots) * sizes[1]
                for state in session.loop(title, states, steps, memory):
                    reverse.step(state)
                continue
            snapshots |= set(sweep.cuts)
            memory = len(snapshots) * sizes[1]
            way = "replayed"
            if sweep.kind == "record":
                snapshots.discard(sweep.start)
                way = "forwards"
                memory = len(snapshots) * sizes[1] + (file_size is None) * steps * sizes[0]
            forward.begin(sweep, restart, file_size)
            title = f"steps {sweep.start + 1} to {sweep.stop}, {way}"
            for row in session.loop(title, sweep.rows(), memory=memory):
                forward.step(row, sweep)

    def _room(self, steps: int, room: int) -> int:
        """Bytes that the states of a stretch of so many steps may take."""
        if self.states in ("memory", "disk"):
            return _UNLIMITED
        if self.states == "recompute":
            few = round(math.sqrt(steps) + 1) * sum(self.sizes)
            return max(least_budget(steps, *self.sizes), min(room, few))
        return room


def one_stage(session: Session) -> Stage:
    """The one stage of a run that has no other."""
    return Stage(session, session, (), (), 0, range(session.num_train), 0)


def _taken_over(before: StageRun, stage: Stage) -> frozenset[str]:
    """Running statistics with which the stage begins as the one before it left them."""
    last = before.trajectory.checkpoints[before.trajectory.last_step].buffers
    first = stage.session.trajectory.checkpoints[0].buffers
    return frozenset(
        name
        for name in statistics_names(before.layers)
        if name in first
        and first[name].shape == last[name].shape
        and torch.equal(first[name], last[name].to(first[name].dtype))
    )


def _layers_of(module: torch.nn.Module, statistics: frozenset[str]) -> dict[str, _BatchNorm]:
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and statistics & {*statistics_names({name: part})}
    }


def _require_known_start(trajectory: Trajectory) -> None:
    """Refuse a stage that goes on with states of the optimizer which nobody recorded."""
    first = trajectory.checkpoints[0]
    if trajectory.steps_before and remembers(trajectory) and first.optimizer is None:
        raise UnsupportedTrainingError(
            "A stage goes on with the optimizer of the one before it, whose states were not "
            "recorded where it begins, so it cannot be replayed. Record with save_optimizer=True."
        )
