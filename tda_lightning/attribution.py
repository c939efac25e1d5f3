"""Turn a recorded trajectory into scores: the training pass is ``Trainer.predict``."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tda_lightning.callbacks.processes import (
    Processes,
    require_same_plan,
    require_scorable,
    written_by_first,
)
from tda_lightning.callbacks.progress import passing_trainer
from tda_lightning.compiled import run_eagerly, uncompiled
from tda_lightning.estimators import Estimator
from tda_lightning.gradients import GradientEngine
from tda_lightning.gradients.check import largest_errors
from tda_lightning.loading import ExampleSource, PassLoader
from tda_lightning.matching import (
    attributed_parameters,
    require_one_stage,
    require_same_data,
    require_same_parameters,
)
from tda_lightning.passes import Context, Plan
from tda_lightning.planning import AttributionPlan, PeakMemory, Rehearsal, clock
from tda_lightning.provenance import fisher_of, package_versions
from tda_lightning.scores import MemorySink, Scores, ScoreSink
from tda_lightning.store.randomness import unchanged_randomness
from tda_lightning.tasks import AttributionTask, as_task, example_noise, silenced
from tda_lightning.trajectory import Trajectory

# Examples that the engine plans and checks itself on, and that identify code in the cache's key.
_FIRST = 32


class AttributionModule(LightningModule):
    """Scores of training examples for queries, from a recorded trajectory.

    Args:
        module: an instance of the module that was trained, compiled or not (it is run without the
            compiler); its weights come from the trajectory and are put back as they were at the
            end.
        trajectory: a folder that :class:`~tda_lightning.TrajectoryRecorder` wrote, or a
            :class:`~tda_lightning.Trajectory`.
        estimator: one of ``tda_lightning.estimators``.
        task: the training loss and the measurement; None for the module's own ``training_step``.

    Raises:
        TrajectoryNotFoundError: the folder holds no trajectory.
        TrajectoryMismatchError: the module's parameters are not the recorded ones.
    """

    def __init__(
        self,
        module: nn.Module,
        trajectory: str | Trajectory,
        estimator: Estimator,
        task: AttributionTask | None = None,
    ):
        super().__init__()
        self.module = uncompiled(module)
        self.trajectory = (
            trajectory if isinstance(trajectory, Trajectory) else Trajectory.load(str(trajectory))
        )
        self.estimator = estimator
        self.task = as_task(task)
        require_same_parameters(self.module, self.trajectory)
        self.trajectory.require_optimizer()
        require_one_stage(self.trajectory)
        self._plan = Plan([])
        self._running = -1
        # A pass of few batches leaves some processes none.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def attribute(
        self,
        train: Any,
        query: Any,
        batch_size: int = 256,
        trainer: Trainer | None = None,
        scores_path: str | None = None,
        self_influence: bool = True,
        overwrite: bool = False,
        provenance: Mapping[str, Any] | None = None,
    ) -> Scores:
        """Score every training example for every query.

        Args:
            train: the recorded training set, a ``Dataset`` or a ``DataLoader`` over it. Column n
                of the scores is its index n, whatever the loader's order.
            query: what to explain, likewise.
            batch_size: examples per batch where a data set was given.
            trainer: runs the passes: its devices, strategy and precision; by default one device.
            scores_path: stream the scores to this HDF5 file instead of holding them in memory.
            self_influence: also score every training example for itself.
            overwrite: replace a file at ``scores_path``.
            provenance: what the caller has to say of how the scores were made, added to ours.

        Raises:
            TrajectoryMismatchError: ``train`` is not the data of the run.
            ValueError: an empty set, labels out of range, an impossible setting.
            NonFiniteError: a loss or a score is NaN or infinite.
        """
        began = time.monotonic()
        if trainer is not None:
            require_scorable(trainer)
        examples = ExampleSource.of(train, batch_size, "training")
        queries = ExampleSource.of(query, batch_size, "query")
        require_same_data(self.trajectory, examples.dataset)
        runner = trainer or passing_trainer()
        if len(examples) < runner.world_size:
            raise ValueError(
                f"{len(examples)} training examples cannot be shared by {runner.world_size} "
                "processes: give a trainer with fewer devices."
            )
        with self._prepared(runner.strategy.root_device):
            context = self._context(examples, queries, self_influence)
            # The sink needs the number of segments, and the plan only names the sink later.
            context.sink = sink = self._sink(context, scores_path, overwrite, runner)
            try:
                plan = self.estimator.plan(context)
                self._run(runner, context, plan, examples)
                made = self._provenance(context, plan, runner) | self._about_queries(context)
                made["seconds"] = round(time.monotonic() - began, 3)
                scores = sink.finish({**made, **(provenance or {})})
            except BaseException:
                sink.abort()
                raise
        if scores_path is not None and runner.world_size > 1:
            Processes.of(runner).by_first(lambda: scores.save(scores_path, overwrite=overwrite))
        return scores

    def check(self, train: Any, query: Any, examples: int = 8) -> dict[str, float]:
        """Compare the engine with plain autograd, example by example, on this model and data.

        Prints and returns the largest relative error of each layer over the first ``examples``
        training examples (training loss) and queries (measurement).
        """
        errors: dict[str, float] = {}
        with self._prepared():
            training = ExampleSource.of(train, examples, "training")
            queries = ExampleSource.of(query, examples, "query")
            context = self._context(training, queries, self_influence=False)
            for source, loss in ((training, context.train_loss), (queries, context.measurement)):
                batch, indices = self._first_batch(source, examples)
                found = largest_errors(context.engine, loss, batch, indices)
                for name, error in found.items():
                    errors[name] = max(error, errors.get(name, 0.0))
        table = Table("layer", "largest relative error", title="Engine against plain autograd")
        for name, error in errors.items():
            table.add_row(name, f"{error:.1e}")
        Console().print(table)
        return errors

    def plan(
        self,
        train: Any,
        query: Any,
        batch_size: int = 256,
        trainer: Trainer | None = None,
        self_influence: bool = True,
    ) -> AttributionPlan:
        """How long and large :meth:`attribute` will be here, in one process; nothing is written."""
        with PeakMemory() as memory, unchanged_randomness():
            began = clock.now()
            examples = ExampleSource.of(train, batch_size, "training")
            queries = ExampleSource.of(query, batch_size, "query")
            require_same_data(self.trajectory, examples.dataset)
            device = (trainer or passing_trainer()).strategy.root_device
            with self._prepared(device):
                context = self._context(examples, queries, self_influence)
                placed = functools.partial(self._placed, device=device)
                rehearsal = Rehearsal(self.estimator, context, examples, placed, memory)
                return rehearsal.plan(began, lambda: self._about_queries(context))

    # The walk: one ``Trainer.predict`` over one loader per pass.

    def setup(self, stage: str) -> None:
        # Before Lightning asks all processes for the length of each pass.
        require_same_plan([(one.title, one.step) for one in self._plan.passes])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        part, indices, position = batch
        self._start_through(dataloader_idx)
        self._plan.passes[dataloader_idx].accumulate(part, indices, position)
        return indices  # Lightning warns of a step that returns nothing

    def on_predict_epoch_end(self) -> None:
        # A process may have had no batch of the last passes.
        self._start_through(len(self._plan.passes))

    def _start_through(self, number: int) -> None:
        """End the pass under way and start those up to ``number``, in the same order everywhere."""
        passes = self._plan.passes
        while self._running < number:
            if self._running >= 0 and (end := passes[self._running].end) is not None:
                end()
            self._running += 1
            if self._running < len(passes):
                one = passes[self._running]
                self._current.load(one.step)
                if one.begin is not None:
                    one.begin()

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        part, indices, position = batch
        return self._placed(part, device), indices.to(device), position

    def _placed(self, batch: Any, device: torch.device) -> Any:
        """A batch on the device, by the module's own transfer hooks where it has them."""
        if not isinstance(self.module, LightningModule):
            return super().transfer_batch_to_device(batch, device, 0)
        batch = self.module.on_before_batch_transfer(batch, 0)
        batch = self.module.transfer_batch_to_device(batch, device, 0)
        return self.module.on_after_batch_transfer(batch, 0)

    def _run(self, trainer: Trainer, context: Context, plan: Plan, examples: ExampleSource) -> None:
        if not plan.passes:
            return
        self._plan, self._running, self._current = plan, -1, context
        loaders = [PassLoader(examples, one.order) for one in plan.passes]
        with _gradients_in_predict(trainer):
            trainer.predict(self, loaders, return_predictions=False)  # type: ignore[arg-type]
        # Lightning leaves the module on the CPU.
        self.module.to(trainer.strategy.root_device)
        # Lightning's loop has no end for a process without any batch.
        self._start_through(len(plan.passes))
        if trainer.world_size > 1 and isinstance(context.sink, MemorySink):
            for matrix in (context.sink.values, context.sink.by_segment):
                if matrix is not None:
                    matrix.copy_(self._reduced(matrix))

    def pass_title(self, number: int) -> str:
        """What pass ``number`` does, for the progress bar."""
        passes = self._plan.passes
        return f"{passes[number].title} ({number + 1}/{len(passes)})"

    @contextmanager
    def _prepared(self, device: torch.device | None = None) -> Iterator[None]:
        """Eval mode and silent logging, on ``device``; weights, buffers, modes and device as
        before at the end."""
        with run_eagerly(self.module), self._borrowed(device):
            yield

    @contextmanager
    def _borrowed(self, device: torch.device | None) -> Iterator[None]:
        modes = {part: part.training for part in self.module.modules()}
        before = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        home = next(self.module.parameters()).device
        self.module.eval()
        try:
            # Plans place their tensors where the module is, so it moves before Lightning moves it.
            self.module.to(device or home)
            with silenced(self.module):
                yield
        finally:
            self.module.to(home)
            with torch.no_grad():
                # By name: moving a module replaces its buffers.
                for name, tensor in self._tensors().items():
                    tensor.copy_(before[name])
            for part, mode in modes.items():
                part.training = mode

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}

    def _context(
        self, examples: ExampleSource, queries: ExampleSource, self_influence: bool
    ) -> Context:
        engine = GradientEngine(self.module, attributed_parameters(self.trajectory, self.task))
        batch, indices = self._first_batch(examples, _FIRST)
        context = Context(
            module=self.module,
            task=self.task,
            trajectory=written_by_first(self.trajectory),
            engine=engine,
            sink=MemorySink(len(queries), len(examples)),
            num_train=len(examples),
            num_query=len(queries),
            queries=lambda start, stop: self._query_batches(queries, start, stop),
            reduce=self._reduced,
            alike=lambda steps: self._alike(context, steps, batch, indices),
            self_influence=self_influence,
            batch_size=examples.batch_size,
        )
        context.load(self.trajectory.last_step)
        self.task.training_batch_size = self.trajectory.batch_size
        with example_noise(0, indices):
            self.task.prepare(self.module, batch)
        engine.discover(context.train_loss, batch, indices, self.task.separable)
        return context

    def _first_batch(self, source: ExampleSource, count: int) -> tuple[Any, Tensor]:
        batch, indices = next(iter(source.loader([range(min(count, len(source)))])))
        device = next(self.module.parameters()).device
        return self._placed(batch, device), indices.to(device)

    def _query_batches(
        self, queries: ExampleSource, start: int, stop: int
    ) -> Iterable[tuple[Any, Tensor]]:
        device = next(self.module.parameters()).device
        for batch, indices in queries.loader(queries.batches(start, stop)):
            yield self._placed(batch, device), indices.to(device)

    def _sink(
        self, context: Context, path: str | None, overwrite: bool, trainer: Trainer
    ) -> ScoreSink:
        sizes = (context.num_query, context.num_train, self.estimator.segment_count(context))
        if path is None:
            return MemorySink(*sizes, dtype=context.dtype)
        # The one file format of scores lives with the other files.
        from tda_lightning.store.scores_file import ScoreFile

        if trainer.world_size > 1:
            # Saved at the end by one process; whether it can be is known before the work.
            Processes.of(trainer).by_first(
                lambda: ScoreFile(path, *sizes, dtype=context.dtype, overwrite=overwrite).abort()
            )
            return MemorySink(*sizes, dtype=context.dtype)
        return ScoreFile(path, *sizes, dtype=context.dtype, overwrite=overwrite)

    def _reduced(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    def _alike(self, context: Context, steps: Sequence[int], batch: Any, indices: Tensor) -> str:
        """Digest of weights, data, task and code, as far as it can be seen.

        Code is seen by what it computes: the losses of the first examples at each checkpoint.
        """
        digest = hashlib.sha256()
        held = context.held_step
        for step in steps:
            context.load(step)
            for name, value in sorted(self.module.state_dict().items()):
                digest.update(name.encode())
                plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(plain.numpy().tobytes())
            with torch.no_grad():
                losses = context.train_loss(self.module, batch, indices)
            digest.update(json.dumps([f"{loss:.3e}" for loss in losses.tolist()]).encode())
        context.load(held)
        facts = self.trajectory.facts
        about = [facts.num_examples, dict(facts.fingerprint or {}), self.task.settings()]
        digest.update(json.dumps(about, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def _provenance(self, context: Context, plan: Plan, trainer: Trainer) -> dict[str, Any]:
        estimator = self.estimator
        options: dict[str, Any] = (
            asdict(estimator) if is_dataclass(estimator) and not isinstance(estimator, type) else {}
        )
        notes = [*self.task.notes, *plan.notes]
        if generic := context.engine.generic:
            notes.append(f"Through torch.func, one by one: {', '.join(generic)}.")
        curvature = options.get("curvature")
        return {
            "estimator": type(estimator).__name__,
            "settings": options,
            "curvature": curvature,
            "fisher": fisher_of(curvature, self.task),
            "task": self.task.settings(),
            "trajectory": self.trajectory.path or "in memory",
            "model": type(self.module).__name__,
            "steps": self.trajectory.last_step,
            "num_train": context.num_train,
            "trained_parameters": sum(block.size for block in context.blocks),
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "device": str(trainer.strategy.root_device),
            "versions": package_versions(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "notes": notes,
            **plan.provenance,
        }

    def _about_queries(self, context: Context) -> dict[str, Any]:
        """Measurements and, where the task has words for them, predictions of the final model."""
        context.load(self.trajectory.last_step)
        measurements: list[float] = []
        predictions: list[str] | None = []
        with torch.no_grad():
            for batch, indices in context.queries(0, context.num_query):
                measurements += context.measurement(self.module, batch, indices).tolist()
                with example_noise(0, indices):
                    words = self.task.prediction(self.module, batch)
                predictions = None if words is None or predictions is None else predictions + words
        found: dict[str, Any] = {"measurements": measurements}
        return found if predictions is None else {**found, "predictions": predictions}


@contextmanager
def _gradients_in_predict(trainer: Trainer) -> Iterator[None]:
    """``Trainer.predict`` without inference mode, which would forbid gradients."""
    before = trainer.predict_loop.inference_mode
    trainer.predict_loop.inference_mode = False
    try:
        yield
    finally:
        trainer.predict_loop.inference_mode = before
