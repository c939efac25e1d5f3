"""Plans of attributions as tables."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from tda_lightning.records.plans import AttributionPlan
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
