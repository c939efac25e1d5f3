"""quanda's own metrics on kept explanations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.judges.methods import HEAD, Method, fresh
from experiments.judges.setting import MIXED_CLASS, SHORTCUT_CLASS, Problem

TOP = 5


def told(metric: Any) -> list[float]:
    """The score, with the 95% interval over queries where the metric has one."""
    try:
        found = metric.compute_bootstrapped(seed=0)
    except NotImplementedError:
        return [metric.compute()["score"]]
    return [found["score"], found["ci_low"], found["ci_high"]]


def judged(
    problem: Problem, model: nn.Module, explanations: Any, self_influence: Tensor | None
) -> dict[str, list[float]]:
    """Every metric that applies to a problem, but for those that need other models."""
    from quanda import metrics

    inputs, labels = problem.query.tensors
    with torch.no_grad():
        targets = model(inputs).argmax(1)
    downstream, heuristics = metrics.downstream_eval, metrics.heuristics
    given = {"model": model, "train_dataset": problem.train}
    if problem.name == "clean":
        classes = downstream.ClassDetectionMetric(**given, s=TOP)
        classes.update(explanations, targets)
        top = heuristics.TopKCardinalityMetric(**given, top_k=TOP)
        top.update(explanations)
        return {"class": told(classes), "cardinality": told(top)}
    if problem.name == "subclass":
        finer = downstream.SubclassDetectionMetric(
            **given, train_subclass_labels=problem.train_groups, s=TOP
        )
        finer.update(explanations, problem.query_groups)
        return {"subclass": told(finer)}
    special = problem.special.nonzero().squeeze(1)
    if problem.name == "mislabelled":
        if self_influence is None:
            return {}
        metric = downstream.MislabelingDetectionMetric(
            **given,
            mislabeling_indices=special.tolist(),
            precomputed_self_influence=in_large_units(self_influence),
        )
        return {"mislabelled": [metric.compute()["score"]]}
    if problem.name == "shortcut":
        metric = downstream.ShortcutDetectionMetric(
            **given, shortcut_indices=special, shortcut_cls=SHORTCUT_CLASS
        )
        metric.update(explanations, inputs, labels)
        return {"shortcut": told(metric)} if metric.auprc_scores else {}
    metric = heuristics.MixedDatasetsMetric(
        **given, adversarial_indices=problem.special.int(), filter_by_prediction=True
    )
    metric.update(explanations, inputs, torch.full_like(labels, MIXED_CLASS))
    return {"mixed": told(metric)}


def in_large_units(self_influence: Tensor) -> Tensor:
    """In units so large that quanda's ranking, which adds 1e-4 for each place in the training set
    against ties, is a ranking of the values."""
    values = self_influence.double()
    return values / values.std() * 1e9


def randomised_model(
    method: Method, problem: Problem, model: nn.Module, explanations: Tensor, folder: Path
) -> list[float]:
    """Rank correlation with explanations of a model with random weights, quanda's own test."""
    from quanda.metrics.heuristics import ModelRandomizationMetric

    inputs, _ = problem.query.tensors
    with torch.no_grad():
        targets = model(inputs).argmax(1)
    arguments = fresh(method.arguments)
    load = arguments.pop("checkpoints_load_func", None)
    last = folder / "last.pt"
    torch.save(model.state_dict(), last)
    explainer = method.make
    if "final_fc_layer" in arguments:  # is one of the other model
        del arguments["final_fc_layer"]
        explainer = of_head(method.make)
    if load is not None:
        arguments["checkpoints_load_func"] = load
    metric = ModelRandomizationMetric(
        model=model,
        model_id=method.name,
        cache_dir=str(folder / "random"),
        train_dataset=problem.train,
        checkpoints=[str(last)],
        explainer_cls=explainer,
        expl_kwargs=arguments,
    )
    metric.update(explanations, inputs, targets)
    return told(metric)


def of_head(make: type) -> type:
    """An explainer of the last layer of whatever model it is given."""

    class OfHead(make):  # type: ignore[misc,valid-type]
        def __init__(self, model: nn.Module, **arguments: Any) -> None:
            super().__init__(model=model, final_fc_layer=model.get_submodule(HEAD), **arguments)

    return OfHead


def linear_datamodeling(
    problem: Problem,
    model: nn.Module,
    explanations: Tensor,
    subsets: Tensor,
    files: list[str],
    folder: Path,
) -> list[float]:
    """quanda's linear datamodeling score of the margin of the label, over retrained models."""
    from quanda.metrics.ground_truth import LinearDatamodelingMetric

    metric = LinearDatamodelingMetric(
        model=model,
        train_dataset=problem.train,
        m=len(subsets),
        subset_ids=[row.nonzero().squeeze(1).tolist() for row in subsets],
        subset_ckpt_filenames=files,
        cache_dir=str(folder),
    )
    inputs, labels = problem.query.tensors
    metric.update(explanations, labels, inputs)
    return told(metric)
