r"""Train the recorded run again with some examples weighted: the truth that scores are judged by.

Everything comes from the trajectory: initial weights (checkpoint 0), the batches in their recorded
order, applied rates, the optimizer's settings and clipping. A batch loss is

.. math::
    L_B = \frac1{|B|} \sum_{n \in B} w_n\, l_n(\theta)

so an example of weight 0 leaves its batch with the *denominator kept*. That is not removal in the
sense of a smaller training set, where every other example gains weight; see
:func:`~tda_lightning.evaluation.as_removal`. With batch statistics (BatchNorm in train mode) an
example of weight 0 also stays in the statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import TensorDataset, default_collate

from tda_lightning.errors import (
    NonFiniteError,
    TrajectoryMismatchError,
    UnsupportedTrainingError,
)
from tda_lightning.evaluation.stacked import retrain_stacked
from tda_lightning.loading import ExampleSource
from tda_lightning.tasks import AttributionTask, as_task, example_noise, silenced
from tda_lightning.trajectory import Trajectory

State = dict[str, Tensor]


def retrain(
    trajectory: Trajectory,
    module: nn.Module,
    task: AttributionTask | None,
    dataset: Any,
    weights: Tensor,
    training: bool = True,
) -> State:
    """Replay the recorded run with example n's loss multiplied by ``weights[n]``.

    With all weights 1 it lands on the last checkpoint, bit for bit or to rounding;
    :func:`landing_error` says how closely.

    Args:
        trajectory: the recorded run.
        module: built as it was trained; it is put back as it was.
        task: gives each example's training loss; None for the module's own ``training_step``.
        dataset: the recorded training set, or a ``DataLoader`` over it for its collate function.
        weights: [train], 0 for an example left out.
        training: replay in train mode, as runs are recorded by Lightning; False for eval mode.

    Returns:
        Parameters and buffers after the last step, by name.

    Raises:
        TrajectoryMismatchError: another number of training examples than recorded.
        UnsupportedTrainingError: the run cannot be replayed: no batches were recorded, mixed
            precision, or random numbers drawn in training (dropout).
        NonFiniteError: training with these weights diverged.
    """
    (state,) = retrain_each(trajectory, module, task, dataset, weights[None], training)
    return state


def retrain_each(
    trajectory: Trajectory,
    module: nn.Module,
    task: AttributionTask | None,
    dataset: Any,
    weights: Tensor,
    training: bool = True,
    together: int = 1,
) -> Iterator[State]:
    """:func:`retrain` for every row of ``weights``, [runs, train].

    Args:
        together: runs to train at once through ``torch.func.vmap``: several times faster for
            small models, the same to rounding. 1 is the plain loop.

    Raises:
        As :func:`retrain` does.
    """
    replay = _Replay(trajectory, module, as_task(task), dataset, training)
    replay.check(weights)
    if together == 1:
        for row in weights:
            yield replay.run(row)
        return
    for part in weights.split(together):
        yield from retrain_stacked(replay, part)


def measure(
    module: nn.Module,
    task: AttributionTask | None,
    state: Mapping[str, Tensor],
    queries: Any,
    batch_size: int = 256,
) -> Tensor:
    """Measurement of every query under ``state``, in eval mode: [query]."""
    source, chosen = ExampleSource.of(queries, batch_size, "query"), as_task(task)
    found = []
    with _borrowed(module), silenced(module), torch.no_grad():
        _load(module, state)
        module.eval()
        for indices in source.batches():
            examples = torch.tensor(indices)
            with example_noise(0, examples):
                batch = place(_fetch(source, examples), _device(module))
                found.append(chosen.measurement(module, batch).detach())
    return torch.cat(found)


def landing_error(trajectory: Trajectory, state: Mapping[str, Tensor]) -> float:
    r"""Distance of a replay with all weights 1 from the recorded end, relative to the way there:
    :math:`|\theta - \theta_T| / |\theta_T - \theta_0|`. 0 is bit for bit."""
    start = trajectory.checkpoints[0].parameters
    end = trajectory.checkpoints[trajectory.last_step].parameters
    missed = sum(float((state[name].cpu() - end[name]).double().square().sum()) for name in end)
    moved = sum(float((start[name] - end[name]).double().square().sum()) for name in end)
    return (missed / moved) ** 0.5 if moved else missed**0.5


class _Replay:
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
        self.module = module
        self.task = task
        self.training = training
        self.source = ExampleSource.of(dataset, 1, "training")
        self.device = _device(module)
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
        with _borrowed(self.module), silenced(self.module):
            _load(self.module, self.start())
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
            yield place(_fetch(self.source, examples), self.device), examples

    def run(self, weights: Tensor) -> State:
        """The plain loop: one run by torch.optim."""
        module = self.module
        with _borrowed(module), silenced(module), torch.enable_grad():
            _load(module, self.start())
            module.train(self.training)
            trained = {name: module.get_parameter(name) for name in self.trajectory.facts.parameters}
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
                    loss = weighted_mean(losses, weights[examples])
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


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Mean over the batch with the denominator kept."""
    return (weights.to(losses) * losses).sum() / len(losses)


def make_optimizer(trajectory: Trajectory, trained: Mapping[str, Tensor]) -> Optimizer:
    """The recorded optimizer over ``trained``, its groups as recorded; settings come per step."""
    facts = trajectory.facts
    groups: list[dict[str, Any]] = [
        {"params": [trained[name] for name, fact in facts.parameters.items() if fact.group == number]}
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
    return torch.utils._pytree.tree_map(move, batch)


def _fetch(source: ExampleSource, examples: Tensor) -> Any:
    if type(source.dataset) is TensorDataset and source.collate is default_collate:
        return list(source.dataset[examples])  # the same batch, without a call for each example
    return source.collate([source.dataset[index] for index in examples.tolist()])


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


@contextmanager
def _borrowed(module: nn.Module) -> Iterator[None]:
    """Weights, buffers, modes, gradients and what requires them, as before at the end."""
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
