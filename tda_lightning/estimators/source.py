"""SOURCE: approximate unrolled differentiation (Bae et al. 2024, 2405.12186)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tda_lightning.curvature import (
    check_dense_side,
    check_kind,
    check_statistics,
    uses_statistics,
)
from tda_lightning.estimators.about import about_statistics
from tda_lightning.estimators.averaged import AveragedRun
from tda_lightning.estimators.clipping import clipping_notes
from tda_lightning.estimators.recorded import RecordedRun
from tda_lightning.estimators.recorded_adam import RecordedAdamRun
from tda_lightning.estimators.staged import plan_stages, segment_counts
from tda_lightning.passes import Context, Plan, Stage
from tda_lightning.trajectory import Segment

ORDERS = ("average", "recorded")
MOMENTUM = ("effective_rate", "recursion")
_LEADING = 64
_FEWEST = 8  # not worth their passes below
_LEADING_SCALARS = 1 << 28  # each direction is kept in two bases
_SMALL = 1000  # a convention, not measured: the paper's form where `exact` is at hand
_QUESTIONS = {
    "average": "what training like this one does with an example (order of batches averaged out)",
    "recorded": "what this very run did with an example (batches in their recorded order)",
}


@dataclass
class Source:
    r"""Follow a removed example's effect through training, segment by segment.

    With curvature :math:`H_\ell` and gradients :math:`g_{\ell n}` averaged over a segment's
    checkpoints, and :math:`\tau_\ell` the sum of its applied learning rates,

    .. math::
        s_{qn} = \frac1N \sum_\ell \nabla m_q(\theta_T)^\top S_L \cdots S_{\ell+1}\,
        (I - e^{-\tau_\ell H_\ell}) H_\ell^{-1} g_{\ell n},
        \qquad S_\ell = e^{-\tau_\ell H_\ell}

    SGD's momentum, dampening and weight decay, and the preconditioner of Adam and AdamW, enter
    through each segment's geometry. No damping is needed.

    Over several trajectories (pre-training, then fine-tuning) every stage keeps its own N, loss,
    gradients and curvature, and is cut into segments by itself; the queries are the last model's.

    Attributes:
        num_segments: cut the run into this many segments of equal length.
        segment_steps: or at these steps; over several trajectories, a list of them for each.
        curvature: ``exact``, ``ekfac``, ``kfac``, ``diagonal`` or ``identity``.
        order: ``average``, the paper's: every example is used evenly within a segment; it answers
            what training like this does. ``recorded``: the recorded batches in their order; it
            answers what this run did, and follows exact unrolling closely.
        momentum: SGD in ``order="average"``: ``effective_rate`` multiplies the rate by
            (1 - dampening) / (1 - momentum); ``recursion`` follows the momentum buffer step by
            step, which matters in runs of few steps. The recorded order always does.
        leading_directions: so many leading eigenvectors of the whole curvature, across layers,
            are kept exactly in front of a block-wise ``curvature`` (``curvature/leading.py``).
            0: blocks alone, the paper's form. None: 64, fewer where they would take more than
            2 GiB; 0 in ``order="average"`` for models of under 1,000 parameters, for which
            ``exact`` costs little, and where curvature was recorded in training.
        statistics: ``recorded``: curvature from the statistics that
            ``TrajectoryRecorder(curvature="online")`` gathered, without a pass over the data.
            ``corrected``: one pass for EK-FAC's eigenvalues in their basis. ``fitted``: curvature
            fitted at the checkpoints. ``auto``: recorded where the run has any and ``curvature``
            is ``ekfac`` or ``kfac``, else fitted. Each segment needs some.
        dense_side: the widest side of a layer (its inputs or outputs) whose covariance ``ekfac``
            and ``kfac`` hold as a dense matrix of that width; of a wider one they hold the
            leading 256 directions and the diagonal. None: 4096; with Adam, 1024 (the time to
            turn every example's h * g grows with it).
        seed: of the sampled labels.

    Raises:
        ValueError: at once for impossible settings; when planning, for a segment without a
            checkpoint, or without the statistics that it is to use.
        UnsupportedTrainingError: the optimizer has no formula.

    References:
        | Training Data Attribution via Approximate Unrolling (Bae et al., 2024), section 3
        | https://arxiv.org/abs/2405.12186
        | The recorded order is our own: METHODS.md, "SOURCE on the recorded order".
    """

    num_segments: int = 3
    segment_steps: Sequence[int] | Sequence[Sequence[int]] | None = None
    curvature: str = "ekfac"
    order: str = "average"
    momentum: str = "effective_rate"
    leading_directions: int | None = None
    statistics: str = "auto"
    dense_side: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_kind(self.curvature)
        check_statistics(self.statistics, self.curvature)
        check_dense_side(self.dense_side)
        for name, value, known in (
            ("order", self.order, ORDERS),
            ("momentum", self.momentum, MOMENTUM),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        if self.leading_directions is not None and (
            self.leading_directions < 0 or (self.leading_directions and not self._blockwise)
        ):
            raise ValueError(
                "leading_directions must not be negative, and goes with a block-wise curvature "
                f"(ekfac, kfac, diagonal); got {self.leading_directions} with {self.curvature}."
            )
        if self.segment_steps is None and self.num_segments < 1:
            raise ValueError(f"num_segments must be at least 1, got {self.num_segments}.")

    @property
    def _blockwise(self) -> bool:
        return self.curvature in ("ekfac", "kfac", "diagonal")

    def leading(self, context: Context) -> int:
        """How many leading directions are kept for the model at hand."""
        size = sum(block.size for block in context.blocks)
        if self.leading_directions is not None:
            return min(self.leading_directions, size)
        if not self._blockwise or (self.order == "average" and size < _SMALL):
            return 0
        if uses_statistics(self.statistics, self.curvature, context.trajectory):
            return 0  # their passes are what recording was to save
        room = _LEADING_SCALARS // (size * self.segment_count(context))
        return min(_LEADING, room) if room >= _FEWEST else 0

    def cuts(self) -> int | list[int]:
        """How the run is cut: a number of segments, or explicit steps."""
        if self.segment_steps is None:
            return self.num_segments
        if not all(isinstance(step, int) for step in self.segment_steps):
            raise ValueError(
                f"segment_steps must hold the steps of one trajectory, got {self.segment_steps}."
            )
        return list(self.segment_steps)  # type: ignore[arg-type]

    def segment_count(self, context: Context) -> int:
        """How many segments the scores are split by."""
        return len(context.trajectory.segments(self.cuts()))

    def plan(self, context: Context) -> Plan:
        """Fit each segment's curvature, then score its checkpoints or steps, last segment first."""
        adam = context.trajectory.require_optimizer() != "SGD"
        run: AveragedRun | RecordedRun | RecordedAdamRun
        if self.order == "average":
            run = AveragedRun(self, context)
        elif adam:
            run = RecordedAdamRun(self, context)
        else:
            run = RecordedRun(self, context)
        provenance: dict[str, Any] = {
            "segments": [[s.start, s.stop] for s in run.segments],
            "checkpoints": [list(s.checkpoints) for s in run.segments],
            "question": _QUESTIONS[self.order],
            "leading_directions": self.leading(context),
        }
        spans = [(segment.start, segment.stop) for segment in run.segments]
        provenance |= about_statistics(self.statistics, self.curvature, context.trajectory, spans)
        # The recorded order of Adam takes every group's own rate at every step.
        follows = isinstance(run, RecordedAdamRun)
        notes = clipping_notes(context.trajectory)
        if not follows:
            notes += self.notes_on_rates(context, run.segments)
        if follows and context.self_influence:
            notes.append(
                "No self-influence: on the recorded order of Adam every example needs an adjoint "
                "of its own. Ask for examples as queries, or use order='average'."
            )
        return Plan(run.passes(), provenance, notes)

    def stage_segment_counts(self, stages: Sequence[Stage]) -> list[int]:
        """How many segments the scores of each stage are split by."""
        return segment_counts(self, stages)

    def plan_stages(self, stages: Sequence[Stage]) -> Plan:
        """:meth:`plan` over several stages of training, last stage first."""
        plan = plan_stages(self, stages)
        plan.provenance["question"] = _QUESTIONS[self.order]
        return plan

    def notes_on_rates(self, context: Context, segments: Sequence[Segment]) -> list[str]:
        """Name the segments over which a changing ratio of rates is averaged (geometry.py)."""
        facts = context.trajectory.facts.parameters
        groups = sorted({facts[name].group for name in context.engine.names})
        folded = []
        for number, segment in enumerate(segments, start=1):
            rates = context.trajectory.applied_rates(segment.rows)[:, groups]
            times = rates.sum(0)
            # Rates in a fixed ratio are, step by step, the same part of each group's sum.
            differences = (rates * times.max() - rates[:, [int(times.argmax())]] * times).abs()
            if bool((differences > 1e-6 * (rates.max() * times.max())).any()):
                folded.append(str(number))
        if not folded:
            return []
        return [
            "The learning rates of the parameter groups change their ratio within segment "
            f"{', '.join(folded)}: the ratio of their sums over the segment is used throughout. "
            "More segments, or cuts (segment_steps) where a schedule changes, follow it closer."
        ]
