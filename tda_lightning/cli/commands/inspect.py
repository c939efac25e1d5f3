"""``tda inspect``."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from tda_lightning.cli.command import clear_errors, required
from tda_lightning.cli.inspect_table import description_table, ensemble_table
from tda_lightning.records.ensemble import FINISHED
from tda_lightning.records.errors import TrajectoryFormatError
from tda_lightning.store.ensemble_file import FILE_NAME as ENSEMBLE_FILE
from tda_lightning.store.ensemble_file import is_ensemble, read_ensemble
from tda_lightning.store.inspect import describe


@clear_errors
def inspect(config: DictConfig) -> None:
    """Show what is in a trajectory; fail if it is not whole."""
    folder = required(config, "trajectory", "tda inspect FOLDER")
    if is_ensemble(folder):
        _inspect_ensemble(Path(folder))
        return
    description = describe(folder)
    Console().print(description_table(description))
    for file in sorted((Path(folder) / "ensemble").glob(f"*/{ENSEMBLE_FILE}")):
        Console().print(ensemble_table(file.parent, read_ensemble(file.parent)))
    if count := len(description.problems):
        raise TrajectoryFormatError(
            f"{description.path} is not whole: {count} problem{'s' * (count > 1)}, listed above."
        )


def _inspect_ensemble(root: Path) -> None:
    """Show an ensemble's members, and what is wrong with the finished ones."""
    facts = read_ensemble(root)
    Console().print(ensemble_table(root, facts))
    problems: list[str] = []
    for member in facts.members:
        if member.state == FINISHED:
            problems += describe(root / member.folder).problems
    if problems:
        raise TrajectoryFormatError(f"{root} is not whole: {' '.join(problems)}")
