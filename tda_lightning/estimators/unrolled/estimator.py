"""Exact unrolling: differentiate the recorded run (Hara et al. 2019; Engstrom et al. 2025)."""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tda_lightning.estimators.unrolled.adjoints import Adjoints
from tda_lightning.estimators.unrolled.certificate import Certificate
from tda_lightning.estimators.unrolled.directions import Directions, directions_record
from tda_lightning.estimators.unrolled.narrowed import narrowed
from tda_lightning.estimators.unrolled.resume import UnfinishedRound, round_key
from tda_lightning.estimators.unrolled.reverse import ReverseSweeps
from tda_lightning.estimators.unrolled.round_scores import RoundScores
from tda_lightning.estimators.unrolled.stage_run import StageRun, one_stage
from tda_lightning.records.provenance import Provenance
from tda_lightning.runtime.digests import digest
from tda_lightning.runtime.free_memory import free_memory
from tda_lightning.runtime.processes import rank_and_world
from tda_lightning.runtime.setting_types import require_types
from tda_lightning.session.session import Session
from tda_lightning.session.stage import Stage

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

    Over several stages of training (a list of trajectories, or a run in which the trained
    parameters change) the adjoint goes on from the start of a stage into the one before, by way of
    what was handed over: weights, trained further or frozen, running statistics, and the states of
    an optimizer that went on.

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
            ``tda_lightning.optimizers``), mixed precision, unrecorded batches, ...
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

    def stage_segment_counts(self, stages: Sequence[Stage]) -> list[int]:
        """The same for each stage."""
        return [self.segment_count(stage.session) for stage in stages]

    def score(self, session: Session) -> Provenance:
        """Score a run of one stage; see :meth:`score_stages`."""
        return self.score_stages([one_stage(session)])

    def score_stages(self, stages: Sequence[Stage]) -> Provenance:
        """Replay every stretch of steps forwards and carry the queries back through it, the last
        stretch of the last stage first."""
        session = stages[-1].session
        by_position = self.token_weights or session.by_token
        last_step = stages[-1].first_step + session.trajectory.last_step
        first_step = 0 if self.last_steps is None else max(0, last_step - self.last_steps)
        settings = (first_step, self.states, self.tolerance, by_position)
        with narrowed(StageRun.opened(stages, *settings)) as (stages, rows):
            runs = StageRun.opened(stages, *settings)
            return self._scored(runs, rows, first_step, last_step, by_position)

    def _scored(
        self,
        runs: Sequence[StageRun],
        rows: Mapping[str, Tensor],
        first_step: int,
        last_step: int,
        by_position: bool,
    ) -> Provenance:
        """Score the effects of the steps after ``first_step`` of all stages.

        Args:
            rows: of wide embeddings, those that are there.
        """
        session = runs[-1].stage.session
        # One half is for the adjoints of a round of queries, the other for the states of steps.
        budget = self.memory_budget or free_memory() // 2
        self._require_budget(budget, max(run.least_budget for run in runs))
        query_bytes = max(run.adjoint_bytes for run in runs)
        rounds: list[UnfinishedRound] = []
        growths: list[Tensor] = []
        truncated: list[tuple[int, Directions | None]] = []
        with ExitStack() as files:
            for run in runs:
                files.callback(run.forward.close)
            for first, last in session.query_rounds(query_bytes, budget // 2):
                rounds.append(self._unfinished(runs, rows, first, last))
                queries = range(*_share(first, last))
                if not queries:
                    continue  # this process has no query of the round
                room = max(budget // 2, budget - (last - first) * query_bytes)
                whole = (first, last) == (0, session.num_query)
                reverse = self._go_back(
                    runs, queries, rounds[-1], (room, budget // 4), by_position, whole
                )
                growths.append(reverse.growth())
                truncated.append((queries.start, reverse.scores.directions))
                reverse.scores.finish_tokens()
        for unfinished in rounds:
            unfinished.discard()
        certificate = Certificate.of_all([run.certificate for run in runs])
        return {
            **directions_record(session, self.query_tolerance, truncated),
            "question": _QUESTION,
            "sizes": _SIZES,
            **_steps_of(runs),
            "replayed_steps": [first_step, last_step],
            "certificate": certificate.record(),
            "notes": [
                *self._notes([run.stage for run in runs], first_step, last_step),
                *_roughness(growths),
                certificate.note(),
            ],
        }

    def _go_back(
        self,
        runs: Sequence[StageRun],
        queries: range,
        unfinished: UnfinishedRound,
        rooms: tuple[int, int],
        by_position: bool,
        whole: bool,
    ) -> ReverseSweeps:
        """Carry queries back from the end of training, or from where an interrupted attribution
        left them, stage by stage; the last one that was walked.

        Args:
            rooms: bytes for states of steps, and for the graphs of batches on an accelerator.
            whole: these are all queries, so that nothing is left to resume at the very start.
        """
        tensors, number = unfinished.tensors, len(runs) - 1
        stages = [run.stage for run in runs]
        if tensors is None:
            last = runs[-1]
            gradients = Adjoints.measured(last.stage, last.layers, queries)
            scores, adjoints = RoundScores.begun(
                stages, queries.start, *gradients, self.query_tolerance
            )
        else:
            scores = RoundScores.restored(stages, queries.start, tensors)
            adjoints = Adjoints.restored(tensors, stages[0].session.device)
            number = int(tensors["stage"])
            for run in runs:
                run.certificate.restore(tensors)
        while True:
            run = runs[number]
            reverse = ReverseSweeps(
                number,
                run.stage,
                run.replay,
                run.moving,
                run.resting,
                adjoints,
                scores,
                room=rooms[1],
                by_position=by_position,
            )
            end = run.trajectory.last_step
            if tensors is not None:
                reverse.restore(tensors)
                end, tensors = int(tensors["row"]), None
            final = number == 0 or runs[number - 1].counts_nothing
            for restart, stop in run.stretches(end):
                start = max(restart, run.first_row)
                run.sweep(reverse, (restart, start, stop), rooms[0])
                if not (whole and final and restart <= run.first_row):
                    state = functools.partial(_state, reverse, runs)
                    unfinished.keep(start, state, last=start == run.first_row)
            reverse.finish()
            if final:
                return reverse
            number -= 1
            before = runs[number]
            adjoints = reverse.adjoints.handed_over(run.stage, run.taken_over)
            adjoints = adjoints.entered(before.stage, before.layers)

    def _require_budget(self, budget: int, least: int) -> None:
        if budget < least:
            raise ValueError(
                f"memory_budget is {budget} bytes, and replaying this run one step at a time "
                f"takes {least}. Give at least that, or states='disk'."
            )

    def _unfinished(
        self, runs: Sequence[StageRun], rows: Mapping[str, Tensor], first: int, last: int
    ) -> UnfinishedRound:
        """What an interrupted attribution left of a round of queries."""
        session = runs[-1].stage.session
        settings = asdict(self)
        # Neither how much memory there is nor where states are kept changes a score.
        for name in ("memory_budget", "states"):
            del settings[name]
        if rows:
            settings["rows"] = digest(dict(rows))
        key = None
        if session.num_processes == 1:
            key = round_key(settings, [run.stage for run in runs], first, last)
        return UnfinishedRound(session.trajectory.unfinished, key)

    def _notes(self, stages: Sequence[Stage], first: int, last: int) -> list[str]:
        notes = []
        if len(stages) > 1 or stages[0].session.self_influence:
            notes.append(_NO_SELF)
        if first:
            notes.append(
                f"Truncated: only what the last {last - first} of {last} steps did with "
                "an example is counted (last_steps)."
            )
        return notes


def _steps_of(runs: Sequence[StageRun]) -> Provenance:
    """The checkpoints and segments of all stages, in steps from the start of the first one."""
    return {
        "checkpoints": [0]
        + [run.stage.first_step + step for run in runs for step in run.checkpoints if step],
        "segments": [
            [run.stage.first_step + start, run.stage.first_step + stop]
            for run in runs
            for start, stop in run.segments
        ],
    }


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


def _state(reverse: ReverseSweeps, runs: Sequence[StageRun]) -> dict[str, Tensor]:
    """All that a round resumes from."""
    certificates = [run.certificate.tensors() for run in runs]
    return {**reverse.tensors(), **dict(ChainMap(*certificates))}
