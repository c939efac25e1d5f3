"""A failing disk and a second recorder: said clearly, and what was recorded stays readable."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.records.errors import RecordingError, ResumeError, TrajectoryLockedError
from tda_lightning.records.scores import Scores
from tda_lightning.store import lock, open_trajectory
from tda_lightning.store.inspect import describe
from tda_lightning.store.lock import FolderLock
from tda_lightning.store.scores_file import ScoreFile
from tests.resumable import Resumable, differences, resumable_loader, saves, train
from tests.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

RECORDER = {"every_n_steps": 3}


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    """The weights that training without a recorder ends with."""
    return dict(train(None).lightning_module.state_dict())


def fails_at(step: int, fault: Callable[[], None]) -> Callback:
    class Fails(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == step:
                fault()

    return Fails()


def require_last_whole(path: Path, step: int) -> None:
    """The trajectory opens, ends at ``step``, and has no half file under a final name."""
    trajectory = open_trajectory(path)
    assert trajectory.last_step == trajectory.num_steps == step
    assert all(trajectory.checkpoints[s].step == s for s in trajectory.checkpoints)
    found = describe(path)
    assert not found.problems
    assert not list(path.rglob("*.part"))
    FolderLock(path).require_free()


# Faults: each takes the folder and returns what undoes it.


def small_files(path: Path) -> Callable[[], None]:
    """No file may grow beyond a few kilobytes: what a full disk is to one process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_fsync(path: Path) -> Callable[[], None]:
    real = os.fsync

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    os.fsync = fails
    return lambda: setattr(os, "fsync", real)


def read_only(path: Path) -> Callable[[], None]:
    """Root may write anywhere, so the process takes another user's rights."""
    for folder in (path, path / "steps", path / "checkpoints"):
        folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)

    def undo() -> None:
        if root:
            os.seteuid(0)
        for folder in (path, path / "steps", path / "checkpoints"):
            folder.chmod(0o755)

    return undo


def moved(path: Path) -> Callable[[], None]:
    aside = path.with_name("aside")
    path.rename(aside)

    def undo() -> None:
        assert not path.exists()  # not made again
        aside.rename(path)

    return undo


def file_in_the_way(path: Path) -> Callable[[], None]:
    aside = path.with_name("aside")
    path.rename(aside)
    path.write_text("mine")

    def undo() -> None:
        assert path.read_text() == "mine"
        path.unlink()
        aside.rename(path)

    return undo


def another_trajectory(path: Path) -> Callable[[], None]:
    aside = path.with_name("aside")
    path.rename(aside)
    train(path, recorder=RECORDER)
    before = {p: p.read_bytes() for p in path.rglob("*.h5")}

    def undo() -> None:
        assert {p: p.read_bytes() for p in path.rglob("*.h5")} == before
        shutil.rmtree(path)
        aside.rename(path)

    return undo


FAULTS = [
    (small_files, "File too large"),
    (no_fsync, "Input/output error"),
    (read_only, "Permission denied"),
    (moved, "No such file or directory"),
    (file_in_the_way, "Not a directory"),
    (another_trajectory, "replaced by another one"),
]


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that other users may enter, which pytest's are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("on_error", ["raise", "warn"])
@pytest.mark.parametrize(("fault", "cause"), FAULTS, ids=[f.__name__ for f, _ in FAULTS])
def test_a_fault_in_mid_training(
    fault: Any, cause: str, on_error: Any, open_to_all: Path, plain: dict[str, torch.Tensor]
) -> None:
    path, undo = open_to_all / "run", [lambda: None]
    recorder = TrajectoryRecorder(path, on_error=on_error, **RECORDER)  # type: ignore[arg-type]

    def strike() -> None:
        state = torch.get_rng_state()
        undo[0] = fault(path)
        torch.set_rng_state(state)

    seen: list[list[int]] = []
    made = None
    message = rf"cannot be written after step 6: .*{cause}.*checkpoint at step 3 stays.*ckpt_path"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if on_error == "raise":
                with pytest.raises(RecordingError, match=message) as raised:
                    train(None, seen=seen, last=(recorder, fails_at(4, strike)))
                assert str(path) in str(raised.value)
            else:
                made = train(None, last=(recorder, fails_at(4, strike)))
        finally:
            undo[0]()
    said = [str(w.message) for w in caught if "cannot be written" in str(w.message)]
    if on_error == "raise":
        assert len(seen) == 6
        assert not said
    else:
        assert len(said) == 1
        assert said[0].endswith("Training goes on without recording.")
        weights = made.lightning_module.state_dict()
        assert all(torch.equal(t, plain[n]) for n, t in weights.items())
    if fault is no_fsync:  # a file that was written but not synchronised may be there, whole
        assert open_trajectory(path).last_step in (3, 6)
    else:
        require_last_whole(path, 3)


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_fault_before_training(on_error: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    path = tmp_path / "file" / "run"
    recorder = TrajectoryRecorder(path, on_error=on_error)
    module = Resumable()
    if on_error == "raise":
        with pytest.raises(RecordingError, match="be begun: .*(Not a directory|File exists)"):
            train(None, module=module, last=(recorder,))
        assert module.seen == []
    else:
        with pytest.warns(UserWarning, match="Training goes on without recording"):
            trainer(recorder).fit(module, resumable_loader())
        assert len(module.seen) == 12


def test_a_full_disk_while_finishing(tmp_path: Path) -> None:
    undo: list[Any] = [lambda: None]
    path = tmp_path / "run"

    class Fills(Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 1:
                undo[0] = small_files(path)

    try:
        with pytest.raises(RecordingError, match="File too large"):
            train(path, recorder=RECORDER, last=(Fills(),))
    finally:
        undo[0]()
    require_last_whole(path, 12)  # unjoined


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(tmp_path: Path, plain: dict[str, torch.Tensor]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        recorder = TrajectoryRecorder(disk / "run", every_n_steps=1, on_error="warn")
        with pytest.warns(UserWarning, match="No space left on device"):
            made = train(None, last=(recorder,))
        assert all(torch.equal(t, plain[n]) for n, t in made.lightning_module.state_dict().items())
        last = open_trajectory(disk / "run").last_step
        assert 0 < last < 12
        require_last_whole(disk / "run", last)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_checkpoint_saved_after_recording_stopped_is_refused(tmp_path: Path) -> None:
    path, undo = tmp_path / "run", [lambda: None]
    keeps = saves(tmp_path / "kept", 4)
    recorder = TrajectoryRecorder(path, on_error="warn", **RECORDER)  # type: ignore[arg-type]
    strike = fails_at(4, lambda: undo.__setitem__(0, moved(path)))
    train(None, last=(recorder, strike, keeps), enable_checkpointing=True)
    undo[0]()
    with pytest.raises(ResumeError, match="recording had stopped.*after step 6"):
        train(path, resume=tmp_path / "kept" / "8.ckpt", recorder=RECORDER)
    # From the one before, everything is made up for.
    train(path, resume=tmp_path / "kept" / "4.ckpt", recorder=RECORDER)
    train(tmp_path / "whole", recorder=RECORDER)
    count, differing = differences(tmp_path / "whole", path)
    assert count > 100
    assert not differing


def test_on_error_is_one_of_two() -> None:
    with pytest.raises(ValueError, match='on_error must be "raise" or "warn", got \'ignore\''):
        TrajectoryRecorder("runs/none", on_error="ignore")  # type: ignore[arg-type]


# The lock.


def test_a_second_recorder_is_refused(tmp_path: Path) -> None:
    module, read = Resumable(), []

    def second(**options: Any) -> None:
        with pytest.raises(TrajectoryLockedError, match=rf"recorded into by process {os.getpid()}"):
            trainer(TrajectoryRecorder(tmp_path, **options)).fit(module, resumable_loader())
        read.append(open_trajectory(tmp_path).last_step)
        describe(tmp_path)

    def strike() -> None:
        second()
        second(overwrite=True)

    train(tmp_path, recorder=RECORDER, last=(fails_at(4, strike),))
    assert module.seen == []
    assert read == [3, 3]
    assert not (tmp_path / lock.LOCK_FILE).exists()
    assert open_trajectory(tmp_path).last_step == 12


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    root = tmp_path / "run"
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            held = FolderLock(root)
            held.acquire()
            if os.fork() == 0:  # a worker of it, which outlives it for a while
                os.write(tell, b".")
                time.sleep(3)
                os._exit(0)
            time.sleep(60)
        finally:
            os._exit(0)
    os.read(ready, 1)
    mine = FolderLock(root)
    with pytest.raises(TrajectoryLockedError, match=f"process {pid} on "):
        mine.require_free()
    with pytest.raises(TrajectoryLockedError, match=f"process {pid} on "):
        mine.acquire()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (root / lock.LOCK_FILE).exists()
    mine.require_free()
    mine.acquire()
    mine.release()
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("missing", ["module", "operation"])
def test_without_flock_a_file_is_the_lock(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if missing == "module":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    first = FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(TrajectoryLockedError, match=r"if that process is gone, delete .*owner"):
        FolderLock(tmp_path).acquire()
    with pytest.raises(TrajectoryLockedError):
        FolderLock(tmp_path).require_free()
    first.release()
    FolderLock(tmp_path).require_free()
    assert not (tmp_path / lock.OWNER_FILE).exists()


# Scores.


def save(path: Path) -> None:
    Scores(torch.ones(40, 40)).save(path, overwrite=True)


def reserve(path: Path) -> None:
    ScoreFile(path, 40, 40, overwrite=True)


@pytest.mark.parametrize("write", [save, reserve])
def test_scores_that_do_not_fit_on_the_disk_leave_nothing(write: Any, tmp_path: Path) -> None:
    """Those that are gathered by blocks say so before any of them is known."""
    path = tmp_path / "scores.h5"
    Scores(torch.ones(1, 2)).save(path)
    undo = small_files(path)
    try:
        with pytest.raises(OSError, match="File too large"):
            write(path)
    finally:
        undo()
    assert [file.name for file in tmp_path.iterdir()] == ["scores.h5"]
    assert torch.equal(Scores.load(path).values, torch.ones(1, 2))


def test_what_any_release_left_half_written_is_removed(tmp_path: Path) -> None:
    train(tmp_path, recorder=RECORDER)
    for name in ("00000003.h5.part", "00000003.h5.77.part"):
        (tmp_path / "checkpoints" / name).write_bytes(b"half")
    assert len(describe(tmp_path).problems) == 2
    train(tmp_path, recorder={**RECORDER, "overwrite": True})
    assert not describe(tmp_path).problems
