"""``tda unlearn``."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.cli.command import clear_errors, require_new, required
from tda_lightning.cli.recorded_run import Replayable
from tda_lightning.edits import Removal
from tda_lightning.evaluation import accuracy, compare_unlearned, measure, membership, retrain
from tda_lightning.evaluation.retraining import losses
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.module_state import load_tensors


@clear_errors
def unlearn(config: DictConfig) -> None:
    """Write the weights that training without some examples is predicted to lead to, and compare
    them with those of training again."""
    folder = Path(required(config, "trajectory", "tda unlearn trajectory=FOLDER remove=[3,17]"))
    removed = _examples(config.remove)
    target = Path(config.weights or folder / "unlearned.pt")
    require_new(config, "weights, which are kept", "weights=FILE", target)
    trajectory, _, _, module, task, train, query = Replayable.load(config, folder)
    estimator = instantiate(config.estimator, _convert_="all")
    attribution = AttributionModule(module, trajectory, estimator, task)
    began = time.process_time()
    unlearned = attribution.unlearned(train, [Removal(index) for index in removed])
    seconds = time.process_time() - began
    torch.save(unlearned.state_dict(), target)
    print(f"Unlearned {len(removed)} training examples: {target}")
    if not config.retrain:
        return
    weights = torch.ones(len(train), dtype=torch.float64)
    weights[removed] = 0
    began = time.process_time()
    again = retrain(trajectory, module, task, train, weights)
    again_seconds = time.process_time() - began
    last = trajectory.checkpoints[trajectory.last_step]
    gone = train.with_dataset(torch.utils.data.Subset(train.dataset, removed))
    stays = sorted(set(range(len(train))) - set(removed))
    left = train.with_dataset(torch.utils.data.Subset(train.dataset, stays))
    measures: dict[str, Any] = {
        "mean measurement of the queries": lambda own: float(_measured(own, task, query).mean()),
        "mean loss of what was removed": lambda own: float(_lost(own, task, gone).mean()),
        # Where it rises well above both others, the step went too far.
        "mean loss of what stays": lambda own: float(_lost(own, task, left).mean()),
        "membership of what was removed (0.5: forgotten)": lambda own: membership(
            _lost(own, task, gone), _lost(own, task, query)
        ),
    }
    if accuracy(module, task, query) is not None:  # of a task with classes
        measures["accuracy of the queries"] = lambda own: accuracy(own, task, query)
        measures["accuracy of what was removed"] = lambda own: accuracy(own, task, gone)
    states = ({**last.buffers, **last.parameters}, unlearned.state_dict(), again)
    original, moved, retrained = (_with(module, state) for state in states)
    report = compare_unlearned(original, moved, retrained, measures, (seconds, again_seconds))
    table = Table(title=f"{report.recovered:.0%} of the way to the retrained weights")
    for name in ("", "before", "unlearned", "retrained"):
        table.add_column(name, justify="right" if name else "left")
    for row in report.rows():
        table.add_row(*row)
    Console().print(table)


def _examples(given: Any) -> list[int]:
    """Indices of training examples."""
    plain = OmegaConf.to_container(given) if OmegaConf.is_list(given) else given
    if not isinstance(plain, Sequence) or not plain or not all(type(n) is int for n in plain):
        raise ValueError(
            "remove names the training examples to be unlearned by their indices, as "
            f"remove=[3,17]; got {plain!r}."
        )
    return list(plain)


def _with(module: nn.Module, state: Any) -> nn.Module:
    own = copy.deepcopy(module)
    load_tensors(own, dict(state))
    return own


def _measured(module: nn.Module, task: Any, query: ExampleSource) -> torch.Tensor:
    return measure(module, task, module.state_dict(), query)


def _lost(module: nn.Module, task: Any, examples: ExampleSource) -> torch.Tensor:
    return losses(module, task, module.state_dict(), examples)
