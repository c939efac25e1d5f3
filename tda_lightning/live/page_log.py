"""A report's page in the trainer's loggers: each shows files in a way of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer


def log_page(trainer: Trainer, page: Path, seconds: float) -> None:
    """Log the page and the time that it took, with every logger of the trainer.

    Weights & Biases shows the page itself, MLflow keeps it as an artifact, TensorBoard has its path
    as text. Other loggers have the time alone.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        logger.log_metrics({"tda/report_seconds": seconds}, step=trainer.global_step)
        _SHOWN.get(type(logger).__name__, _not_shown)(logger, page, trainer.global_step)


def _in_wandb(logger: Any, page: Path, step: int) -> None:
    import wandb

    logger.experiment.log({"tda/report": wandb.Html(page.read_text(encoding="utf-8"))})


def _in_mlflow(logger: Any, page: Path, step: int) -> None:
    logger.experiment.log_artifact(logger.run_id, str(page))


def _in_tensorboard(logger: Any, page: Path, step: int) -> None:
    logger.experiment.add_text("tda/report", f"Report: `{page}`", step)


def _not_shown(logger: Any, page: Path, step: int) -> None:
    return None


_SHOWN = {
    "WandbLogger": _in_wandb,
    "MLFlowLogger": _in_mlflow,
    "TensorBoardLogger": _in_tensorboard,
}
