"""Records a training run as a trajectory, for attribution afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.optimizers import read_hyperparameters, read_rates
from tda_lightning.recording.checks import (
    indices_ended,
    require_one_optimizer,
    require_same_examples,
    require_supported,
    require_whole_step,
    trained_parameters,
)
from tda_lightning.recording.continuing import ContinuingRecorder
from tda_lightning.recording.curvature import online_curvature, require_uncompiled
from tda_lightning.recording.facts import modules_in_eval_mode, read_checkpoint
from tda_lightning.recording.indices import IndexCapture, Indices, as_indices
from tda_lightning.recording.jumps import Jumps
from tda_lightning.recording.order import come_first, precedes_averaging
from tda_lightning.recording.plan import RecordingPlan, plan_recording
from tda_lightning.recording.several_processes import shared_writer
from tda_lightning.recording.sharded import require_whole
from tda_lightning.recording.stages import begin_stage, held_parameters
from tda_lightning.recording.step_log import Batch
from tda_lightning.recording.stepping import unscaled
from tda_lightning.records.trajectory import Facts
from tda_lightning.runtime.processes import Processes
from tda_lightning.store.reader import facts_up_to
from tda_lightning.store.writer import TrajectoryWriter

_ROWS_IN_MEMORY = 10_000
_JUMPS_IN_MEMORY = 1_000  # of 15 kB each
_NO_INDICES = np.zeros(0, dtype=np.int64)


class TrajectoryRecorder(ContinuingRecorder):
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
        online = online_curvature(
            curvature,
            curvature_every,
            fisher,
            curvature_device,
            curvature_dtype,
            curvature_dense_side,
        )
        super().__init__(path, online)
        self.num_checkpoints = num_checkpoints
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.save_optimizer = save_optimizer
        self.overwrite = overwrite
        self.fingerprint = fingerprint
        self.on_error = on_error
        self._reset()

    def plan(self, module: LightningModule, trainer: Trainer, train: Any = None) -> RecordingPlan:
        """Say how much disk and memory the recording of a fit will take; nothing is touched.

        Sizes are in bytes; how long each estimator will take, ``AttributionModule.plan`` says.

        Args:
            module: what will be trained.
            trainer: what will train it.
            train: its training loader or data module. Without one, the number of steps may be
                unknown, and sizes are told for each step and checkpoint.

        Raises:
            UnsupportedTrainingError: the module configures no optimizer, or several.
        """
        return plan_recording(self, module, trainer, train)

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

    def _is_due(self, step: int) -> bool:
        # Gathering needs all processes. Our own answer is the same in each of them.
        if self._decides_itself():
            return self._processes.by_first(lambda: self.should_record(step))
        return self.should_record(step)

    # Before training: check everything, then write the first files.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._stop_listening()
        self._facts, self._restored = None, None
        self._idle = bool(getattr(trainer, "fast_dev_run", False))
        if self._idle:
            rank_zero_warn("TrajectoryRecorder records nothing with fast_dev_run.")
            return
        require_supported(trainer, pl_module)
        self._processes = Processes.of(trainer)
        self._capture = IndexCapture(random=self._processes.count == 1)
        self._writer = shared_writer(TrajectoryWriter(self.path), self._processes)
        self._capture.install(trainer)
        if self._gatherer is not None:
            require_uncompiled(pl_module)
            self._gatherer.install(trainer)
        come_first(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._idle:
            return
        require_one_optimizer(trainer)
        # Some strategies load the checkpoint that is resumed from only after this hook.
        resumes = trainer.ckpt_path or trainer.strategy.restore_checkpoint_after_setup
        if not (resumes or trainer.global_step):
            with self._disk():
                self._processes.by_first(self._lock.require_free)
                if not self.overwrite:
                    self._writer.require_vacant()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._idle:
            self._begin(trainer, pl_module)

    def _without_indices(self, reason: str) -> None:
        self._no_indices = f"absent: {reason}"
        rank_zero_warn(
            f"TrajectoryRecorder records no example indices: {reason}. Estimators that need the "
            "recorded batches will not be available for this run."
        )

    # Each batch. The order of Lightning's hooks within one:
    #   on_train_batch_start, training_step, on_before_zero_grad (in the first batch of a step),
    #   on_after_backward, and in the last batch of a step on_before_optimizer_step (gradients
    #   complete and unscaled, not yet clipped), step, scheduler; then on_train_batch_end.

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch = True
        self._batch = self._take()
        if self._facts is not None and self._jumps is not None:
            self._begin_random(self._facts, self._jumps)

    def _begin_random(self, facts: Facts, jumps: Jumps) -> None:
        assert self._capture.before is not None
        if self._capture.ahead and not facts.settings["loader_workers"]:
            # The generators before the batch itself was fetched are those of a batch or more ago.
            self._jumps = None
            self._note(random="absent: batches are fetched ahead of their turn")
        else:
            jumps.begin_batch(self._capture.before)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._facts is None:
            return
        self._drop()  # an epoch cut short; its gradients are zeroed
        if self._gatherer is not None:
            self._gatherer.end_step(False)
        self._dataset = require_same_examples(trainer, self._facts, self._dataset)
        if precedes_averaging(trainer):
            self._finish(trainer, pl_module)

    def _begin_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After every hook that may freeze or unfreeze, before the batch's forward pass."""
        if self._facts is not None and not self._rows and not self._pending:
            still = modules_in_eval_mode(pl_module)
            if still != self._facts.settings.get("eval_modules", []):
                self._note(eval_modules=still)
        if self._facts is None:
            return
        optimizer = trainer.optimizers[0]
        held = held_parameters(optimizer)
        if not self._pending and held != self._held:
            require_whole(self._shards is None, "freezing and unfreezing in mid-training")
            trained = trained_parameters(pl_module, optimizer)
            # The state at a stage's start comes first: a stage without it could not be read.
            self._record(trainer, pl_module, last=True)
            if self._facts is None:
                return
            self._facts, self._trained = begin_stage(
                self._facts, self._rows, pl_module, self._trained, trained
            )
            with self._disk():
                self._writer.write_facts(self._facts)
            self._held = held
            self._gather()

    def _take(self) -> Indices | None:
        if self._facts is None or self._no_indices is not None:
            return None
        drawn = self._capture.take()
        indices = None if drawn is None else as_indices(drawn, self._facts.num_examples or 0)
        if indices is not None:
            return indices
        if drawn is None:
            reason = "the training loader does not draw its batches from its sampler"
        else:
            reason = f"the training sampler hands out keys such as {drawn!r:.60}, not positions"
        if self._rows or self._pending:
            raise indices_ended(reason)
        self._without_indices(reason)
        self._jumps = None
        self._note(indices=self._no_indices, random=self._random_recorded())
        return None

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._drop()
        if self._gatherer is not None:
            self._gatherer.before_zero_grad()

    def _drop(self) -> None:
        """Forget the batches of the step under way, whose gradients are gone."""
        self._pending, self._losses = [], []
        if self._jumps is not None:
            self._jumps.drop()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = torch.ones_like(loss, requires_grad=False)
        self._loss = (loss.detach(), scale if scaler is None else scaler.scale(scale))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._facts is not None:
            indices = _NO_INDICES if self._batch is None else self._batch
            random = None if self._jumps is None else self._jumps.keep_batch()
            self._pending.append(Batch(indices, random))
            if self._gatherer is not None:
                self._gatherer.after_backward()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self._facts is None:
            return
        require_whole_step(self._rows, held_parameters(optimizer), self._held)
        # By on_train_batch_end a per-step scheduler has moved the rates on.
        norm = unscaled(self._gradient_norm(), trainer)
        self._applied = (read_rates(optimizer), read_hyperparameters(optimizer), norm)

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
            self._take()  # Lightning passes over such a batch without on_train_batch_start
        if isinstance(outputs, Mapping) and outputs.get("loss") is not None:
            # Lightning reports the loss after dividing it by the accumulation.
            self._losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        if self._jumps is not None:
            self._jumps.end_batch()
        if self._step_is_new(trainer):
            self._close_step(trainer, pl_module)
        self._batch, self._in_batch, self._loss = None, False, None

    def _end_unseen_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a step whose on_train_batch_end has not come here yet."""
        if self._loss is not None:
            loss, scale = self._loss
            self._losses.append(loss / scale * trainer.accumulate_grad_batches)
        if self._jumps is not None:
            self._jumps.end_batch()
        self._close_step(trainer, pl_module)
        self._in_batch, self._loss = False, None

    def _close_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what Lightning has counted as a step, if the optimizer has taken it."""
        taken = self._watch.took_step()
        if self._gatherer is not None:
            self._gatherer.end_step(taken)
        if taken:
            self._end_step(trainer, pl_module)
        else:
            self._skipped += 1
            self._applied = None
            self._drop()

    def _end_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._applied is not None
        rates, hyperparameters, norm = self._applied
        self._log.add(
            epoch=trainer.current_epoch,
            rates=rates,
            hyperparameters=hyperparameters,
            losses=self._losses,
            norm=norm,
            applied_norm=self._watch.applied_norm,
            batches=self._pending,
            accumulation=trainer.accumulate_grad_batches,
        )
        self._applied, self._pending, self._losses = None, [], []
        if self._jumps is not None:
            self._jumps.end_step()
        if self._is_due(self._rows):
            self._record(trainer, pl_module)
        elif len(self._log) >= _ROWS_IN_MEMORY or self._log.num_jumps >= _JUMPS_IN_MEMORY:
            with self._disk():
                self._flush()

    def _flush(self) -> None:
        steps = self._together(self._log.table())
        bad = (~steps.loss.isfinite()).nonzero()
        if len(bad) and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"The training loss of step {self._writer.num_steps + int(bad[0]) + 1} is "
                f"{steps.loss[bad[0]].item()}; it is recorded as it is, and training goes on."
            )
        self._writer.append(steps)
        self._log.clear()

    def _record(self, trainer: Trainer, pl_module: LightningModule, *, last: bool = False) -> None:
        step, every = self._rows, int(self.save_optimizer)
        new = step != self._checkpoints[-1]
        number = len(self._checkpoints) - 1 + new  # the initial one does not count
        with_optimizer = bool(every) and (last or number % every == 0)
        # Only its end shows which checkpoint of a run is the last; it may lack the state.
        if not new and (self._state_kept or not with_optimizer):
            return
        with self._disk():
            self._flush()
            if self._gatherer is not None and new:
                start = self._checkpoints[-1]
                self._writer.write_statistics(start, step, self._gatherer.take())
            optimizer = trainer.optimizers[0]
            checkpoint = read_checkpoint(
                step, pl_module, optimizer, self._trained, with_optimizer, self._left()
            )
            if self._shards is not None:
                checkpoint = self._shards.checkpoint(checkpoint)
            self._writer.write_checkpoint(checkpoint)
            self._checkpoints += [step] * new
            self._state_kept = with_optimizer

    # The end, of an epoch and of the run.

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = self.every_n_epochs
        if self._facts is not None and every and (trainer.current_epoch + 1) % every == 0:
            self._record(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # In a validation, an averaging callback may have put its own weights into the module.
        validating = trainer.validating
        self._stop_listening()
        if self._processes.count > 1 and self._facts is not None:
            # To ask the others for their rows would be to wait for processes that may be gone.
            self._facts, self._stopped = None, f"by an exception, in several processes: {exception}"
        try:
            if self._step_is_new(trainer):
                self._end_unseen_step(trainer, pl_module)
            self._keep_state()
            stepping = self._applied is not None
            mid_batch = self._in_batch and any(True for _ in pl_module.buffers())
            if stepping or validating or mid_batch:
                # Weights or buffers may be those of no step: half stepped, or a forward pass
                # ahead.
                self._facts = None
            self._finish(trainer, pl_module)
        except Exception as error:
            # The exception that stopped training is the one to be seen.
            rank_zero_warn(f"The end of the trajectory could not be written: {error}")
        self._facts = None
        self._lock.release()

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._facts is None:
            return
        self._keep_state()
        self._record(trainer, pl_module, last=True)
        facts = facts_up_to(self._facts, self._rows)
        settings = {**facts.settings, "skipped_steps": self._skipped}
        with self._disk():
            if self._facts is not None:
                self._writer.write_facts(replace(facts, settings=settings))
                self._writer.finish()
        if self._facts is not None:
            self._final = self._state()
        self._facts = None
        self._trained = {}
        self._watch.detach()
        if self._gatherer is not None:
            self._gatherer.uninstall()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is not None and not self._idle:
            # Nothing was left to train; but the process may have been killed while it finished.
            self._begin(trainer, pl_module)
            self._finish(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_listening()
        self._lock.release()
        self._restored = None
