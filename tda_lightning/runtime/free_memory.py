"""How much main memory is there to be taken."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_MACHINE = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_UNKNOWN = 1 << 32
# Of a control group: its limit, what it holds, and the files among that (man 7 cgroups, v2 and v1).
_UNIFIED = ("memory.max", "memory.current", "inactive_file")
_FORMER = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory() -> int:
    """Bytes of main memory that can be taken, within the limits of the process's container or job.

    Files that the system keeps in memory until somebody needs the room count as free: after a while
    they fill any machine. 4 GiB where the system does not tell.
    """
    return max(0, min([*_of_machine(), *_of_groups()], default=_UNKNOWN))


def _of_machine() -> Iterator[int]:
    for line in _lines(_MACHINE):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024
            return
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):  # Windows has none
        yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups() -> Iterator[int]:
    """What is left of the limit of each control group that the process is in."""
    for line in _lines(_OWN_GROUPS):
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root, names = (_GROUPS / "memory", _FORMER) if kinds else (_GROUPS, _UNIFIED)
        own = root / path.lstrip("/")
        # Within a container its own group lies at the root, whatever the path says.
        for group in (own, *own.parents[: len(own.parts) - len(root.parts)]):
            yield from _left_of(group, *names)


def _left_of(group: Path, limit: str, held: str, files: str) -> Iterator[int]:
    most, now = _lines(group / limit), _lines(group / held)
    if most and now and most[0].isdigit():
        kept = [
            int(row.split()[1]) for row in _lines(group / "memory.stat") if row.split()[0] == files
        ]
        yield int(most[0]) - int(now[0]) + sum(kept)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
