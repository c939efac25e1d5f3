"""Several stages of training: exact unrolling through all of them, and SOURCE with dense matrices.

A parameter of a later stage is that of the one before where name and shape agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tda_lightning.records.trajectory import Segment, Trajectory
from tests.oracles.curvature import gauss_newton
from tests.oracles.draws import drawn_weights
from tests.oracles.estimators import effective_rates, preconditioner, spread
from tests.oracles.gradients import (
    Batch,
    Criterion,
    Loss,
    flatten,
    loss_of,
    num_examples,
    per_example_gradients,
    take,
    with_state,
)
from tests.oracles.unrolling import UPDATES, _call


@dataclass(frozen=True)
class TrainedStage:
    """What one stage was trained with."""

    trajectory: Trajectory
    module: nn.Module
    criterion: Criterion
    data: Batch

    @property
    def loss(self) -> Loss:
        return loss_of(self.criterion)

    @property
    def trained(self) -> list[str]:
        return list(self.trajectory.facts.parameters)


def _at(stage: TrainedStage, step: int) -> nn.Module:
    """The module at a checkpoint; frozen parameters have gradients too."""
    return with_state(stage.module, stage.trajectory.checkpoints[step]).requires_grad_()


def frozen_names(stages: Sequence[TrainedStage], number: int) -> list[str]:
    """Parameters of stage ``number`` that an earlier one trained and this one does not."""
    own = dict(stages[number].module.named_parameters())
    alive: list[str] = []
    for earlier, later in zip(stages[:number], stages[1 : number + 1], strict=True):
        theirs = dict(earlier.module.named_parameters())
        next_ones = dict(later.module.named_parameters())
        alive = [*alive, *(name for name in earlier.trained if name not in alive)]
        alive = [
            name
            for name in alive
            if name in next_ones and next_ones[name].shape == theirs[name].shape
        ]
    return [name for name in alive if name in own and name not in stages[number].trained]


def replay_stages(stages: Sequence[TrainedStage], weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """All parameters at the end as a differentiable function of every stage's weights [train]."""
    values: dict[str, Tensor] = {}
    for stage, own in zip(stages, weights, strict=True):
        values = _replay(stage, own, values)
    return values


def _replay(stage: TrainedStage, weights: Tensor, before: dict[str, Tensor]) -> dict[str, Tensor]:
    steps, facts = stage.trajectory.steps, stage.trajectory.facts
    module = with_state(stage.module, stage.trajectory.checkpoints[0])
    values = {name: p.detach() for name, p in module.named_parameters()}
    for name, tensor in before.items():
        if name in values and values[name].shape == tensor.shape:
            values[name] = tensor
    # Leaves of this stage: others' earlier steps depend on what was frozen then.
    for name in facts.parameters:
        values[name] = values[name].clone().requires_grad_()
    state: dict[str, dict[str, Tensor]] = {name: {} for name in facts.parameters}
    for row in range(len(steps)):
        total = torch.zeros(())
        for indices in steps.batches(row):
            losses = _call(module, stage.loss, values, take(stage.data, indices))
            part = (weights[indices] * losses).sum() / len(indices)
            total = total + part / int(steps.accumulation[row])
        names = list(facts.parameters)
        gradients = torch.autograd.grad(total, [values[n] for n in names], create_graph=True)
        for name, gradient in zip(names, gradients, strict=True):
            group = facts.parameters[name].group
            hyper = {key: float(v[row, group]) for key, v in steps.hyperparameters.items()}
            rate = float(steps.learning_rate[row, group])
            update = UPDATES[facts.optimizer]
            values[name] = update(values[name], gradient, state[name], rate, hyper)
    return values


def unrolled_stages(
    stages: Sequence[TrainedStage], measurement: Loss, queries: Batch
) -> list[Tensor]:
    """-d m_q / d w_n at w = 1 through all stages, [query, train] for each."""
    weights = [
        torch.ones(num_examples(stage.data), dtype=torch.float64, requires_grad=True)
        for stage in stages
    ]
    values = replay_stages(stages, weights)
    last = with_state(stages[-1].module, stages[-1].trajectory.checkpoints[0])
    measured = _call(last, measurement, values, queries)
    rows = [
        torch.autograd.grad(m, weights, retain_graph=True, materialize_grads=True) for m in measured
    ]
    return [-torch.stack(column) for column in zip(*rows, strict=True)]


def measure_stages(
    stages: Sequence[TrainedStage],
    weights: Sequence[Tensor],
    measurement: Loss,
    queries: Batch,
) -> Tensor:
    """m_q after training all stages again with these weights, [query]."""
    values = replay_stages(stages, weights)
    last = with_state(stages[-1].module, stages[-1].trajectory.checkpoints[0])
    return _call(last, measurement, values, queries).detach()


def source_stages(
    stages: Sequence[TrainedStage],
    cuts: Callable[[Trajectory], Sequence[Segment]],
    measurement: Loss,
    queries: Batch,
    coupled: bool = True,
) -> list[Tensor]:
    r"""SOURCE through all stages, [segment, query, train] for each, with dense matrices.

    In a stage that trains T and keeps F, with :math:`M = \sum_t \eta_t (P H_{TT} + \Lambda)`,
    :math:`S = e^{-M}` and :math:`R = \int_0^1 e^{-Ms} ds \sum_t \eta_t P` over a segment,

    .. math::
        s = \frac1N q_T^T R g_n, \quad q_F \leftarrow q_F - H_{FT} R^T q_T, \quad
        q_T \leftarrow S^T q_T

    Args:
        coupled: False leaves the frozen block alone, which is wrong.
    """
    last = _at(stages[-1], stages[-1].trajectory.last_step)
    adjoint: dict[str, Tensor] = {}
    scores = []
    for number in reversed(range(len(stages))):
        stage = stages[number]
        names, frozen = stage.trained, frozen_names(stages, number)
        lookup = dict(stage.module.named_parameters())
        if number == len(stages) - 1:
            adjoint = per_example_gradients(last, measurement, queries, [*names, *frozen])
        else:
            later = dict(stages[number + 1].module.named_parameters())
            adjoint = {
                name: adjoint[name]
                if name in adjoint and later[name].shape == lookup[name].shape
                else torch.zeros(num_examples(queries), *lookup[name].shape, dtype=torch.float64)
                for name in [*names, *frozen]
            }
        own, adjoint = _source_stage(stage, cuts(stage.trajectory), adjoint, names, frozen, coupled)
        scores.append(own)
    return scores[::-1]


def _source_stage(
    stage: TrainedStage,
    segments: Sequence[Segment],
    adjoint: dict[str, Tensor],
    names: list[str],
    frozen: list[str],
    coupled: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    run = stage.trajectory
    rates = effective_rates(run)
    decay = spread(run, run.steps.hyperparameters["weight_decay"])
    trained = flatten(adjoint, names)
    others = flatten(adjoint, frozen) if frozen else None
    scores = []
    for segment in reversed(segments):
        states = [run.checkpoints[step] for step in segment.checkpoints]
        drawn = drawn_weights(run, segment.start, segment.stop, num_examples(stage.data))
        matrix = torch.stack(
            [
                gauss_newton(
                    _at(stage, step), stage.criterion, stage.data, [*names, *frozen], drawn
                )
                for step in segment.checkpoints
            ]
        ).mean(0)
        size = trained.shape[1]
        scale = preconditioner(run, states)
        moved, decayed = rates[segment.rows].sum(0), (rates * decay)[segment.rows].sum(0)
        if run.facts.optimizer != "AdamW":
            decayed = scale * decayed
        exponent = (moved * scale)[:, None] * matrix[:size, :size] + torch.diag(decayed)
        augmented = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
        augmented[:size, :size] = -exponent
        augmented[:size, size:] = torch.eye(size)
        both = torch.linalg.matrix_exp(augmented)
        response = both[:size, size:] * (moved * scale)
        gradients = torch.stack(
            [
                flatten(
                    per_example_gradients(_at(stage, step), stage.loss, stage.data, names), names
                )
                for step in segment.checkpoints
            ]
        ).mean(0)
        taken = trained @ response
        scores.append(taken @ gradients.T * drawn / len(gradients))
        if others is not None and coupled:
            others = others - taken @ matrix[:size, size:]
        trained = trained @ both[:size, :size]
    out, lookup = {}, dict(stage.module.named_parameters())
    for flat, group in ((trained, names), (others, frozen)):
        if flat is None:
            continue
        parts = flat.split([lookup[name].numel() for name in group], dim=1)
        for name, part in zip(group, parts, strict=True):
            out[name] = part.unflatten(1, lookup[name].shape)
    return torch.stack(scores[::-1]), out
