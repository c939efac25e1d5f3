"""Progress bars for work that may well be over before anyone would look at one."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, TaskID

from tda_lightning.runtime.processes import rank_and_world

_PATIENCE = 2.0  # seconds without a bar

# Bars within bars share one display: a terminal has room for one at a time.
_open_bars: list[SlowProgress] = []
_display: list[Progress] = []


class SlowProgress:
    """A bar on the terminal's standard error, once the outermost one has run for two seconds. Of
    several processes the first one shows it.

    Args:
        title: a few words.
        total: how often :meth:`advance` will be called; None where it is not known.
    """

    def __init__(self, title: str, total: int | None = None) -> None:
        self._title, self._total, self._done = title, total, 0
        self._task: TaskID | None = None

    def __enter__(self) -> SlowProgress:
        self._began = time.monotonic()
        _open_bars.append(self)
        self._show()
        return self

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        self._show()
        if self._task is not None:
            _display[0].update(self._task, completed=self._done)

    def _show(self) -> None:
        if not _display and time.monotonic() - _open_bars[0]._began > _PATIENCE:
            console = Console(stderr=True)
            hidden = not console.is_terminal or rank_and_world()[0] > 0
            _display.append(Progress(console=console, transient=True, disable=hidden))
            _display[0].start()
        if _display:
            for bar in _open_bars:
                if bar._task is None:
                    bar._task = _display[0].add_task(bar._title, total=bar._total)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _open_bars.remove(self)
        if self._task is not None:
            _display[0].remove_task(self._task)
        if not _open_bars and _display:
            _display.pop().stop()
