"""Which line of user code draws random numbers."""

from __future__ import annotations

import sys
from collections import Counter

Site = tuple[str, int, int]  # file, line, and how often it was reached in this run

_BETWEEN = ("torch.", "tda_lightning.tasks.", "tda_lightning.gradients.")  # code and its draws


class Sites:
    """Names the draws of a run of a step, one after the other."""

    def __init__(self) -> None:
        self._hits: Counter[tuple[str, int]] = Counter()

    def restart(self) -> None:
        """Begin a run."""
        self._hits.clear()

    def following(self) -> Site:
        """Of the draw under way: the innermost line that is neither torch's nor ours."""
        frame = sys._getframe(1)
        while frame.f_back is not None:
            name = frame.f_globals.get("__name__", "") + "."
            if not name.startswith(_BETWEEN):
                break
            frame = frame.f_back
        line = (frame.f_code.co_filename, frame.f_lineno)
        self._hits[line] += 1
        return (*line, self._hits[line])
