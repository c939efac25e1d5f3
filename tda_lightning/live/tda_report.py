"""A callback that explains a few validation queries at the end of training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import Subset

from tda_lightning.attribution.module import AttributionModule
from tda_lightning.estimators import Estimator, TracIn
from tda_lightning.evaluation.retraining import measure
from tda_lightning.live.page_log import log_page
from tda_lightning.recording import TrajectoryRecorder
from tda_lightning.records.scores import Scores
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.report import write_report
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.tasks import AttributionTask

_CONSIDERED = 1000  # validation examples whose measurements are looked at


class TdaReport(Callback):
    """Attributes a handful of validation examples at the end of ``fit``, writes the report and logs
    it with the trainer's loggers.

    The queries are the validation examples that the final model does worst on, among the first
    1000. They must come from one map-style validation loader. Needs a
    :class:`~tda_lightning.TrajectoryRecorder` among the trainer's callbacks. What goes wrong here
    is a warning: the training is done, and the run can be attributed afterwards. In a training of
    several processes nothing is attributed.

    Args:
        num_queries: how many queries.
        estimator: by default TracIn, which takes a pass over the training set for each checkpoint
            and works with every optimizer that has a rate.
        task: the training loss and the measurement; None for the module's own ``training_step``.
        path: of the page; by default ``report.html`` in the trajectory's folder. The scores are
            beside it, ``report.h5``.
        batch_size: training examples at a time.

    Attributes:
        scores: those of the last fit; None before.

    Raises:
        ValueError: ``num_queries`` is below 1.

    Example:
        >>> from tda_lightning import TdaReport, TrajectoryRecorder
        >>> callbacks = [TrajectoryRecorder("runs/fashion"), TdaReport(num_queries=8)]
        >>> Trainer(callbacks=callbacks).fit(module, datamodule)  # doctest: +SKIP
    """

    def __init__(
        self,
        num_queries: int = 8,
        estimator: Estimator | None = None,
        task: AttributionTask | None = None,
        path: str | Path | None = None,
        batch_size: int = 256,
    ) -> None:
        if num_queries < 1:
            raise ValueError(f"num_queries must be at least 1, got {num_queries}.")
        self.num_queries, self.batch_size = num_queries, batch_size
        self.estimator = TracIn() if estimator is None else estimator
        self.task, self.path = task, None if path is None else Path(path)
        self.scores: Scores | None = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attribute, write and log; a failure is a warning."""
        if getattr(trainer, "fast_dev_run", False):
            return
        if trainer.world_size > 1:
            rank_zero_warn(
                f"TdaReport attributes in one process, and this training has {trainer.world_size}. "
                "Attribute the recorded run afterwards: tda attribute, or AttributionModule."
            )
            return
        try:
            self._explain(trainer, pl_module)
        except Exception as error:
            rank_zero_warn(f"TdaReport wrote no report: {error} The recorded run is not affected.")

    def _explain(self, trainer: Trainer, module: LightningModule) -> None:
        began = time.monotonic()
        folder = _recorded_folder(trainer)
        trajectory = Trajectory.load(folder)
        data_module = getattr(trainer, "datamodule", None)
        train = ExampleSource.of(trainer.train_dataloader, 256, "training", data_module)
        loaders = trainer.val_dataloaders
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
        if len(loaders) != 1 or loaders[0] is None:
            got = "none" if loaders[0] is None else len(loaders)
            raise ValueError(
                f"Expected one validation loader, whose examples are explained, got {got}."
            )
        query = ExampleSource.of(loaders[0], 256, "query", data_module)
        rows = self._worst(module, trajectory, query)
        chosen = query.with_dataset(Subset(query.dataset, rows))
        page = self.path or folder / "report.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        attribution = AttributionModule(module, trajectory, self.estimator, self.task)
        scores = attribution.attribute(
            train, chosen, self.batch_size, provenance={"query_indices": rows}
        )
        scores.save(page.with_suffix(".h5"), overwrite=True)
        write_report(scores, page, train=train.dataset, query=query.dataset, trajectory=trajectory)
        self.scores = scores
        log_page(trainer, page, time.monotonic() - began)

    def _worst(self, module: LightningModule, trajectory: Trajectory, query: ExampleSource) -> Any:
        """The queries with the largest measurements, the worst first."""
        last = trajectory.checkpoints[trajectory.last_step]
        few = min(len(query), _CONSIDERED)
        source = query.with_dataset(Subset(query.dataset, range(few)))
        state = {**last.buffers, **last.parameters}
        measured = measure(module, self.task, state, source, self.batch_size, trajectory)
        return measured.argsort(descending=True, stable=True)[: self.num_queries].tolist()


def _recorded_folder(trainer: Trainer) -> Path:
    """The folder of the trajectory that the trainer's recorder wrote.

    Raises:
        ValueError: there is no recorder.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, TrajectoryRecorder):
            return callback.path
    raise ValueError("Expected a TrajectoryRecorder among the trainer's callbacks, got none.")
