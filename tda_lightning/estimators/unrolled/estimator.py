"""Exact unrolling: differentiate the recorded run (Hara et al. 2019; Engstrom et al. 2025)."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tda_lightning.edits import EditSet, GraphEditSet
from tda_lightning.estimators.unrolled.batch_statistics import moving_layers
from tda_lightning.estimators.unrolled.certificate import Certificate
from tda_lightning.estimators.unrolled.directions import PROBES, Directions
from tda_lightning.estimators.unrolled.refusals import require_exact
from tda_lightning.estimators.unrolled.replayed import ForwardSweeps, state_bytes
from tda_lightning.estimators.unrolled.resume import UnfinishedRound
from tda_lightning.estimators.unrolled.reverse import ReverseSweeps
from tda_lightning.estimators.unrolled.sweeps import Sweep, least_budget, plan_sweeps
from tda_lightning.optimizers import remembers, rule_of
from tda_lightning.records.provenance import Provenance
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.replay.run import Replay
from tda_lightning.runtime.digests import digest
from tda_lightning.runtime.memory import free_memory
from tda_lightning.runtime.processes import rank_and_world
from tda_lightning.runtime.setting_types import require_types
from tda_lightning.session.session import Session

STATES = ("auto", "memory", "disk", "recompute")
_NO_SELF = (
    "No self-influence: every training example would need an adjoint of its own. Ask for examples "
    "as queries."
)
# Median growth of the adjoint: 0.8 to 3.3 in smooth runs of an MLP on digits (SGD and AdamW at
# usual rates), 19 to 9,000 at too large a rate, with scores beyond what the measurement can do.
_ROUGH = 10.0
_SIZES = "predicted: the exact derivative of this run, where it is smooth (tda check)"
_QUESTION = (
    "what this very run did with an example (exact derivative; each batch keeps its denominator)"
)
_UNLIMITED = 1 << 62


@dataclass
class Unrolled:
    r"""The exact derivative of the recorded run: same seed and batches, l_n weighted by w_n.

    .. math::
        s_{qn} = -\frac{\partial m_q(\theta_T)}{\partial w_n}\Big|_{w = 1}

    The run is replayed from its checkpoints with the recorded batches, rates and random states.
    Each query's adjoint then runs backwards through the optimizer's steps, with the true Hessian of
    every step's loss. Nothing is approximated, but a derivative is local: in a rough run a small
    change of weights does not predict removal (``tda check`` tells). Batches keep their
    denominators; see :func:`~tda_lightning.evaluation.as_removal` for true removal. What a training
    step detaches counts as a constant, even if its value was computed from the weights.

    Every replay is compared with the recorded checkpoints (``provenance["certificate"]``).

    Attributes:
        last_steps: count only the effects of this many last steps, at a lower cost; None: all.
        token_weights: also score each term of an example's loss, such as the tokens of a sequence
            (``scores.by_token``).
        memory_budget: bytes for adjoints and states of steps; None: half of the free memory. The
            result does not depend on it.
        states: where states between two checkpoints are kept: in ``memory``, whatever they take;
            on ``disk``, in a temporary file; ``recompute``: a few in memory, the others by
            replaying again; ``auto``: as many in memory as fit, the others by replaying again.
        tolerance: how far a replay may miss a recorded checkpoint, relative to how far the weights
            moved since the checkpoint before.
        query_tolerance: how much of a query's gradient, relative to its length, may be left out so
            that fewer directions than queries go back through the run
            (``provenance["directions"]`` bounds what that does to scores). 0: nothing.

    Raises:
        ValueError: at once, for impossible settings; when scoring, for too small a budget.
        UnsupportedTrainingError: when scoring, for what has no formula: most optimizers (see
            ``tda_lightning.optimizers``), mixed precision, several stages, unrecorded batches, ...
        TrajectoryMismatchError: the replay misses the recorded checkpoints.

    References:
        | Data Cleansing for Models Trained with SGD (Hara et al., 2019), section 3
        | https://arxiv.org/abs/1906.08473
        | Optimizing ML Training with Metagradient Descent (Engstrom et al., 2025), section 2
        | https://arxiv.org/abs/2503.13751
        | MAGIC: Near-Optimal Data Attribution for Deep Learning (Ilyas & Engstrom, 2025)
        | https://arxiv.org/abs/2504.16430

    Example:
        Ten steps at rate 0.1 on least squares with curvature 2 and 1/2: a score is 3 g / 4 times
        (1 - 0.8^10) / 2 or (1 - 0.95^10) / (1/2), the sum of what is left of each step.

        >>> from tda_lightning.examples.least_squares import least_squares_scores
        >>> least_squares_scores(Unrolled())
        tensor([-0.6695,  0.6695, -0.6019,  0.6019])
    """

    last_steps: int | None = None
    token_weights: bool = False
    memory_budget: int | None = None
    states: str = "auto"
    tolerance: float = 1e-3
    query_tolerance: float = 0.0

    def __post_init__(self) -> None:
        require_types(self)
        if self.last_steps is not None and self.last_steps < 1:
            raise ValueError(f"last_steps must be at least 1 or None, got {self.last_steps}.")
        if self.memory_budget is not None and self.memory_budget < 1:
            raise ValueError(
                f"memory_budget must be a positive number of bytes, got {self.memory_budget}."
            )
        if self.states not in STATES:
            raise ValueError(f"states must be one of {', '.join(STATES)}, got {self.states!r}.")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must not be negative, got {self.tolerance}.")
        if not 0 <= self.query_tolerance < 1:
            raise ValueError(
                f"query_tolerance is a share of a gradient's length, from 0 to below 1, got "
                f"{self.query_tolerance}."
            )

    def segment_count(self, session: Session) -> int:
        """One segment for each recorded interval between checkpoints."""
        return len(session.trajectory.checkpoints) - 1

    def score(self, session: Session) -> Provenance:
        """Replay every stretch of steps forwards and carry the queries back through it, the last
        stretch first."""
        trajectory, last_step = session.trajectory, session.trajectory.last_step
        replay = Replay(trajectory, session.module, session.task, session.examples)
        with replay.as_trained():
            layers = moving_layers(session.module)
        by_position = self.token_weights or session.by_token
        require_exact(replay, session, layers, by_position)
        session.recorded_draws = True
        checkpoints = sorted(trajectory.checkpoints)
        segments = list(zip(checkpoints, checkpoints[1:], strict=False))
        first_row = 0 if self.last_steps is None else max(0, last_step - self.last_steps)
        # One half is for the adjoints of a round of queries, the other for the states of steps.
        budget = self.memory_budget or free_memory() // 2
        sizes = state_bytes(replay)
        starts = _restart_steps(trajectory)
        self._require_budget(budget, sizes, _stretches(starts, first_row, last_step), first_row)
        certificate = Certificate(self.tolerance, session.require)
        forward = ForwardSweeps(replay, layers, certificate)
        rounds: list[UnfinishedRound] = []
        by_token: Tensor | None = None
        growths: list[Tensor] = []
        truncated: list[Directions | None] = []
        query_bytes = _adjoint_bytes(session)
        with closing(forward):
            for first, last in session.query_rounds(query_bytes, budget // 2):
                unfinished = self._unfinished(session, first, last)
                rounds.append(unfinished)
                own_first, own_last = _share(first, last)
                reverse = None
                if own_first < own_last:
                    reverse = ReverseSweeps.open(
                        replay,
                        session,
                        layers,
                        segments,
                        range(own_first, own_last),
                        unfinished.tensors,
                        room=budget // 4,
                        by_position=by_position,
                        tolerance=self.query_tolerance,
                    )
                    if unfinished.tensors is not None:
                        certificate.restore(unfinished.tensors)
                room = max(budget // 2, budget - (last - first) * query_bytes)
                end = last_step if unfinished.row is None else unfinished.row
                for restart, stop in _stretches(starts, first_row, end):
                    if reverse is None:
                        continue  # this process has no query of the round
                    start = max(restart, first_row)
                    self._sweep(session, forward, reverse, (restart, start, stop), room, sizes)
                    if restart > first_row or (first, last) != (0, session.num_query):
                        state = functools.partial(_state, reverse, certificate)
                        unfinished.keep(start, state, last=start == first_row)
                if reverse is not None:
                    reverse.finish()
                    growths.append(reverse.growth())
                    truncated.append(reverse.directions)
                    by_token = reverse.add_tokens_to(by_token)
        if by_position:
            assert by_token is not None
            session.scores.set_by_token(session.reduce(by_token))
        for unfinished in rounds:
            unfinished.discard()
        directions = self._directions(session, truncated)
        return {
            **directions,
            "question": _QUESTION,
            "sizes": _SIZES,
            "checkpoints": checkpoints,
            "segments": [[start, stop] for start, stop in segments],
            "replayed_steps": [first_row, last_step],
            "certificate": certificate.record(),
            "notes": [
                *self._notes(session, first_row),
                *_roughness(growths),
                certificate.note(),
            ],
        }

    def _sweep(
        self,
        session: Session,
        forward: ForwardSweeps,
        reverse: ReverseSweeps,
        rows: tuple[int, int, int],
        room: int,
        sizes: tuple[int, int],
    ) -> None:
        """Go forwards and back through a stretch of steps.

        Args:
            rows: where a replay can start, and the first and the last row of the stretch.
            room: bytes for its states.
            sizes: of a state and of a snapshot.
        """
        restart, start, stop = rows
        sweeps = [Sweep("advance", restart, start, (start,))] if start > restart else []
        sweeps += plan_sweeps(start, stop, self._room(stop - start, room, sizes), *sizes)
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

    def _room(self, steps: int, room: int, sizes: tuple[int, int]) -> int:
        """Bytes that the states of a stretch of so many steps may take."""
        if self.states in ("memory", "disk"):
            return _UNLIMITED
        if self.states == "recompute":
            few = round(math.sqrt(steps) + 1) * sum(sizes)
            return max(least_budget(steps, *sizes), min(room, few))
        return room

    def _require_budget(
        self,
        budget: int,
        sizes: tuple[int, int],
        stretches: Sequence[tuple[int, int]],
        first_row: int,
    ) -> None:
        least = 0
        if self.states in ("auto", "recompute"):
            longest = max(stop - max(start, first_row) for start, stop in stretches)
            least = 2 * least_budget(longest, *sizes)
        if budget < least:
            raise ValueError(
                f"memory_budget is {budget} bytes, and replaying this run one step at a time "
                f"takes {least}. Give at least that, or states='disk'."
            )

    def _unfinished(self, session: Session, first: int, last: int) -> UnfinishedRound:
        """What an interrupted attribution left of a round of queries."""
        trajectory, facts = session.trajectory, session.trajectory.facts
        if session.num_processes > 1:
            return UnfinishedRound(trajectory.unfinished, None)
        settings, edits = asdict(self), session.edits
        # Neither how much memory there is nor where states are kept changes a score.
        for name in ("memory_budget", "states"):
            del settings[name]
        key = digest(
            {
                **({"by_token": True} if session.by_token else {}),
                **({} if session.rows is None else {"rows": session.rows.position}),
                "model and data": session.cache_key([trajectory.last_step]),
                "settings": json.dumps(settings, sort_keys=True, default=repr),
                "run": facts.settings.get("run_id"),
                "checkpoints": sorted(trajectory.checkpoints),
                "states": rule_of(trajectory).states,
                "steps": [trajectory.steps.examples, trajectory.steps.learning_rate],
                "edits": None if edits is None else _terms_digest(edits),
                **({} if session.asked is None else {"measurement": session.asked.settings()}),
                "queries": [first, last, *map(digest, session.queries(first, last))],
            }
        )
        return UnfinishedRound(trajectory.unfinished, key)

    def _directions(self, session: Session, rounds: Sequence[Directions | None]) -> Provenance:
        """How many directions went back, and what that did to the scores of these queries."""
        found = [own for own in rounds if own is not None]
        if not found:
            return {}
        typical, bound = (
            torch.cat(errors) for errors in zip(*(own.errors() for own in found), strict=True)
        )
        return {
            "directions": {
                "kept": sum(own.kept for own in found),
                "probes": PROBES * len(found),
                "queries": sum(len(own.mix) for own in found),
                "tolerance": self.query_tolerance,
                "relative_error": float(typical.median()),
                "error_bound": float(bound.max()),
            }
        }

    def _notes(self, session: Session, first_row: int) -> list[str]:
        notes, last = [], session.trajectory.last_step
        if session.self_influence:
            notes.append(_NO_SELF)
        if first_row:
            notes.append(
                f"Truncated: only what the last {last - first_row} of {last} steps did with "
                "an example is counted (last_steps)."
            )
        return notes


def _restart_steps(trajectory: Trajectory) -> list[int]:
    """The checkpoints from which a replay can start: those that hold the optimizer's state, and
    all of them where the weights are all that training goes on from."""
    checkpoints = trajectory.checkpoints
    if not remembers(trajectory):
        return sorted(checkpoints)
    return [s for s in sorted(checkpoints) if s == 0 or checkpoints[s].optimizer is not None]


def _stretches(starts: Sequence[int], first_row: int, end: int) -> list[tuple[int, int]]:
    """The stretches up to row ``end`` between ``starts``, the last one first."""
    bounds = [*(start for start in starts if start < end), end]
    pairs = zip(bounds, bounds[1:], strict=False)
    return [(start, stop) for start, stop in pairs if stop > first_row][::-1]


def _adjoint_bytes(session: Session) -> int:
    """Bytes of the adjoints of one query."""
    trajectory = session.trajectory
    shapes = [fact.shape for fact in trajectory.facts.parameters.values()]
    copies = 1 + 2 * len(rule_of(trajectory).states)
    return copies * sum(torch.Size(shape).numel() for shape in shapes) * session.dtype.itemsize


def _roughness(growths: Sequence[Tensor]) -> list[str]:
    """That small changes grow through the run, where they do: its derivative then says little of a
    removal."""
    growth = float(torch.cat([*growths, torch.zeros(0, dtype=torch.float64)]).nanmedian())
    if not growth > _ROUGH:
        return []
    return [
        f"This run is rough: small changes of the weights grow {growth:.3g} times through it (the "
        "median over queries), so its derivative may say little about a removal. Ask `tda check`."
    ]


def _share(start: int, stop: int) -> tuple[int, int]:
    """The part of the queries ``start`` to ``stop`` that is this process's; the first one, whose
    certificate is kept, has some."""
    rank, world = rank_and_world()
    # Rounded up, so that the first process, which writes the certificate, is never without.
    first, last = (-(-part * (stop - start) // world) for part in (rank, rank + 1))
    return start + first, start + last


def _state(reverse: ReverseSweeps, certificate: Certificate) -> dict[str, Tensor]:
    """All that a round resumes from."""
    return {**reverse.tensors(), **certificate.tensors()}


def _terms_digest(edits: EditSet | GraphEditSet) -> str:
    """Digest of what the edits put in place of what."""
    if isinstance(edits, GraphEditSet):
        return digest(edits.records())
    return digest(
        [
            [column, term.sign, term.index, term.example, list(term.labels)]
            for column, term in edits.terms
        ]
    )
