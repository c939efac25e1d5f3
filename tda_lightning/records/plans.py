"""What a rehearsal found out, and how it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class PassPlan:
    """Passes over the training set, or over the run, that are alike.

    Attributes:
        title: what they do, with "#" for numbers in which they differ.
        count: how many there are.
        batches: batches of all of them together, or steps of the run where they visit these.
        seconds: expected time of each.
    """

    title: str
    count: int
    batches: int
    seconds: float


@dataclass(frozen=True)
class AttributionPlan:
    """How long (seconds) and how large (bytes) an attribution is expected to be on this machine.

    Attributes:
        estimator: class name.
        num_train: examples that are scored.
        num_query: queries that they are scored for.
        preparation: seconds outside the passes: reading checkpoints and kept curvature, checking
            the engine, measuring the queries.
        passes: groups of passes that are alike, in their order.
        peak_bytes: most memory that the process holds at a time, scores included; None where the
            system does not tell.
        device_bytes: the same on the accelerator; 0 without one.
        scores_bytes: size of the scores, by segment where the estimator tells segments apart.
        curvature_bytes: fitted curvature that is kept beside the trajectory for the next time.
        features_bytes: features of the training examples that are kept likewise.
    """

    estimator: str
    num_train: int
    num_query: int
    preparation: float
    passes: tuple[PassPlan, ...]
    peak_bytes: int | None
    device_bytes: int
    scores_bytes: int
    curvature_bytes: int
    features_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Expected time of the whole attribution."""
        return self.preparation + sum(group.count * group.seconds for group in self.passes)

    @property
    def num_passes(self) -> int:
        """Walks over training examples."""
        return sum(group.count for group in self.passes)

    @property
    def num_batches(self) -> int:
        """Batches of all passes."""
        return sum(group.batches for group in self.passes)

    def __rich__(self) -> RenderableType:
        table = Table(
            "pass",
            "number",
            "batches or steps",
            "seconds each",
            "seconds",
            title=f"{self.estimator}: time",
        )
        for column in table.columns[1:]:
            column.justify = "right"
        table.add_row("preparation", "", "", "", f"{self.preparation:.1f}")
        for one in self.passes:
            numbers = [str(one.count), str(one.batches), f"{one.seconds:.2f}"]
            table.add_row(escape(one.title), *numbers, f"{one.count * one.seconds:.1f}")
        return Group(comparison({self.estimator: self}), table)


def comparison(plans: Mapping[str, AttributionPlan | str]) -> RenderableType:
    """One row for each estimator; a text in place of a plan says why there is none."""
    table = Table("estimator", "time", "peak memory", "scores", "kept for later", "passes")
    for column in table.columns[1:]:
        column.justify = "right"
    sizes: Sequence[AttributionPlan] = [p for p in plans.values() if isinstance(p, AttributionPlan)]
    if sizes:
        first = sizes[0]
        table.title = f"{first.num_train} training examples for {first.num_query} queries"
    if any(plan.device_bytes for plan in sizes):
        table.add_column("peak on the accelerator", justify="right")
    reasons = []
    for name, plan in plans.items():
        if isinstance(plan, str):
            table.add_row(escape(name), "not possible")
            reasons.append(f"{escape(name)}: {escape(plan)}")
            continue
        cells = [
            readable_time(plan.seconds),
            "unknown" if plan.peak_bytes is None else readable_bytes(plan.peak_bytes),
            readable_bytes(plan.scores_bytes),
            readable_bytes(plan.curvature_bytes + plan.features_bytes),
            str(plan.num_passes),
        ]
        if len(table.columns) > 6:
            cells.append(readable_bytes(plan.device_bytes))
        table.add_row(escape(name), *cells)
    return Group(table, *reasons)


def readable_time(seconds: float) -> str:
    """1.4 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def readable_bytes(size: float) -> str:
    """In the largest binary unit that leaves at least one."""
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop()
    return f"{size:.0f} B" if units[-1] == "B" else f"{size:.1f} {units[-1]}"
