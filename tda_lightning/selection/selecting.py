r"""Choosing new data: which examples of a pool to train on for the sake of a target.

The fourth application of FastIF (Guo et al. 2020, 2012.15781), by any estimator:

1. Draw some examples of the target, the anchors.
2. Take the examples of the pool whose features are nearest to those of an anchor, or those that an
   index of gradients predicts to help it most.
3. Score the addition of each of them for the anchors, with the weights as they are now.
4. Train one step on those that are predicted to help most.

This is repeated, with other anchors and with scores of the moved weights, and the whole of it in
several replicas that draw other anchors.
"""

from __future__ import annotations

import math
import warnings
from collections import ChainMap, Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.edits import Addition, additions, known_examples
from tda_lightning.estimators.features import require_layer
from tda_lightning.estimators.neighbours import check_search, nearest
from tda_lightning.evaluation import measure
from tda_lightning.index import AttributionIndex
from tda_lightning.records.errors import NonFiniteError, UnsupportedTrainingError
from tda_lightning.records.trajectory import Checkpoint, Trajectory
from tda_lightning.report.columns import raw_labels
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.selection.pool_features import features_of
from tda_lightning.selection.pool_index import helpful_by_index
from tda_lightning.selection.selection import Choice, Selection, mean_measurements
from tda_lightning.selection.training_on import TrainingOn


def select(
    attribution: AttributionModule,
    train: object,
    pool: object,
    target: object,
    k: int = 10,
    steps: int = 10,
    anchors: int = 10,
    neighbours: int = 100,
    replicas: int = 3,
    rate: float | None = None,
    layer: str | None = None,
    metric: str = "l2",
    seed: int = 0,
    batch_size: int = 256,
    index: AttributionIndex | None = None,
) -> Selection:
    """Choose examples of a pool that make a recorded model better on a target, by training on them.

    Args:
        attribution: a recorded run of one stage, with the estimator that scores
            :class:`~tda_lightning.edits.Addition`. Where the estimator looks at several
            checkpoints, the moved weights take the place of the last one.
        train: the recorded training set, as in :meth:`AttributionModule.attribute`.
        pool: a data set (or a loader over it) whose items are like those of the training set.
            Those that are in the training set already are left out, and counted in the notes.
        target: what the model should get better at, likewise, with the right labels.
        k: examples trained on in a step, at most: those that are not predicted to help are not
            trained on.
        steps: of training; scores are made anew after each.
        anchors: examples of the target that are drawn for a step, all where there are fewer.
        neighbours: of each anchor in the pool that are scored, all where there are fewer.
        replicas: independent repetitions from the recorded weights, with other anchors.
        rate: learning rate; None: the mean rate of the recorded run.
        layer, metric: how neighbours are found, as in ``FastInfluence``.
        seed: for drawing anchors, and for losses that draw random numbers.
        batch_size: examples per batch where a data set was given.
        index: of the run, with the same estimator, to which the pool was appended: the
            ``neighbours`` that it predicts to help an anchor most are scored, in place of those
            that are near by features. None: by features.

    Warns:
        UserWarning: all of the target has one label.

    Raises:
        UnsupportedTrainingError: several stages or an ensemble, or an optimizer without a formula.
        ValueError: an empty or impossible setting; nothing in the pool is new, or helps.
        NonFiniteError: training diverged.

    References:
        | FastIF: Scalable Influence Functions for Efficient Model Interpretation and Debugging
          (Guo et al., 2020), sec. 5
        | https://arxiv.org/abs/2012.15781
    """
    counts = {"k": k, "steps": steps, "anchors": anchors, "neighbours": neighbours}
    for name, count in {**counts, "replicas": replicas}.items():
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}.")
    if rate is not None and not 0 < rate < float("inf"):
        raise ValueError(f"rate must be a number above 0 or None, got {rate!r}.")
    check_search(metric, "torch")
    if index is not None and layer is not None:
        raise ValueError(
            f"layer={layer!r} says whose features are compared, and an index is asked in their "
            "place: expected one of the two."
        )
    if len(attribution.members) > 1 or len(attribution.stages) > 1:
        raise UnsupportedTrainingError(
            f"select() trains one recorded run on, got {len(attribution.members)} runs of "
            f"{len(attribution.stages)} stages. Give the trajectory of one of them."
        )
    module, task = attribution.module, attribution.task
    trajectory = attribution.trajectory
    equal = replace(trajectory, data_weights=None)  # recorded ones are of other examples
    if layer is not None:
        require_layer(module, layer)
    source = ExampleSource.of(train, batch_size, "training")
    wanted = source.others(target, batch_size, "target")
    given: Any = pool.dataset if isinstance(pool, DataLoader) else pool
    offered = additions(given)
    new, notes = _new_examples(set(known_examples(offered, source)), len(offered))
    if warning := one_class_warning(raw_labels(wanted.dataset)):
        warnings.warn(warning, stacklevel=2)
        notes.append(warning)
    candidates = source.with_dataset(Subset(given, new))
    if index is None:
        points = features_of(module, task, trajectory, wanted, layer)
        others = features_of(module, task, trajectory, candidates, layer)
        close = nearest(points, others, min(neighbours, len(new)), metric)
    else:
        bound = replace(index, attribution=attribution, train=source)
        close = helpful_by_index(bound, wanted, given, new, neighbours, batch_size)

    choices: list[Choice] = []
    measured: list[list[float]] = []
    states: list[Mapping[str, Tensor]] = []
    for replica in range(replicas):
        draw = torch.Generator().manual_seed(seed + replica)
        training = TrainingOn(equal, module, task, candidates, rate, seed)
        measured.append([_mean(attribution, training.where.tensors, wanted, 0)])
        for step in range(1, steps + 1):
            drawn = torch.randperm(len(wanted), generator=draw)[:anchors].sort().values
            near = close[drawn].unique()
            with SlowProgress(f"Replica {replica + 1}, step {step}"):
                scores = score_additions(
                    attribution,
                    source,
                    run_moved_to(trajectory, training),
                    wanted.with_dataset(Subset(wanted.dataset, drawn.tolist())),
                    [offered[new[place]] for place in near.tolist()],
                )
            best = scores.argsort(stable=True)[:k]
            best = best[scores[best] < 0]
            if not len(best):
                notes.append(
                    f"Replica {replica + 1} ended before step {step}: none of {len(near)} examples "
                    "near the anchors is predicted to help."
                )
                break
            training.train(near[best])
            measured[-1].append(_mean(attribution, training.where.tensors, wanted, step))
            choices += [
                Choice(replica, step, new[int(near[place])], float(scores[place]))
                for place in best.tolist()
            ]
        states.append(training.where.tensors)
    if not choices:
        raise ValueError(
            "No example of the pool near the target is predicted to help, so there is nothing to "
            "choose. Look at more of the pool with neighbours=..., or give another pool."
        )
    if note := worse_note(measured):
        notes.append(note)
    labels = raw_labels(given)
    return Selection(
        tuple(choices),
        len(offered),
        mean_measurements(measured),
        tuple(states),
        {} if labels is None else {own.index: labels[own.index] for own in choices},
        tuple(notes),
    )


def one_class_warning(labels: list[Any] | None) -> str | None:
    """What is wrong with a target whose examples all have one label; None where they have not."""
    counted = Counter(map(str, labels or []))
    if len(counted) != 1 or len(labels or []) < 2:
        return None
    (label,) = counted
    return (
        f"All {len(labels or [])} examples of the target have the label {label}. Whatever makes "
        f"the model answer {label} to everything helps such a target, so that is what is chosen, "
        "and other classes are forgotten. Give a target with examples of every class."
    )


def worse_note(measured: list[list[float]]) -> str | None:
    """That training on the chosen examples did harm; None where it did in no replica.

    Args:
        measured: of each replica, the target's mean measurement before training and after each
            step.
    """
    worse = [row for row in measured if row[-1] > row[0]]
    if not worse:
        return None
    return (
        f"Training on the chosen examples made the target worse in {len(worse)} of {len(measured)} "
        f"replicas (the first: from {worse[0][0]:.4g} to {worse[0][-1]:.4g}). Steps may be too "
        "large: try a smaller rate, or fewer steps of more examples; or the scores may not predict "
        "this training: try another estimator, or more damping."
    )


def _new_examples(known: set[int], size: int) -> tuple[list[int], list[str]]:
    """Indices of the examples of the pool that are in no training set, and a note on the others."""
    new = [index for index in range(size) if index not in known]
    if not new:
        raise ValueError(
            f"All {size} examples of the pool are in the training set already: there is nothing "
            "new to choose."
        )
    if not known:
        return new, []
    return new, [
        f"{len(known)} of the {size} examples of the pool are in the training set already, and "
        "were left out."
    ]


def run_moved_to(trajectory: Trajectory, training: TrainingOn) -> Trajectory:
    """The run with the weights so far as its last checkpoint, in memory."""
    last, now = trajectory.last_step, training.where.tensors
    recorded = trajectory.checkpoints[last]
    moved = Checkpoint(
        last,
        {name: now[name].cpu() for name in recorded.parameters},
        {name: now.get(name, value).cpu() for name, value in recorded.buffers.items()},
        {name: dict(states) for name, states in training.where.optimizer.items()},
        recorded.random,
    )
    held: Any = ChainMap({last: moved}, trajectory.checkpoints)  # type: ignore[arg-type]
    return replace(
        trajectory,
        checkpoints=held,
        path=None,
        curvature={},
        unfinished={},
        features={},
        what_if={},
    )


def score_additions(
    attribution: AttributionModule,
    train: ExampleSource,
    trajectory: Trajectory,
    anchors: ExampleSource,
    edits: list[Addition],
) -> Tensor:
    """Predicted change of the anchors' mean measurement by each addition, float64 [edit]."""
    own = AttributionModule(attribution.module, trajectory, attribution.estimator, attribution.task)
    scores = own.attribute(train, anchors, train.batch_size, edits=edits)
    return scores.values.double().mean(0)


def _mean(
    attribution: AttributionModule, state: Mapping[str, Tensor], target: ExampleSource, step: int
) -> float:
    """The target's mean measurement after ``step`` steps."""
    found = measure(
        attribution.module, attribution.task, state, target, trajectory=attribution.trajectory
    )
    mean = float(found.double().mean())
    if not math.isfinite(mean):
        raise NonFiniteError(
            f"The mean measurement of the target is {mean} after {step} steps on chosen examples: "
            "training diverged. Give a smaller rate."
        )
    return mean
