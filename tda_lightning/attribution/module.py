"""Turn a recorded trajectory into scores: the training pass is ``Trainer.predict``."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tda_lightning.attribution.cache_key import digest_of
from tda_lightning.attribution.matching import require_same_data
from tda_lightning.attribution.processes import (
    require_same_plan,
    require_scorable,
    written_by_first,
)
from tda_lightning.attribution.progress_bar import passing_trainer
from tda_lightning.attribution.provenance import about_queries, about_stages, how_made
from tda_lightning.attribution.rehearsal import Rehearsal
from tda_lightning.attribution.stages import StageSetup, set_up, training_sets, widened
from tda_lightning.estimators import Estimator, StagedEstimator
from tda_lightning.gradients import GradientEngine
from tda_lightning.gradients.check import largest_errors
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.plans import AttributionPlan
from tda_lightning.records.provenance import Provenance
from tda_lightning.records.scores import MemorySink, Scores, ScoreSink, StageSink
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime import clock
from tda_lightning.runtime.loading import ExampleSource, PassLoader
from tda_lightning.runtime.memory import PeakMemory
from tda_lightning.runtime.module_state import prepared
from tda_lightning.runtime.processes import Processes
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.session.passes import Context, Held, Pass, Plan, Stage
from tda_lightning.tasks import AttributionTask, seeded_examples

# Examples that the engine plans and checks itself on, and that identify code in the cache's key.
_FIRST = 32


class AttributionModule(LightningModule):
    """Scores of training examples for queries, from a recorded trajectory.

    Args:
        module: an instance of the module that was trained, compiled or not (it is run without the
            compiler); its weights come from the trajectory and are put back as they were at the
            end.
        trajectory: a folder that :class:`~tda_lightning.TrajectoryRecorder` wrote, or a
            :class:`~tda_lightning.Trajectory`. Or a list of them in order of training
            (pre-training, then fine-tuning), with a list of modules and tasks, or one for all.
        estimator: one of ``tda_lightning.estimators``.
        task: the training loss and the measurement; None for the module's own ``training_step``.
        fresh: names of modules or parameters that a later trajectory initialised anew under a
            name and shape that the one before it has too.

    Raises:
        TrajectoryNotFoundError: the folder holds no trajectory.
        TrajectoryFormatError: a file of it is damaged or of another format version.
        TrajectoryMismatchError: the module's parameters are not the recorded ones, or a
            trajectory does not start from the last weights of the one before it.
        UnsupportedTrainingError: the optimizer has no formula, or several trajectories are given
            to an estimator other than ``Source``.
        ValueError: lists of different lengths.
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        trajectory: str | Trajectory | Sequence[str | Trajectory],
        estimator: Estimator,
        task: AttributionTask | Sequence[AttributionTask | None] | None = None,
        fresh: Sequence[str] = (),
    ):
        super().__init__()
        staged = isinstance(estimator, StagedEstimator)
        self.stages = set_up(module, trajectory, task, fresh, staged)
        if self.stages[-1].run > 0 and not staged:
            raise UnsupportedTrainingError(
                f"{type(estimator).__name__} knows the last stage of training alone, so it cannot "
                "score the examples of an earlier one. Use Source for several trajectories, or "
                "give the last one only."
            )
        last = self.stages[-1]
        self.module, self.trajectory, self.task = last.module, last.trajectory, last.task
        self.earlier = nn.ModuleList(one.module for one in self.stages[:-1])
        self.estimator = estimator
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
                of the scores is its index n, whatever the loader's order. For several
                trajectories a list of one each, whose columns follow one another
                (:meth:`Scores.stage`), or one for all.
            query: what to explain, likewise.
            batch_size: examples per batch where a data set was given.
            trainer: runs the passes: its devices, strategy (``ddp`` or one device) and precision;
                by default one device.
            scores_path: stream the scores to this HDF5 file instead of holding them in memory.
            self_influence: also score every training example for itself.
            overwrite: replace a file at ``scores_path``.
            provenance: what the caller has to say of how the scores were made, added to ours.

        Raises:
            TrajectoryMismatchError: ``train`` is not the data of the run.
            ValueError: an empty set, labels out of range, an impossible setting.
            NonFiniteError: a loss or a score is NaN or infinite.
        """
        began, worked = time.monotonic(), time.process_time()
        if trainer is not None:
            require_scorable(trainer)
        sets = training_sets(train, self.stages[-1].run + 1)
        examples = [ExampleSource.of(one, batch_size, "training") for one in sets]
        queries = ExampleSource.of(query, batch_size, "query")
        for setup in self.stages:
            require_same_data(setup.trajectory, examples[setup.run].dataset)
        runner = trainer or passing_trainer()
        if (fewest := min(len(one) for one in examples)) < runner.world_size:
            raise ValueError(
                f"{fewest} training examples cannot be shared by {runner.world_size} "
                "processes: give a trainer with fewer devices."
            )
        with prepared(self._modules_of_stages, runner.strategy.root_device):
            stages = self._staged(examples, queries, self_influence)
            context = stages[-1].context
            for stage in stages:
                stage.context.world_size = runner.world_size
            # The sink needs the number of segments, and the plan only names the sink later.
            counts = self._segment_counts(stages)
            total = None if counts is None else sum(counts)
            sizes = (context.num_query, stages[-1].columns.stop, total)
            sink = self._sink(sizes, context.dtype, scores_path, overwrite, runner)
            try:
                plan = self._planned(stages, sink, counts)
                self._run(runner, stages, plan, examples)
                while (rest := plan.rest()) is not None:
                    plan = rest
                    self._run(runner, stages, plan, examples)
                self._sum_over_processes(runner, sink)
                made = how_made(self.estimator, context, plan, runner)
                made |= about_queries(context) | about_stages(stages, counts)
                made["seconds"] = round(time.monotonic() - began, 3)
                # Of all threads of this process; it leaves out what else the machine was busy with.
                made["processor_seconds"] = round(time.process_time() - worked, 3)
                scores = sink.finish(cast(Provenance, {**made, **(provenance or {})}))
            except BaseException:
                sink.abort()
                raise
        if scores_path is not None and runner.world_size > 1:
            Processes.of(runner).by_first(lambda: scores.save(scores_path, overwrite=overwrite))
        return scores

    def check(self, train: Any, query: Any, examples: int = 8) -> dict[str, float]:
        """Compare the engine with plain autograd, example by example, on this model and data
        (those of the last stage, where there are several).

        Prints and returns the largest relative error of each layer over the first ``examples``
        training examples (training loss) and queries (measurement).
        """
        errors: dict[str, float] = {}
        sets = training_sets(train, self.stages[-1].run + 1)
        with prepared(self._modules_of_stages):
            training = ExampleSource.of(sets[-1], examples, "training")
            queries = ExampleSource.of(query, examples, "query")
            context = self._context(self.stages[-1], training, queries, self_influence=False)
            for source, loss in ((training, context.train_loss), (queries, context.measurement)):
                batch, indices = self._first_batch(source, examples, context.module)
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
        """How long and large :meth:`attribute` will be here, in one process; nothing is written.

        The arguments are those of :meth:`attribute`. A few batches of every pass are timed.

        Raises:
            TrajectoryMismatchError: ``train`` is not the data of the run.
            UnsupportedTrainingError: there are several stages; each is planned by itself.
            ValueError: an empty set, an impossible setting.
        """
        if len(self.stages) > 1:
            raise UnsupportedTrainingError(
                f"plan() rehearses one stage of training, got {len(self.stages)}. Plan for each of "
                "them, Trajectory.load(path).stages(), with its own module and data."
            )
        with PeakMemory() as memory, unchanged_randomness():
            began = clock.now()
            examples = ExampleSource.of(train, batch_size, "training")
            queries = ExampleSource.of(query, batch_size, "query")
            require_same_data(self.trajectory, examples.dataset)
            runner = trainer or passing_trainer()
            device = runner.strategy.root_device
            with prepared([self.module], device):
                stages = self._staged([examples], queries, self_influence)
                # Lightning's own start is a part of the work, the greater one of a small job.
                step = self.trajectory.last_step
                one = Plan([Pass("start", step, lambda *_: None, order=[[0]])])
                self._run(runner, stages, one, [examples])
                context = stages[0].context
                placed = functools.partial(self._placed, device=device, module=self.module)
                rehearsal = Rehearsal(self.estimator, context, examples, placed, memory)
                return rehearsal.plan(began, lambda: about_queries(context))

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
                self._current[one.stage].context.load(one.step)
                if one.begin is not None:
                    one.begin()

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        part, indices, position = batch
        if part is None:
            return batch
        module = self.stages[self._plan.passes[dataloader_idx].stage].module
        return self._placed(part, device, module), indices.to(device), position

    def _placed(self, batch: Any, device: torch.device, module: nn.Module) -> Any:
        """A batch on the device, by the module's own transfer hooks where it has them."""
        if not isinstance(module, LightningModule):
            return super().transfer_batch_to_device(batch, device, 0)
        batch = module.on_before_batch_transfer(batch, 0)
        batch = module.transfer_batch_to_device(batch, device, 0)
        return module.on_after_batch_transfer(batch, 0)

    def _run(
        self,
        trainer: Trainer,
        stages: Sequence[Stage],
        plan: Plan,
        examples: Sequence[ExampleSource],
    ) -> None:
        if not plan.passes:
            return
        self._plan, self._running, self._current = plan, -1, stages
        loaders = [
            PassLoader(examples[stages[one.stage].run], one.order, one.rows) for one in plan.passes
        ]
        with _gradients_in_predict(trainer):
            trainer.predict(self, loaders, return_predictions=False)  # type: ignore[arg-type]
        # Lightning leaves the module on the CPU.
        for module in self._modules_of_stages:
            module.to(trainer.strategy.root_device)
        # Lightning's loop has no end for a process without any batch.
        self._start_through(len(plan.passes))

    def _sum_over_processes(self, trainer: Trainer, sink: ScoreSink) -> None:
        """Each process has added the scores of its own batches."""
        if trainer.world_size > 1 and isinstance(sink, MemorySink):
            for matrix in (sink.values, sink.by_segment):
                if matrix is not None:
                    matrix.copy_(self._reduced(matrix))

    def pass_title(self, number: int) -> str:
        """What pass ``number`` does, for the progress bar."""
        passes = self._plan.passes
        return f"{passes[number].title} ({number + 1}/{len(passes)})"

    @property
    def _modules_of_stages(self) -> list[nn.Module]:
        return list(dict.fromkeys(stage.module for stage in self.stages))

    def _staged(
        self, examples: Sequence[ExampleSource], queries: ExampleSource, self_influence: bool
    ) -> list[Stage]:
        """The stages as an estimator sees them."""
        own_self = self_influence and len(self.stages) == 1
        held: dict[nn.Module, Held] = {}
        stages = []
        for setup in self.stages:
            source = examples[setup.run]
            context = wide = self._context(
                setup, source, queries, own_self, held.setdefault(setup.module, Held())
            )
            if setup.frozen:
                batch = self._first_batch(source, _FIRST, setup.module)
                wide = widened(context, setup.frozen, *batch)
            before = sum(len(one) for one in examples[: setup.run])
            columns = range(before, before + len(source))
            stages.append(
                Stage(
                    context, wide, setup.frozen, setup.carried, setup.run, columns, setup.first_step
                )
            )
        return stages

    def _segment_counts(self, stages: Sequence[Stage]) -> list[int] | None:
        """Segments of each stage; None for an estimator without."""
        if len(stages) > 1:
            assert isinstance(self.estimator, StagedEstimator)
            return self.estimator.stage_segment_counts(stages)
        count = self.estimator.segment_count(stages[0].context)
        return None if count is None else [count]

    def _planned(self, stages: Sequence[Stage], sink: ScoreSink, counts: list[int] | None) -> Plan:
        if len(stages) == 1:
            stages[0].context.sink = sink
            return self.estimator.plan(stages[0].context)
        assert isinstance(self.estimator, StagedEstimator) and counts is not None
        for number, stage in enumerate(stages):
            stage.context.sink = StageSink(sink, sum(counts[:number]), stage.columns.start)
        return self.estimator.plan_stages(stages)

    def _context(
        self,
        setup: StageSetup,
        examples: ExampleSource,
        queries: ExampleSource,
        self_influence: bool,
        held: Held | None = None,
    ) -> Context:
        module, task = setup.module, setup.task
        engine = GradientEngine(module, setup.trained)
        batch, indices = self._first_batch(examples, _FIRST, module)
        context = Context(
            module=module,
            task=task,
            trajectory=written_by_first(setup.trajectory),
            engine=engine,
            sink=MemorySink(len(queries), len(examples)),
            num_train=len(examples),
            num_query=len(queries),
            examples=examples,
            queries=lambda start, stop: self._query_batches(queries, start, stop, module),
            reduce=self._reduced,
            alike=lambda steps: digest_of(context, steps, batch, indices),
            self_influence=self_influence,
            batch_size=examples.batch_size,
            held=held or Held(),
        )
        context.load(setup.trajectory.last_step)
        task.training_batch_size = setup.trajectory.batch_size
        with seeded_examples(0, indices):
            task.prepare(module, batch)
        engine.discover(context.train_loss, batch, indices, task.separable)
        return context

    def _first_batch(
        self, source: ExampleSource, count: int, module: nn.Module
    ) -> tuple[Any, Tensor]:
        batch, indices = next(iter(source.loader([range(min(count, len(source)))])))
        device = next(module.parameters()).device
        return self._placed(batch, device, module), indices.to(device)

    def _query_batches(
        self, queries: ExampleSource, start: int, stop: int, module: nn.Module
    ) -> Iterable[tuple[Any, Tensor]]:
        device = next(module.parameters()).device
        for batch, indices in queries.loader(queries.batches(start, stop)):
            yield self._placed(batch, device, module), indices.to(device)

    def _sink(
        self,
        sizes: tuple[int, int, int | None],
        dtype: torch.dtype,
        path: str | None,
        overwrite: bool,
        trainer: Trainer,
    ) -> ScoreSink:
        if path is None:
            return MemorySink(*sizes, dtype=dtype)
        # The one file format of scores lives with the other files.
        from tda_lightning.store.scores_file import ScoreFile

        if trainer.world_size > 1:
            # Saved at the end by one process; whether it can be is known before the work.
            Processes.of(trainer).by_first(
                lambda: ScoreFile(path, *sizes, dtype=dtype, overwrite=overwrite).abort()
            )
            return MemorySink(*sizes, dtype=dtype)
        return ScoreFile(path, *sizes, dtype=dtype, overwrite=overwrite)

    def _reduced(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total


@contextmanager
def _gradients_in_predict(trainer: Trainer) -> Iterator[None]:
    """``Trainer.predict`` without inference mode, which would forbid gradients."""
    before = trainer.predict_loop.inference_mode
    trainer.predict_loop.inference_mode = False
    try:
        yield
    finally:
        trainer.predict_loop.inference_mode = before
