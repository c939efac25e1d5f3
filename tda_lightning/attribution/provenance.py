"""How scores were made, in words for their provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from tda_lightning.recording.facts import package_versions
from tda_lightning.session.session import Session, Stage
from tda_lightning.tasks import AttributionTask, seeded_examples


def how_made(
    estimator: Any, context: Session, estimated: Mapping[str, Any], trainer: Any
) -> dict[str, Any]:
    """Estimator, task, model, run and machine."""
    options: dict[str, Any] = (
        asdict(estimator) if is_dataclass(estimator) and not isinstance(estimator, type) else {}
    )
    task, trajectory = context.task, context.trajectory
    notes = [*task.notes, *estimated.get("notes", [])]
    if generic := context.engine.generic:
        notes.append(f"Through torch.func, one by one: {', '.join(generic)}.")
    curvature = options.get("curvature")
    return {
        "estimator": type(estimator).__name__,
        "settings": options,
        "curvature": curvature,
        "fisher": fisher_of(curvature, task),
        "task": task.settings(),
        "trajectory": trajectory.path or "in memory",
        "model": type(context.module).__name__,
        "steps": trajectory.last_step,
        "num_train": context.num_train,
        "trained_parameters": sum(block.size for block in context.blocks),
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "device": str(trainer.strategy.root_device),
        "versions": package_versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **estimated,
        "notes": notes,
    }


def about_queries(context: Session) -> dict[str, Any]:
    """Measurements and, where the task has words for them, predictions of the final model."""
    context.load(context.trajectory.last_step)
    measurements: list[float] = []
    predictions: list[str] | None = []
    with torch.no_grad():
        for batch, indices in context.queries(0, context.num_query):
            measurements += context.measurement(context.module, batch, indices).tolist()
            with seeded_examples(0, indices):
                words = context.task.prediction(context.module, batch)
            predictions = None if words is None or predictions is None else predictions + words
    found: dict[str, Any] = {"measurements": measurements}
    return found if predictions is None else {**found, "predictions": predictions}


def about_stages(stages: Sequence[Stage], counts: Sequence[int] | None) -> dict[str, Any]:
    """What each of several stages contributed; its columns and segments are [start, stop]."""
    if len(stages) == 1:
        return {}
    assert counts is not None
    rows: list[dict[str, Any]] = []
    for number, stage in enumerate(stages):
        context, first = stage.session, sum(counts[:number])
        rows.append(
            {
                "trajectory": context.trajectory.path or "in memory",
                "model": type(context.module).__name__,
                "task": context.task.settings(),
                "num_train": context.num_train,
                "columns": [stage.columns.start, stage.columns.stop],
                "segments": [first, first + counts[number]],
                "steps": [stage.first_step, stage.first_step + context.trajectory.last_step],
                "trained_parameters": sum(block.size for block in context.blocks),
                "frozen_parameters": list(stage.frozen),
                "notes": list(context.task.notes),
            }
        )
    paths = list(dict.fromkeys(row["trajectory"] for row in rows))
    return {
        "stages": rows,
        "trajectory": paths[0] if stages[-1].run == 0 else [row["trajectory"] for row in rows],
        "steps": rows[-1]["steps"][1],
        "num_train": stages[-1].columns.stop,
    }


def fisher_of(curvature: str | None, task: AttributionTask) -> str | None:
    """Which Fisher or Gauss-Newton matrix a curvature stands for; None where there is none."""
    if curvature is None or curvature == "identity":
        return None
    if curvature == "exact":
        return "Gauss-Newton matrix, exact"
    if task.can_sample:
        return "true Fisher (sampled: random signs with the covariance of labels from the model)"
    return "empirical Fisher (the task has no sampled_loss, so the gradients of the loss itself)"


def ensemble_provenance(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The provenance of an ensemble's mean, from that of its members; a single one as it is."""
    if len(members) == 1:
        return members[0]
    merged = {k: v for k, v in members[0].items() if k not in ("certificate", "predictions")}
    measurements = torch.tensor([member["measurements"] for member in members])
    merged["measurements"] = measurements.mean(0).tolist()
    merged["trajectory"] = [member["trajectory"] for member in members]
    if any(len(m.get("segments", [])) != len(merged.get("segments", [])) for m in members):
        del merged["segments"]  # the mean is not split
    shared = [n for n in members[0]["notes"] if all(n in other["notes"] for other in members)]
    merged["notes"] = shared + [
        f"Member {number}: {note}"
        for number, member in enumerate(members, start=1)
        for note in member["notes"]
        if note not in shared
    ]
    keys = ("trajectory", "steps", "measurements", "predictions", "certificate", "notes")
    merged["members"] = [{key: m[key] for key in keys if key in m} for m in members]
    return merged
