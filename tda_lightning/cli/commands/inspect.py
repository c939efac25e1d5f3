"""``tda inspect``."""

from __future__ import annotations

from omegaconf import DictConfig
from rich.console import Console

from tda_lightning.cli.command import clear_errors, required
from tda_lightning.cli.inspect_table import description_table
from tda_lightning.records.errors import TrajectoryFormatError
from tda_lightning.store.inspect import describe


@clear_errors
def inspect(config: DictConfig) -> None:
    """Show what is in a trajectory; fail if it is not whole."""
    description = describe(required(config, "trajectory", "tda inspect FOLDER"))
    Console().print(description_table(description))
    if count := len(description.problems):
        raise TrajectoryFormatError(
            f"{description.path} is not whole: {count} problem{'s' * (count > 1)}, listed above."
        )
