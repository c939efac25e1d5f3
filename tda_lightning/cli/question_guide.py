"""Which command answers which question about a run, and what it costs."""

from __future__ import annotations

from rich.table import Table

# (how much would go, whose training, arguments, cost in trainings of this run)
_ROWS = (
    ("a few examples", "this run", "RUN estimator=unrolled", "3 to 5, and 0.6 to 2 a query"),
    ("a few examples", "this run", "RUN estimator=source estimator.order=recorded", "minutes"),
    ("a few examples", "training like this", "RUN/ensemble/seeds estimator=source", "4"),
    ("much of the data", "this run", "RUN estimator=unrolled keep=0.5", "4 to 6, and a query's"),
    ("much of the data", "this run", "RUN estimator=source keep=0.5", "1"),
    ("much of the data", "training like this", "RUN/ensemble/seeds keep=0.5", "9"),
)


def question_guide(run: str) -> Table:
    """For each question the command that asks it, by what it costs in trainings of the run."""
    table = Table(title="What to ask")
    for column in ("what if ... went", "in", "tda attribute", "trainings it takes"):
        table.add_column(column)
    for gone, whose, arguments, cost in _ROWS:
        table.add_row(gone, whose, arguments.replace("RUN", run), cost)
    table.caption = (
        f"RUN/ensemble/seeds is made by: tda ensemble {run} members=5. keep is the share of the "
        "data that would stay. How well each predicts retraining: experiments/question."
    )
    return table
