"""Work in several processes that talk over gloo; one that hangs is killed."""

from __future__ import annotations

import os
import pickle
import random
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from torch import distributed as dist


@dataclass
class Outcome:
    """How one process ended: with a result, with an error, or killed (both None)."""

    result: Any = None
    error: Exception | None = None
    trace: str = "killed: it hung"


def outcomes(work: Callable[..., Any], *args: Any, count: int = 2, seconds: float = 300) -> list:
    """``work(rank, *args)`` in ``count`` forked processes, which Lightning takes for its own."""
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        forked = get_context("fork")
        processes = [
            forked.Process(target=_worker, args=(Path(folder), port, rank, work, args))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        for process in processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # its own children too
            process.join()
        files = [Path(folder) / str(rank) for rank in range(count)]
        return [pickle.loads(f.read_bytes()) if f.exists() else Outcome() for f in files]


def results(work: Callable[..., Any], *args: Any, **options: Any) -> list:
    """What ``work`` returned in each process, none of which may fail."""
    found = outcomes(work, *args, **options)
    for rank, outcome in enumerate(found):
        assert not outcome.trace, f"process {rank}: {outcome.trace}"
    return [outcome.result for outcome in found]


def connect(rank: int, count: int = 2) -> None:
    """Join the process group, where no Trainer does it."""
    dist.init_process_group("gloo", rank=rank, world_size=count, timeout=timedelta(seconds=30))
    dist.barrier()  # one that ends at once would take the store from one that still joins


def _worker(folder: Path, port: int, rank: int, work: Callable[..., Any], args: Any) -> None:
    os.setsid()
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        GLOO_SOCKET_IFNAME="lo",
    )
    try:
        outcome = Outcome(work(rank, *args), trace="")
    except Exception as error:
        outcome = Outcome(error=error, trace=traceback.format_exc())
    try:
        data = pickle.dumps(outcome)
    except Exception:
        data = pickle.dumps(Outcome(error=RuntimeError(outcome.trace), trace=outcome.trace))
    (folder / f"{rank}.part").write_bytes(data)
    (folder / f"{rank}.part").rename(folder / str(rank))
    os._exit(0)  # the parent's exit handlers are not ours


def _free_port() -> int:
    """One below those that systems hand out by themselves: nobody is given it before it is used."""
    while True:
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", random.SystemRandom().randrange(12_000, 32_000)))
            return int(listener.getsockname()[1])
