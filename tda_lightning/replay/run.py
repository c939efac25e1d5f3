"""A recorded run trained again: from any checkpoint, with the recorded batches, rates and draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from tda_lightning.optimizers import (
    STEP_COUNT,
    apply_settings,
    make_optimizer,
    recorded_states,
    rule_of,
)
from tda_lightning.records.data_module import require_data_module
from tda_lightning.records.errors import TrajectoryMismatchError, UnsupportedTrainingError
from tda_lightning.records.trajectory import Trajectory, require_one_stage
from tda_lightning.replay.expected_squares import ExpectedSquares, expects_squares
from tda_lightning.runtime.compiled import uncompiled
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.module_state import borrowed, load_tensors, restored
from tda_lightning.runtime.random_states import Snapshot, unchanged_randomness
from tda_lightning.session.moments import show
from tda_lightning.tasks import AttributionTask, run_training_step, seeded_examples

State = dict[str, Tensor]

_CHANGED = 1e-6  # relative change of a gradient's norm that is more than rounding
_CHANGED_BY = {
    "own": "The module's own configure_gradient_clipping",
    "hooks": "A hook (on_after_backward or on_before_optimizer_step)",
}


@dataclass(frozen=True)
class Draws:
    """States of the random generators before a batch was fetched and before its forward pass."""

    fetch: Snapshot
    forward: Snapshot


@dataclass(frozen=True)
class ReplaySnapshot:
    """What a :class:`Walk` needs to go on from a step."""

    tensors: State
    optimizer: Mapping[str, State]
    random: Snapshot | None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        states = [t for state in self.optimizer.values() for t in state.values()]
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), *states))


class Replay:
    """What does not change from step to step.

    Args:
        trajectory: the recorded run.
        module: built as it was trained.
        task: gives each example's loss.
        source: the recorded training set.
        training: replay in train mode, as Lightning trains; False for eval mode. Parts that the
            run is known to have kept in eval mode (``settings["eval_modules"]``) stay in it.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        module: nn.Module,
        task: AttributionTask,
        source: ExampleSource,
        training: bool = True,
    ) -> None:
        self.trajectory = trajectory
        self.module = uncompiled(module)
        self.task = task
        self.training = training
        self.source = source
        settings = trajectory.facts.settings
        self.clip = settings.get("gradient_clip_val")
        self.clip_by_value = clips_by_value(settings)
        still = settings.get("eval_modules")
        self.eval_modules = frozenset(still if isinstance(still, list) else ())
        # Of a loader with workers, fetching draws nothing from this process's generators.
        self._fetched_elsewhere = bool(settings.get("loader_workers"))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.module.parameters()).device

    @cached_property
    def knows_randomness(self) -> bool:
        """Whether the states of the random generators were recorded."""
        recorded = self.trajectory.facts.settings.get("random") == "recorded"
        return recorded and self.trajectory.checkpoints[0].random is not None

    def check(self) -> None:
        """Refuse what cannot be replayed.

        Raises:
            UnsupportedTrainingError: no recorded batches, several stages, another optimizer, the
                module's own clipping, or mixed precision.
            TrajectoryMismatchError: another number of training examples than recorded, or a data
                module is missing.
        """
        facts, steps = self.trajectory.facts, self.trajectory.steps
        require_data_module(facts, self.source)
        rule_of(self.trajectory)
        if not len(steps.examples):
            raise UnsupportedTrainingError(
                "The trajectory holds no example indices, so its batches cannot be replayed: "
                f"indices are {facts.settings.get('indices', 'absent')}."
            )
        require_one_stage(self.trajectory)
        _require_plain_gradients(self.trajectory)
        precision = str(facts.settings.get("precision", "32-true"))
        if precision not in ("32-true", "64-true", "32", "64"):
            raise UnsupportedTrainingError(
                f"The run was trained with precision={precision}; the replay is written for "
                "32-true and 64-true, and would land elsewhere."
            )
        if facts.num_examples not in (None, len(self.source)):
            raise TrajectoryMismatchError(
                f"The training set is not the recorded one: expected {facts.num_examples} "
                f"examples, got {len(self.source)}."
            )
        with borrowed(self.module):
            self.see(0, 0)
            self.source.checked(self.module).require_order()

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """The module in the modes of the run, with only its trained parameters requiring
        gradients."""
        with restored(self.module, "modes", "requires_grad", "gradients"), torch.enable_grad():
            self.module.train(self.training)
            for name, part in self.module.named_modules():
                if name in self.eval_modules:
                    part.training = False
            for name, parameter in self.module.named_parameters():
                parameter.requires_grad_(name in self.trajectory.facts.parameters)
            yield

    def see(self, row: int, batch: int) -> None:
        """Let the module's steps see what they saw at this batch of step ``row + 1``."""
        show(self.module, self.trajectory, row, batch, self.source)

    def fetch(self, examples: Tensor) -> object:
        """The batch of these examples, on the device of the module."""
        return self.source.batch(examples, self.module)

    def fetched(self, examples: Tensor, before: Snapshot) -> tuple[object, Snapshot]:
        """:meth:`fetch` with the generators as they were ``before``; how it leaves them."""
        if self._fetched_elsewhere:
            batch = self.source.read(examples.tolist())
            before.restore()
        else:
            before.restore()
            batch = self.source.read(examples.tolist())
        return self.source.placed(batch, self.module, examples), Snapshot.take()

    def loss_as_trained(self, batch: object, examples: Tensor) -> Tensor:
        """The mean loss of a batch: what a LightningModule's ``training_step`` returns, else the
        task's; of a what-if run, with its weights on the examples."""
        if (weights := self.trajectory.data_weights) is not None:
            return self.weighted(batch, examples, weights)[0]
        if hasattr(self.module, "training_step"):
            return run_training_step(self.module, batch)
        with seeded_examples(0, examples, own_noise=False):
            losses = self.task.train_loss(self.module, batch)
        return losses.sum() * self.task.share(len(losses))

    def weighted(self, batch: object, examples: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch with ``weights`` [train] on the examples, and their parts in it at
        weight 1, [batch]; or with weights [train, position] on the terms of their losses (the
        tokens of a sequence), [batch, position]."""
        by_position = weights.dim() == 2
        with seeded_examples(0, examples, own_noise=False):
            total, parts = self.task.batch_loss(self.module, batch, by_position)
        own = weights[examples].to(parts)
        if by_position:
            own = own[:, : parts.shape[1]]  # sequences of another batch may be longer
        return total + ((own - 1) * parts).sum(), parts


def _require_plain_gradients(trajectory: Trajectory) -> None:
    """Refuse a run in which the module, or a callback, changed gradients before a step."""
    kind, steps = trajectory.facts.settings.get("clipping"), trajectory.steps
    changed = (steps.clipping - 1).abs() > _CHANGED
    if kind not in _CHANGED_BY or not bool(changed.any()):
        return
    raise UnsupportedTrainingError(
        f"{_CHANGED_BY[kind]} changed the gradients of {int(changed.sum())} of {len(steps)} steps, "
        "and a replay without Lightning does not call it. Use Trainer(gradient_clip_val=...), "
        "parameter groups, or terms of the loss."
    )


class Walk:
    """The recorded run, taken up at a checkpoint and trained on by torch.optim, step by step.

    Whoever walks does so within :meth:`Replay.as_trained`, with the module silenced. Random
    generators are the walk's own where their states were recorded; otherwise a step that draws is
    refused.
    """

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        module, facts = replay.module, replay.trajectory.facts
        self.trained = {name: module.get_parameter(name) for name in facts.parameters}
        self.optimizer = make_optimizer(replay.trajectory, self.trained)
        # States that it begins with.
        self._initial = {name: self.state_of(name) for name in self.trained}
        self._expected: ExpectedSquares | None = None
        if expects_squares(replay.trajectory):
            rule = rule_of(replay.trajectory)
            self._expected = ExpectedSquares(replay.trajectory, rule, self.trained)
        self.random: Snapshot | None = None

    def restart(self, step: int) -> None:
        """Take up the run at the checkpoint of ``step``, whose optimizer state was recorded."""
        trajectory = self.replay.trajectory
        checkpoint = trajectory.checkpoints[step]
        optimizer = {} if checkpoint.optimizer is None else recorded_states(trajectory, step)
        random = None
        if self.replay.knows_randomness and checkpoint.random is not None:
            random = Snapshot.of(checkpoint.random)
        tensors = {**checkpoint.buffers, **checkpoint.parameters}
        self.resume_from(ReplaySnapshot(tensors, optimizer, random))  # type: ignore[arg-type]

    def snapshot(self) -> ReplaySnapshot:
        """A copy of where the walk is."""
        module = self.replay.module
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return ReplaySnapshot(
            {name: tensor.detach().clone() for name, tensor in tensors.items()},
            {
                name: {key: value.clone() for key, value in self.state_of(name).items()}
                for name in self.trained
            },
            self.random,
        )

    def resume_from(self, where: ReplaySnapshot) -> None:
        """Take up the walk at ``where``."""
        load_tensors(self.replay.module, where.tensors)
        self.optimizer.state.clear()
        for name, parameter in self.trained.items():
            if state := where.optimizer.get(name) or self._initial[name]:
                self.optimizer.state[parameter] = {
                    # torch.optim keeps the count of steps on the CPU.
                    key: value.to("cpu" if key == STEP_COUNT else parameter.device, copy=True)
                    for key, value in state.items()
                }
        self.random = where.random

    def state_of(self, name: str) -> State:
        """State of the optimizer of one parameter, by torch.optim's own names."""
        state = self.optimizer.state.get(self.trained[name], {})
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}

    def batches(self, row: int) -> Iterator[tuple[object, Tensor, Draws | None]]:
        """The batches of a step with their examples, generators being as they were then."""
        steps = self.replay.trajectory.steps
        first = int(steps.batch_offsets[row])
        for position, examples in enumerate(steps.batches(row), start=first):
            self.replay.see(row, position - first)
            if self.random is None:
                with no_randomness():
                    batch = self.replay.fetch(examples)
                    yield batch, examples, None
                continue
            recorded = steps.random.get(position)
            before = self.random if recorded is None else Snapshot.of(recorded)
            with unchanged_randomness():
                batch, forward = self.replay.fetched(examples, before)
                forward.restore()
                yield batch, examples, Draws(before, forward)
                self.random = Snapshot.take()

    def step(self, row: int, weights: Tensor | None = None) -> tuple[float, list[Draws | None]]:
        """Train one step: row ``row`` of the table, the step ``row + 1``.

        Gradients, as the backward pass left them and before clipping, are seen by overriding
        :meth:`on_gradients`.

        Args:
            weights: [train], what each example's loss is multiplied by, or [train, position] for
                the terms of its loss; None for the run as it was, by its own ``training_step``.

        Returns:
            The mean loss of its batches, and what they drew.
        """
        replay, steps = self.replay, self.replay.trajectory.steps
        apply_settings(replay.trajectory, self.optimizer, row)
        self.optimizer.zero_grad()
        accumulation = int(steps.accumulation[row])
        weights = replay.trajectory.data_weights if weights is None else weights
        losses, draws = [], []
        for number, (batch, examples, drawn) in enumerate(self.batches(row)):
            if weights is None:
                loss = replay.loss_as_trained(batch, examples)
            else:
                loss, parts = replay.weighted(batch, examples, weights)
                if self._expected is not None:
                    self._expected.add_batch(row, number, parts, weights[examples], accumulation)
            (loss / accumulation).backward()
            losses.append(float(loss.detach()))
            draws.append(drawn)
        self.on_gradients(row)
        clipping = self._clip()
        if self._expected is not None:
            self._expected.enter(row, self.optimizer, clipping)
        self.optimizer.step()
        return sum(losses) / len(losses), draws

    def on_gradients(self, row: int) -> None:
        """Called when the gradients of a step are complete."""

    def _clip(self) -> float:
        """Clip the gradients; what clipping by norm multiplied them by."""
        limit, utils = self.replay.clip, torch.nn.utils
        if not limit:
            return 1.0
        # In the optimizer's order, as in training: the order decides the norm's last bit.
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.replay.clip_by_value:
            utils.clip_grad_value_(parameters, limit)
            return 1.0
        return min(1.0, limit / (float(utils.clip_grad_norm_(parameters, limit)) + 1e-6))


def clips_by_value(settings: Mapping[str, object]) -> bool:
    """Whether gradients were clipped by value, if at all."""
    # Older runs hold the name of Lightning's own constant.
    algorithm = str(settings.get("gradient_clip_algorithm", "norm"))
    return algorithm in ("value", "GradClipAlgorithmType.VALUE")


def weighted_loss(
    task: AttributionTask, module: nn.Module, batch: object, weights: Tensor
) -> Tensor:
    """A batch's loss as trained with weights on its examples. What it divides by is kept, and so is
    what belongs to no example."""
    total, parts = task.batch_loss(module, batch)
    return total + ((weights.to(parts) - 1) * parts).sum()


def initial(trajectory: Trajectory) -> State:
    """Initial parameters and buffers."""
    first = trajectory.checkpoints[0]
    return {**first.buffers, **first.parameters}


@contextmanager
def no_randomness() -> Iterator[None]:
    """Refuse a loss that draws random numbers: their recorded draws are not known."""
    before = torch.get_rng_state()
    yield
    if not torch.equal(before, torch.get_rng_state()):
        raise UnsupportedTrainingError(
            "The training loss draws random numbers (dropout, for instance), and the trajectory "
            "does not hold the states of the random generators, so the run cannot be replayed. "
            "Record it again, in one process."
        )
