"""``tda evaluate simulate=[...]``: does fine-tuning on a proponent do what its score says?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table
from torch.utils.data import Subset

from tda_lightning.cli.evaluation_baselines import baseline, baselines_of
from tda_lightning.cli.evaluation_table import add_names_column
from tda_lightning.cli.retraining import RecordedRun
from tda_lightning.evaluation import (
    Interval,
    Simulation,
    chosen_examples,
    fine_tuned_changes,
    simulatability,
)
from tda_lightning.evaluation.simulatability import KINDS
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.scores import Scores

_EACH = 3  # examples of each kind for a query
_FOLLOWED = 0.75  # share of signs that small steps have right at least

Results = dict[str, list[Simulation]]  # by the name of the scores


def simulate(run: RecordedRun, scores: Mapping[str, Scores]) -> Results:
    """Fine-tune on each query's strongest proponents and opponents, of all scores and baselines,
    and on random examples: an example at a time, once for all that name it."""
    count = min(run.config.simulate_queries, len(run.queries))
    rows = dict(scores)
    for name in baselines_of(run):
        try:
            rows.setdefault(name, baseline(name, run))
        except (UnsupportedTrainingError, ValueError):
            continue  # these data or this model have no such scores
    rows = {name: own[list(range(count))] for name, own in rows.items()}
    chosen = {name: chosen_examples(own, _EACH, run.config.seed) for name, own in rows.items()}
    examples = torch.cat([own.flatten() for own in chosen.values()]).unique()
    steps = list(run.config.simulate)
    changes = fine_tuned_changes(
        run.module,
        run.task,
        run.trajectory,
        run.train,
        run.queries.with_dataset(Subset(run.queries.dataset, range(count))),
        examples.tolist(),
        steps,
        run.config.simulate_rate,
        run.measurement,
    )
    found = {}
    for name, own in rows.items():
        places = torch.searchsorted(examples, chosen[name])  # [query, kind, each]
        moved = torch.stack([changes[query][places[query]] for query in range(count)])
        found[name] = simulatability(own, chosen[name], moved, steps)
    return found


def simulation_table(results: Results) -> Table:
    """How often each kind of example did as its score says, and the rank correlation."""
    table = Table(title="Fine-tuning on single training examples")
    add_names_column(table, list(results))
    table.add_column("steps", justify="right", no_wrap=True)
    for kind in KINDS:
        table.add_column(f"{kind}:\nsign right", no_wrap=True)
    table.add_column("rank correlation")
    for name, simulations in results.items():
        for one in simulations:
            agrees = (f"{one.agrees[kind].value:.0%}" for kind in KINDS)
            table.add_row(name, str(one.steps), *agrees, str(one.rank))
    return table


def simulation_note(run: RecordedRun) -> str:
    """What was done, in words."""
    count = min(run.config.simulate_queries, len(run.queries))
    return (
        f"Simulated: gradient descent at a rate of {run.config.simulate_rate:g} on one training "
        f"example at a time, {_EACH} of each kind for each of {count} queries. Sign right: the "
        "query's measurement fell where the score is positive, and rose where it is negative. Rank "
        "correlation of scores and falls over a query's examples, mean over queries with its 95% "
        "interval."
    )


def overshoot_note(run: RecordedRun, results: Results) -> str | None:
    """That single steps are too large; None where they are not, or nobody can tell.

    In the limit of small rates one step moves a measurement as the gradient dot product says.
    """
    first = next((one for one in results.get("gradient_dot", []) if one.steps == 1), None)
    if first is None:
        return None
    share = min(first.agrees[kind].value for kind in ("helpful", "harmful"))
    if share >= _FOLLOWED:
        return None
    return (
        f"A single step at a rate of {run.config.simulate_rate:g} overshoots: the strongest "
        f"examples by gradient_dot did as it says in {share:.0%} of the cases, and small steps "
        "always do. Give a smaller simulate_rate; nothing in this table tells of scores before."
    )


def simulation_json(results: Mapping[str, Sequence[Simulation]]) -> dict[str, Any]:
    """All numbers with their intervals over queries."""
    return {
        name: [
            {
                "steps": one.steps,
                "change": {kind: _as_json(value) for kind, value in one.change.items()},
                "agrees": {kind: _as_json(value) for kind, value in one.agrees.items()},
                "rank": _as_json(one.rank),
            }
            for one in simulations
        ]
        for name, simulations in results.items()
    }


def _as_json(value: Interval) -> dict[str, object]:
    return {"value": value.value, "over_queries": [value.low, value.high]}
