"""Which run an index was built from: its gradients mean nothing to the queries of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.runtime.compiled import plain_parameters
from tda_lightning.runtime.digests import digest
from tda_lightning.session.session import Session


def run_record(session: Session) -> dict[str, str]:
    """What tells the run from others, for the provenance of an index: its last weights, whatever
    precision and device they are opened in, and the name that it was recorded under. Of a run
    without a name its steps stand for it: two runs can end at the same weights."""
    trajectory = session.trajectory
    session.load(trajectory.last_step)
    weights = sorted(plain_parameters(session.module).items())
    recorded = trajectory.facts.settings.get("run_id")
    if recorded is None:
        recorded = digest([trajectory.steps.examples, trajectory.steps.learning_rate])
    return {
        "run": digest([[name, own.detach().cpu().float()] for name, own in weights]),
        "run_id": recorded,
    }


def of_another_run(provenance: Mapping[str, Any], record: Mapping[str, str]) -> bool:
    """Whether an index is of another run than that of ``record``, as far as it says what it was
    built from."""
    return any(provenance.get(key, own) != own for key, own in record.items())


def require_same_run(provenance: Mapping[str, Any], session: Session) -> None:
    """Refuse the queries and examples of another run, where the index says what it was built from.

    Raises:
        TrajectoryMismatchError: it is another one.
    """
    if of_another_run(provenance, run_record(session)):
        raise TrajectoryMismatchError(
            "The index was built from another run: its last weights, or the recording that they "
            "are of, are not those of the attribution. Open it with the trajectory that it was "
            "built from, or build an index of this one."
        )
