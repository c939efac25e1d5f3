"""How scores were made: the part of their provenance that no estimator writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, is_dataclass, replace
from datetime import datetime, timezone
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from tda_lightning.attribution.plausibility import (
    beyond_range,
    earlier_measurements,
    measured_range,
)
from tda_lightning.attribution.scoring import OpenedRuns, member_scores
from tda_lightning.attribution.stages import StageSetup
from tda_lightning.attribution.what_if import SIZES, AskedRuns, question_of
from tda_lightning.recording.facts import package_versions
from tda_lightning.records.ensemble import DIVERGED, FINISHED, PLANNED, EnsembleFacts
from tda_lightning.records.provenance import MemberRecord, Provenance, StageRecord
from tda_lightning.records.score_sinks import MemorySink
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.session.noise_notes import noise_notes
from tda_lightning.session.session import Session
from tda_lightning.session.stage import Stage
from tda_lightning.tasks import MEASURED_SEED, AttributionTask, seeded_examples


def scores_provenance(
    opened: OpenedRuns,
    members: Sequence[Sequence[StageSetup]],
    asked: AskedRuns,
    estimated: Sequence[Provenance],
    trainer: Trainer,
    sink: MemorySink,
) -> Provenance:
    """How the scores of all runs together were made.

    Args:
        members: the stages of the recorded runs.
        asked: the runs that were scored, which are what-if runs where a share of the data goes.
        estimated: what the estimator says of each.
        sink: holds the scores.
    """
    parts = member_scores(sink)
    made = []
    for number, (stages, estimate) in enumerate(zip(opened.runs, estimated, strict=True)):
        values = parts[number * len(parts) // len(opened.runs)]
        recorded = None
        if asked.what_if is not None:
            recorded = members[asked.recorded[number]][-1].trajectory
        made.append(run_provenance(opened, stages, estimate, trainer, values, recorded))
    if len(members) > 1:
        made = [
            ensemble_provenance(made[first : first + asked.draws])
            for first in range(0, len(made), asked.draws)
        ]
    merged = ensemble_provenance(made)
    if asked.what_if is not None:
        merged["what_if"] = asked.what_if
        merged["question"] = question_of(asked.what_if)
        if merged.get("sizes", "").startswith("predicted"):
            merged["sizes"] = SIZES
        if len(members) == 1 and "members" in merged:
            for member, run in zip(merged["members"], asked.what_if["runs"], strict=False):
                member["trajectory"] = run
    return merged


def run_provenance(
    opened: OpenedRuns,
    stages: Sequence[Stage],
    estimated: Provenance,
    trainer: Trainer,
    scores: Sequence[Tensor],
    recorded: Trajectory | None = None,
) -> Provenance:
    """The provenance of the scores of one run: estimator, task, model, run, queries and machine.

    Args:
        stages: of the run, one or several.
        estimated: what the estimator says; it has the last word.
        scores: parts of them, [query, train] each, whose sum they are.
        recorded: the recorded run, where ``stages`` are its what-if run.
    """
    session, estimator = stages[-1].session, opened.estimator
    settings: dict[str, Any] = asdict(estimator) if is_dataclass(estimator) else {}
    measured, kept = measured_queries(session, recorded), session.task.kept_parts
    beyond = beyond_range(scores, {**estimated, **measured})
    notes = [
        *session.task.notes,
        *session.engine.notes,
        *noise_notes(session),
        *estimated.get("notes", []),
        *beyond.get("notes", []),
    ]
    if averaging := session.trajectory.facts.settings.get("averaging"):
        notes.append(
            f"Training averaged weights ({averaging}): scores are about the weights that the last "
            "step left, not about their average."
        )
    if generic := session.engine.generic:
        notes.append(f"Through torch.func, one by one: {', '.join(generic)}.")
    curvature = settings.get("curvature")
    return {
        "estimator": type(estimator).__name__,
        "settings": settings,
        "curvature": curvature,
        "fisher": _fisher(curvature, session.task),
        "task": session.task.settings(),
        "trajectory": (recorded or session.trajectory).path or "in memory",
        "model": type(session.module).__name__,
        "steps": session.trajectory.last_step,
        "num_train": session.num_train,
        "trained_parameters": session.num_parameters,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "device": str(trainer.strategy.root_device),
        "versions": package_versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **estimated,
        **measured,
        **beyond,
        **_several_stages(stages, opened.segment_counts(stages)),
        **({} if session.asked is None else {"measurement": session.asked.record()}),
        **({"draws": session.draws} if session.noise or session.measured_noise else {}),
        **({} if kept is None else {"timesteps": list(kept)}),
        "notes": notes,
    }


def measured_queries(session: Session, recorded: Trajectory | None = None) -> Provenance:
    """Measurements of the final model, their range over the run and, where the task has words for
    them, predictions.

    Args:
        recorded: the run whose final model it is; None: the session's own.
    """
    session = session.whole or session
    earlier = earlier_measurements(session)
    if recorded is not None:
        session = replace(session, trajectory=recorded, _checkpoints={}, _weights={})
    session.load(session.trajectory.last_step)
    measurements: list[float] = []
    predictions: list[str] | None = []
    with torch.no_grad():
        for batch, indices in session.whole_queries():
            measurements += session.measurement(session.module, batch, indices).tolist()
            words = None
            if session.asked is None or session.asked.takes_loss:
                with seeded_examples(MEASURED_SEED, indices):
                    words = session.task.prediction(session.module, batch)
            predictions = None if words is None or predictions is None else predictions + words
    found: Provenance = {"measurements": measurements, **measured_range(earlier + measurements)}
    if predictions is not None:
        found["predictions"] = predictions
    return found


# What the reader of an ensemble's scores must know, by its kind.
_OF_KIND = {
    "forks": "The runs have a common past, so their spread leaves out what initial weights and "
    "early batches decide.",
    "dropout": "The runs are one run under fixed dropout masks: their spread is not that between "
    "trainings.",
    "lora": "The runs are trainings of low-rank adapters, from the last weights of one run.",
}
_MISSING = {DIVERGED: "diverged", PLANNED: "was not finished"}
_SIZES = "ranks only: the members of this ensemble are not runs of the training itself"


def of_ensemble(facts: EnsembleFacts, made: Provenance) -> Provenance:
    """What an ensemble's folder adds to its provenance and changes in it: the kind, and members
    that are missing."""
    kind = facts.kind
    added: Provenance = {"ensemble": kind, "notes": made["notes"]}
    if kind in _OF_KIND:
        added["notes"] = [_OF_KIND[kind], *added["notes"]]
    finished = sum(member.state == FINISHED for member in facts.members)
    if finished < len(facts.members):
        missing = ", ".join(
            f"member {member.number} {_MISSING[member.state]}"
            for member in facts.members
            if member.state != FINISHED
        )
        said = f"These are {finished} of {len(facts.members)} members: {missing}."
        added["notes"] = [said, *added["notes"]]
    if kind in ("dropout", "lora"):
        added["sizes"] = _SIZES
    return added


def ensemble_provenance(members: Sequence[Provenance]) -> Provenance:
    """The provenance of an ensemble's mean, from that of its members; a single one as it is."""
    if len(members) == 1:
        return members[0]
    merged = members[0].copy()
    for key in ("certificate", "predictions"):
        merged.pop(key, None)  # type: ignore[misc]
    measurements = torch.tensor([member["measurements"] for member in members])
    merged["measurements"] = measurements.mean(0).tolist()
    runs = [str(member["trajectory"]) for member in members]
    merged["trajectory"] = runs if len(set(runs)) > 1 else runs[0]
    if len({len(member.get("segments", [])) for member in members}) > 1:
        del merged["segments"]  # the mean is not split
    shared = [n for n in members[0]["notes"] if all(n in other["notes"] for other in members)]
    merged["notes"] = shared + [
        f"Member {number}: {note}"
        for number, member in enumerate(members, start=1)
        for note in member["notes"]
        if note not in shared
    ]
    for member in members:  # a member's own note says how many of its scores these are
        if "beyond_range" in member:
            merged["beyond_range"] = member["beyond_range"]
    merged["members"] = [_member(member) for member in members]
    return merged


def _member(provenance: Provenance) -> MemberRecord:
    record: MemberRecord = {
        "trajectory": str(provenance["trajectory"]),
        "steps": provenance["steps"],
        "measurements": provenance["measurements"],
        "notes": provenance["notes"],
    }
    if "predictions" in provenance:
        record["predictions"] = provenance["predictions"]
    if "certificate" in provenance:
        record["certificate"] = provenance["certificate"]
    return record


def _several_stages(stages: Sequence[Stage], counts: Sequence[int] | None) -> Provenance:
    """What each of several stages contributed; nothing for a single one."""
    if len(stages) == 1:
        return {}
    assert counts is not None
    records: list[StageRecord] = []
    for number, stage in enumerate(stages):
        session, first = stage.session, sum(counts[:number])
        records.append(
            {
                "trajectory": session.trajectory.path or "in memory",
                "model": type(session.module).__name__,
                "task": session.task.settings(),
                "num_train": session.num_train,
                "columns": [stage.columns.start, stage.columns.stop],
                "segments": [first, first + counts[number]],
                "steps": [stage.first_step, stage.first_step + session.trajectory.last_step],
                "trained_parameters": session.num_parameters,
                "frozen_parameters": list(stage.frozen),
                "notes": [*session.task.notes, *session.engine.notes],
            }
        )
    runs = [record["trajectory"] for record in records]
    return {
        "stages": records,
        "trajectory": runs[0] if stages[-1].run == 0 else runs,
        "steps": records[-1]["steps"][1],
        "num_train": stages[-1].columns.stop,
    }


def _fisher(curvature: str | None, task: AttributionTask) -> str | None:
    """Which Fisher or Gauss-Newton matrix a curvature stands for; None where there is none."""
    if curvature is None or curvature == "identity":
        return None
    if curvature == "exact":
        return "Gauss-Newton matrix, exact"
    if task.can_sample:
        return "true Fisher (sampled: random signs with the covariance of labels from the model)"
    return "empirical Fisher (the task has no sampled_loss, so the gradients of the loss itself)"
