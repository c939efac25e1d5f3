"""A progress bar for work that may well be over before anyone would look at one."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress

_PATIENCE = 2.0  # seconds without a bar


class SlowProgress:
    """A bar on the terminal's standard error once two seconds have passed."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._began = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> SlowProgress:
        return self

    def advance(self) -> None:
        """One of ``total`` is done."""
        self._done += 1
        if self._bar is None and time.monotonic() - self._began > _PATIENCE:
            console = Console(stderr=True)
            self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
