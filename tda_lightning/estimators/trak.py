"""TRAK (Park et al. 2023, 2303.14186): a regression on randomly projected gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda_lightning.edits import EditSet, GraphEditSet
from tda_lightning.estimators.clipping import clipping_notes
from tda_lightning.estimators.projection import Projection
from tda_lightning.estimators.use_notes import use_notes
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.provenance import Provenance
from tda_lightning.records.score_sinks import ScoreSink
from tda_lightning.runtime.setting_types import require_types
from tda_lightning.session.session import Batch, Session

DIMENSION = 2048  # traker's default
_EXAMPLES_EACH = 16  # training examples for each direction: with fewer, scores get worse
SIZES = (
    "ranks only: the second derivative of the loss by the model's output counts as 1, and the "
    "optimum without an example is not where this run would have ended"
)
_APART = 1e-3  # of a loss's gradient that is not that of the output


@dataclass
class TRAK:
    r"""One Newton step of the regression that has the gradients of the model's output for features.

    .. math::
        s_{qn} = \frac{\partial m_q}{\partial f_q}\, \frac{\partial l_n}{\partial f_n}\, v_n\,
        \phi_q^\top \Big( \sum_i v_i\, \phi_i \phi_i^\top \Big)^{-1} \phi_n,
        \qquad \phi = P \nabla f(\theta_T)

    The output f is a number for each example that its loss is a function of: the log-odds of the
    label, or the residual (``AttributionTask.model_output``). P projects its gradient at the last
    checkpoint on random directions (:class:`~tda_lightning.estimators.projection.Projection`).
    :math:`v_n` is 1 where the run used all examples evenly (docs/methods.md, "Uneven use"). In a
    what-if run (``keep``) the weights of its loss multiply :math:`v_i` in the sum.

    Of several runs (an :class:`~tda_lightning.Ensemble`, random subsets in what-if runs) each has
    directions of its own (``seed`` + its number), and the paper's average is taken, in which the
    derivatives and the products of features are means over the runs by themselves:

    .. math::
        s_{qn} = \overline{\frac{\partial m_q}{\partial f_q}}\;
        \overline{\frac{\partial l_n}{\partial f_n}}\;
        \overline{v_n\, \phi_q^\top (\Phi^\top \Phi)^{-1} \phi_n}

    ``Scores.member`` has each member's own scores.

    The paper scores f itself. If the measurement is the loss, its derivative by f brings a score
    into the measurement's unit, to first order, which changes no ranking of training examples. Of
    another measurement the gradient takes the place of :math:`\phi_q\,\partial m_q/\partial f_q`
    in every member; with ``ClassificationTask(measure="margin")``, which measures -f, scores are
    the paper's own. For squared errors of a linear model and without projection, they are those of
    the undamped influence function.

    The features of all training examples are held in memory, 8 KB each at 2048 dimensions.

    Not done: the soft-thresholding with which the paper's algorithm 1 ends. Its reference
    implementation, traker 0.3.2, has none either.

    Attributes:
        projection_dimension: number of directions; None: a sixteenth of the number of training
            examples (with a weight above 0), 2048 at most. As many as parameters or more: nothing
            is projected.
        relative_damping: added to the matrix of second moments, as a multiple of its mean
            eigenvalue: 0 in the paper. With more than a few directions, damping does better
            (docs/methods.md, "TRAK").
        seed: of the directions.

    Raises:
        ValueError: at once, for a dimension below 1 or a negative damping; when scoring, for more
            dimensions than training examples without damping, and where the training examples'
            features do not span a query's; for a loss that is not known to be a function of one
            output.

    References:
        | TRAK: Attributing Model Behavior at Scale (Park et al., 2023), section 3 and algorithm 1
        | https://arxiv.org/abs/2303.14186

    Example:
        Two directions for two weights: nothing is projected. Least squares with curvature 2 and
        1/2: a score is 3 g / 4 divided by that.

        >>> from tda_lightning.examples.least_squares import least_squares_scores
        >>> least_squares_scores(TRAK(projection_dimension=2))
        tensor([-0.7500,  0.7500, -1.5000,  1.5000])
    """

    projection_dimension: int | None = None
    relative_damping: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_types(self)
        if self.projection_dimension is not None and self.projection_dimension < 1:
            raise ValueError(
                f"projection_dimension must be at least 1, got {self.projection_dimension}."
            )
        if self.relative_damping < 0:
            raise ValueError(f"relative_damping must not be negative, got {self.relative_damping}.")

    def segment_count(self, session: Session) -> int | None:
        """None: TRAK looks at the last checkpoint alone."""
        return None

    def score(self, session: Session) -> Provenance:
        """Score the training examples of one run."""
        return self._score(session, 0, None)

    def score_ensemble(self, sessions: Sequence[Session], combined: ScoreSink) -> list[Provenance]:
        """Score them for every run, and for all runs together."""
        together = _Together(combined, len(sessions), *_mean_slopes(sessions))
        return [self._score(session, number, together) for number, session in enumerate(sessions)]

    def _score(self, session: Session, number: int, together: _Together | None) -> Provenance:
        step = session.trajectory.last_step
        used = (0, step)
        directions = self._directions(session, number)
        size = directions.dimension
        moments = torch.zeros(size, size, dtype=torch.float64, device=session.device)
        features: list[_Features] = []
        for batch in session.walk("TRAK, features", step):
            found = _train_features(session, directions, batch, checked=not features)
            rows = found.values.double()
            weights = batch.curvature_weights(used)
            moments += (rows if weights is None else rows * weights[:, None]).T @ rows
            features.append(found.kept())
        moments = session.reduce(moments)
        moments.diagonal().add_(self.relative_damping * moments.diagonal().mean())
        inverse = _Inverse.of(moments, session.dtype)
        query, query_slopes = _query_features(session, directions)
        inverse.require_spanned(session, query, "query", torch.arange(len(query)))
        responses = inverse.matrix @ query.double().T
        for found in self._columns(session, directions, features):
            batch, values = found.batch, found.values.to(session.device).double()
            inverse.require_spanned(session, values, "column", batch.columns)
            products = (values @ responses).T.to(session.dtype)
            own = query_slopes[:, None] * products * found.slopes
            session.add(None, batch, own, used=used)
            if together is not None:
                session.add(None, batch, together.scores(batch, products), 0, used, together.sink)
            if session.self_influence:
                measured, measured_slopes = found.measured or (values, found.slopes)
                left = measured.to(session.device).double() @ inverse.matrix
                leverage = (left * values).sum(1).to(session.dtype)
                slopes = found.slopes
                if together is not None:
                    slopes = together.train[batch.examples.cpu()].to(session.device)
                    measured_slopes = slopes if found.measured is None else measured_slopes
                own = measured_slopes * slopes * leverage
                session.add_self_influence(batch.examples, own, used)
        if session.by_token:
            # df/dtheta dl/df is the gradient of the loss, of which that of every term is a part.
            slopes = query_slopes if together is None else together.query.to(query_slopes)
            mixed = (responses.T.to(session.dtype)) * slopes[:, None]
            tokens = session.on_parameters(directions.combined(mixed, session.blocks))
            for batch in session.walk_columns("TRAK, tokens", step):
                factor = 1.0 if together is None else together.share_of_loss(session, batch)
                session.add_terms(batch, tokens, factor=factor, used=used)
        notes = clipping_notes(session.trajectory, "the formula looks at the final weights alone")
        return {
            "sizes": SIZES,
            "checkpoints": [step],
            "damping": {"relative to the mean eigenvalue": self.relative_damping},
            "projection": {
                "dimension": size,
                "kind": "none" if directions.sides is None else "normal outer products by layer",
                "rank": inverse.rank,
                "seed": self.seed + number,
            },
            "notes": notes + use_notes(session),
        }

    def _directions(self, session: Session, number: int) -> Projection:
        """Of the member ``number``.

        Raises:
            ValueError: more than training examples that count, without damping.
            UnsupportedTrainingError: the loss is averaged over draws of its noise.
        """
        if session.draws > 1:
            raise UnsupportedTrainingError(
                f"TRAK takes the training loss for a function of one output, and its mean over "
                f"{session.draws} draws of noise is none. Attribute with draws=1, or use another "
                "estimator."
            )
        every = torch.arange(session.num_train)
        weights = session.curvature_weights(every, (0, session.trajectory.last_step))
        count = len(every) if weights is None else int((weights > 0).sum())
        asked = self.projection_dimension
        dimension = max(1, min(DIMENSION, count // _EXAMPLES_EACH)) if asked is None else asked
        dimension = min(dimension, session.num_parameters)
        if dimension > count and not self.relative_damping:
            raise ValueError(
                "projection_dimension must be at most the number of training examples that count, "
                f"{count}, got {dimension}: the second moments of the features, which are "
                f"inverted, would be singular. Take {max(1, count // 2)} or fewer, or a positive "
                "relative_damping."
            )
        seed = self.seed + number
        return Projection.drawn(session.blocks, dimension, seed, session.device, session.dtype)

    def _columns(
        self, session: Session, directions: Projection, features: list[_Features]
    ) -> Iterator[_Features]:
        """The features of what is scored: of the training examples, or of the edits' terms."""
        if isinstance(session.edits, GraphEditSet):
            raise UnsupportedTrainingError(
                "TRAK has a feature for each training example, and edits of a graph are none. Use "
                "InfluenceFunction, Source, Unrolled or TracIn."
            )
        if session.edits is not None:
            for batch in session.walk_columns("TRAK, edits", session.trajectory.last_step):
                yield _train_features(session, directions, batch)
            return
        own = session.num_train // session.num_processes
        memory = own * directions.dimension * session.dtype.itemsize
        total = -(-own // session.batch_size)
        yield from session.loop("TRAK, scores", features, max(total, len(features)), memory)


@dataclass(frozen=True)
class _Features:
    """Of a batch.

    Attributes:
        batch: without its data, once they are kept.
        values: projected gradients of the output, [batch, dimension].
        slopes: derivatives of the loss by the output, [batch].
        measured: the same pair for the measurement, where it is asked for and another function.
    """

    batch: Batch
    values: Tensor
    slopes: Tensor
    measured: tuple[Tensor, Tensor] | None = None

    def kept(self) -> _Features:
        """In main memory, for all training examples."""
        measured = self.measured and (self.measured[0].cpu(), self.measured[1])
        batch = replace(self.batch, data=None)
        return replace(self, batch=batch, values=self.values.cpu(), measured=measured)


@dataclass(frozen=True)
class _Together:
    """What the members of an ensemble share.

    Attributes:
        sink: of the scores of the ensemble.
        members: how many there are.
        train: mean derivative of the loss by the output, for all that is scored.
        query: mean derivative of the measurement, [query].
    """

    sink: ScoreSink
    members: int
    train: Tensor
    query: Tensor

    def scores(self, batch: Batch, products: Tensor) -> Tensor:
        """A member's share of the ensemble's scores, from its products of features."""
        slopes = self.train[_places(batch)].to(products)
        return self.query.to(products)[:, None] * products * slopes / self.members

    def share_of_loss(self, session: Session, batch: Batch) -> Tensor:
        """What a member's gradients of losses count by in the ensemble's scores, [batch]: the mean
        derivative by the output, over the member's own, which they contain."""
        own = session.output_slopes(batch.data, batch.examples).to(session.dtype)
        share = self.train[_places(batch)].to(own) / self.members / own
        return torch.where(own == 0, 0.0, share)


@dataclass(frozen=True)
class _Inverse:
    """The inverse of the features' second moments, on the directions that they span.

    Attributes:
        matrix: float64 [dimension, dimension].
        span: basis of these directions [dimension, rank]; None: all of them.
    """

    matrix: Tensor
    span: Tensor | None

    @staticmethod
    def of(moments: Tensor, dtype: torch.dtype) -> _Inverse:
        """Of moments of features that are known in ``dtype``.

        Directions without any feature are common: log-odds do not change if all logits do.
        """
        size = len(moments)
        least = max(torch.finfo(dtype).eps ** 1.5, 8 * size * torch.finfo(moments.dtype).eps)
        factor, failed = torch.linalg.cholesky_ex(moments)
        pivots = factor.diagonal().square()
        if not bool(failed) and bool(pivots.min() > least * pivots.max()):
            return _Inverse(torch.cholesky_inverse(factor), None)
        values, vectors = torch.linalg.eigh(moments)
        spanned = values > least * values.max()
        basis = vectors[:, spanned]
        return _Inverse((basis / values[spanned]) @ basis.T, basis)

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(self.matrix) if self.span is None else self.span.shape[1]

    def require_spanned(
        self, session: Session, features: Tensor, kind: str, numbers: Tensor
    ) -> None:
        """Refuse features [batch, dimension] that the training examples' do not span.

        Raises:
            ValueError: names the first of them.
        """
        if self.span is None:
            return
        rows = features.double()
        outside = (rows - (rows @ self.span) @ self.span.T).norm(dim=1)
        beyond = outside > _APART * rows.norm(dim=1)
        first = int(numbers[beyond.to(numbers.device).int().argmax()])
        session.require(
            not bool(beyond.any()),
            ValueError(
                "The second moments of the features are singular: the gradients of the training "
                f"examples that count span {self.rank} of {len(self.matrix)} dimensions, and "
                f"{kind} {first} has a part outside of them. Take a projection_dimension of "
                f"{self.rank} at most, or a positive relative_damping."
            ),
        )


def _train_features(
    session: Session, directions: Projection, batch: Batch, checked: bool = False
) -> _Features:
    """Of a batch of training examples, with the measurement's where self-influence needs them."""
    gradients, slopes = session.output_gradients(batch.data, batch.examples)
    values, slopes = directions.coordinates(gradients.blocks), slopes.to(session.dtype)
    if checked:
        _require_function_of_output(session, directions, batch, values, slopes)
    if not session.self_influence or _measures_output(session):
        return _Features(batch, values, slopes)
    measured = session.measurement_gradients(batch.data, batch.examples)
    pair = (directions.coordinates(measured.blocks), torch.ones_like(slopes))
    return _Features(batch, values, slopes, pair)


def _query_features(session: Session, directions: Projection) -> tuple[Tensor, Tensor]:
    """Of all queries, [query, dimension], and the derivative of their measurements, [query]."""
    values, slopes = [], []
    for batch, indices in session.queries(0, session.num_query):
        if _measures_output(session):
            gradients, own = session.output_gradients(batch, indices)
        else:
            gradients = session.measurement_gradients(batch, indices)
            own = torch.ones_like(gradients.losses)
        values.append(directions.coordinates(gradients.blocks))
        slopes.append(own.to(session.dtype))
    return torch.cat(values), torch.cat(slopes)


def _mean_slopes(sessions: Sequence[Session]) -> tuple[Tensor, Tensor]:
    """Means over the members of the derivatives by the output: of the loss of all that is scored
    (this process's part of it), and of the queries' measurements."""
    first = sessions[0]
    terms = first.edits.terms if isinstance(first.edits, EditSet) else None
    count = first.num_train if terms is None else len(terms)
    train = torch.zeros(count, dtype=first.dtype)
    query = torch.zeros(first.num_query, dtype=first.dtype)
    for session in sessions:
        for batch in session.walk_columns("TRAK, derivatives", session.trajectory.last_step):
            own = session.output_slopes(batch.data, batch.examples)
            train[_places(batch)] += own.to("cpu", first.dtype) / len(sessions)
        for data, indices in session.queries(0, session.num_query):
            if _measures_output(session):
                own = session.output_slopes(data, indices)
                query[indices.cpu()] += own.to("cpu", first.dtype) / len(sessions)
            else:
                query[indices.cpu()] = 1
    return train, query


def _places(batch: Batch) -> Tensor:
    """Positions of a batch among all that is scored, in main memory."""
    return (batch.examples if batch.places is None else batch.places).cpu()


def _measures_output(session: Session) -> bool:
    """Whether the measurement is the loss, and so a function of the output."""
    return session.measures_loss and not session.measured_noise


def _require_function_of_output(
    session: Session, directions: Projection, batch: Batch, values: Tensor, slopes: Tensor
) -> None:
    """Compare the gradient of the training loss with that of the output times the derivative.

    Raises:
        ValueError: they differ.
    """
    expected = directions.coordinates(batch.gradients)
    found = values * slopes[:, None]
    rounding = 100 * torch.finfo(session.dtype).eps * values.norm()  # losses near 0 have no digits
    if not bool((found - expected).norm() <= _APART * expected.norm() + rounding):
        raise ValueError(
            f"The training loss is not a function of the output that {type(session.task).__name__}"
            ".model_output gives, or its derivative is another one: the gradients of "
            f"{len(values)} examples differ by {float((found - expected).norm()):.2g} of "
            f"{float(expected.norm()):.2g}. Give values and slopes that make up the gradient of "
            "train_loss."
        )
