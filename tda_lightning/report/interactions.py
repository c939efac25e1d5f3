"""Which groups of training examples help or harm which groups of queries: a table and a picture.

The second application of FastIF (Guo et al. 2021, https://arxiv.org/abs/2012.15781): groups are
classes, subclasses, sources, or clusters of features where nothing else is known
(:func:`tda_lightning.evaluation.feature_clusters`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from tda_lightning.records.scores import Scores

_CELL, _LEFT, _TOP = 56, 150, 110
_HELPS, _HARMS = "47,127,181", "209,98,45"  # as proponents and opponents elsewhere
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.faint{font-size:11px}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.back{fill:#161616}}"
)


@dataclass(frozen=True)
class Interactions:
    r"""Scores group by group.

    Attributes:
        train: names of the groups of training examples.
        query: names of the groups of queries.
        sums: what removing a whole group is predicted to do to a query of the other, mean over its
            queries, to first order: float64 [query group, train group].
        means: the same for one example of the group: sums over its size.
        helps: share of the pairs with a positive score.
        sizes: number of training examples in each group, int64 [train group].
        queries: number of queries in each group, int64 [query group].
    """

    train: list[Hashable]
    query: list[Hashable]
    sums: Tensor
    means: Tensor
    helps: Tensor
    sizes: Tensor
    queries: Tensor

    def table(self) -> str:
        """In Markdown: the sum, and the share of the pairs that help."""
        heads = [f"{name} ({int(size)})" for name, size in zip(self.train, self.sizes, strict=True)]
        lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for row, name in enumerate(self.query):
            cells = [
                f"{float(total):+.2g} ({float(share):.0%})"
                for total, share in zip(self.sums[row], self.helps[row], strict=True)
            ]
            lines.append(f"| {name} ({int(self.queries[row])}) | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def picture(self) -> str:
        """A heat map as SVG: a cell's colour is the mean score of its pairs, blue where training
        examples help the queries of its row and orange where they harm, in proportion to the
        largest; its number is the sum over the group."""
        width = _LEFT + _CELL * len(self.train) + 10
        height = _TOP + _CELL * len(self.query) + 10
        largest = float(self.means.abs().max()) or 1.0
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            'aria-label="Scores by group of queries and group of training examples">'
            f'<style>{_STYLE}</style><rect class="back" width="{width}" height="{height}" '
            'fill="#fff"/>'
        ]
        for column, name in enumerate(self.train):
            x = _LEFT + _CELL * (column + 0.5)
            parts.append(
                f'<text x="{x}" y="{_TOP - 8}" transform="rotate(-40 {x} {_TOP - 8})">'
                f"{escape(str(name))}</text>"
            )
        for row, name in enumerate(self.query):
            y = _TOP + _CELL * row
            parts.append(
                f'<text x="{_LEFT - 8}" y="{y + _CELL / 2 + 4}" text-anchor="end">'
                f"{escape(str(name))}</text>"
            )
            for column, other in enumerate(self.train):
                mean, total = float(self.means[row, column]), float(self.sums[row, column])
                colour = _HELPS if mean >= 0 else _HARMS
                said = f"{name} from {other}: {total:+.3g}, {float(self.helps[row, column]):.0%}"
                x = _LEFT + _CELL * column
                parts.append(
                    f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_CELL - 2}" '
                    f'fill="rgba({colour},{abs(mean) / largest:.3f})"><title>{escape(said)} help'
                    f'</title></rect><text class="faint" x="{x + _CELL / 2 - 1}" '
                    f'y="{y + _CELL / 2 + 4}" text-anchor="middle">{total:+.2g}</text>'
                )
        return "".join([*parts, "</svg>\n"])


def interactions(
    scores: Scores,
    train_groups: Sequence[Hashable] | Tensor,
    query_groups: Sequence[Hashable] | Tensor,
) -> Interactions:
    """Scores by group of queries and group of training examples.

    Args:
        scores: [query, train], of every training example.
        train_groups: a label for each training example.
        query_groups: a label for each query.

    Raises:
        ValueError: another number of labels, or examples without a score.

    Example:
        >>> scores = Scores(torch.tensor([[1.0, 2.0, -4.0], [3.0, 0.0, 2.0]]))
        >>> interactions(scores, ["a", "a", "b"], ["x", "x"]).sums
        tensor([[ 3., -1.]], dtype=torch.float64)
    """
    asked = query_groups.tolist() if isinstance(query_groups, Tensor) else list(query_groups)
    if len(asked) != scores.num_queries:
        raise ValueError(
            f"query_groups must hold one label for each of the {scores.num_queries} queries, got "
            f"{len(asked)}."
        )
    summed = scores.by_group(train_groups)
    positive = Scores((scores.values > 0).to(scores.values)).by_group(train_groups)
    sizes = Scores(torch.ones(1, scores.num_train)).by_group(train_groups).values[0].long()
    names: list[Any] = list(dict.fromkeys(asked))
    with suppress(TypeError):  # labels of several types have no order
        names = sorted(names)
    rows = torch.tensor([names.index(name) for name in asked])
    queries = rows.bincount(minlength=len(names))

    def averaged(values: Tensor) -> Tensor:
        means = torch.zeros(len(names), values.shape[1], dtype=torch.float64)
        return means.index_add_(0, rows, values.double()) / queries[:, None]

    sums = averaged(summed.values)
    helps = averaged(positive.values) / sizes
    return Interactions(summed.labels, names, sums, sums / sizes, helps, sizes, queries)
