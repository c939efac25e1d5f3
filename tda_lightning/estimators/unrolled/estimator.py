"""Exact unrolling: differentiate the recorded run (Hara et al. 2019; Engstrom et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tda_lightning.estimators.unrolled.run import UnrolledRun
from tda_lightning.records.provenance import Provenance
from tda_lightning.session.passes import Plan, Session, run_plan

STATES = ("auto", "memory", "disk", "recompute")


@dataclass
class Unrolled:
    r"""The derivative of the very run: same seed, same batches, example n's loss weighted by w_n.

    .. math::
        s_{qn} = -\frac{\partial m_q(\theta_T)}{\partial w_n}\Big|_{w = 1}

    The recorded intervals are replayed from their checkpoints with the recorded batches, rates and
    random states, and the adjoint of each query runs backwards through the optimizer's steps with
    the Hessian of every step's loss. Nothing is approximated; the question is a local one all the
    same. A batch keeps its denominator (:func:`~tda_lightning.evaluation.as_removal` for true
    removal), and in a rough run a small weight change predicts no removal: ``tda check`` tells.
    What a training step detaches counts as a constant, also where its value came from the weights.

    Every replay is compared with the recorded checkpoints (``provenance["certificate"]``).

    Attributes:
        last_steps: count only what the last so many steps did with an example: cheaper, and
            truncated; None for the whole run.
        relabel: ``{index: label}``: the scores of these training examples predict what their other
            label would have done, instead of their removal. The effect of a group, removed or
            relabelled together, is the sum of its columns (:meth:`~tda_lightning.Scores.by_group`).
        token_weights: also score each term of an example's loss, the tokens of a sequence
            (``scores.by_token``).
        memory_budget: bytes for adjoints and states of steps; None for half of what the machine
            has free. The result does not depend on it.
        states: where the states between two checkpoints are kept: in ``memory``, whatever they
            take; on ``disk``, in a temporary file; ``recompute``: few in memory, the others by
            replaying again. ``auto``: all in memory where they fit, else as many as do.
        tolerance: how far a replay may land from a recorded checkpoint, relative to how far the
            weights moved since the one before.

    Raises:
        ValueError: at once for impossible settings; when planning, for too small a budget.
        UnsupportedTrainingError: when planning, for what has no formula here: an optimizer whose
            rule has no adjoint, mixed precision, several stages, no recorded batches, ...
        TrajectoryMismatchError: the replay does not land on the recorded checkpoints.

    References:
        | Data Cleansing for Models Trained with SGD (Hara et al., 2019), section 3
        | https://arxiv.org/abs/1906.08473
        | Optimizing ML Training with Metagradient Descent (Engstrom et al., 2025), section 2
        | https://arxiv.org/abs/2503.13751
        | MAGIC: Near-Optimal Data Attribution for Deep Learning (Ilyas & Engstrom, 2025)
        | https://arxiv.org/abs/2504.16430

    Example:
        Two directions of curvature 2 and 1/2, ten steps at rate 0.1: a score is 3 g / 4 times
        (1 - 0.8^10) / 2 or (1 - 0.95^10) / (1/2), the sum of what is left of each step.

        >>> from tda_lightning.examples.least_squares import least_squares_scores
        >>> least_squares_scores(Unrolled())
        tensor([-0.6695,  0.6695, -0.6019,  0.6019])
    """

    last_steps: int | None = None
    relabel: Mapping[int, Any] | None = None
    token_weights: bool = False
    memory_budget: int | None = None
    states: str = "auto"
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.last_steps is not None and self.last_steps < 1:
            raise ValueError(f"last_steps must be at least 1 or None, got {self.last_steps}.")
        if self.memory_budget is not None and self.memory_budget < 1:
            raise ValueError(
                f"memory_budget must be a positive number of bytes, got {self.memory_budget}."
            )
        if self.states not in STATES:
            raise ValueError(f"states must be one of {', '.join(STATES)}, got {self.states!r}.")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must not be negative, got {self.tolerance}.")
        for index in self.relabel or ():
            if not isinstance(index, int):
                raise ValueError(f"relabel names training examples by index, got {index!r}.")
        if self.relabel is not None:
            self.relabel = {index: _plain(label) for index, label in self.relabel.items()}
        if self.relabel and self.token_weights:
            raise ValueError(
                "relabel changes an example's whole label, and token_weights splits its score by "
                "the old label's terms: ask for one of them at a time."
            )

    def segment_count(self, context: Session) -> int:
        """One segment for each recorded interval between checkpoints."""
        return len(context.trajectory.checkpoints) - 1

    def score(self, session: Session) -> Provenance:
        """Run :meth:`plan`."""
        return run_plan(self.plan(session), [session])

    def plan(self, context: Session) -> Plan:
        """For every interval, last one first: a replay forwards, and the way back."""
        return UnrolledRun(self, context).plan()


def _plain(label: Any) -> Any:
    """A label as numbers and lists: settings are written down with the scores."""
    return label.tolist() if hasattr(label, "tolist") else label
