"""How a recording starts, goes on after an interruption, and gives up when the disk fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from tda_lightning.recording.checks import (
    indices_ended,
    trained_parameters,
    training_loader,
    warn_without_formula,
)
from tda_lightning.recording.curvature import (
    CurvatureGatherer,
    OnlineCurvature,
)
from tda_lightning.recording.facts import Trained, read_checkpoint, read_facts
from tda_lightning.recording.indices import IndexCapture, Indices
from tda_lightning.recording.jumps import Jumps
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
from tda_lightning.recording.schedule import spread
from tda_lightning.recording.several_processes import gathered, shared_writer
from tda_lightning.recording.sharded import Shards, require_whole
from tda_lightning.recording.stages import ids, stage_under_way
from tda_lightning.recording.step_log import Batch, StepLog, gradient_norm
from tda_lightning.recording.stepping import StepWatch
from tda_lightning.records.errors import RecordingError, TrajectoryError, TrajectoryFormatError
from tda_lightning.records.trajectory import Facts, Steps
from tda_lightning.runtime.processes import Processes
from tda_lightning.runtime.random_states import States, current_states
from tda_lightning.store.fingerprint import compare_fingerprints, fingerprint, num_examples
from tda_lightning.store.lock import FolderLock
from tda_lightning.store.reader import facts_up_to
from tda_lightning.store.writer import TrajectoryWriter


class Stateful(Protocol):
    """Something whose state travels in Lightning's checkpoints: plain data and tensors."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class ContinuingRecorder(Callback, ABC):
    """A recorder's trajectory as far as it has come; a subclass says what is recorded.

    ``parts`` is for whatever else records during training and must survive a resume: by name,
    objects whose ``state_dict()`` travels in the recorder's, and whose ``load_state_dict()`` is
    called before training goes on.
    """

    path: Path
    num_checkpoints: int
    every_n_steps: int | None
    every_n_epochs: int | None
    save_optimizer: bool | int
    overwrite: bool
    fingerprint: bool
    on_error: Literal["raise", "warn"]

    def __init__(self, path: str | Path, curvature: OnlineCurvature | None) -> None:
        super().__init__()
        self.curvature = curvature
        self.path = Path(path)
        self.save_optimizer = True
        self.parts: dict[str, Stateful] = {}
        self._gatherer: CurvatureGatherer | None = None
        if curvature is not None:
            self._gatherer = CurvatureGatherer(
                curvature, lambda: self._rows + 1, lambda: self._batch
            )
            self.parts["curvature"] = self._gatherer
        self._processes = Processes()
        self._shards: Shards | None = None  # None: every process holds the whole model
        self._watch = StepWatch()
        self._lock = FolderLock(self.path)
        self._capture = IndexCapture()
        self._idle = False
        self._restored: Mapping[str, Any] | None = None  # state in the checkpoint to resume from
        self._ended: Mapping[str, Any] = {}  # state_dict() once recording has ended
        self._final: RecorderState | None = None  # where a further fit goes on
        self._reset()

    def _reset(self) -> None:
        self._writer = shared_writer(TrajectoryWriter(self.path), self._processes)
        self._log = StepLog()
        self._facts: Facts | None = None  # None: nothing is being recorded
        self._trained: Trained = {}  # in any stage so far
        self._held: dict[int, int] = {}  # what the present stage trains
        self._skipped = 0  # steps that Lightning counted and the optimizer did not take
        self._dataset: Any = None
        self._schedule: frozenset[int] = frozenset()
        self._checkpoints = [0]  # steps of those kept
        self._state_kept = bool(self.save_optimizer)  # the last checkpoint has optimizer state
        self._no_indices: str | None = None
        self._jumps: Jumps | None = None  # None: random states are kept with checkpoints alone
        self._stopped: str | None = None  # why nothing is recorded any more
        self._warned = False
        # The step under way.
        self._in_batch = False
        self._batch: Indices | None = None
        self._pending: list[Batch] = []  # those whose gradients are in the parameters
        self._losses: list[Tensor] = []
        self._loss: tuple[Tensor, Tensor] | None = None  # of the batch under way, and its scale
        self._applied: tuple[list[float], dict[str, list[float]], Tensor] | None = None

    @property
    def _rows(self) -> int:
        """Steps recorded, on disk or not."""
        return self._writer.num_steps + len(self._log)

    @abstractmethod
    def _decides_itself(self) -> bool:
        """Whether a user has overridden ``should_record``: then no schedule is needed."""

    @abstractmethod
    def should_record(self, step: int) -> bool:
        """Whether a checkpoint is kept after optimizer step ``step``."""

    @abstractmethod
    def _record(self, trainer: Trainer, pl_module: LightningModule, *, last: bool = False) -> None:
        """Keep a checkpoint, and the steps that lead to it."""

    @abstractmethod
    def _end_unseen_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a step whose on_train_batch_end has not come here yet."""

    @abstractmethod
    def _without_indices(self, reason: str) -> None:
        """Record no example indices, and say why."""

    @abstractmethod
    def _begin_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a stage where the set of trained parameters has changed."""

    def _together(self, rows: Steps) -> Steps:
        return gathered(rows, self._processes, sharded=self._shards is not None)

    def _gradient_norm(self) -> Tensor:
        """Of what the present stage trains; of this process's pieces where they are spread."""
        held = {name: p for name, (p, _) in self._trained.items() if id(p) in self._held}
        if self._shards is not None:
            return self._shards.gradient_norm(held)
        return gradient_norm(list(held.values()))

    def _gather(self) -> None:
        """Gather curvature of what the present stage trains."""
        if self._gatherer is not None:
            held = {name: p for name, (p, _) in self._trained.items() if id(p) in self._held}
            self._gatherer.begin(held)

    def _watching(self) -> dict[str, Any] | None:
        """What the facts say of the curvature that is gathered."""
        return None if self._gatherer is None else self._gatherer.settings.facts()

    def _watch_as(self, recorded: Any) -> None:
        """Go on watching as often as before, where the recorder may choose."""
        chosen = self.curvature is not None and self.curvature.every is None
        if self._gatherer is not None and chosen and isinstance(recorded, Mapping):
            settings = self._gatherer.settings
            self._gatherer.settings = replace(settings, every=recorded.get("every"))

    def _stop_listening(self) -> None:
        self._capture.uninstall()
        self._watch.detach()
        if self._gatherer is not None:
            self._gatherer.uninstall()

    # The start.

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
        warn_without_formula(optimizer)
        self._shards = Shards.of(trainer.model)  # type: ignore[arg-type]
        self._held, self._dataset = ids(self._trained), dataset
        if self._gatherer is not None:
            require_whole(self._shards is None, "curvature='online'")
            self._gather()
        if self.every_n_steps is None and self.every_n_epochs is None:
            own = spread(trainer, self.num_checkpoints, required=not self._decides_itself())
            self._schedule = self._processes.by_first(lambda: own)
        if self._gatherer is not None and self.curvature is not None:
            planned = {self.every_n_steps} if self.every_n_steps is not None else self._schedule
            self._gatherer.settings = self.curvature.watching(planned)
        if self._capture.absent is None and not self._capture.loaders:
            self._capture.absent = "the training loader was made before the recorder's setup"
        with self._disk():
            if state is None:
                self._start(trainer, pl_module, dataset)
            else:
                self._resume(trainer, pl_module, dataset, state, again)
        if self._facts is not None:
            self._watch.attach(
                trainer, lambda: self._begin_batch(trainer, pl_module), self._gradient_norm
            )

    def _start(self, trainer: Trainer, pl_module: LightningModule, dataset: Any) -> None:
        if self._capture.absent is not None:
            self._without_indices(self._capture.absent)
        facts = read_facts(
            trainer,
            pl_module,
            self._trained,
            num_examples=num_examples(dataset),
            fingerprint=self._processes.by_first(lambda: fingerprint(dataset))
            if self.fingerprint
            else None,
            settings={
                "indices": self._no_indices or "recorded",
                "random": self._random_recorded(),
                "planned_checkpoints": sorted(self._schedule),
                **({} if self._gatherer is None else {"curvature": self._watching()}),
                "run_id": new_run_id(),
            },
        )
        optimizer = trainer.optimizers[0]
        initial = read_checkpoint(
            0, pl_module, optimizer, self._trained, bool(self.save_optimizer), current_states()
        )
        if self._shards is not None:
            facts, initial = self._shards.facts(facts), self._shards.checkpoint(initial)
        self._processes.by_first(self._lock.acquire)
        self._writer.begin(facts, initial, overwrite=self.overwrite)
        self._facts = facts
        self._jumps = Jumps() if facts.settings["random"] == "recorded" else None

    def _random_recorded(self) -> str:
        """What the facts say of the random states before batches."""
        several = "absent: several processes" if self._processes.count > 1 else None
        return several or self._no_indices or "recorded"

    def _note(self, **settings: Any) -> None:
        """Change settings among the facts."""
        assert self._facts is not None
        self._facts = replace(self._facts, settings={**self._facts.settings, **settings})
        with self._disk():
            self._writer.write_facts(self._facts)

    def _left(self) -> States:
        """The states of the random generators that the last step left behind."""
        left = None if self._jumps is None else self._jumps.left
        return current_states() if left is None else left

    def _resume(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        dataset: Any,
        state: RecorderState,
        again: bool,
    ) -> None:
        """Go on from ``state``; ``again``: in a further fit, which begins at no checkpoint of
        Lightning's and so with the optimizer that the module configures."""
        step = state.rows_on_disk + len(state.rows)
        by_first = self._processes.by_first
        recorded = by_first(lambda: recorded_facts(self.path, state, trainer.global_step))
        recorded = facts_up_to(recorded, step)
        if (again and self._shards is None) or len(recorded.stages) > 1:
            # The stage under way goes on; what is frozen or unfrozen now begins one of its own.
            self._trained, self._held = stage_under_way(recorded, pl_module, self._trained)
            self._gather()
        now = read_facts(trainer, pl_module, self._trained, num_examples(dataset), None, {})
        held = read_checkpoint(step, pl_module, trainer.optimizers[0], self._trained, False)
        if self._shards is not None:
            now, held = self._shards.facts(now), self._shards.checkpoint(held)
        require_same_model(recorded, now)
        self._watch_as(recorded.settings.get("curvature"))
        require_same_curvature(recorded, self._watching())
        by_first(lambda: compare_fingerprints(recorded.fingerprint, dataset))
        by_first(self._lock.acquire)
        if again:
            last = state.checkpoints[-1]
            by_first(lambda: require_same_weights(self.path, recorded, last, held.parameters))
        earlier = {kept for kept in state.planned if kept <= step}
        self._schedule = frozenset(earlier | {kept for kept in self._schedule if kept > step})
        self._writer.resume(recorded, state.rows_on_disk, state.checkpoints)
        if self._processes.count == 1:
            self._log = StepLog(state.rows)
        else:
            self._writer.append(state.rows)  # they are those of all processes
        self._checkpoints, self._state_kept = list(state.checkpoints), state.state_kept
        self._skipped = state.global_step - step
        # A module may configure the optimizer that it had before: then its state goes on.
        fit = {"new_fit": again, "new_optimizer": again and not trainer.optimizers[0].state}
        facts = continued_facts(recorded, now, step, self._schedule, **fit)
        if facts != recorded:
            self._writer.write_facts(facts)
        for name, part in self.parts.items():
            part.load_state_dict(state.parts[name])
        self._facts = facts
        indices = facts.settings["indices"]
        self._no_indices = None if indices == "recorded" else indices
        if facts.settings.get("random") == "recorded":
            if self._processes.count > 1:
                self._note(random=self._random_recorded())
            else:
                self._jumps = Jumps(state.left)
        if self._no_indices is None and self._capture.absent is not None and self._rows:
            self._facts = None
            raise indices_ended(self._capture.absent)
        if state.accumulated:
            rank_zero_warn(
                f"Training resumes after {state.accumulated} accumulated batches, and Lightning "
                "keeps no gradients: the next step is made of the later batches alone, and is "
                "recorded so."
            )
        self._make_up(trainer, pl_module, state.rows)

    def _make_up(self, trainer: Trainer, pl_module: LightningModule, rows: Steps) -> None:
        """Keep the checkpoint of a finished epoch that Lightning's was saved just before."""
        every, epochs = self.every_n_epochs, trainer.current_epoch
        ended = len(rows) and int(rows.epoch[-1]) < epochs
        if every and ended and epochs % every == 0 and self._rows > self._checkpoints[-1]:
            self._record(trainer, pl_module)

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
            self._restored = self._processes.by_first(lambda: state_of_folder(states, self.path))

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
            global_step=self._rows + self._skipped,
            rows_on_disk=self._writer.num_steps,
            rows=self._together(self._log.table()),
            checkpoints=tuple(self._checkpoints),
            state_kept=self._state_kept,
            planned=tuple(sorted(self._schedule)),
            accumulated=len(self._pending),
            parts={name: part.state_dict() for name, part in self.parts.items()},
            left=None if self._jumps is None else self._jumps.left,
        )

    def _keep_state(self) -> None:
        if self._facts is not None:
            self._ended = self._state().pack()

    def _step_is_new(self, trainer: Trainer) -> bool:
        """Whether the optimizer has made a step that is not recorded yet."""
        return self._facts is not None and trainer.global_step > self._rows + self._skipped

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
            self._stop_listening()
            self._lock.release()
            message = failure(self.path, step, self._checkpoints[-1], error)
            if self.on_error == "raise":
                raise RecordingError(message) from error
            rank_zero_warn(f"{message} Training goes on without recording.")
