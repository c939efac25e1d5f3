"""A file that two trajectories have in common."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from tda_lightning.store.atomic_write import replacing


def share(source: Path, target: Path) -> None:
    """Give the file ``source`` the name ``target`` too; a copy, where the disk has no hard links.

    Files of a trajectory are replaced and never changed, so one is as good as the other.
    """
    with replacing(target) as part:
        with suppress(FileNotFoundError):
            part.unlink()
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
