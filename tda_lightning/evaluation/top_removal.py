"""Subset removal (Bae et al. 2024, section 5): does a query suffer without its proponents?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning.evaluation.lds import Interval, bootstrap, draw_subsets
from tda_lightning.evaluation.retraining import measure, of_each_batch, retrain_each
from tda_lightning.records.scores import Scores
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.digests import integer_digest
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.tasks import AttributionTask, ClassificationTask


@dataclass(frozen=True)
class TopRemoval:
    """What leaving out so many examples did to the queries, in the recorded run.

    Attributes:
        k: how many were left out.
        rise: of each query's measurement without its own ``k`` top proponents.
        random_rise: without ``k`` random examples, averaged over the draws.
        flipped: share of the queries that are then classified otherwise; None where there are no
            classes.
        random_flipped: the same for random examples.
    """

    k: int
    rise: Interval
    random_rise: Interval
    flipped: float | None
    random_flipped: float | None


def top_removal(
    trajectory: Trajectory,
    module: nn.Module,
    task: AttributionTask | None,
    dataset: Any,
    queries: Any,
    scores: Scores,
    ks: Sequence[int],
    draws: int = 5,
    seed: int = 0,
    together: int = 1,
    training: bool = True,
) -> list[TopRemoval]:
    """Replay the recorded run without each query's top proponents, and without random ones.

    Args:
        trajectory: the recorded run.
        module: built as it was trained.
        task: gives losses and measurements; classes are compared for a ``ClassificationTask``.
        dataset: the recorded training set.
        queries: of the scores, in their order.
        scores: whose proponents are left out.
        ks: how many.
        draws: random sets for each k, which all queries share.
        seed: of the random sets.
        together: see :func:`~tda_lightning.evaluation.retrain_each`.
        training: replay in train mode.

    Returns:
        For each k, in the order given. It takes 1 + len(ks) x (queries + draws) replays.
    """
    if (given := len(ExampleSource.of(queries, 1, "query"))) != scores.num_queries:
        raise ValueError(f"The scores are of {scores.num_queries} queries, got {given}.")
    kept = removals(scores, ks, draws, seed)
    work = (trajectory, module, task, dataset, kept.float(), training, together)
    measured, classes = [], []
    with SlowProgress("Retraining", len(kept)) as progress:
        for state in retrain_each(*work):
            measured.append(measure(module, task, state, queries).double().cpu()[None])
            found = predicted_classes(module, task, state, queries)
            classes += [] if found is None else [found[None]]
            progress.advance()
    return compare_removals(
        torch.stack(measured), torch.stack(classes) if classes else None, ks, draws
    )


def removals(scores: Scores, ks: Sequence[int], draws: int, seed: int = 0) -> Tensor:
    """Which examples each retraining keeps, bool [retraining, train]: first all of them; then for
    each k all but a query's ``k`` top proponents, query by query, and ``draws`` times all but
    ``k`` random ones."""
    train, count = scores.num_train, scores.num_queries
    if not ks or min(ks) < 1 or max(ks) >= train:
        raise ValueError(f"Each k must be from 1 to {train - 1}, got {list(ks)}.")
    if draws < 1:
        raise ValueError(f"Something to compare with needs draws of at least 1, got {draws}.")
    masks = [torch.ones(1, train, dtype=torch.bool)]
    for k in ks:
        own = torch.ones(count, train, dtype=torch.bool)
        for query in range(count):
            own[query, scores.proponents(query, k)[0]] = False
        masks += [own, draw_subsets(train, (train - k) / train, draws, seed)]
    return torch.cat(masks)


def compare_removals(
    outcomes: Tensor, classes: Tensor | None, ks: Sequence[int], draws: int
) -> list[TopRemoval]:
    """What the retrainings of :func:`removals` say.

    Args:
        outcomes: measurements, [retraining, seed, query]; a rise is one of their means over seeds.
        classes: predicted, int64 [retraining, seed, query]; a flip is a difference from training
            on everything with the same seed.
        ks: as given there.
        draws: as given there.
    """
    means, count = outcomes.double().mean(1), outcomes.shape[2]
    rises = means[1:] - means[0]
    flips = None if classes is None else (classes[1:] != classes[0]).double().mean(1)
    results = []
    for number, k in enumerate(ks):
        first = number * (count + draws)
        mine = slice(first, first + count)
        others = slice(first + count, first + count + draws)
        results.append(
            TopRemoval(
                k=k,
                rise=bootstrap(rises[mine].diagonal()),
                random_rise=bootstrap(rises[others].mean(0)),
                flipped=None if flips is None else float(flips[mine].diagonal().mean()),
                random_flipped=None if flips is None else float(flips[others].mean()),
            )
        )
    return results


def predicted_classes(
    module: nn.Module, task: AttributionTask | None, state: Mapping[str, Tensor], queries: Any
) -> Tensor | None:
    """The class that each query is given, int64 [query]; of a sequence, a digest of the classes of
    all positions, so that one that changes is a change. None without a ``ClassificationTask``."""
    if not isinstance(task, ClassificationTask):
        return None
    source = ExampleSource.of(queries, 256, "query")

    def read(batch: Any) -> Tensor:
        logits = task.forward(module, batch)[0]
        return logits.argmax(1).reshape(len(logits), -1).cpu()

    found = torch.cat(of_each_batch(read, module, state, source))
    if found.shape[1] == 1:
        return found[:, 0]
    return torch.tensor([integer_digest(row) for row in found], dtype=torch.int64)
