"""FastIF (Guo et al. 2020, 2012.15781): influence functions of each query's nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from tda_lightning.estimators.features import require_layer
from tda_lightning.estimators.influence import InfluenceFunction
from tda_lightning.estimators.kept_features import KeptFeatures
from tda_lightning.estimators.neighbours import check_search, nearest
from tda_lightning.session.passes import Plan, Session

DEFAULT_K = 1000
_NO_SELF = (
    "No self-influence: it takes the gradients of all training examples, of which those without "
    "a query near them are spared here. InfluenceFunction has it."
)


@dataclass(kw_only=True)
class FastInfluence(InfluenceFunction):
    r"""Scores of :class:`InfluenceFunction` for the training examples nearest to each query.

    (1) A forward pass over the training set gives the features of every example, kept beside the
    trajectory for later attributions with any ``k``, ``metric`` and queries. The ``k`` nearest to a
    query are its candidates. (2) Products of the inverse curvature with the queries' gradients, as
    :class:`InfluenceFunction` has them. (3) Gradients of the training loss, of candidates alone.

    A candidate's score is that of :class:`InfluenceFunction` with the same settings. Every other
    example has none: NaN in ``Scores.values``; ``Scores.candidates`` tells which have one.

    Attributes:
        k: candidates of each query; None for 1000 (the paper's), or all where there are fewer.
        layer: name of a module whose outputs are the features; None for the inputs of the last
            linear layer that the model calls, the hidden features that a classifier's head sees.
            Sequences and images are averaged: see
            :func:`~tda_lightning.estimators.features.read_features`.
        metric: ``l2`` or ``cosine``.
        backend: ``torch``, or ``faiss`` where it is installed; the neighbours are the same.

    Raises:
        ImportError: at once, for ``backend="faiss"`` without FAISS.
        ValueError: at once for impossible settings; when planning, for more candidates than
            training examples and for a layer that the model does not have; in the first pass, for
            one that is not called or gives no features.

    References:
        | FastIF: Scalable Influence Functions for Efficient Model Interpretation and Debugging
          (Guo et al., 2020), sec. 3
        | https://arxiv.org/abs/2012.15781

    Example:
        Of the inputs (2, 0), (2, 0), (0, 1) and (0, 1), the last two are nearest to the query
        (1, 1). They have the scores of the influence function.

        >>> from tda_lightning.examples.least_squares import least_squares_scores
        >>> least_squares_scores(FastInfluence(k=2, damping=0.0))
        tensor([    nan,     nan, -1.5000,  1.5000])
    """

    k: int | None = None
    layer: str | None = None
    metric: str = "l2"
    backend: str = "torch"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_search(self.metric, self.backend)
        if self.k is not None and self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}.")

    def plan(self, context: Session) -> Plan:
        """Gather features where none are kept; then find the candidates and score them."""
        if self.k is not None and self.k > context.num_train:
            raise ValueError(
                f"k must be at most the number of training examples, {context.num_train}; got "
                f"{self.k}. Without k, all of them are candidates where there are fewer than "
                f"{DEFAULT_K}."
            )
        if self.layer is not None:
            require_layer(context.module, self.layer)
        features = KeptFeatures(context, self.layer)
        if passes := features.passes():
            return Plan(passes, then=lambda: self._scoring(context, features))
        return self._scoring(context, features)

    def _scoring(self, context: Session, features: KeptFeatures) -> Plan:
        k = min(DEFAULT_K, context.num_train) if self.k is None else self.k
        points = features.of_queries()
        candidates = nearest(points, features.values, k, self.metric, self.backend, context.device)
        context.scores.set_candidates(candidates)
        plan = self._planned(context, candidates)
        plan.provenance["candidates"] = {
            "k": k,
            "examples": len(candidates.unique()),
            "features": features.place,
            "metric": self.metric,
        }
        plan.notes += [_NO_SELF] if context.self_influence else []
        return plan
