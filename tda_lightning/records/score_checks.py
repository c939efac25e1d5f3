"""Checks on scores: finite numbers, and candidates that are examples."""

from __future__ import annotations

import torch
from torch import Tensor

from tda_lightning.records.errors import NonFiniteError


def require_finite(
    values: Tensor, train_indices: Tensor | None = None, first_query: int = 0
) -> None:
    """Raise an error that names the first query and training example whose score is not finite.

    Args:
        values: [query, block].
        train_indices: the training example of each column; its position when None.
        first_query: the query of the first row.
    """
    # The sum of finite numbers may overflow, so it only says which rows to look at.
    for query in (~values.sum(1).isfinite()).nonzero().flatten().tolist():
        row = values[query]
        if not bool(row.isfinite().all()):
            column = int((~row.isfinite()).nonzero()[0])
            example = column if train_indices is None else int(train_indices[column])
            raise NonFiniteError(
                f"The score of query {first_query + query} for training example {example} is "
                f"{float(row[column])}. Check the data of both and the training for divergence."
            )


def require_candidates(candidates: Tensor, queries: int, train: int) -> None:
    """Check that candidates are the same number of distinct training examples for every query.

    Raises:
        ValueError: they are not.
    """
    if candidates.dtype != torch.int64 or candidates.ndim != 2 or len(candidates) != queries:
        raise ValueError(
            f"candidates must be int64 [{queries}, k], got {candidates.dtype} of shape "
            f"{list(candidates.shape)}."
        )
    if not candidates.numel():
        if queries:
            raise ValueError("candidates must name at least one training example for each query.")
        return
    ordered = candidates.sort(1).values
    if int(ordered[:, 0].min()) < 0 or int(ordered[:, -1].max()) >= train:
        raise ValueError(
            f"candidates must lie in 0 to {train - 1}, got {int(ordered[:, 0].min())} to "
            f"{int(ordered[:, -1].max())}."
        )
    if bool((ordered.diff(dim=1) == 0).any()):
        raise ValueError("candidates of a query must be different training examples.")


def require_scored(values: Tensor, candidates: Tensor) -> None:
    """Check that the candidates have finite scores, and that the other examples have none."""
    for query, (row, chosen) in enumerate(zip(values, candidates, strict=True)):
        require_finite(row[chosen][None], chosen, query)
        if int(row.isnan().sum()) != len(row) - len(chosen):
            raise ValueError(
                f"values must be NaN where an example is no candidate, got other scores of query "
                f"{query}."
            )


def require_finite_tokens(values: Tensor) -> None:
    """Raise an error that names the first term of an example whose score is not finite."""
    for query, rows in enumerate(values):  # one at a time: the file may be larger than memory
        if not bool(rows.isfinite().all()):
            example, position = (~rows.isfinite()).nonzero()[0].tolist()
            raise NonFiniteError(
                f"The score of query {query} for position {position} of training example {example} "
                f"is {float(rows[example, position])}. Check the data of both and the training for "
                "divergence."
            )


def require_finite_query_tokens(values: Tensor) -> None:
    """Raise an error that names the first token of a query with a score that is not finite."""
    for query, rows in enumerate(values):
        if not bool(rows.isfinite().all()):
            position, example = (~rows.isfinite()).nonzero()[0].tolist()
            raise NonFiniteError(
                f"The score of position {position} of query {query} for training example {example} "
                f"is {float(rows[position, example])}. Check the data of both and the training for "
                "divergence."
            )


def require_finite_self_influence(values: Tensor) -> None:
    """Raise an error that names the first training example whose self-influence is not finite."""
    if not bool(values.isfinite().all()):
        example = int((~values.isfinite()).nonzero()[0])
        raise NonFiniteError(
            f"The self-influence of training example {example} is {float(values[example])}. "
            "Check its data and the training for divergence."
        )
