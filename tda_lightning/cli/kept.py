"""Retrainings are made once: what a file keeps is taken up, and what is missing is made and kept.

A sweep shares the work by ``part=K/N``. Each of its jobs makes every N-th retraining and keeps it
in a file of its own beside the whole one, ``NAME.partKofN.h5``; a command without ``part`` takes up
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

from tda_lightning.cli.retraining import Outcome, Parts
from tda_lightning.evaluation import GroundTruth, landing_error, retrain
from tda_lightning.records.errors import TrajectoryLockedError
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.store.ground_truth_file import read_ground_truth, write_ground_truth
from tda_lightning.store.lock import FolderLock

_INTERRUPTED = 130  # exit status, as of a command that SIGINT ends

# From what files hold: all of it and all that is wanted, which comes first.
Ask = Callable[[Sequence[GroundTruth]], GroundTruth]


def kept_retrainings(parts: Parts, path: Path, ask: Ask, rows: int) -> GroundTruth:
    """The first ``rows`` subsets of what ``ask`` asks for, and as many seeds as configured: all
    known, or, for a part of a sweep, as far as this part goes.

    Args:
        parts: the recorded run.
        path: of the file that keeps them.
        ask: makes the record of what is wanted, with what the files that it is given know.
        rows: how many of its subsets are wanted.
    """
    columns = parts.config.seeds
    part = which_part(parts.config.part)
    if part is not None:
        own = _part_file(path, part)
        with _alone(own):
            files = [file for file in (path, *part_files(path)) if file != own]
            everywhere = ask(_read([*files, own])).first(rows, columns)
            number, count = part
            mine = [
                pair
                for pair in everywhere.missing
                if (pair[0] * columns + pair[1]) % count == number - 1
            ]
            return _made(parts, ask(_read([own])), mine, own).first(rows, columns)
    truth = ask(_read([path])).first(rows, columns)
    if not truth.missing and not part_files(path):
        return truth
    with ExitStack() as stack:
        stack.enter_context(_alone(path))
        files = part_files(path)
        for file in files:
            stack.enter_context(_alone(file))
        truth = ask(_read([path, *files]))
        missing = truth.first(rows, columns).missing
        if parts.config.protocol == "single_run" and "landing_error" not in truth.made_by:
            work = (parts.trajectory, parts.module, parts.task, parts.data.train_dataset)
            end = retrain(*work, torch.ones(truth.subsets.shape[1]))
            truth = truth.noting(landing_error=landing_error(parts.trajectory, end))
        if files:
            write_ground_truth(truth, path)
            for file in files:
                file.unlink()
        return _made(parts, truth, missing, path).first(rows, columns)


def which_part(text: Any) -> tuple[int, int] | None:
    """Number and count of ``part=K/N``; None for the whole."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(text))
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(
            f"part must be K/N, the K-th of N shares of the retrainings, such as 1/4; got {text}."
        )
    return int(found[1]), int(found[2])


def part_files(path: Path) -> list[Path]:
    """The files of parts of ``path``."""
    form = re.compile(re.escape(path.stem) + r"\.part\d+of\d+" + re.escape(path.suffix))
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(file for file in beside if form.fullmatch(file.name))


def _part_file(path: Path, part: tuple[int, int]) -> Path:
    return path.with_name(f"{path.stem}.part{part[0]}of{part[1]}{path.suffix}")


def _read(files: Sequence[Path]) -> list[GroundTruth]:
    return [read_ground_truth(file) for file in files if file.exists()]


def _made(
    parts: Parts, truth: GroundTruth, missing: Sequence[tuple[int, int]], path: Path
) -> GroundTruth:
    """Make what is missing, each retraining kept in the file as soon as it is done."""
    if not missing:
        return truth
    done = 0
    try:
        with SlowProgress("Retraining", len(missing)) as progress:
            for (row, column), found in _outcomes(parts, truth, missing):
                truth = truth.known(row, column, *found)
                write_ground_truth(truth, path)
                done += 1
                progress.advance()
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning leaves without a word.
        print(
            f"Interrupted after {done} of {len(missing)} retrainings, which are kept in {path}. "
            "The same command goes on from there.",
            file=sys.stderr,
        )
        raise SystemExit(_INTERRUPTED) from stop
    return truth


def _outcomes(
    parts: Parts, truth: GroundTruth, missing: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Outcome]]:
    kept = truth.subsets[[row for row, _ in missing]]
    seeds = [int(truth.seeds[pair]) for pair in missing]
    classes = truth.classes is not None
    if parts.config.processes == 1 or len(missing) < 2:
        yield from zip(missing, parts.outcomes(kept, seeds, classes), strict=True)
        return
    settings: Any = OmegaConf.to_container(parts.config, resolve=True)
    size = parts.config.together if parts.config.protocol == "single_run" else 1
    pool = ProcessPoolExecutor(
        min(parts.config.processes, len(missing)),
        # A fork of a process that used CUDA cannot use it.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(settings,),
    )
    try:
        waiting = {}
        for first in range(0, len(missing), size):
            part = slice(first, first + size)
            waiting[pool.submit(_work, kept[part].numpy(), seeds[part], classes)] = missing[part]
        for future in as_completed(waiting):
            for pair, (found, seconds, predicted) in zip(
                waiting[future], future.result(), strict=True
            ):
                outcome = Outcome(
                    torch.from_numpy(found),
                    seconds,
                    None if predicted is None else torch.from_numpy(predicted),
                )
                yield pair, outcome
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_own: list[Parts] = []  # of a process that retrains for another one


def _begin(settings: Any) -> None:
    from tda_lightning.cli.commands import parts_to_retrain, quiet_lightning

    quiet_lightning()
    # Of an interruption the first process tells; the others end without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    config = OmegaConf.create(settings)
    torch.set_num_threads(config.threads or 1)
    _own.append(parts_to_retrain(config))


def _work(
    kept: np.ndarray, seeds: Sequence[int], classes: bool
) -> list[tuple[np.ndarray, float, np.ndarray | None]]:
    """Arrays, because tensors would be handed over through shared memory."""
    return [
        (
            _array(one.measurements),
            one.seconds,
            None if one.classes is None else _array(one.classes),
        )
        for one in _own[0].outcomes(torch.from_numpy(kept), seeds, classes)
    ]


def _array(values: Tensor) -> np.ndarray:
    exact = values.double() if values.is_floating_point() else values
    return exact.cpu().numpy()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """The only process that adds to this file."""
    folder = path.parent / f"{path.name}.lock"
    lock = FolderLock(folder)
    try:
        lock.acquire()
    except TrajectoryLockedError as error:
        raise TrajectoryLockedError(
            f"Another process is adding to {path}. Wait until it has ended, and give several files "
            "of scores to one command: scores=[A,B]."
        ) from error
    try:
        for file in path.parent.iterdir():
            # What a killed process had begun to write.
            if file.name.startswith(f"{path.name}.") and file.name.endswith(".part"):
                file.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
        with suppress(OSError):
            folder.rmdir()
