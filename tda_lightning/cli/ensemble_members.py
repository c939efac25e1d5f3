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
from tda_lightning.ensembles.dropout import mask_member
from tda_lightning.ensembles.forks import fork_member, replay_of, require_faithful
from tda_lightning.ensembles.lora import adapt_member
from tda_lightning.ensembles.seeds import train_member
from tda_lightning.records.ensemble import MemberFact
from tda_lightning.records.fresh_training import FreshTraining
from tda_lightning.store.atomic_write import write_text
from tda_lightning.store.ensemble_file import read_ensemble


def made_members(
    config: DictConfig, root: Path, members: Sequence[MemberFact], made_by: dict[str, Any]
) -> Iterator[int]:
    """Make the members, as they are planned in the folder ``root``; the number of each that is
    done."""
    if not members:
        return
    if config.processes == 1 or len(members) < 2:
        maker = _Maker(config, root)
        for member in members:
            maker.make(member, made_by)
            yield member.number
        return
    pool = ProcessPoolExecutor(
        min(config.processes, len(members)),
        # A fork of a process that has used CUDA cannot use it.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(OmegaConf.to_container(config, resolve=True), root),
    )
    try:
        jobs = {pool.submit(_work, member.number, made_by): member.number for member in members}
        for job in as_completed(jobs):
            job.result()
            yield jobs[job]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Maker:
    """Makes members one after the other, from a run that is loaded once."""

    def __init__(self, config: DictConfig, root: Path) -> None:
        self.root, self.run = root, RecordedRun.load(config)
        facts, run = read_ensemble(root), self.run
        self.kind = facts.kind
        if self.kind == "forks":
            self.replay = replay_of(run.trajectory, run.module, run.train, run.task)
            points: Any = facts.settings["at"]
            require_faithful(self.replay, points)

    def make(self, member: MemberFact, made_by: dict[str, Any]) -> None:
        """Make one member, with its configuration beside it."""
        folder = self.root / member.folder
        seed = member.seed if self.kind == "seeds" else None
        config = _configuration(self.run.run_config, folder, seed, made_by)
        # Before the training: a member that is finished has it.
        write_text(folder / FILE_NAME, OmegaConf.to_yaml(config))
        if self.kind == "forks":
            fork_member(self.root, member, self.replay)
        elif self.kind == "dropout":
            mask_member(self.root, member, self.run.trajectory)
        elif self.kind == "lora":
            adapt_member(self.root, member, self._fine_tuning)
        else:
            train_member(self.root, member, self.run.fresh)

    def _fine_tuning(self, seed: int) -> FreshTraining:
        epochs: Any = read_ensemble(self.root).settings["epochs"]
        return self.run.fresh(seed, max_epochs=epochs, max_steps=-1)


def _configuration(
    recorded: DictConfig, folder: Path, seed: int | None, made_by: dict[str, Any]
) -> DictConfig:
    """The recorded configuration with what is the member's own."""
    config: Any = OmegaConf.to_container(recorded, resolve=True)
    config |= {"output": str(folder), "made_by": made_by}
    if "path" in (config.get("recorder") or {}):
        config["recorder"]["path"] = str(folder)
    if seed is not None:
        config["seed"] = seed
        if "seed" in config["data"]:
            config["data"]["seed"] = seed
    return OmegaConf.create(config)


_maker_of_worker: list[_Maker] = []


def _start_worker(settings: Any, root: Path) -> None:
    quiet_lightning()
    # The parent reports an interruption; its workers end silently.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    config = OmegaConf.create(settings)
    torch.set_num_threads(config.threads or 1)
    _maker_of_worker.append(_Maker(config, root))


def _work(number: int, made_by: dict[str, Any]) -> None:
    (maker,) = _maker_of_worker
    maker.make(read_ensemble(maker.root).members[number - 1], made_by)
