"""Records a training run as a trajectory, for attribution afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.callbacks.checks import (
    require_one_optimizer,
    require_same_examples,
    require_start,
    require_supported,
    require_whole_step,
    trained_parameters,
    training_loader,
)
from tda_lightning.callbacks.facts import Trained, read_checkpoint, read_facts
from tda_lightning.callbacks.indices import IndexCapture, Indices, as_indices
from tda_lightning.callbacks.order import come_first, precedes_averaging
from tda_lightning.callbacks.schedule import spread
from tda_lightning.callbacks.stages import begin_stage, held_parameters, ids
from tda_lightning.callbacks.step_log import (
    StepLog,
    gradient_norm,
    read_hyperparameters,
    read_rates,
)
from tda_lightning.callbacks.stepping import StepWatch, unscaled
from tda_lightning.errors import UnsupportedTrainingError
from tda_lightning.store.fingerprint import fingerprint, num_examples
from tda_lightning.store.reader import facts_up_to
from tda_lightning.store.writer import TrajectoryWriter
from tda_lightning.trajectory import Facts

_ROWS_IN_MEMORY = 10_000


class TrajectoryRecorder(Callback):
    """Writes down what attribution needs while a model trains, and changes nothing in it.

    Recorded are the steps table (applied learning rates, optimizer settings, loss, gradient norm
    before and after clipping, example indices of every batch), checkpoints with buffers and
    optimizer state (the initial weights and the last step always), and the facts of the run. One
    that stops early or is killed leaves a readable trajectory up to its last checkpoint.

    A loss that is NaN is recorded as it is, with one warning that names its step; training goes
    on, since to stop is the user's decision. A step that a gradient scaler skipped is no step; the
    facts say how many there were. Where parameters are frozen or unfrozen, a stage begins. With
    ``Trainer(fast_dev_run=...)`` nothing is recorded.

    Args:
        path: folder of the trajectory.
        num_checkpoints: checkpoints after steps floor(i T / num_checkpoints), i = 1, 2, ..., of
            T = ``trainer.estimated_stepping_batches``. Not used when one of the next two is set.
        every_n_steps: a checkpoint each time that so many optimizer steps are done.
        every_n_epochs: a checkpoint at the end of every n-th epoch.
        save_optimizer: keep the optimizer's state in every checkpoint (True), in none (False) or
            in every k-th and the last (k).
        overwrite: replace a trajectory that is already in the folder, once training starts.
        fingerprint: read some training examples before training, so that attribution can tell
            the recorded data from others. Random generators are put back as they were; only a
            data set that keeps count of its own readings can see it.

    Raises:
        TrajectoryExistsError: before training, when the folder holds a trajectory.
        UnsupportedTrainingError: before training, with manual optimization, several optimizers,
            several training loaders, several processes, or when resuming.

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
        self.path = Path(path)
        self.num_checkpoints = num_checkpoints
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.save_optimizer = save_optimizer
        self.overwrite = overwrite
        self.fingerprint = fingerprint
        self._reset()

    def _reset(self) -> None:
        self._writer = TrajectoryWriter(self.path)
        self._capture = IndexCapture()
        self._log = StepLog()
        self._facts: Facts | None = None  # None: nothing is being recorded
        self._idle = False
        self._trained: Trained = {}  # in any stage so far
        self._held: dict[int, int] = {}  # what the present stage trains
        self._watch = StepWatch()
        self._skipped = 0  # steps that Lightning counted and the optimizer did not take
        self._dataset: Any = None
        self._schedule: frozenset[int] = frozenset()
        self._last_checkpoint = 0
        self._state_kept = bool(self.save_optimizer)  # the last checkpoint has optimizer state
        self._num_written = 0  # checkpoints after the initial one
        self._no_indices: str | None = None
        self._warned = False
        # The step under way.
        self._in_batch = False
        self._batch: Indices | None = None
        self._pending: list[Indices] = []  # batches whose gradients are in the parameters
        self._losses: list[Tensor] = []
        self._applied: tuple[list[float], dict[str, list[float]], Tensor] | None = None

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
        self._watch.detach()
        self._reset()
        self._idle = bool(getattr(trainer, "fast_dev_run", False))
        if self._idle:
            rank_zero_warn("TrajectoryRecorder records nothing with fast_dev_run.")
            return
        require_supported(trainer, pl_module)
        if not self.overwrite:
            self._writer.require_vacant()
        self._capture.install(trainer)
        come_first(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._idle:
            require_one_optimizer(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._idle:
            return
        require_start(trainer)
        optimizer = trainer.optimizers[0]
        dataset = getattr(training_loader(trainer), "dataset", None)
        self._trained = trained_parameters(pl_module, optimizer)
        self._held, self._dataset = ids(self._trained), dataset
        own = type(self).should_record is not TrajectoryRecorder.should_record
        if self.every_n_steps is None and self.every_n_epochs is None:
            self._schedule = spread(trainer, self.num_checkpoints, required=not own)
        if self._capture.absent is None and not self._capture.loaders:
            self._capture.absent = "the training loader was made before the recorder's setup"
        if self._capture.absent is not None:
            self._without_indices(self._capture.absent)
        planned = sorted(self._schedule)
        facts = read_facts(
            trainer,
            pl_module,
            self._trained,
            num_examples=num_examples(dataset),
            fingerprint=fingerprint(dataset) if self.fingerprint else None,
            settings={"indices": self._no_indices or "recorded", "planned_checkpoints": planned},
        )
        initial = read_checkpoint(0, pl_module, optimizer, self._trained, bool(self.save_optimizer))
        self._writer.begin(facts, initial, overwrite=self.overwrite)
        self._facts = facts
        self._watch.attach(
            trainer, lambda: self._begin_batch(trainer, pl_module), self._gradient_norm
        )

    @property
    def _step(self) -> int:  # trainer.global_step counts skipped ones besides
        return self._writer.num_steps + len(self._log)

    def _gradient_norm(self) -> Tensor:
        return gradient_norm([p for p, _ in self._trained.values() if id(p) in self._held])

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

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._facts is None:
            return
        self._pending, self._losses = [], []  # an epoch cut short; its gradients are zeroed
        self._dataset = require_same_examples(trainer, self._facts, self._dataset)
        if precedes_averaging(trainer):
            self._finish(trainer, pl_module)

    def _begin_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After every hook that may freeze or unfreeze, before the batch's forward pass."""
        optimizer = trainer.optimizers[0]
        held = held_parameters(optimizer)
        if self._facts is not None and not self._pending and held != self._held:
            trained = trained_parameters(pl_module, optimizer)
            # The state at a stage's start comes first: a stage without it could not be read.
            self._record(trainer, pl_module, last=True)
            self._facts, self._trained = begin_stage(
                self._facts, self._step, pl_module, self._trained, trained
            )
            self._writer.write_facts(self._facts)
            self._held = held

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
        if self._writer.num_steps or len(self._log) or self._pending:
            raise UnsupportedTrainingError(
                f"Example indices ended in mid-training: {reason}. Expected one kind of batch "
                "throughout; use a sampler of integer positions for all of them."
            )
        self._without_indices(reason)
        settings = {**self._facts.settings, "indices": self._no_indices}
        self._facts = replace(self._facts, settings=settings)
        self._writer.write_facts(self._facts)
        return None

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._pending.clear()
        self._losses.clear()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._facts is not None:
            empty = as_indices([], 0)
            self._pending.append(empty if self._batch is None else self._batch)  # type: ignore[arg-type]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self._facts is None:
            return
        require_whole_step(self._step, held_parameters(optimizer), self._held)
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
        if self._watch.took_step():
            self._end_step(trainer, pl_module)
        elif trainer.global_step > self._step + self._skipped:
            self._skipped += 1
            self._applied, self._pending, self._losses = None, [], []
        self._batch, self._in_batch = None, False

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
        if self.should_record(self._step):
            self._record(trainer, pl_module)
        elif len(self._log) >= _ROWS_IN_MEMORY:
            self._flush()

    def _flush(self) -> None:
        steps = self._log.drain()
        bad = (~steps.loss.isfinite()).nonzero()
        if len(bad) and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"The training loss of step {self._writer.num_steps + int(bad[0]) + 1} is "
                f"{steps.loss[bad[0]].item()}; it is recorded as it is, and training goes on."
            )
        self._writer.append(steps)

    def _record(self, trainer: Trainer, pl_module: LightningModule, *, last: bool = False) -> None:
        step, every = self._step, int(self.save_optimizer)
        new = step != self._last_checkpoint
        self._num_written += new
        with_optimizer = bool(every) and (last or self._num_written % every == 0)
        # Only its end shows which checkpoint of a run is the last; it may lack the state.
        if not new and (self._state_kept or not with_optimizer):
            return
        self._flush()
        self._writer.write_checkpoint(
            read_checkpoint(step, pl_module, trainer.optimizers[0], self._trained, with_optimizer)
        )
        self._last_checkpoint, self._state_kept = step, with_optimizer

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
        self._watch.detach()
        stepping = self._applied is not None
        # In a validation, an averaging callback may have put its own weights into the module.
        if (
            stepping
            or trainer.validating
            or (self._in_batch and any(True for _ in pl_module.buffers()))
        ):
            # Weights or buffers may be those of no step: half stepped, or a forward pass ahead.
            self._facts = None
        try:
            self._finish(trainer, pl_module)
        except Exception as error:
            # The exception that stopped training is the one to be seen.
            rank_zero_warn(f"The end of the trajectory could not be written: {error}")
        self._facts = None

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._facts is None:
            return
        self._record(trainer, pl_module, last=True)
        settings = {**self._facts.settings, "skipped_steps": self._skipped}
        self._writer.write_facts(replace(facts_up_to(self._facts, self._step), settings=settings))
        self._writer.finish()
        self._watch.detach()
        self._facts = None
        self._trained = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._capture.uninstall()
        self._watch.detach()
