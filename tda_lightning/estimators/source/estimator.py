"""SOURCE: approximate unrolled differentiation (Bae et al. 2024, 2405.12186)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from tda_lightning.curvature import (
    DeflatedSpectrum,
    SharedWalk,
    Spectrum,
    check_dense_side,
    check_kind,
    check_statistics,
    curvature_of,
    leading_directions,
    shared_walk,
    statistics_provenance,
    uses_statistics,
)
from tda_lightning.curvature.fit import WHOLE, Scales
from tda_lightning.estimators.source import averaged, blockwise, recorded, stepwise
from tda_lightning.estimators.source.coupling import (
    coupled,
    entered,
    final_adjoint,
    handed_over,
    stage_cuts,
)
from tda_lightning.estimators.source.fitted_stage import FittedStage
from tda_lightning.estimators.source.looked_up import (
    curved_rows,
    rows_of_queries,
    separable,
    united,
    without_unused_rows,
)
from tda_lightning.estimators.source.matrix_free import MatrixFree, MatrixFreeOrder
from tda_lightning.estimators.source.segments import (
    Cross,
    Curvature,
    FittedSegment,
    Geometry,
    Metric,
    checkpoint_metrics,
    require_one_recursion,
    segment_geometry,
    unit_scales,
)
from tda_lightning.estimators.tracin import NO_SELF
from tda_lightning.optimizers import require_formula, rule_of
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.provenance import Provenance
from tda_lightning.records.trajectory import Segment
from tda_lightning.replay.recorded_draws import RecordedDraws
from tda_lightning.runtime.setting_types import require_types
from tda_lightning.session.session import Session
from tda_lightning.session.stage import Stage

ORDERS = ("average", "recorded")
MOMENTUM = ("effective_rate", "recursion")
MATRIX_FREE = "matrix_free"
_BLOCKWISE = ("ekfac", "kfac", "diagonal")
_LEADING = 64
_FEWEST = 8  # not worth their walks below
_LEADING_SCALARS = 1 << 28  # each direction is held in two bases
_QUESTIONS = {
    "average": "what training like this one does with an example (order of batches averaged out)",
    "recorded": "what this very run did with an example (batches in their recorded order)",
}
_SIZES = "predicted, as well as the curvature of the segments describes the training"


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
            but 0 if curvature was recorded during training.
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

    # Every example is turned from segment to segment, as a query.
    costly_self_influence: ClassVar[bool] = True

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
        require_types(self)
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
            self.leading_directions < 0
            or (self.leading_directions and self.curvature not in _BLOCKWISE)
        ):
            raise ValueError(
                "leading_directions must not be negative, and goes with a block-wise curvature "
                f"(ekfac, kfac, diagonal); got {self.leading_directions} with {self.curvature}."
            )
        if self.segment_steps is None and self.num_segments < 1:
            raise ValueError(f"num_segments must be at least 1, got {self.num_segments}.")
        if self.curvature != MATRIX_FREE and self.blocks is not None:
            raise ValueError(
                f"blocks goes with curvature='matrix_free', got {self.blocks!r} with "
                f"{self.curvature!r}. Leave it out (null)."
            )
        MatrixFree(self.blocks, self.tolerance, self.max_products)
        single_steps = self.order != "average" or self.momentum != "effective_rate"
        if self.curvature == MATRIX_FREE and single_steps:
            raise ValueError(
                "curvature='matrix_free' has no eigenbasis in which to follow single steps: "
                "expected order='average' and momentum='effective_rate', got "
                f"{self.order!r} and {self.momentum!r}. Use curvature='ekfac' or 'exact' for those."
            )

    def cuts(self) -> int | list[int]:
        """How a run of one stage is cut: a number of segments, or explicit steps."""
        if self.segment_steps is None:
            return self.num_segments
        steps = [step for step in self.segment_steps if isinstance(step, int)]
        if len(steps) < len(self.segment_steps):
            raise ValueError(
                f"segment_steps must hold the steps of one trajectory, got {self.segment_steps}."
            )
        return steps

    def segment_count(self, session: Session) -> int:
        """How many segments the scores are split by."""
        return len(session.trajectory.segments(self.cuts()))

    def stage_segment_counts(self, stages: Sequence[Stage]) -> list[int]:
        """How many segments the scores of each stage are split by."""
        if self.curvature == MATRIX_FREE:
            raise UnsupportedTrainingError(
                f"curvature='matrix_free' follows one stage of training, got {len(stages)}. Use "
                "curvature='ekfac' or 'exact', or attribute the last stage's trajectory alone."
            )
        return [
            len(stage.session.trajectory.segments(own))
            for stage, own in zip(stages, self._stage_cuts(stages), strict=True)
        ]

    def score(self, session: Session) -> Provenance:
        """Follow the queries back through a run."""
        return self.score_stages([alone(session)])

    def score_stages(self, stages: Sequence[Stage]) -> Provenance:
        """Follow the queries back through one or several stages of training."""
        cuts = self._stage_cuts(stages)
        alone = len(stages) == 1
        recorded_too = (self.statistics, self.curvature)
        if not alone and not any(
            uses_statistics(*recorded_too, stage.session.trajectory) for stage in stages
        ):
            stages = without_unused_rows(stages)
        fitted = [self.fit(own, cut, alone) for own, cut in zip(stages, cuts, strict=True)]
        session = stages[-1].session
        query_bytes = max(fit.query_bytes() for fit in fitted)
        for first, last in session.query_rounds(query_bytes):
            near = [fit.near(first, last) for fit in fitted]
            if alone and near[0].stays_in_bases:
                blockwise.follow(near[0].segments, first, last)
                continue
            handed = final_adjoint(near[-1].stage, first, last)
            for fit in reversed(near):
                adjoint, frozen = entered(fit.stage, fit.segments[-1], handed, last - first)
                for segment in reversed(fit.segments):
                    crossing = fit.cross(fit.segments, segment.number, adjoint, first)
                    if segment.couples:
                        frozen = coupled(fit.stage, segment, crossing.response, frozen, self.seed)
                    adjoint = crossing.adjoint
                handed = handed_over(fit.stage, fit.segments[0], adjoint, frozen)
        if session.self_influence and fitted[0].cross is averaged.cross:
            way = blockwise if fitted[0].stays_in_bases else averaged
            way.add_self_influence(fitted[0].segments)
        return self._provenance(fitted)

    def _stage_cuts(self, stages: Sequence[Stage]) -> list[int | list[int]]:
        if len(stages) == 1:
            return [self.cuts()]
        return stage_cuts(self.num_segments, self.segment_steps, stages)

    def fit(self, stage: Stage, cuts: int | list[int], alone: bool = False) -> FittedStage:
        """Choose how a stage's segments are crossed, and fit their curvature.

        Args:
            alone: there is no other stage.
        """
        session, trajectory = stage.session, stage.session.trajectory
        linear, recorded_order = rule_of(trajectory).linear, self.order == "recorded"
        single_steps = recorded_order or (linear and self.momentum == "recursion")
        if recorded_order and not linear:
            require_formula(trajectory, "advance", "order='recorded'")
        if single_steps:
            require_one_recursion(session)
        if recorded_order and session.edits is not None:
            session.edits.require_in_batches("order='recorded'")
        cross: Cross = averaged.cross
        copies, products = 4 if single_steps else 3, None
        if self.curvature == MATRIX_FREE:
            settings = MatrixFree(self.blocks, self.tolerance, self.max_products)
            products = MatrixFreeOrder(settings, session)
            cross, copies = products.cross, products.copies
        elif recorded_order:
            cross, copies = recorded.cross if linear else stepwise.cross, 6
            if not linear:
                stepwise.require_memory(session)
        records = trajectory.segments(cuts)
        draws = RecordedDraws.of(session) if recorded_order else None
        if draws is not None:
            draws.prepare("recorded draws", range(records[0].start, records[-1].stop))
        segments: list[FittedSegment] = []
        require_formula(trajectory, "metric", "SOURCE")
        metrics = checkpoint_metrics(session)
        # Where no rows are looked up, all parameters are followed, and one walk serves both fits.
        together = 0 if session.engine.rows_each else self.leading(session, len(records))
        blocks: list[tuple[Geometry, Mapping[str, Curvature]]] = []
        for number, steps in enumerate(records):
            shared = None
            if together:
                shared = shared_walk(together, session, steps.checkpoints, self.seed)
            blocks.append(self._blockwise(session, number, steps, metrics, shared))
            if together:
                before = blocks[-2][1].get(WHOLE) if number else None
                spectra = blocks[-1][1]
                blocks[-1] = self._with_leading(
                    session, number, steps, together, metrics, spectra, before, shared
                )
        curvatures = [own for _, own in blocks]
        looked_up = separable(session, curvatures) if alone else []
        if looked_up and self._fits_leading(session):
            themselves, queries = session.self_influence, session.num_query
            rows = rows_of_queries(session, looked_up, 0, queries, themselves)
            rows = united(rows, curved_rows(looked_up, curvatures))
            stage = replace(stage, session=session.restricted(rows))
            stage = replace(stage, wide=stage.session)
            if self.leading(stage.session, len(records)):
                session, looked_up = stage.session, []
                blocks = [
                    (
                        geometry.restricted(rows),
                        {
                            n: s.restricted(rows[n]) if n in rows and isinstance(s, Spectrum) else s
                            for n, s in own.items()
                        },
                    )
                    for geometry, own in blocks
                ]
        leading = together or self.leading(session, len(records))
        for number, steps in enumerate(records):
            before = segments[-1].curvature.get(WHOLE) if segments else None
            geometry, curvature = blocks[number]
            if leading and not together:
                geometry, curvature = self._with_leading(
                    session, number, steps, leading, metrics, curvature, before
                )
            segments.append(
                FittedSegment(
                    session=session,
                    number=number,
                    steps=steps,
                    kind=self.curvature,
                    geometry=geometry,
                    metrics=metrics,
                    curvature=curvature,
                    single_steps=single_steps,
                    goes_back=number > 0 or bool(stage.carried),
                    couples=bool(stage.frozen) and self.curvature != "identity",
                    draws=draws,
                )
            )
        separate = [] if leading else looked_up
        return FittedStage(stage, segments, cross, copies, leading, products, separate)

    def _blockwise(
        self,
        session: Session,
        number: int,
        steps: Segment,
        metrics: Mapping[int, Metric],
        shared: SharedWalk | None,
    ) -> tuple[Geometry, Mapping[str, Curvature]]:
        """The metric of a segment, and its curvature by unit."""
        if self.curvature == MATRIX_FREE:
            return segment_geometry(session, steps, "exact", metrics), {}
        used = (steps.start, steps.stop)
        geometry = segment_geometry(session, steps, self.curvature, metrics)
        spectra = curvature_of(
            self.statistics,
            self.curvature,
            session,
            used,
            steps.checkpoints,
            self._scales(session, steps, self.curvature, geometry, metrics),
            self.seed,
            f"segment {number + 1}",
            self.dense_side,
            used,
            shared,
        )
        return geometry, spectra

    def _with_leading(
        self,
        session: Session,
        number: int,
        steps: Segment,
        leading: int,
        metrics: Mapping[int, Metric],
        spectra: Mapping[str, Curvature],
        before: Curvature | None,
        shared: SharedWalk | None = None,
    ) -> tuple[Geometry, Mapping[str, Curvature]]:
        """The same for all parameters together, with leading directions in front of ``spectra``;
        ``before``: the curvature of the segment before."""
        title, used = f"segment {number + 1}", (steps.start, steps.stop)
        geometry = segment_geometry(session, steps, "exact", metrics)
        scales = self._scales(session, steps, "exact", geometry, metrics)
        blocks = {n: own for n, own in spectra.items() if isinstance(own, Spectrum)}
        start = (lambda: before.vectors) if isinstance(before, DeflatedSpectrum) else None
        directions = leading_directions(
            leading,
            session,
            steps.checkpoints,
            scales,
            self.seed,
            title,
            blocks,
            used,
            start,
            shared,
        )
        return geometry, {WHOLE: DeflatedSpectrum.of(directions, session.blocks, blocks)}

    def _scales(
        self,
        session: Session,
        steps: Segment,
        kind: str,
        geometry: Geometry,
        metrics: Mapping[int, Metric],
    ) -> Scales:
        if self.order == "average" or not metrics:
            return dict.fromkeys(steps.checkpoints, geometry.scale)
        # Each checkpoint's curvature in its own metric (stepwise.py).
        return {
            step: unit_scales(session, metrics[step].values, kind)
            for step in steps.checkpoints
            if step in metrics
        }

    def _fits_leading(self, session: Session) -> bool:
        """Whether leading directions may be fitted, of curvature that was itself fitted."""
        if self.curvature not in _BLOCKWISE or self.leading_directions == 0:
            return False
        return not uses_statistics(self.statistics, self.curvature, session.trajectory)

    def leading(self, session: Session, num_segments: int) -> int:
        """How many leading directions are held for the model at hand."""
        size = session.num_parameters
        if self.leading_directions is not None:
            return min(self.leading_directions, size)
        if self.curvature not in _BLOCKWISE:
            return 0
        if uses_statistics(self.statistics, self.curvature, session.trajectory):
            return 0  # their walks are what recording was to save
        room = _LEADING_SCALARS // (size * num_segments)
        return min(_LEADING, room, size) if room >= _FEWEST else 0

    def _provenance(self, fitted: Sequence[FittedStage]) -> Provenance:
        """How the scores were made; what differs between several stages is a list over them."""
        offsets = [(fit.stage.first_step, own.steps) for fit in fitted for own in fit.segments]
        record: dict[str, object] = {
            "question": _QUESTIONS[self.order],
            "sizes": _SIZES,
            "segments": [[first + own.start, first + own.stop] for first, own in offsets],
            "checkpoints": [[first + step for step in own.checkpoints] for first, own in offsets],
        }
        by_stage: list[dict[str, object]] = []
        for fit in fitted:
            spans = [(segment.steps.start, segment.steps.stop) for segment in fit.segments]
            trajectory = fit.stage.session.trajectory
            own = statistics_provenance(self.statistics, self.curvature, trajectory, spans)
            by_stage.append({"leading_directions": fit.leading, **own})
        if len(fitted) == 1:
            record |= {**by_stage[0], "notes": fitted[0].notes()}
            if (products := fitted[0].products) is not None:
                record["matrix_free"] = products.record()
        else:
            keys = dict.fromkeys(key for stage in by_stage for key in stage)
            record |= {key: [stage.get(key) for stage in by_stage] for key in keys}
            record["notes"] = [NO_SELF] + [
                f"Stage {number}: {note}"
                for number, fit in enumerate(fitted, start=1)
                for note in fit.notes()
            ]
        return cast(Provenance, record)


def alone(session: Session) -> Stage:
    """A run of one stage."""
    return Stage(session, session, (), (), 0, range(session.num_train), first_step=0)
