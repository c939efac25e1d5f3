"""A recorded run made ready to be trained again: checks, batches, optimizer, the plain loop."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset, default_collate

from tda_lightning.compiled import run_eagerly, uncompiled
from tda_lightning.errors import (
    NonFiniteError,
    TrajectoryMismatchError,
    UnsupportedTrainingError,
)
from tda_lightning.loading import ExampleSource
from tda_lightning.matching import require_one_stage
from tda_lightning.tasks import AttributionTask, example_noise, silenced
from tda_lightning.trajectory import Trajectory

State = dict[str, Tensor]


class Replay:
    """What does not change from run to run."""

    def __init__(
        self,
        trajectory: Trajectory,
        module: nn.Module,
        task: AttributionTask,
        dataset: Any,
        training: bool,
    ) -> None:
        self.trajectory = trajectory
        self.module = uncompiled(module)
        self.task = task
        self.training = training
        self.source = ExampleSource.of(dataset, 1, "training")
        self.device = device_of(module)
        settings = trajectory.facts.settings
        self.clip = settings.get("gradient_clip_val")
        self.clip_by_value = settings.get("gradient_clip_algorithm", "norm") == "value"

    def check(self, weights: Tensor) -> None:
        facts, steps = self.trajectory.facts, self.trajectory.steps
        self.trajectory.require_optimizer()
        if not len(steps.examples):
            raise UnsupportedTrainingError(
                "The trajectory holds no example indices, so its batches cannot be replayed: "
                f"indices are {facts.settings.get('indices', 'absent')}."
            )
        require_one_stage(self.trajectory)
        if facts.settings.get("clipping") == "own":
            raise UnsupportedTrainingError(
                "The module clipped gradients in its own configure_gradient_clipping, which a "
                "replay without Lightning does not call. Use Trainer(gradient_clip_val=...)."
            )
        precision = str(facts.settings.get("precision", "32-true"))
        if "mixed" in precision:
            raise UnsupportedTrainingError(
                f"The run was trained with precision={precision}; the replay is written for true "
                "precision (32-true, 64-true), and would land elsewhere."
            )
        if facts.num_examples not in (None, len(self.source)):
            raise TrajectoryMismatchError(
                f"The training set is not the recorded one: expected {facts.num_examples} "
                f"examples, got {len(self.source)}."
            )
        if weights.dim() != 2 or weights.shape[1] != len(self.source):
            raise ValueError(
                f"weights must have the shape [runs, {len(self.source)}], one number for each "
                f"training example, got {list(weights.shape)}."
            )
        if bool((weights == 1).all()):
            return
        # On a copy: a task that prepares itself on one batch would fix what differs by batch.
        probe = copy.deepcopy(self.task)
        with borrowed(self.module), silenced(self.module):
            load(self.module, self.start())
            self.module.eval()
            batch, examples = next(iter(self.batches(0)))
            with example_noise(0, examples):
                probe.prepare(self.module, batch)
        if not probe.separable:
            raise ValueError(
                "The losses of single examples are not known, so none can be left out: "
                f"{' '.join(probe.notes)}"
            )

    def start(self) -> State:
        """Initial parameters and buffers."""
        first = self.trajectory.checkpoints[0]
        return {**first.buffers, **first.parameters}

    def batches(self, row: int) -> Iterator[tuple[Any, Tensor]]:
        """The batches of a step with their example indices."""
        for examples in self.trajectory.steps.batches(row):
            yield place(fetch(self.source, examples), self.device), examples

    def run(self, weights: Tensor) -> State:
        """The plain loop: one run by torch.optim."""
        module = self.module
        with borrowed(module), silenced(module), torch.enable_grad():
            load(module, self.start())
            module.train(self.training)
            trained = {
                name: module.get_parameter(name) for name in self.trajectory.facts.parameters
            }
            for parameter in module.parameters():
                parameter.requires_grad_(False)
            for parameter in trained.values():
                parameter.requires_grad_(True)
            optimizer = make_optimizer(self.trajectory, trained)
            for row in range(self.trajectory.last_step):
                apply_settings(self.trajectory, optimizer, row)
                optimizer.zero_grad()
                for batch, examples in self.batches(row):
                    with example_noise(0, examples), no_randomness():
                        losses = self.task.train_loss(module, batch)
                    loss = weighted_loss(self.task, losses, weights[examples])
                    (loss / int(self.trajectory.steps.accumulation[row])).backward()
                self._clip(list(trained.values()))
                optimizer.step()
            tensors = [*module.named_parameters(), *module.named_buffers()]
            state = {name: tensor.detach().clone() for name, tensor in tensors}
        require_finite(state)
        return state

    def _clip(self, parameters: list[nn.Parameter]) -> None:
        if not self.clip:
            return
        if self.clip_by_value:
            torch.nn.utils.clip_grad_value_(parameters, self.clip)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)


def weighted_loss(task: AttributionTask, losses: Tensor, weights: Tensor) -> Tensor:
    """A batch's loss as trained with weights on its examples; what it divides by is kept."""
    return (weights.to(losses) * losses).sum() * task.share(len(losses))


def make_optimizer(trajectory: Trajectory, trained: Mapping[str, Tensor]) -> Optimizer:
    """The recorded optimizer over ``trained``, its groups as recorded; settings come per step."""
    facts = trajectory.facts
    groups: list[dict[str, Any]] = [
        {
            "params": [
                trained[name] for name, fact in facts.parameters.items() if fact.group == number
            ]
        }
        for number in range(trajectory.steps.learning_rate.shape[1])
    ]
    kinds: dict[str, type[Optimizer]] = {"SGD": SGD, "Adam": Adam, "AdamW": AdamW}
    return kinds[facts.optimizer](groups, lr=0.0)  # type: ignore[call-arg]


def apply_settings(trajectory: Trajectory, optimizer: Optimizer, row: int) -> None:
    """Give every group the rate and hyper-parameters that step row + 1 used."""
    steps = trajectory.steps
    for number, group in enumerate(optimizer.param_groups):
        found = {name: float(table[row, number]) for name, table in steps.hyperparameters.items()}
        group["lr"] = float(steps.learning_rate[row, number])
        if "beta1" in found:
            group["betas"] = (found.pop("beta1"), found.pop("beta2"))
        if "nesterov" in found:
            found["nesterov"] = bool(found["nesterov"])
        group.update(found)


def require_finite(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NonFiniteError(
                f"Retraining ended with {name} not finite: training with these weights diverged."
            )


@contextmanager
def no_randomness() -> Iterator[None]:
    """Refuse a loss that draws random numbers: their recorded draws are not known."""
    before = torch.get_rng_state()
    yield
    if not torch.equal(before, torch.get_rng_state()):
        raise UnsupportedTrainingError(
            "The training loss draws random numbers (dropout, for instance), which the trajectory "
            "does not hold, so the run cannot be replayed. Pass training=False to replay in eval "
            "mode, another run than the recorded one."
        )


def place(batch: Any, device: torch.device) -> Any:
    """The batch on a device, nested containers kept."""
    move = lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf  # noqa: E731
    return pytree.tree_map(move, batch)


def fetch(source: ExampleSource, examples: Tensor) -> Any:
    if type(source.dataset) is TensorDataset and source.collate is default_collate:
        return list(source.dataset[examples])  # the same batch, without a call for each example
    return source.collate([source.dataset[index] for index in examples.tolist()])


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


@contextmanager
def borrowed(module: nn.Module) -> Iterator[None]:
    """Weights, buffers, modes, gradients and what requires them, as before at the end; nothing
    is compiled meanwhile."""
    with run_eagerly(module):
        yield from _borrowed(module)


def _borrowed(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    parameters = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    tensors = [*module.parameters(), *module.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for part, mode in modes.items():
            part.training = mode
