"""What is judged: our estimators, and the wrappers that come with quanda."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.judges.explainer import RecordedExplainer
from experiments.judges.names import BASELINE, OURS
from experiments.judges.setting import Problem
from tda_lightning import Trajectory
from tda_lightning.optimizers import applied_rates
from tda_lightning.tasks import ClassificationTask

FEATURES, HEAD = "network.10", "network.11"  # the last layer's inputs, and the layer


@dataclass(frozen=True)
class Method:
    """An explainer class of quanda's kind and its arguments besides model and training set.

    Attributes:
        name: in the table.
        make: the class.
        arguments: of it.
        checkpoints: files of weights, for those that read several.
    """

    name: str
    make: type
    arguments: dict[str, Any]
    checkpoints: list[str] | None = None

    def explainer(self, model: nn.Module, problem: Problem) -> Any:
        """Made, and fitted where the class fits when it is made."""
        given = {} if self.checkpoints is None else {"checkpoints": self.checkpoints}
        return self.make(model=model, train_dataset=problem.train, **given, **fresh(self.arguments))


def fresh(arguments: dict[str, Any]) -> dict[str, Any]:
    """Estimators are made anew for every explainer."""
    return {
        name: value() if name in ("estimator", "loss") else value
        for name, value in arguments.items()
    }


def method(name: str, run: Trajectory, model: nn.Module, folder: Path, head: str = HEAD) -> Method:
    """One of ``names.METHODS`` for one run.

    Args:
        run: recorded.
        model: with its last weights.
        folder: for the files that the wrappers write.
        head: name of the last layer.
    """
    if name in OURS:
        estimator, keep = OURS[name]
        arguments = {"trajectory": run, "estimator": estimator, "loss": ClassificationTask}
        return Method(name, RecordedExplainer, {**arguments, "keep": keep})
    from quanda.explainers import wrappers
    from quanda.explainers.random import RandomExplainer

    if name == BASELINE:
        return Method(name, RandomExplainer, {"seed": 27})
    cache = {"cache_dir": str(folder / name), "model_id": "run"}
    files = checkpoint_files(run, folder)
    if name == "CaptumSimilarity":
        arguments = {**cache, "layers": FEATURES, "batch_size": 500}
        return Method(name, wrappers.CaptumSimilarity, arguments)
    if name == "CaptumTracInCP":
        loss = {"loss_fn": nn.CrossEntropyLoss(reduction="sum"), "batch_size": 250}
        arguments = {**loss, "sample_wise_grads_per_batch": True}
        return Method(name, wrappers.CaptumTracInCP, {**arguments, **loader(run)}, files)
    if name == "CaptumTracInCPFast":
        loss = {"loss_fn": nn.CrossEntropyLoss(reduction="sum"), "batch_size": 250}
        arguments = {**loss, "final_fc_layer": model.get_submodule(head)}
        return Method(name, wrappers.CaptumTracInCPFast, {**arguments, **loader(run)}, files)
    if name == "TRAK":
        return Method(name, wrappers.TRAK, {**cache, "proj_dim": 1024, "batch_size": 100})
    layers = {"features_layer": FEATURES, "classifier_layer": HEAD}
    # A tenth of its default: each of the steps searches along a line.
    fit = {"epoch": 300, "batch_size": 500, "show_progress": False}
    arguments = {**cache, **layers, **fit}
    return Method(name, wrappers.RepresenterPoints, arguments)


def checkpoint_files(run: Trajectory, folder: Path) -> list[str]:
    """The recorded weights after step 0 as files, the earliest first."""
    files = []
    for step in sorted(run.checkpoints)[1:]:
        file = folder / f"step-{step}.pt"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(dict(run.checkpoints[step].parameters), file)
        files.append(str(file))
    return files


def loader(run: Trajectory) -> dict[str, Callable[[nn.Module, str], float]]:
    """Loads a file of weights; gives the sum of the rates since the checkpoint before it."""
    steps = sorted(run.checkpoints)
    rates = {
        step: float(applied_rates(run, slice(before, step)).sum(0)[0])
        for before, step in zip(steps, steps[1:], strict=False)
    }

    def load(module: nn.Module, path: str) -> float:
        module.load_state_dict(torch.load(path, weights_only=True))
        name = Path(path).stem
        step = int(name.removeprefix("step-")) if name.startswith("step-") else steps[-1]
        return rates[step]

    return {"checkpoints_load_func": load}


def explained(method: Method, model: nn.Module, problem: Problem) -> dict[str, Any]:
    """Explanations of the predicted classes, or for wrong labels the influence of each training
    example on itself; for the clean digits both, with the processor time of a first ``explain``
    (with the making of the explainer), of a second one, of other queries, and of the first again.
    """
    inputs, _ = problem.query.tensors
    with torch.no_grad():
        targets = model(inputs).argmax(1)
    half = len(inputs) // 2
    times = [time.process_time()]
    explainer = method.explainer(model, problem)
    found: dict[str, Any] = {}
    if problem.name != "mislabelled":
        first = explainer.explain(inputs[:half], targets[:half])
        times.append(time.process_time())
        second = explainer.explain(inputs[half:], targets[half:])
        times.append(time.process_time())
        found["values"] = torch.cat([first, second]).detach().float()
    if problem.name == "clean":
        explainer.explain(inputs[:half], targets[:half])
        times.append(time.process_time())
    if problem.name in ("clean", "mislabelled"):
        own = explainer.self_influence(batch_size=100)
        times.append(time.process_time())
        found["self_influence"] = own.detach().float()
    if problem.name == "clean":
        spent = (after - before for before, after in zip(times, times[1:], strict=False))
        found |= zip(("first", "second", "again", "self"), spent, strict=True)
    return found


def similarity(model: nn.Module, problem: Problem) -> Tensor:
    """Cosines of the last layer's inputs, [query, train]."""
    features = nn.Sequential(*list(model.network)[:-1])  # type: ignore[arg-type]
    with torch.no_grad():
        query, train = (features(data.tensors[0]) for data in (problem.query, problem.train))
    return F.normalize(query, dim=1) @ F.normalize(train, dim=1).T
