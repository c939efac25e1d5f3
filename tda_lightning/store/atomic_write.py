"""Writing a file so that it is there whole or not at all, and survives a loss of power.

A rename is on disk only once its folder has been synchronised. So every new file is written aside
and synchronised, then renamed, and then its folder is synchronised.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal


def part_path(path: Path) -> Path:
    """Where this process writes a file before it takes the name ``path``."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write a file; it takes the name ``path`` if no exception is raised.

    Whoever writes it synchronises it. The folder must exist.
    """
    part = part_path(path)
    try:
        yield part
        publish(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def publish(part: Path, path: Path) -> None:
    """Give the finished file ``part`` the name ``path``, durably."""
    os.replace(part, path)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` at ``path``, replacing any file there."""
    make_folder(path.parent)
    with replacing(path) as part, open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in ``folder`` to disk: earlier renames and deletions survive a crash."""
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened; a rename is as durable as it gets
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: this file system has no such operation
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make ``folder`` and those above it, durably."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


class AsideFile(io.FileIO):
    """A file for HDF5 to write into, which keeps disk errors away from it.

    HDF5 2.0 cannot close a file that a full disk keeps it from writing: its own state breaks, and
    the process crashes (SIGSEGV) some calls later. So it is told that every write succeeded;
    whatever follows the first error is dropped, and :meth:`finish` raises that error.

    Args:
        path: of the file.
        mode: ``w`` for a new file, ``r+`` for an existing one.
    """

    def __init__(self, path: Path, mode: Literal["w", "r+"] = "w") -> None:
        super().__init__(path, "w+" if mode == "w" else "r+")
        self.error: OSError | None = None

    def check(self) -> None:
        """Raise the first disk error, if there was one."""
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """Bring everything to disk.

        Raises:
            OSError: something could not be written.
        """
        self.check()
        os.fsync(self.fileno())

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = super().readinto(view) or 0
        if self.error is None:
            return count
        view[count:] = bytes(len(view) - count)  # what was dropped reads as zeros
        return len(view)

    def write(self, buffer: Any) -> int:
        view, written = memoryview(buffer).cast("B"), 0
        try:
            while self.error is None and written < len(view):
                written += super().write(view[written:]) or 0
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        try:
            if self.error is None:
                super().truncate(size)
        except OSError as error:
            self.error = error
        return size
