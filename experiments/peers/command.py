"""What the commands of all libraries share: their arguments, and the scores files they write."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.peers.recorded import Run
from tda_lightning import Scores
from tda_lightning.recording.facts import package_versions

DEFAULT = "default"


class Seconds(NamedTuple):
    """Of wall time, and of this process on all its threads."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> Seconds:
        return cls(time.perf_counter(), time.process_time())

    def passed(self) -> Seconds:
        """Since then."""
        now = self.now()
        return Seconds(now.wall - self.wall, now.processor - self.processor)

    def and_also(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.processor + other.processor)


def parser(library: str, about: str | None, damping: str | None) -> argparse.ArgumentParser:
    """Arguments of ``python -m experiments.peers.LIBRARY``.

    Args:
        library: the module's name.
        about: its docstring.
        damping: what a number means as damping; None for a method that has none.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m experiments.peers.{library}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("run", type=Path, help="folder that tda train wrote")
    made.add_argument("--output", type=Path, required=True, help="file of scores to write")
    if damping is not None:
        made.add_argument(
            "--damping",
            nargs="+",
            type=_damping,
            default=[DEFAULT],
            metavar="X",
            help=f"{DEFAULT}, which is written to OUTPUT, or numbers, each written to a file of "
            f"its own: OUTPUT with -X before the suffix. {damping}",
        )
    made.add_argument("--data-root", help="where the data files are; by default where they were")
    made.add_argument("--device", default="cpu")
    made.add_argument("--batch-size", type=int, default=256, help="examples at a time")
    made.add_argument("--threads", type=int, help="processor threads; by default all")
    made.add_argument("--overwrite", action="store_true", help="replace files of scores")
    return made


def start(arguments: argparse.Namespace) -> dict[str, Path]:
    """The file of each damping asked for; set the number of threads.

    Raises:
        FileExistsError: a file is there already, and is to be kept.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    output: Path = arguments.output
    files = {
        damping: output if damping == DEFAULT else output.with_stem(f"{output.stem}-{damping}")
        for damping in getattr(arguments, "damping", [DEFAULT])
    }
    for file in files.values():
        if file.exists() and not arguments.overwrite:
            raise FileExistsError(f"{file} already holds scores. Replace it with --overwrite.")
    return files


def save(
    arguments: argparse.Namespace,
    file: Path,
    run: Run,
    values: Tensor,
    package: str,
    estimator: str,
    seconds: Seconds,
    settings: dict[str, Any],
    notes: list[str],
) -> None:
    """Write scores [query, train], in our sign and unit, with what they were made by.

    Args:
        package: the library's name on PyPI.
        seconds: of the work, from the weights in memory to the scores in memory.
        settings: what the library was told.
    """
    program = Path(sys.argv[0]).stem
    release = f"{package} {version(package)}"
    provenance = {
        "estimator": estimator,
        "library": release,
        "settings": settings,
        "seconds": seconds.wall,
        "processor_seconds": seconds.processor,
        "threads": torch.get_num_threads(),
        "task": run.task.settings(),
        "trajectory": str(arguments.run),
        "config": {"trajectory": str(arguments.run), "data": run.changes},
        "model": type(run.module).__name__,
        "steps": run.trajectory.last_step,
        "num_train": run.num_train,
        "precision": "32-true",
        "device": str(run.device),
        "command": shlex.join(["python", "-m", f"experiments.peers.{program}", *sys.argv[1:]]),
        "versions": {**package_versions(), package: version(package)},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "notes": notes,
        "measurements": _measurements(run, arguments.batch_size),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    Scores(values.detach().float().cpu(), provenance=provenance).save(file, arguments.overwrite)
    print(f"{estimator} ({release}), {seconds.wall:.1f} s: {file}")


def _damping(text: str) -> str:
    """The text itself, which names the file, if it is a damping."""
    if text != DEFAULT and not float(text) >= 0:
        raise argparse.ArgumentTypeError(f"expected {DEFAULT} or a number from 0 on, got {text}")
    return text


def _measurements(run: Run, batch_size: int) -> list[float]:
    """Of each query at the last checkpoint: ``tda evaluate`` compares them with the run's own."""
    found: list[float] = []
    with torch.no_grad():
        for batch in run.batches(run.query, batch_size):
            losses = run.losses(run.module(*batch[:-1]), batch[-1])
            found += (losses / run.scale).tolist()
    return found
