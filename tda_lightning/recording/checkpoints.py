"""The state of a training between steps: when a checkpoint is written, and what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from tda_lightning.recording.observer import Observer
from tda_lightning.recording.resume import RecorderState
from tda_lightning.recording.rng_log import RngLog
from tda_lightning.recording.trained_parameters import Trained, TrainedParameters
from tda_lightning.records.trajectory import Checkpoint, Facts
from tda_lightning.runtime.compiled import plain_buffers, plain_parameters
from tda_lightning.store.writer import TrajectoryWriter


def evenly_spaced(total: int, count: int) -> frozenset[int]:
    """Steps floor(i T / count), i = 1 to count, of T in ``total``; fewer where T is smaller."""
    return frozenset(i * total // count for i in range(1, count + 1)) - {0}


class Checkpoints(Observer):
    """The checkpoints of a run.

    Attributes:
        steps: after which one was written. 0 holds the initial weights.

    Args:
        optimizer_every: every how many checkpoints hold the optimizer's state; 0 for none.
    """

    def __init__(self, rng: RngLog, optimizer_every: int) -> None:
        self.steps = [0]
        self._rng, self._optimizer_every = rng, optimizer_every
        self._last_has_optimizer = bool(optimizer_every)
        self._trained: TrainedParameters

    def begin(self, trainer: Trainer, trained: TrainedParameters) -> None:
        self._trained = trained

    def resume(self, facts: Facts, state: RecorderState) -> None:
        self.steps, self._last_has_optimizer = list(state.checkpoints), state.state_kept

    def _takes_optimizer(self, step: int, last: bool) -> bool:
        number = len(self.steps) - (step == self.steps[-1])  # the initial one does not count
        every = self._optimizer_every
        return bool(every) and (last or number % every == 0)

    def wanted(self, step: int, last: bool) -> bool:
        """Whether a checkpoint at ``step`` is missing.

        Only its end shows which checkpoint of a run is the last; it may lack the optimizer's state.
        """
        added = self._takes_optimizer(step, last) and not self._last_has_optimizer
        return step != self.steps[-1] or added

    def read(self, step: int, with_optimizer: bool) -> Checkpoint:
        """The present state; whole tensors in the first process. Every process must call it."""
        trained = self._trained
        checkpoint = read_checkpoint(
            step, trained.module, trained.optimizer, trained.ever, with_optimizer, self._rng.left()
        )
        return checkpoint if trained.shards is None else trained.shards.checkpoint(checkpoint)

    def write(self, writer: TrajectoryWriter, step: int, last: bool) -> None:
        with_optimizer = self._takes_optimizer(step, last)
        writer.write_checkpoint(self.read(step, with_optimizer))
        self.steps += [step] * (step != self.steps[-1])
        self._last_has_optimizer = with_optimizer

    def state(self) -> dict[str, Any]:
        return {"checkpoints": tuple(self.steps), "state_kept": self._last_has_optimizer}


def best_checkpoint(trainer: Trainer) -> dict[str, Any] | None:
    """The best checkpoint that a ``ModelCheckpoint`` of the trainer has saved so far, by the metric
    it monitors; None where none does."""
    for callback in trainer.checkpoint_callbacks:
        path, monitor = (getattr(callback, n, None) for n in ("best_model_path", "monitor"))
        if path and monitor:
            score = getattr(callback, "best_model_score", None)
            score = None if score is None else float(score)
            return {"path": str(path), "monitor": str(monitor), "score": score}
    return None


def read_checkpoint(
    step: int,
    module: nn.Module,
    optimizer: Optimizer,
    trained: Trained,
    with_optimizer: bool,
    random: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """The state after ``step`` steps; ``buffers`` has every tensor that no step moves.

    Frozen parameters are among them: without these the model cannot be rebuilt.
    """
    others = {**plain_parameters(module), **plain_buffers(module)}
    states: dict[str, dict[str, Tensor]] = {}
    for name, (parameter, _) in trained.items():
        state = optimizer.state.get(parameter, {})
        states[name] = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return Checkpoint(
        step=step,
        parameters={name: parameter.detach() for name, (parameter, _) in trained.items()},
        buffers={name: tensor for name, tensor in others.items() if name not in trained},
        optimizer=states if with_optimizer else None,
        random=random,
    )
