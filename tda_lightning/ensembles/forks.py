"""Members of kind ``forks``: they leave the recorded run at a checkpoint.

Up to there a fork *is* the recorded run: the same rows, the same checkpoints. From there on it
draws its batches anew, as a loader that shuffles would, and its noise, and goes on with the
weights, the optimizer's state and the applied rates of the recorded run. It costs the steps that
follow.

The steps are taken by the replay that exact unrolling uses
(:class:`tda_lightning.replay.run.Walk`): the module's own ``training_step`` and ``torch.optim``,
with the recorded clipping and accumulation. So a fork can be replayed, and lands on its end.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning.attribution.matching import require_same_data, require_same_parameters
from tda_lightning.ensembles.folder import begin, diverging, judge, require_room, waiting
from tda_lightning.ensembles.making import diverged, say
from tda_lightning.ensembles.seeds import seeded
from tda_lightning.recording.checkpoints import read_checkpoint
from tda_lightning.records.ensemble import Ensemble, MemberFact
from tda_lightning.records.errors import (
    TrajectoryMismatchError,
    UnsupportedTrainingError,
)
from tda_lightning.records.trajectory import Facts, Steps, Trajectory
from tda_lightning.replay.measured import MeasuredWalk
from tda_lightning.replay.run import Replay, Walk
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.module_state import borrowed
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.runtime.random_states import Snapshot
from tda_lightning.store import layout
from tda_lightning.store.ensemble_file import read_ensemble
from tda_lightning.store.lock import FolderLock
from tda_lightning.store.reader import open_trajectory, read_facts
from tda_lightning.store.shared_files import share
from tda_lightning.store.writer import TrajectoryWriter
from tda_lightning.tasks import AttributionTask, as_task

KIND = "forks"
_MISSED = 1e-2  # of the distance trained: what rounding may come to, amplified over a run


def fork(
    run: str | os.PathLike[str],
    module: nn.Module,
    train: object,
    task: AttributionTask | None = None,
    members: int = 5,
    at: Sequence[int] | None = None,
) -> Ensemble:
    """Let members leave a recorded run at its checkpoints, so that with it there are ``members`` in
    all.

    They are kept in ``RUN/ensemble/forks/member-2`` and so on, whole trajectories that share the
    checkpoints before they leave. A fork that was cut off goes on from its last checkpoint.

    Members have a common past, so they vary less than independent runs do: their spread is a lower
    bound.

    Args:
        run: folder of the recorded run.
        module: built as it was trained.
        train: the recorded training set, a ``DataLoader`` over it or its data module.
        task: gives the loss; None for the module's own ``training_step``.
        members: number of runs, the recorded one included.
        at: steps of the recorded checkpoints to leave at, in turns; None for those nearest to a
            half and a quarter from the end.

    Raises:
        UnsupportedTrainingError: the run cannot be replayed, or has no checkpoint with an
            optimizer's state to leave at.
        TrajectoryMismatchError: module or training set are not the recorded ones, or what they
            train lands elsewhere than the recorded run.
        OSError: the disk has no room for them.
        ValueError: fewer than two members, or forks that do not differ.

    Example:
        >>> from tda_lightning import ensembles
        >>> ensemble = ensembles.fork("runs/fashion", Net(), train_dataset)  # doctest: +SKIP
    """
    trajectory = Trajectory.load(run)
    points = fork_points(trajectory, at)
    replay = replay_of(trajectory, module, train, task)
    root = begin(run, KIND, members, {"at": points})
    missing = waiting(root)
    require_room(root, missing, [fork_bytes(trajectory, fork_point(m, points)) for m in missing])
    with SlowProgress("Training forks", len(missing)) as progress:
        if missing:
            require_faithful(replay, points)
        for member in missing:
            fork_member(root, member, replay)
            progress.advance()
    for line in diverged(root):
        say(line)
    return Ensemble.load(root)


def fork_points(trajectory: Trajectory, at: Sequence[int] | None = None) -> list[int]:
    """The steps to leave at, checked.

    Raises:
        UnsupportedTrainingError, ValueError: as :func:`fork` does.
    """
    last = trajectory.last_step
    inside = [step for step in trajectory.checkpoints if 0 < step < last]
    if not inside:
        raise UnsupportedTrainingError(
            "The run has no checkpoint between its first and its last step, so no fork can leave "
            "it. Record it again with more checkpoints (num_checkpoints)."
        )
    if at is None:
        targets = (last / 2, 3 * last / 4)
        at = sorted({min(inside, key=lambda step: abs(step - target)) for target in targets})
    points = list(at)
    if not points or not set(points) <= set(inside):
        raise ValueError(
            f"at must name recorded checkpoints between the first and the last step, {inside}, got "
            f"{points}."
        )
    for step in points:
        if trajectory.checkpoints[step].optimizer is None:
            raise UnsupportedTrainingError(
                f"The checkpoint at step {step} does not hold the optimizer's state, which a fork "
                "goes on with. Record again with save_optimizer=True, or leave at another one: at."
            )
    return points


def replay_of(
    trajectory: Trajectory, module: nn.Module, train: object, task: AttributionTask | None
) -> Replay:
    """What forks are trained by.

    Raises:
        UnsupportedTrainingError, TrajectoryMismatchError: as :func:`fork` does.
    """
    source = ExampleSource.of(train, 1, "training")
    require_same_data(trajectory, source)
    replay = Replay(trajectory, module, as_task(task), source)
    require_same_parameters(replay.module, trajectory)
    replay.check()
    return replay


def require_faithful(replay: Replay, points: Sequence[int]) -> None:
    """Check that training goes on as recorded: from the last point to the checkpoint after it.

    Raises:
        TrajectoryMismatchError: it lands elsewhere.
    """
    trajectory, start = replay.trajectory, max(points)
    stop = min(step for step in trajectory.checkpoints if step > start)
    with borrowed(replay.module), replay.as_trained():
        walk = Walk(replay)
        walk.restart(start)
        for row in range(start, stop):
            walk.step(row)
        found = {name: tensor.cpu() for name, tensor in walk.snapshot().tensors.items()}
    before, after = (trajectory.checkpoints[step].parameters for step in (start, stop))
    missed = sum(float((found[name] - after[name]).double().square().sum()) for name in after)
    moved = sum(float((before[name] - after[name]).double().square().sum()) for name in after)
    error = (missed / moved) ** 0.5 if moved else missed**0.5
    if not error <= _MISSED:
        raise TrajectoryMismatchError(
            f"Trained on from the checkpoint at step {start}, the run lands elsewhere than "
            f"recorded at step {stop}: by {error:.2g} of how far the weights moved, expected at "
            f"most {_MISSED}. The data, the code or the arithmetic have changed since, and forks "
            "would be runs of another training."
        )


def fork_bytes(trajectory: Trajectory, step: int) -> int:
    """Bytes that a fork leaving at ``step`` takes, besides what it shares with the run."""
    root = Path(str(trajectory.path))
    later = [file for at, file in layout.checkpoint_files(root).items() if at > step]
    rows = [file for _, _, file in layout.steps_files(root)]
    return sum(file.stat().st_size for file in (root / layout.FACTS_FILE, *rows, *later))


def fork_member(root: Path, member: MemberFact, replay: Replay) -> None:
    """Train one fork, from where it was cut off if it was, and note what became of it."""
    run, points = replay.trajectory, read_ensemble(root).settings["at"]
    assert isinstance(points, list) and member.seed is not None
    step, folder = fork_point(member, points), root / member.folder
    facts = _facts(run.facts, folder, step, member.seed)
    planned = replace(run, facts=facts, steps=drawn_anew(run, step, member.seed))
    writer = TrajectoryWriter(folder)
    with diverging(root, member.number), _exclusive(folder):
        begun = open_trajectory(folder) if _facts_in(folder) == facts else None
        if begun is None or begun.last_step < step:
            done = step
            _begin(writer, facts, run, step)
        else:
            done = begun.last_step
            writer.resume(facts, done, list(begun.checkpoints))
            say(f"Member {member.number} was cut off and goes on from step {done}: {folder}")
        planned = replace(planned, checkpoints=open_trajectory(folder).checkpoints)
        walker = Replay(planned, replay.module, replay.task, replay.source, replay.training)
        with borrowed(replay.module), walker.as_trained():
            _go_on(walker, writer, done)
        writer.finish()
        judge(root, member.number)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """While it lasts, no other process trains this member."""
    lock = FolderLock(folder)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def fork_point(member: MemberFact, points: Sequence[int]) -> int:
    """Where a member leaves the run: the points are taken in turns."""
    return int(points[member.number % len(points)])


def _facts(recorded: Facts, folder: Path, step: int, seed: int) -> Facts:
    """The facts of a fork; those it was begun with, where it was begun."""
    settings: dict[str, Any] = dict(recorded.settings)
    origin = {"run": settings.get("run_id"), "step": step, "seed": seed}
    begun = _facts_in(folder)
    if begun is not None and begun.settings.get("fork") == origin:
        return begun
    settings.pop("curvature", None)  # its statistics would be those of another run from here on
    settings |= {
        "run_id": uuid.uuid4().hex,  # touches no random generator
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fork": origin,
    }
    return replace(recorded, settings=settings)


def _facts_in(folder: Path) -> Facts | None:
    """The facts of the trajectory in ``folder``; None where there is none."""
    return read_facts(folder) if (folder / layout.FACTS_FILE).is_file() else None


def _begin(writer: TrajectoryWriter, facts: Facts, run: Trajectory, step: int) -> None:
    """What a fork has in common with the recorded run."""
    writer.begin(facts, run.checkpoints[0], overwrite=True)
    files = layout.checkpoint_files(Path(str(run.path)))
    writer.append(run.steps.between(0, step))
    for at, file in files.items():
        if at <= step:
            share(file, layout.checkpoint_file(writer.root, at))


def _go_on(replay: Replay, writer: TrajectoryWriter, done: int) -> None:
    """Train from the checkpoint after ``done`` steps to the end."""
    run, walk = replay.trajectory, MeasuredWalk(replay)
    walk.restart(done)
    recorded = set(layout.checkpoint_files(Path(str(run.path))))
    trained = {n: (p, run.facts.parameters[n].group) for n, p in walk.trained.items()}
    with SlowProgress("Training a fork", run.num_steps - done) as progress:
        for row in range(done, run.num_steps):
            walk.measured_step(row)
            progress.advance()
            if row + 1 not in recorded and row + 1 < run.num_steps:
                continue
            writer.append(walk.measured_rows(row + 1))
            random = None if walk.random is None else walk.random.states()
            checkpoint = read_checkpoint(
                row + 1, replay.module, walk.optimizer, trained, True, random
            )
            writer.write_checkpoint(checkpoint)


def drawn_anew(run: Trajectory, step: int, seed: int) -> Steps:
    """The steps of a fork: other examples in the batches after ``step``, and other noise.

    Batches keep their sizes. In every epoch each example is drawn as often as a loader that
    shuffles draws it: once, from all those that the recorded run ever drew (after a fork in
    mid-epoch, from those that the epoch has left); where the recorded epoch drew some several
    times, those and as often. A run that did not shuffle keeps its order.
    """
    steps, generator = run.steps, torch.Generator().manual_seed(seed)
    examples, ever = steps.examples.clone(), steps.examples.unique()
    ends = steps.example_offsets[steps.batch_offsets].tolist()  # examples before each row
    for epoch in steps.epoch[step:].unique().tolist() if _shuffled(steps) else []:
        rows = (steps.epoch == epoch).nonzero().flatten()
        start, stop = ends[int(rows[0])], ends[int(rows[-1]) + 1]
        here = max(start, ends[step])
        whole, left = steps.examples[start:stop], steps.examples[here:stop]
        if len(whole.unique()) == len(whole):
            left = ever[~torch.isin(ever, steps.examples[start:here])]
        order = torch.randperm(len(left), generator=generator)
        examples[here:stop] = left[order[: stop - here]]
    first = int(steps.batch_offsets[step])
    random = {batch: states for batch, states in steps.random.items() if batch < first}
    if run.facts.settings.get("random") == "recorded":
        with seeded(seed):
            random[first] = Snapshot.take().states()
    return replace(steps, examples=examples, random=random)


def _shuffled(steps: Steps) -> bool:
    """Whether epochs have orders of their own."""
    ends = steps.example_offsets[steps.batch_offsets]
    orders: list[Tensor] = []
    for epoch in steps.epoch.unique().tolist():
        rows = (steps.epoch == epoch).nonzero().flatten()
        orders.append(steps.examples[int(ends[int(rows[0])]) : int(ends[int(rows[-1]) + 1])])
    if len(orders) == 1:
        return not bool((orders[0].diff() == 1).all())
    longest = max(orders, key=len)
    return any(not order.equal(longest[: len(order)]) for order in orders)
