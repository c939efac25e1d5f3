"""FastIF (Guo et al. 2020, 2012.15781): influence functions for each query's nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from tda_lightning.estimators.features import require_layer
from tda_lightning.estimators.influence import InfluenceFunction
from tda_lightning.estimators.neighbours import check_search, nearest
from tda_lightning.estimators.training_features import query_features, training_features
from tda_lightning.records.provenance import Provenance
from tda_lightning.session.session import Session

DEFAULT_K = 1000
_NO_SELF = (
    "No self-influence: it takes the gradients of all training examples, and only those near a "
    "query are computed here. InfluenceFunction has it."
)


@dataclass(kw_only=True)
class FastInfluence(InfluenceFunction):
    r"""Scores of :class:`InfluenceFunction` for the training examples nearest to each query.

    1. A forward pass over the training set computes the features of all examples, which are cached
       next to the trajectory for later attributions with any ``k``, ``metric`` and queries. The
       ``k`` nearest to a query are its candidates.
    2. The queries' gradients are multiplied by the inverse curvature, as in
       :class:`InfluenceFunction`.
    3. Gradients of the training loss are computed for the candidates only.

    A candidate's score is that of :class:`InfluenceFunction` with the same settings. All other
    examples are NaN in ``Scores.values``; ``Scores.candidates`` says which have a score.

    Attributes:
        k: candidates per query; None: 1000 (as in the paper), or all if there are fewer.
        layer: name of a module whose outputs are the features; None: the inputs of the last
            linear layer that the model calls, which a classifier's head sees. Sequences and images
            are averaged: see :func:`~tda_lightning.estimators.features.read_features`.
        metric: ``l2`` or ``cosine``.
        backend: ``torch``, or ``faiss`` if installed; the neighbours are the same.

    Raises:
        ImportError: at once, for ``backend="faiss"`` without FAISS.
        ValueError: at once, for impossible settings; when scoring, for more candidates than
            training examples, and for a layer that the model does not have or does not call, or
            that yields no features.

    References:
        | FastIF: Scalable Influence Functions for Efficient Model Interpretation and Debugging
          (Guo et al., 2020), sec. 3
        | https://arxiv.org/abs/2012.15781

    Example:
        Of the inputs (2, 0), (2, 0), (0, 1) and (0, 1), the last two are nearest to the query
        (1, 1). Their scores are those of the influence function.

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

    def score(self, session: Session) -> Provenance:
        """Find the candidates by their features, then score them."""
        if self.k is not None and self.k > session.num_train:
            raise ValueError(
                f"k must be at most the number of training examples, {session.num_train}; got "
                f"{self.k}. Without k, all of them are candidates where there are fewer than "
                f"{DEFAULT_K}."
            )
        if session.edits is not None:
            raise ValueError(
                "FastInfluence scores the removal of each query's nearest training examples: "
                "expected no edits. Use InfluenceFunction for them."
            )
        if self.layer is not None:
            require_layer(session.module, self.layer)
        k = min(DEFAULT_K, session.num_train) if self.k is None else self.k
        features = training_features(session, self.layer)
        points = query_features(session, self.layer, features)
        candidates = nearest(points, features.values, k, self.metric, self.backend, session.device)
        session.scores.set_candidates(candidates)
        made = self.score_candidates(session, candidates)
        made["candidates"] = {
            "k": k,
            "examples": len(candidates.unique()),
            "features": features.place,
            "metric": self.metric,
        }
        made["notes"] += [_NO_SELF] if session.self_influence else []
        return made
