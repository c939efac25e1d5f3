"""Removal of the strongest proponents (Bae et al. 2024, section 5): does the query suffer?

The mean rise of the queries' measurements without their own top 1% of the training set is the
*query-loss difference* (QLD) of bergson's leaderboard for GPT-2 on WikiText
(https://bergson.readthedocs.io/en/latest/leaderboard.html), which stands beside that of random
removals of the same size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tda_lightning.evaluation.linear_datamodeling import Interval, bootstrap, draw_subsets
from tda_lightning.evaluation.retraining import measure, of_each_batch, retrain_each
from tda_lightning.records.scores import Scores
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.digests import integer_digest
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.tasks import AttributionTask, ClassificationTask


@dataclass(frozen=True)
class TopRemoval:
    """The effect of leaving out ``k`` examples on the queries.

    Attributes:
        k: number of examples (or tokens) left out.
        rise: of each query's measurement without its own ``k`` strongest proponents: the
            query-loss difference.
        random_rise: without ``k`` random examples, averaged over draws.
        above_random: the first minus the second, query by query.
        flipped: share of the queries whose predicted class changes; None without classes.
        random_flipped: the same for random examples.
    """

    k: int
    rise: Interval
    random_rise: Interval
    above_random: Interval
    flipped: float | None
    random_flipped: float | None


def top_removal(
    trajectory: Trajectory,
    module: nn.Module,
    task: AttributionTask | None,
    dataset: object,
    queries: object,
    scores: Scores,
    ks: Sequence[int],
    draws: int = 5,
    seed: int = 0,
    together: int = 1,
    training: bool = True,
    tokens: bool = False,
) -> list[TopRemoval]:
    """Replay the recorded run without each query's strongest proponents, or random examples.

    Args:
        trajectory: the recorded run.
        module: built as it was trained.
        task: gives losses and measurements; classes are compared for a ``ClassificationTask``.
        dataset: the recorded training set.
        queries: those of the scores, in their order.
        scores: name the proponents.
        ks: numbers of examples to leave out.
        draws: random sets for each k, shared by all queries.
        seed: of the random sets.
        together: see :func:`~tda_lightning.evaluation.retrain_each`.
        training: replay in train mode.
        tokens: leave out tokens of the training sequences instead, whose terms of the loss get
            weight 0. They stay inputs of the model. The scores must hold ``by_token``.

    Returns:
        One result per k, in the order given. It takes 1 + len(ks) x (queries + draws) replays.
    """
    train = ExampleSource.of(dataset, 1, "training")
    asked = train.others(queries, 256, "query")
    if (given := len(asked)) != scores.num_queries:
        raise ValueError(f"The scores are of {scores.num_queries} queries, got {given}.")
    if tokens:
        kept = token_removals(scores, ks, draws, seed)
        kept = kept.unflatten(1, require_tokens(scores).shape[1:])
    else:
        kept = removals(scores, ks, draws, seed)
    work = (trajectory, module, task, train, kept.float(), training, together)
    measured, classes = [], []
    with SlowProgress("Retraining", len(kept)) as progress:
        for state in retrain_each(*work):
            values = measure(module, task, state, asked, trajectory=trajectory)
            measured.append(values.double().cpu()[None])
            predicted = predicted_classes(module, task, state, asked)
            classes += [] if predicted is None else [predicted[None]]
            progress.advance()
    return compare_removals(
        torch.stack(measured), torch.stack(classes) if classes else None, ks, draws
    )


def removals(scores: Scores, ks: Sequence[int], draws: int, seed: int = 0) -> Tensor:
    """Which examples each retraining keeps, bool [retraining, train]: first all of them; then for
    each k, all but the query's ``k`` strongest proponents for each query, and all but ``k`` random
    examples ``draws`` times."""
    train, count = scores.num_train, scores.num_queries
    if not ks or min(ks) < 1 or max(ks) >= train:
        raise ValueError(f"Each k must be from 1 to {train - 1}, got {list(ks)}.")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, to compare with, got {draws}.")
    masks = [torch.ones(1, train, dtype=torch.bool)]
    for k in ks:
        own = torch.ones(count, train, dtype=torch.bool)
        for query in range(count):
            own[query, scores.proponents(query, k)[0]] = False
        masks += [own, draw_subsets(train, (train - k) / train, draws, seed)]
    return torch.cat(masks)


def token_removals(scores: Scores, ks: Sequence[int], draws: int, seed: int = 0) -> Tensor:
    """:func:`removals` of single tokens: bool [retraining, train x position].

    Strongest first by ``scores.by_token``. Tokens without a term in the loss (padding) have a score
    of exactly 0 for every query; they are none of those left out.

    Raises:
        ValueError: the scores are of whole examples only, or there are not so many tokens.
    """
    found = require_tokens(scores).flatten(1)
    counted = (found != 0).any(0).nonzero()[:, 0]
    total = len(counted)
    if not ks or min(ks) < 1 or max(ks) >= total:
        raise ValueError(f"Each k must be from 1 to {total - 1} tokens, got {list(ks)}.")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, to compare with, got {draws}.")
    masks = [torch.ones(1, found.shape[1], dtype=torch.bool)]
    for k in ks:
        own = torch.ones(len(found), found.shape[1], dtype=torch.bool)
        own.scatter_(1, counted[found[:, counted].topk(k).indices], False)
        random = torch.ones(draws, found.shape[1], dtype=torch.bool)
        random[:, counted] = draw_subsets(total, (total - k) / total, draws, seed)
        masks += [own, random]
    return torch.cat(masks)


def num_tokens(scores: Scores) -> int:
    """How many tokens have a term in the loss, and so a score."""
    return int((require_tokens(scores) != 0).any(0).sum())


def require_tokens(scores: Scores) -> Tensor:
    """The scores of single tokens, [query, train, position].

    Raises:
        ValueError: there are none.
    """
    if scores.by_token is None:
        raise ValueError(
            "These scores are of whole examples: expected some of single tokens (by_token), from "
            "attribute(by_token='train')."
        )
    return scores.by_token


def compare_removals(
    outcomes: Tensor, classes: Tensor | None, ks: Sequence[int], draws: int
) -> list[TopRemoval]:
    """Compare the retrainings of :func:`removals`.

    Args:
        outcomes: measurements, [retraining, seed, query]; rises are of means over seeds.
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
        own, random = rises[mine].diagonal(), rises[others].mean(0)
        results.append(
            TopRemoval(
                k=k,
                rise=bootstrap(own),
                random_rise=bootstrap(random),
                above_random=bootstrap(own - random),
                flipped=None if flips is None else float(flips[mine].diagonal().mean()),
                random_flipped=None if flips is None else float(flips[others].mean()),
            )
        )
    return results


def predicted_classes(
    module: nn.Module, task: AttributionTask | None, state: Mapping[str, Tensor], queries: object
) -> Tensor | None:
    """Predicted class of each query, int64 [query]; for a sequence, a digest of the classes at all
    positions. None without a ``ClassificationTask``."""
    if not isinstance(task, ClassificationTask):
        return None
    source = ExampleSource.of(queries, 256, "query")

    def read(batch: object) -> Tensor:
        logits = task.forward(module, batch)[0]
        return logits.argmax(1).reshape(len(logits), -1).cpu()

    classes = torch.cat(of_each_batch(read, module, state, source))
    if classes.shape[1] == 1:
        return classes[:, 0]
    return torch.tensor([integer_digest(row) for row in classes], dtype=torch.int64)
