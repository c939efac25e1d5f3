"""What an estimator asks for, and what it is given: passes over the training set at checkpoints.

An estimator plans its passes ahead; whoever owns the loaders (``attribution.py``) runs them, one
after another, on whatever devices and processes there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning.gradients import Block, ExampleGradients, GradientEngine
from tda_lightning.records.errors import TrajectoryMismatchError
from tda_lightning.records.score_sinks import ScoreSink
from tda_lightning.records.trajectory import Checkpoint, Trajectory
from tda_lightning.replay.run import fetch, place
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.tasks import AttributionTask, example_noise, gauss_newton_losses

NO_SELF = (
    "No self-influence over several stages: an example of an earlier stage has no measurement of "
    "its own on the final model. Attribute that stage's trajectory alone, or ask for examples as "
    "queries."
)


@dataclass
class Pass:
    """One walk over the training set.

    Attributes:
        title: a few words for the progress bar.
        step: the checkpoint whose weights the module holds.
        accumulate: called with every batch, its example indices, int64 [batch], and the batch's
            position in ``order``.
        begin: called before the first batch, the weights being in place.
        end: called after the last batch of every process.
        order: the batches as lists of example indices; None for every example once.
        catches_up: ``end`` only does what is left where another process had the last batches.
        stage: whose weights and training set these are, where a run has several stages.
        rows: steps of the run to visit in this order, in every process, instead of batches: for
            work that fetches its batches itself. ``accumulate`` is called with None, the row,
            int64 [1], and its position.
        returns: the rows are those of the pass before, the last one first, and need what it kept.
        holds: bytes of main memory that it and those before have filled for later passes, or its
            rows for those after them, when all are done.
    """

    title: str
    step: int
    accumulate: Callable[[Any, Tensor, int], None]
    begin: Callable[[], None] | None = None
    end: Callable[[], None] | None = None
    order: Sequence[Sequence[int]] | None = None
    catches_up: bool = False
    stage: int = 0
    rows: Sequence[int] | None = None
    returns: bool = False
    holds: int = 0


@dataclass
class Plan:
    """The passes of an attribution and what a reader should know of how it was made.

    Attributes:
        then: called once the passes have run, plans the rest: passes that depend on what was found.
    """

    passes: list[Pass]
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    then: Callable[[], Plan] | None = None

    def rest(self) -> Plan | None:
        """What is left to do once these passes have run, with all that is known by then; None
        when nothing is."""
        if self.then is None:
            return None
        found = self.then()
        # In place: its own passes may have more to say later on.
        for name, value in self.provenance.items():
            found.provenance.setdefault(name, value)
        found.notes[:0] = self.notes
        return found


@dataclass
class Held:
    """The checkpoint that a module holds; stages that train one module share it."""

    trajectory: Trajectory | None = None
    step: int | None = None


@dataclass
class Context:
    """Everything an estimator works with.

    Attributes:
        examples: the training set.
        queries: loads the query examples from ``start`` to ``stop`` afresh, as (batch, query
            indices) on the right device.
        reduce: sums a tensor over processes.
        alike: identifies everything that curvature depends on besides its own settings: weights,
            data, task, code (a string that is part of the cache's key).
        held: what the module holds, shared with whoever else loads weights into it.
        world_size: processes that will share the passes.
        rehearsal: every pass visits its first few batches or rows only. No pass leads to where the
            next one begins, so that what is found on the way tells nothing of the run.
    """

    module: nn.Module
    task: AttributionTask
    trajectory: Trajectory
    engine: GradientEngine
    sink: ScoreSink
    num_train: int
    num_query: int
    examples: ExampleSource
    queries: Callable[[int, int], Iterable[tuple[Any, Tensor]]]
    reduce: Callable[[Tensor], Tensor]
    alike: Callable[[Sequence[int]], str]
    self_influence: bool = True
    batch_size: int = 256
    held: Held = field(default_factory=Held)
    world_size: int = 1
    rehearsal: bool = False
    _weights: dict[int, Checkpoint] = field(default_factory=dict)

    @property
    def blocks(self) -> list[Block]:
        return self.engine.blocks

    @property
    def held_step(self) -> int:
        """The checkpoint whose weights the module holds."""
        if self.held.trajectory is not self.trajectory or self.held.step is None:
            raise RuntimeError("No checkpoint has been loaded yet: call load(step) first.")
        return self.held.step

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the scores: float64 for a module in float64, else float32."""
        own = next(self.module.parameters()).dtype
        return own if own == torch.float64 else torch.float32

    def load(self, step: int) -> None:
        """Put the weights and buffers of the checkpoint at ``step`` into the module.

        What was read stays in memory: some passes go back and forth between checkpoints.
        """
        if self.held.trajectory is self.trajectory and self.held.step == step:
            return
        if step not in self._weights:
            read = self.trajectory.checkpoints[step]
            self._weights[step] = Checkpoint(step, read.parameters, read.buffers)
        checkpoint = self._weights[step]
        own = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        with torch.no_grad():
            for name, value in {**checkpoint.buffers, **checkpoint.parameters}.items():
                _require_like(own.get(name), value, name, step)
                own[name].copy_(value)
        self.held.trajectory, self.held.step = self.trajectory, step

    def batches(self, order: Iterable[Sequence[int]]) -> Iterator[tuple[Any, Tensor]]:
        """Training examples by their indices, batch by batch, as (batch, indices) on the module's
        device: for work that goes its own way through them (``Pass.rows``)."""
        for chosen in order:
            indices = torch.as_tensor(chosen, dtype=torch.int64)
            yield place(fetch(self.examples, indices), self.module), indices.to(self.device)

    def train_gradients(self, batch: Any, examples: Tensor) -> ExampleGradients:
        """Per-example gradients of the training loss."""
        return self.engine.gradients(self.train_loss, batch, examples)

    def measurement_gradients(self, batch: Any, examples: Tensor) -> ExampleGradients:
        """Per-example gradients of the measurement."""
        return self.engine.gradients(self.measurement, batch, examples)

    def fisher_gradients(self, batch: Any, examples: Tensor, seed: int) -> ExampleGradients:
        """Per-example gradients whose second moment estimates the Gauss-Newton matrix: of the
        loss under sampled labels, or of the loss itself (empirical Fisher)."""
        if not self.task.can_sample:
            return self.train_gradients(batch, examples)

        def sampled(module: nn.Module, part: Any, indices: Tensor) -> Tensor:
            with example_noise(seed, indices):
                return self.task.sampled_loss(module, part)

        return self.engine.gradients(sampled, batch, examples)

    def gauss_newton_gradients(self, batch: Any, examples: Tensor) -> Iterable[ExampleGradients]:
        """Per-example gradients whose outer products sum to the exact Gauss-Newton matrix."""

        def factors(module: nn.Module, part: Any, indices: Tensor) -> Iterable[Tensor]:
            with example_noise(0, indices):
                return gauss_newton_losses(self.task, module, part)

        return self.engine.each_gradient(factors, batch, examples)

    def train_loss(self, module: nn.Module, batch: Any, examples: Tensor) -> Tensor:
        # The noise is not used; its context tells the task how many examples there are.
        with example_noise(0, examples):
            return self.task.train_loss(module, batch)

    def measurement(self, module: nn.Module, batch: Any, examples: Tensor) -> Tensor:
        with example_noise(0, examples):
            return self.task.measurement(module, batch)


@dataclass(frozen=True)
class Stage:
    """One of several consecutive stages of training: another loss, data, head or set of trained
    parameters. It begins with the weights that the stage before it ended with.

    Attributes:
        context: of the parameters that the stage trains. Its ``queries`` are those of the final
            model.
        wide: of those and the frozen ones; ``context`` itself where none is frozen.
        frozen: parameters that an earlier stage trained and this one only uses.
        carried: parameters of ``wide`` whose values come from the stage before.
        run: position of the recorded run; one run has several stages where the set of trained
            parameters changed in it, and they share its columns.
        columns: of the stage's training set among those of the scores.
        first_step: steps of all stages before it.
    """

    context: Context
    wide: Context
    frozen: tuple[str, ...]
    carried: tuple[str, ...]
    run: int
    columns: range
    first_step: int


def numbered(passes: Sequence[Pass], stage: int) -> list[Pass]:
    """The passes of one stage among several."""
    return [replace(one, stage=stage, title=f"stage {stage + 1}, {one.title}") for one in passes]


def memory_budget() -> int:
    """Bytes that dense query gradients may take: a quarter of what the machine has free."""
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return 1 << 30


def _require_like(own: Tensor | None, value: Tensor, name: str, step: int) -> None:
    """Refuse a tensor that the module lacks, or has in another shape: copying may broadcast."""
    if own is None or own.shape != value.shape:
        found = "no such tensor" if own is None else list(own.shape)
        raise TrajectoryMismatchError(
            f"The checkpoint of step {step} does not fit the module: expected {name} of shape "
            f"{list(value.shape)}, got {found}. Build the module as it was trained."
        )
