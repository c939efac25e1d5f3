"""The judgements of ``tda evaluate judge=[...]`` as a table and in words."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig
from rich.table import Table

from tda_lightning.cli.evaluation_table import add_names_column
from tda_lightning.cli.judgements import Judged, Value
from tda_lightning.evaluation import Interval

_MEANINGS = {
    "class": "share of the top {k} proponents with the query's class",
    "subclass": "share of the top {k} proponents with the query's {subclass}",
    "shortcut": "area under the precision-recall curve of finding the marked examples, for marked "
    "queries that were misled",
    "mixed": "area under the precision-recall curve of finding the marked examples, for marked "
    "queries",
    "cardinality": "different examples among all queries' top {k}, over their number",
    "randomisation": "rank correlation with the scores of a model with random weights; near 0 is "
    "right",
}


def judgements_table(rows: Sequence[Judged], asked: Sequence[str]) -> Table:
    """A row for each of the scores, a column for each judgement."""
    table = Table(title="Judged without retraining")
    add_names_column(table, [row.name for row in rows])
    for name in asked:
        table.add_column(name)
    for row in rows:
        table.add_row(row.name, *(_cell(row.values[name]) for name in asked))
    return table


def judgements_notes(rows: Sequence[Judged], config: DictConfig) -> str:
    """What the columns mean, and why some are empty."""
    words = {"k": config.k, "subclass": config.subclass}
    lines = [f"{name}: {_MEANINGS[name].format(**words)}." for name in config.judge]
    if {*config.judge} & {"class", "subclass", "shortcut", "mixed"}:
        lines.append(
            "These say whether proponents are related to the query, not whether they caused the "
            "prediction: similarity of embeddings, which knows nothing of training, often leads. "
            "For related examples, similarity=true shows scores times that similarity."
        )
    reasons = [
        f"No {name} of {row.name}: {value}"
        for row in rows
        for name, value in row.values.items()
        if isinstance(value, str)
    ]
    return "\n".join([*lines, *reasons])


def _cell(value: Value) -> str:
    if isinstance(value, Interval):
        return f"{value.value:.3f}\n{value.low:.3f} to {value.high:.3f}"
    return "none" if isinstance(value, str) else f"{value:.3f}"
