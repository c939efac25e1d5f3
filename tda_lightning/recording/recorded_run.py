"""One run while it is recorded: the observers, and the trajectory that they are written to."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.recording.base_weights import base_digests, frozen_names, without_base
from tda_lightning.recording.checkpoints import Checkpoints
from tda_lightning.recording.checks import (
    indices_ended,
    require_same_examples,
    training_loader,
    warn_without_formula,
)
from tda_lightning.recording.curvature_statistics import CurvatureStatistics, OnlineCurvature
from tda_lightning.recording.example_indices import ExampleIndices
from tda_lightning.recording.facts import modules_in_eval_mode, read_facts
from tda_lightning.recording.observer import Observer
from tda_lightning.recording.resume import (
    FORMAT,
    RecorderState,
    continued_facts,
    failure,
    no_history,
    recorded_facts,
    require_same_run,
    require_same_weights,
)
from tda_lightning.recording.rng_log import RngLog
from tda_lightning.recording.several_processes import FirstProcessWriter
from tda_lightning.recording.sharded import require_whole
from tda_lightning.recording.step_table import StepTable
from tda_lightning.recording.trained_parameters import TrainedParameters
from tda_lightning.recording.trainer_hooks import ReplacedMethod
from tda_lightning.records.errors import RecordingError, TrajectoryError, TrajectoryFormatError
from tda_lightning.records.trajectory import Facts, facts_up_to
from tda_lightning.runtime.compiled import plain_parameters
from tda_lightning.runtime.processes import Processes
from tda_lightning.runtime.tokenizers import tokenizer_digests
from tda_lightning.store.fingerprints import (
    collation,
    compare_fingerprints,
    fingerprint,
    num_examples,
)
from tda_lightning.store.lock import FolderLock
from tda_lightning.store.writer import TrajectoryWriter


class RecordedRun:
    """What a recorder observes of a training, and writes.

    The arguments are those of :class:`~tda_lightning.TrajectoryRecorder`, ``is_due``, whether a
    checkpoint is kept after a step, and ``warn``, whether an error of the disk stops recording
    alone, with a warning.

    Attributes:
        facts: of the run; None while nothing is recorded.
        planned: steps of the checkpoints that were planned.
        final: where a further fit continues.
        ended: the state for Lightning's checkpoints once recording has ended.
        parts: what else records, by name.
        lock: keeps other recorders from writing into the folder.
    """

    def __init__(
        self,
        path: Path,
        save_optimizer: int,
        curvature: OnlineCurvature | None,
        is_due: Callable[[int], bool],
        index_key: str | None = None,
        *,
        warn: bool,
    ) -> None:
        self.path, self._save_optimizer, self._settings = path, save_optimizer, curvature
        self._is_due, self._warn, self._index_key = is_due, warn, index_key
        self.facts: Facts | None = None
        self.planned: frozenset[int] = frozenset()
        self.holds_base = False  # whether checkpoints hold a frozen base
        self.final: RecorderState | None = None
        self.ended: Mapping[str, Any] = {}
        self.parts: dict[str, Any] = {}
        self._in_batch = False
        self._resumed_epoch: int | None = None  # of the last step that was on no disk
        self.lock = FolderLock(path)
        self._before_forward: ReplacedMethod | None = None
        self._make_observers(Processes())

    def _make_observers(self, processes: Processes, weights: Tensor | None = None) -> None:
        self.processes = processes
        writer = FirstProcessWriter(TrajectoryWriter(self.path, weights), processes)
        self._writer = cast(TrajectoryWriter, writer)
        several = "several processes" if processes.count > 1 else None
        self._indices = ExampleIndices(several is None, self._index_key)
        self._rng = RngLog(self._indices, absent=several)
        self._steps = StepTable(self._indices, self._rng, processes)
        self._curvature: CurvatureStatistics | None = None
        if self._settings is not None:
            self._curvature = CurvatureStatistics(self._settings, self._indices, self._steps)
        self._checkpoints = Checkpoints(self._rng, self._save_optimizer)
        # Steps come before the checkpoint that they lead to: with it on disk, they are there too.
        self._observers: list[Observer] = [
            self._indices,
            self._rng,
            self._steps,
            *([] if self._curvature is None else [self._curvature]),
            self._checkpoints,
        ]

    @property
    def num_checkpoints(self) -> int:
        """Checkpoints written so far, the initial weights included."""
        return len(self._checkpoints.steps)

    @property
    def num_steps(self) -> int:
        """Steps recorded, on disk or not."""
        return self._steps.num_steps

    # The start.

    def attach(self, trainer: Trainer) -> None:
        """Listen to a fit whose loaders and optimizer do not exist yet."""
        self.facts = None
        # Those of WeightedTraining (tda_lightning/reweighting).
        found = (getattr(c, "loss_weights", None) for c in vars(trainer)["callbacks"])
        weights = next((own for own in found if own is not None), None)
        self._make_observers(Processes.of(trainer), weights)
        for observer in self._observers:
            observer.attach(trainer)

    def detach(self) -> None:
        """Leave trainer, loaders and optimizer as they were."""
        for observer in self._observers:
            observer.detach()
        if self._before_forward is not None:
            self._before_forward.remove()
            self._before_forward = None

    def require_free(self, overwrite: bool) -> None:
        """Check that no recorder writes into the folder, and that nothing would be overwritten."""
        with self._disk():
            self.processes.by_first(self.lock.require_free)
            if not overwrite:
                self._writer.require_vacant()

    def begin(
        self,
        trainer: Trainer,
        restored: Mapping[str, Any] | None,
        planned: frozenset[int],
        spacing: frozenset[int],
        *,
        overwrite: bool,
        with_fingerprint: bool,
    ) -> None:
        """Start a new trajectory, or continue the one that the training belongs to.

        Args:
            restored: the state in the Lightning checkpoint that is resumed from, if any.
            planned: steps of checkpoints that are known beforehand.
            spacing: steps that show how far apart the checkpoints are.
        """
        state = self.final if restored is None else RecorderState.unpack(restored)
        if trainer.global_step == 0 and restored is None:
            state = None
        elif state is None:
            raise no_history(trainer.global_step, self.path)
        self.final, self.ended, self.planned = None, {}, planned
        self._in_batch, self._resumed_epoch = False, None
        self._dataset = getattr(training_loader(trainer), "dataset", None)
        self._trained = TrainedParameters(trainer)
        warn_without_formula(self._trained.optimizer)
        for observer in self._observers:
            observer.begin(trainer, self._trained)
        if self._curvature is not None:
            self._curvature.plan(spacing)
        with self._disk():
            if state is None:
                self._start(trainer, overwrite, with_fingerprint)
            else:
                self._resume(trainer, state, again=restored is None)
        if self.facts is not None:
            self._before_forward = ReplacedMethod(
                trainer.strategy, "on_train_batch_start", self._begin_forward
            )

    def _start(self, trainer: Trainer, overwrite: bool, with_fingerprint: bool) -> None:
        first, data = self.processes.by_first, self._dataset
        if self._indices.absent is not None:
            _warn_of_absent_indices(self._indices.absent)
        marks = first(fingerprint, data) if with_fingerprint else None
        settings = {
            **self._observed_facts(),
            "planned_checkpoints": sorted(self.planned),
            "run_id": uuid.uuid4().hex,  # touches no random generator
        }
        collate = getattr(training_loader(trainer), "collate_fn", None)
        if with_fingerprint and (tokenizers := tokenizer_digests(data, collate)):
            settings["tokenizers"] = tokenizers
        if with_fingerprint and (made := first(collation, training_loader(trainer))):
            settings["collation"] = made
        facts = read_facts(trainer, self._trained, num_examples(data), marks, settings)
        initial = self._checkpoints.read(0, with_optimizer=bool(self._save_optimizer))
        frozen = frozen_names(self._trained.module, self._trained.ever)
        if not self.holds_base:
            facts = replace(facts, base=first(base_digests, initial, frozen))
        first(self.lock.acquire)
        self._writer.begin(facts, without_base(initial, facts.base), overwrite=overwrite)
        self.facts = facts

    def _resume(self, trainer: Trainer, state: RecorderState, again: bool) -> None:
        """Continue from ``state``; ``again``: in a further fit, which begins at no checkpoint of
        Lightning's and so with the optimizer that the module configures."""
        first, trained, data = self.processes.by_first, self._trained, self._dataset
        step = state.rows_on_disk + len(state.rows)
        recorded = first(recorded_facts, self.path, state, trainer.global_step)
        recorded = facts_up_to(recorded, step)
        if (again and trained.shards is None) or len(recorded.stages) > 1:
            # The stage under way goes on; what is frozen or unfrozen now begins one of its own.
            trained.resume(recorded)
            for observer in self._observers:
                observer.begin_stage()
        # Check everything before the folder is touched.
        now = read_facts(trainer, trained, num_examples(data), None, {})
        if self._curvature is not None:
            self._curvature.watch_as(recorded)
        require_same_run(recorded, now, self._observed_facts().get("curvature"))
        first(compare_fingerprints, recorded.fingerprint, data)
        first(self.lock.acquire)
        if again:
            held = self._checkpoints.read(step, with_optimizer=False).parameters
            first(require_same_weights, self.path, recorded, state.checkpoints[-1], held)
        absent = self._indices.absent
        if recorded.settings["indices"] == "recorded" and absent is not None and step:
            raise indices_ended(absent)
        earlier = {planned for planned in state.planned if planned <= step}
        self.planned = frozenset(earlier | {planned for planned in self.planned if planned > step})
        self._writer.resume(recorded, state.rows_on_disk, state.checkpoints)
        # A module may configure the optimizer that it had before: then its state goes on.
        fit = {"new_fit": again, "new_optimizer": again and not trained.optimizer.state}
        facts = continued_facts(recorded, now, step, self.planned, **fit)
        facts = self._with_trained_base(facts)
        if facts != recorded:
            self._writer.write_facts(facts)
        if len(state.rows):
            self._resumed_epoch = int(state.rows.epoch[-1])
        if self.processes.count > 1:
            self._writer.append(state.rows)  # they are those of all processes
            state = replace(state, rows_on_disk=step, rows=state.rows.between(0, 0))
        for observer in self._observers:
            observer.resume(facts, state)
        for name, part in self.parts.items():
            part.load_state_dict(state.parts[name])
        self.facts = facts
        self._note_absences()
        if state.accumulated:
            rank_zero_warn(
                f"Training resumes after {state.accumulated} accumulated batches, and Lightning "
                "keeps no gradients: the next step is made of the later batches alone, and is "
                "recorded so."
            )

    def resumed_after(self, epoch: int) -> bool:
        """Whether the run was resumed with steps that were not on disk, all of earlier epochs."""
        return self._resumed_epoch is not None and self._resumed_epoch < epoch

    # Facts that change.

    def _observed_facts(self) -> dict[str, Any]:
        return {k: v for observer in self._observers for k, v in observer.facts().items()}

    def _note(self, **settings: Any) -> None:
        """Change settings among the facts."""
        assert self.facts is not None
        self._change_facts(replace(self.facts, settings={**self.facts.settings, **settings}))

    def _change_facts(self, facts: Facts) -> None:
        self.facts = facts
        with self._disk():
            self._writer.write_facts(facts)

    def _note_absences(self) -> None:
        """Note what cannot be recorded any more.

        Raises:
            UnsupportedTrainingError: earlier batches had their indices.
        """
        assert self.facts is not None
        before, now = self.facts.settings, {**self._indices.facts(), **self._rng.facts()}
        if all(before.get(name) == value for name, value in now.items()):
            return
        if before["indices"] == "recorded" and self._indices.absent is not None:
            if self._begun:
                raise indices_ended(self._indices.absent)
            _warn_of_absent_indices(self._indices.absent)
        self._note(**now)

    @property
    def _begun(self) -> bool:
        """Whether a batch has been trained on."""
        return bool(self._steps.num_steps) or self._steps.in_step

    # Each batch.

    def begin_epoch(self, trainer: Trainer) -> None:
        """An epoch starts. The one before may have been cut short; its gradients are zeroed."""
        if self.facts is not None:
            self.drop()
            self._dataset = require_same_examples(trainer, self.facts, self._dataset)

    def begin_batch(self, batch: object) -> None:
        """A batch has been fetched."""
        self._in_batch = True
        if self.facts is not None:
            self._indices.read(batch)
            for observer in self._observers:
                observer.begin_batch()
            self._note_absences()

    def _begin_forward(self, on_train_batch_start: Any, *args: Any, **kwargs: Any) -> Any:
        """After every hook that may freeze or unfreeze, before the batch's forward pass.

        That is ``Strategy.on_train_batch_start``, which callbacks cannot define.
        """
        if self.facts is not None and not self._begun:
            still = modules_in_eval_mode(self._trained.module)
            if still != self.facts.settings.get("eval_modules", []):
                self._note(eval_modules=still)
        if self.facts is not None and not self._steps.in_step and self._trained.changed():
            self._begin_stage()
        return on_train_batch_start(*args, **kwargs)

    def _begin_stage(self) -> None:
        """The optimizer trains other parameters from now on."""
        require_whole(self._trained.shards, "freezing and unfreezing in mid-training")
        # The state at a stage's start comes first: a stage without it could not be read.
        self.record(last=True)
        if self.facts is not None:
            facts = self._trained.begin_stage(self.facts, self.num_steps)
            with self._disk():
                facts = self._with_trained_base(facts)
            self._change_facts(facts)
            for observer in self._observers:
                observer.begin_stage()

    def _with_trained_base(self, facts: Facts) -> Facts:
        """The facts where a part of the frozen base is trained from now on, and is recorded."""
        unfrozen = sorted(set(facts.base) & set(facts.parameters))
        if not unfrozen:
            return facts
        module = plain_parameters(self._trained.module)
        self._writer.keep_base({name: module[name] for name in unfrozen})
        base = {name: own for name, own in facts.base.items() if name not in unfrozen}
        return replace(facts, base=base)

    def drop(self) -> None:
        """The gradients of the step under way are thrown away."""
        for observer in self._observers:
            observer.drop()

    def begin_backward(self, loss: Tensor) -> None:
        """The batch has its loss."""
        if self.facts is not None:
            self._steps.begin_backward(loss)

    def end_backward(self) -> None:
        """The batch's gradients are in the parameters."""
        if self.facts is not None:
            for observer in self._observers:
                observer.end_backward()

    def begin_step(self, optimizer: Optimizer) -> None:
        """The gradients of the step are complete."""
        if self.facts is not None:
            self._steps.begin_step(optimizer)

    def skip_batch(self) -> None:
        """Lightning passes over a batch that is None."""
        if self.facts is not None:
            self._indices.begin_batch()

    def end_batch(self, trainer: Trainer, outputs: Any) -> None:
        """The batch is done, and with it perhaps a step."""
        if self.facts is None:
            return
        for observer in self._observers:
            observer.end_batch(outputs)
        self._in_batch = False
        if not self.step_is_new(trainer):
            return
        taken = self._steps.stepped  # Lightning counts one that a gradient scaler skipped too
        for observer in self._observers:
            observer.end_step(taken)
        if taken and self._is_due(self.num_steps):
            self.record()
        elif self._steps.full:
            with self._disk():
                self._steps.write(self._writer, self.num_steps, last=False)

    def step_is_new(self, trainer: Trainer) -> bool:
        """Whether Lightning has counted a step that is not recorded yet."""
        counted = self.num_steps + self._steps.skipped
        return self.facts is not None and trainer.global_step > counted

    def record(self, *, last: bool = False) -> None:
        """Keep a checkpoint, and what leads to it; ``last`` of the run or of a stage."""
        if self.facts is not None and self._checkpoints.wanted(self.num_steps, last):
            with self._disk():
                for observer in self._observers:
                    observer.write(self._writer, self.num_steps, last)

    # The end.

    def finish(self, best: Mapping[str, Any] | None = None) -> None:
        """The run ends here, at the end of a step.

        Args:
            best: what is known of the best checkpoint that Lightning saved, for the facts.
        """
        if self.facts is None:
            return
        self.keep_state()
        self.record(last=True)
        if self.facts is not None:
            facts = facts_up_to(self.facts, self.num_steps)
            settings = {**facts.settings, "skipped_steps": self._steps.skipped}
            if best is not None:
                settings["best_checkpoint"] = dict(best)
            with self._disk():
                self._writer.write_facts(replace(facts, settings=settings))
                self._writer.finish()
        if self.facts is not None:
            self.final = self.state()
        self.facts = None
        self.detach()

    def in_between(self) -> bool:
        """Whether weights or buffers may be those of no step: half stepped, or a forward pass
        ahead."""
        buffers = any(True for _ in self._trained.module.buffers())
        return self._steps.stepping or (self._in_batch and buffers)

    def stop(self, reason: str) -> None:
        """Record nothing any more; no training can continue the trajectory from here."""
        self.facts, self.ended = None, {"format": FORMAT, "stopped": reason}

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Do what the disk may fail at; if it does, recording is over."""
        try:
            yield
        except (OSError, TrajectoryFormatError) as error:
            # What is wrong with the folder before training starts is the user's to see.
            refused = isinstance(error, TrajectoryError)
            if refused and (self.facts is None or not isinstance(error, TrajectoryFormatError)):
                raise
            message = failure(self.path, self.num_steps, self._checkpoints.steps[-1], error)
            self.stop(f"after step {self.num_steps}: {error}")
            self.detach()
            self.lock.release()
            if not self._warn:
                raise RecordingError(message) from error
            rank_zero_warn(f"{message} Training goes on without recording.")

    # The state that travels in Lightning's checkpoints.

    def state(self) -> RecorderState:
        """Where the trajectory stands."""
        assert self.facts is not None
        state = {k: v for observer in self._observers for k, v in observer.state().items()}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        parts.update(state.pop("parts", {}))
        planned = tuple(sorted(self.planned))
        run_id = self.facts.settings["run_id"]
        return RecorderState(run_id=run_id, planned=planned, parts=parts, **state)

    def keep_state(self) -> None:
        """Remember the state for checkpoints that Lightning saves when recording has ended."""
        if self.facts is not None:
            self.ended = self.state().pack()


def _warn_of_absent_indices(reason: str) -> None:
    rank_zero_warn(
        f"TrajectoryRecorder records no example indices: {reason}. Estimators that need the "
        "recorded batches will not be available for this run."
    )
