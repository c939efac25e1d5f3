"""``tda evaluate removal=[...]``: retraining without the strongest proponents of each query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.table import Table

from tda_lightning.cli.command import command_line
from tda_lightning.cli.evaluation_table import add_names_column
from tda_lightning.cli.retrained_subsets import configuration_of, seeds_of
from tda_lightning.cli.retraining import RecordedRun
from tda_lightning.cli.retraining_cache import cached_retrainings
from tda_lightning.evaluation import GroundTruth, Interval, TopRemoval, compare_removals, removals
from tda_lightning.records.scores import Scores
from tda_lightning.tasks import ClassificationTask

_DRAWS = 5  # random sets for each k, shared by all scores

Results = dict[str, list[TopRemoval]]  # by the name of the scores


def removal_file(run: RecordedRun, truth: Path) -> Path:
    """The cache of retrainings without proponents, next to the ground truth at ``truth``; it serves
    all scores and all k."""
    return truth.with_name(f"{run.config.protocol}-removal-{run.config.seed}.h5")


def removed_counts(removal: object, num_train: int) -> list[int]:
    """Numbers of examples to leave out, given as such or as shares of the training set.

    Raises:
        ValueError: neither.
    """
    wanted = list(removal) if OmegaConf.is_list(removal) else []  # type: ignore[call-overload]
    plain = all(type(k) in (int, float) for k in wanted)
    counts = [max(1, round(k * num_train)) if 0 < k < 1 else k for k in wanted] if plain else []
    if not counts or any(k != int(k) or not 1 <= k < num_train for k in counts):
        raise ValueError(
            f"removal must be a list of numbers from 1 to {num_train - 1} or of shares of the "
            f"training set, such as removal=[10,50] or removal=[0.01]; got {removal}."
        )
    return [int(k) for k in counts]


def remove_proponents(run: RecordedRun, scores: Mapping[str, Scores], path: Path) -> Results:
    """Retrain without the strongest proponents according to each file of scores.

    Under *single_run* they get weight 0 in the recorded run. Under *algorithm* they are really
    removed, and the change is measured from training on everything with the same seeds. With
    ``part=K/N`` only this part's retrainings are made, and there is no result yet.
    """
    config = run.config
    ks = removed_counts(config.removal, len(run.train))
    masks = torch.cat([removals(judged, ks, _DRAWS, config.seed) for judged in scores.values()])
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

    truth = cached_retrainings(run, path, request, len(wanted))
    if config.part is not None:
        return {}
    results = {}
    for name, own in zip(scores, places.chunk(len(scores)), strict=True):
        rows = truth.rows(own)
        results[name] = compare_removals(rows.outcomes, rows.classes, ks, _DRAWS)
    return results


def removal_table(results: Results) -> Table:
    """How much the measurements rise, and how many predictions flip."""
    table = Table(title="Without the strongest proponents of each query")
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


def removal_note(protocol: str, results: Results) -> str:
    """What the table shows, in words."""
    how = (
        "by weight 0 in the recorded run"
        if protocol == "single_run"
        else "from the training set, compared with training on everything with the same seeds"
    )
    flips = ""
    if any(part.flipped is not None for removals in results.values() for part in removals):
        flips = " Flipped: share of the queries whose predicted class changes."
    return (
        f"Removal: {how}. 95% intervals over queries; {_DRAWS} random sets of examples for each "
        "number. The mean rise without a query's own top 1% (removal=[0.01]) is its query-loss "
        f"difference (QLD).{flips}"
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
