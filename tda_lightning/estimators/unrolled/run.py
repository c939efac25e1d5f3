"""One attribution by exact unrolling: replays, ways back, and what they add up to."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tda_lightning.estimators.queries import rounds_of
from tda_lightning.estimators.unrolled.adjoint import OptimizerAdjoint
from tda_lightning.estimators.unrolled.back import BackwardWalk
from tda_lightning.estimators.unrolled.batch_statistics import (
    measurement_adjoints,
    moving_layers,
)
from tda_lightning.estimators.unrolled.certificate import Certificate
from tda_lightning.estimators.unrolled.forward import ForwardWalk, state_bytes
from tda_lightning.estimators.unrolled.moves import Move, least_budget, plan_moves
from tda_lightning.estimators.unrolled.refusals import require_exact
from tda_lightning.estimators.unrolled.unfinished import Unfinished
from tda_lightning.optimizers import remembers, rule_of
from tda_lightning.replay.run import Replay
from tda_lightning.runtime.processes import rank_and_world
from tda_lightning.session.passes import Pass, Plan, Session, memory_budget

if TYPE_CHECKING:
    from tda_lightning.estimators.unrolled.estimator import Unrolled

_NO_SELF = (
    "No self-influence: every training example would need an adjoint of its own. Ask for examples "
    "as queries."
)
_QUESTION = (
    "what this very run did with an example (exact derivative; each batch keeps its denominator)"
)
_UNLIMITED = 1 << 62


class UnrolledRun:
    """Everything that one attribution holds.

    Of the memory budget one half is for the adjoints of a round of queries, the other for the
    states of steps.
    """

    def __init__(self, options: Unrolled, context: Session) -> None:
        self.options, self.context = options, context
        self.trajectory = context.trajectory
        self.replay = Replay(self.trajectory, context.module, context.task, context.examples)
        with self.replay.as_trained():
            self.layers = moving_layers(context.module)
        require_exact(self.replay, context, options, self.layers)
        self.checkpoints = sorted(self.trajectory.checkpoints)
        self.first_row = max(0, self.trajectory.last_step - (options.last_steps or _UNLIMITED))
        # What a rehearsal replays is compared, because that takes time, and refused for nothing.
        tolerance = math.inf if False else options.tolerance
        self.certificate = Certificate(tolerance)
        self.forward = ForwardWalk(self.replay, self.layers, self.certificate, False)
        self.back: BackwardWalk | None = None
        self.by_token: Tensor | None = None
        self._rounds: list[tuple[int, int]] = []
        self._unfinished: list[Unfinished] = []
        self.made: dict[str, Any] = {}
        self.notes: list[str] = []
        self.budget = options.memory_budget or 2 * memory_budget()
        self.sizes = state_bytes(self.replay)
        self._require_budget()

    def plan(self) -> Plan:
        """The passes, and what a reader should know of how the scores are made."""
        last = self.trajectory.last_step
        self.made |= {
            "question": _QUESTION,
            "checkpoints": self.checkpoints,
            "segments": [[a, b] for a, b in self.segments],
            "replayed_steps": [self.first_row, last],
        }
        if self.context.self_influence:
            self.notes.append(_NO_SELF)
        if self.first_row:
            self.notes.append(
                f"Truncated: only what the last {last - self.first_row} of {last} steps did with "
                "an example is counted (last_steps)."
            )
        if self.options.relabel:
            self.made["relabel"] = {str(n): label for n, label in self.options.relabel.items()}
            self.notes.append(
                "Of the training examples "
                f"{', '.join(map(str, self.options.relabel))} the scores predict the effect of "
                "another label, not of removal."
            )
        passes: list[Pass] = []
        copies = 1 + 2 * len(rule_of(self.trajectory).states)
        each = copies * self._parameter_count() * self.context.dtype.itemsize
        self._rounds = list(rounds_of(self.context.num_query, each, self.budget // 2))
        for start, stop in self._rounds:
            room = max(self.budget // 2, self.budget - (stop - start) * each)
            passes += self._round(start, stop, room)
        passes[-1].end = _after(passes[-1].end, self._finish)
        return Plan(passes, self.made, self.notes)

    @property
    def segments(self) -> list[tuple[int, int]]:
        """The recorded intervals between checkpoints: scores are split by them."""
        return list(zip(self.checkpoints, self.checkpoints[1:], strict=False))

    def _restarts(self, row: int | None) -> list[tuple[int, int]]:
        """The stretches up to ``row`` (None: the end) between checkpoints from which a replay can
        start, those whose optimizer state was recorded; the last one first."""
        end = self.trajectory.last_step if row is None else row
        bounds = [step for step in self._restartable if step < end] + [end]
        pairs = zip(bounds, bounds[1:], strict=False)
        return [(a, b) for a, b in pairs if b > self.first_row][::-1]

    @functools.cached_property
    def _restartable(self) -> list[int]:
        """The checkpoints that hold all that training went on from."""
        if not remembers(self.trajectory):
            return self.checkpoints  # the weights are all there is
        found = self.trajectory.checkpoints
        return [step for step in self.checkpoints if step == 0 or found[step].optimizer is not None]

    def _round(self, start: int, stop: int, room: int) -> list[Pass]:
        """The passes for the queries ``start`` to ``stop``."""
        unfinished = Unfinished.of(self, start, stop)
        self._unfinished.append(unfinished)
        passes: list[Pass] = []
        for a, b in self._restarts(unfinished.row):
            first = max(a, self.first_row)
            moves = [Move("skip", a, first, (first,))] if first > a else []
            moves += plan_moves(first, b, self._room(b - first, room), *self.sizes)
            longest = max(m.stop - m.start for m in moves if m.kind == "keep")
            for move, held in zip(moves, self._held(moves), strict=True):
                passes.append(self._pass(move, a, longest))
                passes[-1].holds = held
            if a > self.first_row or len(self._rounds) > 1:
                keep = functools.partial(unfinished.keep, self, max(a, self.first_row))
                passes[-1].end = _after(passes[-1].end, keep)
        if not passes:  # an interrupted attribution had done this round
            nothing = Pass("taken up", self.trajectory.last_step, lambda *_: None, rows=())
            passes.append(nothing)
        begin = functools.partial(self._begin, unfinished, start, stop)
        passes[0].begin = _after(begin, passes[0].begin)
        leave = functools.partial(self._leave, stop == self.context.num_query)
        passes[-1].end = _after(passes[-1].end, leave)
        return passes

    def _held(self, moves: Sequence[Move]) -> Iterator[int]:
        """Bytes of main memory for states and standstills after each of the moves."""
        state, standstill = self.sizes
        standing: set[int] = set()
        for move in moves:
            standing |= set(move.cuts)
            if move.kind == "keep":
                standing.discard(move.start)
            kept = move.kind == "keep" and self.options.states != "disk"
            yield len(standing) * standstill + kept * (move.stop - move.start) * state

    def _room(self, steps: int, room: int) -> int:
        """Bytes that the states of a stretch of so many steps may take."""
        if self.options.states in ("memory", "disk"):
            return _UNLIMITED
        if self.options.states == "recompute":
            return max(
                least_budget(steps, *self.sizes),
                min(room, round(steps**0.5 + 1) * sum(self.sizes)),
            )
        return room

    def _pass(self, move: Move, a: int, longest: int) -> Pass:
        first, last = move.start + 1, move.stop
        title = {
            "skip": f"steps {first} to {last}, replayed",
            "keep": f"steps {first} to {last}, forwards",
            "back": f"steps {last} to {first}, backwards",
        }[move.kind]
        forward = self.forward

        def begin() -> None:
            # The module's weights are the walk's from now on, no checkpoint's.
            self.context.loaded.trajectory = None
            disk = self.options.states == "disk"
            if move.kind != "back":
                forward.begin(move, a, longest * self.sizes[0] if disk else None)

        def accumulate(_: Any, rows: Tensor, __: int) -> None:
            if self.back is None:
                return  # this process has no query of the round
            if move.kind == "back":
                self.back.step(forward.states.pop())
            else:
                forward.step(int(rows), move)

        step, back = self.trajectory.last_step, move.kind == "back"
        return Pass(title, step, accumulate, begin, rows=move.rows(), returns=back)

    # The queries of a round.

    def _begin(self, unfinished: Unfinished, start: int, stop: int) -> None:
        """Adjoints at the end of training, or where an interrupted attribution left them."""
        first, last = _share(start, stop)
        self.back = None
        if first == last:
            return
        found = unfinished.found
        if found is None:
            adjoint = OptimizerAdjoint(self.trajectory, self._measurement_gradients(first, last))
            statistics = self._measured_statistics(first, last)
        else:
            adjoint = OptimizerAdjoint(
                self.trajectory, self._on_device(_group(found, "a")), self._found_states(found)
            )
            statistics = self._on_device(_group(found, "c"))
        self.back = BackwardWalk(
            self.replay,
            self.context,
            self.layers,
            adjoint,
            statistics,
            self.segments,
            first,
            self.budget // 4,
            self.options.relabel or {},
            self.options.token_weights,
        )
        if found is not None:
            self.back.restore(found)
            self.certificate.restore(found)

    def tensors(self) -> dict[str, Tensor]:
        """The state of the round: what :meth:`_begin` takes up again."""
        assert self.back is not None
        adjoint = self.back.adjoint
        kinds: dict[str, dict[str, Tensor]] = {"a": adjoint.a, "c": self.back.statistics}
        for name, states in adjoint.states.items():
            for key, tensor in states.items():
                kinds.setdefault(f"states.{key}", {})[name] = tensor
        named = {f"{kind}.{name}": t for kind, own in kinds.items() for name, t in own.items()}
        return {**named, **self.back.tensors(), **self.certificate.tensors()}

    def _leave(self, last: bool) -> None:
        """The end of a round."""
        if self.back is not None:
            self.back.finish()
        if self.back is not None and self.back.by_token is not None:
            found = self.back.by_token
            if self.by_token is None:
                shape = (self.context.num_query, *found.shape[1:])
                self.by_token = found.new_zeros(shape)
            first = self.back.first_query
            self.by_token[first : first + len(found)] = found
        self.back = None
        self.forward.close()
        if last and self.options.token_weights:
            assert self.by_token is not None
            self.context.scores.set_by_token(self.context.reduce(self.by_token))

    def _finish(self) -> None:
        for unfinished in self._unfinished:
            unfinished.discard(self)
        self.made["certificate"] = self.certificate.record()
        self.notes.append(self.certificate.note())

    def _measurement_gradients(self, first: int, last: int) -> dict[str, Tensor]:
        """Gradients of the measurements at the last weights: [query, *shape] by parameter."""
        context = self.context
        context.load(self.trajectory.last_step)
        parts: dict[str, list[Tensor]] = {}
        for batch, examples in context.queries(first, last):
            found = context.measurement_gradients(batch, examples).blocks
            for block in context.blocks:
                for name, tensor in block.tensors(found[block.name].dense(slice(None))).items():
                    parts.setdefault(name, []).append(tensor.detach())
        return {name: torch.cat(tensors).to(context.dtype) for name, tensors in parts.items()}

    def _measured_statistics(self, first: int, last: int) -> dict[str, Tensor]:
        """Derivatives of the measurements with respect to running statistics: [query, features]."""
        if not self.layers:
            return {}
        context = self.context
        context.load(self.trajectory.last_step)

        def measure(query: int) -> Tensor:
            ((batch, examples),) = context.queries(first + query, first + query + 1)
            with torch.enable_grad():
                return context.measurement(context.module, batch, examples).sum()

        return measurement_adjoints(measure, self.layers, last - first)

    def _found_states(self, found: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        states: dict[str, dict[str, Tensor]] = {}
        for key in rule_of(self.trajectory).states:
            for name, tensor in self._on_device(_group(found, f"states.{key}")).items():
                states.setdefault(name, {})[key] = tensor
        return states

    def _on_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.context.device) for name, tensor in tensors.items()}

    def _parameter_count(self) -> int:
        shapes = [fact.shape for fact in self.trajectory.facts.parameters.values()]
        return sum(torch.Size(shape).numel() for shape in shapes)

    def _require_budget(self) -> None:
        states = 0
        if self.options.states in ("auto", "recompute"):
            longest = max(b - max(a, self.first_row) for a, b in self._restarts(None))
            states = least_budget(longest, *self.sizes)
        least = 2 * states
        if self.budget < least:
            raise ValueError(
                f"memory_budget is {self.budget} bytes, and replaying this run one step at a time "
                f"takes {least}. Give at least that, or states='disk'."
            )


def _share(start: int, stop: int) -> tuple[int, int]:
    """The part of the queries ``start`` to ``stop`` that is this process's; the first one, whose
    certificate is kept, has some."""
    rank, world = rank_and_world()
    # Rounded up, so that the first process, which writes down what was found, is never without.
    first, last = (-(-part * (stop - start) // world) for part in (rank, rank + 1))
    return start + first, start + last


def _group(found: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{kind}."): t for n, t in found.items() if n.startswith(f"{kind}.")}


def _after(one: Callable[[], None] | None, other: Callable[[], None] | None) -> Callable[[], None]:
    """Both, one after the other."""

    def both() -> None:
        for part in (one, other):
            if part is not None:
                part()

    return both
