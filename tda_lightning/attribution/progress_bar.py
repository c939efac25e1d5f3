"""Shows how far an attribution is."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class PassProgressBar(RichProgressBar):
    """Lightning's rich bar, saying which pass of an ``AttributionModule`` is under way."""

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._pass = dataloader_idx
        super().on_predict_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    @property
    def predict_description(self) -> str:
        module: Any = self.trainer.lightning_module
        return str(module.pass_title(self._pass))


def passing_trainer() -> Trainer:
    """Runs the passes of an attribution on one device and shows how far it is."""
    return Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        inference_mode=False,
        callbacks=[PassProgressBar()],
    )
