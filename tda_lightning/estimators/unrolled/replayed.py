"""Forward sweeps: the run replayed, compared with what was recorded, its states kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from tda_lightning.estimators.unrolled.batch_statistics import statistics_names
from tda_lightning.estimators.unrolled.certificate import Certificate
from tda_lightning.estimators.unrolled.step_states import (
    DiskRoom,
    StepState,
    keep_in_memory,
    room_of,
)
from tda_lightning.estimators.unrolled.sweeps import Sweep
from tda_lightning.optimizers import count_of, rule_of
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.replay.run import Draws, Replay, ReplaySnapshot, Walk

Layers = Mapping[str, _BatchNorm]


class ForwardSweeps:
    """Replays stretches of a run.

    Attributes:
        states: of the steps of the last ``record`` sweep, in order.
    """

    def __init__(self, replay: Replay, layers: Layers, certificate: Certificate) -> None:
        self.replay, self.certificate = replay, certificate
        self.states: list[StepState] = []
        self._counted = [
            _tracked(name)
            for name, layer in layers.items()
            if layer.num_batches_tracked is not None
        ]
        self._walk = _Walk(replay, self._counted)
        self._moving = statistics_names(layers)
        self._snapshots: dict[int, ReplaySnapshot] = {}
        self._disk: DiskRoom | None = None
        self._start: dict[str, Tensor] = {}
        self._steps = frozenset(replay.trajectory.checkpoints)
        self._compared: set[int] = set()
        self._earlier: tuple[int, Mapping[str, Tensor]] = (-1, {})

    def begin(self, sweep: Sweep, restart: int, room: int | None) -> None:
        """Go to the start of ``sweep``, in the stretch after checkpoint ``restart``.

        Args:
            room: bytes of a file for the states; None to keep them in memory.
        """
        self.states.clear()
        if room is not None and (self._disk is None or self._disk.size < room):
            self.close_file()
            self._disk = DiskRoom(room)
        if self._disk is not None:
            self._disk.clear()
        if sweep.start in self._snapshots:
            self._walk.resume_from(self._snapshots[sweep.start])
            if sweep.kind == "record":
                del self._snapshots[sweep.start]
        else:
            missing = RuntimeError(f"There is no snapshot before row {sweep.start}.")
            self.certificate.require(sweep.start == restart, missing)
            self._walk.restart(restart)
        names = dict(self.replay.module.named_buffers())
        self._start = {name: buffer.detach().clone() for name, buffer in names.items()}

    def step(self, row: int, sweep: Sweep) -> None:
        """Take the step after ``row``."""
        replay, recorded_loss = self.replay, self.replay.trajectory.steps.loss
        with replay.as_trained():
            before = self._before() if sweep.kind == "record" else None
            loss, draws = self._walk.step(row)
            self.certificate.compare_loss(row + 1, loss, float(recorded_loss[row]))
            if before is not None:
                self.states.append(self._state(row, before, loss, draws))
        if row + 1 in sweep.cuts:
            self._snapshots[row + 1] = self._walk.snapshot()
        if row + 1 in self._steps:
            self._compare(row + 1)
        if row + 1 == sweep.stop:
            self._require_known_buffers()

    def last_state_first(self) -> Iterator[StepState]:
        """The kept states, each forgotten as it is taken."""
        while self.states:
            yield self.states.pop()

    def close(self) -> None:
        """Forget everything that was kept."""
        self.states.clear()
        self._snapshots.clear()
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

    def _before(self) -> tuple[dict[str, Tensor], dict[str, set[str]]]:
        """Parameters, and the names of the optimizer's states."""
        keep = keep_in_memory if self._disk is None else self._disk.keep
        trained = self._walk.trained
        parameters = {name: keep(parameter) for name, parameter in trained.items()}
        return parameters, {name: {*self._walk.state_of(name)} for name in trained}

    def _state(
        self,
        row: int,
        before: tuple[dict[str, Tensor], dict[str, set[str]]],
        loss: float,
        draws: Sequence[Draws | None],
    ) -> StepState:
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

    def batches(self, row: int) -> Iterator[tuple[object, Tensor, Draws | None]]:
        self.counts = []
        for batch in super().batches(row):
            self.counts.append({name: keep_in_memory(n) for name, n in self._counters.items()})
            yield batch

    def on_gradients(self, row: int) -> None:
        # Clipping scales them in place.
        self.gradients = {
            name: p.grad.clone() if self._copies else p.grad
            for name, p in self.trained.items()
            if p.grad is not None
        }


def needs_gradients(replay: Replay) -> bool:
    """Whether reverse sweeps read the steps' gradients."""
    return bool(replay.clip) or rule_of(replay.trajectory).reads_gradient


def state_bytes(replay: Replay) -> tuple[int, int]:
    """Bytes of a step's kept state, and of a snapshot."""
    module, rule = replay.module, rule_of(replay.trajectory)
    trained = [module.get_parameter(name) for name in replay.trajectory.facts.parameters]
    weights = sum(room_of(parameter) for parameter in trained)
    state = weights * (1 + len(rule.reads) + needs_gradients(replay))
    everything = [*module.parameters(), *module.buffers()]
    snapshot = sum(tensor.nbytes for tensor in everything) + weights * len(rule.states)
    return state, snapshot


def _tracked(layer: str) -> str:
    return f"{layer}.num_batches_tracked".lstrip(".")
