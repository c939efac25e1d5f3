"""The configuration kept beside a trajectory, and what may be built from it.

Building an object calls whatever its ``_target_`` names, with any arguments: a file from elsewhere
could run any code. So only classes of this library's data, models, tasks, estimators and solvers,
and of ``torch.nn`` and ``torch.optim``, are built unless the user allows more.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tda_lightning.cli.command import command_line
from tda_lightning.cli.own_config import read_own_config
from tda_lightning.records.ensemble import folder_within
from tda_lightning.records.errors import TrajectoryFormatError, TrajectoryNotFoundError
from tda_lightning.store.ensemble_file import is_ensemble, read_ensemble

FILE_NAME = "config.yaml"
TRUSTED = (
    "tda_lightning.examples.data.",
    "tda_lightning.examples.models.",
    "tda_lightning.estimators.",
    "tda_lightning.solvers.",
    "tda_lightning.tasks.",
    "torch.nn.",
    "torch.optim.",
)


def run_folder(folder: Path) -> Path:
    """The folder of a recorded run: of an ensemble's folder, that of the run it was made from."""
    if not is_ensemble(folder):
        return folder
    return folder_within(folder, read_ensemble(folder).run)


def save_config(config: DictConfig, folder: str | Path) -> None:
    """Write the composed configuration next to the trajectory in ``folder``."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    values["made_by"] = {"command": command_line(), "versions": versions()}
    OmegaConf.save(OmegaConf.create(values), Path(folder) / FILE_NAME)


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    installed = {"python": sys.version.split()[0]}
    for package in ("tda-lightning", "torch", "lightning", "hydra-core", "numpy"):
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def run_configuration(config: DictConfig, folder: str | Path) -> DictConfig:
    """The configuration that says what the run in ``folder`` was trained with: the one that a
    command is given (``config=FILE``), or else the recorded one."""
    if config.get("config") is not None:
        return read_own_config(config.config)
    return load_config(folder)


def trusts(config: DictConfig) -> bool:
    """Whether a command may build classes from anywhere: where it is told so, and of a
    configuration that it is given by name."""
    return bool(config.trust_config) or config.get("config") is not None


def load_config(folder: str | Path) -> DictConfig:
    """The configuration that the trajectory in ``folder`` was trained with.

    Raises:
        TrajectoryNotFoundError: no such folder, or no configuration in it.
        TrajectoryFormatError: the file is no configuration of ``tda train``.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise TrajectoryNotFoundError(
            f"Expected {path}, which tda train writes next to the trajectory. For a run recorded "
            "by your own script, add config=FILE, the configuration of LightningCLI or of your own "
            "Hydra application, or use tda_lightning.AttributionModule with your model and data."
        )
    try:
        config = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise TrajectoryFormatError(f"{path} is damaged: {error}") from error
    if not isinstance(config, DictConfig) or not {"data", "model"} <= set(config):
        raise TrajectoryFormatError(
            f"{path} has no settings of data and model. Expected the configuration of tda train."
        )
    return _renamed(config)


def _renamed(config: DictConfig) -> DictConfig:
    """The configuration of an earlier version by today's names of its data and models."""
    text = OmegaConf.to_yaml(config)
    for old in ("data", "models"):
        text = text.replace(
            f"_target_: tda_lightning.{old}.", f"_target_: tda_lightning.examples.{old}."
        )
    renamed = OmegaConf.create(text)
    assert isinstance(renamed, DictConfig)
    return renamed


def build(node: Any, trust: bool, **changes: Any) -> Any:
    """The object that a node of a recorded configuration describes.

    Args:
        node: a configuration with a ``_target_``.
        trust: build classes from anywhere.
        changes: arguments that replace recorded ones.

    Raises:
        ValueError: a class from elsewhere, without ``trust``.
    """
    if node is None:
        return None
    own = OmegaConf.merge(node)
    OmegaConf.set_struct(own, False)  # that of tda train is closed to keys which it does not have
    node = OmegaConf.merge(own, changes)
    if not trust:
        for target in _targets(OmegaConf.to_container(node, resolve=True)):
            if not _is_trusted(target):
                raise ValueError(
                    f"The recorded configuration builds {target}, which is not part of this "
                    "library's data, models and tasks or of torch.nn and torch.optim. Building it "
                    "runs its code: if you know where the trajectory comes from, add "
                    "trust_config=true."
                )
    return instantiate(node, _convert_="all")


def _targets(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)


def _is_trusted(target: str) -> bool:
    if not target.startswith(TRUSTED):
        return False
    # The name alone proves nothing: torch.nn.functional.torch.load begins like a trusted one.
    found = get_object(target)
    home = f"{getattr(found, '__module__', '')}."
    ours = inspect.isfunction(found) and home.startswith("tda_lightning.examples.models.")
    return ours or (inspect.isclass(found) and home.startswith(TRUSTED))
