"""Influence functions at the final weights (Koh & Liang 2017, 1703.04730), with EK-FAC by default
(Grosse et al. 2023, 2308.03296)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tda_lightning.estimators.clipping import clipping_notes
from tda_lightning.estimators.queries import query_rounds
from tda_lightning.estimators.responses import Responses, check_inverse, responses_of
from tda_lightning.gradients import Gradient
from tda_lightning.records.provenance import Provenance
from tda_lightning.session.passes import Pass, Plan, Session, run_plan
from tda_lightning.solvers import Solver

_NO_SELF = (
    "No self-influence: every training example would need a solve of its own. Ask for examples as "
    "queries, or use solver=None."
)


@dataclass
class InfluenceFunction:
    r"""What the optimum of the training loss would lose without an example.

    .. math::
        s_{qn} = \frac1N \nabla m_q(\theta_T)^\top
        (H + (\lambda + \delta) I)^{-1} \nabla l_n(\theta_T)

    with :math:`\lambda` the recorded weight decay.

    Attributes:
        curvature: ``exact``, ``ekfac``, ``kfac``, ``diagonal`` or ``identity``.
        damping: :math:`\delta`, absolute; or ``segment``: 1 over the sum of the applied rates,
            1 / (eta T), of a run trained by SGD.
        relative_damping: :math:`\delta` as a multiple of the layer's mean eigenvalue (with a
            solver: of the whole Gauss-Newton matrix's); 0.1 when neither is given.
        statistics: ``recorded``: curvature from the statistics that
            ``TrajectoryRecorder(curvature="online")`` gathered in the last interval before the
            last checkpoint. ``corrected``: with one pass for EK-FAC's eigenvalues in their basis.
            ``fitted``: curvature fitted at the last checkpoint. ``auto``: recorded where the run
            has any and ``curvature`` is ``ekfac`` or ``kfac``, else fitted.
        dense_side: the widest side of a layer (its inputs or outputs) whose covariance ``ekfac``
            and ``kfac`` hold as a dense matrix of that width; of a wider one they hold the
            leading 256 directions and the diagonal. None: 4096; 1024 for layers whose gradients
            have no factors (a weight used in two ways).
        seed: of the sampled labels, and of a solver's batches.
        solver: one of ``tda_lightning.solvers``: solves with products of the solver's own
            curvature, in which layers are not separate. ``curvature`` is then only the
            preconditioner's, where the solver has one. None: the inverse of ``curvature`` itself.

    Raises:
        ValueError: at once for impossible settings; when planning, for statistics that are asked
            for and were not recorded, or do not fit the model.

    References:
        | Understanding Black-box Predictions via Influence Functions (Koh & Liang, 2017), sec. 2
        | https://arxiv.org/abs/1703.04730
        | Studying Large Language Model Generalization with Influence Functions (Grosse et al.,
          2023), sec. 2.2, 3.1
        | https://arxiv.org/abs/2308.03296

    Example:
        Two directions of curvature 2 and 1/2: undamped, a score is 3 g / 4 divided by those.

        >>> from tda_lightning.examples.least_squares import least_squares_scores
        >>> least_squares_scores(InfluenceFunction(damping=0.0))
        tensor([-0.7500,  0.7500, -1.5000,  1.5000])
        >>> least_squares_scores(InfluenceFunction(damping=1.0))
        tensor([-0.5000,  0.5000, -0.5000,  0.5000])
    """

    curvature: str = "ekfac"
    damping: float | str | None = None
    relative_damping: float | None = None
    statistics: str = "auto"
    dense_side: int | None = None
    seed: int = 0
    solver: Solver | None = None

    def __post_init__(self) -> None:
        check_inverse(self)

    def segment_count(self, context: Session) -> int | None:
        """Influence functions know no time."""
        return None

    def score(self, session: Session) -> Provenance:
        """Run :meth:`plan`."""
        return run_plan(self.plan(session), [session])

    def plan(self, context: Session) -> Plan:
        """Fit curvature at the last checkpoint, then score the training set against it."""
        return self._planned(context, None)

    def _planned(self, context: Session, candidates: Tensor | None) -> Plan:
        """The plan for all training examples, or for those in ``candidates`` [query, k] alone."""
        meetings = None if candidates is None else len(candidates.unique())
        responses = responses_of(self, context, meetings)
        notes = clipping_notes(context.trajectory, "the formula looks at the final weights alone")
        plan = Plan([], {"checkpoints": [context.trajectory.last_step]}, notes)
        run = _Run(responses, context)
        asked = context.self_influence and candidates is None
        own = asked and responses.knows_own
        if asked and not own:
            notes.append(_NO_SELF)
        for number, (start, stop) in enumerate(query_rounds(context, responses.copies)):
            plan.passes += responses.passes(start, stop)
            order = None if candidates is None else _batches(context, candidates[start:stop])
            plan.passes.append(run.scoring(start, own and number == 0, order))

        def tell(finish: Callable[[], None] | None) -> Callable[[], None]:
            def end() -> None:
                if finish is not None:
                    finish()
                plan.provenance |= responses.provenance()
                plan.notes += responses.notes()

            return end

        plan.passes[-1].end = tell(plan.passes[-1].end)
        return plan


def _batches(context: Session, candidates: Tensor) -> list[list[int]]:
    """Batches of the candidates of some queries, small enough that every process has one."""
    chosen = candidates.unique()
    size = min(context.batch_size, max(1, len(chosen) // context.num_processes))
    return [part.tolist() for part in chosen.split(size)]


@dataclass
class _Run:
    responses: Responses
    context: Session
    self_influence: Tensor | None = None

    def scoring(
        self, first_query: int, with_self: bool, order: Sequence[Sequence[int]] | None
    ) -> Pass:
        """The pass that scores the round of queries whose responses are there."""
        step, finish = self.context.trajectory.last_step, self.finish if with_self else None
        score = self.score(first_query, with_self)
        return Pass("influence function", step, score, None, finish, order)

    def score(self, first_query: int, with_self: bool) -> Any:
        def accumulate(batch: Any, examples: Tensor, _: int) -> None:
            gradients = self.context.train_gradients(batch, examples).blocks
            values = self.responses.dot(gradients) / self.context.num_train
            self.context.scores.add(None, examples, values, first_query)
            if with_self:
                self._add_self(batch, examples, gradients)

        return accumulate

    def _add_self(self, batch: Any, examples: Tensor, gradients: Mapping[str, Gradient]) -> None:
        measured = gradients
        if not self.context.task.measures_loss:
            measured = self.context.measurement_gradients(batch, examples).blocks
        if self.self_influence is None:
            self.self_influence = torch.zeros(
                self.context.num_train, dtype=self.context.dtype, device=self.context.device
            )
        self.self_influence[examples] += (
            self.responses.own(measured, gradients) / self.context.num_train
        )

    def finish(self) -> None:
        assert self.self_influence is not None
        self.context.scores.set_self_influence(self.context.reduce(self.self_influence).cpu())
