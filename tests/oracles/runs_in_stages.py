"""Exact unrolling of one recorded run whose trained parameters change, and whose optimizer may be
replaced by a new one: one loop over its rows, which knows nothing of stages as runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tda_lightning.records.trajectory import Trajectory
from tests.oracles.gradients import Batch, Loss, num_examples, take, with_state
from tests.oracles.unrolling import UPDATES, _call


def replay_run(
    trajectory: Trajectory, module: nn.Module, loss: Loss, data: Batch, weights: Tensor
) -> dict[str, Tensor]:
    """All parameters at the end as a differentiable function of the weights [steps, train]."""
    steps, facts = trajectory.steps, trajectory.facts
    module = with_state(module, trajectory.checkpoints[0])
    values = {name: p.detach().clone() for name, p in module.named_parameters()}
    stages = {stage.start: stage for stage in facts.stages}
    state: dict[str, dict[str, Tensor]] = {name: {} for name in values}
    names: tuple[str, ...] = ()
    update = UPDATES[facts.optimizer]
    for row in range(len(steps)):
        if row in stages:
            names = stages[row].parameters
            if stages[row].new_optimizer:
                state = {name: {} for name in values}
        # Leaves of this step: others' earlier steps depend on what was frozen then.
        for name in names:
            values[name] = values[name].clone().requires_grad_()
        total = torch.zeros(())
        for indices in steps.batches(row):
            losses = _call(module, loss, values, take(data, indices))
            part = (weights[row, indices] * losses).sum() / len(indices)
            total = total + part / int(steps.accumulation[row])
        gradients = torch.autograd.grad(total, [values[n] for n in names], create_graph=True)
        for name, gradient in zip(names, gradients, strict=True):
            group = facts.parameters[name].group
            hyper = {key: float(v[row, group]) for key, v in steps.hyperparameters.items()}
            rate = float(steps.learning_rate[row, group])
            values[name] = update(values[name], gradient, state[name], rate, hyper)
    if bool((weights == 1).all()):
        for name, value in trajectory.checkpoints[trajectory.last_step].parameters.items():
            torch.testing.assert_close(values[name].detach(), value)  # it is that run
    return values


def unrolled_run(
    trajectory: Trajectory,
    module: nn.Module,
    loss: Loss,
    data: Batch,
    queries: Batch,
    since: int = 0,
    at: Tensor | None = None,
) -> Tensor:
    """-d m_q / d w_n at w = 1 or ``at`` [train], [query, train], of the uses of n in rows from
    ``since`` on."""
    own = torch.ones(num_examples(data), dtype=torch.float64) if at is None else at
    weights = own.repeat(len(trajectory.steps), 1).requires_grad_()
    values = replay_run(trajectory, module, loss, data, weights)
    module = with_state(module, trajectory.checkpoints[0])
    measured = _call(module, loss, values, queries)
    rows = [torch.autograd.grad(m, weights, retain_graph=True)[0][since:].sum(0) for m in measured]
    return -torch.stack(rows)
