"""Records a training run as a trajectory, for attribution afterwards.

*When* something is recorded is the subject of this file. *What* is recorded is that of the
observers, which all have the methods of :class:`~tda_lightning.recording.observer.Observer`:
example indices, random states, steps, curvature statistics, checkpoints.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.recording.checkpoints import Checkpoints, evenly_spaced
from tda_lightning.recording.checks import (
    indices_ended,
    require_one_optimizer,
    require_same_examples,
    require_supported,
    training_loader,
    warn_without_formula,
)
from tda_lightning.recording.curvature_statistics import (
    CurvatureStatistics,
    online_curvature,
    require_uncompiled,
)
from tda_lightning.recording.example_indices import ExampleIndices
from tda_lightning.recording.facts import modules_in_eval_mode, read_facts
from tda_lightning.recording.observer import Observer
from tda_lightning.recording.plan import plan_recording
from tda_lightning.recording.resume import (
    RecorderState,
    continued_facts,
    failure,
    new_run_id,
    no_history,
    recorded_facts,
    require_same_curvature,
    require_same_model,
    require_same_weights,
    state_of_folder,
    stopped_state,
)
from tda_lightning.recording.rng_log import RngLog
from tda_lightning.recording.several_processes import FirstProcessWriter
from tda_lightning.recording.sharded import require_whole
from tda_lightning.recording.step_count import StepCount, count_steps
from tda_lightning.recording.step_table import StepTable
from tda_lightning.recording.trained_parameters import TrainedParameters
from tda_lightning.recording.trainer_hooks import ReplacedMethod, come_first, precedes_averaging
from tda_lightning.records.errors import RecordingError, TrajectoryError, TrajectoryFormatError
from tda_lightning.records.plans import RecordingPlan
from tda_lightning.records.trajectory import Facts
from tda_lightning.runtime.processes import Processes
from tda_lightning.store.fingerprint import compare_fingerprints, fingerprint, num_examples
from tda_lightning.store.lock import FolderLock
from tda_lightning.store.reader import facts_up_to
from tda_lightning.store.writer import TrajectoryWriter


class Stateful(Protocol):
    """Something whose state travels in Lightning's checkpoints: plain data and tensors."""

    def state_dict(self) -> dict[str, Any]:
        """What is saved."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what was saved."""
        ...


class TrajectoryRecorder(Callback):
    """Writes down what attribution needs while a model trains, and changes nothing in it.

    Recorded are the steps table (applied learning rates, optimizer settings, loss, gradient norm
    before and after clipping, example indices of every batch), checkpoints with buffers and
    optimizer state (the initial weights and the last step always), the states of the random
    generators with each checkpoint and wherever they jump between batches, and the facts of the
    run. One that stops early or is killed leaves a readable trajectory up to its last checkpoint.

    A run that is interrupted and resumed with ``Trainer.fit(ckpt_path=...)`` goes on with its
    trajectory: the recorder's state travels in Lightning's checkpoints, what was recorded after
    the resumed one is cut off and made again, and the outcome is that of the uninterrupted run.
    A further fit of the same trainer and module goes on with it too; a stage begins there, since
    its optimizer is a new one.

    A loss that is NaN is recorded as it is, with one warning that names its step; training goes
    on, since to stop is the user's decision. A step that a gradient scaler skipped is no step; the
    facts say how many there were. Where parameters are frozen or unfrozen, a stage begins. With
    ``Trainer(fast_dev_run=...)`` nothing is recorded.

    With several processes the first one writes and every process's batches are recorded, as those
    of one process that accumulates over all of them; parameters that FSDP spreads over processes
    are gathered for each checkpoint. When such a training ends by an exception, the trajectory
    ends at its last checkpoint: a process that may be gone cannot be asked for its batches.

    Args:
        path: folder of the trajectory.
        num_checkpoints: checkpoints after steps floor(i T / num_checkpoints), i = 1, 2, ..., of
            T = ``trainer.estimated_stepping_batches``. Not used when one of the next two is set.
        every_n_steps: a checkpoint each time that so many optimizer steps are done.
        every_n_epochs: a checkpoint at the end of every n-th epoch.
        save_optimizer: keep the optimizer's state in every checkpoint (True), in none (False) or
            in every k-th and the last (k).
        overwrite: replace a trajectory that is already in the folder, once training starts from
            step 0; a resumed training goes on with it.
        fingerprint: read some training examples before training, so that attribution can tell
            the recorded data from others. Random generators are put back as they were; only a
            data set that keeps count of its own readings can see it.
        curvature: ``"online"`` gathers curvature statistics of every interval between checkpoints
            while the model trains, so that attribution needs no pass for them; None leaves them
            to be fitted at the checkpoints. It needs layers that are neither compiled nor spread
            over processes (FSDP).
        curvature_every: gather at every so many optimizer steps. Attribution needs such a step in
            every segment. None: 64, or fewer so that three fall between any two
            checkpoints.
        fisher: labels of the statistics: ``"true"``, sampled from the model, for one more backward
            pass to the layers' outputs; ``"empirical"``, the data's own, for none.
        curvature_device: where the sums are kept; None for where the model is.
        curvature_dtype: of the sums, ``"float32"`` or ``"float64"``.
        curvature_dense_side: the widest side of a layer whose covariance is a dense matrix; of a
            wider one (a head over a vocabulary) the leading 256 directions and the diagonal are
            kept. None: 4096.
        on_error: what happens when the trajectory cannot be written (a full disk, a folder that
            is read-only or has vanished): "raise" stops training with a RecordingError, "warn"
            stops recording with one warning, and training goes on. What was recorded before
            stays readable.

    Raises:
        TrajectoryExistsError: before training, when the folder holds a trajectory.
        TrajectoryLockedError: before training, when another recorder writes into the folder.
        UnsupportedTrainingError: before training, with manual optimization, several optimizers,
            several training loaders, or a strategy whose processes do not train as one. In
            training, when its options change what an index or a parameter stands for, or the
            layers' calls cannot be watched for ``curvature="online"``.
        ResumeError: before training, when it does not start at step 0 and the trajectory of the
            steps before is missing or another run's.
        RecordingError: when the trajectory cannot be written, with ``on_error="raise"``.

    Example:
        >>> from tda_lightning import TrajectoryRecorder
        >>> recorder = TrajectoryRecorder("runs/fashion", num_checkpoints=6)
        >>> Trainer(max_epochs=10, callbacks=[recorder]).fit(module, datamodule)  # doctest: +SKIP

    References:
        | Kronecker factors and their eigenvalues: Studying Large Language Model Generalization
          with Influence Functions (Grosse et al., 2023), sec. 2.2
        | https://arxiv.org/abs/2308.03296
    """

    def __init__(
        self,
        path: str | Path,
        num_checkpoints: int = 6,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        save_optimizer: bool | int = True,
        overwrite: bool = False,
        fingerprint: bool = True,
        curvature: str | None = None,
        curvature_every: int | None = None,
        fisher: str = "true",
        curvature_device: str | None = None,
        curvature_dtype: str = "float32",
        curvature_dense_side: int | None = None,
        on_error: Literal["raise", "warn"] = "raise",
    ) -> None:
        counts = {
            "num_checkpoints": num_checkpoints,
            "every_n_steps": every_n_steps,
            "every_n_epochs": every_n_epochs,
            "curvature_every": curvature_every,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if save_optimizer < 0:
            raise ValueError(f"save_optimizer must be True, False or k >= 1, got {save_optimizer}.")
        if on_error not in ("raise", "warn"):
            raise ValueError(f'on_error must be "raise" or "warn", got {on_error!r}.')
        self.path = Path(path)
        self.num_checkpoints = num_checkpoints
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.save_optimizer = save_optimizer
        self.overwrite = overwrite
        self.fingerprint = fingerprint
        self.curvature = online_curvature(
            curvature,
            curvature_every,
            fisher,
            curvature_device,
            curvature_dtype,
            curvature_dense_side,
        )
        self.on_error = on_error
        self.parts: dict[str, Stateful] = {}
        self._schedule: frozenset[int] = frozenset()
        self._facts: Facts | None = None  # None: nothing is being recorded
        self._idle = False
        self._in_batch = False
        self._lock = FolderLock(self.path)
        self._before_forward: ReplacedMethod | None = None
        self._restored: Mapping[str, Any] | None = None  # state in the checkpoint to resume from
        self._final: RecorderState | None = None  # where a further fit continues
        self._ended: Mapping[str, Any] = {}  # state_dict() once recording has ended
        self._make_observers(Processes())

    def _make_observers(self, processes: Processes) -> None:
        """Observers, and the writer, of one fit."""
        self._processes = processes
        writer = FirstProcessWriter(TrajectoryWriter(self.path), processes)
        self._writer = cast(TrajectoryWriter, writer)
        several = "several processes" if processes.count > 1 else None
        self._indices = ExampleIndices(snapshots=several is None)
        self._rng = RngLog(self._indices, absent=several)
        self._steps = StepTable(self._indices, self._rng, processes)
        self._curvature: CurvatureStatistics | None = None
        if self.curvature is not None:
            self._curvature = CurvatureStatistics(self.curvature, self._indices, self._steps)
        self._checkpoints = Checkpoints(self._rng, int(self.save_optimizer))
        # Steps come before the checkpoint that they lead to: with it on disk, they are there too.
        self._observers: list[Observer] = [
            self._indices,
            self._rng,
            self._steps,
            *([] if self._curvature is None else [self._curvature]),
            self._checkpoints,
        ]

    def plan(self, module: LightningModule, trainer: Trainer, train: Any = None) -> RecordingPlan:
        """Say how much disk and memory the recording of a fit will take; nothing is touched.

        ``AttributionModule.plan`` says how long each estimator will take.

        Args:
            module: what will be trained.
            trainer: what will train it.
            train: its training loader or data module. Without one, the number of steps may be
                unknown, and sizes are told for each step and checkpoint.

        Raises:
            UnsupportedTrainingError: the module configures no optimizer, or several.
        """
        steps, curvature, by_number = count_steps(trainer, train), self.curvature, self._by_number
        asked = copy.copy(self)
        asked._schedule = evenly_spaced(steps.total or 0, self.num_checkpoints * by_number)
        checkpoints = asked._planned_checkpoints(steps)
        if curvature is not None:
            curvature = curvature.watching(asked._spacing())
        every = int(self.save_optimizer)
        plan = plan_recording(module, trainer, steps, checkpoints, every, curvature)
        if checkpoints is None and by_number:
            note = f"There are at most {self.num_checkpoints + 1} checkpoints."
            plan = replace(plan, notes=(*plan.notes, note))
        return plan

    def _planned_checkpoints(self, steps: StepCount) -> list[int] | None:
        """Steps after which a checkpoint is kept; None if not known."""
        if steps.total is None or (self.every_n_epochs and steps.per_epoch is None):
            return None
        planned = {step for step in range(1, steps.total + 1) if self.should_record(step)}
        if self.every_n_epochs and steps.per_epoch:
            planned |= {*range(0, steps.total + 1, steps.per_epoch * self.every_n_epochs)}
        return sorted({*planned, steps.total} - {0})

    # When to record.

    def should_record(self, step: int) -> bool:
        """Whether a checkpoint is kept after optimizer step ``step``; override it at will.

        The last step, and the epochs of ``every_n_epochs``, are recorded besides. With several
        processes the first one's answer counts: an override is asked only there.
        """
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            return True
        return step in self._schedule

    def _decides_itself(self) -> bool:
        return type(self).should_record is not TrajectoryRecorder.should_record

    @property
    def _by_number(self) -> bool:
        return self.every_n_steps is None and self.every_n_epochs is None

    def _spacing(self) -> frozenset[int]:
        """Steps of checkpoints that show how far apart they are."""
        return self._schedule if self.every_n_steps is None else frozenset({self.every_n_steps})

    def _is_due(self, step: int) -> bool:
        # Gathering needs all processes. Our own answer is the same in each of them.
        if self._decides_itself():
            return self._processes.by_first(lambda: self.should_record(step))
        return self.should_record(step)

    # Before training: check everything, then write the first files.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._detach()
        self._facts, self._restored = None, None
        self._idle = bool(getattr(trainer, "fast_dev_run", False))
        if self._idle:
            rank_zero_warn("TrajectoryRecorder records nothing with fast_dev_run.")
            return
        require_supported(trainer, pl_module)
        if self.curvature is not None:
            require_uncompiled(pl_module)
        self._make_observers(Processes.of(trainer))
        for observer in self._observers:
            observer.attach(trainer)
        come_first(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._idle:
            return
        require_one_optimizer(trainer.optimizers)
        # Some strategies load the checkpoint that is resumed from only after this hook.
        resumes = trainer.ckpt_path or trainer.strategy.restore_checkpoint_after_setup
        if not (resumes or trainer.global_step):
            with self._disk():
                self._processes.by_first(self._lock.require_free)
                if not self.overwrite:
                    self._writer.require_vacant()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._idle:
            self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        """Start a new trajectory, or continue the one that the training belongs to."""
        state = self._state_before(trainer.global_step)
        again = self._restored is None
        self._restored, self._final, self._ended = None, None, {}
        self._in_batch = False
        self._dataset = getattr(training_loader(trainer), "dataset", None)
        self._trained = TrainedParameters(trainer)
        warn_without_formula(self._trained.optimizer)
        for observer in self._observers:
            observer.begin(trainer, self._trained)
        self._schedule = self._planned_steps(trainer)
        if self._curvature is not None:
            self._curvature.plan(self._spacing())
        with self._disk():
            if state is None:
                self._start(trainer)
            else:
                self._resume(trainer, state, again)
        if self._facts is not None:
            self._before_forward = ReplacedMethod(
                trainer.strategy, "on_train_batch_start", self._begin_forward
            )

    def _state_before(self, global_step: int) -> RecorderState | None:
        """Where the trajectory stood at the step that training begins with; None for a new one."""
        if self._restored is not None:
            return RecorderState.unpack(self._restored)
        if global_step and self._final is None:
            raise no_history(global_step, self.path)
        return self._final if global_step else None

    def _planned_steps(self, trainer: Trainer) -> frozenset[int]:
        """Steps of the checkpoints that ``num_checkpoints`` asks for.

        Raises:
            ValueError: the length of the run is not known.
        """
        if not self._by_number:
            return frozenset()
        try:
            total = trainer.estimated_stepping_batches
        except MisconfigurationException:
            total = math.inf  # an accumulation that changes between epochs
        known = 0 < total < math.inf
        if not known and not self._decides_itself():
            raise ValueError(
                f"num_checkpoints={self.num_checkpoints} needs to know the number of optimizer "
                "steps beforehand, and the trainer cannot tell it. Pass every_n_steps or "
                "every_n_epochs, or set Trainer(max_steps=...)."
            )
        steps = evenly_spaced(int(total) if known else 0, self.num_checkpoints)
        return self._processes.by_first(lambda: steps)

    def _start(self, trainer: Trainer) -> None:
        if self._indices.absent is not None:
            _warn_of_absent_indices(self._indices.absent)
        first = self._processes.by_first
        facts = read_facts(
            trainer,
            self._trained,
            num_examples(self._dataset),
            first(fingerprint, self._dataset) if self.fingerprint else None,
            {
                **self._observed_facts(),
                "planned_checkpoints": sorted(self._schedule),
                "run_id": new_run_id(),
            },
        )
        initial = self._checkpoints.read(0, bool(self.save_optimizer))
        first(self._lock.acquire)
        self._writer.begin(facts, initial, overwrite=self.overwrite)
        self._facts = facts

    def _observed_facts(self) -> dict[str, Any]:
        return {k: v for observer in self._observers for k, v in observer.facts().items()}

    def _note(self, **settings: Any) -> None:
        """Change settings among the facts."""
        assert self._facts is not None
        self._facts = replace(self._facts, settings={**self._facts.settings, **settings})
        with self._disk():
            self._writer.write_facts(self._facts)

    def _note_absences(self) -> None:
        """Note what cannot be recorded any more.

        Raises:
            UnsupportedTrainingError: earlier batches had their indices.
        """
        assert self._facts is not None
        before, now = self._facts.settings, self._observed_facts()
        if all(before.get(name) == value for name, value in now.items()):
            return
        if before["indices"] == "recorded" and self._indices.absent is not None:
            if self._steps.num_steps or self._steps.in_step:
                raise indices_ended(self._indices.absent)
            _warn_of_absent_indices(self._indices.absent)
        self._note(**now)

    # Each batch. The order of Lightning's hooks within one:
    #   on_train_batch_start, training_step, on_before_zero_grad (in the first batch of a step),
    #   on_after_backward, and in the last batch of a step on_before_optimizer_step (gradients
    #   complete and unscaled, not yet clipped), step, scheduler; then on_train_batch_end.

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._facts is None:
            return
        self._drop()  # an epoch cut short; its gradients are zeroed
        self._dataset = require_same_examples(trainer, self._facts, self._dataset)
        if precedes_averaging(trainer):
            self._finish()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch = True
        if self._facts is not None:
            for observer in self._observers:
                observer.begin_batch()
            self._note_absences()

    def _begin_forward(self, on_train_batch_start: Any, *args: Any, **kwargs: Any) -> Any:
        """After every hook that may freeze or unfreeze, before the batch's forward pass.

        That is ``Strategy.on_train_batch_start``, which callbacks cannot define.
        """
        if self._facts is not None and not self._steps.num_steps and not self._steps.in_step:
            still = modules_in_eval_mode(self._trained.module)
            if still != self._facts.settings.get("eval_modules", []):
                self._note(eval_modules=still)
        if self._facts is not None and not self._steps.in_step and self._trained.changed():
            self._begin_stage()
        return on_train_batch_start(*args, **kwargs)

    def _begin_stage(self) -> None:
        """The optimizer trains other parameters from now on."""
        require_whole(self._trained.shards is None, "freezing and unfreezing in mid-training")
        # The state at a stage's start comes first: a stage without it could not be read.
        self._record(last=True)
        if self._facts is None:
            return
        self._facts = self._trained.begin_stage(self._facts, self._steps.num_steps)
        with self._disk():
            self._writer.write_facts(self._facts)
        for observer in self._observers:
            observer.begin_stage()

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._drop()

    def _drop(self) -> None:
        for observer in self._observers:
            observer.drop()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if self._facts is not None:
            self._steps.begin_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._facts is not None:
            for observer in self._observers:
                observer.end_backward()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self._facts is not None:
            self._steps.begin_step(optimizer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._facts is None:
            return
        if batch is None:
            self._indices.begin_batch()  # Lightning passes over it without on_train_batch_start
        self._end_batch(trainer, outputs)

    def _end_batch(self, trainer: Trainer, outputs: Any) -> None:
        for observer in self._observers:
            observer.end_batch(outputs)
        self._in_batch = False
        if self._step_is_new(trainer):
            # Lightning counts a step that a gradient scaler skipped.
            taken = self._steps.took_step()
            for observer in self._observers:
                observer.end_step(taken)
            if taken and self._is_due(self._steps.num_steps):
                self._record()
            elif self._steps.full:
                with self._disk():
                    self._steps.write(self._writer, self._steps.num_steps, last=False)

    def _step_is_new(self, trainer: Trainer) -> bool:
        """Whether Lightning has counted a step that is not recorded yet."""
        counted = self._steps.num_steps + self._steps.skipped
        return self._facts is not None and trainer.global_step > counted

    def _record(self, *, last: bool = False) -> None:
        """Keep a checkpoint, and what leads to it."""
        step = self._steps.num_steps
        if self._checkpoints.wanted(step, last):
            with self._disk():
                for observer in self._observers:
                    observer.write(self._writer, step, last)

    # The end, of an epoch and of the run.

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = self.every_n_epochs
        if self._facts is not None and every and (trainer.current_epoch + 1) % every == 0:
            self._record()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # In a validation, an averaging callback may have put its own weights into the module.
        validating = trainer.validating
        self._detach()
        if self._processes.count > 1 and self._facts is not None:
            # To ask the others for their rows would be to wait for processes that may be gone.
            self._stop(f"by an exception, in several processes: {exception}")
        try:
            if self._step_is_new(trainer):
                self._end_batch(trainer, None)
            self._keep_state()
            mid_batch = self._in_batch and any(True for _ in pl_module.buffers())
            if self._steps.stepping or validating or mid_batch:
                # Weights or buffers may be those of no step: half stepped, or a forward pass
                # ahead.
                self._facts = None
            self._finish()
        except Exception as error:
            # The exception that stopped training is the one to be seen.
            rank_zero_warn(f"The end of the trajectory could not be written: {error}")
        self._facts = None
        self._lock.release()

    def _finish(self) -> None:
        if self._facts is None:
            return
        self._keep_state()
        self._record(last=True)
        if self._facts is not None:
            facts = facts_up_to(self._facts, self._steps.num_steps)
            settings = {**facts.settings, "skipped_steps": self._steps.skipped}
            with self._disk():
                self._writer.write_facts(replace(facts, settings=settings))
                self._writer.finish()
        if self._facts is not None:
            self._final = self._state()
        self._facts = None
        self._detach()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is not None and not self._idle:
            # Nothing was left to train; but the process may have been killed while it finished.
            self._begin(trainer)
            self._finish()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()
        self._lock.release()
        self._restored = None

    def _detach(self) -> None:
        """Leave trainer, loaders and optimizer as they were."""
        for observer in self._observers:
            observer.detach()
        if self._before_forward is not None:
            self._before_forward.remove()
            self._before_forward = None

    # Resuming: the state that travels in Lightning's checkpoints.

    @property
    def state_key(self) -> str:
        return self._generate_state_key(path=str(self.path))

    def state_dict(self) -> dict[str, Any]:
        """Where the trajectory stands: plain numbers, texts and tensors (:class:`RecorderState`).

        After the end of training it is the state before the end, since a checkpoint at the last
        step is kept only where training does not go on. Empty before anything was recorded.
        """
        return dict(self._ended) if self._facts is None else self._state().pack()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._restored = state_dict

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint.get("callbacks", {})
        if self.state_key not in states:
            self._restored = self._processes.by_first(state_of_folder, states, self.path)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._step_is_new(trainer):
            # Saved between the step and the end of its batch.
            self._end_batch(trainer, None)
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def _state(self) -> RecorderState:
        assert self._facts is not None
        state = {k: v for observer in self._observers for k, v in observer.state().items()}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        parts.update(state.pop("parts", {}))
        planned = tuple(sorted(self._schedule))
        run_id = self._facts.settings["run_id"]
        return RecorderState(run_id=run_id, planned=planned, parts=parts, **state)

    def _keep_state(self) -> None:
        if self._facts is not None:
            self._ended = self._state().pack()

    def _resume(self, trainer: Trainer, state: RecorderState, again: bool) -> None:
        """Continue from ``state``; ``again``: in a further fit, which begins at no checkpoint of
        Lightning's and so with the optimizer that the module configures."""
        first, trained, dataset = self._processes.by_first, self._trained, self._dataset
        step = state.rows_on_disk + len(state.rows)
        recorded = first(recorded_facts, self.path, state, trainer.global_step)
        recorded = facts_up_to(recorded, step)
        if (again and trained.shards is None) or len(recorded.stages) > 1:
            # The stage under way goes on; what is frozen or unfrozen now begins one of its own.
            trained.resume(recorded)
            for observer in self._observers:
                observer.begin_stage()
        now = read_facts(trainer, trained, num_examples(dataset), None, {})
        require_same_model(recorded, now)
        if self._curvature is not None:
            self._curvature.watch_as(recorded)
        require_same_curvature(recorded, self._observed_facts().get("curvature"))
        first(compare_fingerprints, recorded.fingerprint, dataset)
        first(self._lock.acquire)
        if again:
            held = self._checkpoints.read(step, with_optimizer=False).parameters
            first(require_same_weights, self.path, recorded, state.checkpoints[-1], held)
        planned = {kept for kept in state.planned if kept <= step}
        planned |= {kept for kept in self._schedule if kept > step}
        self._schedule = frozenset(planned)
        self._writer.resume(recorded, state.rows_on_disk, state.checkpoints)
        # A module may configure the optimizer that it had before: then its state goes on.
        fit = {"new_fit": again, "new_optimizer": again and not trained.optimizer.state}
        facts = continued_facts(recorded, now, step, self._schedule, **fit)
        if facts != recorded:
            self._writer.write_facts(facts)
        epochs = state.rows.epoch[-1:].tolist()
        if self._processes.count > 1:
            self._writer.append(state.rows)  # they are those of all processes
            state = replace(state, rows_on_disk=step, rows=state.rows.between(0, 0))
        ended = self._indices.absent
        for observer in self._observers:
            observer.resume(facts, state)
        for name, part in self.parts.items():
            part.load_state_dict(state.parts[name])
        if facts.settings["indices"] == "recorded" and ended is not None and step:
            raise indices_ended(ended)
        self._facts = facts
        self._note_absences()
        if state.accumulated:
            rank_zero_warn(
                f"Training resumes after {state.accumulated} accumulated batches, and Lightning "
                "keeps no gradients: the next step is made of the later batches alone, and is "
                "recorded so."
            )
        self._catch_up(trainer.current_epoch, epochs)

    def _catch_up(self, epoch: int, epochs: list[int]) -> None:
        """Keep the checkpoint of a finished epoch that Lightning's was saved just before.

        Args:
            epoch: the one that training resumes in.
            epochs: that of the last recorded step, if it was not on disk.
        """
        every = self.every_n_epochs
        ended = bool(epochs) and epochs[0] < epoch
        if every and ended and epoch % every == 0:
            self._record()

    # Faults.

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Do what the disk may fail at; if it does, recording is over."""
        try:
            yield
        except (OSError, TrajectoryFormatError) as error:
            # What is wrong with the folder before training starts is the user's to see.
            refused = isinstance(error, TrajectoryError)
            if refused and (self._facts is None or not isinstance(error, TrajectoryFormatError)):
                raise
            step = self._steps.num_steps
            message = failure(self.path, step, self._checkpoints.steps[-1], error)
            self._stop(f"after step {step}: {error}")
            self._detach()
            self._lock.release()
            if self.on_error == "raise":
                raise RecordingError(message) from error
            rank_zero_warn(f"{message} Training goes on without recording.")

    def _stop(self, reason: str) -> None:
        """Record nothing any more; no training can continue the trajectory from here."""
        self._facts, self._ended = None, stopped_state(reason)


def _warn_of_absent_indices(reason: str) -> None:
    rank_zero_warn(
        f"TrajectoryRecorder records no example indices: {reason}. Estimators that need the "
        "recorded batches will not be available for this run."
    )
