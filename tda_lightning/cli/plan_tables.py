"""Plans of recordings and attributions as tables."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from tda_lightning.records.plans import AttributionPlan, RecordingPlan
from tda_lightning.runtime.formatting import readable_bytes, readable_time


def attribution_plan_table(plan: AttributionPlan) -> RenderableType:
    """One plan: its totals, then its passes."""
    table = Table(
        "pass",
        "number",
        "batches or steps",
        "seconds each",
        "seconds",
        title=f"{plan.estimator}: time",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("preparation", "", "", "", f"{plan.preparation:.1f}")
    table.add_row("  of which checks against plain autograd", "", "", "", f"{plan.checks:.1f}")
    for group in plan.passes:
        numbers = [str(group.count), str(group.batches), f"{group.seconds:.2f}"]
        table.add_row(escape(group.title), *numbers, f"{group.count * group.seconds:.1f}")
    return Group(comparison_table({plan.estimator: plan}), table)


def comparison_table(plans: Mapping[str, AttributionPlan | str]) -> RenderableType:
    """One row per estimator; a text in place of a plan says why it cannot run."""
    table = Table("estimator", "time", "peak memory", "scores", "kept for later", "passes")
    for column in table.columns[1:]:
        column.justify = "right"
    possible = [plan for plan in plans.values() if isinstance(plan, AttributionPlan)]
    if possible:
        first = possible[0]
        table.title = f"{first.num_train} training examples for {first.num_query} queries"
    on_device = any(plan.device_bytes for plan in possible)
    if on_device:
        table.add_column("peak on the accelerator", justify="right")
    reasons = []
    for name, plan in plans.items():
        if isinstance(plan, str):
            table.add_row(escape(name), "not possible")
            reasons.append(f"{escape(name)}: {escape(plan)}")
            continue
        table.add_row(
            escape(name),
            readable_time(plan.seconds),
            "unknown" if plan.peak_bytes is None else readable_bytes(plan.peak_bytes),
            readable_bytes(plan.scores_bytes),
            readable_bytes(plan.curvature_bytes + plan.features_bytes),
            str(plan.num_passes),
            *([readable_bytes(plan.device_bytes)] if on_device else []),
        )
    return Group(table, *reasons)


def recording_plan_table(plan: RecordingPlan) -> RenderableType:
    """What a recording takes on disk and in memory, item by item."""
    steps = "unknown" if plan.steps is None else f"{plan.steps:,}"
    table = Table("", "size", "number", "total", title=f"Recording of {steps} steps")
    for column in table.columns[1:]:
        column.justify = "right"
    for title, items, total in (
        ("disk", plan.disk, plan.disk_bytes),
        ("memory", plan.memory, plan.memory_bytes),
    ):
        table.add_section()
        for item in items:
            count = "unknown" if item.count is None else str(item.count)
            table.add_row(escape(item.name), _size(item.bytes), count, _size(item.total))
        table.add_row(f"[bold]{title}[/bold]", "", "", _size(total))
    one = f"One checkpoint: {_size(plan.checkpoint_bytes)}."
    return Group(table, one, *(escape(note) for note in plan.notes))


def _size(size: int | None) -> str:
    return "unknown" if size is None else readable_bytes(size)
