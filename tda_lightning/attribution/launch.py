"""How Lightning runs the work of an attribution: one launch of a Trainer, with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer

from tda_lightning.attribution.quiet import without_device_lines


def quiet_trainer() -> Trainer:
    """One device, and nothing said by Lightning: walks have progress bars of their own."""
    with without_device_lines():
        return Trainer(
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            inference_mode=False,
        )


class OneBatch:
    """A loader for a single step. Not a ``DataLoader`` on purpose: Lightning would put a
    distributed sampler of its own into one."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[int]:
        yield 0


@contextmanager
def gradients_in_predict(trainer: Trainer) -> Iterator[None]:
    """``Trainer.predict`` without inference mode, which would forbid gradients."""
    before = trainer.predict_loop.inference_mode
    trainer.predict_loop.inference_mode = False
    try:
        yield
    finally:
        trainer.predict_loop.inference_mode = before
