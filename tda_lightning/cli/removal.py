"""Removal of a query's foremost proponents in ``tda evaluate``, beside random examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from tda_lightning.cli.ground_truth import determined_by, seeds_of
from tda_lightning.cli.judged import names_column
from tda_lightning.cli.kept import kept_retrainings
from tda_lightning.cli.recorded import command_line
from tda_lightning.cli.retraining import Parts
from tda_lightning.evaluation import GroundTruth, Interval, TopRemoval, compare_removals, removals
from tda_lightning.records.scores import Scores
from tda_lightning.tasks import ClassificationTask

_DRAWS = 5  # sets of random examples for each k, the same for all scores

Found = dict[str, list[TopRemoval]]


def removal_file(parts: Parts, truth: Path) -> Path:
    """Where retrainings without a query's proponents are kept, beside the ground truth: of all
    scores and all k, each by what it leaves out."""
    return truth.with_name(f"{parts.config.protocol}-removal-{parts.config.seed}.h5")


def remove_proponents(parts: Parts, scores: Mapping[str, Scores], path: Path) -> Found:
    """What leaving out the foremost proponents by each file of scores did; with ``part=K/N``, only
    this part's retrainings, and nothing to tell.

    Under *single_run* they get weight 0 in the recorded run. Under *algorithm* they are really
    removed, and what that changed is told from training on everything with the same seeds.
    """
    config, ks = parts.config, [int(k) for k in parts.config.removal]
    masks = torch.cat([removals(one, ks, _DRAWS, config.seed) for one in scores.values()])
    wanted, places = masks.unique(dim=0, return_inverse=True)
    baseline, determined = parts.recorded_measurements(), determined_by(parts)

    def ask(found: Sequence[GroundTruth]) -> GroundTruth:
        columns = max(config.seeds, *(one.seeds.shape[1] for one in found), 0)
        kept = torch.cat([wanted, *(one.subsets for one in found)])
        # What is wanted comes first, what was wanted by other scores or k stays.
        others = kept[len(wanted) :].unique(dim=0) if len(kept) > len(wanted) else kept[:0]
        known = {row.numpy().tobytes() for row in wanted}
        others = others[[row.numpy().tobytes() not in known for row in others]]
        rows = len(wanted) + len(others)
        asked = GroundTruth.asked(
            config.protocol,
            torch.cat([wanted, others]),
            # The same for every subset, so that differences are not those between seeds.
            seeds_of(config.protocol, 1, columns, config.seed).expand(rows, -1),
            baseline,
            determined,
            {"command": command_line()},
            classes=isinstance(parts.task, ClassificationTask),
        )
        for one in found:
            asked = asked.knowing(one)
        return asked

    made = kept_retrainings(parts, path, ask, len(wanted))
    if config.part is not None:
        return {}
    results = {}
    for name, own in zip(scores, places.chunk(len(scores)), strict=True):
        rows = made.rows(own)
        results[name] = compare_removals(rows.outcomes, rows.classes, ks, _DRAWS)
    return results


def removal_table(found: Found) -> Table:
    """The rise of the measurements, and the predictions flipped."""
    table = Table(title="Without a query's foremost proponents")
    names_column(table, list(found))
    table.add_column("removed", justify="right")
    table.add_column("measurement rises by")
    table.add_column("at random by")
    flips = any(one.flipped is not None for results in found.values() for one in results)
    if flips:
        table.add_column("flipped", justify="right")
        table.add_column("at random", justify="right")
    for name, results in found.items():
        for one in results:
            cells = [name, str(one.k), _shown(one.rise), _shown(one.random_rise)]
            if flips:
                shares = (one.flipped, one.random_flipped)
                cells += ["" if share is None else f"{share:.0%}" for share in shares]
            table.add_row(*cells)
    return table


def about_removal(protocol: str) -> str:
    """What the table is about, in plain words."""
    what = (
        "by weight 0 in the recorded run"
        if protocol == "single_run"
        else "from the training set, trained anew and compared with the same seeds on everything"
    )
    return (
        f"Removal: {what}. 95% intervals over queries; {_DRAWS} sets of random examples for each "
        "number. Flipped: queries that are then classified otherwise."
    )


def removal_json(found: Found) -> list[dict[str, Any]]:
    """Everything the table says, with more digits."""
    return [
        {
            "name": name,
            "k": one.k,
            "rise": one.rise.value,
            "rise_over_queries": [one.rise.low, one.rise.high],
            "random_rise": one.random_rise.value,
            "random_rise_over_queries": [one.random_rise.low, one.random_rise.high],
            "flipped": one.flipped,
            "random_flipped": one.random_flipped,
        }
        for name, results in found.items()
        for one in results
    ]


def _shown(found: Interval) -> str:
    return f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g})"
