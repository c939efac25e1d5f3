"""How ``tda evaluate`` retrains a recorded run, by the configuration that it was trained with."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from tda_lightning.cli.proximal import in_double, total_damping
from tda_lightning.cli.recorded import build
from tda_lightning.evaluation import (
    FreshTraining,
    each_response,
    measure,
    predicted_classes,
    retrain_afresh,
    retrain_each,
)
from tda_lightning.examples.data import DataModule
from tda_lightning.records.trajectory import Trajectory

_TRAINERS = ("lightning.pytorch.Trainer", "lightning.Trainer")
# Where the data lie, in which order they come and who is asked do not belong to the algorithm.
_NOT_OF_THE_ALGORITHM = ("root", "seed", "num_query", "num_workers")


class Outcome(NamedTuple):
    """What one retraining gave: measurements [query], the seconds it took, and, where they are
    asked for, the classes that it predicts, int64 [query]."""

    measurements: Tensor
    seconds: float
    classes: Tensor | None = None


@dataclass(frozen=True)
class Parts:
    """A recorded run with everything that retraining it takes."""

    trajectory: Trajectory
    data: Any
    module: LightningModule
    task: Any
    recorded: DictConfig
    config: DictConfig

    @property
    def end(self) -> dict[str, Tensor]:
        """Weights and buffers of the recorded run's last checkpoint."""
        last = self.trajectory.checkpoints[self.trajectory.last_step]
        return {**last.buffers, **last.parameters}

    def recorded_measurements(self) -> Tensor:
        """Of the recorded run's end, [query]."""
        module, queries = self.module, self.data.query_dataset
        if self.config.protocol == "pbrf":  # beside responses as small as those of one example
            module, queries = in_double(module, queries)
        return measure(module, self.task, self.end, queries, self.config.batch_size)

    def outcomes(
        self, kept: Tensor, seeds: Sequence[int], classes: bool = False
    ) -> Iterator[Outcome]:
        """After retraining on each row of ``kept``."""
        if self.config.protocol == "pbrf":
            yield from self._responses(kept)
            return
        began, queries = time.monotonic(), self.data.query_dataset
        for state in self._states(kept, seeds):
            found = measure(self.module, self.task, state, queries, self.config.batch_size)
            predicted = None
            if classes:
                predicted = predicted_classes(self.module, self.task, state, queries)
            yield Outcome(found, time.monotonic() - began, predicted)
            began = time.monotonic()

    def _responses(self, kept: Tensor) -> Iterator[Outcome]:
        """After giving up the one example that each row of ``kept`` leaves out."""
        began = time.monotonic()
        before = self.recorded_measurements()
        sets = (self.data.train_dataset, self.data.query_dataset)
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
            work = (self.trajectory, self.module, self.task, self.data.train_dataset)
            yield from retrain_each(*work, kept.float(), together=self.config.together)
            return
        for row, seed in zip(kept, seeds, strict=True):
            yield retrain_afresh(self._fresh, row, seed)

    def _fresh(self, seed: int) -> FreshTraining:
        """As ``tda train`` makes them, by the recorded configuration."""
        recorded, trust = self.recorded, self.config.trust_config
        data = self._data(seed)
        data.setup()
        seed_everything(seed, workers=True, verbose=False)
        module = build(recorded.model, trust)
        return FreshTraining(_trainer(recorded.get("trainer"), trust), module, data)

    def _data(self, seed: int) -> Any:
        """The data in the order of ``seed``."""
        if isinstance(self.data, DataModule):
            # Ours differ by their seed in the order alone, so what was read serves all of them.
            data = copy.copy(self.data)
            data.seed = seed
            return data
        recorded = self.recorded.data
        changes = {key: value for key, value in self.config.data.items() if value is not None}
        if "seed" in recorded:
            changes["seed"] = seed
        return build(recorded, self.config.trust_config, **changes)

    def training(self) -> dict[str, Any] | None:
        """The settings of training afresh, or of a response; None for a replay."""
        if self.config.protocol == "single_run":
            return None
        if self.config.protocol == "pbrf":
            return {"damping": total_damping(self.trajectory, self.config.damping)}
        found = OmegaConf.to_container(self.recorded, resolve=True)
        assert isinstance(found, dict)
        data = {k: v for k, v in found["data"].items() if k not in _NOT_OF_THE_ALGORITHM}
        return {"data": data, "model": found["model"], "trainer": found.get("trainer")}


def _trainer(node: Any, trust: bool) -> Trainer:
    """A new Trainer of the recorded settings, that writes and shows nothing."""
    settings = dict(OmegaConf.to_container(node, resolve=True) if node else {})  # type: ignore[arg-type]
    target = settings.pop("_target_", _TRAINERS[0])
    if target not in _TRAINERS and not trust:
        raise ValueError(
            f"The recorded configuration trains with {target}; expected {_TRAINERS[0]}. Building "
            "it runs its code: if you know where the trajectory comes from, add trust_config=true."
        )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if target not in _TRAINERS:
        made: Trainer = build({"_target_": target, **settings, **quiet}, trust)
        return made
    return Trainer(**{**build(settings, trust), **quiet})
