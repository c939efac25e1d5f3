r"""What-if runs: a recorded run trained again with weights on its examples, as a trajectory of its
own.

A score is a derivative of the training with respect to the weight of an example's loss. The
recorded run has every weight at 1, and its derivative says what a *few* examples do. Where a share
:math:`\kappa` of the data would stay, the derivative is better taken at weights whose mean is
:math:`\kappa` (docs/methods.md, "Where the derivative is taken"). So the run is replayed with the
loss of a batch

.. math::
    L_B = \frac1{|B|} \sum_{n \in B} w_n\, l_n(\theta),

with the recorded batches, rates, weight decay and random states, and what it leaves is recorded as
the run was. Every estimator then works on it as on any other.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from tda_lightning.optimizers import remembers, rule_of
from tda_lightning.records.errors import (
    NonFiniteError,
    TrajectoryLockedError,
    TrajectoryNotFoundError,
    UnsupportedTrainingError,
)
from tda_lightning.records.trajectory import Checkpoint, Facts, Steps, Trajectory
from tda_lightning.replay.expected_squares import EXPECTED, SETTING, expects_squares
from tda_lightning.replay.measured import MeasuredWalk
from tda_lightning.replay.prepared import again_where_unseen, prepared, require_task_loss
from tda_lightning.replay.run import Replay, ReplaySnapshot, Walk
from tda_lightning.runtime.digests import digest
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.module_state import borrowed
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.runtime.random_states import Snapshot
from tda_lightning.store import layout
from tda_lightning.store.disk_room import require_room
from tda_lightning.store.lock import FolderLock
from tda_lightning.store.steps_file import join_steps
from tda_lightning.store.writer import TrajectoryWriter
from tda_lightning.tasks import AttributionTask, seeded_examples

_FORMAT = 2  # of the keys of what-if runs
_KEY_DIGITS = 32
_SEED = 0  # of the random subsets
_TIMED = 8  # steps that a plan times


def uniform_weights(num_train: int, keep: float) -> Tensor:
    """Every example at weight ``keep``, float64 [1, train]."""
    return torch.full((1, num_train), keep, dtype=torch.float64)


def subset_weights(num_train: int, keep: float, draws: int) -> Tensor:
    """Random subsets: 1 for the share ``keep`` of the examples and 0 for the others, float64
    [draw, train].

    Each example is left out as often as any other, as far as their number allows: two halves
    complement one another. More draws begin with the same ones.

    Example:
        >>> subset_weights(6, 0.5, 2).sum(0)
        tensor([1., 1., 1., 1., 1., 1.], dtype=torch.float64)
    """
    generator = torch.Generator().manual_seed(_SEED)
    left_out = num_train - max(1, round(keep * num_train))
    weights = torch.ones(draws, num_train, dtype=torch.float64)
    waiting = torch.empty(0, dtype=torch.int64)  # to be left out, in order
    for row in weights:
        chosen, waiting = waiting[:left_out], waiting[left_out:]
        if len(chosen) < left_out:
            order = torch.randperm(num_train, generator=generator)
            # Not twice in one subset.
            again = torch.isin(order, chosen)
            order = torch.cat([order[~again], order[again]])
            missing = left_out - len(chosen)
            chosen, waiting = torch.cat([chosen, order[:missing]]), order[missing:]
        row[chosen] = 0
    return weights


def weights_that_suit(trajectory: Trajectory) -> Literal["uniform", "expected", "subsets"]:
    """Where the derivative is best taken for the optimizer (experiments/question): every example at
    one weight where it feels a common factor of the loss; where it normalises that away by a sum of
    squared gradients, with the squares that random subsets are expected to leave; else at random
    subsets."""
    rule = rule_of(trajectory)
    if rule.linear:
        return "uniform"
    return "subsets" if rule.squares is None else "expected"


def what_if_run(
    trajectory: Trajectory,
    module: nn.Module,
    task: AttributionTask,
    source: ExampleSource,
    weights: Tensor,
    before: Sequence[tuple[Trajectory, Trajectory]] = (),
    expected: bool = False,
    rate: float = 1.0,
    common: tuple[Trajectory, int] | None = None,
) -> Trajectory:
    """The run trained again with example n's loss multiplied by ``weights[n]``.

    It is kept beside the trajectory under a digest of all that determines it, so that every
    estimator shares it; a call that was interrupted resumes at its last checkpoint.

    Args:
        trajectory: the recorded run, or one of its stages.
        module: built as it was trained; it is restored at the end.
        task: gives each example's training loss.
        source: the recorded training set.
        weights: float64 [train].
        before: the recorded stages that came before, in order, with their what-if runs: what this
            one took over from them comes from there.
        expected: train with the second moments that random subsets, with these weights as
            probabilities, are expected to leave (:mod:`tda_lightning.replay.expected_squares`).
        rate: what the recorded rates are multiplied by.
        common: the what-if run, at the same weights and rate, of a run that this one left after so
            many steps (a fork). They are not trained again.

    Raises:
        UnsupportedTrainingError: the run cannot be replayed.
        TrajectoryMismatchError: the training set or the task's loss is not that of the run.
        NonFiniteError: training with these weights diverged.
        OSError: the disk has no room for it.
    """
    replay, losses = _checked(trajectory, module, task, source)
    start = _beginning(trajectory, before)
    how = f"{expected} at {rate}"
    key = _key(replay, start, weights, losses, how)
    asked = _weighted(trajectory, weights, expected, rate)
    weighted = Replay(asked, module, replay.task, source)

    def run() -> Trajectory:
        if trajectory.path is None:
            return _in_memory(weighted, start, key)
        return _in_folder(weighted, start, key, Path(trajectory.path), common)

    made = again_where_unseen(weighted, run)
    return replace(made, steps_before=trajectory.steps_before)


def _weighted(
    trajectory: Trajectory, weights: Tensor, expected: bool, rate: float = 1.0
) -> Trajectory:
    """The recorded run as its what-if run is to be trained."""
    settings = dict(trajectory.facts.settings)
    if expected:
        settings[SETTING] = EXPECTED
    return replace(
        trajectory,
        data_weights=weights,
        steps=replace(trajectory.steps, learning_rate=trajectory.steps.learning_rate * rate),
        facts=replace(trajectory.facts, settings=settings),
    )


def seconds_of_run(
    trajectory: Trajectory,
    module: nn.Module,
    task: AttributionTask,
    source: ExampleSource,
    expected: bool = False,
) -> float:
    """About how long a what-if run takes: a few of its steps are timed."""
    replay, _ = _checked(trajectory, module, task, source)
    weights = uniform_weights(len(source), 0.5)[0]
    asked = _weighted(trajectory, weights, expected)
    weighted = Replay(asked, module, replay.task, source)
    timed = min(_TIMED, trajectory.last_step)
    with borrowed(module), weighted.as_trained():
        walk = Walk(weighted)
        walk.restart(0)
        walk.step(0)  # allocates the optimizer's states
        walk.restart(0)
        began = time.perf_counter()
        for row in range(timed):
            walk.step(row)
        return (time.perf_counter() - began) * trajectory.last_step / timed


def _checked(
    trajectory: Trajectory, module: nn.Module, task: AttributionTask, source: ExampleSource
) -> tuple[Replay, list[str]]:
    """The recorded run, ready to be replayed with weights: its batches are there, and the task's
    losses make up the loss as trained. With the losses of its first step, rounded."""
    if trajectory.data_weights is not None:
        raise UnsupportedTrainingError(
            "The trajectory has weights on its examples already: it is itself a what-if run, or "
            "was trained with WeightedTraining. Give a run with equal weights."
        )
    replay = Replay(trajectory, module, task, source)
    replay.check()
    replay.task = prepared(replay)
    losses: list[str] = []
    with borrowed(module), replay.as_trained(), torch.no_grad():
        walk = Walk(replay)
        walk.restart(0)
        for batch, examples, draws in walk.batches(0):
            trained = float(replay.loss_as_trained(batch, examples))
            if draws is not None:
                draws.forward.restore()
            with seeded_examples(0, examples, own_noise=False):
                total, parts = replay.task.batch_loss(replay.module, batch)
            losses += [f"{part:.3e}" for part in parts.tolist()]
            dtype = next(module.parameters()).dtype
            require_task_loss(1, float(total), trained, dtype, "A what-if run")
    return replay, losses


def _beginning(
    trajectory: Trajectory, before: Sequence[tuple[Trajectory, Trajectory]]
) -> Checkpoint:
    """What the run starts from. Tensors that a stage took over as the one before it left them are
    taken over from that stage's what-if run; an optimizer's states from the last stage that moved
    them."""
    first = trajectory.checkpoints[0]
    if not before:
        return first
    recorded, changed = (run.checkpoints[run.last_step] for run in before[-1])
    left = {**recorded.buffers, **recorded.parameters}
    leaves = {**changed.buffers, **changed.parameters}

    def taken_over(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: leaves[name].to(own.dtype)
            if name in left and torch.equal(left[name].to(own.dtype), own)
            else own
            for name, own in tensors.items()
        }

    optimizer = first.optimizer
    if optimizer is not None:
        states: dict[str, Mapping[str, Tensor]] = {}
        for _, run in before:
            states |= run.checkpoints[run.last_step].optimizer or {}
        # A new optimizer starts afresh.
        optimizer = {n: states[n] if n in trajectory.steps_before else {} for n in optimizer}
    return replace(
        first,
        parameters=taken_over(first.parameters),
        buffers=taken_over(first.buffers),
        optimizer=optimizer,
    )


def _key(replay: Replay, start: Checkpoint, weights: Tensor, losses: list[str], how: str) -> str:
    """Digest of all that determines a what-if run. Code is observed through what it computes: the
    losses of the first step."""
    trajectory = replay.trajectory
    facts, steps = trajectory.facts, trajectory.steps
    end = trajectory.checkpoints[trajectory.last_step].parameters
    content = [
        _FORMAT,
        [facts.settings.get("run_id"), facts.optimizer, facts.num_examples, facts.fingerprint],
        [steps.examples, steps.example_offsets, steps.batch_offsets, steps.accumulation],
        [steps.learning_rate, dict(steps.hyperparameters), sorted(trajectory.checkpoints)],
        [dict(start.parameters), dict(start.buffers), dict(end)],
        [type(replay.module).__name__, replay.task.settings(), weights, losses, how],
    ]
    return digest(content)[:_KEY_DIGITS]


class _Record(Protocol):
    """Where a what-if run is recorded: a folder (:class:`TrajectoryWriter`) or memory."""

    def append(self, steps: Steps) -> None: ...

    def write_checkpoint(self, checkpoint: Checkpoint) -> None: ...


class _Memory:
    """A trajectory that is recorded in memory."""

    def __init__(self, start: Checkpoint) -> None:
        self.parts: list[Steps] = []
        self.checkpoints = {0: start}

    def append(self, steps: Steps) -> None:
        self.parts.append(steps)

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        self.checkpoints[checkpoint.step] = checkpoint


def _in_memory(replay: Replay, start: Checkpoint, key: str) -> Trajectory:
    kept = replay.trajectory.what_if
    if key not in kept:
        record = _Memory(start)
        _record(replay, record, start)
        kept[key] = Trajectory(
            facts=_facts(replay.trajectory, key),
            steps=join_steps(record.parts),
            checkpoints=record.checkpoints,
            data_weights=replay.trajectory.data_weights,
        )
    return kept[key]


def _in_folder(
    replay: Replay,
    start: Checkpoint,
    key: str,
    root: Path,
    common: tuple[Trajectory, int] | None,
) -> Trajectory:
    trajectory, folder = replay.trajectory, layout.what_if_folder(root, key)
    made = _opened(folder)
    if made is not None and made.last_step == trajectory.last_step:
        return made
    try:
        with _alone(folder):
            made = _opened(folder)  # another process may have made it meanwhile
            if made is not None and made.last_step == trajectory.last_step:
                return made
            writer = TrajectoryWriter(folder, trajectory.data_weights)
            facts, begin = _facts(trajectory, key), start
            if made is None or not _can_resume(made):
                require_room(folder, _bytes_of(root, trajectory), "a what-if run")
                writer.begin(facts, start, overwrite=True)
                if common is not None:
                    begin = _begun(writer, *common)
            else:
                begin = made.checkpoints[made.last_step]
                writer.resume(facts, made.last_step, list(made.checkpoints))
            _record(replay, writer, begin)
            writer.finish()
    except PermissionError as error:
        warnings.warn(
            f"{folder} cannot be written, so the what-if run is not kept: {error}. Scores are not "
            "affected; the next attribution will train it again.",
            stacklevel=2,
        )
        return _in_memory(replay, start, key)
    return Trajectory.load(folder)


def _begun(writer: TrajectoryWriter, run: Trajectory, step: int) -> Checkpoint:
    """Record what a what-if run has in common with ``run``; the checkpoint after ``step``, from
    which it is trained on."""
    writer.append(run.steps.between(0, step))
    for at in sorted(run.checkpoints):
        if 0 < at <= step:
            writer.write_checkpoint(run.checkpoints[at])
    return run.checkpoints[step]


def _opened(folder: Path) -> Trajectory | None:
    """What a what-if run's folder holds so far; None where it holds nothing."""
    try:
        return Trajectory.load(folder)
    except TrajectoryNotFoundError:
        return None


def _can_resume(made: Trajectory) -> bool:
    last = made.checkpoints[made.last_step]
    return last.optimizer is not None or not remembers(made)


def _bytes_of(root: Path, trajectory: Trajectory) -> int:
    """What the recorded run's checkpoints and steps take on disk; its what-if run takes as much."""
    files = [file for step, file in layout.checkpoint_files(root).items()]
    files += [file for _, _, file in layout.steps_files(root)]
    return sum(file.stat().st_size for file in files)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process makes the same what-if run."""
    lock, told = FolderLock(folder), False
    with SlowProgress("Waiting for the same what-if run of another process"):
        while True:
            try:
                lock.acquire()
                break
            except TrajectoryLockedError as error:
                if not told:
                    warnings.warn(f"Waiting for a what-if run: {error}", stacklevel=2)
                    told = True
                time.sleep(1.0)
    try:
        yield
    finally:
        lock.release()


def _facts(trajectory: Trajectory, key: str) -> Facts:
    """The facts of a what-if run: the recorded run's, a name of its own, and the weights in
    words."""
    facts, weights = trajectory.facts, trajectory.data_weights
    assert weights is not None
    settings = {name: own for name, own in facts.settings.items() if name != "curvature"}
    kept = round(float(weights.mean()), 6)
    alike = bool((weights == weights[0]).all())
    settings["run_id"] = f"{facts.settings.get('run_id')} what if {key}"
    settings["what_if"] = f"every example at weight {kept:g}" if alike else f"a subset of {kept:g}"
    if expects_squares(trajectory):
        settings["what_if"] += ", expected second moments"
    return replace(facts, settings=settings)


def _record(replay: Replay, record: _Record, start: Checkpoint) -> None:
    """Train from ``start`` to the end of the run, and record what the run recorded."""
    trajectory = replay.trajectory
    stops = [step for step in sorted(trajectory.checkpoints) if step > start.step]
    with (
        borrowed(replay.module),
        replay.as_trained(),
        SlowProgress("What-if run", trajectory.last_step - start.step) as progress,
    ):
        walk, row = MeasuredWalk(replay), start.step
        _take_up(walk, start)
        for stop in stops:
            while row < stop:
                try:
                    walk.measured_step(row)
                except NonFiniteError as error:
                    raise NonFiniteError(
                        f"The what-if run diverged: {error}. Ask with keep nearer to 1."
                    ) from error
                row += 1
                progress.advance()
            record.append(walk.measured_rows(stop))
            record.write_checkpoint(_checkpoint(walk, stop))


def _take_up(walk: Walk, start: Checkpoint) -> None:
    """Let a walk begin at a checkpoint."""
    random = None
    if walk.replay.knows_randomness and start.random is not None:
        random = Snapshot.of(start.random)
    tensors = {**start.buffers, **start.parameters}
    walk.resume_from(ReplaySnapshot(tensors, start.optimizer or {}, random))  # type: ignore[arg-type]


def _checkpoint(walk: Walk, step: int) -> Checkpoint:
    """Where a walk is after ``step``, with what the recorded checkpoint has. Both draw the same
    random numbers."""
    recorded, now = walk.replay.trajectory.checkpoints[step], walk.snapshot()
    tensors = {name: tensor.cpu() for name, tensor in now.tensors.items()}
    optimizer = None
    if recorded.optimizer is not None:
        optimizer = {
            name: {key: value.cpu() for key, value in now.optimizer[name].items()}
            for name in recorded.optimizer
        }
    return Checkpoint(
        step,
        {name: tensors[name] for name in recorded.parameters},
        {name: tensors[name] for name in recorded.buffers},
        optimizer,
        recorded.random,
    )
