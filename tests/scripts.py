"""Scripts in processes of their own, which need not import torch and Lightning anew."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from hydra.core.hydra_config import HydraConfig


class Script:
    """A script that runs in a forked process, as ``python PATH ARGUMENTS`` would.

    Attributes:
        output: what it prints, as it prints it.
    """

    def __init__(self, path: Path, *arguments: str, folder: Path, **environment: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the script)
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            os.dup2(write, 1)
            os.dup2(self._errors.fileno(), 2)
            _run(path, arguments, folder, environment)  # never returns
        os.close(write)
        self.output = os.fdopen(read)

    def end(self) -> tuple[int, str, str]:
        """Wait for its end: exit status (minus a signal's number), the rest of its output, and
        what it wrote to stderr."""
        with self.output, self._errors:
            out = self.output.read()
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self._errors.seek(0)
            return status, out, self._errors.read().decode()


def _run(path: Path, arguments: tuple[str, ...], folder: Path, environment: dict[str, str]) -> None:
    status: object = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(300)  # ends one that hangs
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
        os.chdir(folder)
        os.environ.update(environment)
        HydraConfig.instance().cfg = None  # of earlier tests of the command line
        sys.argv = [str(path), *arguments]
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
