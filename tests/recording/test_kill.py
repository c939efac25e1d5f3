"""Kills a training process, by SIGKILL, at random instants and at chosen ones.

Every life of a story is a forked child (libraries are imported once) that trains or resumes, and
is killed; after each kill the folder must open, and hold nothing but what the uninterrupted run
holds. The last life is left alone, and what it leaves must equal the uninterrupted run's.

Lightning's own checkpoints are moved into place from where temporary files are, and to another
file system a move is a copy: a kill may tear the newest. A life resumes from the last whole one.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tda_lightning.records.errors import TrajectoryNotFoundError
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.store import atomic_write, open_trajectory
from tda_lightning.store.writer import TrajectoryWriter
from tests.resumable import differences, train

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes"),
]

# What a process is killed within: methods of the writer, by what they do.
WITHIN = {
    "begin": "beginning",
    "write_checkpoint": "a checkpoint",
    "append": "a table",
    "write_statistics": "statistics",
    "resume": "cutting",
    "finish": "finishing",
}
MOVING = "move"  # within Lightning's moving of its own checkpoint into place
KINDS = ("any", *WITHIN, MOVING)
# Events (below) of which one is chosen; a resumed life may have fewer, and then ends of itself.
EVENTS = {
    "begin": 110,
    "write_checkpoint": 250,
    "append": 120,
    "write_statistics": 80,
    "resume": 8,
    "finish": 50,
}
# Each story is the lives before the last one: "any" instant, or within what is named.
STORIES = [
    ["any", "any", "any", "resume", "finish"],
    ["begin", "write_checkpoint", "append", "resume", "resume", "finish"],
    ["append", "any", "resume", "finish", "resume", "finish"],
    ["begin", "begin", "write_statistics", "write_checkpoint", "any", "any"],
    ["finish", "resume", "write_statistics", "resume", "finish"],
    ["write_statistics", "write_checkpoint", "resume", "append", "resume", "finish"],
    [MOVING, "begin", MOVING, "resume", MOVING],
]
# Stories of a test, and how many kills it asks for; the quick one has every kind of kill too.
SIZES = [(STORIES[:1] + STORIES[1::4] + STORIES[6:], 18), (STORIES, 44)]
SAVES = 3  # Lightning checkpoints of a whole run


def kept(folder: Path) -> list[Path]:
    """Lightning's checkpoints in the folder, in order."""
    return sorted((folder / "kept").glob("*.ckpt"), key=lambda path: int(path.stem))


def run(folder: Path) -> None:
    """Train from the last Lightning checkpoint in the folder, or from the start."""
    found = kept(folder)
    train(
        folder / "run",
        kept=folder / "kept",
        # Not at the end of an epoch that another follows: Lightning 2.6 miscounts epochs after a
        # resume from there, and a second resume trains too many steps, with or without us.
        every=4,
        resume=found[-1] if found else None,
        # Started again from nothing, it replaces what the killed one had begun.
        recorder={
            "every_n_steps": 3,
            "overwrite": True,
            "curvature": "online",
            "curvature_every": 2,
            "fisher": "empirical",
        },
    )


def child(folder: Path, temporary: Path, before: Callable[[], None]) -> int:
    """Process id of a forked process that trains; one that hangs is ended by an alarm."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        signal.alarm(300)
        tempfile.tempdir = str(temporary)
        before()
        run(folder)
        status = 0
    except BaseException:
        (folder / "error.txt").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def nothing() -> None:
    """What is done before a life that is not killed from within."""


def kill_within(method: str, number: int) -> Callable[[], None]:
    """Patch the child's writer: it kills itself at the ``number``-th event within ``method``.

    An event is a write into a file, or the instant before or after a rename, a deletion or a
    synchronisation.
    """
    inside, count = [False], [0]

    def event() -> None:
        if inside[0]:
            count[0] += 1
            if count[0] > number:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(function: Any, within: bool = False) -> Any:
        def patched(*args: Any, **options: Any) -> Any:
            event()
            if within:
                inside[0] = True
            try:
                return function(*args, **options)
            finally:
                if within:
                    inside[0] = False
                event()

        return patched

    def patch() -> None:
        writer: Any = TrajectoryWriter
        setattr(writer, method, around(getattr(writer, method), within=True))
        atomic_write.AsideFile.write = around(atomic_write.AsideFile.write)  # type: ignore[method-assign]
        os.fsync = around(os.fsync)
        os.replace = around(os.replace)
        Path.unlink = around(Path.unlink)  # type: ignore[method-assign]

    return patch


def kill_moving(number: int, part: float) -> Callable[[], None]:
    """The child kills itself when a ``part`` of its ``number``-th Lightning checkpoint is moved."""
    count, real = [0], shutil.move

    def move(source: str, target: Any, *args: Any, **options: Any) -> Any:
        if str(target).endswith(".ckpt"):
            if count[0] == number:
                content = Path(source).read_bytes()
                Path(target).write_bytes(content[: int(part * len(content))])
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
        return real(source, target, *args, **options)

    return lambda: setattr(shutil, "move", move)


class Tally:
    """One run of the test: what was done, and to what end."""

    def __init__(self, root: Path, temporary: Path, seed: int, wanted: int) -> None:
        self.wanted = wanted
        self.root, self.temporary, self.random = root, temporary, random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.instants: list[str] = []
        self.resumes = self.restarts = self.opened = self.compared = self.torn = 0
        self.resumed, self.steps_before = False, set[Path]()
        start = time.monotonic()
        pid = child(self.folder("whole"), temporary, nothing)
        assert os.waitpid(pid, 0)[1] == 0, self.error("whole")
        assert len(kept(root / "whole")) == SAVES
        self.duration = time.monotonic() - start
        self.whole = open_trajectory(root / "whole" / "run")

    @property
    def enough(self) -> bool:
        """Whether every kind of kill has happened, and many have."""
        return self.kills.total() >= self.wanted and all(self.kills[kind] for kind in KINDS)

    def folder(self, name: str) -> Path:
        (self.root / name).mkdir(exist_ok=True)
        return self.root / name

    def error(self, name: str) -> str:
        file = self.root / name / "error.txt"
        return file.read_text() if file.exists() else "no error of its own"

    def life(self, name: str, instant: str | None) -> bool:
        """One child; whether it was killed."""
        folder = self.folder(name)
        self.remove_torn(folder)
        left = SAVES - len(kept(folder))
        resumes = self.resumed = left < SAVES
        self.steps_before = set((folder / "run" / "steps").glob("*.h5"))
        before, said = nothing, ""
        if instant in WITHIN:
            # The square prefers early ones: a life that ends of itself is a kill missed.
            number = int(EVENTS[instant] * self.random.random() ** 2)
            before, said = kill_within(instant, number), f"{instant} {number}"
        elif instant == MOVING:
            # In turn the first, which leaves nothing to resume from, and a later one.
            number = self.kills[MOVING] % max(left, 1)
            part = self.random.random()
            before, said = kill_moving(number, part), f"{instant} {number} at {part:.0%}"
        pid = child(folder, self.temporary, before)
        if instant == "any":
            after = self.random.uniform(0, self.duration)
            time.sleep(after)
            os.kill(pid, signal.SIGKILL)
            said = f"{after * 1000:.0f} ms"
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL), self.error(name)
        self.resumes += resumes
        self.restarts += not resumes
        if status:
            self.kills[instant or ""] += 1
            self.instants.append(said)
        return bool(status)

    def remove_torn(self, folder: Path) -> None:
        """What a user would do: a torn Lightning checkpoint is no good, and only one can be.

        PyTorch's files are zip files, whose directory is their end: no part of one is one.
        """
        found = kept(folder)
        torn = [path for path in found if not zipfile.is_zipfile(path)]
        assert torn in ([], found[-1:]), (torn, found)
        for path in torn:
            path.unlink()
        self.torn += len(torn)

    def check_remains(self, name: str) -> None:
        """What a kill has left opens, and is a part of the whole."""
        path = self.root / name / "run"
        try:
            left = open_trajectory(path)
        except TrajectoryNotFoundError:
            # Killed before the first facts were there, or while a run was replaced by one that
            # begins anew; nothing may have been recorded on.
            assert not self.resumed
            assert set((path / "steps").glob("*.h5")) <= self.steps_before
            return
        self.opened += 1
        assert left.num_steps == left.last_step
        require_part(left, self.whole)

    def tell(self, name: str, story: list[str]) -> None:
        for instant in story:
            if self.life(name, instant):
                self.check_remains(name)
        assert not self.life(name, None)
        count, differing = differences(self.root / "whole" / "run", self.root / name / "run")
        assert not differing, (name, story, self.instants[-len(story) :], differing)
        self.compared += count


def require_part(left: Trajectory, whole: Trajectory) -> None:
    assert torch.equal(left.steps.examples, whole.steps.examples[: len(left.steps.examples)])
    assert torch.equal(left.steps.loss, whole.steps.loss[: len(left.steps)])
    for step in left.checkpoints:
        if step in whole.checkpoints:
            mine, theirs = left.checkpoints[step].parameters, whole.checkpoints[step].parameters
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert step in whole.checkpoints
    # Whatever checkpoints there are, their statistics are there too.
    assert [stop for _, stop in left.statistics] == sorted(left.checkpoints)[1:]
    for interval, blocks in left.statistics.items():
        expected = whole.statistics[interval]
        assert blocks.keys() == expected.keys()
        for name, block in blocks.items():
            for kind in block.SUMS:
                assert torch.equal(getattr(block, kind), getattr(expected[name], kind))


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a killed process leaves the same in it."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def cpu_seconds() -> float:
    return sum(os.times()[:4])  # of this process and its children, user and system


@pytest.mark.parametrize(
    ("stories", "kills"),
    [SIZES[0], pytest.param(*SIZES[1], marks=pytest.mark.slow)],
    ids=["few", "all"],
)
def test_no_kill_loses_anything(
    stories: list[list[str]], kills: int, quick_disk: Path, tmp_path: Path
) -> None:
    seed = int(os.environ.get("TDA_KILL_SEED", random.SystemRandom().randrange(10**6)))
    start, cpu = time.monotonic(), cpu_seconds()
    tally = Tally(quick_disk, tmp_path, seed, kills)
    number = 0
    while number < len(stories) or (not tally.enough and number < 5 * len(stories)):
        tally.tell(str(number), stories[number % len(stories)])
        number += 1
    print(
        f"\nseed {seed}: {tally.kills.total()} kills ({dict(tally.kills)}), "
        f"{tally.resumes} resumes, {tally.restarts} starts, {number} stories, {tally.opened} "
        f"remains opened, {tally.torn} of Lightning's checkpoints torn, "
        f"{tally.compared} datasets compared, in "
        f"{time.monotonic() - start:.0f} s ({cpu_seconds() - cpu:.0f} s of one core); an "
        f"uninterrupted run takes {tally.duration:.2f} s.\n"
        f"Instants: {', '.join(tally.instants)}",
    )
    assert tally.enough
    assert tally.torn >= tally.kills[MOVING]
    assert tally.resumes >= kills // 2
    assert tally.compared >= 100 * number
