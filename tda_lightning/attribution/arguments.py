"""What is passed to :class:`~tda_lightning.AttributionModule`, checked where it is passed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from os import PathLike

from lightning.pytorch import Trainer
from torch import nn

from tda_lightning import estimators
from tda_lightning.edits import GraphEdit
from tda_lightning.records.ensemble import Ensemble
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.setting_types import require_type
from tda_lightning.tasks import AttributionTask

BY_TOKEN = ("train", "query", "both")


def require_constructible(
    module: object, trajectory: object, estimator: object, task: object, fresh: object
) -> None:
    """Refuse arguments of another kind than the constructor takes.

    Raises:
        TypeError: names the argument.
    """
    for one in _each(module):
        _require(one, nn.Module, "module", "the module that was trained, such as Net()")
    if not isinstance(trajectory, Ensemble):
        what = "the folder of a recorded run, a Trajectory or a list of them, or an Ensemble"
        for one in _each(trajectory):
            if isinstance(trajectory, list | tuple) and isinstance(one, Ensemble | list | tuple):
                raise TypeError(
                    "A list of trajectories means consecutive stages of one training, and an "
                    f"ensemble has runs of one stage: got {one!r:.200} in the list. Attribute each "
                    "run of several stages by itself, and average the scores."
                )
            _require(one, (str, PathLike, Trajectory), "trajectory", what)
    for one in _each(task):
        if one is not None:
            _require(one, AttributionTask, "task", "a task, such as ClassificationTask(), or None")
    _require_estimator(estimator)
    if isinstance(fresh, str) or not isinstance(fresh, Sequence):
        raise TypeError(f"fresh must be a list of names, such as fresh=['head']; got {fresh!r}.")


def require_attributable(
    batch_size: object = 1,
    trainer: object = None,
    scores_path: object = None,
    self_influence: object = None,
    overwrite: object = False,
    provenance: object = None,
    edits: object = None,
    draws: object = None,
    keep: object = 1.0,
    by_token: object = None,
) -> None:
    """Refuse arguments of another kind than ``attribute`` takes.

    Raises:
        TypeError: names the argument.
        ValueError: a number that must be positive is not.
    """
    require_type("self_influence", self_influence, bool | None)
    require_type("overwrite", overwrite, bool)
    require_type("batch_size", batch_size, int)
    require_type("draws", draws, int | None)
    if int(batch_size) < 1:  # type: ignore[call-overload]
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    require_type("keep", keep, float)
    if by_token not in (None, *BY_TOKEN):
        raise ValueError(
            "by_token must be 'train' (the tokens of training examples), 'query' (those of the "
            f"queries), 'both' or None; got {by_token!r}."
        )
    if not 0 < keep <= 1:  # type: ignore[operator]
        raise ValueError(
            f"keep is the share of the training data that would stay: expected more than 0 and at "
            f"most 1, got {keep!r}. keep=1 asks about the recorded run."
        )
    fewest = 1 if keep == 1 else 0
    if draws is not None and draws < fewest:  # type: ignore[operator]
        raise ValueError(
            f"draws must be at least {fewest}, or None for what suits the task and the optimizer, "
            f"got {draws}."
        )
    if trainer is not None:
        _refuse_other_package(trainer)
        _require(trainer, Trainer, "trainer", "a lightning.pytorch.Trainer, or None")
    if scores_path is not None:
        _require(scores_path, (str, PathLike), "scores_path", "the path of a file, or None")
    if provenance is not None:
        _require(provenance, Mapping, "provenance", "a dictionary, or None")
    if edits is None:
        return
    if not isinstance(edits, Sequence) or isinstance(edits, str):
        raise TypeError(f"edits must be a list, such as edits=[Removal(3)]; got {edits!r}.")
    for edit in edits:
        known = isinstance(edit, GraphEdit) or callable(getattr(edit, "terms", None))
        if isinstance(edit, type) or not known:
            raise TypeError(
                f"edits must hold edits (tda_lightning.edits), such as Removal(3); got {edit!r}."
            )


def _refuse_other_package(trainer: object) -> None:
    """``lightning`` and ``pytorch_lightning`` do not take one another's modules."""
    packages = {kind.__module__.partition(".")[0] for kind in type(trainer).__mro__}
    if "pytorch_lightning" in packages:
        raise TypeError(
            "trainer is a Trainer of pytorch_lightning, expected a lightning.pytorch.Trainer: the "
            "packages have classes of their own, which do not take one another's modules. Build "
            "this trainer with lightning.pytorch, or leave it out. Runs and modules of either "
            "package can be attributed."
        )


def _each(given: object) -> Sequence[object]:
    return given if isinstance(given, list | tuple) else [given]


def _require(value: object, kind: type | tuple[type, ...], name: str, what: str) -> None:
    if isinstance(value, kind):
        return
    got = f"the class {value.__name__}: make one of it" if isinstance(value, type) else repr(value)
    raise TypeError(f"{name} must be {what}; got {got:.200}.")


def _require_estimator(estimator: object) -> None:
    methods = ("score", "segment_count")
    complete = all(callable(getattr(estimator, name, None)) for name in methods)
    if complete and not isinstance(estimator, type):
        return
    named = estimator.__name__ if isinstance(estimator, type) else str(estimator)
    known = {name.lower(): name for name in estimators.__all__ if not name.endswith("Estimator")}
    meant = difflib.get_close_matches(named.lower(), known, n=1, cutoff=0.5)
    name = known[meant[0]] if meant else "Source"
    raise TypeError(
        f"estimator must be an estimator with its settings, such as {name}() of "
        f"tda_lightning.estimators; got {estimator!r:.200}."
    )
