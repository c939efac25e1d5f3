"""A recorded run as one differentiable function: autograd through every step, in any mode.

More than ``unrolling`` does: train mode with the recorded draws, batch normalisation whose running
statistics keep their graph into the measurement, parameters that some steps do not use, and weights
on whatever an objective multiplies by them. It is slow: the graph of the whole run is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.random_states import restore_states, unchanged_randomness
from tests.oracles.gradients import Batch, Loss, take, with_state
from tests.oracles.unrolling import UPDATES, _call

# The loss of a batch as trained, a scalar: (module, batch, its examples, row of the step).
Objective = Callable[[nn.Module, Batch, Tensor, int], Tensor]
Weights = Callable[[int], Tensor]


def weighted(
    losses: Loss, weights: Weights, added: Callable[[nn.Module], Tensor] | None = None
) -> Objective:
    """The mean over a batch of its examples' losses, each multiplied by its weight.

    Args:
        losses: [batch], or with the parts of an example's loss that have weights of their own
            [batch, part].
        weights: of all training examples in the step of a row, [train] or [train, part].
        added: what the loss has besides, which belongs to no example.
    """

    def objective(module: nn.Module, batch: Batch, examples: Tensor, row: int) -> Tensor:
        total = (weights(row)[examples] * losses(module, batch)).sum() / len(examples)
        return total if added is None else total + added(module)

    return objective


class RunningNorm(nn.Module):
    """Batch normalisation whose running statistics are functions of all that went before."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.eps, self.momentum, self.count = norm.eps, norm.momentum, 0
        if norm.num_batches_tracked is not None:
            self.count = int(norm.num_batches_tracked)
        self.mean, self.variance = norm.running_mean, norm.running_var
        self.tracks = norm.track_running_stats

    def forward(self, inputs: Tensor) -> Tensor:
        axes = [axis for axis in range(inputs.dim()) if axis != 1]
        mean, variance = self.mean, self.variance
        if self.training or not self.tracks:
            mean, variance = inputs.mean(axes), inputs.var(axes, unbiased=False)
        if self.training and self.tracks:
            self.count += 1
            rate = 1 / self.count if self.momentum is None else self.momentum
            self.mean = (1 - rate) * self.mean + rate * mean
            self.variance = (1 - rate) * self.variance + rate * inputs.var(axes, unbiased=True)
        shape = [-1 if axis == 1 else 1 for axis in range(inputs.dim())]
        outputs = (inputs - mean.view(shape)) / (variance.view(shape) + self.eps).sqrt()
        if self.weight is None:
            return outputs
        return outputs * self.weight.view(shape) + self.bias.view(shape)


def with_running_norms(module: nn.Module) -> nn.Module:
    """The module with its batch normalisation replaced."""
    for name, part in list(module.named_children()):
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, RunningNorm(part).train(part.training))
        else:
            with_running_norms(part)
    return module


class Retraced:
    """The end of a run, as a function of whatever the objective depended on."""

    def __init__(self, module: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.module, self.parameters = module.eval(), parameters

    def measure(self, measurement: Loss, queries: Batch) -> Tensor:
        """m_q in eval mode, [query]."""
        with sdpa_kernel(SDPBackend.MATH):
            return _call(self.module, measurement, self.parameters, queries)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and running statistics by the names of the module's own tensors."""
        found = dict(self.parameters)
        for name, part in self.module.named_modules():
            if isinstance(part, RunningNorm) and part.tracks:
                found |= {f"{name}.running_mean": part.mean, f"{name}.running_var": part.variance}
        return {name: tensor.detach() for name, tensor in found.items()}


def retrace(
    run: Trajectory,
    module: nn.Module,
    objective: Objective,
    data: Batch | Callable[[Tensor], Batch],
    before: Retraced | None = None,
) -> Retraced:
    """Train as recorded, every step a differentiable function of the one before.

    Modes and clipping are those of ``run.facts.settings``; where the states of the random
    generators were recorded, batches are fetched and forward passes run under them.

    Args:
        data: all examples as tensors, or what fetches the batch of some.
        before: the stage before this one, whose tensors of the same name and shape it took over.
    """
    fetch = data if callable(data) else lambda examples: take(data, examples)
    steps, facts, first = run.steps, run.facts, run.checkpoints[0]
    module = with_state(module, first).train()
    for name, part in module.named_modules():
        if name in facts.settings.get("eval_modules", ()):
            part.training = False
    module = with_running_norms(module)
    parameters = {n: first.parameters[n].clone().requires_grad_() for n in facts.parameters}
    used_only: dict[str, Tensor] = {}
    if before is not None:
        used_only = _taken_over(before, module, parameters)
    state: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    # The fused kernels of attention can be differentiated only once.
    with unchanged_randomness(), sdpa_kernel(SDPBackend.MATH):
        if first.random is not None:
            restore_states(first.random)
        for row in range(len(steps)):
            total: Any = 0
            position = int(steps.batch_offsets[row])
            for examples in steps.batches(row):
                if position in steps.random:
                    restore_states(steps.random[position])
                batch = fetch(examples)
                loss = _call(
                    module,
                    lambda m, b, e=examples, r=row: objective(m, b, e, r),
                    {**used_only, **parameters},
                    batch,
                )
                total = total + loss / int(steps.accumulation[row])
                position += 1
            gradients = torch.autograd.grad(
                total, list(parameters.values()), create_graph=True, allow_unused=True
            )
            used = {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}
            used = _clipped(used, facts.settings)
            for name, gradient in used.items():
                group = facts.parameters[name].group
                hyper = {key: float(v[row, group]) for key, v in steps.hyperparameters.items()}
                rate = float(steps.learning_rate[row, group])
                parameters[name] = UPDATES[facts.optimizer](
                    parameters[name], gradient, state[name], rate, hyper
                )
    return Retraced(module, {**used_only, **parameters})


def _taken_over(
    before: Retraced, module: nn.Module, parameters: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Put what a stage took over into its own parameters and running statistics; the frozen
    parameters among it."""
    own = dict(module.named_parameters())
    shared = {
        name: tensor
        for name, tensor in before.parameters.items()
        if name in own and own[name].shape == tensor.shape
    }
    for name in shared.keys() & parameters.keys():
        # Frozen parameters may depend on what this one was: only its own use has a gradient.
        parameters[name] = shared[name].clone()
    norms = dict(before.module.named_modules())
    for name, part in module.named_modules():
        left = norms.get(name)
        if isinstance(part, RunningNorm) and isinstance(left, RunningNorm):
            part.mean, part.variance = left.mean, left.variance
    return {name: tensor for name, tensor in shared.items() if name not in parameters}


def _clipped(gradients: dict[str, Tensor], settings: Any) -> dict[str, Tensor]:
    clip = settings.get("gradient_clip_val")
    if not clip:
        return gradients
    if settings.get("gradient_clip_algorithm", "norm") == "value":
        return {name: gradient.clamp(-clip, clip) for name, gradient in gradients.items()}
    norm = torch.cat([gradient.reshape(-1) for gradient in gradients.values()]).norm()
    factor = torch.clamp(clip / (norm + 1e-6), max=1.0)
    return {name: factor * gradient for name, gradient in gradients.items()}


def slopes(measured: Tensor, weights: Tensor) -> Tensor:
    """d m_q / d weights, [query, *weights.shape]."""
    rows = [torch.autograd.grad(m, weights, retain_graph=True)[0] for m in measured]
    return torch.stack(rows)


def removals(
    run: Trajectory,
    module: nn.Module,
    losses: Loss,
    data: Batch | Callable[[Tensor], Batch],
    measurement: Loss,
    queries: Batch,
    *,
    parts: int | None = None,
    added: Callable[[nn.Module], Tensor] | None = None,
    cuts: tuple[int, ...] | None = None,
) -> Tensor:
    """-d m_q / d w_n at w = 1 by the interval of steps that uses fell in, [interval, query, train].

    Args:
        parts: of an example's loss, each with a weight of its own: [..., train, part].
        cuts: steps that bound the intervals; the recorded checkpoints if None. Uses before the
            first have no weights.
    """
    bounds = sorted(run.checkpoints) if cuts is None else list(cuts)
    assert run.facts.num_examples is not None
    shape = [run.facts.num_examples, *([] if parts is None else [parts])]
    weights = torch.ones(len(bounds) - 1, *shape, dtype=torch.float64, requires_grad=True)

    def at(row: int) -> Tensor:
        for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if start <= row < stop:
                return weights[number]
        return torch.ones(shape, dtype=torch.float64)

    end = retrace(run, module, weighted(losses, at, added), data)
    return -slopes(end.measure(measurement, queries), weights).transpose(0, 1)


@dataclass(frozen=True)
class RetracedStage:
    """What a stage was trained with; its losses are [batch]."""

    run: Trajectory
    module: nn.Module
    losses: Loss
    data: Batch | Callable[[Tensor], Batch]


def removals_of_stages(
    stages: Sequence[RetracedStage], measurement: Loss, queries: Batch, at: float = 1.0
) -> list[Tensor]:
    """:func:`removals` by the intervals of every stage, [interval, query, train] for each, where
    all weights are ``at``."""
    weights, end = [], None
    for stage in stages:
        bounds = sorted(stage.run.checkpoints)
        shape = (len(bounds) - 1, stage.run.facts.num_examples or 0)
        own = torch.full(shape, at, dtype=torch.float64, requires_grad=True)
        weights.append(own)

        def of_row(row: int, bounds: list[int] = bounds, own: Tensor = own) -> Tensor:
            return own[sum(start <= row for start in bounds) - 1]

        end = retrace(stage.run, stage.module, weighted(stage.losses, of_row), stage.data, end)
    assert end is not None
    measured = end.measure(measurement, queries)
    rows = [
        torch.autograd.grad(m, weights, retain_graph=True, materialize_grads=True) for m in measured
    ]
    return [-torch.stack(own, 1) for own in zip(*rows, strict=True)]


def central_differences(
    measured: Callable[[Tensor], Tensor], point: Tensor, examples: list[int], width: float = 1e-5
) -> Tensor:
    """(m_q(w + h e_n) - m_q(w - h e_n)) / 2h for some examples, [query, example]."""
    columns = []
    for example in examples:
        ends = []
        for sign in (1, -1):
            moved = point.clone()
            moved[example] += sign * width
            ends.append(measured(moved))
        columns.append((ends[0] - ends[1]) / (2 * width))
    return torch.stack(columns, 1)


def finer_differences(
    measured: Callable[[Tensor], Tensor], point: Tensor, examples: list[int], width: float = 2e-5
) -> Tensor:
    """Central differences of two widths, so that their errors in h^2 cancel."""
    near, far = (central_differences(measured, point, examples, times * width) for times in (1, 2))
    return (4 * near - far) / 3
