"""Which positions of a query a measurement is about: tokens, spans, or all that count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tda_lightning.measurements.outputs import ClassOutputs
from tda_lightning.tasks.loss_calls import inside_transform

_NONE = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Positions:
    """Positions of all queries alike, or of each its own.

    A position is that of a term of the loss, as in ``Scores.by_token``: position t of a language
    model predicts the token after t + 1 inputs. A negative one counts from the last position that
    counts in the loss.

    Attributes:
        chosen: int64 [1 or query, most positions], filled up with a number that is none.
    """

    chosen: Tensor

    @staticmethod
    def of(positions: Any, span: Any) -> Positions | None:
        """From what a user gave; None for all positions that count.

        Raises:
            ValueError: it is neither whole numbers nor lists of them.
        """
        if positions is not None and span is not None:
            raise ValueError("Give positions or span, not both.")
        if span is not None:
            spans = [span] if _is_pair(span) else span
            if not _is_list(spans) or not spans or not all(map(_is_pair, spans)):
                raise ValueError(f"span must be [start, stop], or one for each query; got {span!r}")
            for start, stop in spans:
                if not 0 <= start < stop:
                    raise ValueError(
                        f"span must be [start, stop] with 0 <= start < stop, got {[start, stop]}."
                    )
            rows = [list(range(start, stop)) for start, stop in spans]
            return Positions._filled(rows)
        if positions is None:
            return None
        if _is_number(positions):
            return Positions._filled([[positions]])
        if _is_list(positions) and positions and all(map(_is_number, positions)):
            return Positions._filled([list(positions)])
        nested = _is_list(positions) and positions and all(map(_is_list, positions))
        if not nested or not all(row and all(map(_is_number, row)) for row in positions):
            raise ValueError(
                "positions must be a whole number, a list of them, or such a list for each query; "
                f"got {positions!r:.200}."
            )
        return Positions._filled([list(row) for row in positions])

    @staticmethod
    def _filled(rows: Sequence[Sequence[int]]) -> Positions:
        longest = max(map(len, rows))
        return Positions(torch.tensor([[*row, *[_NONE] * (longest - len(row))] for row in rows]))

    def mask(self, found: ClassOutputs, queries: Tensor) -> Tensor:
        """Which positions they are in a batch, bool [batch, position].

        Raises:
            ValueError: one lies outside of its query.
        """
        counted = found.counted
        chosen = self.chosen.to(counted.device)
        own = chosen.expand(len(queries), -1) if len(chosen) == 1 else chosen[queries]
        places = torch.arange(counted.shape[1], device=counted.device)
        rank, total = counted.long().cumsum(1) - 1, counted.sum(1, keepdim=True)
        here = (own[:, :, None] == places).any(1)
        from_end = (own[:, :, None] == (rank - total)[:, None]).any(1)
        if not inside_transform():
            self._require_inside(own, total, counted.shape[1], queries)
        return here | (from_end & counted)

    def _require_inside(self, own: Tensor, total: Tensor, length: int, queries: Tensor) -> None:
        outside = ((own >= length) & (own != _NONE)) | (own < -total)
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise ValueError(
                f"Position {int(own[row, column])} lies outside of query {int(queries[row])}, "
                f"which has positions 0 to {length - 1}, {int(total[row])} of which count in its "
                "loss."
            )

    def in_words(self) -> str:
        """For the provenance."""
        if len(self.chosen) > 1:
            return "at chosen positions of each query"
        row = [p for p in self.chosen[0].tolist() if p != _NONE]
        if len(row) == 1:
            return f"at position {row[0]}" if row[0] != -1 else "at the last position"
        if row == list(range(row[0], row[-1] + 1)):
            return f"at positions {row[0]} to {row[-1]}"
        return f"at positions {', '.join(map(str, row[:12]))}{', ...' if len(row) > 12 else ''}"

    @property
    def count(self) -> int:
        """Queries that have their own; 1 for all alike."""
        return len(self.chosen)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_pair(value: Any) -> bool:
    return _is_list(value) and len(value) == 2 and all(map(_is_number, value))
