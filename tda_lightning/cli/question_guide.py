"""Which command answers which question about a run, what it costs, and how well it predicts."""

from __future__ import annotations

from rich.table import Table

# How much would go, whose training, arguments, trainings of this run that it takes, and the linear
# datamodeling score on three studies (experiments/question; docs/estimators.md, "The question").
_FEW, _MUCH, _THIS, _LIKE = "a few examples", "half of the data", "this run", "training like this"
ROWS = (
    (_FEW, _THIS, "RUN estimator=unrolled", "3 to 5, 0.6 to 2 a query", ".81 / .04 / .97"),
    (_FEW, _THIS, "RUN estimator=source estimator.order=recorded", "none", ".40 / .48 / .92"),
    (_FEW, _THIS, "RUN estimator=source", "none", ".23 / .51 / .54"),
    (_FEW, _LIKE, "RUN/ensemble/seeds estimator=source", "4", ""),
    (_MUCH, _THIS, "RUN estimator=unrolled keep=0.5", "1 more than without", ".43 / .03 / .98"),
    (_MUCH, _THIS, "RUN estimator=source keep=0.5", "1", ".24 / .56 / .64"),
    (_MUCH, _LIKE, "RUN estimator=source keep=0.5", "1", ".29 / .36 / .54"),
    (
        _MUCH,
        _LIKE,
        "RUN/ensemble/seeds estimator=source keep=0.5",
        "4, and 1 a member",
        ".36 / .48 / .55",
    ),
)


def question_guide(run: str) -> Table:
    """For each question the command that asks it."""
    table = Table(title="What to ask")
    for column in ("what if ... went", "in", "tda attribute", "trainings it takes", "LDS"):
        table.add_column(column)
    for gone, whose, arguments, cost, lds in ROWS:
        table.add_row(gone, whose, arguments.replace("RUN", run), cost, lds)
    table.caption = (
        f"{run}/ensemble/seeds is made by tda ensemble {run} members=5. LDS: of a small tabular "
        "MLP, a GPT, and an MLP on images far from convergence; 1 would be perfect. "
        "Exact unrolling says nothing of rough runs, such as the GPT: tda check tells them. See "
        'docs/estimators.md, "The question".'
    )
    return table
