"""The metric of a segment: how its optimizer turns a gradient into a step.

The update is theta -= eta P (g + decay). With h = P^(1/2), everything is symmetric in the
coordinates theta / h: gradients become h * g, curvature h H h, and SOURCE's formulas hold as for
plain gradient descent (METHODS.md, "SOURCE").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.curvature import unit_matrices
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Segment, Trajectory
from tda_lightning.session.passes import Session


@dataclass(frozen=True)
class Geometry:
    """One segment's step, by unit of curvature.

    Attributes:
        time: sum of the reference group's applied rates over the segment, eta K.
        scale: h [groups, rows, columns]; units with h = 1 are missing.
        decay: what weight decay adds to h H h, on the parameters' diagonal.
        still: decay rate times time of coordinates that P does not move (h = 0); they keep their
            query but for decoupled decay.
    """

    time: float
    scale: dict[str, Tensor]
    decay: dict[str, Tensor]
    still: dict[str, Tensor]

    def enter(self, name: str, query: Tensor) -> Tensor:
        """A query's coordinates: h q."""
        return query * self.scale[name] if name in self.scale else query

    def leave(self, name: str, carried: Tensor, before: Tensor) -> Tensor:
        """Back to the parameters: q / h; where h = 0, the query as it was before the segment."""
        if name not in self.scale:
            return carried
        scale = self.scale[name]
        unmoved = before * torch.exp(-self.time * self.still[name])
        return torch.where(scale > 0, carried / scale.clamp(min=1e-30), unmoved)


def segment_geometry(context: Session, segment: Segment, kind: str) -> Geometry:
    """The metric of ``segment`` for curvature of the given kind."""
    trajectory = context.trajectory
    optimizer = trajectory.require_optimizer()
    rates = trajectory.applied_rates(segment.rows)
    clipping = trajectory.clipping_factors(segment.rows)
    if optimizer != "SGD":
        # Adam's moments are those of clipped gradients, so the gradients must be clipped too.
        rates = rates * clipping
    times = rates.sum(0)
    time = float(times.max())
    ratios = times / time if time > 0 else torch.ones_like(times)
    raw = trajectory.steps.learning_rate[segment.rows]
    decays = trajectory.steps.hyperparameters["weight_decay"][segment.rows]
    # Decay is not clipped: against gradients that are, it weighs more.
    total = (raw * clipping).sum(0)
    decay_of_group = torch.where(total > 0, (raw * decays).sum(0) / total.clamp(min=1e-300), 0.0)
    inverse_roots = _adam_metric(trajectory, segment) if optimizer != "SGD" else {}
    metric, decay, still = {}, {}, {}
    for name, fact in trajectory.facts.parameters.items():
        if name not in context.engine.names:
            continue
        ratio, rate = float(ratios[fact.group]), float(decay_of_group[fact.group])
        ones = torch.ones(fact.shape, dtype=torch.float64)
        metric[name] = ratio * inverse_roots.get(name, ones)
        # Decoupled decay acts on the parameters themselves, coupled decay passes through P.
        decoupled = optimizer == "AdamW"
        decay[name] = ratio * rate * ones if decoupled else rate * metric[name]
        still[name] = ratio * rate * ones if decoupled else torch.zeros_like(ones)
    by_unit = {
        what: unit_matrices(kind, {b.name: b.matrix(values) for b in context.blocks})
        for what, values in (("metric", metric), ("decay", decay), ("still", still))
    }

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(context.device, context.dtype)

    return Geometry(
        time,
        {n: placed(m.sqrt()) for n, m in by_unit["metric"].items() if not bool((m == 1).all())},
        {name: placed(m) for name, m in by_unit["decay"].items()},
        {name: placed(m) for name, m in by_unit["still"].items()},
    )


def _adam_metric(trajectory: Trajectory, segment: Segment) -> dict[str, Tensor]:
    """Mean over the segment's checkpoints of 1 / (sqrt(v_hat) + eps); 0 where v = 0.

    A coordinate whose second moment is zero has never had a gradient and never moved.
    """
    hyper = trajectory.steps.hyperparameters
    sums: dict[str, Tensor] = {}
    for step in segment.checkpoints:
        states = trajectory.checkpoints[step].optimizer
        if states is None:
            raise UnsupportedTrainingError(
                f"The checkpoint at step {step} has no optimizer state, and Adam's second moments "
                "are part of the formula. Record with save_optimizer=True."
            )
        for name, fact in trajectory.facts.parameters.items():
            beta = float(hyper["beta2"][step - 1, fact.group])
            eps = float(hyper["eps"][step - 1, fact.group])
            if "exp_avg_sq" not in states.get(name, {}):
                # Never received a gradient: Adam keeps no state and does not move it.
                inverse = torch.zeros(fact.shape, dtype=torch.float64)
            else:
                second = states[name]["exp_avg_sq"].double()
                taken = float(states[name]["step"])
                corrected = second / (1 - beta**taken)
                inverse = torch.where(second > 0, 1 / (corrected.sqrt() + eps), 0.0)
            sums[name] = sums[name] + inverse if name in sums else inverse
    return {name: total / len(segment.checkpoints) for name, total in sums.items()}
