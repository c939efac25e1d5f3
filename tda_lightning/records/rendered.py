"""What an example looks like to a reader: a picture, a sound, a text or a row of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Rendered:
    """One example as a reader wants to see it.

    Attributes:
        caption: a few words under it, such as the name of its label.
        image: [height, width], [height, width, 3] or [3, height, width]; uint8, or floats, which
            are stretched to the full range unless they lie in 0 to 1.
        text: shown as it is, shortened if long.
        row: cells of a table row, by the names of their columns.
        pieces: the text in pieces, each with the position of its term in the example's loss, or
            None if it has none; shaded where there are scores of single terms
            (``Scores.by_token``). Without ``text``, they are the text.
        sound: samples [sample] or [channel, sample], as floats in -1 to 1 or as integers, and their
            number per second; the first seconds become a player.
    """

    caption: str = ""
    image: Tensor | np.ndarray | None = None
    text: str | None = None
    row: Mapping[str, object] | None = None
    pieces: Sequence[tuple[str, int | None]] | None = None
    sound: tuple[Tensor | np.ndarray, int] | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.pieces is not None:
            object.__setattr__(self, "text", "".join(piece for piece, _ in self.pieces))


class Renderer(Protocol):
    """Shows an example to a reader; data modules offer it as ``render``."""

    def __call__(self, split: str, index: int) -> Rendered:
        """Example ``index`` of ``split``, which is "train" or "query"."""
