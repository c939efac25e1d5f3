"""The most memory that the process holds during a stretch of work."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
# Writing 5 there makes Linux forget the high-water mark (man 5 proc).
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """High-water mark of resident memory, and of the accelerator's, from entering on.

    Memory that a dry run's substitute did not take is added by :meth:`also`. Where the mark cannot
    be reset, it is that of the whole process so far; outside Linux it is unknown.
    """

    def __init__(self) -> None:
        self._modelled = 0

    def __enter__(self) -> PeakMemory:
        _give_back()
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self._modelled = 0
        return self

    def __exit__(self, *_: object) -> None:
        """The findings stay."""

    def also(self, size: int) -> None:
        """Count ``size`` bytes that would be held now, on top of what is held."""
        held = _status("VmRSS")
        self._modelled = max(self._modelled, (held or 0) + size)

    @property
    def bytes(self) -> int | None:
        """Most memory so far; None where the system does not tell."""
        found = _status("VmHWM")
        return None if found is None else max(found, self._modelled)

    @property
    def device_bytes(self) -> int:
        """The same on the accelerator in use; 0 without one."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            return torch.cuda.max_memory_allocated()
        return 0


def _status(key: str) -> int | None:
    """A line of /proc/self/status in bytes."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith(f"{key}:")]
    return kibibytes[0] * 1024 if kibibytes else None


def _give_back() -> None:
    """Hand freed memory back to the system: an earlier dry run must not count."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)
