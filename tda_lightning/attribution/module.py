"""Turn a recorded trajectory into scores, in one launch by a Lightning Trainer."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from tda_lightning.attribution.answerable import require_answerable
from tda_lightning.attribution.arguments import require_attributable, require_constructible
from tda_lightning.attribution.asked_checkpoint import asked_about
from tda_lightning.attribution.columns import edit_set, packed_documents, pool_additions
from tda_lightning.attribution.combinations import (
    no_self_influence,
    require_askable,
    require_by_token,
    require_graph_question,
    require_whole,
    wants_self_influence,
)
from tda_lightning.attribution.data_of_stages import require_data_of_stages
from tda_lightning.attribution.dry_run import DryRun, dry_run
from tda_lightning.attribution.gradient_check import check_gradients
from tda_lightning.attribution.graph_sources import NodeSource, by_node
from tda_lightning.attribution.launch import OneBatch, gradients_in_predict, quiet_trainer
from tda_lightning.attribution.matching import require_same_data
from tda_lightning.attribution.processes import require_scorable
from tda_lightning.attribution.provenance import of_ensemble, scores_provenance
from tda_lightning.attribution.quiet import without_device_lines
from tda_lightning.attribution.scoring import OpenedRuns, score_runs
from tda_lightning.attribution.sessions import open_members, open_session, open_stages
from tda_lightning.attribution.stages import set_up, training_sets
from tda_lightning.attribution.unlearning import edit_set_of, moved_weights
from tda_lightning.attribution.unseen_batches import again_where_unseen
from tda_lightning.attribution.what_if import asked_runs, seconds_of_runs
from tda_lightning.edits import Edit, GraphEdit, pool_notes, pool_record
from tda_lightning.estimators import Estimator, InfluenceFunction, StagedEstimator
from tda_lightning.measurements import Measurement, as_measurement
from tda_lightning.records.ensemble import Ensemble
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.gradient_errors import GradientErrors
from tda_lightning.records.plans import AttributionPlan, PassPlan
from tda_lightning.records.provenance import Provenance
from tda_lightning.records.scores import Scores
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.runtime.memory import PeakMemory
from tda_lightning.runtime.module_state import in_eval_mode
from tda_lightning.runtime.processes import Processes
from tda_lightning.runtime.progress import SlowProgress
from tda_lightning.runtime.random_states import unchanged_randomness
from tda_lightning.runtime.tables import print_table
from tda_lightning.runtime.termination import ended_by_sigterm
from tda_lightning.store.ensemble_file import is_ensemble
from tda_lightning.store.scores_file import require_free
from tda_lightning.tasks import AttributionTask

T = TypeVar("T")
ByToken: TypeAlias = Literal["train", "query", "both"] | None
Asked: TypeAlias = "Measurement | Callable[[nn.Module, Any], Tensor] | None"


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
            to an estimator other than ``Source``, ``Unrolled`` and ``MultiStageInfluence``.
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
        self._ensemble = trajectory.facts if isinstance(trajectory, Ensemble) else None
        if self.stages[-1].run > 0 and not staged:
            raise UnsupportedTrainingError(
                f"{type(estimator).__name__} knows the last stage of training alone, so it cannot "
                "score the examples of an earlier one. Use Source, Unrolled or MultiStageInfluence "
                "for several trajectories, or give the last one only."
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

    @again_where_unseen
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
                subsets with weights 1 and 0, averaged; each member of an ensemble has its own.
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
        require_by_token(self.estimator, self.members, by_token, self_influence)
        if scores_path is not None:
            require_free(Path(scores_path), overwrite)  # before what-if runs are trained
        if trainer is not None:
            require_scorable(trainer)
        sets = training_sets(train, self.stages[-1].run + 1)
        examples = [ExampleSource.of(data, batch_size, "training") for data in sets]
        queries = examples[-1].others(query, batch_size, "query")
        for member in self.members:
            require_data_of_stages(member, examples)
        recorded, examples, queries = by_node(self.members, examples, queries)
        runner = trainer or quiet_trainer()
        if (fewest := min(len(source) for source in examples)) < runner.world_size:
            raise ValueError(
                f"{fewest} training examples cannot be shared by {runner.world_size} "
                "processes: give a trainer with fewer devices."
            )
        with in_eval_mode(self._attributed_modules, runner.strategy.root_device):
            added = pool_additions(pool, edits)
            edits = edits if added is None else added
            if edits is None and self._has_documents(by_token):
                edits = packed_documents(examples[0])
            changes = edit_set(edits, examples[0], len(self.stages))
            require_graph_question(changes, keep, by_token)
            question = as_measurement(measurement)
            require_askable(question, self_influence)
            own_self = (
                wants_self_influence(self.estimator, self_influence, question)
                and edits is None
                and by_token not in ("query", "both")
            )
            asked = asked_runs(recorded, examples, keep, draws)
            draws = draws if keep == 1 else None
            runs = open_members(
                asked.runs, examples, queries, own_self, changes, draws, question, by_token
            )
            opened = OpenedRuns(self.estimator, runs, asked.draws)
            require_whole(opened.session, question, by_token)
            sink = opened.sink(scores_path, overwrite, runner)
            try:
                with SlowProgress(f"Attribution by {type(self.estimator).__name__}"):
                    estimated = self._launch(runner, lambda: score_runs(opened, sink))
                made = scores_provenance(opened, self.members, asked, estimated, runner, sink)
                if self._ensemble is not None:
                    made = {**made, **of_ensemble(self._ensemble, made)}
                if self_influence is None and edits is None and not own_self:
                    made["notes"].append(no_self_influence(question, by_token))
                if changes is not None:
                    made["edits"] = changes.records()
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

    @again_where_unseen
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
        sets = training_sets(train, self.stages[-1].run + 1)
        asked = as_measurement(measurement)
        with in_eval_mode(self._attributed_modules):
            errors = check_gradients(self.stages[-1], sets[-1], query, examples, asked)
        rows = [(name, f"{error:.1e}") for name, error in errors.items()]
        title, columns = "Engine against plain autograd", ("layer", "largest relative error")
        print_table(title, columns, rows)
        return errors

    @again_where_unseen
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
            ValueError: an empty set, an impossible setting.
        """
        require_attributable(
            batch_size, trainer, self_influence=self_influence, draws=draws, keep=keep
        )
        if trainer is not None:
            require_scorable(trainer)
        with PeakMemory() as memory, unchanged_randomness():
            pace = DryRun(memory)
            sets = training_sets(train, self.stages[-1].run + 1)
            examples = [ExampleSource.of(data, batch_size, "training") for data in sets]
            queries = examples[-1].others(query, batch_size, "query")
            require_data_of_stages(self.stages, examples)
            members, examples, queries = by_node(self.members, examples, queries)
            runner = trainer or quiet_trainer()
            with in_eval_mode(self._attributed_modules, runner.strategy.root_device):
                runs, trainings, seconds = len(self.members), 0, 0.0
                if keep < 1:
                    runs, trainings, seconds = seconds_of_runs(members, examples, draws)
                    draws = None
                question = as_measurement(measurement)
                require_askable(question, self_influence)
                stages = open_stages(
                    members[0],
                    examples,
                    queries,
                    wants_self_influence(self.estimator, self_influence, question),
                    draws=draws,
                    asked=question,
                )
                # Lightning's own start is a part of the work, the greater one of a small job.
                work = functools.partial(dry_run, self.estimator, stages, pace, runs > 1)
                plan = self._launch(runner, work)
        if runs > 1:
            plan = plan.repeated(runs, stages[-1].session.dtype.itemsize)
        if keep < 1:
            steps = trainings * sum(stage.trajectory.last_step for stage in self.stages)
            trained = PassPlan("what-if run, if it is not there yet", trainings, steps, seconds)
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
            with gradients_in_predict(trainer), without_device_lines():
                trainer.predict(self, OneBatch(), return_predictions=False)  # type: ignore[arg-type]
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

    def _has_documents(self, by_token: str | None) -> bool:
        """Whether columns may be the documents of packed rows, where the rows hold several."""
        weighted = getattr(self.estimator, "token_weights", False)
        return len(self.stages) == 1 and not weighted and by_token not in ("train", "both")

    @property
    def _attributed_modules(self) -> list[nn.Module]:
        return list(dict.fromkeys(stage.module for member in self.members for stage in member))


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
