"""Which training set belongs to which of the recorded runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from tda_lightning.attribution.matching import require_same_data
from tda_lightning.attribution.stages import StageSetup
from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.store.fingerprints import LENGTH


def require_data_of_stages(
    stages: Sequence[StageSetup], sources: Sequence[ExampleSource], stacklevel: int = 3
) -> None:
    """Check that every run has its own training set.

    Warns:
        UserWarning: two runs have different ones of which nothing recorded tells which is whose.

    Raises:
        TrajectoryMismatchError: one is not the recorded one, maybe that of another run.
    """
    for stage in stages:
        try:
            require_same_data(stage.trajectory, sources[stage.run])
        except TrajectoryMismatchError as error:
            if len(sources) == 1:
                raise
            own = sources[stage.run].dataset
            fitting = [
                f" Of those given, number {place + 1} fits this run: mind the order."
                for place, other in enumerate(sources)
                if other.dataset is not own and _fits(stage.trajectory, other)
            ]
            raise TrajectoryMismatchError(
                f"Run {stage.run + 1} of {len(sources)}: {error}{''.join(fitting[:1])}"
            ) from None
    runs = {stage.run: stage.trajectory for stage in stages}
    for run, trajectory in runs.items():
        for other in range(run):
            apart = sources[run].dataset is not sources[other].dataset
            known = [own.facts.fingerprint for own in (runs[other], trajectory)]
            if apart and known[0] == known[1] and known[0] is not None and {*known[0]} == {LENGTH}:
                warnings.warn(
                    f"Runs {other + 1} and {run + 1} have training sets of one length whose "
                    "examples differ at each reading, so nothing recorded tells which is whose. "
                    "If they are given in another order than the trajectories, scores belong to "
                    "the wrong examples: give data sets whose examples are fixed, and augment in "
                    "the module.",
                    stacklevel=stacklevel,
                )


def _fits(trajectory: Trajectory, source: ExampleSource) -> bool:
    try:
        require_same_data(trajectory, source)
    except TrajectoryMismatchError:
        return False
    return True
