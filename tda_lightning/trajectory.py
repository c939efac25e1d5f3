"""The plain record of a training run that every estimator reads.

Nothing here knows files or trainers: ``store`` builds a :class:`Trajectory` from a folder, a test
builds one from dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tda_lightning.errors import UnsupportedTrainingError

SUPPORTED_OPTIMIZERS = ("SGD", "Adam", "AdamW")


@dataclass(frozen=True)
class ParameterFact:
    """What is recorded of one trained parameter."""

    shape: tuple[int, ...]
    dtype: str
    group: int  # position of its parameter group in the optimizer


@dataclass(frozen=True)
class Facts:
    """What is fixed over the whole run.

    ``parameters`` lists exactly what the optimizer holds and trains, by the module's names.
    ``num_examples`` and ``fingerprint`` are None for an iterable data set. ``settings`` holds
    what is only shown: trainer settings, scheduler, seed, module class, package versions.
    """

    parameters: Mapping[str, ParameterFact]
    optimizer: str
    num_examples: int | None
    fingerprint: Mapping[str, str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Steps:
    """The optimizer steps in order, one row each: row t is step t + 1.

    Attributes:
        epoch: int64 [steps].
        learning_rate: the applied rates, float64 [steps, groups].
        hyperparameters: by name, float64 [steps, groups]. SGD: ``momentum``, ``dampening``,
            ``nesterov``, ``weight_decay``; Adam and AdamW: ``beta1``, ``beta2``, ``eps``,
            ``weight_decay``.
        loss: mean training loss of the step's batches, float64 [steps].
        gradient_norm: before clipping, float64 [steps].
        batch_offsets: int64 [steps + 1]; row t holds the batches batch_offsets[t] to [t + 1],
            several when gradients were accumulated.
        example_offsets: int64 [batches + 1] into ``examples``.
        examples: int64, the training-example indices of every batch in order. Empty when the
            data set was iterable and had none.
        accumulation: int64 [steps], the number that each batch loss of the step was divided by.
    """

    epoch: Tensor
    learning_rate: Tensor
    hyperparameters: Mapping[str, Tensor]
    loss: Tensor
    gradient_norm: Tensor
    batch_offsets: Tensor
    example_offsets: Tensor
    examples: Tensor
    accumulation: Tensor

    def __len__(self) -> int:
        return len(self.epoch)

    def batches(self, row: int) -> list[Tensor]:
        """Example indices of each batch that row ``row`` accumulated, in order."""
        first, last = int(self.batch_offsets[row]), int(self.batch_offsets[row + 1])
        bounds = self.example_offsets[first : last + 1].tolist()
        return [self.examples[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]


@dataclass(frozen=True)
class Checkpoint:
    """The state after ``step`` optimizer steps.

    ``optimizer`` maps a parameter's name to its state tensors under torch.optim's own names
    (``momentum_buffer``; ``step``, ``exp_avg``, ``exp_avg_sq``); None when it was not recorded.
    """

    step: int
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class Segment:
    """Steps ``start`` < step <= ``stop``, represented by the checkpoints after its start up to
    and including its end."""

    start: int
    stop: int
    checkpoints: tuple[int, ...]

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Trajectory:
    """A recorded run. ``checkpoints`` loads one at a time; step 0 holds the initial weights.

    ``curvature`` keeps fitted curvature by a key of everything that determines it.
    """

    facts: Facts
    steps: Steps
    checkpoints: Mapping[int, Checkpoint]
    curvature: MutableMapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    path: str | None = None

    @staticmethod
    def load(path: str) -> Trajectory:
        """The trajectory recorded in folder ``path``.

        Raises:
            TrajectoryNotFoundError: the folder holds none.
            TrajectoryFormatError: a file of it is damaged or of another format version.
        """
        # The one look upwards: a loader on the record itself is what users expect to find.
        from tda_lightning.store import open_trajectory

        return open_trajectory(path)

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def last_step(self) -> int:
        """Step of the last checkpoint: the model whose behaviour is explained."""
        return max(self.checkpoints)

    @property
    def batch_size(self) -> int | None:
        """Examples of the largest batch that one loss was taken over; None when unknown."""
        if len(self.steps.examples):
            return int(self.steps.example_offsets.diff().max())
        recorded = self.facts.settings.get("batch_size")
        return recorded if isinstance(recorded, int) else None

    def segments(self, cuts: int | Sequence[int]) -> tuple[Segment, ...]:
        """Cut the run into segments: a number of them, or the explicit steps between them.

        A number L cuts at floor(l T / L).

        Raises:
            ValueError: a segment would hold no checkpoint, or a cut lies outside the run.
        """
        total = self.last_step
        if isinstance(cuts, int):
            if cuts < 1:
                raise ValueError(f"num_segments must be at least 1, got {cuts}.")
            bounds = [part * total // cuts for part in range(cuts + 1)]
        else:
            bounds = [0, *cuts, total]
            if any(a >= b for a, b in zip(bounds, bounds[1:], strict=False)):
                raise ValueError(
                    f"Segment cuts must be increasing steps strictly between 0 and {total}, "
                    f"got {list(cuts)}."
                )
        recorded = sorted(step for step in self.checkpoints if step > 0)
        segments = []
        for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False), start=1):
            inside = tuple(step for step in recorded if start < step <= stop)
            if not inside:
                raise ValueError(
                    f"Segment {number} (steps {start} to {stop}) holds no checkpoint: asked for "
                    f"{len(bounds) - 1} segments, recorded checkpoints are at steps {recorded}. "
                    "Lower num_segments or record more checkpoints (num_checkpoints)."
                )
            segments.append(Segment(start, stop, inside))
        return tuple(segments)

    def stages(self) -> tuple[Trajectory, ...]:
        """The stretches in which one set of parameters was trained, each like a run of its own."""
        return (self,)

    def require_optimizer(self) -> str:
        """Name of the optimizer, or an error that lists the supported ones."""
        if self.facts.optimizer not in SUPPORTED_OPTIMIZERS:
            raise UnsupportedTrainingError(
                f"The run was trained with {self.facts.optimizer}, for which there is no formula. "
                f"Supported optimizers: {', '.join(SUPPORTED_OPTIMIZERS)}."
            )
        return self.facts.optimizer

    def applied_rates(self, rows: slice) -> Tensor:
        """Rates that reach the parameters, float64 [steps, groups].

        A constant gradient moves the parameters by eta (1 - tau) / (1 - mu) per step once the
        momentum buffer is warm; Adam keeps eta, its preconditioner is counted apart.
        """
        rates = self.steps.learning_rate[rows]
        if self.facts.optimizer != "SGD":
            return rates
        hyper = self.steps.hyperparameters
        momentum, dampening = hyper["momentum"][rows], hyper["dampening"][rows]
        # torch.optim.SGD looks at dampening only when there is momentum.
        kept = torch.where(momentum > 0, 1 - dampening, torch.ones_like(dampening))
        return rates * kept / (1 - momentum)
