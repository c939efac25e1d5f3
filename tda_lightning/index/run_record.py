"""Which run an index was built from: its gradients mean nothing to the queries of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.runtime.compiled import plain_parameters
from tda_lightning.runtime.digests import digest
from tda_lightning.session.session import Session


def run_digest(session: Session) -> str:
    """Of the last weights, whatever precision and device they are opened in."""
    session.load(session.trajectory.last_step)
    weights = sorted(plain_parameters(session.module).items())
    return digest([[name, own.detach().cpu().float()] for name, own in weights])


def require_same_run(provenance: Mapping[str, Any], session: Session) -> None:
    """Refuse the queries and examples of another run, where the index says what it was built from.

    Raises:
        TrajectoryMismatchError: the weights are others.
    """
    known = provenance.get("run")
    if known is not None and known != run_digest(session):
        raise TrajectoryMismatchError(
            "The index was built from another run: its last weights are not those of the "
            "attribution. Open it with the trajectory that it was built from, or build an index of "
            "this one."
        )
