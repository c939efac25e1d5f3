"""Configurations of others: those of LightningCLI and of one's own Hydra application.

LightningCLI names a class by ``class_path`` and its arguments by ``init_args``; Hydra by
``_target_``, with arguments beside it. Both say what is built; the commands work with the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

_LINKED = ("optimizer", "lr_scheduler")  # which LightningCLI puts into the module


def read_own_config(path: str | Path, complete: bool = True) -> DictConfig:
    """Data, model and trainer of a configuration, in Hydra's form.

    Args:
        complete: refuse one that does not name the classes of model and data.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names no classes of a model and of data.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no configuration at {file}: expected a file of LightningCLI (config.yaml in "
            "its log folder) or of a Hydra application (.hydra/config.yaml in its output folder)."
        )
    try:
        loaded = OmegaConf.load(file)
        if not isinstance(loaded, DictConfig):
            raise ValueError(f"{file} is a list, expected settings by name.")
        # Interpolations point anywhere in the file: only what is needed is resolved, in place.
        parts = {
            name: OmegaConf.to_container(loaded[name], resolve=True)
            for name in ("model", "data", "trainer", "task", *_LINKED)
            if OmegaConf.is_config(loaded.get(name))
        }
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as a configuration: {error}") from error
    # Under a subcommand, as `python main.py --print_config fit` nests it.
    if "model" not in parts and OmegaConf.is_config(loaded.get("fit")):
        nested = OmegaConf.to_container(loaded.fit, resolve=True)
        assert isinstance(nested, dict)
        parts = {str(name): value for name, value in nested.items()}
    converted: dict[str, Any] = {name: in_hydra_form(part) for name, part in parts.items()}
    for name in ("model", "data") if complete else ():
        require_class(converted, name, file)
    seed = loaded.get("seed_everything", loaded.get("seed"))
    if isinstance(seed, int) and not isinstance(seed, bool):
        converted["seed"] = seed
    return OmegaConf.create(converted)


def require_class(config: Mapping[Any, Any], name: str, file: object) -> None:
    """Refuse a configuration that leaves the class of its model or data to code.

    Raises:
        ValueError: there is no class.
    """
    if "_target_" in (config.get(name) or {}):
        return
    example = "module=my.Module" if name == "model" else "data=my.Data"
    raise ValueError(
        f"{file} does not name the class of the {name}: expected {name}.class_path (LightningCLI) "
        f"or {name}._target_ (Hydra). Where the class is given in code, LightningCLI(MyModule, "
        f"MyData), add it to the file, {name}: {{class_path: ..., init_args: ...}}, or give it to "
        f"tda train: {example}."
    )


def in_hydra_form(node: Any) -> Any:
    """``class_path`` and ``init_args`` as ``_target_`` and arguments beside it, at any depth.

    Example:
        >>> in_hydra_form({"class_path": "my.Net", "init_args": {"width": 8}})
        {'_target_': 'my.Net', 'width': 8}
    """
    if isinstance(node, list):
        return [in_hydra_form(part) for part in node]
    if not isinstance(node, dict):
        return node
    if isinstance(node.get("class_path"), str) and node.keys() <= {
        "class_path",
        "init_args",
        "dict_kwargs",
    }:
        arguments = {**(node.get("init_args") or {}), **(node.get("dict_kwargs") or {})}
        return {"_target_": node["class_path"], **in_hydra_form(arguments)}
    return {name: in_hydra_form(part) for name, part in node.items()}
