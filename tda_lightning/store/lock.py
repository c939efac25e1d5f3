"""One recorder for one folder.

The lock is ``flock`` on an open file. The kernel releases it when the process ends, however it
ends, so the file that a killed process leaves behind is no obstacle; and it holds between two
recorders of one process, which ``fcntl.lockf`` would not. Readers take no lock: no file of a
trajectory is ever half written.

NFS (Linux 2.6.12 and later) honours ``flock`` across machines, and so do parallel file systems
where the administrator has switched it on. Where it is missing, the existence of a second file is
the lock; that file outlives a killed process, and the error says to delete it.

The package ``filelock`` was tried in its place. It does not say who holds a lock and leaves its
file behind; 4.3 fails where a file system answers ENOLCK; and with 3.13 a data loader's worker
keeps the lock of a killed process.
"""

from __future__ import annotations

import errno
import os
import socket
import weakref
from contextlib import suppress
from pathlib import Path

from tda_lightning.records.errors import TrajectoryLockedError
from tda_lightning.store.atomic_write import make_folder

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "recording.lock"
OWNER_FILE = "recording.owner"  # its existence is the lock where flock is missing
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_MISSING = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_TEXT_LIMIT = 200


class FolderLock:
    """The right to record into ``root``, from :meth:`acquire` to :meth:`release`."""

    def __init__(self, root: Path) -> None:
        self._path = root / LOCK_FILE
        self._owner = root / OWNER_FILE
        self._descriptor: int | None = None
        self._owns = False

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            TrajectoryLockedError: another recorder has it.
        """
        if self._descriptor is not None or self._owns:
            return
        make_folder(self._path.parent)
        while fcntl is not None:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in _MISSING:
                    break
                if error.errno not in _BUSY:
                    raise
                raise TrajectoryLockedError(
                    f"{self._path.parent} is being recorded into by {_read(self._path)}; expected "
                    "no other recorder there. Choose another path, or wait until that training "
                    "has ended."
                ) from error
            # Whoever had the lock may have deleted the file between our opening and locking it.
            if _same_file(descriptor, self._path):
                self._descriptor = descriptor
                _held.add(self)
                with suppress(OSError):  # the text only serves the error message of others
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, _self())
                return
            os.close(descriptor)
        self._acquire_owner_file()

    def _acquire_owner_file(self) -> None:
        try:
            descriptor = os.open(self._owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError as error:
            raise TrajectoryLockedError(
                f"{self._owner.parent} is being recorded into by {_read(self._owner)}; expected "
                "no other recorder there. This file system has no locks that end with their "
                f"process: if that process is gone, delete {self._owner}. Else choose another path."
            ) from error
        with suppress(OSError):
            os.write(descriptor, _self())
        os.close(descriptor)
        self._owns = True

    def release(self) -> None:
        """Give the lock back and leave no file; without the lock, do nothing."""
        if self._descriptor is not None:
            with suppress(OSError):  # the folder may be gone, or read-only
                if _same_file(self._descriptor, self._path):
                    self._path.unlink()
            _held.discard(self)
        if self._owns:
            with suppress(OSError):
                self._owner.unlink()
        self._forget()

    def require_free(self) -> None:
        """Check that nobody has the lock, without making a file.

        Raises:
            TrajectoryLockedError: another recorder has it.
        """
        if self._path.exists() or self._owner.exists():
            self.acquire()
            self.release()

    def _forget(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor, self._owns = None, False


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    """In a forked child: the lock is the parent's, and must not live on in a worker."""
    for lock in list(_held):
        lock._forget()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _self() -> bytes:
    return f"process {os.getpid()} on {socket.gethostname()}".encode()


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            text = file.read(_TEXT_LIMIT).decode(errors="replace")
    except OSError:
        text = ""
    return text if text.isprintable() and text else "another process"
