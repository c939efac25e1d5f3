"""Scores of groups: sums by any column of the data, group by group and by segment, and which
groups of queries the training set hardly covers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tda_lightning.records.scores import Scores
from tda_lightning.report.columns import Column
from tda_lightning.report.query_order import Judged

_MOST_COLUMNS = 8


@dataclass(frozen=True)
class GroupSums:
    """Scores of all queries, summed over the groups of one column.

    Attributes:
        column: of the training set.
        sums: [query, group].
        by_segment: [segment, query, group], or None.
    """

    column: Column
    sums: Tensor
    by_segment: Tensor | None


@dataclass(frozen=True)
class Region:
    """A group of queries and what the training set has for it.

    Attributes:
        column: of the queries.
        group: its name.
        queries: how many there are.
        training: number of training examples of the same group.
        wrong: share of wrong predictions; None where unknown.
        measurement: mean over the group; None where unknown.
        strength: sum of a query's positive scores, mean over the group.
        proponents: effective number of a query's proponents, likewise.
        few_and_weak: whether both are below half of their median over the column's groups.
    """

    column: str
    group: str
    queries: int
    training: int
    wrong: float | None
    measurement: float | None
    strength: float
    proponents: float
    few_and_weak: bool


def group_sums(scores: Scores, columns: list[Column]) -> list[GroupSums]:
    """Sums for the first eight columns; none where some examples have no score."""
    if not scores.is_complete:
        return []
    found = []
    for column in columns[:_MOST_COLUMNS]:
        groups, count = torch.from_numpy(column.train), len(column.groups)
        parts = None
        if scores.by_segment is not None:
            parts = torch.stack([_summed(part, groups, count) for part in scores.by_segment])
        found.append(GroupSums(column, _summed(scores.values, groups, count), parts))
    return found


def _summed(values: Tensor, groups: Tensor, count: int) -> Tensor:
    sums = torch.zeros(len(values), count, dtype=torch.float64)
    for query, row in enumerate(values):  # the file may be larger than memory
        sums[query].index_add_(0, groups, row.double())
    return sums


def matrix(sums: Tensor, column: Column) -> Tensor:
    """Mean over the queries of each group of ``column``: [query group, training group]."""
    assert column.query is not None
    means = torch.zeros(len(column.groups), sums.shape[1], dtype=torch.float64)
    members = torch.from_numpy(column.query)
    means.index_add_(0, members, sums)
    return means / members.bincount(minlength=len(column.groups)).clamp(min=1)[:, None]


def proponents_in_all(scores: Scores, helps: int = 1) -> tuple[Tensor, Tensor]:
    r"""For each query, the sum of its positive scores, and the effective number of its proponents,
    :math:`(\sum_n s_n)^2 / \sum_n s_n^2`: k equal ones count k."""
    strength, number = [], []
    for values in scores.values:
        positive = (helps * torch.nan_to_num(values.double())).clamp(min=0)
        total, square = float(positive.sum()), float(positive.square().sum())
        strength.append(total)
        number.append(total * total / square if square > 0 else 0.0)
    return torch.tensor(strength), torch.tensor(number)


def regions(
    strength: Tensor, number: Tensor, columns: list[Column], judged: Judged
) -> list[Region]:
    """The groups of queries, the least covered of each column first."""
    found = []
    for column in columns[:_MOST_COLUMNS]:
        if column.query is None:
            continue
        sizes = np.bincount(column.train, minlength=len(column.groups))
        rows = []
        for place, name in enumerate(column.groups):
            members = np.flatnonzero(column.query == place).tolist()
            if not members:
                continue
            known = [
                judged.wrong[q] for q in members if judged.wrong and judged.wrong[q] is not None
            ]
            rows.append(
                Region(
                    column.name,
                    name,
                    len(members),
                    int(sizes[place]),
                    sum(map(bool, known)) / len(known) if known else None,
                    float(np.mean([judged.measurements[q] for q in members]))
                    if judged.measurements
                    else None,
                    float(strength[members].mean()),
                    float(number[members].mean()),
                    False,
                )
            )
        found += _marked(rows)
    return found


def _marked(rows: list[Region]) -> list[Region]:
    """Sorted by strength, with those marked that have few and weak proponents."""
    if not rows:
        return []
    weak = float(np.median([row.strength for row in rows])) / 2
    few = float(np.median([row.proponents for row in rows])) / 2
    marked = [
        Region(**{**vars(row), "few_and_weak": row.strength < weak and row.proponents < few})
        for row in rows
    ]
    return sorted(marked, key=lambda row: row.strength)
