"""How ``tda ensemble`` makes members, in this process or in several."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from tda_lightning.cli.command import quiet_lightning
from tda_lightning.cli.retraining import RecordedRun
from tda_lightning.cli.run_config import FILE_NAME
from tda_lightning.ensembles.seeds import train_member
from tda_lightning.records.ensemble import MemberFact
from tda_lightning.store.atomic_write import write_text
from tda_lightning.store.ensemble_file import read_ensemble


def made_members(
    config: DictConfig, root: Path, members: Sequence[MemberFact], made_by: dict[str, Any]
) -> Iterator[int]:
    """Make the members, as they are planned in the folder ``root``; the number of each that is
    done."""
    if config.processes == 1 or len(members) < 2:
        run = RecordedRun.load(config)
        for member in members:
            _make(run, root, member, made_by)
            yield member.number
        return
    pool = ProcessPoolExecutor(
        min(config.processes, len(members)),
        # A fork of a process that has used CUDA cannot use it.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(OmegaConf.to_container(config, resolve=True),),
    )
    try:
        jobs = {
            pool.submit(_work, root, member.number, made_by): member.number for member in members
        }
        for job in as_completed(jobs):
            job.result()
            yield jobs[job]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _make(run: RecordedRun, root: Path, member: MemberFact, made_by: dict[str, Any]) -> None:
    folder = root / member.folder
    # Before the training: a member is finished with its configuration beside it.
    config = OmegaConf.to_yaml(_configuration(run.run_config, folder, member, made_by))
    write_text(folder / FILE_NAME, config)
    train_member(root, member, run.fresh)


def _configuration(
    recorded: DictConfig, folder: Path, member: MemberFact, made_by: dict[str, Any]
) -> DictConfig:
    """The recorded configuration with what is the member's own."""
    config: Any = OmegaConf.to_container(recorded, resolve=True)
    config |= {"output": str(folder), "seed": member.seed, "made_by": made_by}
    for node, name in (("data", "seed"), ("recorder", "path")):
        if name in (config.get(node) or {}):
            config[node][name] = member.seed if name == "seed" else str(folder)
    return OmegaConf.create(config)


_run_of_worker: list[RecordedRun] = []


def _start_worker(settings: Any) -> None:
    quiet_lightning()
    # The parent reports an interruption; its workers end silently.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    config = OmegaConf.create(settings)
    torch.set_num_threads(config.threads or 1)
    _run_of_worker.append(RecordedRun.load(config))


def _work(root: Path, number: int, made_by: dict[str, Any]) -> None:
    _make(_run_of_worker[0], root, read_ensemble(root).members[number - 1], made_by)
