"""Turn a recorded trajectory into scores, in one launch by a Lightning Trainer."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.attribution.answerable import require_answerable
from tda_lightning.attribution.arguments import require_attributable, require_constructible
from tda_lightning.attribution.asked_checkpoint import asked_about
from tda_lightning.attribution.dry_run import DryRun, dry_run
from tda_lightning.attribution.graph_sources import NodeSource, by_node
from tda_lightning.attribution.matching import require_same_data
from tda_lightning.attribution.processes import require_scorable
from tda_lightning.attribution.provenance import ensemble_provenance, of_kind, run_provenance
from tda_lightning.attribution.quiet import without_device_lines
from tda_lightning.attribution.sessions import (
    open_members,
    open_session,
    open_stages,
    sample_batches,
)
from tda_lightning.attribution.stages import set_up, training_sets
from tda_lightning.attribution.unlearning import edit_set_of, moved_weights
from tda_lightning.attribution.what_if import (
    SIZES,
    AskedRuns,
    asked_runs,
    question_of,
    seconds_of_runs,
)
from tda_lightning.edits import (
    Addition,
    Edit,
    EditSet,
    GraphEdit,
    GraphEditSet,
    additions,
    document_removals,
    pool_notes,
    pool_record,
)
from tda_lightning.edits.documents import holds_documents
from tda_lightning.estimators import (
    EnsembleEstimator,
    Estimator,
    InfluenceFunction,
    StagedEstimator,
)
from tda_lightning.estimators.base import self_influence_by_default
from tda_lightning.gradients.check import largest_errors
from tda_lightning.measurements import Measurement, as_measurement
from tda_lightning.records.data_module import require_data_module
from tda_lightning.records.ensemble import Ensemble
from tda_lightning.records.errors import UnseenBatchError, UnsupportedTrainingError
from tda_lightning.records.gradient_errors import GradientErrors
from tda_lightning.records.plans import AttributionPlan, PassPlan
from tda_lightning.records.provenance import Provenance
from tda_lightning.records.score_sinks import (
    MemberSink,
    MemorySink,
    QueryTokenSink,
    ScoreSink,
    StageSink,
    TimestepSink,
)
from tda_lightning.records.scores import Scores
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.memory import PeakMemory
from tda_lightning.runtime.module_state import in_eval_mode
from tda_lightning.runtime.processes import Processes, rank_and_world
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.runtime.tables import print_table
from tda_lightning.runtime.termination import ended_by_sigterm
from tda_lightning.session.edited_graphs import direct_terms
from tda_lightning.session.session import Session, Stage
from tda_lightning.store.ensemble_file import is_ensemble
from tda_lightning.store.scores_file import ScoreFile
from tda_lightning.tasks import AttributionTask, numbered_draw, seeded_examples

T = TypeVar("T")
P = ParamSpec("P")
_NO_SELF = (
    "No self-influence: with this estimator it takes longer than the scores. Ask for it by "
    "self_influence=True."
)
_NO_SELF_MEASURED = (
    "No self-influence: the measurement was chosen for the queries. Ask for it by "
    "self_influence=True, which measures every training example so."
)
ByToken: TypeAlias = Literal["train", "query", "both"] | None
Asked: TypeAlias = "Measurement | Callable[[nn.Module, Any], Tensor] | None"
_SURPRISES = 2  # of a task: divisors that differ between batches, and a loss made otherwise


def _again_where_unseen(method: Callable[P, T]) -> Callable[P, T]:
    """Begin again where a batch is made otherwise than those that were looked at first. The task
    has noted it, and what it does then holds for all batches."""

    @functools.wraps(method)
    def again(*args: P.args, **kwargs: P.kwargs) -> T:
        for _ in range(_SURPRISES):
            try:
                # A draw that an error broke off earlier numbers none of these.
                with numbered_draw(0):
                    return method(*args, **kwargs)
            except UnseenBatchError:
                if rank_and_world()[1] > 1:  # the other processes do not know of it
                    raise
        with numbered_draw(0):
            return method(*args, **kwargs)

    return again


class AttributionModule(LightningModule):
    """Scores of training examples for queries, from a recorded trajectory.

    Args:
        module: an instance of the module that was trained, compiled or not (it is run without the
            compiler); its weights come from the trajectory and are put back as they were at the
            end.
        trajectory: a folder that :class:`~tda_lightning.TrajectoryRecorder` wrote, or a
            :class:`~tda_lightning.Trajectory`. Or a list of them in order of training
            (pre-training, then fine-tuning), with a list of modules and tasks, or one for all. Or
            an :class:`~tda_lightning.Ensemble` of runs that differ in chance alone, or its folder:
            scores are the mean over its members (:attr:`Scores.spread`, :meth:`Scores.member`).
        estimator: one of ``tda_lightning.estimators``.
        task: the training loss and the measurement; None for the module's own ``training_step``.
        fresh: names of modules or parameters that a later trajectory initialised anew under a
            name and shape that the one before it has too.
        at_step: the model that is asked about: that after so many optimizer steps, for which there
            is a recorded checkpoint. Everything is as if training had ended there. None: the last.
            Of several trajectories in order of training it is a step of the last one.
        ckpt: the same by a file that Lightning's ``ModelCheckpoint`` saved during the run, or
            ``"best"``: the best one by the metric that it monitored. Its weights are taken from the
            file where the recorder has none of that step.

    Raises:
        FileNotFoundError: there is no such file.
        TrajectoryNotFoundError: the folder holds no trajectory.
        TrajectoryFormatError: a file of it is damaged or of another format version.
        TrajectoryMismatchError: the module's parameters are not the recorded ones, or a
            trajectory does not start from the last weights of the one before it.
        UnsupportedTrainingError: the optimizer has no formula, or several trajectories are given
            to an estimator other than ``Source``.
        ValueError: lists of different lengths.
        TypeError: an argument of another kind.
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        trajectory: str | Trajectory | Sequence[str | Trajectory] | Ensemble,
        estimator: Estimator,
        task: AttributionTask | Sequence[AttributionTask | None] | None = None,
        fresh: Sequence[str] = (),
        at_step: int | None = None,
        ckpt: str | PathLike[str] | None = None,
    ):
        super().__init__()
        require_constructible(module, trajectory, estimator, task, fresh)
        if isinstance(trajectory, str | PathLike) and is_ensemble(trajectory):
            trajectory = Ensemble.load(trajectory)
        trajectory = asked_about(trajectory, at_step, ckpt)
        staged = isinstance(estimator, StagedEstimator)
        self.members = [
            # A task remembers what it saw of its run's batches.
            set_up(module, run, copy.deepcopy(task), fresh, staged)
            for run in _ensemble_runs(module, trajectory, task)
        ] or [set_up(module, trajectory, task, fresh, staged)]  # type: ignore[arg-type]
        for stages in self.members:
            for stage in stages:
                require_answerable(stage.trajectory, estimator)
        self.stages = self.members[0]
        facts = trajectory.facts if isinstance(trajectory, Ensemble) else None
        self._ensemble = None if facts is None else facts.kind
        if self.stages[-1].run > 0 and not staged:
            raise UnsupportedTrainingError(
                f"{type(estimator).__name__} knows the last stage of training alone, so it cannot "
                "score the examples of an earlier one. Use Source or MultiStageInfluence for "
                "several trajectories, or give the last one only."
            )
        self.estimator = estimator
        self._work: Callable[[], object] | None = None
        self._result: Any = None

    # Not attributes: Lightning's strategies would move, convert or shard a registered submodule,
    # and per-example gradients need the module as it is.

    @property
    def module(self) -> nn.Module:
        """The module of the last stage."""
        return self.stages[-1].module

    @property
    def trajectory(self) -> Trajectory:
        """The last stage of the recorded run."""
        return self.stages[-1].trajectory

    @property
    def task(self) -> AttributionTask:
        """The task of the last stage."""
        return self.stages[-1].task

    @_again_where_unseen
    def attribute(
        self,
        train: object,
        query: object,
        batch_size: int = 256,
        trainer: Trainer | None = None,
        scores_path: str | None = None,
        self_influence: bool | None = None,
        overwrite: bool = False,
        provenance: Mapping[str, object] | None = None,
        edits: Sequence[Edit | GraphEdit] | None = None,
        draws: int | None = None,
        keep: float = 1.0,
        measurement: Asked = None,
        by_token: ByToken = None,
        pool: object = None,
    ) -> Scores:
        """Score every training example for every query.

        Args:
            train: the recorded training set: a ``Dataset``, a ``DataLoader`` over it, whose way of
                making batches is kept, or the ``LightningDataModule`` of the run, whose transfer
                hooks then serve the queries too. Column n of the scores is its index n, whatever
                the loader's order. For several trajectories a list of one each, whose columns
                follow one another (:meth:`Scores.stage`), or one for all.
            query: what to explain, a ``Dataset`` or a ``DataLoader``.
            batch_size: examples per batch where a data set was given; walks over wide layers
                take fewer on a CPU.
            trainer: runs the passes: its devices, strategy (``ddp`` or one device) and precision;
                by default one device.
            scores_path: stream the scores to this HDF5 file instead of holding them in memory.
            self_influence: also score every training example for itself. None: where this costs
                little beside the scores, which is everywhere but in SOURCE.
            overwrite: replace a file at ``scores_path``.
            provenance: what the caller has to say of how the scores were made, added to ours.
            edits: what to score instead of every removal (``tda_lightning.edits``): column e is
                the predicted change of the measurement if edit e were made. There is no
                self-influence then. None: of packed rows, which name the document of each
                position under ``example_ids``, the removal of every document.
            draws: for a loss or a measurement that draws random numbers (a VAE, a diffusion model,
                mixup): scores are of its mean over so many seeded draws for each example. None:
                the task's own number, 1 where nothing was set. With ``keep`` below 1: the number
                of random subsets.
            keep: the share of the training data that would stay. 1 asks what a few examples do in
                the recorded run. Below 1 the run is trained again with weights of mean ``keep`` on
                its examples, once for all estimators (``what_if/`` beside the trajectory), and the
                derivative is taken there: every example at weight ``keep``, for an optimizer that
                normalises a common factor of the loss away (Adam) with the second moments that less
                data would leave (``draws=0``: without), and in an ensemble, which asks about
                training anew, at ``keep`` times the rates. With ``draws``, and for Muon, at random
                subsets with weights 1 and 0, averaged.
            measurement: what to ask about each query (``tda_lightning.measurements``), or a
                function (module, batch) -> [batch], smaller when the model does better; None: the
                task's own, its loss by default. A positive score always says that the example
                helped: that without it a probability, a logit or a contrast would be smaller by so
                much, or a loss larger. There is self-influence only where it is asked for.
            by_token: also score single tokens: ``"train"``, the terms of each training example's
                loss (``Scores.by_token``, [query, train, position]); ``"query"``, the tokens that
                each query's measurement is made of (``Scores.by_query_token``, [query, position,
                train]); or ``"both"``. Both sum to ``values`` over positions. The former costs a
                Jacobian-vector product for each query and batch, the latter makes a query of each
                token.
            pool: examples that were not in training, a data set with items like those of the
                training set: column n is the predicted change of the measurement if example n of
                the pool were added (``Addition``), so that the most negative would help most
                (:meth:`Scores.opponents`). Those that are in the training set as well are counted
                in ``provenance["pool"]``.

        Raises:
            TrajectoryMismatchError: ``train`` is not the data of the run.
            UnsupportedTrainingError: ``keep`` is below 1, and the run cannot be replayed.
            ValueError: an empty set, labels out of range, an impossible setting; an edit outside
                the training set, or of an example of another form.
            NonFiniteError: a loss or a score is NaN or infinite; a what-if run diverged.
        """
        began, worked = time.monotonic(), time.process_time()
        require_attributable(
            batch_size,
            trainer,
            scores_path,
            self_influence,
            overwrite,
            provenance,
            edits,
            draws,
            keep,
            by_token,
        )
        self._require_by_token(by_token, self_influence)
        if trainer is not None:
            require_scorable(trainer)
        sets = training_sets(train, self.stages[-1].run + 1)
        examples = [ExampleSource.of(data, batch_size, "training") for data in sets]
        queries = ExampleSource.of(query, batch_size, "query", examples[-1].data_module)
        for member in self.members:
            for stage in member:
                require_same_data(stage.trajectory, examples[stage.run])
        recorded, examples, queries = by_node(self.members, examples, queries)
        runner = trainer or quiet_trainer()
        if (fewest := min(len(source) for source in examples)) < runner.world_size:
            raise ValueError(
                f"{fewest} training examples cannot be shared by {runner.world_size} "
                "processes: give a trainer with fewer devices."
            )
        with in_eval_mode(self._attributed_modules, runner.strategy.root_device):
            added = self._pool(pool, edits)
            if edits is None and added is None and by_token not in ("train", "both"):
                edits = self._documents(examples)
            edits = edits if added is None else added
            edit_set = self._edit_set(edits, examples)
            if isinstance(edit_set, GraphEditSet) and keep < 1:
                raise UnsupportedTrainingError(
                    "keep is a share of the training examples that would stay, and edits of a "
                    "graph change the graph: ask about them with keep=1."
                )
            if isinstance(edit_set, GraphEditSet) and by_token is not None:
                raise UnsupportedTrainingError(
                    "Edits of a graph have no scores by token: leave out by_token."
                )
            question = as_measurement(measurement)
            _require_askable(question, self_influence)
            own_self = self._wants_self_influence(self_influence, question) and edits is None
            own_self = own_self and by_token not in ("query", "both")
            asked = asked_runs(recorded, examples, keep, draws)
            draws = draws if keep == 1 else None
            opened = open_members(
                asked.runs, examples, queries, own_self, edit_set, draws, question, by_token
            )
            counts = [self._segment_counts(stages) for stages in opened]
            (shared,) = counts[:1] if all(other == counts[0] for other in counts) else [None]
            session = opened[0][-1].session
            segments = None if shared is None else sum(shared)
            # A mean over seeds has an error of its own: the draws of a member only make it up.
            several = len(self.members) if len(self.members) > 1 else asked.draws
            members = several if several > 1 else None
            columns = opened[0][-1].columns.stop if edit_set is None else len(edit_set)
            parts = session.num_parts
            _require_whole(session, question, by_token)
            sizes = ((session.whole or session).num_query // parts, columns, segments)
            timesteps = parts if session.task.kept_parts is not None else None
            sink = _sink(sizes, session.dtype, (members, timesteps), scores_path, overwrite, runner)
            try:
                with SlowProgress(f"Attribution by {type(self.estimator).__name__}"):
                    estimated = self._launch(runner, lambda: self._score_runs(opened, sink, counts))
                made = self._provenance(asked, opened, counts, estimated, runner, sink)
                if self._ensemble is not None:
                    made = {**made, **of_kind(self._ensemble, made)}
                if self_influence is None and edits is None and not own_self:
                    made["notes"].append(_no_self(question, by_token))
                if edit_set is not None:
                    made["edits"] = edit_set.records()
                if added is not None:
                    made["pool"] = pool_record(added, examples[-1])
                    made["notes"] = [*pool_notes(made["pool"]), *made["notes"]]
                if isinstance(examples[-1], NodeSource):
                    asked_nodes = {"train": examples[-1], "query": queries}
                    made["nodes"] = {
                        name: own.dataset.nodes.tolist() for name, own in asked_nodes.items()
                    }
                made["seconds"] = round(time.monotonic() - began, 3)
                # Of all threads of this process; it leaves out what else the machine was busy with.
                made["processor_seconds"] = round(time.process_time() - worked, 3)
                scores = sink.finish({**made, **cast(Provenance, provenance or {})})
            except BaseException:
                sink.abort()
                raise
        if scores_path is not None and runner.world_size > 1:
            Processes.of(runner).by_first(lambda: scores.save(scores_path, overwrite=overwrite))
        return scores

    @_again_where_unseen
    def check(
        self, train: object, query: object, examples: int = 8, measurement: Asked = None
    ) -> GradientErrors:
        """Compare the engine with plain autograd, example by example, on this model and data
        (those of the last stage, where there are several).

        Prints and returns the largest relative error of each layer over batches of ``examples``
        training examples (training loss) and queries (measurement): some spread over the data,
        and neighbours at its start, in its middle and at its end. The losses of ``task=None`` are
        compared with ``training_step`` as it is, with nothing in between.

        Raises:
            ValueError: they do not make up what the step returns.
        """
        require_attributable(examples)
        errors = GradientErrors()
        sets = training_sets(train, self.stages[-1].run + 1)
        with in_eval_mode(self._attributed_modules):
            training = ExampleSource.of(sets[-1], examples, "training")
            require_data_module(self.trajectory.facts, training)
            queries = ExampleSource.of(query, examples, "query", training.data_module)
            (stages,), (training,), queries = by_node([self.stages[-1:]], [training], queries)
            session = open_session(
                stages[-1],
                training,
                queries,
                self_influence=False,
                asked=as_measurement(measurement),
            )
            asked = replace(queries, example=session.examples.example).checked(session.module)
            sides = (session.examples, session.train_loss), (asked, session.measurement)
            for source, loss in sides:
                alone = "partners" not in session.noise
                for batch, indices in sample_batches(source, examples, session.module):
                    if source is session.examples:
                        with seeded_examples(0, indices):
                            session.task.check_losses(session.module, batch)
                    found = largest_errors(session.engine, loss, batch, indices, alone)
                    for name, error in found.items():
                        errors[name] = max(error, errors.get(name, 0.0))
        rows = [(name, f"{error:.1e}") for name, error in errors.items()]
        title, columns = "Engine against plain autograd", ("layer", "largest relative error")
        print_table(title, columns, rows)
        return errors

    @_again_where_unseen
    def plan(
        self,
        train: object,
        query: object,
        batch_size: int = 256,
        trainer: Trainer | None = None,
        self_influence: bool | None = None,
        draws: int | None = None,
        keep: float = 1.0,
        measurement: Asked = None,
    ) -> AttributionPlan:
        """How long and large :meth:`attribute` will be here, in one process; nothing is written.
        Of an ensemble the first member stands for all.

        The arguments are those of :meth:`attribute`. A dry run: a few batches of every
        walk over the data are timed, and a few steps of a what-if run.

        Raises:
            TrajectoryMismatchError: ``train`` is not the data of the run.
            UnsupportedTrainingError: there are several stages; each is planned by itself.
            ValueError: an empty set, an impossible setting.
        """
        if len(self.stages) > 1:
            raise UnsupportedTrainingError(
                f"plan() makes a dry run of one stage of training, got {len(self.stages)}. Plan "
                "for each of them, Trajectory.load(path).stages(), with its own module and data."
            )
        require_attributable(
            batch_size, trainer, self_influence=self_influence, draws=draws, keep=keep
        )
        if trainer is not None:
            require_scorable(trainer)
        with PeakMemory() as memory, unchanged_randomness():
            pace = DryRun(memory)
            examples = ExampleSource.of(train, batch_size, "training")
            queries = ExampleSource.of(query, batch_size, "query", examples.data_module)
            require_same_data(self.trajectory, examples)
            members, (examples,), queries = by_node(self.members, [examples], queries)
            runner = trainer or quiet_trainer()
            with in_eval_mode(self._attributed_modules, runner.strategy.root_device):
                runs, seconds = len(self.members), 0.0
                if keep < 1:
                    runs, seconds = seconds_of_runs(members, [examples], draws)
                    draws = None
                question = as_measurement(measurement)
                _require_askable(question, self_influence)
                (stage,) = open_stages(
                    members[0],
                    [examples],
                    queries,
                    self._wants_self_influence(self_influence, question),
                    draws=draws,
                    asked=question,
                )
                # Lightning's own start is a part of the work, the greater one of a small job.
                work = functools.partial(dry_run, self.estimator, stage.session, pace, runs > 1)
                plan = self._launch(runner, work)
        if runs > 1:
            plan = plan.repeated(runs, stage.session.dtype.itemsize)
        if keep < 1:
            steps = runs * self.trajectory.last_step
            trained = PassPlan("what-if run, if it is not there yet", runs, steps, seconds)
            plan = replace(plan, passes=(trained, *plan.passes))
        return plan

    def unlearned(
        self,
        train: object,
        edits: Sequence[Edit | GraphEdit],
        batch_size: int = 256,
        trainer: Trainer | None = None,
    ) -> nn.Module:
        """A copy of the module with the weights that training with these edits, all made at once,
        is predicted to lead to: what is removed is unlearned (docs/methods.md, "Unlearning").

        :func:`tda_lightning.evaluation.compare_unlearned` says how close it comes to training
        again.

        Args:
            train: the recorded training set, as in :meth:`attribute`.
            edits: such as ``[Removal(3), Removal(17)]``, or edits of a graph. Losses keep their
                denominators: what is removed has weight 0.

        Raises:
            TrajectoryMismatchError: ``train`` is not the data of the run.
            UnsupportedTrainingError: the estimator is not ``InfluenceFunction``, or there are
                several runs or stages.
            ValueError: no edits, or one that does not fit.
        """
        require_attributable(batch_size, trainer, edits=edits)
        if type(self.estimator) is not InfluenceFunction or len(self.members) > 1:
            raise UnsupportedTrainingError(
                "unlearned() moves the weights of one run by InfluenceFunction, got "
                f"{type(self.estimator).__name__} and {len(self.members)} runs. Use "
                "AttributionModule(module, trajectory, InfluenceFunction(...))."
            )
        estimator = self.estimator
        (source,) = [
            ExampleSource.of(data, batch_size, "training")
            for data in training_sets(train, self.stages[-1].run + 1)
        ]
        require_same_data(self.trajectory, source)
        ((stage,),), (source,), _ = by_node(self.members, [source], None)
        runner = trainer or quiet_trainer()
        with in_eval_mode(self._attributed_modules, runner.strategy.root_device):
            edit_set = edit_set_of(edits, source)
            session = open_session(stage, source, source, self_influence=False)
            edit_set.source = edit_set.source.checked(session.module)
            # In a list: a module that is an attribute would become a part of this one.
            return self._launch(runner, lambda: [moved_weights(estimator, session, edit_set)])[0]

    # One launch: Lightning sets up devices and processes, and one step does all the work.

    def _launch(self, trainer: Trainer, work: Callable[[], T]) -> T:
        """``work`` in every process of the trainer, on its devices; its result."""
        self._work, self._result = work, None
        try:
            with _gradients_in_predict(trainer), without_device_lines():
                trainer.predict(self, _OneBatch(), return_predictions=False)  # type: ignore[arg-type]
            return self._result
        finally:
            self._work = self._result = None

    def predict_step(self, batch: object, batch_idx: int) -> Tensor:
        """All the work of an attribution."""
        assert self._work is not None
        launcher = self.trainer.strategy.launcher
        with ended_by_sigterm(lambda number: launcher.kill(number) if launcher else None):
            self._result = self._work()
        return torch.empty(0)  # Lightning warns of a step that returns nothing

    def _score_runs(
        self,
        opened: Sequence[Sequence[Stage]],
        sink: MemorySink,
        counts: Sequence[Sequence[int] | None],
    ) -> list[Provenance]:
        """Run the estimator on every run; each process has its share of the work, and all of the
        scores at the end."""
        parts: list[ScoreSink] = [sink]
        apart = len(opened) > 1 and isinstance(self.estimator, EnsembleEstimator)
        if sink.members is not None:
            runs = len(opened) // len(sink.members)
            by_segment = sink.by_segment is not None
            parts = [
                MemberSink(sink, number // runs, by_segment, runs, apart)
                for number in range(len(opened))
            ]
        combined: ScoreSink = sink
        if sink.by_timestep is not None:
            share = 0.0 if apart else 1 / len(opened)
            combined = TimestepSink(sink, sink)
            parts = [TimestepSink(part, sink, share) for part in parts]
        if apart:
            sessions = [stages[-1].session for stages in opened]
            estimated = self._score_together(sessions, combined, parts)
        else:
            estimated = [
                self._score(stages, part, own)
                for stages, part, own in zip(opened, parts, counts, strict=True)
            ]
        for matrix in (sink.values, sink.by_segment, sink.members, sink.by_timestep):
            if matrix is not None:
                matrix.copy_(opened[0][-1].session.reduce(matrix))
        return estimated

    def _provenance(
        self,
        asked: AskedRuns,
        opened: Sequence[Sequence[Stage]],
        counts: Sequence[Sequence[int] | None],
        estimated: Sequence[Provenance],
        runner: Trainer,
        sink: MemorySink,
    ) -> Provenance:
        """How the scores of all runs together were made."""
        parts = _parts(sink)
        made = []
        for number, (stages, own, part) in enumerate(zip(opened, counts, estimated, strict=True)):
            values = parts[number * len(parts) // len(opened)]
            recorded = None
            if asked.what_if is not None:
                recorded = self.members[asked.recorded[number]][-1].trajectory
            made.append(run_provenance(self.estimator, stages, own, part, runner, values, recorded))
        if len(self.members) > 1:
            made = [
                ensemble_provenance(made[first : first + asked.draws])
                for first in range(0, len(made), asked.draws)
            ]
        merged = ensemble_provenance(made)
        if asked.what_if is not None:
            merged["what_if"] = asked.what_if
            merged["question"] = question_of(asked.what_if)
            if merged.get("sizes", "").startswith("predicted"):
                merged["sizes"] = SIZES
            if len(self.members) == 1 and "members" in merged:
                for member, run in zip(merged["members"], asked.what_if["runs"], strict=False):
                    member["trajectory"] = run
        return merged

    def _score(
        self, stages: Sequence[Stage], sink: ScoreSink, counts: Sequence[int] | None
    ) -> Provenance:
        """Run the estimator on one run."""
        if len(stages) == 1:
            session = stages[0].session
            with _taken_apart(session, sink):
                estimated = self.estimator.score(session)
                session.finish_self_influence()
                session.finish_by_token()
                _require_tokens(session, sink, self.estimator)
            if isinstance(session.edits, GraphEditSet):
                sink.set_direct(direct_terms(session))
        else:
            assert isinstance(self.estimator, StagedEstimator) and counts is not None
            for number, stage in enumerate(stages):
                first = sum(counts[:number])
                stage.session.scores = StageSink(sink, first, stage.columns.start)
            estimated = self.estimator.score_stages(stages)
        return estimated

    def _require_by_token(self, by_token: str | None, self_influence: bool | None) -> None:
        """Refuse scores by token where they are not known.

        Raises:
            UnsupportedTrainingError: over several stages; of TRAK over several runs.
            ValueError: self-influence is asked for as well.
        """
        if by_token is None:
            return
        if len(self.stages) > 1:
            raise UnsupportedTrainingError(
                f"Scores by token are of one stage of training, got {len(self.stages)}. Attribute "
                "each of them, Trajectory.load(path).stages()."
            )
        if len(self.members) > 1 and isinstance(self.estimator, EnsembleEstimator):
            raise UnsupportedTrainingError(
                f"{type(self.estimator).__name__} puts the members of an ensemble together in its "
                "own way, which has no parts by token. Attribute the members one by one."
            )
        if self_influence and by_token != "train":
            raise ValueError(
                "by_token takes queries apart, and self_influence has no queries: ask for one of "
                "them at a time."
            )

    def _score_together(
        self, sessions: Sequence[Session], sink: ScoreSink, parts: Sequence[ScoreSink]
    ) -> list[Provenance]:
        """Run an estimator on several runs that it puts together in its own way."""
        assert isinstance(self.estimator, EnsembleEstimator)
        for session, part in zip(sessions, parts, strict=True):
            session.scores = part
        estimated = self.estimator.score_ensemble(sessions, sink)
        for session in sessions:
            session.finish_self_influence()
        return estimated

    def _wants_self_influence(self, asked: bool | None, measurement: Measurement | None) -> bool:
        if asked is not None:
            return asked
        return measurement is None and self_influence_by_default(self.estimator)

    @staticmethod
    def _pool(pool: object, edits: Sequence[object] | None) -> list[Addition] | None:
        if pool is None:
            return None
        if edits is not None:
            raise ValueError(
                "pool and edits both say what the columns are about: give one of them. "
                "Addition(example) is the edit that adds an example."
            )
        return additions(pool.dataset if isinstance(pool, DataLoader) else pool)

    def _documents(self, examples: Sequence[ExampleSource]) -> Sequence[Edit] | None:
        """The removals of documents where the rows of the training set hold several each; None for
        those of rows."""
        dataset = examples[0].dataset
        by_token = getattr(self.estimator, "token_weights", False)
        if len(self.stages) > 1 or by_token or not len(examples[0]):
            return None
        if examples[0].keys is not None:  # a loader that reads whole batches of a kind of its own
            return None
        return document_removals(dataset) if holds_documents(dataset[0]) else None

    def _edit_set(
        self, edits: Sequence[Edit | GraphEdit] | None, examples: Sequence[ExampleSource]
    ) -> EditSet | GraphEditSet | None:
        if edits is None:
            return None
        if len(self.stages) > 1:
            raise UnsupportedTrainingError(
                f"edits belong to one training set, and the run has {len(self.stages)} stages. "
                "Attribute each of them, Trajectory.load(path).stages(), with its own edits."
            )
        of_graph = [isinstance(edit, GraphEdit) for edit in edits]
        if not any(of_graph):
            return EditSet(cast(Sequence[Edit], edits), examples[0])
        if not all(of_graph):
            raise ValueError(
                "edits are of the graph or of single examples, got both. Ask for them one by one."
            )
        if not isinstance(examples[0], NodeSource):
            raise UnsupportedTrainingError(
                f"{type(edits[0]).__name__} is an edit of the graph that a run was trained on, and "
                "this training set is none: expected one graph with a mask of training nodes "
                "(task=None), or tda_lightning.tasks.NodeTask."
            )
        return GraphEditSet(cast(Sequence[GraphEdit], edits), examples[0])

    @property
    def _attributed_modules(self) -> list[nn.Module]:
        return list(dict.fromkeys(stage.module for member in self.members for stage in member))

    def _segment_counts(self, stages: Sequence[Stage]) -> list[int] | None:
        """Segments of each stage; None for an estimator without."""
        if len(stages) > 1:
            assert isinstance(self.estimator, StagedEstimator)
            return self.estimator.stage_segment_counts(stages)
        count = self.estimator.segment_count(stages[0].session)
        return None if count is None else [count]


def _parts(sink: MemorySink) -> list[Sequence[Tensor]]:
    """For each member, tensors [query, train] whose sum is its scores."""
    if sink.members is not None:
        return [[own] for own in sink.members]
    return [[sink.values] if sink.by_segment is None else list(sink.by_segment)]


def _no_self(measurement: Measurement | None, by_token: str | None) -> str:
    """Why there is no self-influence where nobody asked for it or against it."""
    if by_token in ("query", "both"):
        return "No self-influence: the queries were taken apart into tokens."
    return _NO_SELF if measurement is None else _NO_SELF_MEASURED


def _require_whole(session: Session, measurement: object, by_token: str | None) -> None:
    """Refuse other questions to a task whose measurement has parts of its own (timesteps)."""
    if session.num_parts > 1 and (measurement is not None or by_token in ("query", "both")):
        raise UnsupportedTrainingError(
            f"{type(session.task).__name__} measures queries in {session.num_parts} parts of its "
            "own (timesteps): leave out measurement= and by_token=, or give a task without them."
        )


def _require_tokens(session: Session, sink: ScoreSink, estimator: Estimator) -> None:
    """Check that an estimator that is none of ours has scored the tokens that were asked for."""
    own = sink.sink if isinstance(sink, MemberSink) else sink
    if session.by_token and getattr(own, "by_token", None) is None:
        raise UnsupportedTrainingError(
            f"{type(estimator).__name__} does not score single tokens: it must call "
            "session.add_terms where session.by_token is set."
        )


@contextmanager
def _taken_apart(session: Session, sink: ScoreSink) -> Iterator[None]:
    """Scores go to ``sink``; where queries are taken apart, those of their tokens too."""
    session.scores, rows = sink, session.rows
    if rows is None:
        yield
        return
    columns = session.num_train if session.edits is None else len(session.edits)
    tokens = torch.zeros(rows.num_query, rows.length, columns, dtype=session.dtype)
    session.scores = QueryTokenSink(sink, rows.query, rows.position, tokens)
    yield
    whole = session.reduce(tokens.to(session.device))
    sink.set_by_query_token(whole)


def _require_askable(measurement: Measurement | None, self_influence: bool | None) -> None:
    """Refuse self-influence by a measurement that training examples do not have."""
    if measurement is None or not self_influence or not (own := measurement.each_own):
        return
    raise ValueError(
        f"self_influence measures every training example, and the measurement's {own[0]} is given "
        "for each query. Leave out self_influence."
    )


class _OneBatch:
    """A loader for a single step. Not a ``DataLoader`` on purpose: Lightning would put a
    distributed sampler of its own into one."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[int]:
        yield 0


def quiet_trainer() -> Trainer:
    """One device, and nothing said by Lightning: walks have progress bars of their own."""
    with without_device_lines():
        return Trainer(
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            inference_mode=False,
        )


def _sink(
    sizes: tuple[int, int, int | None],
    dtype: torch.dtype,
    kept: tuple[int | None, int | None],
    path: str | None,
    overwrite: bool,
    trainer: Trainer,
) -> MemorySink:
    """Where the scores go: memory, or the file at ``path``; ``kept``: members and timesteps."""
    if path is None:
        return MemorySink(*sizes, dtype, *kept)
    if trainer.world_size > 1:
        # Saved at the end by one process; whether it can be is known before the work.
        Processes.of(trainer).by_first(
            lambda: ScoreFile(path, *sizes, dtype, *kept, overwrite).abort()
        )
        return MemorySink(*sizes, dtype, *kept)
    return ScoreFile(path, *sizes, dtype, *kept, overwrite)


def _ensemble_runs(module: object, trajectory: object, task: object) -> list[Trajectory]:
    """The members of an ensemble; none where there is a single run."""
    if not isinstance(trajectory, Ensemble):
        return []
    for name, given in (("module", module), ("task", task)):
        if isinstance(given, list | tuple):
            raise ValueError(
                f"The members of an ensemble share one {name}, got a list of {len(given)}. "
                "Members must differ in chance alone."
            )
    return list(trajectory)


@contextmanager
def _gradients_in_predict(trainer: Trainer) -> Iterator[None]:
    """``Trainer.predict`` without inference mode, which would forbid gradients."""
    before = trainer.predict_loop.inference_mode
    trainer.predict_loop.inference_mode = False
    try:
        yield
    finally:
        trainer.predict_loop.inference_mode = before
