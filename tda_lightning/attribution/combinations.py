"""Which questions can be asked together, and what is said of those left out."""

from __future__ import annotations

from collections.abc import Sequence

from tda_lightning.attribution.stages import StageSetup
from tda_lightning.edits import EditSet, GraphEditSet
from tda_lightning.estimators import EnsembleEstimator, Estimator
from tda_lightning.estimators.base import self_influence_by_default
from tda_lightning.measurements import Measurement
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.session.session import Session

_NO_SELF = (
    "No self-influence: with this estimator it takes longer than the scores. Ask for it by "
    "self_influence=True."
)
_NO_SELF_MEASURED = (
    "No self-influence: the measurement was chosen for the queries. Ask for it by "
    "self_influence=True, which measures every training example so."
)


def require_by_token(
    estimator: Estimator,
    members: Sequence[Sequence[StageSetup]],
    by_token: str | None,
    self_influence: bool | None,
) -> None:
    """Refuse scores by token where they are not known.

    Raises:
        UnsupportedTrainingError: tokens of queries, of TRAK over several runs.
        ValueError: self-influence is asked for as well.
    """
    if by_token is None:
        return
    if len(members) > 1 and isinstance(estimator, EnsembleEstimator) and by_token != "train":
        raise UnsupportedTrainingError(
            f"{type(estimator).__name__} multiplies means over the members of an ensemble, of "
            "features and of derivatives apart, and both are of whole queries: the tokens of a "
            "query have no parts in that product. Ask for by_token='train', or attribute the "
            "members one by one."
        )
    if self_influence and by_token != "train":
        raise ValueError(
            "by_token takes queries apart, and self_influence has no queries: ask for one of "
            "them at a time."
        )


def require_graph_question(
    edits: EditSet | GraphEditSet | None, keep: float, by_token: str | None
) -> None:
    """Refuse what edits of a graph have no answer to.

    Raises:
        UnsupportedTrainingError: shares of the data, or scores by token.
    """
    if not isinstance(edits, GraphEditSet):
        return
    if keep < 1:
        raise UnsupportedTrainingError(
            "keep is a share of the training examples that would stay, and edits of a "
            "graph change the graph: ask about them with keep=1."
        )
    if by_token is not None:
        raise UnsupportedTrainingError(
            "Edits of a graph have no scores by token: leave out by_token."
        )


def require_askable(measurement: Measurement | None, self_influence: bool | None) -> None:
    """Refuse self-influence by a measurement that training examples do not have."""
    if measurement is None or not self_influence or not (own := measurement.each_own):
        return
    raise ValueError(
        f"self_influence measures every training example, and the measurement's {own[0]} is given "
        "for each query. Leave out self_influence."
    )


def require_whole(session: Session, measurement: object, by_token: str | None) -> None:
    """Refuse other questions to a task whose measurement has parts of its own (timesteps)."""
    if session.num_parts > 1 and (measurement is not None or by_token in ("query", "both")):
        raise UnsupportedTrainingError(
            f"{type(session.task).__name__} measures queries in {session.num_parts} parts of its "
            "own (timesteps): leave out measurement= and by_token=, or give a task without them."
        )


def wants_self_influence(
    estimator: Estimator, asked: bool | None, measurement: Measurement | None
) -> bool:
    """Whether self-influence is computed, given what the user says: where nothing, if it costs
    little and is of the task's own measurement."""
    if asked is not None:
        return asked
    return measurement is None and self_influence_by_default(estimator)


def no_self_influence(measurement: Measurement | None, by_token: str | None) -> str:
    """Why there is no self-influence where nobody asked for it or against it."""
    if by_token in ("query", "both"):
        return "No self-influence: the queries were taken apart into tokens."
    return _NO_SELF if measurement is None else _NO_SELF_MEASURED
