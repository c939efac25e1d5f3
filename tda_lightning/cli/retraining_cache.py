"""Retrainings are cached in a file: what it holds is reused, and what is missing is made and added.

A sweep shares the work by ``part=K/N``. Each of its jobs makes every N-th retraining and adds it to
a file of its own beside the whole one, ``NAME.partKofN.h5``. A command without ``part`` collects
all of them, makes what is still missing, and leaves one file.
"""

from __future__ import annotations

import multiprocessing
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from tda_lightning.cli.command import quiet_lightning
from tda_lightning.cli.retraining import Outcome, RecordedRun
from tda_lightning.evaluation import GroundTruth, landing_error, retrain
from tda_lightning.records.errors import TrajectoryLockedError
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.store.ground_truth_file import read_ground_truth, write_ground_truth
from tda_lightning.store.lock import FolderLock

_INTERRUPTED = 130  # exit status of a command that SIGINT ends

# Given what files hold, the record of all of it and of all that is wanted, which comes first.
Request = Callable[[Sequence[GroundTruth]], GroundTruth]


def cached_retrainings(run: RecordedRun, path: Path, request: Request, rows: int) -> GroundTruth:
    """The first ``rows`` subsets of what is requested, with as many seeds as configured.

    All of them are done, or, for a part of a sweep, those of this part.

    Args:
        run: the recorded run.
        path: the file that caches them.
        request: makes the record of what is wanted, given what the files hold.
        rows: number of its subsets that are wanted.
    """
    columns = run.config.seeds
    part = parse_part(run.config.part)
    if part is not None:
        own = _part_file(path, part)
        with _exclusive(own):
            others = [file for file in (path, *part_files(path)) if file != own]
            missing = request(_read([*others, own])).first(rows, columns).missing
            number, count = part
            share = [
                (row, column)
                for row, column in missing
                if (row * columns + column) % count == number - 1
            ]
            return _complete(run, request(_read([own])), share, own).first(rows, columns)
    truth = request(_read([path])).first(rows, columns)
    if not truth.missing and not part_files(path):
        return truth
    with ExitStack() as stack:
        stack.enter_context(_exclusive(path))
        files = part_files(path)
        for file in files:
            stack.enter_context(_exclusive(file))
        truth = request(_read([path, *files]))
        missing = truth.first(rows, columns).missing
        if run.config.protocol == "single_run" and "landing_error" not in truth.made_by:
            everything = torch.ones(len(run.train))
            end = retrain(run.trajectory, run.module, run.task, run.train, everything)
            truth = truth.with_notes(landing_error=landing_error(run.trajectory, end))
        if files:
            write_ground_truth(truth, path)
            for file in files:
                file.unlink()
        return _complete(run, truth, missing, path).first(rows, columns)


def parse_part(text: object) -> tuple[int, int] | None:
    """Number and count of ``part=K/N``; None for the whole.

    Raises:
        ValueError: it is not of this form.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(text))
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(
            f"part must be K/N, the K-th of N shares of the retrainings, such as 1/4; got {text}."
        )
    return int(match[1]), int(match[2])


def part_files(path: Path) -> list[Path]:
    """The files of parts of ``path``."""
    form = re.compile(re.escape(path.stem) + r"\.part\d+of\d+" + re.escape(path.suffix))
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(file for file in beside if form.fullmatch(file.name))


def _part_file(path: Path, part: tuple[int, int]) -> Path:
    return path.with_name(f"{path.stem}.part{part[0]}of{part[1]}{path.suffix}")


def _read(files: Sequence[Path]) -> list[GroundTruth]:
    return [read_ground_truth(file) for file in files if file.exists()]


def _complete(
    run: RecordedRun, truth: GroundTruth, missing: Sequence[tuple[int, int]], path: Path
) -> GroundTruth:
    """Make what is missing; each retraining is saved as soon as it is done."""
    if not missing:
        return truth
    done = 0
    try:
        with SlowProgress("Retraining", len(missing)) as progress:
            for (row, column), outcome in _outcomes(run, truth, missing):
                truth = truth.with_outcome(row, column, *outcome)
                write_ground_truth(truth, path)
                done += 1
                progress.advance()
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning exits without a message.
        print(
            f"Interrupted after {done} of {len(missing)} retrainings, which are kept in {path}. "
            "Run the same command again to resume.",
            file=sys.stderr,
        )
        raise SystemExit(_INTERRUPTED) from stop
    return truth


def _outcomes(
    run: RecordedRun, truth: GroundTruth, missing: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Outcome]]:
    kept = truth.subsets[[row for row, _ in missing]]
    seeds = [int(truth.seeds[pair]) for pair in missing]
    classes = truth.classes is not None
    if run.config.processes == 1 or len(missing) < 2:
        yield from zip(missing, run.outcomes(kept, seeds, classes), strict=True)
        return
    size = run.config.together if run.config.protocol == "single_run" else 1
    pool = ProcessPoolExecutor(
        min(run.config.processes, len(missing)),
        # A fork of a process that has used CUDA cannot use it.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(OmegaConf.to_container(run.config, resolve=True),),
    )
    try:
        jobs = {}
        for first in range(0, len(missing), size):
            part = slice(first, first + size)
            job = pool.submit(_work, kept[part].numpy(), seeds[part], classes)
            jobs[job] = missing[part]
        for job in as_completed(jobs):
            for pair, (measurements, seconds, predicted) in zip(
                jobs[job], job.result(), strict=True
            ):
                yield (
                    pair,
                    Outcome(
                        torch.from_numpy(measurements),
                        seconds,
                        None if predicted is None else torch.from_numpy(predicted),
                    ),
                )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_run_of_worker: list[RecordedRun] = []


def _start_worker(settings: Any) -> None:
    quiet_lightning()
    # The parent reports an interruption; its workers end silently.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    config = OmegaConf.create(settings)
    torch.set_num_threads(config.threads or 1)
    _run_of_worker.append(RecordedRun.load(config))


def _work(
    kept: np.ndarray, seeds: Sequence[int], classes: bool
) -> list[tuple[np.ndarray, float, np.ndarray | None]]:
    """Outcomes as arrays: tensors would be handed over through shared memory."""
    return [
        (_array(measurements), seconds, None if predicted is None else _array(predicted))
        for measurements, seconds, predicted in _run_of_worker[0].outcomes(
            torch.from_numpy(kept), seeds, classes
        )
    ]


def _array(values: Tensor) -> np.ndarray:
    exact = values.double() if values.is_floating_point() else values
    return exact.cpu().numpy()


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """While it lasts, no other process adds to this file."""
    folder = path.parent / f"{path.name}.lock"
    lock = FolderLock(folder)
    try:
        lock.acquire()
    except TrajectoryLockedError as error:
        raise TrajectoryLockedError(
            f"Another process is adding to {path}. Wait until it has finished, and give several "
            "files of scores to one command: scores=[A,B]."
        ) from error
    try:
        for file in path.parent.iterdir():
            # Left behind by a process that was killed while it wrote.
            if file.name.startswith(f"{path.name}.") and file.name.endswith(".part"):
                file.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
        with suppress(OSError):
            folder.rmdir()
