"""Training steps that draw random numbers, each with its loss by example written out, and a plain
loop over the run that draws what the run drew."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import Trajectory
from tda_lightning.tasks import TrainingStepTask
from tests.runs import fit

RATE, MOMENTUM, BATCH, TRAIN, FEATURES, CLASSES = 0.2, 0.5, 4, 10, 4, 3
Step = Callable[[Any, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Noise:
    """A training step.

    Attributes:
        step: (module, x, y) -> the loss as users write it.
        rows: the same, in the same order of draws: each example's part of it, [batch], whose mean
            is the loss.
        parts: modules that it calls.
    """

    step: Step
    rows: Step
    parts: dict[str, Callable[[], nn.Module]] = field(
        default_factory=lambda: {"f": lambda: _mlp(FEATURES, CLASSES)}
    )


def _mlp(inputs: int, outputs: int, *between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), *between, nn.Linear(5, outputs))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]


def _input_noise(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.f(x + 0.5 * torch.randn_like(x))


def _mixed(m: Any, x: Tensor, y: Tensor, weight: Any) -> tuple[Tensor, Tensor]:
    partner = torch.randperm(len(x))
    return m.f(weight * x + (1 - weight) * x[partner]), y[partner]


def _mixup(draw: Callable[[], Any]) -> dict[str, Step]:
    def step(m: Any, x: Tensor, y: Tensor) -> Tensor:
        weight = draw()
        logits, other = _mixed(m, x, y, weight)
        return weight * F.cross_entropy(logits, y) + (1 - weight) * F.cross_entropy(logits, other)

    def rows(m: Any, x: Tensor, y: Tensor) -> Tensor:
        weight = draw()
        logits, other = _mixed(m, x, y, weight)
        return weight * _cross_entropy(logits, y) + (1 - weight) * _cross_entropy(logits, other)

    return {"step": step, "rows": rows}


def _torch_beta() -> Tensor:
    return torch.distributions.Beta(0.4, 0.4).sample().double()


def _denoised(m: Any, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn_like(x)
    kept = (1 - time / 11)[:, None]
    noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
    return m.f(torch.cat([noisy, time[:, None] / 10], 1)), noise


def _diffusion(draw: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    def step(m: Any, x: Tensor, y: Tensor) -> Tensor:
        found, noise = _denoised(m, x, draw(x))
        return F.mse_loss(found, noise)

    def rows(m: Any, x: Tensor, y: Tensor) -> Tensor:
        found, noise = _denoised(m, x, draw(x))
        return (found - noise).square().mean(1)

    parts = {"f": lambda: _mlp(FEATURES + 1, FEATURES)}
    return {"step": step, "rows": rows, "parts": parts}


def _encoded(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, log_variance = m.encoder(x).chunk(2, 1)
    code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
    return m.decoder(code), mean, log_variance


def _vae(m: Any, x: Tensor, y: Tensor) -> Tensor:
    found, mean, log_variance = _encoded(m, x)
    divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum(1).mean()
    return F.mse_loss(found, x, reduction="sum") / len(x) + 0.3 * divergence


def _vae_rows(m: Any, x: Tensor, y: Tensor) -> Tensor:
    found, mean, log_variance = _encoded(m, x)
    divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum(1)
    return (found - x).square().sum(1) + 0.3 * divergence


def _masked(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.f(x * torch.bernoulli(torch.full_like(x, 0.7)))


def _likely(m: Any, x: Tensor) -> Tensor:
    mean, scale = m.f(x).chunk(2, 1)
    return torch.distributions.Normal(mean, F.softplus(scale) + 0.1).rsample()


def _contrasted(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of an example's own class and of two that are drawn for it."""
    others = torch.multinomial(torch.ones(len(x), CLASSES).double(), 2)
    chosen = m.f(x).gather(1, torch.cat([y[:, None], others], 1))
    return chosen, torch.tensor([1.0, 0.0, 0.0]).double().expand_as(chosen)


def _pasted(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Half of the features are another example's, chosen by its place in the batch."""
    other = torch.randint(0, len(x), (len(x),))
    return m.f(torch.cat([x[:, :2], x[other][:, 2:]], 1))


def _of_outputs(
    outputs: Step, loss: Step | None = None, rows: Step | None = None, **options: Any
) -> Noise:
    """A loss of noisy outputs, cross entropy unless others are given as (outputs, x, y)."""
    loss = loss or (lambda z, x, y: F.cross_entropy(z, y))
    rows = rows or (lambda z, x, y: _cross_entropy(z, y))
    return Noise(
        lambda m, x, y: loss(outputs(m, x, y), x, y),
        lambda m, x, y: rows(outputs(m, x, y), x, y),
        **options,
    )


def _python_scaled(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.f(x * (0.5 + random.random()))


def _by_place(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.f(x + torch.tensor([[random.gauss(0, 1)] for _ in range(len(x))]).double())


def _first_half(m: Any, x: Tensor) -> Tensor:
    return m.f[1](m.f[0](x + 0.5 * torch.randn_like(x)))


def _checkpointed(m: Any, x: Tensor, y: Tensor) -> Tensor:
    hidden = checkpoint(lambda x: _first_half(m, x), x, use_reentrant=False)
    return F.cross_entropy(m.f[2](hidden), y)


def _gumbel(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.g(F.gumbel_softmax(m.f(x), tau=0.7))


def _in_place(m: Any, x: Tensor, y: Tensor) -> Tensor:
    hidden = m.f[1](m.f[0](x))
    return m.f[2](hidden * (1 + 0.3 * torch.empty_like(hidden).uniform_(-1, 1)))


class _Schedule:
    """Tables that no module knows of, as noise schedulers have them."""

    def __init__(self) -> None:
        self.kept = torch.linspace(0.95, 0.05, 11)


def _from_tables(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    noise, time = torch.randn_like(x), torch.randint(0, 11, (len(x),))
    kept = m.schedule.kept.to(x)[time].flatten()[:, None]
    noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
    return m.f(torch.cat([noisy, m.times(time)], 1)), noise


def _chosen_rows(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    chosen = x.abs().sum(1) < 1e3
    return _input_noise(m, x, y)[chosen], y[chosen]


def _shared_time(x: Tensor) -> Tensor:
    return torch.randint(0, 10, (1,)).double().expand(len(x))


NOISE: dict[str, Noise] = {
    "noisy inputs": _of_outputs(_input_noise),
    "mixup": Noise(**_mixup(_torch_beta)),
    "mixup, weight from numpy": Noise(**_mixup(lambda: float(np.random.beta(0.4, 0.4)))),  # noqa: NPY002
    "diffusion": Noise(**_diffusion(lambda x: torch.randint(0, 10, (len(x),)).double())),
    "diffusion, from tables": Noise(
        lambda m, x, y: F.mse_loss(*_from_tables(m, x, y)),
        lambda m, x, y: (lambda z, t: (z - t).square().mean(1))(*_from_tables(m, x, y)),
        {
            "f": lambda: _mlp(FEATURES + 2, FEATURES),
            "times": lambda: nn.Embedding(11, 2),
            "schedule": _Schedule,  # type: ignore[dict-item]
        },
    ),
    "rows chosen by data": Noise(
        lambda m, x, y: F.cross_entropy(*_chosen_rows(m, x, y)),
        lambda m, x, y: _cross_entropy(*_chosen_rows(m, x, y)),
    ),
    "diffusion, one time for a batch": Noise(**_diffusion(_shared_time)),
    "vae": Noise(
        _vae,
        _vae_rows,
        {"encoder": lambda: _mlp(FEATURES, 4), "decoder": lambda: _mlp(2, FEATURES)},
    ),
    "masked inputs": _of_outputs(
        _masked,
        lambda z, x, y: F.mse_loss(z, x),
        lambda z, x, y: (z - x).square().mean(1),
        parts={"f": lambda: _mlp(FEATURES, FEATURES)},
    ),
    "reparametrised outputs": _of_outputs(
        lambda m, x, y: _likely(m, x),
        lambda z, x, y: F.mse_loss(z, x[:, :2]),
        lambda z, x, y: (z - x[:, :2]).square().mean(1),
        parts={"f": lambda: _mlp(FEATURES, 4)},
    ),
    "negatives": Noise(
        lambda m, x, y: F.binary_cross_entropy_with_logits(*_contrasted(m, x, y)),
        lambda m, x, y: (
            lambda z, t: (F.softplus(z) - t * z).mean(1)
        )(*_contrasted(m, x, y)),
    ),
    "gumbel": _of_outputs(
        _gumbel, parts={"f": lambda: _mlp(FEATURES, 6), "g": lambda: nn.Linear(6, CLASSES)}
    ),
    "python": _of_outputs(_python_scaled),
    "python, by place": _of_outputs(_by_place),
    "checkpointed": Noise(
        _checkpointed, lambda m, x, y: _cross_entropy(m.f[2](_first_half(m, x)), y)
    ),
    "in place": _of_outputs(_in_place),
    "pasted": _of_outputs(_pasted),
    "plain": _of_outputs(lambda m, x, y: m.f(x)),
    "dropout besides": _of_outputs(
        _input_noise, parts={"f": lambda: _mlp(FEATURES, CLASSES, nn.Dropout(0.4))}
    ),
}  # fmt: skip
BY_EXAMPLE = [  # those whose noise is each example's own
    "noisy inputs",
    "diffusion",
    "diffusion, from tables",
    "rows chosen by data",
    "vae",
    "masked inputs",
    "reparametrised outputs",
    "negatives",
    "gumbel",
    "in place",
    "checkpointed",
]


class NoisyNet(LightningModule):
    """Trains on a noisy step, and remembers the generators' states at the start of each."""

    def __init__(self, noise: Noise, optimizer: str = "sgd") -> None:
        super().__init__()
        self.noise, self.optimizer = noise, optimizer
        for name, build in noise.parts.items():
            setattr(self, name, build())
        self.states: list[Any] = []
        self.trains = True
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trains:
            self.states.append(generators())
        return self.noise.step(self, *batch)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), 0.01)
        return torch.optim.SGD(self.parameters(), RATE, MOMENTUM)


class CleanMeasurement(TrainingStepTask):
    """The module's own loss, and a measurement without noise."""

    def measurement(self, module: Any, batch: Any) -> Tensor:
        return clean(module, batch[0])

    @property
    def measures_loss(self) -> bool:
        return False


def clean(module: Any, x: Tensor) -> Tensor:
    """The measurement of each query, of whatever the first part makes of it."""
    first = next(iter(module.noise.parts))
    width = next(getattr(module, first).parameters()).shape[1]
    outputs = getattr(module, first)(F.pad(x, (0, width - x.shape[1])))
    if hasattr(module, "decoder"):
        outputs = module.decoder(outputs[:, :2])
    if hasattr(module, "g"):
        outputs = module.g(outputs.softmax(1))
    return outputs.square().sum(1)


def generators() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


@contextmanager
def drawing(states: tuple[Any, ...]) -> Iterator[None]:
    """Draw from generators in these states, and put them back."""
    before = generators()
    try:
        _restore(states)
        yield
    finally:
        _restore(before)


def _restore(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002


def data(size: int = TRAIN, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, FEATURES, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(CLASSES, (size,), generator=generator))


def recorded(
    path: Path,
    name: str,
    checkpoints: int = 2,
    epochs: int = 2,
    optimizer: str = "sgd",
    dataset: Any = None,
    order: Any = None,
    accumulate: int = 1,
) -> tuple[NoisyNet, Trajectory]:
    """A run of the step called ``name``, and its record; ``order``: in place of a random one."""
    torch.manual_seed(1)
    module = NoisyNet(NOISE[name], optimizer)
    dataset = data() if dataset is None else dataset
    fit(
        path,
        lambda: DataLoader(dataset, BATCH, shuffle=order is None, sampler=order),
        module=module,
        recorder={"num_checkpoints": checkpoints},
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
    )
    module.trains = False
    return module, Trajectory.load(str(path))


def unrolled(module: NoisyNet, run: Trajectory, queries: TensorDataset) -> Tensor:
    """-d measurement / d w_n through the whole run, by plain autograd: [query, train]."""
    start = run.checkpoints[0]
    names = list(run.facts.parameters)
    values = {name: start.parameters[name].clone().requires_grad_() for name in names}
    velocity = {name: torch.zeros_like(value) for name, value in values.items()}
    weights = torch.ones(TRAIN, dtype=torch.float64, requires_grad=True)
    x, y = data().tensors
    module.train()
    states = iter(module.states)
    for row in range(run.last_step):
        loss = torch.zeros(())
        for chosen in run.steps.batches(row):
            with drawing(next(states)):
                rows = _call(module, values, lambda m, c=chosen: m.noise.rows(m, x[c], y[c]))
            loss = loss + (weights[chosen] * rows).mean() / int(run.steps.accumulation[row])
        gradients = torch.autograd.grad(loss, list(values.values()), create_graph=True)
        for (name, value), gradient in zip(list(values.items()), gradients, strict=True):
            velocity[name] = MOMENTUM * velocity[name] + gradient
            values[name] = value - RATE * velocity[name]
    end = run.checkpoints[run.last_step].parameters
    assert all(torch.allclose(values[name], end[name], rtol=1e-10) for name in names)
    module.eval()
    measured = _call(module, values, lambda m: clean(m, queries.tensors[0]))
    rows = [torch.autograd.grad(value, weights, retain_graph=True)[0] for value in measured]
    return -torch.stack(rows)


def tracin(
    module: NoisyNet, run: Trajectory, queries: TensorDataset, directions: bool = False
) -> Tensor:
    """Every use at the checkpoint after it, with what it drew, by plain autograd, one example
    after the other; rates are constant. Or of the directions of all gradients, which is in no unit:
    ReTrac."""
    x, y = data().tensors
    scores = torch.zeros(len(queries), TRAIN, dtype=torch.float64)
    before, states = 0, iter(module.states)
    for step in sorted(step for step in run.checkpoints if step > 0):
        measured = gradients(module, run, step, lambda m: clean(m, queries.tensors[0]))
        for row in range(before, step):
            for chosen in run.steps.batches(row):

                def rows(m: Any, chosen: Tensor = chosen) -> Tensor:
                    return m.noise.rows(m, x[chosen], y[chosen])

                with drawing(next(states)):
                    own = gradients(module, run, step, rows)
                if directions:
                    measured, own = (F.normalize(rows, dim=1) for rows in (measured, own))
                    own = own * TRAIN
                share = 1 / len(chosen) / int(run.steps.accumulation[row])
                scores.index_add_(1, chosen, RATE / (1 - MOMENTUM) * share * measured @ own.T)
        before = step
    return scores


def gradients(
    module: NoisyNet, run: Trajectory, step: int, losses: Callable[[Any], Tensor]
) -> Tensor:
    """Of each loss, in eval mode at a checkpoint: [loss, parameters]."""
    parameters = run.checkpoints[step].parameters
    values = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    module.eval()
    found = _call(module, values, losses)
    return torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        loss,
                        list(values.values()),
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                ]
            )
            for loss in found
        ]
    )


class _Called(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[Any], Tensor]) -> Tensor:
        return function(self.module)


def _call(module: nn.Module, values: dict[str, Tensor], function: Any) -> Tensor:
    named = {f"module.{name}": value for name, value in values.items()}
    return torch.func.functional_call(_Called(module), named, (function,))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())
