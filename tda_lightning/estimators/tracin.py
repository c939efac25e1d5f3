"""TracIn (Pruthi et al. 2020, 2002.08484): gradients compared at the recorded checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tda_lightning.estimators.clipping import clipping_notes
from tda_lightning.estimators.pairs import paired
from tda_lightning.estimators.queries import query_rounds
from tda_lightning.gradients import Gradient, Outer, scaled
from tda_lightning.session.passes import NO_SELF, Context, Pass, Plan, Stage, numbered


@dataclass
class TracIn:
    r"""What each use of an example did to the query's measurement, forgetting left out.

    .. math::
        s_{qn} = \frac1N \sum_c w_c\, \nabla m_q(\theta_c)^\top \nabla l_n(\theta_c)

    Each checkpoint c stands for the steps since the one before it; :math:`w_c` sums their applied
    rates (with momentum, times (1 - dampening) / (1 - momentum)), group by group. The paper
    writes :math:`\eta_c` for :math:`w_c / N`: the same ranking when checkpoints are evenly spaced.

    References:
        | Estimating Training Data Influence by Tracing Gradient Descent (Pruthi et al., 2020),
          section 3
        | https://arxiv.org/abs/2002.08484
    """

    def segment_count(self, context: Context) -> int:
        """One segment for each checkpoint after the initial weights."""
        return len(_steps(context))

    def plan(self, context: Context) -> Plan:
        """One pass for each checkpoint."""
        optimizer = context.trajectory.require_optimizer()
        # Adam's step hardly depends on the gradient's scale, and TracIn leaves its metric out.
        neglected = None if optimizer == "SGD" else "Adam makes good for the length of gradients"
        steps = _steps(context)
        starts = [0, *steps[:-1]]
        run = _Run(context)
        passes = []
        for number, (start, step) in enumerate(zip(starts, steps, strict=True)):
            weights = _weights(context, start, step)
            for first, last in query_rounds(context, copies=1):
                with_self = context.self_influence and first == 0
                passes.append(
                    Pass(
                        f"TracIn, step {step}",
                        step,
                        run.score(number, first, weights, with_self),
                        run.prepare(first, last, weights),
                        run.finish if with_self and number == len(steps) - 1 else None,
                    )
                )
        segments = [[a, b] for a, b in zip(starts, steps, strict=True)]
        notes = clipping_notes(context.trajectory, neglected)
        return Plan(passes, {"checkpoints": steps, "segments": segments}, notes)

    def stage_segment_counts(self, stages: Sequence[Stage]) -> list[int]:
        """Checkpoints of each stage."""
        return [self.segment_count(stage.context) for stage in stages]

    def plan_stages(self, stages: Sequence[Stage]) -> Plan:
        """Every stage's own sum, the queries measured at its own checkpoints.

        Raises:
            ValueError: the stages differ in model or task, so that an earlier one cannot be asked
                for the final model's measurement.
        """
        _require_one_measurement(stages)
        plan = Plan([], {"checkpoints": [], "segments": []}, [NO_SELF])
        for number, stage in enumerate(stages):
            own = self.plan(stage.context)
            plan.passes += numbered(own.passes, number)
            plan.notes += [f"Stage {number + 1}: {note}" for note in own.notes]
            at = stage.first_step
            plan.provenance["checkpoints"] += [at + c for c in own.provenance["checkpoints"]]
            plan.provenance["segments"] += [
                [at + start, at + stop] for start, stop in own.provenance["segments"]
            ]
        return plan


def _require_one_measurement(stages: Sequence[Stage]) -> None:
    last = stages[-1].context
    shapes = {name: p.shape for name, p in last.module.named_parameters()}
    for number, stage in enumerate(stages, start=1):
        own = {name: p.shape for name, p in stage.context.module.named_parameters()}
        if own != shapes or stage.context.task.settings() != last.task.settings():
            raise ValueError(
                f"TracIn measures the queries at the checkpoints of every stage, and stage "
                f"{number} has another model or task than the last one. Use Source, which asks "
                "the final model alone."
            )


def _steps(context: Context) -> list[int]:
    return [step for step in sorted(context.trajectory.checkpoints) if step > 0]


def _weights(context: Context, start: int, stop: int) -> dict[str, Tensor]:
    """w_c of every parameter, by block: [groups, rows, columns]."""
    trajectory = context.trajectory
    sums = trajectory.applied_rates(slice(start, stop)).sum(0)
    filled = {
        name: torch.full(fact.shape, float(sums[fact.group]), dtype=context.dtype)
        for name, fact in trajectory.facts.parameters.items()
    }
    return {block.name: block.matrix(filled).to(context.device) for block in context.blocks}


class _Run:
    def __init__(self, context: Context):
        self.context = context
        self.queries: dict[str, list[Gradient]] = {}
        self.dense: dict[str, Tensor] = {}
        self.self_influence: Tensor | None = None

    def prepare(self, first: int, last: int, weights: dict[str, Tensor]) -> Any:
        def begin() -> None:
            self.queries, self.dense = {}, {}
            for batch, examples in self.context.queries(first, last):
                found = self.context.measurement_gradients(batch, examples)
                for name, gradient in found.blocks.items():
                    weighted = scaled(gradient, weights[name])
                    self.queries.setdefault(name, []).append(weighted)

        return begin

    def score(
        self, number: int, first_query: int, weights: dict[str, Tensor], with_self: bool
    ) -> Any:
        def accumulate(batch: Any, examples: Tensor, _: int) -> None:
            context = self.context
            found = context.train_gradients(batch, examples).blocks
            products = [self._product(name, gradient) for name, gradient in found.items()]
            values = torch.stack(products).sum(0) / context.num_train
            context.sink.add(number, examples, values, first_query)
            if with_self:
                self._add_self(batch, examples, found, weights)

        return accumulate

    def _product(self, name: str, gradient: Gradient) -> Tensor:
        """Inner products of all queries with a batch, by the cheaper exact way: [query, batch]."""
        queries = self.queries[name]
        if isinstance(gradient, Outer) and all(
            isinstance(query, Outer) and gradient.gram_is_cheaper(query) for query in queries
        ):
            return torch.cat([gradient.gram(query) for query in queries])  # type: ignore[arg-type]
        if name not in self.dense:
            self.dense[name] = torch.cat([query.dense(slice(None)) for query in queries])
        return gradient.dot(self.dense[name])

    def _add_self(
        self,
        batch: Any,
        examples: Tensor,
        found: dict[str, Gradient],
        weights: dict[str, Tensor],
    ) -> None:
        context = self.context
        measured = found
        if not context.task.measures_loss:
            measured = context.measurement_gradients(batch, examples).blocks
        if self.self_influence is None:
            self.self_influence = torch.zeros(
                context.num_train, dtype=context.dtype, device=context.device
            )
        for name, gradient in found.items():
            own = paired(measured[name], gradient, None, weights[name])
            self.self_influence[examples] += own / context.num_train

    def finish(self) -> None:
        assert self.self_influence is not None
        self.context.sink.set_self_influence(self.context.reduce(self.self_influence).cpu())
