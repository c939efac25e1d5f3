"""Runs a reader over damaged files, each case in a forked child with limits.

HDF5 is a C library: a damaged file may crash it, or keep it in a loop that no signal handler of
Python's ends. So the cases run in children, which tell what they are at; the one during which a
child dies or falls silent has failed, and the rest goes on in the next child.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import random
import resource
import select
import shutil
import signal
import stat
import struct
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutations import Mutation, Place

SECONDS = 10.0  # for one case, before it counts as a hang; a usual one takes 0.03
BATCH = 100  # cases of one child
FACTOR = 4  # that reading may add in memory, times the size of the files
MARGIN = 1 << 26  # and beside that: a thread's stack, an arena, a module imported late

# What lies where: path -> (mode, size, time of the last change, checksum or target).
Listing = dict[str, tuple[object, ...]]


@dataclass(frozen=True)
class Case:
    """One damaged copy of a recorded folder; ``seed`` decides everything that is drawn."""

    seed: int
    kind: str
    base: str
    mutation: Mutation

    @property
    def name(self) -> str:
        return f"{self.base}/{self.kind}/{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What became of a case: "accepted", "refused", or else the failure in words."""

    case: Case
    verdict: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.verdict not in ("accepted", "refused")


Read = Callable[[Case, Path, Path], bool]  # (case, folder, damaged file) -> accepted


def run_cases(
    cases: Sequence[Case], bases: dict[str, Path], read: Read, workplace: Path
) -> list[Outcome]:
    """The outcome of every case, in order."""
    contents = {name: _contents(path) for name, path in bases.items()}
    outcomes: list[Outcome] = []
    while len(outcomes) < len(cases):
        start = len(outcomes)
        batch = cases[start : start + BATCH]
        outcomes += _in_child(batch, contents, read, workplace)
        if outcomes[-1].failed:
            # Alone: a crash may come from the case before, a hang from a busy machine.
            (outcomes[-1],) = _in_child([outcomes[-1].case], contents, read, workplace)
        for outcome in outcomes[start:]:
            if outcome.failed:
                print(f"{outcome.case.name}: {outcome.verdict}", flush=True)
        if len(outcomes) // 1000 > start // 1000:
            print(f"{len(outcomes)} cases", flush=True)
    return outcomes


def _in_child(
    batch: Sequence[Case], contents: dict[str, dict[str, bytes]], read: Read, workplace: Path
) -> list[Outcome]:
    """Outcomes of the first cases of ``batch``, up to and with the one that ended the child."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _work(batch, contents, read, workplace, send)  # never returns
    os.close(send)
    outcomes: list[Outcome] = []
    began, reason = time.monotonic(), ""
    while len(outcomes) < len(batch):
        ready, _, _ = select.select([receive], [], [], SECONDS)
        message = _receive(receive) if ready else None
        if message is None:
            reason = "" if ready else f"hangs: no answer within {SECONDS:.0f} s"
            break
        outcomes.append(Outcome(batch[len(outcomes)], message, time.monotonic() - began))
        began = time.monotonic()
    os.close(receive)
    if reason:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if len(outcomes) < len(batch):
        reason = reason or f"the process died with status {status}"
        outcomes.append(Outcome(batch[len(outcomes)], reason, time.monotonic() - began))
    return outcomes


def _receive(pipe: int) -> str | None:
    head = os.read(pipe, 4)
    if len(head) < 4:
        return None
    (size,), content = struct.unpack("I", head), b""
    while len(content) < size:
        content += os.read(pipe, size - len(content))
    return str(pickle.loads(content))


def _work(
    batch: Sequence[Case],
    contents: dict[str, dict[str, bytes]],
    read: Read,
    workplace: Path,
    pipe: int,
) -> None:
    try:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        largest = max(sum(map(len, contents[case.base].values())) for case in batch)
        limit = _address_space() + FACTOR * largest + MARGIN
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for case in batch:
            message = pickle.dumps(run_case(case, contents[case.base], read, workplace))
            os.write(pipe, struct.pack("I", len(message)) + message)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def run_case(case: Case, content: dict[str, bytes], read: Read, workplace: Path) -> str:
    """Damage a fresh copy, read it, and compare what lies in and around the folder."""
    place = lay_out(content, workplace)
    generator = random.Random(case.seed)
    victim = generator.choice(place.files())
    try:
        case.mutation(generator, victim, place)
    except Exception as error:
        return f"the mutation itself fails: {_told(error)}"
    before = listing(workplace)
    # Names such as ../x lead from here to where the listing would show them.
    os.chdir(workplace / "here")
    try:
        with unprivileged(case.kind == "unreadable"):
            verdict = "accepted" if read(case, place.root, victim) else "refused"
    except BaseException as error:
        verdict = _told(error)
    changed = set(before.items()) ^ set(listing(workplace).items())
    if changed:
        verdict = f"files changed: {sorted(path for path, _ in changed)}; {verdict}"
    return verdict


def _told(error: BaseException) -> str:
    """An error in one line, the innermost place first."""
    where = reversed(traceback.extract_tb(error.__traceback__))
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in where)
    return f"{type(error).__name__}: {str(error)[:300]!r} at {places[:200]}"


def _contents(root: Path) -> dict[str, bytes]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def lay_out(content: dict[str, bytes], workplace: Path) -> Place:
    """A fresh copy in ``workplace``, beside a folder that it must not touch."""
    os.chdir("/")
    shutil.rmtree(workplace, onerror=_unlock)
    place = Place(workplace / "runs" / "run", workplace / "outside")
    for folder in (place.outside, workplace / "here"):
        folder.mkdir(parents=True)
    (place.outside / "secret.h5").write_bytes(next(iter(content.values())))
    os.mkfifo(place.outside / "fifo")
    for name, data in content.items():
        path = place.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return place


def _unlock(function: Callable[[str], object], path: str, _: object) -> None:
    """A folder that was made unreadable can be removed once it is readable again."""
    if os.path.lexists(path):
        os.chmod(os.path.dirname(path), 0o700)
        os.chmod(path, 0o700)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def listing(root: Path) -> Listing:
    """Everything under ``root``, contents included."""
    found: Listing = {}
    waiting = [str(root)]
    while waiting:
        folder = waiting.pop()
        for entry in os.scandir(folder):
            status = entry.stat(follow_symlinks=False)
            content: object = None
            if entry.is_symlink():
                content = os.readlink(entry.path)
            elif stat.S_ISREG(status.st_mode) and os.access(entry.path, os.R_OK):
                with open(entry.path, "rb") as file:
                    content = zlib.crc32(file.read())
            elif stat.S_ISDIR(status.st_mode) and os.access(entry.path, os.R_OK | os.X_OK):
                waiting.append(entry.path)
            found[entry.path] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


class unprivileged:
    """Lets permissions bind the superuser, too."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted and os.geteuid() == 0

    def __enter__(self) -> None:
        if self.wanted:
            os.seteuid(65534)

    def __exit__(self, *_: object) -> None:
        if self.wanted:
            os.seteuid(0)
