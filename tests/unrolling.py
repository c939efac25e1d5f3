"""Runs to unroll exactly: recorded by Lightning in train mode, or in memory in eval mode."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from tda_lightning import AttributionModule, Scores, Trajectory
from tda_lightning.estimators import Unrolled
from tda_lightning.evaluation import measure, retrain
from tda_lightning.examples.models.gpt import GPT
from tda_lightning.tasks import AttributionTask, LanguageModelingTask
from tests import oracles
from tests.attributing import CaseTask, quiet
from tests.cases import Case
from tests.cases.case import Function, normal, tokens
from tests.cases.training import queries_of, schedule, train
from tests.oracles.gradients import Batch, Loss, cross_entropy, mean_squared_error
from tests.runs import fit, loader

EXACT = 1e-8  # relative, in float64
Optimizers = Callable[[Any], Any]


# Optimizers


def groups_of(module: nn.Module, **first: Any) -> list[dict[str, Any]]:
    """Weights and the rest, in two groups."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], **first},
        {"params": [p for p in parameters if p.dim() == 1]},
    ]


def sgd(**options: Any) -> Optimizers:
    return lambda m: torch.optim.SGD(m.parameters(), **{"lr": 0.05, **options})


def adam(kind: Any = torch.optim.Adam, **options: Any) -> Optimizers:
    return lambda m: kind(m.parameters(), **{"lr": 0.02, "betas": (0.8, 0.9), **options})


def muon(**options: Any) -> Optimizers:
    """Of the matrices; the rest is frozen."""

    def made(module: Any) -> Any:
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.dim() == 2)
        matrices = [p for p in module.parameters() if p.dim() == 2]
        return torch.optim.Muon(matrices, **{"lr": 0.05, **options})

    return made


adamw, rmsprop, adagrad = torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad
OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": sgd(),
    "decay": sgd(weight_decay=0.1),
    "momentum": sgd(momentum=0.8),
    "momentum and decay": sgd(momentum=0.8, weight_decay=0.1),
    "dampening": sgd(momentum=0.8, dampening=0.3),
    "nesterov": sgd(momentum=0.8, nesterov=True, weight_decay=0.1),
    "dampening without momentum": sgd(dampening=0.3),
    "adam": adam(),
    "adam and decay": adam(weight_decay=0.1),
    "adam, default moments": adam(betas=(0.9, 0.999), lr=1e-3),
    "adam, large eps": adam(eps=0.1),
    "adamw": adam(adamw, weight_decay=0.5),
    "rmsprop": lambda m: rmsprop(m.parameters(), 0.02, 0.8),
    "rmsprop, everything": lambda m: rmsprop(
        m.parameters(), 0.01, 0.8, momentum=0.6, centered=True, weight_decay=0.1
    ),
    "adagrad": lambda m: adagrad(m.parameters(), 0.1),
    "adagrad, everything": lambda m: adagrad(
        m.parameters(), 0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.01
    ),
    "sgd in groups": lambda m: torch.optim.SGD(
        groups_of(m, lr=0.02, momentum=0.5, weight_decay=0.1, dampening=0.2), lr=0.1, momentum=0.8
    ),
    "momentum in one group": lambda m: torch.optim.SGD(groups_of(m, momentum=0.8), lr=0.1),
    "adam in groups": lambda m: torch.optim.Adam(
        groups_of(m, lr=0.01, betas=(0.7, 0.95), weight_decay=0.1), lr=0.02
    ),
    "adamw in groups": lambda m: adamw(
        groups_of(m, lr=0.01, eps=1e-3, weight_decay=0.5), lr=0.02, betas=(0.8, 0.9)
    ),
    "rmsprop in groups": lambda m: rmsprop(
        groups_of(m, lr=0.005, alpha=0.7, momentum=0.5, centered=True), lr=0.01, alpha=0.9
    ),
    "adagrad in groups": lambda m: adagrad(groups_of(m, lr=0.05, lr_decay=0.3), lr=0.1),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS |= {
        "muon": muon(),
        "muon, everything": muon(
            momentum=0.7, nesterov=False, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
        ),
    }
NEW = [name for name in OPTIMIZERS if name.startswith(("rmsprop", "adagrad", "muon"))]
SOME = ("momentum and decay", "nesterov", "adamw")


def per_step(make: Optimizers, kind: Any, **options: Any) -> Optimizers:
    """With a scheduler of Lightning's that steps after every step."""

    def made(module: Any) -> Any:
        optimizer = make(module)
        return [optimizer], [{"scheduler": kind(optimizer, **options), "interval": "step"}]

    return made


def per_epoch(make: Optimizers, kind: Any, **options: Any) -> Optimizers:
    def made(module: Any) -> Any:
        optimizer = make(module)
        return [optimizer], [{"scheduler": kind(optimizer, **options), "interval": "epoch"}]

    return made


def mostly(cases: Iterable[str], names: Sequence[str], kept: Sequence[Any]) -> list[Any]:
    """Every case with every name; those are slow tests whose name, or case and name, is not
    ``kept``."""
    return [
        pytest.param(
            case, name, marks=() if name in kept or (case, name) in kept else pytest.mark.slow
        )
        for case in cases
        for name in names
    ]


# In memory, in eval mode


def in_eval_mode(run: Trajectory, module: nn.Module, **settings: Any) -> Trajectory:
    """The run with the note that every part of the module was in eval mode."""
    names = [name for name, _ in module.named_modules()]
    noted = {**run.facts.settings, "eval_modules": names, **settings}
    return dataclasses.replace(run, facts=dataclasses.replace(run.facts, settings=noted))


# Accumulated and uneven batches, an example twice in one, an incomplete last group, one left out.
BATCHES = [
    *oracles.cut_batches(10, 3, epochs=2, accumulate=2),
    [[0, 0, 1], [2]],
    *oracles.cut_batches(8, 4, epochs=1, seed=4),
]


def in_memory(
    case: Case,
    optimizer: Optimizers,
    *,
    batches: Any = BATCHES,
    checkpoints: Sequence[int] = (2, 3, 7),
    clip_norm: float | None = None,
    clip_value: float | None = None,
    **options: Any,
) -> tuple[Trajectory, nn.Module, tuple[Tensor, Tensor]]:
    """A recorded run of the case under a rate that falls, its module and its data."""
    run, module, data = train(
        case,
        optimizer,
        batches=batches,
        checkpoints=checkpoints,
        schedule=schedule,
        clip_norm=clip_norm,
        clip_value=clip_value,
        accumulation=2,
        **options,
    )
    settings: dict[str, Any] = {}
    if clip_norm or clip_value:
        settings["gradient_clip_val"] = clip_norm or clip_value
        settings["gradient_clip_algorithm"] = "norm" if clip_norm else "value"
    return in_eval_mode(run, module, **settings), module, data


def unroll(
    case: Case,
    run: Trajectory,
    module: nn.Module,
    data: tuple[Tensor, Tensor],
    estimator: Unrolled | None = None,
    *,
    task: AttributionTask | None = None,
    **options: Any,
) -> Scores:
    """Scores of a run in memory for :func:`queries_of` the case."""
    return scores_of(
        run,
        module,
        TensorDataset(*data),
        TensorDataset(*queries_of(case)),
        task or CaseTask(case.kind),
        estimator,
        **options,
    )


def scores_of(
    run: Any,
    module: nn.Module,
    data: Any,
    queries: Any,
    task: AttributionTask | None,
    estimator: Unrolled | None = None,
    *,
    batch_size: int = 4,
    trainer: Any = None,
    **options: Any,
) -> Scores:
    attribution = AttributionModule(module, run, estimator or Unrolled(), task)
    return attribution.attribute(
        data, queries, batch_size=batch_size, trainer=trainer or quiet(), **options
    )


# Recorded by Lightning, in train mode


class Trained(LightningModule):
    """A network with a loss for each example [batch]; every step logs and counts."""

    def __init__(self, net: nn.Module, losses: Loss, optimizers: Optimizers) -> None:
        super().__init__()
        self.net, self.losses, self.optimizers_of = net, losses, optimizers
        self.history: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.losses(self, batch).mean()
        self.history.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


def token_losses(module: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of the next token over the number of positions, [batch, position]."""
    numbers = batch if isinstance(batch, Tensor) else batch[0]
    logits, labels = module(numbers[:, :-1]), numbers[:, 1:]
    losses = -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return losses / labels.shape[1]


def _mse(module: nn.Module, batch: Batch) -> Tensor:
    return mean_squared_error(module(batch[0]), batch[1])


def _cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(module(batch[0]), batch[1])


class FusedAttention(nn.Module):
    """Self-attention by torch's fused kernel, whose backward pass has no derivative."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.inside(hidden).unsqueeze(1).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return hidden + self.outside(mixed.squeeze(1))


def _recurrent(kind: type[nn.Module]) -> nn.Module:
    def run(module: Any, inputs: Tensor) -> Tensor:
        return module.head(module.layer(inputs)[0][:, -1])

    layer = kind(2, 3, num_layers=2, dropout=0.3, batch_first=True)
    return Function(run, layer=layer, head=nn.Linear(3, 2))


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with its data, to be trained in train mode."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    losses: Loss = _mse

    def module(self, optimizers: Optimizers, seed: int = 3) -> Trained:
        torch.manual_seed(seed)
        return Trained(self.build(), self.losses, optimizers).double()

    @property
    def task(self) -> AttributionTask:
        if self.losses is _mse:
            return CaseTask("regression")
        if self.losses is _cross_entropy:
            return CaseTask("classification")
        return LanguageModelingTask()

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Of each example, [batch]."""
        losses = self.losses(module, batch)
        return losses.sum(1) if losses.dim() > 1 else losses

    def data(self, size: int, seed: int = 0) -> TensorDataset:
        torch.manual_seed(seed)
        inputs = self.inputs(size)
        if self.task.__class__ is LanguageModelingTask:
            return TensorDataset(inputs)
        if self.losses is _cross_entropy:
            return TensorDataset(inputs, torch.randint(3, (size,)))
        return TensorDataset(inputs, torch.randn(size, 2, dtype=torch.float64))


def _sequence_loss(module: nn.Module, batch: Batch) -> Tensor:
    return token_losses(module, batch).sum(1)


def _convolution() -> nn.Module:
    """Without biases that the normalisation takes away: their gradients are rounding errors."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False),
        nn.BatchNorm2d(2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 4, bias=False),
        nn.BatchNorm1d(4, momentum=None),
        nn.Tanh(),
        nn.Linear(4, 3),
    )


NETWORKS: dict[str, Network] = {
    "mlp": Network(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), normal(3)),
    "dropout": Network(
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)
        ),
        normal(3),
    ),
    "batch norm": Network(_convolution, normal(1, 4, 4), _cross_entropy),
    "transformer": Network(
        lambda: GPT(7, 5, width=4, depth=1, heads=2, dropout=0.2, tied=True),
        tokens(6, 5),  # the last token is never seen
        _sequence_loss,
    ),
    "lstm": Network(lambda: _recurrent(nn.LSTM), normal(4, 2)),
    "gru": Network(lambda: _recurrent(nn.GRU), normal(4, 2)),
    "fused attention": Network(
        lambda: nn.Sequential(nn.Embedding(7, 4), FusedAttention(4), nn.Linear(4, 7)),
        tokens(6, 5),
        _sequence_loss,
    ),
}


def record(
    path: Path,
    network: Network,
    optimizers: Optimizers,
    *,
    data: Any = None,
    module: Any = None,
    batch_size: int = 4,
    recorder: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Trajectory, Trained, Any]:
    """A run of 10 examples, two epochs of three batches, in train mode: with its data and the
    module that was given, or one of other weights."""
    data = network.data(10) if data is None else data
    other = network.module(optimizers, seed=4) if module is None else module
    module = network.module(optimizers) if module is None else module
    fit(
        path,
        lambda: loader(data, batch_size, shuffle=True),
        module=module,
        recorder={"every_n_steps": 2, **(recorder or {})},
        **options,
    )
    return Trajectory.load(str(path)), other, data


def fetching(data: Dataset) -> Callable[[Tensor], Batch]:
    return lambda examples: default_collate([data[int(i)] for i in examples])


def everything(data: Any) -> Batch:
    return default_collate([data[i] for i in range(len(data))])


def expected_of(
    run: Trajectory, network: Network, module: nn.Module, data: Any, queries: Any, **options: Any
) -> Tensor:
    """What autograd through the whole run says, [interval, query, train]."""
    losses = options.pop("losses", network.loss)
    return oracles.removals(
        run, module, losses, fetching(data), network.loss, everything(queries), **options
    )


def differences_of(
    run: Trajectory,
    module: nn.Module,
    task: AttributionTask | None,
    data: Any,
    queries: Any,
    examples: list[int],
    width: float = 1e-5,
) -> Tensor:
    """-(m_q(w_n = 1 + h) - m_q(w_n = 1 - h)) / 2h of full retraining, [query, example]."""

    def measured(weights: Tensor) -> Tensor:
        return measure(module, task, retrain(run, module, task, data, weights), queries)

    ones = torch.ones(len(data), dtype=torch.float64)
    return -oracles.central_differences(measured, ones, examples, width)


class Augmented(Dataset):
    """Examples under noise from all three global generators."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        inputs, *rest = self.data[index]
        noise = 0.1 * torch.randn_like(inputs) + 0.1 * random.random() + 0.1 * np.random.random()  # noqa: NPY002
        return inputs + noise, *rest
