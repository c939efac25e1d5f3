"""What is said of the random numbers that losses draw."""

from __future__ import annotations

from tda_lightning.session.session import Session


def noise_notes(session: Session) -> list[str]:
    """What a reader of the scores should know of the noise that losses draw."""
    notes = []
    mean = f"over {session.draws} seeded draw{'s' * (session.draws > 1)} for each"
    if session.noise and session.recorded_draws:
        notes.append(
            "The training loss draws random numbers: its gradients are those of the run's own "
            "draws, from the recorded random states."
        )
    elif session.noise:
        note = (
            f"The training loss draws random numbers: it is the mean {mean} example "
            "(draws=; more lessen the noise)."
        )
        if session.noise - {"example", "partners"}:
            note += (
                " Some are drawn for a whole batch, or for places in it: a draw has the same "
                "values of them in every batch, so that their mean takes several."
            )
        if session.no_recorded_draws is not None:
            note += f" The run's own draws cannot be had: {session.no_recorded_draws}."
        if "partners" in session.noise:
            note += (
                " An example is mixed with another of its batch: its loss is that of its row "
                "in a batch of the attribution."
            )
        notes.append(note)
    if session.measured_noise:
        notes.append(f"The measurement draws random numbers: it is the mean {mean} query.")
    return notes
