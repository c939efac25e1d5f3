"""Which command answers which question about a run, what it costs, and how well it predicts."""

from __future__ import annotations

from rich.table import Table

# How much would go, whose training, arguments, trainings of this run that it takes, and the linear
# datamodeling score on a held-out problem (docs/methods.md, "Where the derivative is taken").
_FEW, _MUCH, _THIS, _LIKE = "a few examples", "half of the data", "this run", "training like this"
_ROWS = (
    (_FEW, _THIS, "RUN estimator=unrolled", "3 to 5, 0.6 to 2 a query", ".81"),
    (_FEW, _THIS, "RUN estimator=source estimator.order=recorded", "none", ".74"),
    (_FEW, _LIKE, "RUN/ensemble/seeds estimator=source", "4", ""),
    (_MUCH, _THIS, "RUN estimator=unrolled keep=0.5", "1 more than without", ".86"),
    (_MUCH, _THIS, "RUN estimator=source keep=0.5", "1", ".81"),
    (_MUCH, _LIKE, "RUN estimator=source keep=0.5", "1", ".75"),
    (_MUCH, _LIKE, "RUN/ensemble/seeds estimator=unrolled keep=0.5", "4, each as above", ".85"),
)


def question_guide(run: str) -> Table:
    """For each question the command that asks it."""
    table = Table(title="What to ask")
    for column in ("what if ... went", "in", "tda attribute", "trainings it takes", "LDS"):
        table.add_column(column)
    for gone, whose, arguments, cost, lds in _ROWS:
        table.add_row(gone, whose, arguments.replace("RUN", run), cost, lds)
    table.caption = (
        f"{run}/ensemble/seeds is made by tda ensemble {run} members=5. LDS: of a tabular MLP, "
        "between 0 and 1; without keep it was .44 for half of the data. See "
        'docs/methods.md, "Where the derivative is taken".'
    )
    return table
