"""Influence functions at the final weights (Koh & Liang 2017, 1703.04730), by default with EK-FAC
(Grosse et al. 2023, 2308.03296)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tda_lightning.curvature import units
from tda_lightning.estimators.clipping import clipping_notes
from tda_lightning.estimators.inverse import fit_inverse
from tda_lightning.estimators.inverse_settings import check_inverse
from tda_lightning.estimators.queries import directions, dot
from tda_lightning.estimators.use_notes import use_notes
from tda_lightning.records.provenance import Provenance
from tda_lightning.runtime.setting_types import require_types
from tda_lightning.session.session import Session
from tda_lightning.solvers import Solver

_NO_SELF = (
    "No self-influence: every training example would need a solve of its own. Ask for examples as "
    "queries, or use solver=None."
)
SIZES = (
    "ranks only: the optimum without an example is not where this run would have ended, and the "
    "damping sets the size"
)


@dataclass
class InfluenceFunction:
    r"""How the optimum of the training loss would move without an example.

    .. math::
        s_{qn} = \frac{v_n}N \nabla m_q(\theta_T)^\top
        (H + (\lambda + \delta) I)^{-1} \nabla l_n(\theta_T)

    with :math:`\lambda` the recorded weight decay. :math:`v_n` is 1 where the run used all examples
    evenly (docs/methods.md, "Uneven use").

    Attributes:
        curvature: ``exact``, ``ekfac``, ``kfac``, ``diagonal`` or ``identity``.
        damping: :math:`\delta`, absolute; or ``segment``, for runs trained by SGD: 1 over the sum
            of the applied rates, 1 / (eta T).
        relative_damping: :math:`\delta` as a multiple of the layer's mean eigenvalue (with a
            solver: the mean eigenvalue of the whole Gauss-Newton matrix); 0.1 if neither is given.
        statistics: ``recorded``: use the statistics that
            ``TrajectoryRecorder(curvature="online")`` gathered in the last interval before the
            last checkpoint. ``corrected``: the same, with EK-FAC's eigenvalues measured in their
            basis by one pass over the data. ``fitted``: fit curvature at the last checkpoint.
            ``auto``: recorded if the run has any and ``curvature`` is ``ekfac`` or ``kfac``, else
            fitted.
        dense_side: the widest side of a layer (its inputs or outputs) whose covariance ``ekfac``
            and ``kfac`` hold as a dense matrix. Of a wider side they hold the leading 256
            directions and the diagonal. None: 4096, or 1024 for layers whose gradients have no
            factors (a weight used in two ways).
        seed: for sampled labels, and for a solver's batches.
        solver: one of ``tda_lightning.solvers``, which solves by products with its own curvature
            over all layers together. ``curvature`` then only preconditions, if the solver asks for
            that. None: invert ``curvature`` itself.

    Raises:
        ValueError: at once, for impossible settings; when scoring, if the statistics asked for
            were not recorded or do not fit the model.

    References:
        | Understanding Black-box Predictions via Influence Functions (Koh & Liang, 2017), sec. 2
        | https://arxiv.org/abs/1703.04730
        | Studying Large Language Model Generalization with Influence Functions (Grosse et al.,
          2023), sec. 2.2, 3.1
        | https://arxiv.org/abs/2308.03296

    Example:
        Least squares with curvature 2 and 1/2: a score is 3 g / 4 divided by that plus damping.

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
        require_types(self)
        check_inverse(self)

    def segment_count(self, context: Session) -> int | None:
        """None: influence functions do not split scores by time."""
        return None

    def score(self, session: Session) -> Provenance:
        """Fit curvature at the last checkpoint, then score the training set against it."""
        return self.score_candidates(session, None)

    def score_candidates(self, session: Session, candidates: Tensor | None) -> Provenance:
        """Score the training examples in ``candidates`` [query, k]; None: all of them."""
        step = session.trajectory.last_step
        inverse = fit_inverse(self, session)
        count = session.num_train if candidates is None else len(candidates.unique())
        with_self = session.self_influence and candidates is None
        for first, last in session.query_rounds(inverse.query_bytes):
            responses = inverse.responses(first, last, count)
            order = None if candidates is None else _batches(session, candidates[first:last])
            tokens = directions(session, responses) if session.by_token else {}
            for batch in session.walk_columns("influence function", step, order):
                values = dot(responses, units(inverse.kind, batch.gradients)) / session.num_train
                session.add(None, batch, values, first, used=(0, step))
                if session.by_token:
                    session.add_terms(batch, tokens, first, 1 / session.num_train, (0, step))
                if with_self and inverse.knows_own and first == 0:
                    own = inverse.own(batch.measurement_gradients, batch.gradients)
                    own = own / session.num_train
                    session.add_self_influence(batch.examples, own, used=(0, step))
        made = inverse.provenance()
        notes = (
            clipping_notes(session.trajectory, "the formula looks at the final weights alone")
            + use_notes(session)
            + made["notes"]
        )
        if with_self and not inverse.knows_own:
            notes.append(_NO_SELF)
        return {"sizes": SIZES, **made, "checkpoints": [step], "notes": notes}


def _batches(session: Session, candidates: Tensor) -> list[list[int]]:
    """Batches of the candidates of some queries, small enough that every process has one."""
    chosen = candidates.unique()
    size = min(session.batch_size, max(1, len(chosen) // session.num_processes))
    return [part.tolist() for part in chosen.split(size)]
