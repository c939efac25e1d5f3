"""``training_step`` as it is: called as Lightning calls it, with nothing in between."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import Tensor, nn

from tda_lightning.runtime.stand_in import stand_in_of
from tda_lightning.tasks import batches
from tda_lightning.tasks.batches import Batch
from tda_lightning.tasks.node_batch import NodeBatch
from tda_lightning.tasks.step_noise import restart_noise


def run_training_step(module: nn.Module, batch: Batch) -> Tensor:
    """The loss that ``training_step`` returns for the batch, as a tensor or under ``"loss"``."""
    if isinstance(batch, NodeBatch):
        batch = batch.as_graph()
    step = getattr(module, "training_step", None)
    if not callable(step):
        raise ValueError(
            f"{type(module).__name__} has no training_step: with task=None the module must be a "
            "LightningModule. Give a task, for example ClassificationTask()."
        )
    arguments = [
        parameter
        for parameter in inspect.signature(step).parameters.values()
        if parameter.kind != parameter.KEYWORD_ONLY and parameter.kind != parameter.VAR_KEYWORD
    ]
    takes_index = len(arguments) > 1 or arguments[0].kind == arguments[0].VAR_POSITIONAL
    restart_noise()
    # The number of the batch in its epoch, where it is known; and that of the only loader.
    trainer = stand_in_of(module)
    number = 0 if trainer is None or trainer.moment is None else trainer.moment.batch
    asked = [argument for argument in arguments if argument.default is argument.empty]
    further = (number, 0) if len(asked) > 2 else (number,)
    loss = step(batch, *further) if takes_index else step(batch)
    if isinstance(loss, Mapping):
        loss = loss.get("loss")
    if loss is None:
        raise ValueError(
            "training_step returned None, as it does to skip a batch in training, for a batch of "
            f"{batches.num_examples(batch)} examples: each example needs a loss, if only one of 0 "
            "(outputs.sum() * 0). Return one, or give a task."
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            "Expected training_step to return one loss, as a scalar tensor or under 'loss' in a "
            f"dictionary, got {got}. Give a task instead."
        )
    return loss.reshape(()) if loss.dim() else loss
