"""How ``tda evaluate`` retrains a recorded run, following the configuration it was trained with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from tda_lightning.cli.command import not_null
from tda_lightning.cli.edited_data import as_trained
from tda_lightning.cli.own_data import OwnData
from tda_lightning.cli.own_module import build_module
from tda_lightning.cli.question import measurement_of
from tda_lightning.cli.recorded_run import load_parts, replay_device, sources
from tda_lightning.cli.run_config import build, run_configuration, trusts
from tda_lightning.cli.trainers import SILENT
from tda_lightning.evaluation import (
    FreshTraining,
    each_response,
    measure,
    predicted_classes,
    retrain_each,
    retrain_from_scratch,
)
from tda_lightning.evaluation.proximal_bregman import in_double, total_damping
from tda_lightning.measurements import Measurement
from tda_lightning.records.data_module import AttributedData, Reorderable
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.tasks import AttributionTask

_TRAINERS = ("lightning.pytorch.Trainer", "lightning.Trainer")
# Where the data are, their order and the queries are not part of the algorithm.
_NOT_OF_THE_ALGORITHM = ("root", "seed", "num_query", "queries", "num_workers")


class Outcome(NamedTuple):
    """The result of one retraining.

    Attributes:
        measurements: [query].
        seconds: time it took.
        classes: predicted class of each query, int64 [query]; None unless asked for.
    """

    measurements: Tensor
    seconds: float
    classes: Tensor | None = None


@dataclass(frozen=True)
class RecordedRun:
    """A recorded run with everything that retraining it takes."""

    trajectory: Trajectory
    data: AttributedData
    module: LightningModule
    task: AttributionTask | None
    run_config: DictConfig  # as it was trained
    config: DictConfig  # of tda evaluate

    @staticmethod
    def load(config: DictConfig) -> RecordedRun:
        """The run that ``tda evaluate`` is asked about."""
        folder = Path(config.trajectory)
        trajectory, run_config = Trajectory.load(str(folder)), run_configuration(config, folder)
        data, module, task = load_parts(config, run_config)
        module.to(replay_device(config.device, trajectory))
        return RecordedRun(trajectory, data, module, task, run_config, config)

    @cached_property
    def _sources(self) -> tuple[ExampleSource, ExampleSource]:
        return sources(self.data, self.config.batch_size)

    @property
    def train(self) -> ExampleSource:
        """The training set."""
        return self._sources[0]

    @property
    def queries(self) -> ExampleSource:
        """The queries."""
        return self._sources[1]

    @cached_property
    def measurement(self) -> Measurement | None:
        """What was asked about the queries; None: the task's own measurement."""
        return measurement_of(self.config.get("measurement"), self.data)

    @property
    def end(self) -> dict[str, Tensor]:
        """Weights and buffers at the last checkpoint."""
        last = self.trajectory.checkpoints[self.trajectory.last_step]
        return {**last.buffers, **last.parameters}

    def recorded_measurements(self) -> Tensor:
        """Measurements at the last checkpoint, [query]."""
        module, queries = self.module, self.queries
        if self.config.protocol == "pbrf":  # responses to single examples are tiny
            module, queries = in_double(module, queries)
        return measure(
            module,
            self.task,
            self.end,
            queries,
            self.config.batch_size,
            self.trajectory,
            self.measurement,
        )

    def outcomes(
        self, kept: Tensor, seeds: Sequence[int], classes: bool = False
    ) -> Iterator[Outcome]:
        """Retrain on the examples of each row of ``kept``, bool [retraining, train], or on the
        tokens of each row of a longer one, bool [retraining, train x position]."""
        if self.config.protocol == "pbrf":
            yield from self._responses(kept)
            return
        began, queries = time.monotonic(), self.queries
        for state in self._states(kept, seeds):
            measurements = measure(
                self.module,
                self.task,
                state,
                queries,
                self.config.batch_size,
                self.trajectory,
                self.measurement,
            )
            predicted = None
            if classes:
                predicted = predicted_classes(self.module, self.task, state, queries)
            yield Outcome(measurements, time.monotonic() - began, predicted)
            began = time.monotonic()

    def _responses(self, kept: Tensor) -> Iterator[Outcome]:
        """The proximal Bregman response to the single example that each row leaves out."""
        began = time.monotonic()
        before = self.recorded_measurements()
        sets = (self.train, self.queries)
        module, train, queries = in_double(self.module, *sets)
        given_up = (~kept).nonzero()[:, 1].tolist()
        damping = total_damping(self.trajectory, self.config.damping)
        for response in each_response(
            module, self.task, self.end, train, queries, given_up, damping
        ):
            yield Outcome(before.double().cpu() + response, time.monotonic() - began)
            began = time.monotonic()

    def _states(self, kept: Tensor, seeds: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        if self.config.protocol == "single_run":
            run = (self.trajectory, self.module, self.task, self.train)
            weights = kept.float()
            if kept.shape[1] != len(self.train):
                weights = weights.unflatten(1, (len(self.train), -1))
            yield from retrain_each(*run, weights, together=self.config.together)
            return
        for row, seed in zip(kept, seeds, strict=True):
            yield retrain_from_scratch(self.fresh, row, seed)

    def fresh(self, seed: int, **trainer: object) -> FreshTraining:
        """Trainer, module and data as ``tda train`` would build them with this seed, but for other
        settings of the trainer."""
        trust = trusts(self.config)
        data = self._reordered_data(seed)
        if not isinstance(self.data, OwnData):
            data.setup()  # of a plain one, Lightning does it
        seed_everything(seed, workers=True, verbose=False)
        module = build_module(self.run_config, trust)
        made = _fresh_trainer(self.run_config.get("trainer"), trust, trainer)
        return FreshTraining(made, module, data)

    def _reordered_data(self, seed: int) -> AttributedData:
        if isinstance(self.data, Reorderable):
            return self.data.reordered(seed)  # nothing is read again
        changes = not_null(self.config.data)
        if "seed" in self.run_config.data:
            changes["seed"] = seed
        if isinstance(self.data, OwnData):
            changes = {n: v for n, v in changes.items() if n not in ("queries", "num_query")}
        trust = trusts(self.config)
        data = build(self.run_config.data, trust, **changes)
        return as_trained(self.run_config, data, trust, changes)

    def training_settings(self) -> dict[str, object] | None:
        """The settings that decide an outcome beyond the recorded run; None for a replay."""
        if self.config.protocol == "single_run":
            return None
        if self.config.protocol == "pbrf":
            return {"damping": total_damping(self.trajectory, self.config.damping)}
        settings: Any = OmegaConf.to_container(self.run_config, resolve=True)
        data = {k: v for k, v in settings["data"].items() if k not in _NOT_OF_THE_ALGORITHM}
        made = {"data": data, "model": settings["model"], "trainer": settings.get("trainer")}
        changed = {name: settings[name] for name in ("drop", "extra") if settings.get(name)}
        return made | changed


def _fresh_trainer(node: DictConfig | None, trust: bool, changes: Mapping[str, object]) -> Trainer:
    """A new Trainer with the recorded settings and ``changes``, which writes and shows nothing."""
    settings: dict[Any, Any] = {}
    if node:
        settings = dict(OmegaConf.to_container(node, resolve=True))  # type: ignore[arg-type]
    settings |= changes
    target = settings.pop("_target_", _TRAINERS[0])
    if target in _TRAINERS:
        return Trainer(**{**build(settings, trust), **SILENT})
    if not trust:
        raise ValueError(
            f"The recorded configuration trains with {target}; expected {_TRAINERS[0]}. Building "
            "it runs its code: if you know where the trajectory comes from, add trust_config=true."
        )
    trainer: Trainer = build({"_target_": target, **settings, **SILENT}, trust)
    return trainer
