"""Multi-stage influence functions (Chen et al. 2020, 2007.09081): what pre-training examples did to
a fine-tuned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tda_lightning.curvature import statistics_provenance, unit_matrices, units
from tda_lightning.curvature.spectrum import Spectrum
from tda_lightning.estimators.clipping import clipping_notes
from tda_lightning.estimators.influence import SIZES
from tda_lightning.estimators.inverse_eigenbasis import damped_curvature
from tda_lightning.estimators.inverse_settings import (
    check_inverse,
    damping_record,
    decay_by_unit,
    last_interval,
)
from tda_lightning.estimators.queries import Response, dot
from tda_lightning.estimators.source.coupling import by_name, final_adjoint, frozen_products
from tda_lightning.estimators.use_notes import use_notes
from tda_lightning.optimizers import applied_rates, rule_if_known
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.provenance import Provenance
from tda_lightning.runtime.setting_types import require_types
from tda_lightning.session.session import Session
from tda_lightning.session.stage import Stage
from tda_lightning.solvers import Solver

_NO_SELF = (
    "No self-influence over several stages: an example of an earlier stage has no measurement of "
    "the last one's."
)


@dataclass
class MultiStageInfluence:
    r"""How the optima of several stages of training would move without an example.

    A stage ends at an optimum, and the next one begins there. From the last stage to the first,
    with q the gradient of the measurement by what a stage ended with, H the curvature of its mean
    loss at its last checkpoint, :math:`\lambda` its weight decay and :math:`\delta` the damping,

    .. math::
        u = (H_{TT} + (\lambda + \delta) I + \alpha I_C)^{-1} q_T, \qquad
        s_{qn} = \frac{v_n}N\, u^\top \nabla l_n

    for its trained parameters T. What it hands to the stage before depends on what it did with the
    parameters that it took over:

    - *frozen* (F, the paper's first case): :math:`q_F \leftarrow q_F - H_{FT} u`, because where T
      ends up depends on F;
    - *trained further* (C, the second case): :math:`q_C \leftarrow \alpha u_C`. An optimum forgets
      where training began, so fine-tuning is taken for the optimum of its loss plus
      :math:`\tfrac{\alpha}2 \|\theta_C - \theta_C^{before}\|^2`.

    The paper writes :math:`\alpha\|\cdot\|^2`, so its :math:`\alpha` is half of this one, and has
    neither weight decay nor N of the later stages. Scores of the last stage's own examples are
    influence functions with :math:`\alpha` as further damping of C.

    SOURCE over stages needs no optimum and no :math:`\alpha` (``Source`` on the same trajectories).

    Attributes:
        curvature: ``exact``, ``ekfac``, ``kfac``, ``diagonal`` or ``identity``.
        proximity: :math:`\alpha`; None: 1 over the sum of the applied rates of the stage,
            1 / (eta T), for a stage trained by SGD. What is left of a change along curvature
            :math:`\sigma` is then :math:`\alpha / (\sigma + \alpha)`, which begins like the
            :math:`e^{-\eta T \sigma}` of gradient descent.
        damping: :math:`\delta`, absolute, or ``segment``: see
            :class:`~tda_lightning.estimators.InfluenceFunction`.
        relative_damping: :math:`\delta` as a multiple of the layer's mean eigenvalue; 0.1 if
            neither is given.
        statistics: see :class:`~tda_lightning.estimators.InfluenceFunction`.
        dense_side: likewise.
        seed: of sampled labels.

    Raises:
        ValueError: at once, for impossible settings.
        UnsupportedTrainingError: the run has one stage; a stage was trained by another optimizer
            than SGD further than the one before it, and ``proximity`` is None.

    References:
        | Multi-Stage Influence Function (Chen, Si, Li, Chelba, Kumar, Boning & Hsieh, 2020),
          section 3, theorems 1 and 2
        | https://arxiv.org/abs/2007.09081

    Example:
        Two stages on least squares with curvature 2 and 1/2, alpha 1: a score of the last stage's
        examples is 3 g / 4 divided by curvature + 1, and one of the first's by curvature too.

        >>> from tda_lightning.examples.least_squares import least_squares_scores
        >>> estimator = MultiStageInfluence(proximity=1.0, damping=0.0)
        >>> least_squares_scores(estimator, stages=2)
        tensor([-0.2500,  0.2500, -1.0000,  1.0000, -0.5000,  0.5000, -0.5000,  0.5000])
    """

    curvature: str = "ekfac"
    proximity: float | None = None
    damping: float | str | None = None
    relative_damping: float | None = None
    statistics: str = "auto"
    dense_side: int | None = None
    seed: int = 0
    solver: Solver | None = field(default=None, init=False)  # curvature itself is inverted

    def __post_init__(self) -> None:
        require_types(self)
        check_inverse(self)
        if self.proximity is not None and not self.proximity > 0:
            raise ValueError(
                f"proximity must be positive, got {self.proximity}: at 0 an optimum forgets where "
                "training began, and no example of an earlier stage has an influence."
            )

    def segment_count(self, session: Session) -> int | None:
        """Not for one stage.

        Raises:
            UnsupportedTrainingError: always.
        """
        raise UnsupportedTrainingError(
            "MultiStageInfluence follows several stages of training, got one. Give the "
            "trajectories of all stages as a list, or use InfluenceFunction for a single one."
        )

    def score(self, session: Session) -> Provenance:
        """Not for one stage; see :meth:`segment_count`."""
        self.segment_count(session)
        raise AssertionError

    def stage_segment_counts(self, stages: Sequence[Stage]) -> list[int]:
        """One for each stage."""
        return [1] * len(stages)

    def score_stages(self, stages: Sequence[Stage]) -> Provenance:
        """Fit curvature at the end of every stage, then follow the queries back."""
        optima = [StageOptimum.fit(self, stage, number > 0) for number, stage in enumerate(stages)]
        last_session = stages[-1].session
        most = max(stage.wide.gradient_bytes(4) for stage in stages)
        for first, last in last_session.query_rounds(most):
            asked = {name: own[0] for name, own in final_adjoint(stages[-1], first, last).items()}
            for optimum in reversed(optima):
                asked = filled(optimum.stage, asked, last - first)
                response = optimum.response(asked)
                optimum.score(response, first)
                asked = optimum.handed_over(asked, response, self.seed)
        notes = [] if not last_session.self_influence else [_NO_SELF]
        notes += [
            f"Stage {number}: {note}"
            for number, (stage, optimum) in enumerate(zip(stages, optima, strict=True), start=1)
            for note in (
                *clipping_notes(
                    stage.session.trajectory, "the formula looks at the final weights alone"
                ),
                *use_notes(stage.session),
                *optimum.notes,
            )
        ]
        runs = [(stage.first_step, stage.session.trajectory) for stage in stages]
        recorded = [
            statistics_provenance(self.statistics, self.curvature, run, [last_interval(run)])
            for _, run in runs
        ]
        made: Provenance = {
            "sizes": SIZES,
            "segments": [[first, first + run.last_step] for first, run in runs],
            "checkpoints": [[first + run.last_step] for first, run in runs],
            "damping": damping_record(self, runs[-1][1], "the layer's mean eigenvalue"),
            "proximity": [optimum.proximity for optimum in optima],
            "notes": notes,
        }
        if any(recorded):
            made["statistics"] = [part.get("statistics") for part in recorded]  # type: ignore[misc]
            made["fisher"] = [part.get("fisher") for part in recorded]  # type: ignore[misc]
        return made


@dataclass
class StageOptimum:
    """The end of a stage, taken for an optimum.

    Attributes:
        settings: the estimator's.
        stage: the stage.
        damped: its curvature with weight decay, damping and proximity, by unit.
        proximity: alpha; None where nothing was trained further.
        further: parameters that the stage before trained too.
        notes: on the curvature.
    """

    settings: MultiStageInfluence
    stage: Stage
    damped: dict[str, Spectrum]
    proximity: float | None
    further: list[str]
    notes: list[str]

    @classmethod
    def fit(cls, settings: MultiStageInfluence, stage: Stage, later: bool) -> StageOptimum:
        """Curvature at the last checkpoint of a stage; ``later``: one came before it."""
        session = stage.session
        further = [name for name in stage.carried if name not in stage.frozen] if later else []
        alpha = _proximity(settings, session) if further else None
        some = next(iter(session.module.parameters()))
        pulled = {
            name: torch.full(
                shape,
                alpha if alpha is not None and name in further else 0.0,
                dtype=session.dtype,
                device=some.device,
            )
            for block in session.blocks
            for name, shape in zip(block.parameters, block.shapes, strict=True)
        }
        matrices = {block.name: block.matrix(pulled) for block in session.blocks}
        pull = unit_matrices(settings.curvature, matrices)
        decay = decay_by_unit(session, settings.curvature)
        damped, notes = damped_curvature(
            settings, session, {name: decay[name] + pull[name] for name in decay}
        )
        return cls(settings, stage, damped, alpha, further, notes)

    def response(self, asked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """u of the trained parameters, [query, groups, rows, columns] by unit."""
        matrices = {block.name: block.matrix(asked) for block in self.stage.session.blocks}
        return {
            name: self.damped[name].lift(
                self.damped[name].project(own) / self.damped[name].eigenvalues
            )
            for name, own in unit_matrices(self.settings.curvature, matrices).items()
        }

    def score(self, response: Mapping[str, Tensor], first_query: int) -> None:
        """Score the stage's training set."""
        session, kind = self.stage.session, self.settings.curvature
        step = session.trajectory.last_step
        met = {name: Response(own, None, session.num_train) for name, own in response.items()}
        tokens = by_name(session, kind, response) if session.by_token else {}
        for batch in session.walk_columns("multi-stage influence", step):
            values = dot(met, units(kind, batch.gradients)) / session.num_train
            session.add(0, batch, values, first_query, used=(0, step))
            if session.by_token:
                session.add_terms(batch, tokens, first_query, 1 / session.num_train, (0, step))

    def handed_over(
        self, asked: Mapping[str, Tensor], response: Mapping[str, Tensor], seed: int
    ) -> dict[str, Tensor]:
        """What the stage before is asked, [query, *shape] by name."""
        session = self.stage.session
        u = by_name(session, self.settings.curvature, response)
        handed: dict[str, Tensor] = {}
        if self.proximity is not None:
            handed = {name: self.proximity * u[name] for name in self.further}
        frozen = [name for name in self.stage.frozen if name in self.stage.carried]
        if frozen:
            step = session.trajectory.last_step
            kind = self.settings.curvature
            moved = frozen_products(
                self.stage, u, [step], "multi-stage influence", kind, seed, (0, step)
            )
            handed |= {name: asked[name] - moved[name] for name in frozen}
        return handed


def filled(stage: Stage, asked: Mapping[str, Tensor], queries: int) -> dict[str, Tensor]:
    """``asked`` of every parameter of the stage: zeros where later stages did not use it."""
    session = stage.wide
    return {
        name: asked[name]
        if name in asked
        else torch.zeros(queries, *shape, dtype=session.dtype, device=session.device)
        for block in session.blocks
        for name, shape in zip(block.parameters, block.shapes, strict=True)
    }


def _proximity(settings: MultiStageInfluence, session: Session) -> float:
    """Alpha of a stage that trains parameters of the stage before further."""
    if settings.proximity is not None:
        return settings.proximity
    rule = rule_if_known(session.trajectory)
    if rule is None or not rule.linear:
        raise UnsupportedTrainingError(
            "proximity=None is 1 / (eta T) of plain gradient descent, and a stage was trained with "
            f"{session.trajectory.facts.optimizer}, whose steps are not in proportion to "
            "gradients. "
            "Give proximity: how strongly fine-tuning is held to the weights it began with."
        )
    time = float(applied_rates(session.trajectory, slice(None)).sum(0).max())
    if time <= 0:
        raise UnsupportedTrainingError("proximity=None is 1 / (eta T), and all rates are 0.")
    return 1 / time
