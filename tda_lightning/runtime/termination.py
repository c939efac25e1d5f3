"""SIGTERM ends work that Lightning would let go on.

While a ``Trainer`` runs, Lightning handles SIGTERM itself: it sets a flag that its loops look at
between batches. An attribution is one batch of a prediction loop, however many hours it takes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ended_by_sigterm(pass_on: Callable[[int], None]) -> Iterator[None]:
    """Within the block SIGTERM raises ``SystemExit(143)``, so that everything is put back and
    nothing half-written stays.

    Args:
        pass_on: hands the signal to other processes of the same work.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread alone
        return

    def end(number: int, frame: FrameType | None) -> None:
        pass_on(number)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if before is not None:  # set by other than Python
            signal.signal(signal.SIGTERM, before)
