"""Records a training run as a trajectory, for attribution afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from tda_lightning.callbacks.checks import (
    indices_ended,
    require_one_optimizer,
    require_same_parameters,
    require_supported,
    trained_parameters,
    training_loader,
)
from tda_lightning.callbacks.facts import Trained, read_checkpoint, read_facts
from tda_lightning.callbacks.indices import IndexCapture, Indices, as_indices
from tda_lightning.callbacks.resume import (
    RecorderState,
    continued_facts,
    failure,
    new_run_id,
    no_history,
    recorded_facts,
    require_same_model,
    require_same_weights,
    state_of_folder,
    stopped_state,
)
from tda_lightning.callbacks.schedule import spread
from tda_lightning.callbacks.step_log import (
    StepLog,
    gradient_norm,
    read_hyperparameters,
    read_rates,
)
from tda_lightning.errors import RecordingError, TrajectoryError, TrajectoryFormatError
from tda_lightning.store.fingerprint import compare_fingerprints, fingerprint, num_examples
from tda_lightning.store.lock import FolderLock
from tda_lightning.store.writer import TrajectoryWriter
from tda_lightning.trajectory import Facts

_ROWS_IN_MEMORY = 10_000


class TrajectoryRecorder(Callback):
    """Writes down what attribution needs while a model trains, and changes nothing in it.

    Recorded are the steps table (applied learning rates, optimizer settings, loss, gradient norm
    before clipping, example indices of every batch), checkpoints with buffers and optimizer
    state, and the facts of the run. The initial weights and the last step are always kept. A
    run that stops early or is killed leaves a readable trajectory up to its last checkpoint.

    A run that is interrupted and resumed with ``Trainer.fit(ckpt_path=...)`` goes on with its
    trajectory: the recorder's state travels in Lightning's checkpoints, what was recorded after
    the resumed one is cut off and made again, and the outcome is that of the uninterrupted run.
    A further fit of the same trainer and module goes on with it too.

    A loss that is NaN is recorded as it is, with one warning that names its step; training goes
    on, since to stop is the user's decision. A step that a gradient scaler skipped is recorded
    with learning rate 0. With ``Trainer(fast_dev_run=...)`` nothing is recorded.

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
        on_error: what happens when the trajectory cannot be written (a full disk, a folder that
            is read-only or has vanished): "raise" stops training with a RecordingError, "warn"
            stops recording with one warning, and training goes on. What was recorded before
            stays readable.

    Raises:
        TrajectoryExistsError: before training, when the folder holds a trajectory.
        TrajectoryLockedError: before training, when another recorder writes into the folder.
        UnsupportedTrainingError: before training, with manual optimization, several optimizers,
            several training loaders or several processes.
        ResumeError: before training, when it does not start at step 0 and the trajectory of the
            steps before is missing or another run's.
        RecordingError: when the trajectory cannot be written, with ``on_error="raise"``.

    Example:
        >>> from tda_lightning import TrajectoryRecorder
        >>> recorder = TrajectoryRecorder("runs/fashion", num_checkpoints=6)
        >>> Trainer(max_epochs=10, callbacks=[recorder]).fit(module, datamodule)  # doctest: +SKIP
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
        on_error: Literal["raise", "warn"] = "raise",
    ) -> None:
        super().__init__()
        counts = {
            "num_checkpoints": num_checkpoints,
            "every_n_steps": every_n_steps,
            "every_n_epochs": every_n_epochs,
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
        self.on_error = on_error
        # What else records during training and must survive a resume, by name: its state_dict()
        # travels in the recorder's, and its load_state_dict() is called before training goes on.
        self.parts: dict[str, Stateful] = {}
        self._lock = FolderLock(self.path)
        self._capture = IndexCapture()
        self._idle = False
        self._restored: Mapping[str, Any] | None = None  # state in the checkpoint to resume from
        self._ended: Mapping[str, Any] = {}  # state_dict() once recording has ended
        self._final: RecorderState | None = None  # where a further fit goes on
        self._reset()

    def _reset(self) -> None:
        self._writer = TrajectoryWriter(self.path)
        self._log = StepLog()
        self._facts: Facts | None = None  # None: nothing is being recorded
        self._trained: Trained = {}
        self._schedule: frozenset[int] = frozenset()
        self._checkpoints = [0]  # steps of those kept
        self._state_kept = bool(self.save_optimizer)  # the last checkpoint has optimizer state
        self._no_indices: str | None = None
        self._stopped: str | None = None  # why nothing is recorded any more
        self._warned = False
        # The step under way.
        self._in_batch = False
        self._batch: Indices | None = None
        self._pending: list[Indices] = []  # batches whose gradients are in the parameters
        self._losses: list[Tensor] = []
        self._loss: tuple[Tensor, Tensor] | None = None  # of the batch under way, and its scale
        self._applied: tuple[list[float], dict[str, list[float]], Tensor] | None = None

    @property
    def _rows(self) -> int:
        """Steps recorded, on disk or not."""
        return self._writer.num_steps + len(self._log)

    # When to record.

    def should_record(self, step: int) -> bool:
        """Whether a checkpoint is kept after optimizer step ``step``; override it at will.

        The last step, and the epochs of ``every_n_epochs``, are recorded besides.
        """
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            return True
        return step in self._schedule

    # Before training: check everything, then write the first files.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._capture.uninstall()
        self._capture = IndexCapture()
        self._facts, self._restored = None, None
        self._idle = bool(getattr(trainer, "fast_dev_run", False))
        if self._idle:
            rank_zero_warn("TrajectoryRecorder records nothing with fast_dev_run.")
            return
        require_supported(trainer, pl_module)
        self._capture.install(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._idle:
            return
        require_one_optimizer(trainer)
        # Some strategies load the checkpoint that is resumed from only after this hook.
        resumes = trainer.ckpt_path or trainer.strategy.restore_checkpoint_after_setup
        if not (resumes or trainer.global_step):
            with self._disk():
                self._lock.require_free()
                if not self.overwrite:
                    self._writer.require_vacant()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._idle:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new trajectory, or go on with the one that the training belongs to."""
        step, state = trainer.global_step, self._final
        if self._restored is not None:
            state = RecorderState.unpack(self._restored)
        elif step == 0:
            state = None
        elif state is None:
            raise no_history(step, self.path)
        again, self._restored = self._restored is None, None
        self._ended, self._final = {}, None
        self._reset()
        optimizer = trainer.optimizers[0]
        dataset = getattr(training_loader(trainer), "dataset", None)
        self._trained = trained_parameters(pl_module, optimizer)
        own = type(self).should_record is not TrajectoryRecorder.should_record
        if self.every_n_steps is None and self.every_n_epochs is None:
            self._schedule = spread(trainer, self.num_checkpoints, required=not own)
        if self._capture.absent is None and not self._capture.loaders:
            self._capture.absent = "the training loader was made before the recorder's setup"
        with self._disk():
            if state is None:
                self._start(trainer, pl_module, dataset)
            else:
                self._resume(trainer, pl_module, dataset, state, again)

    def _start(self, trainer: Trainer, pl_module: LightningModule, dataset: Any) -> None:
        if self._capture.absent is not None:
            self._without_indices(self._capture.absent)
        facts = read_facts(
            trainer,
            pl_module,
            self._trained,
            num_examples=num_examples(dataset),
            fingerprint=fingerprint(dataset) if self.fingerprint else None,
            settings={
                "indices": self._no_indices or "recorded",
                "planned_checkpoints": sorted(self._schedule),
                "run_id": new_run_id(),
            },
        )
        optimizer = trainer.optimizers[0]
        initial = read_checkpoint(0, pl_module, optimizer, self._trained, bool(self.save_optimizer))
        self._lock.acquire()
        self._writer.begin(facts, initial, overwrite=self.overwrite)
        self._facts = facts

    def _resume(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        dataset: Any,
        state: RecorderState,
        again: bool,
    ) -> None:
        """Go on from ``state``; ``again``: in a further fit, whose optimizer is a new one."""
        step = trainer.global_step
        recorded = recorded_facts(self.path, state, step)
        now = read_facts(trainer, pl_module, self._trained, num_examples(dataset), None, {})
        require_same_model(recorded, now)
        compare_fingerprints(recorded.fingerprint, dataset)
        self._lock.acquire()
        if again:
            parameters = {name: parameter for name, (parameter, _) in self._trained.items()}
            require_same_weights(self.path, recorded, state.checkpoints[-1], parameters)
        earlier = {kept for kept in state.planned if kept <= step}
        self._schedule = frozenset(earlier | {kept for kept in self._schedule if kept > step})
        self._writer.resume(recorded, state.rows_on_disk, state.checkpoints)
        self._log = StepLog(state.rows)
        self._checkpoints, self._state_kept = list(state.checkpoints), state.state_kept
        facts = continued_facts(recorded, now, step, self._schedule, new_fit=again)
        if facts != recorded:
            self._writer.write_facts(facts)
        for name, part in self.parts.items():
            part.load_state_dict(state.parts[name])
        self._facts = facts
        indices = facts.settings["indices"]
        self._no_indices = None if indices == "recorded" else indices
        if self._no_indices is None and self._capture.absent is not None and self._rows:
            self._facts = None
            raise indices_ended(self._capture.absent)
        if state.accumulated:
            rank_zero_warn(
                f"Training resumes after {state.accumulated} accumulated batches, and Lightning "
                "keeps no gradients: the next step is made of the later batches alone, and is "
                "recorded so."
            )
        self._make_up(trainer, pl_module)

    def _make_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the checkpoint of a finished epoch that Lightning's was saved just before."""
        every, epochs = self.every_n_epochs, trainer.current_epoch
        rows = self._log.table()
        ended = len(rows) and int(rows.epoch[-1]) < epochs
        if every and ended and epochs % every == 0 and trainer.global_step > self._checkpoints[-1]:
            self._record(trainer, pl_module)

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
        settings = {**self._facts.settings, "indices": self._no_indices}
        self._facts = replace(self._facts, settings=settings)
        with self._disk():
            self._writer.write_facts(self._facts)
        return None

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._pending.clear()
        self._losses.clear()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = torch.ones_like(loss, requires_grad=False)
        self._loss = (loss.detach(), scale if scaler is None else scaler.scale(scale))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._facts is not None:
            empty = as_indices([], 0)
            self._pending.append(empty if self._batch is None else self._batch)  # type: ignore[arg-type]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self._facts is None:
            return
        parameters = [parameter for parameter, _ in self._trained.values()]
        require_same_parameters(trainer, parameters)
        # By on_train_batch_end a per-step scheduler has moved the rates on.
        self._applied = (
            read_rates(optimizer),
            read_hyperparameters(optimizer),
            gradient_norm(parameters),
        )

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
        if self._step_is_new(trainer):
            self._end_step(trainer, pl_module)
        self._batch, self._in_batch, self._loss = None, False, None

    def _step_is_new(self, trainer: Trainer) -> bool:
        """Whether the optimizer has made a step that is not recorded yet."""
        return self._facts is not None and trainer.global_step > self._rows

    def _end_unseen_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a step whose on_train_batch_end has not come here yet."""
        if self._loss is not None:
            loss, scale = self._loss
            self._losses.append(loss / scale * trainer.accumulate_grad_batches)
        self._end_step(trainer, pl_module)
        self._in_batch, self._loss = False, None

    def _end_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        optimizer = trainer.optimizers[0]
        if self._applied is None:  # the module's own optimizer_step did not step
            none = [0.0] * len(optimizer.param_groups)
            self._applied = (none, read_hyperparameters(optimizer), gradient_norm([]))
        rates, hyperparameters, norm = self._applied
        self._log.add(
            epoch=trainer.current_epoch,
            rates=rates,
            hyperparameters=hyperparameters,
            losses=self._losses,
            norm=norm,
            batches=self._pending,
            accumulation=trainer.accumulate_grad_batches,
            scaled=getattr(trainer.precision_plugin, "scaler", None) is not None,
        )
        self._applied, self._pending, self._losses = None, [], []
        if self.should_record(step):
            self._record(trainer, pl_module)
        elif len(self._log) >= _ROWS_IN_MEMORY:
            with self._disk():
                self._flush()

    def _flush(self) -> None:
        steps = self._log.table()
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
        step, every = trainer.global_step, int(self.save_optimizer)
        new = step != self._checkpoints[-1]
        number = len(self._checkpoints) - 1 + new  # the initial one does not count
        with_optimizer = bool(every) and (last or number % every == 0)
        # Only its end shows which checkpoint of a run is the last; it may lack the state.
        if not new and (self._state_kept or not with_optimizer):
            return
        with self._disk():
            self._flush()
            optimizer = trainer.optimizers[0]
            self._writer.write_checkpoint(
                read_checkpoint(step, pl_module, optimizer, self._trained, with_optimizer)
            )
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
        self._capture.uninstall()
        try:
            if self._step_is_new(trainer):
                self._end_unseen_step(trainer, pl_module)
            self._keep_state()
            stepping = self._applied is not None
            if stepping or (self._in_batch and any(True for _ in pl_module.buffers())):
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
        with self._disk():
            if self._facts is not None:
                self._writer.finish()
        if self._facts is not None:
            self._final = self._state()
        self._facts = None
        self._trained = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is not None and not self._idle:
            # Nothing was left to train; but the process may have been killed while it finished.
            self._begin(trainer, pl_module)
            self._finish(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._capture.uninstall()
        self._lock.release()
        self._restored = None

    # Resuming: the state that travels in Lightning's checkpoints.

    @property
    def state_key(self) -> str:
        return self._generate_state_key(path=str(self.path))

    def state_dict(self) -> dict[str, Any]:
        """Where the trajectory stands: plain numbers, texts and tensors (:class:`RecorderState`).

        After the end of training it is the state before the end, since a checkpoint at the last
        step is kept only where training does not go on. Empty before anything was recorded.
        """
        if self._stopped is not None:
            return stopped_state(self._stopped)
        return dict(self._ended) if self._facts is None else self._state().pack()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._restored = state_dict

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint.get("callbacks", {})
        if self.state_key not in states:
            self._restored = state_of_folder(states, self.path)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._step_is_new(trainer):
            # A callback before this one saves in on_train_batch_end.
            self._end_unseen_step(trainer, pl_module)
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def _state(self) -> RecorderState:
        assert self._facts is not None
        return RecorderState(
            run_id=self._facts.settings["run_id"],
            global_step=self._rows,
            rows_on_disk=self._writer.num_steps,
            rows=self._log.table(),
            checkpoints=tuple(self._checkpoints),
            state_kept=self._state_kept,
            planned=tuple(sorted(self._schedule)),
            accumulated=len(self._pending),
            parts={name: part.state_dict() for name, part in self.parts.items()},
        )

    def _keep_state(self) -> None:
        if self._facts is not None:
            self._ended = self._state().pack()

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
            step, self._facts = self._rows, None
            self._stopped = f"after step {step}: {error}"
            self._capture.uninstall()
            self._lock.release()
            message = failure(self.path, step, self._checkpoints[-1], error)
            if self.on_error == "raise":
                raise RecordingError(message) from error
            rank_zero_warn(f"{message} Training goes on without recording.")
