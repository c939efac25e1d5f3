"""Numbers as a person reads them."""

from __future__ import annotations


def readable_time(seconds: float) -> str:
    """A duration in the units that fit it.

    Example:
        >>> readable_time(1.44), readable_time(200), readable_time(7500)
        ('1.4 s', '3 min 20 s', '2 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def readable_bytes(size: float) -> str:
    """A size in the largest binary unit that leaves at least one of it.

    Example:
        >>> readable_bytes(1000), readable_bytes(3 << 19)
        ('1000 B', '1.5 MiB')
    """
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop()
    return f"{size:.0f} B" if units[-1] == "B" else f"{size:.1f} {units[-1]}"
