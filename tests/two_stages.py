"""Two stages of training, recorded by Lightning in train mode, to unroll exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule, Scores, Trajectory
from tda_lightning.evaluation import measure, retrain
from tda_lightning.examples.models.gpt import GPT
from tests.attributing import quiet
from tests.cases.case import normal, tokens
from tests.oracles.retracing import RetracedStage, finer_differences, removals_of_stages
from tests.unrolling import (
    NETWORKS,
    Network,
    Optimizers,
    Trained,
    everything,
    fetching,
    record,
    sgd,
)


def _mlp(outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 4),
        nn.Tanh(),
        nn.Dropout(0.2),
        nn.Linear(4, 4),
        nn.Tanh(),
        nn.Linear(4, outputs),
    )


def _convolution(outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False),
        nn.BatchNorm2d(2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 4, bias=False),
        nn.BatchNorm1d(4, momentum=None),
        nn.Tanh(),
        nn.Linear(4, outputs),
    )


def _classes(build: Callable[[], nn.Module], inputs: Any) -> Network:
    return dataclasses.replace(NETWORKS["batch norm"], build=build, inputs=inputs)


def _regression(build: Callable[[], nn.Module], inputs: Any) -> Network:
    return dataclasses.replace(NETWORKS["mlp"], build=build, inputs=inputs)


MLP = _regression(lambda: _mlp(2), normal(3)), _classes(lambda: _mlp(3), normal(3))
CONVOLUTION = tuple(
    dataclasses.replace(
        NETWORKS["batch norm"],
        build=lambda outputs=outputs: _convolution(outputs),
        inputs=normal(1, 4, 4),
    )
    for outputs in (4, 3)  # a new head
)
TIED = tuple(
    dataclasses.replace(
        NETWORKS["transformer"],
        build=lambda: GPT(7, 5, width=4, depth=1, heads=2, dropout=0.1, tied=True),
        inputs=tokens(6, 5),
    )
    for _ in range(2)
)


class Later(Trained):
    """A stage that keeps parts of its network as they are."""

    def __init__(
        self, *work: Any, frozen: tuple[str, ...] = (), still: tuple[str, ...] = ()
    ) -> None:
        super().__init__(*work)
        self.frozen, self.still = frozen, still

    def freeze(self) -> Later:
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(not name.startswith(self.frozen or ("no part",)))
        return self

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for name in self.still:
            self.net.get_submodule(name).eval()
        return self


@dataclasses.dataclass
class TwoStages:
    """What both were trained with, and the queries of the last one."""

    networks: tuple[Network, Network]
    runs: list[Trajectory]
    modules: list[Trained]
    data: list[Any]
    queries: TensorDataset

    def scores(self, estimator: Any, **options: Any) -> Scores:
        attribution = AttributionModule(
            self.modules, self.runs, estimator, [network.task for network in self.networks]
        )
        data = options.pop("data", self.data)
        trainer = options.pop("trainer", None) or quiet()
        return attribution.attribute(data, self.queries, batch_size=4, trainer=trainer, **options)

    def expected(self, at: float = 1.0) -> list[Tensor]:
        """What autograd through both stages says where all examples have the weight ``at``,
        [interval, query, train] for each."""
        stages = [
            RetracedStage(run, module, network.loss, fetching(data))
            for run, module, network, data in zip(
                self.runs, self.modules, self.networks, self.data, strict=True
            )
        ]
        return removals_of_stages(stages, self.networks[-1].loss, everything(self.queries), at)

    def retrained(self, *weights: Tensor) -> Tensor:
        """The measurements after both stages with these weights on their examples, [query]."""
        state: dict[str, Tensor] = {}
        for run, module, network, data, own in zip(
            self.runs, self.modules, self.networks, self.data, weights, strict=True
        ):
            state = retrain(started(run, module, state), module, network.task, data, own)
        return measure(self.modules[-1], self.networks[-1].task, state, self.queries)

    def differences(self, examples: list[int], together: bool = False) -> Tensor:
        """Central differences of retraining, for examples of stage 1; ``together``: whose weights
        in stage 2 change likewise."""
        first, second = (torch.ones(len(data), dtype=torch.float64) for data in self.data)

        def measured(weights: Tensor) -> Tensor:
            return self.retrained(weights, weights if together else second)

        return -finer_differences(measured, first, examples)


def started(run: Trajectory, module: nn.Module, state: dict[str, Tensor]) -> Trajectory:
    """The run from what an earlier stage ended with."""
    first, own = (
        run.checkpoints[0],
        {**dict(module.named_parameters()), **dict(module.named_buffers())},
    )
    taken = {n: t for n, t in state.items() if n in own and own[n].shape == t.shape}
    trained = {n: taken.get(n, t) for n, t in first.parameters.items()}
    others = {n: t for n, t in {**first.buffers, **taken}.items() if n not in trained}
    begin = dataclasses.replace(first, parameters=trained, buffers=others)
    return dataclasses.replace(run, checkpoints={**run.checkpoints, 0: begin})


def two_stages(
    folder: Path,
    networks: tuple[Network, Network],
    optimizers: tuple[Optimizers, Optimizers] = (sgd(momentum=0.8), sgd(momentum=0.8)),
    frozen: tuple[str, ...] = (),
    still: tuple[str, ...] = (),
    data: list[Any] | None = None,
    **options: Any,
) -> TwoStages:
    """Stage 1, and stage 2 with what has the same name and shape.

    Args:
        frozen: parts that stage 2 does not train.
        still: parts that it keeps in eval mode.
    """
    one, two = networks
    data = [one.data(10), two.data(7, seed=5)] if data is None else data
    first = one.module(optimizers[0])
    before, *_ = record(folder / "1", one, optimizers[0], data=data[0], module=first, **options)
    second = Later(
        two.module(sgd(), seed=6).net, two.losses, optimizers[1], frozen=frozen, still=still
    )
    state = second.state_dict()
    left = first.state_dict()
    state |= {name: own for name, own in left.items() if own.shape == state[name].shape}
    second.load_state_dict(state)
    second.freeze().train()
    after, *_ = record(folder / "2", two, optimizers[1], data=data[1], module=second, **options)
    return TwoStages(networks, [before, after], [first, second], data, two.data(3, seed=8))
