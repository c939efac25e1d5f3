"""Hydra's launchers, where their plugins are installed: each takes up a sweep of ours."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from hydra_plugins.tda_lightning_searchpath import conf_directory

LAUNCHERS = [
    ("joblib", "hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    ("submitit_local", "hydra_plugins.hydra_submitit_launcher", ["hydra.launcher.timeout_min=9"]),
    (
        "submitit_slurm",
        "hydra_plugins.hydra_submitit_launcher",
        ["hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=1"],
    ),
    ("ray", "hydra_plugins.hydra_ray_launcher", ["+hydra.launcher.ray.remote.num_gpus=1"]),
]


@pytest.mark.parametrize(
    ("name", "plugin", "settings"), LAUNCHERS, ids=lambda value: str(value)[:14]
)
def test_a_sweep_of_ours_goes_by_each_launcher(name, plugin, settings):
    """The settings that the README names exist, and the launcher can be made of them."""
    if find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed")
    given = ["trajectory=runs/digits", "part=1/2", f"hydra/launcher={name}", *settings]
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        assert compose("ensemble", given, return_hydra_config=True).part == "1/2"
        config = compose("evaluate", given, return_hydra_config=True)
    assert config.part == "1/2"
    assert type(instantiate(config.hydra.launcher, _recursive_=False)).__module__.startswith(plugin)
