"""Which checkpoint of a run is asked about: the last, an earlier one, one that Lightning saved."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tda_lightning.records.ensemble import Ensemble
from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.records.trajectory import Checkpoint, Trajectory
from tda_lightning.runtime.setting_types import require_type
from tda_lightning.store.weight_files import SavedWeights, read_weights

BEST = "best"


def asked_about(trajectory: Any, at_step: int | None, ckpt: str | PathLike[str] | None) -> Any:
    """``trajectory`` up to the checkpoint asked about; of a list the last one, of an ensemble each.

    Raises:
        FileNotFoundError: there is no such file.
        TrajectoryMismatchError: the file is of another run.
        ValueError: there is no such checkpoint, or forks have not left their run there; both are
            given.
    """
    require_type("at_step", at_step, int | None)
    if at_step is None and ckpt is None:
        return trajectory
    if at_step is not None and ckpt is not None:
        raise ValueError(f"Give at_step or ckpt, got both: {at_step} and {ckpt}.")
    if isinstance(trajectory, Ensemble):
        if ckpt is not None and str(ckpt) != BEST:
            raise ValueError(
                f"The members of an ensemble are different runs, and {ckpt} is of one of them. "
                "Give at_step, or ckpt='best' for the best one of each."
            )
        cut = Ensemble([_cut(run, at_step, ckpt) for run in trajectory])
        cut.facts = trajectory.facts
        _require_apart(cut)
        return cut
    if isinstance(trajectory, list | tuple):
        return [*trajectory[:-1], *(_cut(run, at_step, ckpt) for run in trajectory[-1:])]
    return _cut(trajectory, at_step, ckpt)


def _require_apart(members: Ensemble) -> None:
    """Refuse forks that have not left their run yet: there they are that run.

    Raises:
        ValueError: two members are one run.
    """
    seen: dict[object, int] = {}
    for number, run in enumerate(members, start=1):
        settings, last = run.facts.settings, run.last_step
        fork: Any = settings.get("fork")
        origin = settings.get("run_id") if fork is None or fork["step"] < last else fork["run"]
        if origin is not None and (origin, last) in seen:
            raise ValueError(
                f"After step {last}, members {seen[origin, last]} and {number} of the ensemble are "
                "still the same run, which forks leave later: the spread would be too small. Ask "
                "about a later step, or attribute the recorded run."
            )
        seen[origin, last] = number


def _cut(
    run: str | PathLike[str] | Trajectory,
    at_step: int | None,
    ckpt: str | PathLike[str] | None,
) -> Trajectory:
    trajectory = run if isinstance(run, Trajectory) else Trajectory.load(run)
    if ckpt is None:
        assert at_step is not None
        return trajectory.until(at_step)
    path = _best(trajectory) if str(ckpt) == BEST else Path(ckpt)
    saved = read_weights(path)
    _require_of_run(saved, trajectory)
    assert saved.step is not None
    if saved.step in trajectory.checkpoints:
        return trajectory.until(saved.step)
    return trajectory.until(saved.step, _checkpoint(saved, trajectory))


def _best(trajectory: Trajectory) -> Path:
    """The file of the best checkpoint.

    Raises:
        FileNotFoundError: it is not there any more.
        ValueError: none is known.
    """
    known = trajectory.facts.settings.get("best_checkpoint")
    if not isinstance(known, Mapping) or "path" not in known:
        raise ValueError(
            "ckpt='best' asks for the best checkpoint by the metric of a ModelCheckpoint, and the "
            "run had none with monitor=..., or did not come to its end. Give the file, ckpt=FILE, "
            "or at_step=N for a recorded checkpoint."
        )
    path = Path(str(known["path"]))
    # The folder of the run may have been moved with everything around it.
    near = [] if trajectory.path is None else [*Path(trajectory.path).absolute().parents][:3]
    for candidate in (path, *(folder.joinpath(*path.parts[-2:]) for folder in near)):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"The best checkpoint was {path}, which is not there any more. Give the file, ckpt=FILE, "
        "or at_step=N for a recorded checkpoint."
    )


def _require_of_run(saved: SavedWeights, trajectory: Trajectory) -> None:
    """Refuse a file of another run."""
    if saved.step is None:
        raise ValueError(
            f"{saved.path} does not say after how many steps it was saved, expected a file that "
            "Lightning saved (.ckpt). Give at_step=N for a recorded checkpoint."
        )
    own = trajectory.facts.settings.get("run_id")
    if saved.run_ids and own is not None and own not in saved.run_ids:
        raise TrajectoryMismatchError(
            f"{saved.path} was saved in another run than the one in {trajectory.path}: expected "
            f"run {own}, got {', '.join(saved.run_ids)}."
        )
    if not 1 <= saved.step <= len(trajectory.steps):
        raise ValueError(
            f"{saved.path} was saved after step {saved.step}, and the run has recorded steps 1 to "
            f"{len(trajectory.steps)}. Give another file."
        )


def _checkpoint(saved: SavedWeights, trajectory: Trajectory) -> Checkpoint:
    """The state of the file, with what it leaves out of the last recorded checkpoint before it."""
    before = trajectory.checkpoints[max(s for s in trajectory.checkpoints if s <= saved.step)]  # type: ignore[operator]

    def own(name: str, like: Tensor, needed: bool) -> Tensor:
        found = saved.tensors.get(name)
        if found is None and not needed:
            return like  # a buffer that no state dict has
        if found is None or found.shape != like.shape:
            got = "none" if found is None else f"{list(found.shape)}"
            raise TrajectoryMismatchError(
                f"{saved.path} does not hold the model of the run: expected {name} of shape "
                f"{list(like.shape)}, got {got}."
            )
        return found.to(like.dtype)

    assert saved.step is not None
    parameters = {name: own(name, like, True) for name, like in before.parameters.items()}
    buffers = {name: own(name, like, False) for name, like in before.buffers.items()}
    if saved.step == before.step and not all(
        torch.equal(value, before.parameters[name]) for name, value in parameters.items()
    ):
        raise TrajectoryMismatchError(f"{saved.path} has other weights than the recorded run.")
    return Checkpoint(saved.step, parameters, buffers)
