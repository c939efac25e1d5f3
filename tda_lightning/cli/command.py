"""What all commands have in common: failures in words, and settings that must be given."""

from __future__ import annotations

import functools
import logging
import os
import re
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tda_lightning.cli.setting_types import require_setting_types

# Settings that make other scores, which the names of files tell apart.
_NAMING = (
    *("estimator.", "solver=", "solver.", "relabel=", "edits=", "keep=", "draws="),
    *("at_step=", "ckpt="),
    *("measurement=", "measurement.", "pool=", "pool.", "by_token="),
)

Command = Callable[[DictConfig], None]
_FAILURES = (
    ArithmeticError,
    ImportError,
    IndexError,
    OSError,
    OmegaConfBaseException,
    RuntimeError,
    TypeError,
    ValueError,
)


def clear_errors(command: Command) -> Command:
    """Report a failure by its message alone; HYDRA_FULL_ERROR=1 shows the traceback."""

    @functools.wraps(command)
    def run(config: DictConfig) -> None:
        quiet_lightning()
        try:
            require_setting_types(config)
            if config.get("threads"):
                import torch

                torch.set_num_threads(config.threads)
            command(config)
        except CompactHydraException as error:
            # Hydra wraps what a constructor raised; the reader needs the reason.
            reason = error.__cause__ or error
            raise CompactHydraException(f"tda {command.__name__}: {reason}") from error
        except _FAILURES as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            raise CompactHydraException(f"tda {command.__name__}: {error}") from error

    return run


def quiet_lightning() -> None:
    """Silence Lightning's messages that a user cannot act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*LeafSpec.*",
        "predict returned None.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def required(config: DictConfig, key: str, example: str) -> str:
    """A setting without a default.

    Raises:
        ValueError: it is missing; ``example`` shows how to give it.
    """
    if OmegaConf.is_missing(config, key):
        raise ValueError(f"Expected {key}, got none. For example: {example}")
    return str(config[key])


def require_new(config: DictConfig, what: str, setting: str, *files: Path) -> None:
    """Refuse to replace files, unless ``overwrite=true`` asks for it.

    Args:
        what: they hold then, in words.
        setting: that chooses others.

    Raises:
        FileExistsError: there is one.
    """
    for file in files:
        if file.exists() and not config.overwrite:
            raise FileExistsError(
                f"{file} already holds {what}. Choose another file with {setting}, "
                "or replace it with overwrite=true."
            )


def not_null(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings that have a value."""
    return {str(key): value for key, value in settings.items() if value is not None}


def command_line() -> str:
    """The command that is running, as a user would type it to run it again."""
    # Not sys.argv: in a sweep this is one of many runs, perhaps in a worker process.
    hydra = HydraConfig.get()
    return shlex.join(["tda", str(hydra.job.config_name), *hydra.overrides.task])


def file_name(parts: Sequence[str]) -> str:
    """A file name made of settings."""
    # Hydra would parse "=" and "," when the path is given to the next command.
    return "-".join(re.sub(r"[^\w.]+", "-", part).strip("-") for part in parts)


def estimator_name() -> str:
    """The estimator with the settings from the command line, such as source-order-recorded."""
    hydra = HydraConfig.get()
    settings = [
        override.removeprefix("estimator.")
        for override in hydra.overrides.task
        if override.startswith(_NAMING)
    ]
    return file_name([str(hydra.runtime.choices["estimator"]), *settings])


def require_usable_solver(config: DictConfig) -> None:
    """Refuse a solver that the estimator would ignore."""
    if config.get("solver") is not None and "solver" not in config.estimator:
        choices = HydraConfig.get().runtime.choices
        raise ValueError(
            f"solver={choices['solver']} is for estimators that invert curvature, such as "
            f"estimator=influence; {choices['estimator']} has no use for it."
        )
