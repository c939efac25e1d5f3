"""The metric of a segment: how its optimizer turns a gradient into a step.

The update is theta -= eta P (g + decay). With h = P^(1/2), everything is symmetric in the
coordinates theta / h: gradients become h * g, curvature h H h, and SOURCE's formulas hold as for
plain gradient descent (docs/methods.md, "SOURCE for Adam").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tda_lightning.curvature import unit_matrices
from tda_lightning.optimizers import applied_rates, rule_of, segment_metric, weight_decay
from tda_lightning.records.trajectory import Segment
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
    rule = rule_of(trajectory)
    rates = applied_rates(trajectory, segment.rows)
    clipping = trajectory.clipping_factors(segment.rows)
    if not rule.linear:
        # The metric is that of clipped gradients, so the gradients must be clipped too.
        rates = rates * clipping
    times = rates.sum(0)
    time = float(times.max())
    ratios = times / time if time > 0 else torch.ones_like(times)
    raw = trajectory.steps.learning_rate[segment.rows]
    decays = weight_decay(trajectory, segment.rows)
    # Decay is not clipped: against gradients that are, it weighs more.
    total = (raw * clipping).sum(0)
    decay_of_group = torch.where(total > 0, (raw * decays).sum(0) / total.clamp(min=1e-300), 0.0)
    step_metric = segment_metric(trajectory, segment)
    metric, decay, still = {}, {}, {}
    for name, fact in trajectory.facts.parameters.items():
        if name not in context.engine.names:
            continue
        ratio, rate = float(ratios[fact.group]), float(decay_of_group[fact.group])
        ones = torch.ones(fact.shape, dtype=torch.float64)
        metric[name] = ratio * step_metric.get(name, ones)
        # Decoupled decay acts on the parameters themselves, coupled decay passes through P.
        decay[name] = ratio * rate * ones if rule.decoupled else rate * metric[name]
        still[name] = ratio * rate * ones if rule.decoupled else torch.zeros_like(ones)
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
