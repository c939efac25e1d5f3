"""What a recorder must know to continue a trajectory, and when it must not.

The state travels in Lightning's checkpoints. It holds only plain numbers, texts and tensors, so a
checkpoint loads with ``weights_only=True``. Rows of the steps table that are not on disk when
Lightning saves are part of it: writing them out then would make saving a checkpoint depend on the
recorder's disk, and leave a file of steps for each one.

Gradients that have been accumulated but not stepped are in no Lightning checkpoint. After a resume
in the middle of an accumulation the step is made of the later batches alone, and is recorded so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tda_lightning.records.errors import (
    ResumeError,
    TrajectoryFormatError,
    TrajectoryMismatchError,
    TrajectoryNotFoundError,
)
from tda_lightning.records.trajectory import Facts, StageFact, Steps
from tda_lightning.store.reader import CheckpointFolder, read_facts, require_trajectory
from tda_lightning.store.truncate import ADVICE

FORMAT = 2
# Settings that may differ between two starts of one run. Of the groups' settings, rates among
# them, those applied are in the steps table.
_OF_ONE_START = {"run_id", "created", "fits", "changes", "indices"}
_OF_ONE_START |= {"planned_checkpoints", "optimizer_groups", "best_checkpoint"}


@dataclass(frozen=True)
class RecorderState:
    """Where the trajectory stood when Lightning saved a checkpoint."""

    run_id: str
    global_step: int  # the trainer's
    rows_on_disk: int  # number of steps on disk
    rows: Steps  # those after them
    checkpoints: tuple[int, ...]  # steps of those written
    state_kept: bool  # the last of them has the optimizer's state
    planned: tuple[int, ...]  # steps of the checkpoints planned for the whole run
    accumulated: int = 0  # batches whose gradients were not stepped yet
    parts: Mapping[str, Any] = field(default_factory=dict)  # TrajectoryRecorder.parts, by name
    left: Mapping[str, Tensor] | None = None  # random states after the last step, where recorded

    def pack(self) -> dict[str, Any]:
        """As plain containers, numbers and tensors."""
        rows, parts = _plain(vars(self.rows)), dict(self.parts)
        return {"format": FORMAT, **_plain(vars(self)), "rows": rows, "parts": parts}

    @classmethod
    def unpack(cls, state: Mapping[str, Any]) -> RecorderState:
        """The reverse of :meth:`pack`.

        Raises:
            ResumeError: recording had stopped before the checkpoint was saved, or the state is
                that of another release.
        """
        if state.get("format") != FORMAT:
            raise ResumeError(
                f"The recorder's state in the Lightning checkpoint has format "
                f"{state.get('format')!r}, this release of tda-lightning reads {FORMAT}. Resume "
                "with the release that saved it."
            )
        if "stopped" in state:
            raise ResumeError(
                f"The trajectory cannot be continued from this Lightning checkpoint: recording "
                f"had stopped before it was saved ({state['stopped']}). Resume from a checkpoint "
                "saved before that, or without the recorder."
            )
        values = {f.name: state[f.name] for f in dataclasses.fields(cls)}
        for name in ("checkpoints", "planned"):
            values[name] = tuple(values[name])
        return cls(**{**values, "rows": Steps(**state["rows"])})


def _plain(value: Any) -> Any:
    """Mappings as dictionaries, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def state_of_folder(states: Mapping[str, Any], root: Path) -> Mapping[str, Any] | None:
    """Of the states of all callbacks, that of the run in ``root``.

    A recorder's key names its folder; this finds its state when the folder was moved. A single
    state is ours in any case: what is wrong with the folder is said when training starts.
    """
    recorders = [
        s for s in states.values() if isinstance(s, Mapping) and {"run_id", "rows"} <= s.keys()
    ]
    if len(recorders) > 1:
        try:
            run_id = read_facts(root).settings.get("run_id")
        except (OSError, TrajectoryFormatError):
            return None
        recorders = [state for state in recorders if state["run_id"] == run_id]
    return recorders[0] if recorders else None


def failure(root: Path, step: int, kept: int, error: BaseException) -> str:
    """What to say when a trajectory cannot be written after ``step``, the last checkpoint having
    been written at step ``kept``."""
    reason = f"{type(error).__name__}: {error}"
    if step == 0:
        return (
            f"The trajectory in {root} cannot be begun: {reason}. Make room, make the folder "
            "writable, or choose another one."
        )
    return (
        f"The trajectory in {root} cannot be written after step {step}: {reason}. "
        f"What was recorded up to the checkpoint at step {kept} "
        "stays as it is on the disk. Make room, or make the folder writable again, and resume "
        "from the last Lightning checkpoint (ckpt_path)."
    )


def recorded_facts(root: Path, state: RecorderState, global_step: int) -> Facts:
    """The facts of the run in ``root``.

    Raises:
        ResumeError: there is none, or it is not the one that ``state`` belongs to.
    """
    resumes = f"Training resumes at step {global_step}, and"
    try:
        require_trajectory(root)
    except TrajectoryNotFoundError as error:
        raise ResumeError(f"{resumes} its trajectory is missing: {error} {ADVICE}") from error
    facts = read_facts(root)
    if (run_id := facts.settings.get("run_id")) != state.run_id:
        raise ResumeError(
            f"{resumes} the trajectory in {root} is that of another run: expected run "
            f"{state.run_id}, got {run_id}. {ADVICE}"
        )
    if state.global_step != global_step:
        raise ResumeError(
            f"{resumes} the recorder's state is that of step {state.global_step}. Pass the "
            "Lightning checkpoint as it was saved."
        )
    return facts


def no_history(global_step: int, root: Path) -> ResumeError:
    """The error for a training that starts elsewhere than at step 0, with no state to resume."""
    return ResumeError(
        f"Training starts at step {global_step}, expected step 0 or a checkpoint with the "
        f"recorder's state for {root}: a trajectory begins with the initial weights. Resume "
        "(ckpt_path) from a Lightning checkpoint that was saved with this recorder among the "
        "callbacks, or train from the start with a new Trainer."
    )


def require_same_run(recorded: Facts, now: Facts, curvature: Mapping[str, Any] | None) -> None:
    """Check that the model and the optimizer are those of the recorded run, and that curvature
    statistics are gathered as before: their sums are added up over intervals.

    Raises:
        TrajectoryMismatchError: the model or the optimizer is another one.
        ResumeError: the statistics would be gathered in another way.
    """
    advice = "Resume with the recorded model and optimizer, or record into another folder."
    if recorded.optimizer != now.optimizer:
        raise TrajectoryMismatchError(
            f"The optimizer is not the recorded one: expected {recorded.optimizer}, got "
            f"{now.optimizer}. {advice}"
        )
    before, after = recorded.parameters, now.parameters
    differing = sorted(n for n in {*before, *after} if before.get(n) != after.get(n))
    if differing:
        name = differing[0]
        raise TrajectoryMismatchError(
            f"The trained parameters are not the recorded ones: {len(differing)} differ in name, "
            f"shape, dtype or parameter group, {name} among them: expected {before.get(name)}, "
            f"got {after.get(name)}. {advice}"
        )
    expected = recorded.settings.get("curvature")
    if curvature != expected:
        raise ResumeError(
            f"Curvature statistics would be gathered in another way: expected {expected}, as when "
            f"the recording began, got {curvature}. Resume with the recorded curvature, "
            "curvature_every, fisher, curvature_dtype and curvature_dense_side, or record into "
            "another folder."
        )


def require_same_weights(
    root: Path, facts: Facts, step: int, parameters: Mapping[str, Tensor]
) -> None:
    """Check that a further fit begins with the weights that the one before ended with.

    Raises:
        ResumeError: it does not.
    """
    recorded = CheckpointFolder(root, facts)[step].parameters
    differing = [n for n, p in parameters.items() if not torch.equal(recorded[n], p.detach().cpu())]
    if differing:
        raise ResumeError(
            f"Training starts at step {step} with other weights than the recorded fit ended "
            f"with: {len(differing)} parameters differ, {differing[0]} among them. Fit the same "
            "module again, or record into another folder with a new Trainer."
        )


def continued_facts(
    recorded: Facts,
    now: Facts,
    step: int,
    planned: frozenset[int],
    *,
    new_fit: bool,
    new_optimizer: bool,
) -> Facts:
    """``recorded``, with what is different from step ``step`` on.

    Settings that have changed since (a raised number of epochs, another device) are listed under
    ``changes``; the settings themselves stay those of the start. ``fits`` lists the steps after
    which a further fit began. Where its optimizer is a new one, a stage begins.
    """
    settings, present = dict(recorded.settings), json.loads(json.dumps(dict(now.settings)))
    # What was noted after the step that is resumed has been cut off with the steps.
    earlier = [change for change in settings.pop("changes", []) if change["step"] < step]
    fits = [fit for fit in settings.pop("fits", []) if fit < step] + [step] * new_fit
    known = {**settings, **{change["name"]: change["after"] for change in earlier}}
    changes = [
        {"step": step, "name": name, "before": known.get(name), "after": value}
        for name, value in present.items()
        if name not in _OF_ONE_START and known.get(name) != value
    ]
    lists = {"changes": [*earlier, *changes], "fits": fits}
    settings |= {name: entries for name, entries in lists.items() if entries}
    settings["planned_checkpoints"] = sorted(planned)
    stages = recorded.stages
    if new_optimizer and step:
        stages = (*stages, StageFact(step, stages[-1].parameters, new_optimizer=True))
    return replace(recorded, settings=settings, stages=stages)
