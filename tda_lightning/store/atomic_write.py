"""Files and folders that are there whole, or not at all, and stay after a loss of power.

A rename is on disk only once its folder has been synchronised; so every new file of ours takes
three steps: write aside and synchronise, rename, synchronise the folder.
"""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from types import TracebackType
from typing import Any


class AsideFile(io.RawIOBase):
    """A file for HDF5 to write into, which keeps errors of the disk away from it.

    HDF5 2.0 cannot close a file that a full disk keeps it from writing: it leaves its own state
    broken, and the process crashes (SIGSEGV) some calls later. So it is told that every write
    went well, what follows the first error is dropped, and :meth:`finish` raises that error.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.error: OSError | None = None
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> AsideFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        super().close()

    def check(self) -> None:
        """Raise the first error of the disk, if there was one."""
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """Bring everything to disk.

        Raises:
            OSError: something could not be written.
        """
        self.check()
        os.fsync(self._file.fileno())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        """Read what was written, and zeros where a failed write left nothing."""
        view = memoryview(buffer).cast("B")
        read = self._file.readinto(view) or 0
        if self.error is None:
            return read
        view[read:] = bytes(len(view) - read)  # what was dropped reads as zeros
        return len(view)

    def write(self, buffer: Any) -> int:
        """Write; an error of the system is kept in ``error``, not raised into HDF5."""
        view, written = memoryview(buffer).cast("B"), 0
        try:
            while self.error is None and written < len(view):
                written += self._file.write(view[written:]) or 0
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        size = self._file.tell() if size is None else size
        try:
            if self.error is None:
                self._file.truncate(size)
        except OSError as error:
            self.error = error
        return size

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def write_text(path: Path, text: str) -> None:
    """Write ``text`` at ``path``, in place of what is there, whole or not at all."""
    make_folder(path.parent)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in ``folder`` to disk: renames and deletions before this call stay."""
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened; renaming itself is as durable as it gets
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
