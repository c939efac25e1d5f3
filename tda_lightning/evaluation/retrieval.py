"""Do the proponents look as one would expect? Judgements that need no retraining.

They ask whether proponents are *related* to the query (its class, its subclass, a shortcut, a
source of data), not whether they *caused* the prediction. Similarity of embeddings, which knows
nothing of training, does best at most of them: to find related examples, take similarity, or
:func:`times_similarity`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from tda_lightning.evaluation.linear_datamodeling import Interval, NothingToRankError, bootstrap
from tda_lightning.records.provenance import well_formed
from tda_lightning.records.scores import Scores


def shared_group(
    scores: Scores | Tensor,
    train_groups: Sequence[Hashable] | Tensor,
    query_groups: Sequence[Hashable] | Tensor,
    k: int = 5,
) -> Interval:
    r"""Share of each query's ``k`` strongest proponents that are of the query's own group.

    .. math::
        \frac1{Qk} \sum_q \big|\{n \in \mathrm{top}_k(s_q) : g_n = g_q\}\big|

    With classes as groups this is *class detection*; with finer classes than the model was trained
    to tell apart, *subclass detection*. Chance is the group's share of the training set.

    Args:
        scores: [query, train].
        train_groups: a label for each training example.
        query_groups: a label for each query: of class detection, the class that was explained.
        k: number of proponents; among equal scores those with the lower index.

    References:
        | Evaluation of Similarity-Based Explanations (Hanawa et al., 2021), sec. 3
        | Quanda (Bareeva et al., 2024), https://arxiv.org/abs/2410.07158

    Example:
        >>> scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
        >>> shared_group(scores, ["a", "b", "a"], ["a", "c"], k=2).value
        0.25
    """
    values = _values(scores)
    own, asked = _labels(train_groups), _labels(query_groups)
    if (len(asked), len(own)) != tuple(values.shape):
        raise ValueError(
            f"Expected a group for each of {values.shape[0]} queries and {values.shape[1]} "
            f"training examples, got {len(asked)} and {len(own)}."
        )
    number = {group: place for place, group in enumerate(dict.fromkeys([*own, *asked]))}
    columns = torch.tensor([number[group] for group in own])
    rows = torch.tensor([number[group] for group in asked])
    shares = [
        (columns[_order(row, k)] == group).double().mean()
        for row, group in zip(values, rows, strict=True)
    ]
    return bootstrap(torch.stack(shares))


def average_precision(scores: Scores | Tensor, sought: Tensor) -> Interval:
    r"""Area under the precision-recall curve of finding ``sought`` examples by large scores.

    .. math::
        \sum_i (R_i - R_{i-1})\, P_i

    over the distinct scores from the largest, so ties are inspected together. Examples without a
    score come last. Chance is their share of the training set. With the examples of another source
    that were mixed into one class as ``sought``, and queries of that source, this is *mixed data
    detection* (Hammoudeh & Lowd 2022); with examples that carry a shortcut, and queries that were
    misled by it, *shortcut detection* (Koh & Liang 2017; Yang et al. 2023).

    Args:
        scores: [query, train].
        sought: bool [train], or [query, train]. A query for which nothing is sought is left out.

    References:
        | Quanda (Bareeva et al., 2024), https://arxiv.org/abs/2410.07158

    Example:
        >>> sought = torch.tensor([True, True, False])
        >>> round(average_precision(torch.tensor([[0.9, 0.1, 0.5]]), sought).value, 4)
        0.8333
    """
    values = _values(scores)
    found = []
    for row, wanted in zip(values, _sought(values, sought), strict=True):
        ordered, order = _scored(row).sort(descending=True, stable=True)
        hits = wanted[order].double().cumsum(0)
        last = torch.cat([ordered[1:] != ordered[:-1], torch.tensor([True])])
        hits, inspected = hits[last], (last.nonzero().squeeze(1) + 1).double()
        gained = torch.diff(hits, prepend=hits.new_zeros(1))
        found.append((gained * hits / inspected).sum() / hits[-1])  # 0 / 0 where nothing is sought
    return _over_queries(found)


def recall_within(scores: Scores | Tensor, sought: Tensor, k: int) -> Interval:
    """Share of the ``sought`` examples among each query's ``k`` strongest proponents (Recall@k).

    Args:
        scores: [query, train].
        sought: bool [train], or [query, train]: such as the sentences that state a fact.
        k: number of proponents.

    References:
        | DATE-LM: Benchmarking Data Attribution Evaluation for Large Language Models (Jiao et al.,
        | 2025), factual attribution, https://arxiv.org/abs/2507.09424
    """
    values = _values(scores)
    found = [
        wanted[_order(row, k)].double().sum() / wanted.double().sum()
        for row, wanted in zip(values, _sought(values, sought), strict=True)
    ]
    return _over_queries(found)


def reciprocal_rank(scores: Scores | Tensor, sought: Tensor) -> Interval:
    """One over the rank of the first ``sought`` example, mean over queries (MRR).

    Args:
        scores: [query, train].
        sought: bool [train], or [query, train].

    Example:
        >>> sought = torch.tensor([False, True, True])
        >>> reciprocal_rank(torch.tensor([[3.0, 2.0, 1.0]]), sought).value
        0.5
    """
    values = _values(scores)
    found = []
    for row, wanted in zip(values, _sought(values, sought), strict=True):
        places = wanted[_order(row, len(row))].nonzero()
        first = int(places[0]) + 1 if len(places) else None
        found.append(torch.tensor(torch.nan if first is None else 1 / first))
    return _over_queries(found)


def top_cardinality(scores: Scores | Tensor, k: int = 1) -> float:
    r"""How different the queries' proponents are: distinct examples among all top ``k``, over Qk.

    1 if no two queries share a proponent, :math:`1/Q` if all have the same ones, as scores have
    that are led by a few examples of large gradients.

    References:
        | RelatIF (Barshan et al., 2020), https://arxiv.org/abs/2003.11630
        | Quanda (Bareeva et al., 2024), https://arxiv.org/abs/2410.07158

    Example:
        >>> top_cardinality(torch.tensor([[2.0, 1.0], [2.0, 0.0]]))
        0.5
    """
    values = _values(scores)
    top = torch.stack([_order(row, k) for row in values])
    return len(top.unique()) / top.numel()


def times_similarity(scores: Scores, similarity: Scores | Tensor) -> Scores:
    r"""Influence among similar examples: :math:`s_{qn} \max(0, c_{qn})`.

    For where related examples are wanted (an explanation to read, :func:`shared_group`), as FastIF
    scores none but nearest neighbours. The result has no unit and predicts no retraining.

    Args:
        scores: [query, train].
        similarity: cosines [query, train], such as
            :func:`~tda_lightning.evaluation.last_layer_cosine`.

    Example:
        >>> cosines = torch.tensor([[1.0, 0.5, -0.2]])
        >>> times_similarity(Scores(torch.tensor([[1.0, 4.0, 9.0]])), cosines).values
        tensor([[1., 2., 0.]])
    """
    weights = _values(similarity)
    if weights.shape != scores.values.shape:
        raise ValueError(
            f"Expected similarities of shape {list(scores.values.shape)}, one for each score, got "
            f"{list(weights.shape)}."
        )
    values = scores.values * weights.clamp(min=0).to(scores.values)
    made = well_formed(scores.provenance).get("estimator", "unknown")
    return Scores(
        values, candidates=scores.candidates, provenance={"estimator": f"{made} x similarity"}
    )


def _values(scores: Scores | Tensor) -> Tensor:
    values = scores.values if isinstance(scores, Scores) else scores
    if values.ndim != 2 or not len(values):
        raise ValueError(f"Expected scores [query, train], got shape {list(values.shape)}.")
    return values.detach().cpu()


def _labels(groups: Sequence[Hashable] | Tensor) -> list[Hashable]:
    """Elements of a tensor hash by identity, their Python numbers by value."""
    listed = groups.tolist() if isinstance(groups, Tensor) else groups
    return [label.item() if isinstance(label, Tensor) else label for label in listed]


def _sought(values: Tensor, sought: Tensor) -> Tensor:
    """bool [query, train]."""
    shapes = (tuple(values.shape), tuple(values.shape[1:]))
    if sought.dtype != torch.bool or tuple(sought.shape) not in shapes:
        raise ValueError(
            f"sought must be bool of shape {list(shapes[1])} or {list(shapes[0])}, got "
            f"{sought.dtype} of shape {list(sought.shape)}."
        )
    return sought.cpu().expand_as(values)


def _scored(row: Tensor) -> Tensor:
    """Examples without a score come last."""
    return row.double().where(~row.isnan(), -torch.inf)


def _order(row: Tensor, k: int) -> Tensor:
    """The ``k`` examples with the largest scores."""
    if not 1 <= k <= len(row):
        raise ValueError(
            f"k must be between 1 and the number of training examples, {len(row)}; got {k}."
        )
    # A stable sort, not topk: ties must not depend on the machine.
    return _scored(row).sort(descending=True, stable=True).indices[:k]


def _over_queries(found: Sequence[Tensor]) -> Interval:
    per_query = torch.stack([value.double() for value in found])
    if bool(per_query.isnan().all()):
        raise NothingToRankError("Nothing is sought for any query.")
    return bootstrap(per_query)
