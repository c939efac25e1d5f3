"""Whether a disk has room, asked before the work."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from tda_lightning.runtime.formatting import readable_bytes


def require_room(folder: Path, needed: int, what: str) -> None:
    """Refuse what does not fit.

    Args:
        folder: where it is to be written; it need not exist yet.
        needed: bytes.
        what: is to be written, in words.

    Raises:
        OSError: less is free.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"No room for {what}: it takes about {readable_bytes(needed)}, and "
            f"{readable_bytes(free)} are free. Free some, or move the trajectory to a larger disk",
            str(folder),
        )
