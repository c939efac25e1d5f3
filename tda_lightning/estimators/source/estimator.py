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
from tda_lightning.estimators.clipping import clipping_notes
from tda_lightning.estimators.source.averaged import AveragedRun
from tda_lightning.estimators.source.matrix_free import MatrixFreeRun
from tda_lightning.estimators.source.recorded import RecordedRun
from tda_lightning.estimators.source.recorded_adam import RecordedAdamRun
from tda_lightning.estimators.source.staged import plan_stages, segment_counts
from tda_lightning.optimizers import applied_rates, rule_of
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.provenance import Provenance
from tda_lightning.records.trajectory import Segment
from tda_lightning.session.passes import Plan, Session, Stage, run_plan
from tda_lightning.solvers.problem import check_limits

ORDERS = ("average", "recorded")
MOMENTUM = ("effective_rate", "recursion")
MATRIX_FREE = "matrix_free"
BLOCKS = ("layer", "full")
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

    SGD's momentum, dampening and weight decay, and the preconditioner of other optimizers, enter
    through each segment's metric. No damping is needed.

    With several trajectories (pre-training, then fine-tuning) every stage keeps its own N, loss,
    gradients and curvature, and is cut into segments of its own. Queries belong to the last model.

    Attributes:
        num_segments: cut the run into this many segments of equal length.
        segment_steps: or cut at these steps; with several trajectories, one list per trajectory.
        curvature: ``exact``, ``ekfac``, ``kfac``, ``diagonal`` or ``identity``; or
            ``matrix_free``: the exact Gauss-Newton matrix through products, without forming it
            (``estimators/source/matrix_functions.py``), for ``order="average"`` and
            ``momentum="effective_rate"`` in one stage of training.
        order: ``average``, as in the paper: examples count as used evenly within a segment; this
            answers what training like this run does. ``recorded``: batches in their recorded
            order; this answers what this run did, and comes close to exact unrolling.
        momentum: for SGD and ``order="average"``: ``effective_rate`` multiplies the rate by
            (1 - dampening) / (1 - momentum); ``recursion`` follows the momentum buffer step by
            step, which matters in short runs. The recorded order always follows it.
        leading_directions: number of leading eigenvectors of the whole curvature, across layers,
            kept exactly in front of a block-wise ``curvature`` (``curvature/leading.py``). 0:
            blocks alone, as in the paper. None: 64, or fewer if they would take more than 2 GiB;
            but 0 if curvature was recorded during training, and in ``order="average"`` for models
            of under 1,000 parameters, for which ``exact`` costs little.
        statistics: ``recorded``: use the statistics that
            ``TrajectoryRecorder(curvature="online")`` gathered in every segment, without a pass
            over the data. ``corrected``: the same, with EK-FAC's eigenvalues measured in their
            basis by one pass. ``fitted``: fit curvature at the checkpoints. ``auto``: recorded if
            the run has any and ``curvature`` is ``ekfac`` or ``kfac``, else fitted.
        dense_side: the widest side of a layer (its inputs or outputs) whose covariance ``ekfac``
            and ``kfac`` hold as a dense matrix. Of a wider side they hold the leading 256
            directions and the diagonal. None: 4096; with a preconditioner 1024, because rotating
            every example's h * g takes time in proportion.
        seed: for sampled labels.
        blocks: for ``matrix_free``: ``full``, all parameters together, as in ``exact``; or
            ``layer``: each layer's own block, without the coupling between layers. None: full.
        tolerance: for ``matrix_free``: the allowed error of a segment's two functions of the
            matrix, relative to their length.
        max_products: for ``matrix_free``: the largest number of products per query and segment,
            each a walk over the training set at every checkpoint of the segment. A query holds as
            many vectors in memory.

    Raises:
        ValueError: at once, for impossible settings; when scoring, for a segment without a
            checkpoint, or without the statistics that it needs.
        UnsupportedTrainingError: the optimizer has no formula.

    References:
        | Training Data Attribution via Approximate Unrolling (Bae et al., 2024), section 3
        | https://arxiv.org/abs/2405.12186
        | The recorded order is our own: docs/methods.md, "SOURCE on the recorded order".

    Example:
        Ten steps at rate 0.1 on least squares with curvature 2 and 1/2: a score is 3 g / 4 times
        (1 - exp(-2)) / 2 or (1 - exp(-1/2)) / (1/2). In the recorded order it is exact here.

        >>> from tda_lightning.examples.least_squares import least_squares_scores
        >>> least_squares_scores(Source())
        tensor([-0.6485,  0.6485, -0.5902,  0.5902])
        >>> least_squares_scores(Source(order="recorded"))
        tensor([-0.6695,  0.6695, -0.6019,  0.6019])
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
    blocks: str | None = None
    tolerance: float = 1e-3
    max_products: int = 100

    def __post_init__(self) -> None:
        check_kind(self.curvature, also=(MATRIX_FREE,))
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
        check_limits(tolerance=self.tolerance, max_products=self.max_products)
        self._check_matrix_free()

    def _check_matrix_free(self) -> None:
        if self.curvature != MATRIX_FREE:
            if self.blocks is not None:
                raise ValueError(
                    f"blocks goes with curvature='matrix_free', got {self.blocks!r} with "
                    f"{self.curvature!r}. Leave it out (null)."
                )
            return
        if self.blocks not in (None, *BLOCKS):
            raise ValueError(
                f"blocks must be one of {', '.join(BLOCKS)} or null (None), got {self.blocks!r}."
            )
        if self.order != "average" or self.momentum != "effective_rate":
            raise ValueError(
                "curvature='matrix_free' has no eigenbasis in which to follow single steps: "
                "expected order='average' and momentum='effective_rate', got "
                f"{self.order!r} and {self.momentum!r}. Use curvature='ekfac' or 'exact' for those."
            )

    @property
    def _blockwise(self) -> bool:
        return self.curvature in ("ekfac", "kfac", "diagonal")

    def leading(self, context: Session) -> int:
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

    def segment_count(self, context: Session) -> int:
        """How many segments the scores are split by."""
        return len(context.trajectory.segments(self.cuts()))

    def score(self, session: Session) -> Provenance:
        """Run :meth:`plan`."""
        return run_plan(self.plan(session), [session])

    def score_stages(self, stages: Sequence[Stage]) -> Provenance:
        """Run :meth:`plan_stages`."""
        return run_plan(self.plan_stages(stages), [stage.session for stage in stages])

    def plan(self, context: Session) -> Plan:
        """Fit each segment's curvature, then score its checkpoints or steps, last segment first."""
        rule = rule_of(context.trajectory)
        run: AveragedRun | MatrixFreeRun | RecordedRun | RecordedAdamRun
        if self.curvature == MATRIX_FREE:
            run = MatrixFreeRun(self, context)
        elif self.order == "average":
            run = AveragedRun(self, context)
        elif rule.linear:
            run = RecordedRun(self, context)
        else:
            run = RecordedAdamRun(self, context)
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
                "No self-influence: in the recorded order of these optimizer steps every example "
                "needs an adjoint of its own. Ask for examples as queries, or use order='average'."
            )
        plan = Plan(run.passes(), provenance, notes)
        if isinstance(run, MatrixFreeRun):
            run.report_to(plan)
        return plan

    def stage_segment_counts(self, stages: Sequence[Stage]) -> list[int]:
        """How many segments the scores of each stage are split by."""
        if self.curvature == MATRIX_FREE:
            raise UnsupportedTrainingError(
                f"curvature='matrix_free' follows one stage of training, got {len(stages)}. Use "
                "curvature='ekfac' or 'exact', or attribute the last stage's trajectory alone."
            )
        return segment_counts(self, stages)

    def plan_stages(self, stages: Sequence[Stage]) -> Plan:
        """:meth:`plan` over several stages of training, last stage first."""
        plan = plan_stages(self, stages)
        plan.provenance["question"] = _QUESTIONS[self.order]
        return plan

    def notes_on_rates(self, context: Session, segments: Sequence[Segment]) -> list[str]:
        """Name the segments over which a changing ratio of rates is averaged (geometry.py)."""
        facts = context.trajectory.facts.parameters
        groups = sorted({facts[name].group for name in context.engine.names})
        folded = []
        for number, segment in enumerate(segments, start=1):
            rates = applied_rates(context.trajectory, segment.rows)[:, groups]
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
