"""Plans of recordings and attributions as tables."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from tda_lightning.index.plan import IndexPlan
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


def index_plan_table(plan: IndexPlan) -> RenderableType:
    """What an index takes on disk, to build and to search."""
    machines = f" by {plan.machines} machines" if plan.machines > 1 else ""
    table = Table("", "each", "in all", title=f"Index of {plan.examples:,} examples")
    for column in table.columns[1:]:
        column.justify = "right"
    row, fixed = plan.examples * plan.row_bytes, plan.fixed_bytes
    table.add_row("examples", f"{plan.row_bytes:,} B", readable_bytes(row))
    table.add_row("how gradients are compressed", "", readable_bytes(fixed))
    table.add_row("heads of shards", "", readable_bytes(plan.disk_bytes - row - fixed))
    table.add_row("[bold]disk[/bold]", "", readable_bytes(plan.disk_bytes))
    table.add_section()
    gradients = plan.build_seconds - plan.begin_seconds
    table.add_row("curvature, and the choice of coordinates", "", readable_time(plan.begin_seconds))
    each = f"{1000 * plan.example_seconds:.2f} ms"
    table.add_row(f"gradients{machines}", each, readable_time(gradients))
    table.add_row("[bold]building[/bold]", "", readable_time(plan.build_seconds))
    if plan.build_price is not None:
        hour = f"{plan.price_per_hour:g} an hour"
        table.add_row("its price", hour, f"{plan.build_price:,.2f}")
    table.add_section()
    for what, rate in (
        ("reading from the disk", plan.read_bytes_per_second),
        ("multiplying, by one process", plan.multiply_bytes_per_second),
    ):
        seconds = plan.disk_bytes / rate / plan.machines
        table.add_row(what, f"{rate / 1e9:.2f} GB/s", readable_time(seconds))
    table.add_row(
        f"[bold]a search for one query[/bold]{machines}", "", readable_time(plan.search_seconds)
    )
    table.add_row("machines that search in a second", "", f"{plan.machines_for_a_second:,}")
    slower = (
        "the disk"
        if plan.read_bytes_per_second <= plan.multiply_bytes_per_second
        else "the processor"
    )
    note = (
        f"A search takes as long as {slower}. An index that fits into memory is read from the disk "
        "once. The gradient of the query itself comes on top."
    )
    return Group(table, note)


def _size(size: int | None) -> str:
    return "unknown" if size is None else readable_bytes(size)
