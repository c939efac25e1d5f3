"""One of several consecutive stages of training."""

from __future__ import annotations

from dataclasses import dataclass

from tda_lightning.session.session import Session


@dataclass(frozen=True)
class Stage:
    """One of several consecutive stages of training: another loss, data, head or set of trained
    parameters. It begins with the weights that the stage before it ended with.

    Attributes:
        session: of the parameters that the stage trains. Its ``queries`` are those of the final
            model.
        wide: of those and the frozen ones; ``session`` itself where none is frozen.
        frozen: parameters that an earlier stage trained and this one only uses.
        carried: parameters of ``wide`` whose values come from the stage before.
        run: position of the recorded run; one run has several stages where the set of trained
            parameters changed in it, and they share its columns.
        columns: of the stage's training set among those of the scores.
        first_step: steps of all stages before it.
    """

    session: Session
    wide: Session
    frozen: tuple[str, ...]
    carried: tuple[str, ...]
    run: int
    columns: range
    first_step: int
