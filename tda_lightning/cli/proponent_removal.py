"""``tda evaluate removal=[...] token_removal=[...]``: retraining without the strongest proponents
of each query."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from torch import Tensor

from tda_lightning.cli.command import command_line
from tda_lightning.cli.evaluation_table import add_names_column
from tda_lightning.cli.retrained_subsets import configuration_of, seeds_of
from tda_lightning.cli.retraining import RecordedRun
from tda_lightning.cli.retraining_cache import cached_retrainings
from tda_lightning.evaluation import (
    GroundTruth,
    Interval,
    TopRemoval,
    compare_removals,
    num_tokens,
    removals,
    token_removals,
)
from tda_lightning.records.scores import Scores
from tda_lightning.tasks import ClassificationTask

_DRAWS = 5  # random sets for each k, shared by all scores

Results = dict[str, list[TopRemoval]]  # by the name of the scores


@dataclass(frozen=True)
class RemovalRequest:
    """What is to be left out, and where the retrainings are cached.

    Attributes:
        what: "examples" or "tokens".
        ks: how many, for each file of scores.
        masks: which ones each retraining keeps, bool [retraining, item], for each file of scores.
        path: the cache, next to the ground truth; it serves all scores and all k.
    """

    what: str
    ks: dict[str, list[int]]
    masks: dict[str, Tensor]
    path: Path


def requested_removals(
    config: DictConfig, scores: Mapping[str, Scores], truth: Path
) -> list[RemovalRequest]:
    """What ``removal`` and ``token_removal`` ask for.

    Args:
        config: of ``tda evaluate``.
        scores: by name; those without scores of tokens are passed over for ``token_removal``.
        truth: the file of the ground truth.

    Raises:
        ValueError: impossible numbers, or no scores of tokens.
    """
    requests = []
    seeded = f"{config.seed}.h5"
    if config.removal is not None:
        ks = {n: removed_counts(config.removal, own.num_train) for n, own in scores.items()}
        masks = {n: removals(own, ks[n], _DRAWS, config.seed) for n, own in scores.items()}
        path = truth.with_name(f"{config.protocol}-removal-{seeded}")
        requests.append(RemovalRequest("examples", ks, masks, path))
    if config.token_removal is not None:
        if config.protocol != "single_run":
            raise ValueError(
                "token_removal gives tokens weight 0 in the recorded run: expected "
                f"protocol=single_run, got {config.protocol}."
            )
        scored = {name: own for name, own in scores.items() if own.by_token is not None}
        if not scored:
            raise ValueError(
                "token_removal leaves out the tokens that scores name, and none are of tokens. For "
                "some: tda attribute estimator=unrolled by_token=train"
            )
        totals = {name: num_tokens(own) for name, own in scored.items()}
        ks = {n: removed_counts(config.token_removal, totals[n], "token_removal") for n in scored}
        masks = {n: token_removals(own, ks[n], _DRAWS, config.seed) for n, own in scored.items()}
        path = truth.with_name(f"{config.protocol}-token_removal-{seeded}")
        requests.append(RemovalRequest("tokens", ks, masks, path))
    return requests


def removed_counts(removal: object, total: int, setting: str = "removal") -> list[int]:
    """Numbers of examples (or tokens) to leave out, given as such or as shares of all of them.

    Raises:
        ValueError: neither.
    """
    wanted = list(removal) if OmegaConf.is_list(removal) else []  # type: ignore[call-overload]
    plain = all(type(k) in (int, float) for k in wanted)
    counts = [max(1, round(k * total)) if 0 < k < 1 else k for k in wanted] if plain else []
    if not counts or any(k != int(k) or not 1 <= k < total for k in counts):
        raise ValueError(
            f"{setting} must be a list of numbers from 1 to {total - 1} or of shares of all, such "
            f"as {setting}=[10,50] or {setting}=[0.01]; got {removal}."
        )
    return [int(k) for k in counts]


def remove_proponents(run: RecordedRun, asked: RemovalRequest) -> Results:
    """Retrain without the strongest proponents according to each file of scores.

    Under *single_run* they get weight 0 in the recorded run. Under *algorithm* they are really
    removed, and the change is measured from training on everything with the same seeds. With
    ``part=K/N`` only this part's retrainings are made, and there is no result yet.
    """
    config = run.config
    masks = torch.cat(list(asked.masks.values()))
    wanted, places = masks.unique(dim=0, return_inverse=True)
    baseline, configuration = run.recorded_measurements(), configuration_of(run)

    def request(cached: Sequence[GroundTruth]) -> GroundTruth:
        columns = max(config.seeds, *(truth.seeds.shape[1] for truth in cached), 0)
        # What is wanted comes first; what other scores or other k wanted stays.
        known = {row.numpy().tobytes() for row in wanted}
        others = torch.cat([wanted[:0], *(truth.subsets for truth in cached)]).unique(dim=0)
        others = others[[row.numpy().tobytes() not in known for row in others]]
        subsets = torch.cat([wanted, others])
        # The same seeds for every subset: differences are not to be those between seeds.
        seeds = seeds_of(config.protocol, 1, columns, config.seed).expand(len(subsets), -1)
        requested = GroundTruth.unmeasured(
            config.protocol,
            subsets,
            seeds,
            baseline,
            configuration,
            {"command": command_line()},
            classes=isinstance(run.task, ClassificationTask),
        )
        for truth in cached:
            requested = requested.with_outcomes_of(truth)
        return requested

    truth = cached_retrainings(run, asked.path, request, len(wanted))
    if config.part is not None:
        return {}
    results = {}
    sizes = [len(own) for own in asked.masks.values()]
    for name, own in zip(asked.masks, places.split(sizes), strict=True):
        rows = truth.rows(own)
        results[name] = compare_removals(rows.outcomes, rows.classes, asked.ks[name], _DRAWS)
    return results


def removal_table(results: Results, what: str) -> Table:
    """How much the measurements rise, and how many predictions flip."""
    strongest = "proponents" if what == "examples" else "tokens"
    table = Table(title=f"Without the strongest {strongest} of each query")
    add_names_column(table, list(results))
    table.add_column("removed", justify="right", no_wrap=True)
    table.add_column("rise of the measurement")
    table.add_column("at random")
    table.add_column("above random")
    rows = [(name, removal) for name, removals in results.items() for removal in removals]
    flips = any(removal.flipped is not None for _, removal in rows)
    if flips:
        table.add_column("flipped", justify="right")
        table.add_column("at random", justify="right")
    for name, removal in rows:
        changes = (removal.rise, removal.random_rise, removal.above_random)
        cells = [name, str(removal.k), *map(_cell, changes)]
        if flips:
            shares = (removal.flipped, removal.random_flipped)
            cells += ["" if share is None else f"{share:.0%}" for share in shares]
        table.add_row(*cells)
    return table


def removal_note(protocol: str, results: Iterable[Results]) -> str:
    """What the table shows, in words."""
    how = (
        "by weight 0 in the recorded run"
        if protocol == "single_run"
        else "from the training set, compared with training on everything with the same seeds"
    )
    flips = ""
    made = [part for part_results in results for own in part_results.values() for part in own]
    if any(part.flipped is not None for part in made):
        flips = " Flipped: share of the queries whose predicted class changes."
    return (
        f"Removal: {how}. 95% intervals over queries; {_DRAWS} random sets for each "
        "number. The mean rise without a query's own top 1% (removal=[0.01]) is its query-loss "
        f"difference (QLD), token_removal=[0.01] that of tokens.{flips}"
    )


def removal_json(results: Results) -> list[dict[str, object]]:
    """Everything in the table, in full precision."""
    return [
        {
            "name": name,
            "k": removal.k,
            "rise": removal.rise.value,
            "rise_over_queries": [removal.rise.low, removal.rise.high],
            "random_rise": removal.random_rise.value,
            "random_rise_over_queries": [removal.random_rise.low, removal.random_rise.high],
            "above_random": removal.above_random.value,
            "above_random_over_queries": [removal.above_random.low, removal.above_random.high],
            "flipped": removal.flipped,
            "random_flipped": removal.random_flipped,
        }
        for name, removals in results.items()
        for removal in removals
    ]


def _cell(interval: Interval) -> str:
    return f"{interval.value:.3g} ({interval.low:.3g} to {interval.high:.3g})"
