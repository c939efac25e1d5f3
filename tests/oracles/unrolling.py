"""Exact unrolling and retraining: the recorded run replayed with weights on its examples.

The question is the single-run counterfactual: same initial weights, same batches, same rates, and
example n's loss multiplied by w_n while every batch keeps its denominator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning.records.trajectory import Trajectory
from tda_lightning.replay.expected_squares import signs
from tests.oracles.gradients import Batch, Loss, num_examples, take, with_state


class _WithLoss(nn.Module):
    """Lets ``functional_call`` swap the parameters that a loss of (module, batch) reads."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.module, batch)


def _call(module: nn.Module, loss: Loss, parameters: dict[str, Tensor], batch: Batch) -> Tensor:
    named = {f"module.{name}": tensor for name, tensor in parameters.items()}
    return torch.func.functional_call(_WithLoss(module, loss), named, (batch,))


def replay(
    trajectory: Trajectory,
    module: nn.Module,
    loss: Loss,
    data: Batch,
    weights: Tensor,
    *,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    recorded_clipping: bool = False,
    renormalise: bool = False,
    expected: bool = False,
) -> dict[str, Tensor]:
    """The trained parameters as a differentiable function of the weights [train].

    Args:
        recorded_clipping: multiply gradients by the recorded factors, as constants.
        renormalise: divide a batch by the sum of its weights: with a weight of 0 the example is
            truly removed. Otherwise every batch keeps its denominator.
        expected: add what random subsets would add to squared gradients, as a constant.
    """
    steps, facts = trajectory.steps, trajectory.facts
    module = with_state(module, trajectory.checkpoints[0])
    parameters = {
        name: trajectory.checkpoints[0].parameters[name].clone().requires_grad_()
        for name in facts.parameters
    }
    state: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for row in range(len(steps)):
        total = spread = torch.zeros(())  # spread: [square]
        for number, indices in enumerate(steps.batches(row)):
            losses = _call(module, loss, parameters, take(data, indices))
            own = weights[indices].detach()
            noise = (own * (1 - own)).sqrt() * signs(row, number, len(indices))
            spread = spread + noise @ losses / len(indices) / int(steps.accumulation[row])
            size = weights[indices].sum() if renormalise else len(indices)
            total = total + (weights[indices] * losses).sum() / size / int(steps.accumulation[row])
        extra = torch.autograd.grad(
            spread,
            list(parameters.values()),
            torch.eye(len(spread), dtype=spread.dtype),
            retain_graph=True,
            materialize_grads=True,
            is_grads_batched=True,
        )
        gradients = torch.autograd.grad(
            total,
            list(parameters.values()),
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        if recorded_clipping:
            gradients = tuple(gradient * float(steps.clipping[row]) for gradient in gradients)
        if clip_value is not None:
            gradients = tuple(gradient.clamp(-clip_value, clip_value) for gradient in gradients)
        if clip_norm is not None:
            norm = torch.cat([gradient.reshape(-1) for gradient in gradients]).norm()
            factor = torch.clamp(clip_norm / (norm + 1e-6), max=1.0)
            gradients = tuple(gradient * factor for gradient in gradients)
        for number, (name, parameter) in enumerate(list(parameters.items())):
            gradient = gradients[number]
            group = facts.parameters[name].group
            hyper = {key: float(v[row, group]) for key, v in steps.hyperparameters.items()}
            rate = float(steps.learning_rate[row, group])
            update = UPDATES[facts.optimizer]
            if expected:
                state[name]["extra"] = extra[number].square().mean(0)
            parameters[name] = update(parameter, gradient, state[name], rate, hyper)
    return parameters


def _sgd(parameter: Tensor, gradient: Tensor, state: dict, rate: float, hyper: dict) -> Tensor:
    gradient = gradient + hyper["weight_decay"] * parameter
    momentum = hyper["momentum"]
    if momentum:
        if "buffer" in state:
            state["buffer"] = momentum * state["buffer"] + (1 - hyper["dampening"]) * gradient
        else:
            state["buffer"] = gradient
        nesterov = hyper["nesterov"] != 0
        gradient = gradient + momentum * state["buffer"] if nesterov else state["buffer"]
    return parameter - rate * gradient


def _adam(parameter: Tensor, gradient: Tensor, state: dict, rate: float, hyper: dict) -> Tensor:
    gradient = gradient + hyper["weight_decay"] * parameter
    return parameter - _adam_move(gradient, state, rate, hyper)


def _adamw(parameter: Tensor, gradient: Tensor, state: dict, rate: float, hyper: dict) -> Tensor:
    parameter = parameter * (1 - rate * hyper["weight_decay"])
    return parameter - _adam_move(gradient, state, rate, hyper)


def _adam_move(gradient: Tensor, state: dict, rate: float, hyper: dict) -> Tensor:
    beta1, beta2 = hyper["beta1"], hyper["beta2"]
    zero = torch.zeros_like(gradient)
    count = state["count"] = state.get("count", 0) + 1
    first = state["first"] = beta1 * state.get("first", zero) + (1 - beta1) * gradient
    square = gradient**2 + state.pop("extra", 0)
    second = state["second"] = beta2 * state.get("second", zero) + (1 - beta2) * square
    root = _root(second) / (1 - beta2**count) ** 0.5
    return rate / (1 - beta1**count) * first / (root + hyper["eps"])


def _rmsprop(parameter: Tensor, gradient: Tensor, state: dict, rate: float, hyper: dict) -> Tensor:
    gradient = gradient + hyper["weight_decay"] * parameter
    alpha, zero = hyper["alpha"], torch.zeros_like(gradient)
    own = gradient**2 + state.pop("extra", 0)
    square = state["square"] = alpha * state.get("square", zero) + (1 - alpha) * own
    if hyper["centered"]:
        mean = state["mean"] = alpha * state.get("mean", zero) + (1 - alpha) * gradient
        square = square - mean**2
    move = gradient / (_root(square) + hyper["eps"])
    if hyper["momentum"]:
        move = state["buffer"] = hyper["momentum"] * state.get("buffer", zero) + move
    return parameter - rate * move


def _adagrad(parameter: Tensor, gradient: Tensor, state: dict, rate: float, hyper: dict) -> Tensor:
    gradient = gradient + hyper["weight_decay"] * parameter
    start = torch.full_like(gradient, hyper["initial_accumulator_value"])
    total = state["sum"] = state.get("sum", start) + gradient**2 + state.pop("extra", 0)
    count = state["count"] = state.get("count", 0) + 1
    rate = rate / (1 + (count - 1) * hyper["lr_decay"])
    return parameter - rate * gradient / (_root(total) + hyper["eps"])


def _muon(parameter: Tensor, gradient: Tensor, state: dict, rate: float, hyper: dict) -> Tensor:
    """The step lands where torch.optim's bfloat16 iteration does, with the derivative of the same
    iteration without rounding."""
    momentum, zero = hyper["momentum"], torch.zeros_like(gradient)
    buffer = torch.lerp(state.get("buffer", zero), gradient, 1 - momentum)
    state["buffer"] = buffer
    update = torch.lerp(gradient, buffer, momentum) if hyper["nesterov"] else buffer
    coefficients = tuple(hyper[f"ns_coefficient{n}"] for n in (1, 2, 3))
    steps, eps = int(hyper["ns_steps"]), hyper["eps"]
    exact = update / torch.clamp(update.norm(), min=eps)
    for _ in range(steps):
        square = exact @ exact.T
        a, b, c = coefficients
        exact = a * exact + b * square @ exact + c * square @ square @ exact
    from torch.optim._muon import _zeropower_via_newtonschulz

    rounded = _zeropower_via_newtonschulz(update.detach().clone(), coefficients, steps, eps)
    landed = exact + (rounded.to(exact) - exact).detach()
    rows, columns = parameter.shape
    ratio = 0.2 * max(rows, columns) ** 0.5 if hyper["adjust_lr_fn"] == 2 else 1.0
    if hyper["adjust_lr_fn"] != 2:
        ratio = max(1, rows / columns) ** 0.5
    return parameter * (1 - rate * hyper["weight_decay"]) - rate * ratio * landed


def _root(squares: Tensor) -> Tensor:
    """The square root has no derivative at 0; there nothing has ever moved, and it passes none."""
    moved = squares != 0
    return torch.where(moved, torch.where(moved, squares, 1.0).sqrt(), 0.0)


UPDATES = {
    "SGD": _sgd,
    "Adam": _adam,
    "AdamW": _adamw,
    "RMSprop": _rmsprop,
    "Adagrad": _adagrad,
    "Muon": _muon,
}


def unrolled(
    trajectory: Trajectory,
    module: nn.Module,
    loss: Loss,
    data: Batch,
    measurement: Loss,
    queries: Batch,
    weights: Tensor | None = None,
    **clipping: Any,
) -> Tensor:
    """-d m_q(theta_T) / d w_n through the whole training loop, [query, train], at w = 1 or at
    ``weights``."""
    if weights is None:
        weights = torch.ones(num_examples(data), dtype=torch.float64)
    weights = weights.clone().requires_grad_()
    trained = replay(trajectory, module, loss, data, weights, **clipping)
    module = with_state(module, trajectory.checkpoints[0])
    measured = _call(module, measurement, trained, queries)
    return torch.stack([-torch.autograd.grad(m, weights, retain_graph=True)[0] for m in measured])


def measure(
    trajectory: Trajectory,
    module: nn.Module,
    loss: Loss,
    data: Batch,
    measurement: Loss,
    queries: Batch,
    weights: Tensor,
    *,
    clip_norm: float | None = None,
    renormalise: bool = False,
) -> Tensor:
    """m_q after training again with these example weights, [query]."""
    trained = replay(
        trajectory, module, loss, data, weights, clip_norm=clip_norm, renormalise=renormalise
    )
    module = with_state(module, trajectory.checkpoints[0])
    return _call(module, measurement, trained, queries).detach()


def leave_one_out(
    trajectory: Trajectory,
    module: nn.Module,
    loss: Loss,
    data: Batch,
    measurement: Loss,
    queries: Batch,
    *,
    examples: Sequence[int] | None = None,
    clip_norm: float | None = None,
    renormalise: bool = False,
) -> Tensor:
    """m_q after training again without example n, minus m_q, [query, train].

    Args:
        examples: the examples to leave out, one column each; all of them if None.
    """
    work = (trajectory, module, loss, data, measurement, queries)
    options = {"clip_norm": clip_norm, "renormalise": renormalise}
    count = num_examples(data)
    full = measure(*work, torch.ones(count, dtype=torch.float64), **options)
    columns = []
    for number in range(count) if examples is None else examples:
        weights = torch.ones(count, dtype=torch.float64)
        weights[number] = 0
        columns.append(measure(*work, weights, **options) - full)
    return torch.stack(columns, 1)
