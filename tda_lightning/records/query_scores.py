"""The scores of one query: a row of :class:`~tda_lightning.Scores` with what is known of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tda_lightning.records.display import fact_lines, html_facts, html_rows
from tda_lightning.records.ranking import ranked

_SHOWN = 5  # proponents, and as many opponents, in a notebook


@dataclass(frozen=True, eq=False, repr=False)
class QueryScores:
    """What ``scores[query]`` gives.

    Attributes:
        query: its position in the query set.
        values: [train].
        by_segment: [segment, train]; None for an estimator without segments.
        by_token: [train, position]; None when it was not asked for.
        candidates: the examples that have a score, int64 [k], nearest first; None: all.
        members: [member, train], the scores of each run of an ensemble; None for a single run.
        measurement: of the final model; None if not known.
        prediction: of the final model, in words; None if not known.
    """

    query: int
    values: Tensor
    by_segment: Tensor | None = None
    by_token: Tensor | None = None
    candidates: Tensor | None = None
    members: Tensor | None = None
    measurement: float | None = None
    prediction: str | None = None

    def proponents(self, k: int = 10) -> tuple[Tensor, Tensor]:
        """Indices and scores of the ``k`` examples that helped most, as
        :meth:`tda_lightning.Scores.proponents`."""
        return ranked(self.values, self.candidates, k, descending=True)

    def opponents(self, k: int = 10) -> tuple[Tensor, Tensor]:
        """Indices and scores of the ``k`` examples that harmed most."""
        return ranked(self.values, self.candidates, k, descending=False)

    def _facts(self) -> dict[str, object]:
        scored = len(self.values) if self.candidates is None else len(self.candidates)
        facts: dict[str, object] = {"training examples": scored}
        if self.prediction is not None:
            facts["prediction"] = self.prediction
        if self.measurement is not None:
            facts["measurement"] = self.measurement
        k = min(_SHOWN, scored)
        if k:
            facts["most helpful"] = pairs(*self.proponents(k))
            facts["most harmful"] = pairs(*self.opponents(k))
        return facts

    def __repr__(self) -> str:
        return fact_lines(f"Scores of query {self.query}", self._facts())

    def _repr_html_(self) -> str:
        return html_facts(f"Scores of query {self.query}", self._facts())


def pairs(indices: Tensor, values: Tensor) -> str:
    """Examples with their scores, in a line.

    Example:
        >>> import torch
        >>> pairs(torch.tensor([3, 1]), torch.tensor([0.5, -0.25]))
        '3 (0.5), 1 (-0.25)'
    """
    both = zip(indices.tolist(), values.tolist(), strict=True)
    return ", ".join(f"{index} ({value:.3g})" for index, value in both)


def query_rows(rows: list[QueryScores], total: int) -> str:
    """Some queries as a table for a notebook."""
    table = []
    for row in rows:
        k = min(3, len(row.values) if row.candidates is None else len(row.candidates))
        best, worst = (pairs(*row.proponents(k)), pairs(*row.opponents(k))) if k else ("", "")
        measured = "" if row.measurement is None else row.measurement
        table.append([row.query, row.prediction or "", measured, best, worst])
    note = f"{total - len(rows)} more queries: scores[query]" if total > len(rows) else ""
    columns = ("query", "prediction", "measurement", "most helpful", "most harmful")
    return html_rows(columns, table, note)
