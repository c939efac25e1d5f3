"""SOURCE over several stages of training: pre-training, then fine-tuning on other data, with
another loss, another head, or a frozen trunk.

Every stage is segmented, fitted and scored by itself: N, the loss, the gradients, the optimizer's
metric and the curvature are its own, and no segment crosses its end. Only the queries' adjoint goes
from a stage to the one before it (docs/methods.md, "Several stages"; ``coupling.py`` for frozen
parameters). Multi-stage influence functions (Chen et al. 2020, 2007.09081) approximate the same at
two optima.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from tda_lightning.estimators.about import about_stage_statistics
from tda_lightning.estimators.clipping import clipping_notes
from tda_lightning.estimators.queries import rounds_of
from tda_lightning.estimators.source.averaged import AveragedRun
from tda_lightning.estimators.source.coupling import StageLink
from tda_lightning.estimators.source.recorded import RecordedRun
from tda_lightning.estimators.source.recorded_adam import RecordedAdamRun
from tda_lightning.optimizers import rule_of
from tda_lightning.records.trajectory import Segment, Trajectory
from tda_lightning.session.passes import NO_SELF, Pass, Plan, Stage, numbered

if TYPE_CHECKING:
    from tda_lightning.estimators.source.estimator import Source

StageRun = AveragedRun | RecordedRun | RecordedAdamRun


def options_by_stage(options: Source, stages: Sequence[Stage]) -> list[Source]:
    """The settings for each stage, with its own cuts.

    A run that was recorded as one keeps the cuts that it would have as a whole, and gets further
    ones where its stages begin. Of ``num_segments`` equal lengths, a cut that would leave a
    segment of a stage without a checkpoint is left out.
    """
    runs = sorted({stage.run for stage in stages})
    given: Any = options.segment_steps
    nested = bool(given) and all(isinstance(cuts, Sequence) for cuts in given)
    if given is not None and len(runs) > 1 and not (nested and len(given) == len(runs)):
        raise ValueError(
            f"segment_steps must hold one list of steps for each of the {len(runs)} "
            f"trajectories, got {list(given)}."
        )
    found = []
    for stage in stages:
        own = [other for other in stages if other.run == stage.run]
        if len(own) == 1 and given is None:
            found.append(options)
            continue
        first = stage.first_step - own[0].first_step
        total = sum(other.session.trajectory.last_step for other in own)
        if given is None:
            cuts = [part * total // options.num_segments for part in range(options.num_segments)]
        else:
            cuts = list(given[runs.index(stage.run)] if nested else given)
        last = first + stage.session.trajectory.last_step
        inside = [cut - first for cut in cuts if first < cut < last]
        if given is None:
            inside = _with_checkpoints(inside, stage.session.trajectory)
        found.append(replace(options, segment_steps=inside))
    return found


def _with_checkpoints(cuts: Sequence[int], trajectory: Trajectory) -> list[int]:
    """Those of ``cuts`` between which every segment holds a checkpoint."""
    steps, kept = sorted(trajectory.checkpoints), [0]
    for cut in cuts:
        if any(kept[-1] < step <= cut for step in steps):
            kept.append(cut)
    return kept[1:]


def segment_counts(options: Source, stages: Sequence[Stage]) -> list[int]:
    """Segments of each stage."""
    own = options_by_stage(options, stages)
    return [one.segment_count(stage.session) for one, stage in zip(own, stages, strict=True)]


def plan_stages(options: Source, stages: Sequence[Stage]) -> Plan:
    """Fit every stage's curvature, then carry the queries back through all of them."""
    own = options_by_stage(options, stages)
    runs = _runs(own, stages)
    passes: list[Pass] = []
    for number, run in enumerate(runs):
        passes += numbered(run.curvature_passes(), number)
    context = stages[-1].session
    size = max(
        sum(block.size for block in stage.wide.blocks) * run.copies
        for stage, run in zip(stages, runs, strict=True)
    )
    item = torch.finfo(context.dtype).bits // 8
    for start, stop in rounds_of(context.num_query, size * item):
        for number in reversed(range(len(runs))):
            passes += numbered(runs[number].round(start, stop), number)
    segments = [
        Segment(
            at.first_step + s.start,
            at.first_step + s.stop,
            tuple(at.first_step + step for step in s.checkpoints),
        )
        for at, run in zip(stages, runs, strict=True)
        for s in run.segments
    ]
    provenance: dict[str, Any] = {
        "segments": [[s.start, s.stop] for s in segments],
        "checkpoints": [list(s.checkpoints) for s in segments],
        "leading_directions": [
            one.leading(stage.session) for one, stage in zip(own, stages, strict=True)
        ],
    }
    notes = [NO_SELF]
    for number, (one, run) in enumerate(zip(own, runs, strict=True), start=1):
        found = clipping_notes(run.context.trajectory)
        if not isinstance(run, RecordedAdamRun):
            found += one.notes_on_rates(run.context, run.segments)
        notes += [f"Stage {number}: {note}" for note in found]
    provenance |= about_stage_statistics(
        options.statistics,
        options.curvature,
        [run.context.trajectory for run in runs],
        [[(s.start, s.stop) for s in run.segments] for run in runs],
    )
    return Plan(passes, provenance, notes)


def _runs(own: Sequence[Source], stages: Sequence[Stage]) -> list[StageRun]:
    """One run for each stage, each linked to the one after it."""
    runs: list[StageRun] = []
    later: StageLink | None = None
    for options, stage in reversed(list(zip(own, stages, strict=True))):
        later = StageLink(stage, later, options.curvature, options.seed)
        kind: type[StageRun] = AveragedRun
        if options.order == "recorded":
            linear = rule_of(stage.session.trajectory).linear
            kind = RecordedRun if linear else RecordedAdamRun
        runs.append(kind(options, stage.session, later))
    return runs[::-1]
