"""Records a training run as a trajectory, for attribution afterwards.

This file says *when*: settings, the schedule of checkpoints, and Lightning's hooks. *What* is
recorded are the observers of ``recorded_run.py``: example indices, random states, steps, curvature
statistics, checkpoints.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.recording.checkpoints import best_checkpoint, evenly_spaced
from tda_lightning.recording.checks import require_one_optimizer, require_supported
from tda_lightning.recording.curvature_statistics import online_curvature, require_uncompiled
from tda_lightning.recording.fit_preview import StepCount, count_steps
from tda_lightning.recording.logged import RecordingLog
from tda_lightning.recording.plan import plan_recording
from tda_lightning.recording.recorded_run import RecordedRun
from tda_lightning.recording.resume import state_of_folder
from tda_lightning.recording.trainer_hooks import come_first, precedes_averaging
from tda_lightning.records.plans import RecordingPlan


class TrajectoryRecorder(Callback):
    """Records what attribution needs while a model trains, and changes nothing in the training.

    A trajectory holds the steps table (applied learning rates, optimizer settings, loss, gradient
    norms before and after clipping, example indices of every batch), checkpoints with buffers and
    optimizer state (always the initial weights and the last step), the states of the random
    generators with each checkpoint and wherever they jump between batches, and the facts of the
    run. A run that stops early or is killed leaves a readable trajectory up to its last checkpoint.

    A run that is resumed with ``Trainer.fit(ckpt_path=...)`` continues its trajectory: what was
    recorded after that checkpoint is cut off and recorded again, and the outcome is that of the
    uninterrupted run. A further fit of the same trainer and module continues it too, with a new
    stage, since its optimizer is a new one. Freezing or unfreezing parameters also begins a stage.

    A NaN loss is recorded, with one warning that names its step. A step that a gradient scaler
    skipped is no step; the facts say how many there were. ``Trainer(fast_dev_run=...)`` records
    nothing.

    With several processes the first one writes. The batches of all are recorded as those of one
    process that accumulates over them; what FSDP spreads over processes is gathered for each
    checkpoint. If such a training ends by an exception, the trajectory ends at its last
    checkpoint: a process that may be gone cannot be asked for its batches.

    The trainer's loggers are told after each checkpoint: ``tda/checkpoints``, ``tda/disk_bytes``,
    ``tda/statistics_bytes`` (with ``curvature``) and ``tda/recorder_seconds``, the time spent in
    the recorder since the fit began.

    Args:
        path: folder of the trajectory.
        num_checkpoints: checkpoints after steps floor(i T / num_checkpoints), i = 1, 2, ..., of
            T = ``trainer.estimated_stepping_batches``. Not used when one of the next two is set.
        every_n_steps: a checkpoint after every n optimizer steps.
        every_n_epochs: a checkpoint at the end of every n-th epoch.
        save_optimizer: keep the optimizer's state in every checkpoint (True), in none (False) or
            in every k-th and the last (k).
        overwrite: replace a trajectory in the folder when training starts from step 0.
        fingerprint: read some training examples before training, so that attribution can tell
            the recorded data from others. Random generators are put back as they were.
        curvature: ``"online"`` gathers curvature statistics of every interval between checkpoints
            while the model trains, so that attribution needs no pass for them; None leaves them
            to be fitted at the checkpoints. It needs layers that are neither compiled nor spread
            over processes (FSDP).
        curvature_every: gather at every n-th optimizer step. Attribution needs such a step in
            every segment. None: 64, or fewer so that three fall between any two checkpoints.
        fisher: labels of the statistics: ``"true"``, sampled from the model, for one more backward
            pass to the layers' outputs; ``"empirical"``, the data's own, for none.
        curvature_device: where the sums are kept; None for where the model is.
        curvature_dtype: of the sums, ``"float32"`` or ``"float64"``.
        curvature_dense_side: the widest side of a layer whose covariance is a dense matrix; of a
            wider one (a head over a vocabulary) the leading 256 directions and the diagonal are
            kept. None: 4096.
        on_error: when the trajectory cannot be written (a full disk, say), "raise" stops training
            with a RecordingError; "warn" stops recording with one warning. What was recorded
            before stays readable.

        index_key: of training on a stream (``IterableDataset``): the entry of its batches, a
            dictionary, with the position of each example in the copy of the stream that
            attribution is given, int64 [batch]. None: the examples of a stream are not recorded.

    Attributes:
        parts: what else records during training and must survive a resume: objects with
            ``state_dict`` and ``load_state_dict``, by name.

    Raises:
        TrajectoryExistsError: before training, when the folder holds a trajectory.
        TrajectoryLockedError: before training, when another recorder writes into the folder.
        UnsupportedTrainingError: before training, with manual optimization, several optimizers,
            several training loaders, or a strategy whose processes do not train as one. In
            training, when what an index or a parameter stands for changes, or the layers' calls
            cannot be watched for ``curvature="online"``.
        ResumeError: before training, when the trajectory of the steps before is missing or
            another run's.
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
        index_key: str | None = None,
    ) -> None:
        for name, value in (
            ("num_checkpoints", num_checkpoints),
            ("every_n_steps", every_n_steps),
            ("every_n_epochs", every_n_epochs),
            ("curvature_every", curvature_every),
        ):
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
        statistics = (curvature_every, fisher, curvature_device, curvature_dtype)
        self.curvature = online_curvature(curvature, *statistics, curvature_dense_side)
        self.on_error = on_error
        every = int(save_optimizer)
        warn = on_error == "warn"
        due = self._is_due
        self._run = RecordedRun(self.path, every, self.curvature, due, index_key, warn=warn)
        self.parts = self._run.parts
        self._log = RecordingLog(self.path)
        self._schedule: frozenset[int] = frozenset()  # what num_checkpoints asks for
        self._idle = False
        self._restored: Mapping[str, Any] | None = None  # state in the checkpoint to resume from

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
            return self._run.processes.by_first(lambda: self.should_record(step))
        return self.should_record(step)

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
        return self._run.processes.by_first(lambda: steps)

    # Before training: check everything, then write the first files.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._run.detach()
        self._restored = None
        self._idle = bool(getattr(trainer, "fast_dev_run", False))
        if self._idle:
            rank_zero_warn("TrajectoryRecorder records nothing with fast_dev_run.")
            return
        require_supported(trainer, pl_module)
        if self.curvature is not None:
            require_uncompiled(pl_module)
        self._run.attach(trainer)
        come_first(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._idle:
            return
        require_one_optimizer(trainer.optimizers)
        # Some strategies load the checkpoint that is resumed from only after this hook.
        resumes = trainer.ckpt_path or trainer.strategy.restore_checkpoint_after_setup
        if not (resumes or trainer.global_step):
            self._run.require_free(self.overwrite)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._idle:
            self._log.restart()
            with self._log.timed():
                self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        restored, self._restored = self._restored, None
        self._schedule = self._planned_steps(trainer)
        before = {"overwrite": self.overwrite, "with_fingerprint": self.fingerprint}
        self._run.begin(trainer, restored, self._schedule, self._spacing(), **before)
        self._schedule = self._run.planned
        every, epoch = self.every_n_epochs, trainer.current_epoch
        if every and epoch % every == 0 and self._run.resumed_after(epoch):
            self._run.record()  # Lightning had saved at the end of the epoch, just before this

    # Each batch. The order of Lightning's hooks within one:
    #   on_train_batch_start, training_step, on_before_zero_grad (in the first batch of a step),
    #   on_after_backward, and in the last batch of a step on_before_optimizer_step (gradients
    #   complete and unscaled, not yet clipped), step, scheduler; then on_train_batch_end.

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run.begin_epoch(trainer)
        if precedes_averaging(trainer):
            self._run.finish()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._run.begin_batch(batch)

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._run.drop()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._run.begin_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run.end_backward()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        with self._log.timed():
            self._run.begin_step(optimizer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        with self._log.timed():
            if batch is None:
                self._run.skip_batch()  # Lightning passes over it without on_train_batch_start
            self._run.end_batch(trainer, outputs)
        self._tell(trainer)

    # The end, of an epoch and of the run.

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = self.every_n_epochs
        if every and (trainer.current_epoch + 1) % every == 0:
            with self._log.timed():
                self._run.record()
            self._tell(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        begun = self._run.facts is not None
        with self._log.timed():
            self._run.finish(best_checkpoint(trainer))
        if begun:
            self._log.log(trainer, self._run.num_checkpoints, last=True)

    def _tell(self, trainer: Trainer) -> None:
        if self._run.facts is not None:
            self._log.log(trainer, self._run.num_checkpoints)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        run = self._run
        # In a validation, an averaging callback may have put its own weights into the module.
        validating = trainer.validating
        run.detach()
        if run.processes.count > 1 and run.facts is not None:
            # To ask the others for their rows would be to wait for processes that may be gone.
            run.stop(f"by an exception, in several processes: {exception}")
        try:
            if run.step_is_new(trainer):
                run.end_batch(trainer, None)
            run.keep_state()
            if run.facts is not None and (validating or run.in_between()):
                run.facts = None
            run.finish()
        except Exception as error:
            # The exception that stopped training is the one to be seen.
            rank_zero_warn(f"The end of the trajectory could not be written: {error}")
        run.facts = None
        run.lock.release()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is not None and not self._idle:
            # Nothing was left to train; but the process may have been killed while it finished.
            self._begin(trainer)
            self._run.finish()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._run.detach()
        self._run.lock.release()
        self._restored = None

    # Resuming: the state that travels in Lightning's checkpoints.

    @cached_property  # Lightning asks for it at every hook
    def state_key(self) -> str:  # type: ignore[override]
        return self._generate_state_key(path=str(self.path))

    def state_dict(self) -> dict[str, Any]:
        """Where the trajectory stands: plain numbers, texts and tensors (``RecorderState``).

        After the end of training it is the state before the end, since a checkpoint at the last
        step is kept only where training does not go on. Empty before anything was recorded.
        """
        run = self._run
        return dict(run.ended) if run.facts is None else run.state().pack()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._restored = state_dict

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint.get("callbacks", {})
        if self.state_key not in states:
            self._restored = self._run.processes.by_first(state_of_folder, states, self.path)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._run.step_is_new(trainer):
            # Saved between the step and the end of its batch.
            self._run.end_batch(trainer, None)
            checkpoint["callbacks"][self.state_key] = self.state_dict()
