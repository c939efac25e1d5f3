"""What a session adds up over its walks beside the scores: self-influence, and scores by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.runtime.free_memory import free_memory


@dataclass
class Totals:
    """Sums of this process so far; copies of a session (its restrictions) add to the same ones.

    Attributes:
        self_influence: [train]; None: nothing was added.
        by_token: [query, column, position]; None: nothing was added.
    """

    self_influence: Tensor | None = None
    by_token: Tensor | None = None

    @property
    def positions(self) -> int:
        """Positions of the scores by token so far."""
        return 0 if self.by_token is None else self.by_token.shape[2]

    def terms(
        self, queries: int, columns: int, positions: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The scores by token, with room for so many positions."""
        own = self.by_token
        if own is not None and own.shape[2] >= positions:
            return own
        size = queries * columns * positions * dtype.itemsize
        if size > free_memory():
            raise ValueError(
                f"Scores by token of {queries} queries, {columns} training examples and "
                f"{positions} positions take {size / 2**30:.1f} GiB, and "
                f"{free_memory() / 2**30:.1f} GiB are free. Ask for fewer queries at a time."
            )
        longer = torch.zeros(queries, columns, positions, dtype=dtype, device=device)
        if own is not None:
            longer[:, :, : own.shape[2]] = own
        self.by_token = longer
        return longer
