"""The way forwards: the run replayed, compared with its record, its states kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from tda_lightning.estimators.unrolled.batch_statistics import statistics_names
from tda_lightning.estimators.unrolled.certificate import Certificate, require_same_loss
from tda_lightning.estimators.unrolled.moves import Move
from tda_lightning.estimators.unrolled.tape import (
    DiskRoom,
    StepState,
    keep_in_memory,
    room_of,
)
from tda_lightning.optimizers import count_of, rule_of
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.replay.run import Draws, Replay, Standstill, Walk

Layers = Mapping[str, _BatchNorm]


class ForwardWalk:
    """Replays moves of a run.

    Attributes:
        states: of the steps of the last ``keep`` move, in order.
    """

    def __init__(
        self, replay: Replay, layers: Layers, certificate: Certificate, rehearsal: bool
    ) -> None:
        self.replay, self.certificate = replay, certificate
        self._rehearsal = rehearsal
        self.states: list[StepState] = []
        self._counted = [
            _tracked(n) for n, one in layers.items() if one.num_batches_tracked is not None
        ]
        self._walk = _Walk(replay, self._counted)
        self._moving = statistics_names(layers)
        self._standstills: dict[int, Standstill] = {}
        self._disk: DiskRoom | None = None
        self._start: dict[str, Tensor] = {}
        self._steps = frozenset(replay.trajectory.checkpoints)
        self._compared: set[int] = set()
        self._earlier: tuple[int, Mapping[str, Tensor]] = (-1, {})

    def begin(self, move: Move, restart: int, room: int | None) -> None:
        """Stand at the start of ``move``, in the stretch after checkpoint ``restart``.

        Args:
            room: bytes of a file for the states; None to keep them in memory.
        """
        self.states.clear()
        if room is not None and (self._disk is None or self._disk.size < room):
            self.close_file()
            self._disk = DiskRoom(room)
        if self._disk is not None:
            self._disk.clear()
        if move.start in self._standstills:
            where = self._standstills[move.start]
            self._walk.go_back(where)
            if move.kind == "keep":
                del self._standstills[move.start]
        else:
            assert move.start == restart or self._rehearsal
            self._walk.restart(restart)
        names = dict(self.replay.module.named_buffers())
        self._start = {name: buffer.detach().clone() for name, buffer in names.items()}

    def step(self, row: int, move: Move) -> None:
        """Take the step after ``row``."""
        replay, trajectory = self.replay, self.replay.trajectory
        keeping = move.kind == "keep"
        with replay.as_trained():
            before = self._before(row) if keeping else None
            loss, draws = self._walk.step(row)
            require_same_loss(
                row + 1, loss, float(trajectory.steps.loss[row]), self.certificate.tolerance
            )
            if before is not None:
                self.states.append(self._state(row, before, loss, draws))
        if row + 1 in move.cuts:
            self._standstills[row + 1] = self._walk.stand()
        if row + 1 in self._steps:
            self._compare(row + 1)
        if row + 1 == move.stop:
            self._require_known_buffers()

    def close(self) -> None:
        """Forget everything that was kept."""
        self.states.clear()
        self._standstills.clear()
        self.close_file()

    def close_file(self) -> None:
        """Remove the file of states, where there is one."""
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def _compare(self, step: int) -> None:
        """Compare the weights with the checkpoint after ``step``, unless that was done."""
        if step in self._compared:
            return
        earlier = max(other for other in self._steps if other < step)
        if self._earlier[0] != earlier:
            self._earlier = (earlier, self.replay.trajectory.checkpoints[earlier].parameters)
        recorded = self.replay.trajectory.checkpoints[step].parameters
        weights = dict(self.replay.module.named_parameters())
        self.certificate.compare(step, weights, recorded, self._earlier[1])
        self._compared.add(step)
        self._earlier = (step, recorded)

    def _before(self, row: int) -> tuple[dict[str, Tensor], dict[str, set[str]]]:
        """Parameters, and the names of the optimizer's states."""
        keep = keep_in_memory if self._disk is None else self._disk.keep
        trained = self._walk.trained
        parameters = {name: keep(parameter) for name, parameter in trained.items()}
        return parameters, {name: {*self._walk.state_of(name)} for name in trained}

    def _state(self, row: int, before: tuple, loss: float, draws: list) -> StepState:
        keep = keep_in_memory if self._disk is None else self._disk.keep
        parameters, held = before
        walk, rule = self._walk, rule_of(self.replay.trajectory)
        without = frozenset(name for name, p in walk.trained.items() if p.grad is None)
        gradient: dict[str, Tensor] = {}
        if needs_gradients(self.replay):
            gradient = {name: keep(g) for name, g in walk.gradients.items()}
        after = {name: walk.state_of(name) for name in walk.gradients}
        return StepState(
            row,
            parameters,
            tuple(walk.counts),
            loss,
            tuple(draws),
            gradient,
            without,
            {
                n: {key: keep(own[key]) for key in rule.reads if key in own}
                for n, own in after.items()
            },
            {name: count_of(own) for name, own in after.items()},
            {name: frozenset(own.keys() - held[name]) for name, own in after.items()},
        )

    def _require_known_buffers(self) -> None:
        """Refuse buffers that move by a rule that the derivative does not know."""
        for name, buffer in self.replay.module.named_buffers():
            known = name in self._moving or name in self._counted
            if not known and not torch.equal(buffer, self._start[name]):
                raise UnsupportedTrainingError(
                    f"The buffer {name} changes while the model trains, and exact unrolling "
                    "follows the running statistics of BatchNorm alone: what else the weights "
                    "leave in buffers would be missing from the derivative. Keep it out of the "
                    "module's buffers, or use Source(order='recorded')."
                )


class _Walk(Walk):
    """Holds on to the gradients of a step before they are clipped, and to what layers counted."""

    def __init__(self, replay: Replay, counted: Sequence[str]) -> None:
        super().__init__(replay)
        self.gradients: dict[str, Tensor] = {}
        self.counts: list[dict[str, Tensor]] = []  # before each batch of the step
        self._counters = {name: replay.module.get_buffer(name) for name in counted}
        self._copies = bool(replay.clip)

    def batches(self, row: int) -> Iterator[tuple[Any, Tensor, Draws | None]]:
        self.counts = []
        for one in super().batches(row):
            self.counts.append({name: keep_in_memory(n) for name, n in self._counters.items()})
            yield one

    def on_gradients(self, row: int) -> None:
        found = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        # Clipping scales them in place.
        self.gradients = {n: g.clone() if self._copies else g for n, g in found.items()}


def needs_gradients(replay: Replay) -> bool:
    """Whether the way back reads the steps' gradients."""
    return bool(replay.clip) or rule_of(replay.trajectory).reads_gradient


def state_bytes(replay: Replay) -> tuple[int, int]:
    """Bytes of a step's kept state, and of a standstill."""
    module, rule = replay.module, rule_of(replay.trajectory)
    trained = [module.get_parameter(name) for name in replay.trajectory.facts.parameters]
    weights = sum(room_of(parameter) for parameter in trained)
    state = weights * (1 + len(rule.reads) + needs_gradients(replay))
    everything = [*module.parameters(), *module.buffers()]
    standstill = sum(tensor.nbytes for tensor in everything) + weights * len(rule.states)
    return state, standstill


def _tracked(layer: str) -> str:
    return f"{layer}.num_batches_tracked".lstrip(".")
