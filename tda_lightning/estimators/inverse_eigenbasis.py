"""The inverse of a curvature that is held as eigenvalues in a basis."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tda_lightning.curvature import Spectrum, statistics_provenance, units
from tda_lightning.estimators.inverse_settings import (
    InverseSettings,
    absolute_damping,
    damping_record,
    decay_by_unit,
    final_curvature,
    last_interval,
    relative_damping,
)
from tda_lightning.estimators.pairs import paired
from tda_lightning.estimators.queries import Response, query_coordinates
from tda_lightning.gradients import Gradient, Rows
from tda_lightning.records.provenance import Provenance
from tda_lightning.session.session import Session


def damped_curvature(
    settings: InverseSettings, session: Session, added: Mapping[str, Tensor]
) -> tuple[dict[str, Spectrum], list[str]]:
    """The curvature of the last checkpoint with ``added`` (weight decay) and the damping, by unit;
    and notes.

    A relative damping of a unit that has no curvature (a layer that the loss never reaches, whose
    gradients are 0 too) is relative to the mean eigenvalue of the others.

    Raises:
        ValueError: an eigenvalue is 0, so that there is no inverse; no layer has any curvature.
    """
    curvature = final_curvature(settings, session)
    absolute = absolute_damping(settings, session.trajectory)
    means = {name: spectrum.eigenvalues.mean() for name, spectrum in curvature.items()}
    flat = [] if absolute is not None else [name for name, mean in means.items() if mean == 0]
    if flat and len(flat) < len(means):
        others = [name for name in means if name not in flat]
        every = torch.cat([curvature[name].eigenvalues.flatten() for name in others])
        means |= dict.fromkeys(flat, every.mean())
    damped: dict[str, Spectrum] = {}
    for name, spectrum in curvature.items():
        damping = relative_damping(settings) * means[name] if absolute is None else absolute
        damped[name] = spectrum.shifted(added[name] + damping)
        if bool((damped[name].eigenvalues > 0).all()):
            continue
        if absolute is None and means[name] == 0:
            raise ValueError(
                "The training loss has no curvature in any layer, and relative_damping is relative "
                "to it, so that there is no inverse. Give damping (an absolute number), or take "
                "Source, which inverts nothing."
            )
        raise ValueError(
            f"The curvature of {name} is singular and damping is 0: the inverse does not exist. "
            "Give a positive damping."
        )
    notes = [_FLAT.format(names=", ".join(flat))] if flat else []
    return damped, notes


_FLAT = (
    "The training loss has no curvature in {names}: damping there is relative to the mean "
    "eigenvalue of the other layers."
)


class EigenbasisInverse:
    """Curvature of the last checkpoint in an eigenbasis, inverted eigenvalue by eigenvalue."""

    knows_own = True

    def __init__(self, settings: InverseSettings, session: Session) -> None:
        self.settings, self.session, self.kind = settings, session, settings.curvature
        decay = decay_by_unit(session, self.kind)
        self.damped, self._notes = damped_curvature(settings, session, decay)
        dense = self.kind == "exact"
        self.query_bytes = (session.gradient_bytes if dense else session.factored_bytes)(copies=2)

    def responses(self, first: int, last: int, meetings: int) -> dict[str, Response]:
        """See :class:`~tda_lightning.estimators.inverse.Inverse`."""
        self.session.load(self.session.trajectory.last_step)
        coordinates = query_coordinates(self.session, self.kind, first, last, self.damped)
        responses = {}
        for name, values in coordinates.items():
            damped = self.damped[name]
            if isinstance(values, Rows):
                divided = values.with_values(values.values / damped.eigenvalues[0, values.index])
                responses[name] = Response(divided, damped, meetings)
            else:
                responses[name] = Response(values.div_(damped.eigenvalues), damped, meetings)
        return responses

    def own(self, measured: Mapping[str, Gradient], trained: Mapping[str, Gradient]) -> Tensor:
        """See :class:`~tda_lightning.estimators.inverse.Inverse`."""
        train_units = units(self.kind, trained)
        # The same objects tell that the two gradients are one.
        measured_units = train_units if measured is trained else units(self.kind, measured)
        parts = [
            paired(measured_units[name], gradient, spectrum, 1 / spectrum.eigenvalues)
            for name, gradient in train_units.items()
            for spectrum in [self.damped[name]]
        ]
        return torch.stack(parts).sum(0)

    def provenance(self) -> Provenance:
        """See :class:`~tda_lightning.estimators.inverse.Inverse`."""
        settings, trajectory = self.settings, self.session.trajectory
        spans = [last_interval(trajectory)]
        return {
            "damping": damping_record(settings, trajectory, "the layer's mean eigenvalue"),
            **statistics_provenance(settings.statistics, settings.curvature, trajectory, spans),
            "notes": self._notes,
        }
