"""A plain training loop that leaves a :class:`Trajectory` in memory, without Lightning."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tda_lightning.records.trajectory import (
    Checkpoint,
    Facts,
    ParameterFact,
    Segment,
    Steps,
    Trajectory,
)
from tests.oracles.curvature import gauss_newton
from tests.oracles.draws import drawn_weights
from tests.oracles.gradients import Batch, Criterion, Loss, num_examples, take, with_state

# Optimizer steps, each a list of accumulated batches of example indices.
Batches = Sequence[Sequence[Sequence[int]]]


def cut_batches(
    num_examples: int, batch_size: int, epochs: int, seed: int = 0, accumulate: int = 1
) -> list[list[list[int]]]:
    """Freshly shuffled epochs cut into batches, the last of an epoch being as small as it comes.

    An incomplete accumulation group at the end of an epoch becomes a step of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(epochs):
        order = torch.randperm(num_examples, generator=generator).tolist()
        batches = [
            order[start : start + batch_size] for start in range(0, num_examples, batch_size)
        ]
        steps += [
            batches[start : start + accumulate] for start in range(0, len(batches), accumulate)
        ]
    return steps


def record_run(
    module: nn.Module,
    loss: Loss,
    data: Batch,
    optimizer: Callable[[nn.Module], Optimizer],
    batches: Batches,
    checkpoints: Sequence[int],
    schedule: Callable[[int], float] = lambda row: 1.0,
    accumulation: int | None = None,
    clip_norm: float | None = None,
    clip_value: float | None = None,
) -> Trajectory:
    """Train a copy of ``module`` in eval mode by torch.optim and record it.

    Each step descends the sum over its batches of the batch's mean loss, divided by
    ``accumulation`` (its number of batches if None).

    Args:
        checkpoints: steps after which the state is kept; 0 and the last are always kept.
        schedule: factor on every group's rate at row t (the step t + 1).
    """
    module = copy.deepcopy(module).eval()
    trainer = optimizer(module)
    held = {id(p) for group in trainer.param_groups for p in group["params"]}
    names = {id(p): name for name, p in module.named_parameters() if id(p) in held}
    facts = Facts(
        parameters={
            names[id(parameter)]: ParameterFact(
                tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."), number
            )
            for number, group in enumerate(trainer.param_groups)
            for parameter in group["params"]
        },
        optimizer=type(trainer).__name__,
        num_examples=num_examples(data),
    )
    base = [group["lr"] for group in trainer.param_groups]
    kept = {0: _state(module, trainer, names, 0)}
    rates, hyper, losses, norms, factors = [], [], [], [], []
    for row, accumulated in enumerate(batches):
        divisor = accumulation or len(accumulated)
        for group, rate in zip(trainer.param_groups, base, strict=True):
            group["lr"] = rate * schedule(row)
        rates.append([group["lr"] for group in trainer.param_groups])
        hyper.append([_hyperparameters(trainer, group) for group in trainer.param_groups])
        trainer.zero_grad()
        means = []
        for indices in accumulated:
            mean = loss(module, take(data, indices)).mean()
            (mean / divisor).backward()
            means.append(mean.item())
        parameters = [p for group in trainer.param_groups for p in group["params"]]
        norms.append(_norm(parameters))
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        if clip_value is not None:
            torch.nn.utils.clip_grad_value_(parameters, clip_value)
        factors.append(_norm(parameters) / norms[-1])
        losses.append(sum(means) / len(means))
        trainer.step()
        if row + 1 in checkpoints or row + 1 == len(batches):
            kept[row + 1] = _state(module, trainer, names, row + 1)
    sizes = [len(indices) for step in batches for indices in step]
    seen = torch.tensor([sum(map(len, step)) for step in batches]).cumsum(0)
    steps = Steps(
        epoch=torch.cat([torch.zeros(1, dtype=torch.int64), seen[:-1]]) // num_examples(data),
        learning_rate=torch.tensor(rates, dtype=torch.float64),
        hyperparameters={
            key: torch.tensor([[g[key] for g in row] for row in hyper], dtype=torch.float64)
            for key in hyper[0][0]
        },
        loss=torch.tensor(losses, dtype=torch.float64),
        gradient_norm=torch.tensor(norms, dtype=torch.float64),
        batch_offsets=torch.tensor([0] + [len(step) for step in batches]).cumsum(0),
        example_offsets=torch.tensor([0, *sizes]).cumsum(0),
        examples=torch.tensor([n for step in batches for indices in step for n in indices]),
        accumulation=torch.tensor([accumulation or len(step) for step in batches]),
        clipping=torch.tensor(factors, dtype=torch.float64),
    )
    return Trajectory(facts, steps, kept)


def _norm(parameters: Sequence[Tensor]) -> float:
    gradients = [p.grad.reshape(-1) for p in parameters if p.grad is not None]
    return float(torch.cat(gradients).norm())


# torch.optim's keys for what a formula reads; of a tuple, every member counts from 1.
_KEYS = {
    "SGD": ("momentum", "dampening", "nesterov", "weight_decay"),
    "Adam": ("betas", "eps", "weight_decay"),
    "AdamW": ("betas", "eps", "weight_decay"),
    "RMSprop": ("alpha", "eps", "weight_decay", "momentum", "centered"),
    "Adagrad": ("lr_decay", "eps", "weight_decay", "initial_accumulator_value"),
    "Muon": (
        *("momentum", "nesterov", "weight_decay", "eps", "ns_steps"),
        *("ns_coefficients", "adjust_lr_fn"),
    ),
}
_ADJUSTMENTS = {None: 0, "original": 1, "match_rms_adamw": 2}


def _hyperparameters(trainer: Optimizer, group: dict) -> dict[str, float]:
    numbers = {}
    for key in _KEYS[type(trainer).__name__]:
        value = group[key]
        if isinstance(value, tuple):
            single = key.removesuffix("s")
            numbers |= {f"{single}{n}": member for n, member in enumerate(value, start=1)}
        else:
            numbers[key] = _ADJUSTMENTS[value] if key == "adjust_lr_fn" else float(value)
    return numbers


def _state(module: nn.Module, trainer: Optimizer, names: dict[int, str], step: int) -> Checkpoint:
    optimized = [p for group in trainer.param_groups for p in group["params"]]
    return Checkpoint(
        step=step,
        parameters={names[id(p)]: p.detach().clone() for p in optimized},
        # Frozen parameters too, as the recorder keeps them.
        buffers={
            **{n: p.detach().clone() for n, p in module.named_parameters() if id(p) not in names},
            **{name: buffer.clone() for name, buffer in module.named_buffers()},
        },
        optimizer={
            names[id(p)]: {
                key: value.clone()
                for key, value in trainer.state[p].items()
                if isinstance(value, Tensor)
            }
            for p in optimized
            if p in trainer.state
        },
    )


def cast(trajectory: Trajectory, dtype: torch.dtype) -> Trajectory:
    """The same run with its checkpoints rounded to ``dtype``."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    checkpoints = {
        step: Checkpoint(
            step=step,
            parameters={name: convert(t) for name, t in checkpoint.parameters.items()},
            buffers={name: convert(t) for name, t in checkpoint.buffers.items()},
            optimizer=None
            if checkpoint.optimizer is None
            else {
                name: {key: convert(t) for key, t in state.items()}
                for name, state in checkpoint.optimizer.items()
            },
        )
        for step, checkpoint in trajectory.checkpoints.items()
    }
    parameters = {
        name: dataclasses.replace(fact, dtype=str(dtype).removeprefix("torch."))
        for name, fact in trajectory.facts.parameters.items()
    }
    facts = dataclasses.replace(trajectory.facts, parameters=parameters)
    return Trajectory(facts, trajectory.steps, checkpoints)


def mean_curvature(
    trajectory: Trajectory,
    segments: Sequence[Segment],
    module: nn.Module,
    criterion: Criterion,
    data: Batch,
) -> list[Tensor]:
    """Each segment's Gauss-Newton matrix of examples as drawn, averaged over its checkpoints."""
    names = list(trajectory.facts.parameters)
    return [
        torch.stack(
            [
                gauss_newton(
                    with_state(module, trajectory.checkpoints[step]),
                    criterion,
                    data,
                    names,
                    drawn_weights(trajectory, segment.start, segment.stop, num_examples(data)),
                )
                for step in segment.checkpoints
            ]
        ).mean(0)
        for segment in segments
    ]
