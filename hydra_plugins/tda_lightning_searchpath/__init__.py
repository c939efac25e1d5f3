"""Lets any Hydra application select the groups of tda-lightning, such as ``estimator: source``.

Hydra imports every package it finds under the name ``hydra_plugins``, so this module stays light:
it looks for the folder of configurations without importing the library.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


def conf_directory() -> Path:
    """The folder of configurations: in the package when installed, beside it in a checkout."""
    spec = find_spec("tda_lightning")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("tda_lightning is not installed.")
    package = Path(spec.origin).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


class TdaLightningSearchPath(SearchPathPlugin):
    """Adds our folder last, so the application's own files of the same name win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="tda-lightning", path=f"file://{conf_directory()}")
