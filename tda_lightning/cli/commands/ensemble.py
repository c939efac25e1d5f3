"""``tda ensemble``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from tda_lightning.cli.command import clear_errors, command_line, required
from tda_lightning.cli.ensemble_members import made_members
from tda_lightning.cli.inspect_table import ensemble_table
from tda_lightning.cli.retraining import RecordedRun
from tda_lightning.cli.retraining_cache import parse_part
from tda_lightning.cli.run_config import run_configuration, versions
from tda_lightning.ensembles.dropout import RATE, mask_bytes, mask_settings
from tda_lightning.ensembles.folder import begin, recording_bytes, require_room, waiting
from tda_lightning.ensembles.forks import fork_bytes, fork_point, fork_points
from tda_lightning.ensembles.lora import RANK, adapter_settings
from tda_lightning.ensembles.making import diverged
from tda_lightning.records.ensemble import FINISHED, MemberFact
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.store.ensemble_file import read_ensemble
from tda_lightning.store.reader import read_facts

_INTERRUPTED = 130  # exit status of a command that SIGINT ends


@clear_errors
def ensemble(config: DictConfig) -> None:
    """Make the members of an ensemble that are not there yet."""
    run = Path(required(config, "trajectory", "tda ensemble FOLDER members=5"))
    run_configuration(config, run)  # before anything is written
    part = parse_part(config.part)
    _require_one_process(config.kind, run)
    with_run = config.kind in ("seeds", "forks")
    root = begin(run, config.kind, config.members, _settings(config, run), with_run)
    missing = waiting(root)
    if part is not None:
        number, count = part
        missing = [member for member in missing if member.number % count == number - 1]
    require_room(root, missing, _sizes(run, root, missing))
    made_by = {"command": command_line(), "versions": versions()}
    done = 0
    try:
        with SlowProgress("Training members", len(missing)) as progress:
            for _ in made_members(config, root, missing, made_by):
                done += 1
                progress.advance()
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning exits without a message.
        print(
            f"Interrupted after {done} of {len(missing)} members, which are kept in {root}. Run "
            "the same command again to go on.",
            file=sys.stderr,
        )
        raise SystemExit(_INTERRUPTED) from stop
    facts = read_ensemble(root)
    Console().print(ensemble_table(root, facts))
    for line in diverged(root):
        print(line, file=sys.stderr)
    finished = sum(member.state == FINISHED for member in facts.members)
    print(f"{finished} of {len(facts.members)} members are finished: tda attribute {root}")


def _require_one_process(kind: str, run: Path) -> None:
    """Refuse to train in one process what was trained in several."""
    processes = read_facts(run).settings.get("world_size") or 1
    if kind in ("seeds", "lora") and processes != 1:
        raise UnsupportedTrainingError(
            f"The run was trained in {processes} processes, and tda ensemble trains in one. Use "
            "tda_lightning.ensembles.member in your own script."
        )


def _settings(config: DictConfig, run: Path) -> dict[str, object]:
    """What the members of a kind have in common."""
    kinds = {"at": "forks", "rate": "dropout", "rank": "lora", "epochs": "lora"}
    for name, kind in kinds.items():
        if config[name] is not None and config.kind != kind:
            raise ValueError(f"{name} is for kind={kind}, got kind={config.kind}.")
    if config.kind == "forks":
        at = None if config.at is None else list(config.at)
        return {"at": fork_points(Trajectory.load(run), at)}
    if config.kind == "dropout":
        recorded = RecordedRun.load(config)
        rate = RATE if config.rate is None else config.rate
        return mask_settings(recorded.trajectory, recorded.module, rate)
    if config.kind == "lora":
        recorded_epochs = int(Trajectory.load(run).steps.epoch.max()) + 1
        epochs = max(1, recorded_epochs // 5) if config.epochs is None else config.epochs
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}.")
        rank = RANK if config.rank is None else config.rank
        return adapter_settings(rank, epochs=epochs)
    return {}


def _sizes(run: Path, root: Path, members: Sequence[MemberFact]) -> list[int]:
    """Bytes that each member will take."""
    facts = read_ensemble(root)
    if facts.kind == "dropout":
        return [mask_bytes(run)] * len(members)
    points: Any = facts.settings.get("at")
    if points is None:
        return [recording_bytes(run)] * len(members)
    trajectory = Trajectory.load(run)
    return [fork_bytes(trajectory, fork_point(member, points)) for member in members]
